"""Runs that may not stand side by side are refused, each for its own reason."""

import pytest
import yaml
from folders import WEIGHTS, make_run

from nsa_train.cli import main
from nsa_train.compare.runs import Arms
from nsa_train.config.load import load_config
from nsa_train.errors import NsaTrainError

OTHER_CORPUS = {"name": "text", "hash": "d" * 64, "epochs": {}, "share_past": {}}


def refusal(*folders):
    with pytest.raises(NsaTrainError) as caught:
        Arms.read(folders)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_runs_that_differ_in_arm_learning_rate_and_seed_are_taken(tmp_path):
    places = {"full": "here/text-0123456789ab", "nsa": None}  # the corpus is the same, by its hash
    layout = ["parallel=zero3", "parallel.offload_params=cpu", "parallel.deepspeed.dump_state=true"]
    layout.append("trainer.micro_rows=1")
    runs = [make_run(tmp_path, arm, seed, overrides=[f"optim.lr={lr}", "trainer.log_every=3", *layout * (arm == "nsa"),
                                                     f"data.corpus={places.get(arm) or 'null'}"])
            for arm, lr in (("nsa", 2e-3), ("full_gated_wide", 1e-3), ("full", 1e-3), ("window", 1e-3))
            for seed in (1, 0)]  # fmt: skip
    arms = Arms.read(runs[:-1])
    assert list(arms.runs) == ["full", "nsa", "full_gated_wide", "window"]
    assert [run.seed for run in arms.runs["nsa"]] == [0, 1]
    assert [run.seed for run in arms.runs["window"]] == [1]
    assert set(arms.pairs) == {("nsa", "full"), ("full_gated_wide", "full"), ("window", "full"),
                               ("nsa", "full_gated_wide"), ("nsa", "window")}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"manifest": {"corpus": OTHER_CORPUS}}, "nsa-0: corpus dddddddddddd, but "),
        ({"manifest": {"rows_fingerprint": "others"}}, "nsa-0: other rows in another order than "),
        ({"manifest": {"initial_weights_sha256": {**dict.fromkeys(WEIGHTS, "x")}}},
         "starts from other weights than"),
        ({"manifest": {"initial_weights_sha256": {"phi [2]": "x"}}}, "no parameter in common"),
        ({"summary": {"status": "interrupted", "steps": 3}}, "the run is not finished (interrupted, 3 steps taken)"),
        ({"overrides": ["trainer.batch_rows=4"]}, "nsa-0: trainer.batch_rows=4, but "),
        ({"overrides": ["attention.window=32"]}, "nsa-0: attention.window=32, but "),
        ({"overrides": ["parallel.reduce_dtype=bf16"]}, "nsa-0: parallel.reduce_dtype='bf16', but "),
        ({"overrides": ["model.width=64"]}, "nsa-0: model.width=64, but "),
        ({"seed": 1}, "nsa-1: nsa with seed 1 has no partner, full with that seed"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else "",
)  # fmt: skip
def test_a_breach_is_refused_with_its_reason(change, words, tmp_path):
    assert words in refusal(make_run(tmp_path, "full"), make_run(tmp_path, "nsa", **change))


def test_rows_that_other_code_made_of_the_same_plan_are_refused(tmp_path):
    """Where two runs tell a hash of them, also beside runs of before, which tell none."""
    arms = {"full": {}, "nsa": {"rows_sample_sha256": "x"}, "window": {"rows_sample_sha256": "y"}}
    runs = [make_run(tmp_path, arm, manifest=facts) for arm, facts in arms.items()]
    Arms.read(runs[:2])
    said = refusal(*runs)
    assert f"{runs[2]}: other tokens in its rows than {runs[1]}: their commits make rows in other ways" in said
    other_seed = [make_run(tmp_path, arm, 1, manifest={"rows_sample_sha256": "z"}) for arm in ("full", "nsa")]
    Arms.read([*runs[:2], *other_seed])


@pytest.mark.parametrize("other", [{"overrides": ["trainer.steps=3"]}, {"rows": "others"}])
def test_of_other_steps_or_rows_no_other_code_is_told(other, tmp_path):
    """Their samples differ anyway."""
    rows = {"rows_fingerprint": other["rows"]} if "rows" in other else {}
    full = make_run(tmp_path, "full", manifest={"rows_sample_sha256": "x"})
    nsa = make_run(tmp_path, "nsa", manifest={"rows_sample_sha256": "y", **rows}, overrides=other.get("overrides", ()))
    assert "other tokens in its rows" not in refusal(full, nsa)


def test_weights_that_the_baseline_lacks_must_be_alike_too(tmp_path):
    arms = {"full": {}, "nsa": {"kv.win [2]": "x"}, "window": {"kv.win [2]": "y"}}
    runs = [
        make_run(tmp_path, arm, manifest={"initial_weights_sha256": {**WEIGHTS, **more}}) for arm, more in arms.items()
    ]
    Arms.read(runs[:2])
    assert "window-0: starts from other weights than runs of the same seed" in refusal(*runs)


def going_on(runs, arm, step=6, rows="rows of seed 0", sample="x", **drawn):
    """A run from weights that another one trained, which differ in every arm."""
    began = {name: f"{value}0" for name, value in {**WEIGHTS, **drawn}.items()}
    read = {"rows_fingerprint": rows, "rows_sample_sha256": sample}
    origin = {"folder": "x", "step": step, **read, "initial_weights_sha256": began, "origin": None}
    facts = {"origin": origin, "initial_weights_sha256": dict.fromkeys(began, f"{arm} trained")}
    return make_run(runs, arm, manifest=facts, overrides=[f"init_from={runs}/tiny-{arm}-seed0"])


def test_runs_that_go_on_from_paired_runs_are_taken(tmp_path):
    arms = Arms.read([going_on(tmp_path, "full"), going_on(tmp_path, "nsa")])
    assert [[one.get("step") for one in run.lineage] for run in arms.all] == [[None, 6]] * 2


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"step": 5}, "nsa-0: goes on from [5] steps, but "),
        ({"rows": "others"}, "nsa-0: other rows in another order than "),
        ({"sample": "y"}, "nsa-0: other tokens in its rows than "),
        ({"embed.weight [8, 4]": "x"}, "nsa-0: starts from other weights than"),
    ],
)
def test_runs_that_go_on_from_runs_that_are_no_pair_are_refused(other, words, tmp_path):
    assert words in refusal(going_on(tmp_path, "full"), going_on(tmp_path, "nsa", **other))


def test_seeds_that_go_on_from_runs_of_other_lengths_are_refused(tmp_path):
    runs = [going_on(tmp_path, arm) for arm in ("full", "nsa")]
    afresh = [make_run(tmp_path, arm, seed=1) for arm in ("full", "nsa")]
    assert f"{afresh[0]}: starts afresh, but {runs[0]} goes on from [6] steps" in refusal(*runs, *afresh)


def test_a_run_of_before_the_heads_prior_stands_beside_none_that_has_it(tmp_path):
    full, nsa = make_run(tmp_path, "full"), make_run(tmp_path, "nsa")
    tree = yaml.safe_load((nsa / "config.yaml").read_text())
    del tree["model"]["head_prior"]
    (nsa / "config.yaml").write_text(yaml.safe_dump(tree))
    assert "model.head_prior=False, but " in refusal(full, nsa)


def test_a_run_that_goes_on_is_no_partner_of_one_that_began_afresh(tmp_path):
    assert "nsa-0: other rows in another order than " in refusal(make_run(tmp_path, "full"), going_on(tmp_path, "nsa"))


def test_arms_are_one_configuration_with_each_seed_once(tmp_path):
    full, nsa = make_run(tmp_path, "full"), make_run(tmp_path, "nsa")
    again = make_run(tmp_path / "more", "nsa")
    assert f"{again}: nsa with seed 0 is already there: {nsa}" in refusal(full, nsa, again)
    other = [make_run(tmp_path, arm, 1, overrides=[f"optim.lr={lr}"]) for arm, lr in (("full", 3e-3), ("nsa", 1e-3))]
    assert "nsa-1: optim.lr=0.001, but " in refusal(full, nsa, *other)
    assert "name runs of two arms or more" in refusal(full)


def test_held_out_losses_must_be_of_the_same_rows(tmp_path):
    import numpy as np

    full, nsa = make_run(tmp_path, "full"), make_run(tmp_path, "nsa")
    with np.load(nsa / "heldout.npz") as file:
        arrays = dict(file)
    arrays["document"] += 1
    np.savez(nsa / "heldout.npz", **arrays)
    assert "its held-out losses are of other rows" in refusal(full, nsa)


def test_all_breaches_are_told_at_once_on_the_command_line(tmp_path, capsys):
    full, nsa = make_run(tmp_path, "full"), make_run(tmp_path, "nsa", manifest={"corpus": OTHER_CORPUS}, seed=1)
    assert main(["compare", str(full), str(nsa)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: these runs cannot be compared:\n")
    assert "corpus dddddddddddd" in said
    assert "has no partner" in said


def test_runs_from_before_a_key_came_stand_beside_those_from_after(tmp_path):
    full, nsa = make_run(tmp_path, "full"), make_run(tmp_path, "nsa")
    tree = yaml.safe_load((nsa / "config.yaml").read_text())
    del tree["logging"], tree["optim"]["clip"]
    (nsa / "config.yaml").write_text(yaml.safe_dump(tree))
    assert Arms.read([full, nsa]).runs["nsa"][0].config.optim.clip == load_config().optim.clip
    tree["optim"]["clip"] = 0.5
    (nsa / "config.yaml").write_text(yaml.safe_dump(tree))
    assert "optim.clip=0.5" in refusal(full, nsa)
    (nsa / "config.yaml").write_text("[]")
    assert "config.yaml: cannot be read" in refusal(full, nsa)


@pytest.mark.parametrize("missing", ["summary.json", "config.yaml", "manifest.json", "heldout.npz"])
def test_a_folder_that_is_no_finished_run_is_named(missing, tmp_path):
    full, nsa = make_run(tmp_path, "full"), make_run(tmp_path, "nsa")
    (nsa / missing).unlink()
    assert str(nsa / missing) in refusal(full, nsa)


def test_a_run_of_an_older_version_is_named(tmp_path):
    full, nsa = make_run(tmp_path, "full"), make_run(tmp_path, "nsa")
    (nsa / "manifest.json").write_text('{"corpus": {}}')
    assert "says nothing of rows_fingerprint, initial_weights_sha256" in refusal(full, nsa)
