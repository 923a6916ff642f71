"""A run as one small file says the same as its folder, and names no place of the machine that it comes from."""

import json
import lzma
import shutil

import numpy as np
import pytest
from folders import make_run

from nsa_train.cli import main
from nsa_train.compare.runs import Arms, Run
from nsa_train.train.heldout import HeldOut

ROUNDING = 5e-5  # of means over the losses of 40 short documents; p-values of two seeds move more


def keep(*runs, out):
    assert main(["compare", "keep", *map(str, runs), "--out", str(out)]) == 0
    return [out / f"{run.name}.json.xz" for run in runs]


def opened(path):
    return json.loads(lzma.decompress(path.read_bytes()))


def evaluated(run):
    """With what `nsa-train eval` leaves."""
    (run / "eval").mkdir()
    found = {"what": "summary", "task": "needle", "length": 512, "accuracy": 1 / 3, "loss": 1.23456789,
             "selection_recall": None, "settings": {"corpus_hash": "c"}}  # fmt: skip
    cell = {"what": "cell", "task": "needle", "length": 512, "depth": 0.5, "zone": None, "accuracy": 1 / 3}
    whole = {"command": f"nsa-train eval {run}", "rows": [cell, found]}
    (run / "eval" / "needle.json").write_text(json.dumps(whole))
    (run / "eval" / "needle.png").write_bytes(b"png")
    return run


def report(runs, out):
    assert main(["compare", *map(str, runs), "--out", str(out)]) == 0
    return json.loads((out / "comparison_tiny.json").read_text())["rows"]


def alike(one, other, place=""):
    """Where two rows of a report differ by more than rounding."""
    if isinstance(one, dict) and isinstance(other, dict) and list(one) == list(other):
        return [line for key in one for line in alike(one[key], other[key], f"{place}.{key}")]
    if isinstance(one, list) and isinstance(other, list) and len(one) == len(other):
        return [line for i, pair in enumerate(zip(one, other, strict=True)) for line in alike(*pair, f"{place}[{i}]")]
    near = {"abs": 1e-3 if place.endswith((".p", ".p_holm")) else ROUNDING, "rel": ROUNDING}
    same = one == pytest.approx(other, **near) if isinstance(one, float) else one == other
    return [] if same else [f"{place}: {one!r}, {other!r}"]


def test_a_report_from_kept_files_is_that_from_the_folders(tmp_path):
    gains = {"full": 0.0, "full_gated": 0.01, "nsa": 0.02}
    runs = [evaluated(make_run(tmp_path, arm, seed, gain)) for arm, gain in gains.items() for seed in (0, 1)]
    files = keep(*runs, out=tmp_path / "kept")
    wanted = report(runs, tmp_path / "out")
    assert alike(wanted, report(files, tmp_path / "again")) == []
    mixed = [*files[:3], *runs[3:]]
    assert alike(wanted, report(mixed, tmp_path / "mixed")) == []
    assert {row["what"] for row in wanted} >= {"comparison", "level", "arm", "run", "eval", "difference"}


def test_answers_may_be_added_to_a_file_of_before_a_key_of_the_configuration(tmp_path):
    run = make_run(tmp_path, "nsa")
    (file,) = keep(run, out=tmp_path / "kept")
    older = opened(file)
    del older["config"]["optim"]["clip"]
    file.write_bytes(lzma.compress(json.dumps(older).encode()))
    keep(evaluated(run), out=tmp_path / "kept")
    assert [row["what"] for row in Run.read(file).evaluations] == ["cell", "summary"]


def test_a_run_that_cannot_be_read_keeps_no_other_from_being_kept(tmp_path, capsys):
    bad, good = make_run(tmp_path, "full"), make_run(tmp_path, "nsa")
    (bad / "config.yaml").write_text((bad / "config.yaml").read_text() + "colour: red\n")
    assert main(["compare", "keep", str(bad), str(good), "--out", str(tmp_path / "kept")]) == 2
    assert "colour" in capsys.readouterr().err
    assert (tmp_path / "kept" / f"{good.name}.json.xz").is_file()


def test_a_kept_run_is_the_run(tmp_path):
    run = evaluated(make_run(tmp_path, "nsa"))
    (file,) = keep(run, out=tmp_path / "kept")
    ours, theirs = Run.read(file), Run.read(run)
    assert (ours.manifest, ours.summary) == (theirs.manifest, theirs.summary)
    for name in HeldOut.__dataclass_fields__:
        a, b = getattr(ours.heldout, name), getattr(theirs.heldout, name)
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if name in ("position", "recall"):
            assert np.array_equal(a[..., 1], b[..., 1])
            assert 0 < np.abs(a / np.maximum(b, 1) - 1)[b > 0].max() < 1e-5
        else:
            assert np.array_equal(a, b), name


def test_a_kept_file_names_no_place_and_is_the_same_again(tmp_path):
    places = [f"data.{key}={tmp_path}/{key}" for key in ("root", "prepared_dir", "corpus")]
    run = evaluated(
        make_run(tmp_path / "runs", "nsa", overrides=[*places, f"init_from={tmp_path}/old", "data.root=x/y"])
    )
    file, again = *keep(run, out=tmp_path / "kept"), *keep(run, out=tmp_path / "again")
    assert file.read_bytes() == again.read_bytes()
    found = opened(file)
    assert found["schema"] == "nsa-train/run/1"
    assert str(tmp_path) not in json.dumps(found)
    config = found["config"]
    assert (config["runs_dir"], config["init_from"]) == ("runs", "old")
    assert [config["data"][key] for key in ("root", "prepared_dir", "corpus")] == ["x/y", "prepared_dir", "corpus"]


def test_places_do_not_keep_runs_of_two_machines_apart(tmp_path):
    runs = []
    for arm in ("full", "nsa"):
        places = ["data=comparison", f"data.root={tmp_path}/{arm}", f"data.corpus={tmp_path}/{arm}/corpus"]
        runs.append(make_run(tmp_path / arm, arm, overrides=places))
    (file,) = keep(runs[0], out=tmp_path / "kept")
    assert list(Arms.read([file, runs[1]]).runs) == ["full", "nsa"]


def test_what_is_there_is_not_overwritten_but_by_the_same_run_with_more_answers(tmp_path, capsys, caplog):
    run = make_run(tmp_path, "nsa")
    (file,) = keep(run, out=tmp_path / "kept")
    before = file.read_bytes()
    keep(run, out=tmp_path / "kept")
    assert file.read_bytes() == before
    keep(evaluated(run), out=tmp_path / "kept")
    assert [row["what"] for row in opened(file)["evaluations"]] == ["cell", "summary"]
    before = file.read_bytes()
    words = ["compare", "keep", str(run), "--out", str(file.parent)]
    shutil.rmtree(run / "eval")
    assert main(words) == 0  # what the folder has lost, the file has still
    assert file.read_bytes() == before
    make_run(tmp_path, "nsa", gain=0.01)
    assert main(words) == 2
    assert f"{file}: keeps another run of that name" in capsys.readouterr().err
    assert file.read_bytes() == before
    assert list(file.parent.iterdir()) == [file]


def test_maps_lie_beside_the_file_and_what_is_too_large_is_named(tmp_path, caplog):
    run = evaluated(make_run(tmp_path, "nsa"))
    (run / "eval" / "maps.png").write_bytes(b"maps of nsa")
    (run / "eval" / "blocks.npz").write_bytes(bytes(3_000_000))
    (file,) = keep(run, out=tmp_path / "kept")
    assert (file.parent / "nsa-0-maps.png").read_bytes() == b"maps of nsa"
    assert f"{file}: not kept: {run / 'eval' / 'blocks.npz'} (3,000,000 bytes); copy it" in caplog.text
    caplog.clear()
    keep(run, out=tmp_path / "kept")
    assert "not kept" not in caplog.text
    found = report([file, make_run(tmp_path, "full")], tmp_path / "out")
    assert [(row["arm"], row["figure"]) for row in found if row["what"] == "maps"] == [
        ("nsa", "comparison_tiny_maps_nsa.png")
    ]
    assert (tmp_path / "out" / "comparison_tiny_maps_nsa.png").read_bytes() == b"maps of nsa"
    (run / "eval" / "maps.png").write_bytes(bytes(300_000))
    keep(run, out=tmp_path / "again")
    assert not (tmp_path / "again" / "nsa-0-maps.png").exists()
    assert f"{run / 'eval' / 'maps.png'} (300,000 bytes)" in caplog.text


def test_answers_at_further_lengths_are_added_to_the_file(tmp_path):
    run = make_run(tmp_path, "nsa")
    (run / "eval").mkdir()

    def kept_with(samples, *lengths):
        told = [{"what": "summary", "task": "mqar", "length": n, "settings": {"samples": samples}} for n in lengths]
        (run / "eval" / "mqar.json").write_text(json.dumps({"rows": told}))
        (file,) = keep(run, out=tmp_path / "kept")
        return [(row["length"], row["settings"]["samples"]) for row in opened(file)["evaluations"]]

    assert kept_with(20, 512) == [(512, 20)]
    assert kept_with(20, 1024, 2048) == [(512, 20), (1024, 20), (2048, 20)]
    assert kept_with(40, 512) == [(512, 40)]


def test_finished_runs_are_kept_though_another_is_not_finished(tmp_path, capsys):
    done, half = make_run(tmp_path, "full"), make_run(tmp_path, "nsa", summary={"status": "interrupted", "steps": 3})
    assert main(["compare", "keep", str(half), str(done), "--out", str(tmp_path / "kept")]) == 2
    assert "nsa-0: the run is not finished (interrupted, 3 steps taken)" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["full-0.json.xz"]


def test_a_long_run_is_a_small_file(tmp_path):
    """Of experiment=r1: 256 held-out rows of 8192 tokens, 12 layers, answers to five tasks and of 48 KV heads."""
    draw, run = np.random.default_rng(0), make_run(tmp_path, "nsa", summary={"steps": 800})
    length = draw.exponential(1750, (1200, 1)).astype(int) + 20

    def sums(edges, share):
        labels = (np.clip(length - edges[:-1], 0, np.diff(edges)) * share(len(edges) - 1)).astype(int)
        return np.stack([labels * draw.normal(4, 1, labels.shape), labels], -1)

    position, recall = np.array([0, *2 ** np.arange(7, 14)]), np.array([0, *2 ** np.arange(9, 14)])
    by_position, by_recall = sums(position, np.ones), sums(recall, lambda buckets: draw.uniform(0, 1, (1200, buckets)))
    sources = np.array([f"source_{i}" for i in range(8)])
    of = np.sort(draw.integers(8, size=1200)).astype(np.int32)
    HeldOut(np.arange(1200), of, sources, by_position, position, by_recall, recall).save(run / "heldout.npz")

    def figures(*names):
        return {name: draw.normal(4, 1) for name in names}

    rows = [{"split": "train", "step": 10 * i, "tokens": 2621440 * i, "load_peak": draw.uniform(1, 3, 11).tolist(),
             "by_source": figures(*sources), **figures("loss", "lr", "grad_norm", "tokens_per_s", "mem_gib", "wait")}
            for i in range(1, 81)]  # fmt: skip
    layer = {"gates": ("cmp", "slc", "win"), "selection": ("distinct_blocks", "neighbour_overlap", "entropy")}
    rows += [{"split": "val", "step": 32 * i, "tokens": 8388608 * i, **figures("loss"), "by_source": figures(*sources),
              "by_position": figures(*map(str, position)), "by_place": figures(*map(str, range(12))),
              "layers": [{kind: figures(*names) for kind, names in layer.items()} for _ in range(12)]}
             for i in range(26)]  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    manifest = json.loads((run / "manifest.json").read_text())
    manifest["initial_weights_sha256"] = {f"layers.{i}.weight [512, 512]": draw.bytes(32).hex() for i in range(200)}
    (run / "manifest.json").write_text(json.dumps(manifest))
    (run / "eval").mkdir()
    for task in ("needle", "multikey", "vartrace", "mqar"):
        cells = [
            {"what": "cell", "task": task, "length": 9, "depth": i, **figures("accuracy", "loss")} for i in range(84)
        ]
        (run / "eval" / f"{task}.json").write_text(json.dumps({"rows": cells}))
    head = {"what": "head", "task": "blocks", "length": 8192}
    heads = [{**head, "layer": i // 2, "kv_head": i % 2, **figures(*map(str, range(15)))} for i in range(48)]
    (run / "eval" / "blocks.json").write_text(json.dumps({"rows": heads}))
    lists = {"document": [*range(60)], "source": [*sources[:6]] * 10, "labels": draw.integers(65536, size=60).tolist()}
    losses = draw.normal(2e5, 1e4, (6, 60)).tolist()
    whole = {"what": "summary", "task": "heldout"}
    lengths = [{**whole, "length": 2048 << i, "by_document": {**lists, "loss": of}} for i, of in enumerate(losses)]
    (run / "eval" / "heldout.json").write_text(json.dumps({"rows": lengths}))
    (file,) = keep(run, out=tmp_path / "kept")
    assert 20_000 < file.stat().st_size < 100_000


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"no archive", "cannot be read"),
        (lzma.compress(b"[]"), "holds no nsa-train/run/1"),
        (lzma.compress(b'{"schema": "nsa-train/run/1", "config": {}}'), "something is missing ('manifest')"),
    ],
)
def test_a_damaged_file_is_named(content, words, tmp_path, capsys):
    (tmp_path / "a.json.xz").write_bytes(content)
    assert main(["compare", str(tmp_path / "a.json.xz"), str(make_run(tmp_path, "full"))]) == 2
    assert f"{tmp_path / 'a.json.xz'}: {words}" in capsys.readouterr().err
