"""Runs take the learning rates of a sweep of their recipe, none at the edge of what was tried; the report prints it."""

import json
import re
import shlex
from pathlib import Path

import pytest
from folders import make_run

from nsa_train.bench.results import write_result
from nsa_train.cli import main
from nsa_train.compare import kept
from nsa_train.compare.rates import ABLATES, Rates
from nsa_train.config.load import load_config
from nsa_train.errors import NsaTrainError
from nsa_train.train.folder import FREE_KEYS, differing

ROOT = Path(__file__).resolve().parents[2]
ROW = {"arm": "nsa", "lr": 2e-3, "at_edge": False, "losses": {"0.001": 5.1, "0.002": 5.0, "0.004": None}, "set": []}


def rates(tmp_path, *rows):
    return Rates.read(write_result("lr", "sweep", [{**ROW, **row} for row in rows], folder=tmp_path))


def refusal(found, arms, words=()):
    with pytest.raises(NsaTrainError) as caught:
        found.of(arms, words)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(
    ("lr", "tried", "words"),
    [
        (4e-3, (1e-3, 2e-3, 4e-3), "--lrs 0.001 0.002 0.004 0.008"),
        (1e-3, (1e-3, 2e-3, 4e-3), "--lrs 0.0005 0.001 0.002 0.004"),
        (3e-3, (3e-3,), "--lrs 0.0015 0.003 0.006"),
    ],
)
def test_a_rate_at_the_edge_is_refused_with_the_rates_to_add(lr, tried, words, tmp_path):
    found = rates(tmp_path, {"lr": lr, "at_edge": True, "losses": {f"{one:g}": 5.0 for one in tried}})
    assert f"  nsa: the best rate {lr:g} lies at the edge; go on with `sweep --arms nsa {words}`" in refusal(
        found, ["nsa"]
    )
    assert rates(tmp_path, {}).of(["nsa"], []) == {"nsa": 2e-3}


def test_a_sweep_may_be_shorter_and_of_another_seed_but_of_no_other_recipe(tmp_path):
    short = ["trainer.steps=10", "schedule.warmup_share=0.2", "schedule=wsd", "trainer.val_every=10", "seed=100",
             "trainer.val_rows=4", "trainer.heldout_rows=2", "optim.lr=1", "data.root=/elsewhere",
             "runs_dir=/mine", "trainer.cuda_graphs=true"]  # fmt: skip
    assert rates(tmp_path, {"set": short}).of(["nsa"], ["optim.clip=1"]) == {"nsa": 2e-3}  # as it is already
    said = refusal(rates(tmp_path, {"set": [*short, "trainer.batch_rows=4"]}), ["nsa"], ["optim.clip=0.5"])
    assert said.endswith(
        ":\n  nsa: optim.clip=1.0 in the sweep, 0.5 now\n  nsa: trainer.batch_rows=4 in the sweep, 8 now"
    )
    assert "nsa: what the sweep set is no configuration of today" in refusal(rates(tmp_path, {"set": ["a=1"]}), ["nsa"])
    silent = write_result("lr", "sweep", [{"arm": "nsa", "lr": 1e-3}], folder=tmp_path)
    assert "nsa: the sweep does not say what it set" in refusal(Rates.read(silent), ["nsa"])


def test_an_ablation_takes_the_rate_of_what_it_ablates_unless_it_was_swept(tmp_path):
    found = rates(tmp_path, {}, {"arm": "full_gated", "lr": 1e-3}, {"arm": "window", "lr": 4e-3})
    taken = found.of([*ABLATES, "nsa"], [])
    assert taken == {**dict.fromkeys(ABLATES, 2e-3), "nsa": 2e-3, "full_gated_wide": 1e-3, "window": 4e-3}
    assert "no learning rate for full; sweep" in refusal(found, ["full", "nsa"])
    for arm in ABLATES:
        load_config([f"attention={arm}"])
    assert {path.stem for path in (ROOT / "configs" / "attention").glob("*.yaml")} == {
        *ABLATES, "full", "full_gated", "nsa",
    }  # fmt: skip


def test_the_sweep_of_the_documentation_is_one_of_the_runs_behind_it(tmp_path):
    page = (ROOT / "docs" / "comparison.md").read_text().replace("\\\n", " ")
    swept, run = (
        re.search(rf"^python scripts/compare_arms.py {word} .* --set (.*)$", page, re.MULTILINE)[1]
        for word in ("sweep", "run --arms full full_gated nsa --seeds 0 1 2")
    )
    found, runs = rates(tmp_path, {"set": shlex.split(swept)}), load_config(shlex.split(run))
    assert found.of(["nsa"], shlex.split(run)) == {"nsa": 2e-3}
    of_sweep = load_config(shlex.split(swept))
    assert of_sweep.trainer.steps == pytest.approx(runs.trainer.steps / 6, rel=0.02)
    assert of_sweep.seed not in range(10)
    steps = [round(one.schedule.warmup_share * one.trainer.steps) for one in (of_sweep, runs)]
    assert steps[0] == pytest.approx(steps[1], rel=0.02)
    for row in json.loads((ROOT / "docs" / "results" / "lr_r1.json").read_text())["rows"]:
        measured = load_config(row["set"])
        assert not differing(kept.recipe(measured), kept.recipe(of_sweep), (*FREE_KEYS, *kept.SAME_RESULT))


def test_the_report_prints_the_sweep_that_its_runs_took_their_rates_from(tmp_path, capsys):
    lrs = {"full": 1e-3, "nsa": 2e-3, "window": 2e-3}
    runs = [str(make_run(tmp_path, arm, overrides=[f"optim.lr={lr}"])) for arm, lr in lrs.items()]
    path = rates(tmp_path, {}, {"arm": "full", "lr": 1e-3, "losses": {"0.001": 5.0}}).path
    words = ["--rates", str(path), "--out", str(tmp_path / "out")]
    assert main(["compare", *runs, *words]) == 0
    rows = json.loads((tmp_path / "out" / "comparison_tiny.json").read_text())["rows"]
    swept = [row for row in rows if row["what"] == "sweep"]
    assert [(row["arm"], row["swept"], row["lr"]) for row in swept] == [
        ("full", "full", 1e-3), ("nsa", "nsa", 2e-3), ("window", "nsa", 2e-3),
    ]  # fmt: skip
    said = (tmp_path / "out" / "comparison_tiny.md").read_text()
    assert "| `window` | `nsa` | 2.00e-03 | 1.00e-03: 5.1000, 2.00e-03: 5.0000, 4.00e-03: diverged |" in said
    rates(tmp_path, {"lr": 1e-3}, {"arm": "full", "lr": 1e-3})
    assert main(["compare", *runs, *words]) == 2
    assert "nsa-0 was trained at 0.002, but the sweep's rate of nsa is 0.001" in capsys.readouterr().err
