"""Checkpoints under attack: killed while being written, damaged on disk, and no room for the next one."""

import errno
import json
import os
import pickle
import shutil
import subprocess
from contextlib import nullcontext
from functools import partial
from pathlib import Path

import pytest
from launch import contents, limit_file_size, limit_file_size_at, losses, rows, summary

from nsa_train.errors import CheckpointError, StorageError
from nsa_train.train import checkpoint
from nsa_train.train.checkpoint import complete, find_newest_good, verify

PACKAGE = Path(__file__).resolve().parents[2] / "nsa_train"
SHARD = checkpoint.SHARD.format(0)


def steps_of(run):
    return [int(path.name.removeprefix("step_")) for path in complete(run / "checkpoints")]


def leftovers(run):
    return [path.name for path in (run / "checkpoints").iterdir() if ".tmp" in path.name]


# Killed while writing -------------------------------------------------------------------------------------------------


@pytest.mark.process
@pytest.mark.parametrize(
    ("phase", "resumed_from"),
    [
        ("checkpoint-shard", 6),
        ("checkpoint-before-manifest", 6),
        ("checkpoint-before-rename", 6),
        ("checkpoint-before-pointer", 9),
        ("checkpoint-retention", 9),
    ],
)
def test_kill_9_while_a_checkpoint_is_written_leaves_the_last_one_whole(phase, resumed_from, train, killed, whole):
    assert train(environment={"NSA_TRAIN_KILL_AT": phase}).wait() == -9
    assert next(verify(path)["step"] for path in complete(killed / "checkpoints")) == resumed_from
    again = train()
    assert again.wait() == 0, again.text
    assert f"at step {resumed_from}\n" in again.text
    assert rows(killed) == rows(whole)
    assert steps_of(killed) == [12, 9]
    assert leftovers(killed) == []


@pytest.mark.process
def test_kill_9_in_the_first_checkpoint_starts_again_from_the_beginning(train, tmp_path, whole):
    assert train(environment={"NSA_TRAIN_KILL_AT": "checkpoint-before-rename"}).wait() == -9
    assert steps_of(tmp_path / "run") == []
    assert train().wait() == 0
    assert rows(tmp_path / "run") == rows(whole)


# Damaged on disk ------------------------------------------------------------------------------------------------------


def flip_a_bit(checkpoint):
    content = bytearray((checkpoint / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (checkpoint / SHARD).write_bytes(content)


def truncate(checkpoint):
    os.truncate(checkpoint / SHARD, (checkpoint / SHARD).stat().st_size - 100)


def lose_a_file(checkpoint):
    (checkpoint / "buffers.safetensors").unlink()


def take_another_steps_file(checkpoint):
    shutil.copy(checkpoint.parent / "step_3" / SHARD, checkpoint / SHARD)


def edit_the_manifest(checkpoint):
    text = (checkpoint / "manifest.json").read_text()
    assert '"step": 6' in text
    (checkpoint / "manifest.json").write_text(text.replace('"step": 6', '"step": 5', 1))


def empty_the_manifest(checkpoint):
    (checkpoint / "manifest.json").write_text("")


def lose_the_manifest(checkpoint):
    (checkpoint / "manifest.json").unlink()


class Bomb:
    """Unpickling it makes a file."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def plant_a_pickle(checkpoint):
    (checkpoint / SHARD).write_bytes(pickle.dumps(Bomb(checkpoint.parent / "exploded")))


DAMAGES = {
    flip_a_bit: SHARD, truncate: SHARD, lose_a_file: "buffers.safetensors", take_another_steps_file: SHARD,
    edit_the_manifest: "manifest.json", empty_the_manifest: "manifest.json", lose_the_manifest: "manifest.json",
    plant_a_pickle: SHARD,
}  # fmt: skip


@pytest.mark.process
@pytest.mark.parametrize("damage", [flip_a_bit, truncate])
def test_a_damaged_checkpoint_is_named_and_training_goes_on_from_the_one_before(damage, train, killed, whole):
    damage(killed / "checkpoints" / "step_6")
    job = train()
    assert job.wait() == 0, job.text
    assert f"{killed / 'checkpoints' / 'step_6' / SHARD}" in job.text
    assert "at step 3\n" in job.text
    assert (killed / "checkpoints" / "step_6.corrupt").is_dir()
    assert rows(killed) == rows(whole)


@pytest.mark.process
def test_shards_that_two_ranks_exchanged_are_named_and_all_ranks_take_the_checkpoint_before(
    train_ranks, tmp_path, whole
):
    run = tmp_path / "run"
    jobs = train_ranks(2, extra={"NSA_TRAIN_KILL_AT": "checkpoint-retention"})  # of rank 0, at step 9
    assert jobs[0].wait() == -9
    jobs[1].process.kill()
    jobs[1].process.join()
    one, other = (run / "checkpoints" / "step_9" / checkpoint.SHARD.format(rank) for rank in (0, 1))
    before = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(before)
    jobs = train_ranks(2)
    assert [job.wait() for job in jobs] == [0, 0], jobs[0].text
    assert f"damaged checkpoint, trying an older one: {one} " in jobs[0].text
    assert "at step 6\n" in jobs[0].text
    assert losses(run) == pytest.approx(losses(whole), rel=1e-5)


@pytest.mark.process
def test_an_empty_pointer_costs_no_checkpoint_and_is_written_anew(train, killed, whole):
    (killed / "checkpoints" / "latest.json").write_text("")
    job = train()
    assert job.wait() == 0, job.text
    assert "at step 6\n" in job.text
    assert json.loads((killed / "checkpoints" / "latest.json").read_text()) == {"step": 12, "path": "step_12"}
    assert rows(killed) == rows(whole)


@pytest.mark.parametrize("damage", DAMAGES)
def test_every_damage_is_found_and_the_file_is_named(damage, killed, caplog):
    folder = killed / "checkpoints"
    identity = json.loads((folder / "step_6" / "manifest.json").read_text())["identity"]
    damage(folder / "step_6")
    found = find_newest_good(folder, identity)
    assert (found.path, found.manifest["step"]) == (folder / "step_3", 3)
    assert f"{folder / 'step_6' / DAMAGES[damage]}" in caplog.text
    assert (folder / "step_6.corrupt").is_dir()
    assert not (folder / "exploded").exists()


def test_a_checkpoint_that_cannot_be_read_now_is_left_as_it_is(killed, monkeypatch):
    folder = killed / "checkpoints"
    identity = json.loads((folder / "step_6" / "manifest.json").read_text())["identity"]

    def failing(path):
        raise OSError(errno.EIO, "Input/output error", str(path))

    monkeypatch.setattr(checkpoint, "sha256_of", failing)
    with pytest.raises(StorageError, match=r"step_6.*cannot be read now \(Input/output error\); nothing was changed"):
        find_newest_good(folder, identity)
    assert (folder / "step_6").is_dir()


def test_a_checkpoint_of_another_version_is_left_as_it_is(killed):
    folder = killed / "checkpoints"
    path = folder / "step_6" / "manifest.json"
    manifest = json.loads(path.read_text()) | {"schema": "nsa-train/checkpoint/99"}
    manifest.pop("digest")
    path.write_text(json.dumps({**manifest, "digest": checkpoint._digest_of(manifest)}))
    with pytest.raises(CheckpointError, match=r"step_6 is of schema nsa-train/checkpoint/99.*another version"):
        find_newest_good(folder, manifest["identity"])
    assert (folder / "step_6").is_dir()


@pytest.mark.process
def test_without_a_whole_checkpoint_it_stops_with_17_however_often_it_is_started(train, killed):
    for step in (3, 6):
        flip_a_bit(killed / "checkpoints" / f"step_{step}")
    metrics = (killed / "metrics.jsonl").read_bytes()
    for _ in range(2):
        job = train()
        assert job.wait() == 17
        assert "no checkpoint is whole, step_3.corrupt, step_6.corrupt were found damaged" in job.text
        assert "Traceback" not in job.text
        assert summary(killed)["exit_code"] == 17
        assert (killed / "metrics.jsonl").read_bytes() == metrics


@pytest.mark.parametrize(
    ("add", "drop", "words"),
    [
        ("../../config.yaml", None, r"'\.\./\.\./config\.yaml', which is no plain file name"),
        (None, SHARD, f"does not vouch for {SHARD}"),
        (None, "buffers.safetensors", "does not vouch for buffers.safetensors"),
    ],
)
def test_a_forged_manifest_reaches_no_other_file_and_hides_none(add, drop, words, killed):
    path = killed / "checkpoints" / "step_6"
    manifest = json.loads((path / "manifest.json").read_text())
    if add:
        manifest["files"][add] = manifest["files"][SHARD]
    manifest["files"].pop(drop, None)
    del manifest["digest"]
    (path / "manifest.json").write_text(json.dumps({**manifest, "digest": checkpoint._digest_of(manifest)}))
    with pytest.raises(CheckpointError, match=words):
        verify(path)


def test_no_code_of_the_package_unpickles():
    readers = ("torch.load", "pickle.load", "import pickle", "allow_pickle=True", "weights_only=False")
    assert [(p.name, word) for p in PACKAGE.rglob("*.py") for word in readers if word in p.read_text()] == []


# No room --------------------------------------------------------------------------------------------------------------


@pytest.mark.process
def test_a_write_that_fails_midway_ends_with_20_and_leaves_older_checkpoints_whole(train, killed, whole):
    limit = (killed / "checkpoints" / "step_6" / SHARD).stat().st_size // 2
    job = train(before=partial(limit_file_size, limit))
    assert job.wait() == 20
    assert f"{killed / 'checkpoints'}" in job.text
    assert "cannot write a checkpoint" in job.text
    assert "Traceback" not in job.text
    assert summary(killed)["exit_code"] == 20
    assert [verify(path)["step"] for path in complete(killed / "checkpoints")] == [6, 3]
    assert leftovers(killed) == []
    assert train().wait() == 0
    assert rows(killed) == rows(whole)


def only(free, monkeypatch):
    """A disk with so much room, and with what is deleted from now on."""
    used = shutil.disk_usage

    def usage(folder):
        held = sum(file.stat().st_size for path in complete(folder) for file in path.iterdir())
        return used(folder)._replace(free=free - held)

    monkeypatch.setattr(checkpoint.shutil, "disk_usage", usage)


@pytest.mark.parametrize(
    ("room", "damaged", "fits", "left"),
    [(3.5, False, True, [6, 3]), (2.5, False, True, [6]), (2.5, True, False, [6, 3]), (2.1, False, False, [6, 3])],
    ids=["enough", "enough without the older one", "the newer one is damaged", "too little"],
)
def test_an_older_checkpoint_goes_only_where_that_makes_room(room, damaged, fits, left, killed, monkeypatch):
    folder = killed / "checkpoints"
    size = sum(file.stat().st_size for file in (folder / "step_6").iterdir())
    only(int(room * size), monkeypatch)
    if damaged:
        flip_a_bit(folder / "step_6")
    with nullcontext() if fits else pytest.raises(StorageError, match=r"bytes are free and .* the newest is step_6"):
        checkpoint._make_aside(folder, 9)
    assert steps_of(killed) == left


@pytest.mark.process
def test_a_full_disk_at_the_export_ends_with_20_and_the_run_can_be_ended_later(train, tmp_path, whole):
    full = partial(limit_file_size_at, "nsa_train.train.loop", "export_model", 100_000)
    job = train("trainer.export=true", before=full)
    assert job.wait() == 20, job.text
    assert f"{tmp_path / 'run' / 'export'}: cannot be written" in job.text
    assert "Traceback" not in job.text
    assert summary(tmp_path / "run")["exit_code"] == 20
    assert not (tmp_path / "run" / "export").exists()
    assert train("trainer.export=true").wait() == 0
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert rows(tmp_path / "run") == rows(whole)


@pytest.fixture
def small_disk(tmp_path):
    """Mount a file system of a given size; skips where this needs rights that the user has not."""
    place = tmp_path / "disk"
    place.mkdir()

    def mount(size, *options):
        command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size}", *options]), "tmpfs", str(place)]
        if subprocess.run(command, check=False, capture_output=True).returncode:
            pytest.skip("mounting a tmpfs needs root")
        return place

    yield mount
    subprocess.run(["umount", str(place)], check=False, capture_output=True)


@pytest.mark.process
@pytest.mark.parametrize("free", [100_000, 0])
def test_a_full_disk_ends_with_20_and_after_making_room_the_run_goes_on(free, train, killed, small_disk, whole):
    used = sum(-(-len(content) // 4096) * 4096 for content in contents(killed).values())
    disk = small_disk(2 * used)
    shutil.copytree(killed, disk / "run")
    filler = disk / "filler"
    filler.write_bytes(bytes(shutil.disk_usage(disk).free - free))
    before = contents(disk / "run" / "checkpoints")
    job = train(runs=disk)
    assert job.wait() == 20, job.text
    assert str(disk / "run") in job.text
    assert "free some space" in job.text
    assert "Traceback" not in job.text
    assert contents(disk / "run" / "checkpoints") == before
    filler.unlink()
    again = train(runs=disk)
    assert again.wait() == 0, again.text
    assert rows(disk / "run") == rows(whole)
