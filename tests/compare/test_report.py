"""The level follows its rule, and JSON, Markdown and figure say the same."""

import json
from pathlib import Path

import numpy as np
import pytest
from folders import DOCUMENTS, LABELS, make_run

from nsa_train.cli import main
from nsa_train.compare.cuts import find, paired_differences
from nsa_train.compare.figure import AXES
from nsa_train.compare.gates import recipe
from nsa_train.compare.levels import levels, reached, secondary
from nsa_train.compare.runs import Arms, Run
from nsa_train.compare.statistics import Difference
from nsa_train.config.load import load_config
from nsa_train.plan.flops import training_flops


def passed(arm):
    row = {"experiment": "tiny", "arm": arm, "gate": "future", "passed": True, "found": "0", "demanded": "0"}
    return {**row, "recipe": recipe(load_config([f"attention={arm}"])), "device": "CPU"}


PASSED = [passed("full"), passed("nsa")]


def difference(baseline, mean, seeds=3, spread=0.001):
    values = {seed: mean + spread * (seed - (seeds - 1) / 2) for seed in range(seeds)}
    return Difference.of("nsa", baseline, "text", values, se_data=0.0005)


@pytest.mark.parametrize(
    ("found", "gates", "level"),
    [
        ([difference("full", -0.03), difference("full_gated", -0.02)], PASSED, "L3"),
        ([difference("full", -0.03), difference("full_gated", -0.02)], [], None),
        ([difference("full", -0.03), difference("full_gated", -0.02)], [PASSED[0]], None),
        ([difference("full", -0.03), difference("full_gated", -0.02)], [*PASSED, {**PASSED[1], "passed": False}], None),
        ([difference("full", -0.03), difference("full_gated", 0.0)], PASSED, "L2"),
        ([difference("full", -0.03)], PASSED, "L2"),
        ([difference("full", -0.03, seeds=2), difference("full_gated", -0.02)], PASSED, "L1"),
        ([difference("full", -0.03, seeds=1)], PASSED, "L0"),
        ([difference("full", 0.005)], PASSED, "L1"),
        ([difference("full", 0.012)], PASSED, "L0"),
        ([difference("full", -0.03, spread=0.05)], PASSED, "L0"),
        (
            [difference("full", -0.03), difference("full_gated", -0.02), difference("full_gated_wide", 0.0)],
            PASSED,
            "L2",
        ),
        (
            [difference("full", -0.03), difference("full_gated", -0.02), difference("full_gated_wide", 0.0, seeds=1)],
            PASSED,
            "L3",
        ),
    ],
)
def test_the_level_follows_the_rule(found, gates, level):
    ladder = levels(found, ["full", "nsa"], gates)
    assert [one.name for one in ladder] == ["L0", "L1", "L2", "L3"]
    last = reached(ladder)
    assert (last and last.name) == level


def test_secondary_endpoints_are_corrected_together():
    found = [
        Difference.of("nsa", arm, cut, {0: -0.02, 1: -0.021, 2: -0.019}, 0.0)
        for arm in ("full_gated", "nsa_random", "window")
        for cut in ("text", "position 1024+", "recall 2048+")
    ]
    asked = secondary(found, load_config(["experiment=r1"]).attention)
    assert [(one.baseline, one.cut) for one in asked] == [
        ("full_gated", "text"), ("nsa_random", "position 1024+"), ("window", "recall 2048+"),
    ]  # fmt: skip
    assert all(one.p_holm == pytest.approx(3 * one.p) for one in asked)


def test_a_secondary_endpoint_that_was_not_tested_stays_in_the_family():
    found = [difference("full_gated", -0.02), Difference.of("nsa", "window", "recall 2048+", {0: -0.5}, 0.01)]
    gated, choosing, recall = secondary(found, load_config(["experiment=r1"]).attention)
    assert gated.p_holm == pytest.approx(3 * gated.p)
    assert (choosing.baseline, *choosing[3:]) == ("nsa_random", None, None, None)
    assert (recall.baseline, *recall[3:]) == ("window", -0.5, None, None)


@pytest.mark.parametrize(
    ("seeds", "said"),
    [
        (0, "full_gated_wide: not tested"),
        (1, "full_gated_wide: not tested (nsa - full_gated_wide: -0.0100, 1 seed)"),
        (2, "full_gated_wide: not tested (nsa - full_gated_wide: -0.0100, 2 seeds)"),
        (3, None),
    ],
)
def test_the_last_level_says_whether_the_widened_control_was_tested(seeds, said):
    wide = [difference("full_gated_wide", -0.01, seeds)] if seeds else []
    last = levels([difference("full", -0.03), difference("full_gated", -0.02), *wide], ["nsa"], PASSED)[-1]
    gated, control = last.why.split("; ")
    assert gated.startswith("nsa - full_gated: -0.0200, ")
    assert control == said or (said is None and control.startswith("nsa - full_gated_wide: -0.0100, "))


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The JSON of a comparison of three arms, three seeds each, and the Markdown beside it."""
    root = tmp_path_factory.mktemp("compare")
    gains = {"full": 0.0, "full_gated": 0.01, "nsa": 0.05}
    folders = [
        make_run(root, arm, seed, gain, far_gain=0.1 * (arm == "nsa"))
        for arm, gain in gains.items()
        for seed in range(3)
    ]
    words = ["--name", "test", "--out", str(root / "out")]
    for arm in gains:
        words += ["--gates", str(root / f"gates-{arm}.json")]
        gates = {"schema": "nsa-train/gates/1", "rows": [passed(arm)] * 2}
        Path(words[-1]).write_text(json.dumps(gates))
    assert main(["compare", *map(str, folders), *words]) == 0
    assert (root / "out" / "comparison_test.png").read_bytes()[:4] == b"\x89PNG"
    return json.loads((root / "out" / "comparison_test.json").read_text()), (
        root / "out" / "comparison_test.md"
    ).read_text()


def rows(result, what, **keys):
    return [row for row in result[0]["rows"] if row["what"] == what and all(row[k] == v for k, v in keys.items())]


def test_the_json_has_the_common_head_and_the_level(result):
    assert {"schema", "command", "commit", "date", "device", "versions", "rows"} == set(result[0])
    assert result[0]["schema"] == "nsa-train/comparison/1"
    (head,) = rows(result, "comparison")
    assert (head["level"], head["corpus"]["hash"], head["heldout_documents"]) == ("L3", "c" * 64, DOCUMENTS)
    assert head["heldout_labels"] == LABELS.sum()
    assert len(rows(result, "run")) == 9
    assert len(rows(result, "gate")) == 6


def test_paired_differences_are_those_that_were_planted(result):
    """Documents differ by half a nat, and the arms by hundredths: pairing finds them."""
    far = 0.1 * LABELS[:, 2].sum() / LABELS.sum()
    (whole,) = rows(result, "difference", arm="nsa", baseline="full", cut="all")
    assert whole["mean"] == pytest.approx(-0.05 - far, abs=2e-3)
    assert whole["se"] < 0.01
    wanted = dict.fromkeys(("new", "repeated", "source code"), -0.05 - far)
    wanted |= dict.fromkeys(("position 0-128", "position 128-256", "recall 64-128"), -0.05)
    wanted |= dict.fromkeys(("position 256-512", "recall 256+"), -0.15)
    for cut, mean in wanted.items():
        (d,) = rows(result, "difference", arm="nsa", baseline="full", cut=cut)
        assert d["mean"] == pytest.approx(mean, abs=8e-3 if "source" in cut else 2e-3), cut
    (control,) = rows(result, "difference", arm="nsa", baseline="full_gated", cut="all")
    assert control["mean"] == pytest.approx(-0.04 - far, abs=2e-3)


def test_new_and_repeated_tokens_are_told_apart(tmp_path):
    """NSA is 0.2 nats better on what repeats, whose sums are of other labels than the rest, and as good on the rest."""
    runs = [make_run(tmp_path, arm, noise=0.0) for arm in ("full", "nsa")]
    with np.load(runs[1] / "heldout.npz") as file:
        arrays = dict(file)
    gain = 0.2 * arrays["recall"][..., 1]
    arrays["recall"][..., 0] -= gain
    arrays["position"][:, 0, 0] -= gain.sum(1)
    np.savez(runs[1] / "heldout.npz", **arrays)
    found = {d.cut: d.mean for d in paired_differences(Arms.read(runs))}
    repeated, labels = arrays["recall"][..., 1].sum(), arrays["position"][..., 1].sum()
    assert found["repeated"] == pytest.approx(-0.2, abs=1e-6)
    assert found["new"] == pytest.approx(0, abs=1e-6)
    assert found["text"] == pytest.approx(-0.2 * repeated / labels, abs=1e-6)


SYNTHETIC = [
    "data.sources={code: {}, manuals: {}, prose: {kind: recall, paths: [a], take: 9, min_chars: 9, max_chars: 99}}",
    "data.mixture={code: 0.45, prose: 0.05, manuals: 0.5}",
]


def test_endpoints_leave_out_synthetic_documents(tmp_path):
    """NSA is 0.05 nats better on code and 1 nat worse on what is synthetic by its kind; no manual is held out."""
    runs = []
    for arm, gain in {"full": 0.0, "nsa": 0.05}.items():
        for seed in range(3):
            runs.append(make_run(tmp_path, arm, seed, gain, overrides=SYNTHETIC))
            with np.load(runs[-1] / "heldout.npz") as file:
                arrays = dict(file)
            arrays["sources"] = np.array(["code", "prose", "manuals"])
            for name in ("position", "recall"):
                made = arrays[name][arrays["source"] == 1]
                arrays[name][arrays["source"] == 1] = made + (1.05 * (arm == "nsa") * made[..., [1, 1]] * [1, 0])
            np.savez(runs[-1] / "heldout.npz", **arrays)
    (tmp_path / "gates.json").write_text(json.dumps({"schema": "nsa-train/gates/1", "rows": PASSED}))
    words = ["--gates", str(tmp_path / "gates.json"), "--out", str(tmp_path / "out")]
    assert main(["compare", *map(str, runs), *words]) == 0
    found = json.loads((tmp_path / "out" / "comparison_tiny.json").read_text())["rows"]
    means = {row["cut"]: row["mean"] for row in found if row["what"] == "difference"}
    code, made = LABELS[::2].sum(), LABELS[1::2].sum()
    assert means["text"] == pytest.approx(-0.05, abs=2e-3)
    assert means["position 256-512"] == pytest.approx(-0.05, abs=2e-3)
    assert means["recall 64-128"] == pytest.approx(-0.05, abs=2e-3)
    assert means["all"] == pytest.approx((made - 0.05 * code) / (made + code), abs=2e-3)
    assert means["mixture"] == pytest.approx(0.1 - 0.9 * 0.05, abs=2e-3)
    assert (found[0]["level"], found[0]["synthetic_sources"], found[0]["heldout_text_labels"]) == (
        "L2",
        ["prose"],
        code,
    )
    (arm,) = [row for row in found if row["what"] == "arm" and row["arm"] == "nsa"]
    assert arm["text_loss"]["mean"] < arm["mixture_loss"]["mean"] < arm["loss"]["mean"]
    said = (tmp_path / "out" / "comparison_tiny.md").read_text()
    assert f"Endpoints leave out prose, which is synthetic: {code:,} labels of text." in said
    assert f"| nsa - full | mixture | 3 | {means['mixture']:+.4f} |" in said


def test_curves_have_three_axes(result, tmp_path):
    assert dict(AXES)["flops"] == "executed FLOPs, a row counted as one document"
    (row,) = rows(result, "run", arm="nsa", seed=0)
    config = Run.read(make_run(tmp_path, "nsa")).config
    tokens = 512 * 8
    assert [point["tokens"] for point in row["val"]] == [0, 3 * tokens, 6 * tokens]
    assert [point["flops"] for point in row["val"]] == [n * tokens * training_flops(config) for n in (0, 3, 6)]
    assert [point["seconds"] for point in row["val"]] == pytest.approx([n * tokens / 1e4 for n in (0, 3, 5.5)])
    assert 3 * tokens < row["tokens_to_baselines_loss"] < 6 * tokens


def test_the_difference_along_the_run_is_told_for_each_seed(result):
    """Curves of the test are lines, from a loss that all share to that at the end."""
    assert len(rows(result, "lead")) == 6
    for seed in range(3):
        (row,) = rows(result, "lead", arm="nsa", seed=seed)
        ours, theirs = (rows(result, "run", arm=arm, seed=seed)[0]["loss"] for arm in ("nsa", "full"))
        assert row["shares"] == [0.1, 0.25, 0.5, 0.75, 1.0]
        assert row["difference"] == pytest.approx([share * (ours - theirs) for share in row["shares"]])
        shown = " | ".join(f"{one:+.4f}" for one in row["difference"])
        assert f"| nsa - full | {seed} | {shown} |" in result[1]


def test_flops_are_counted_stage_by_stage(tmp_path):
    rest = "mixture: {}, rope_factor: 1.0"
    parts = f"{{a: {{tokens: 8192, seq_len: 256, {rest}}}, b: {{tokens: null, seq_len: 512, {rest}}}}}"
    stages = ["trainer.seq_len=256", "trainer.batch_rows=16", f"stages.parts={parts}"]
    run = Run.read(make_run(tmp_path, "nsa", overrides=stages))
    short, long = run.flops_per_token
    assert short < long
    assert run.flops(4096) == 4096 * short
    assert run.flops(4 * 4096) == pytest.approx(8192 * short + 8192 * long)


def test_the_markdown_says_what_the_json_says(result):
    text = result[1]
    assert "TOO FEW" not in text
    assert "Selection on held-out text" not in text
    assert "Attention maps" not in text
    assert "CUDA graphs:" not in text
    assert "different sources" not in text
    assert "no commit has" not in text
    assert "**level L3: due to sparsity**" in text
    (d,) = rows(result, "difference", arm="nsa", baseline="full", cut="all")
    assert f"| nsa - full | all | 3 | {d['mean']:+.4f} |" in text
    assert "Endpoints are over all of it" in text
    for words in (
        "60% past 1024",
        "1.50 of code",
        "| L0 gates passed |",
        "position 256-512",
        "source prose",
        "recall 128-256",
        "comparison_test.png",
        "fullest expert",
        "| 50% of the tokens |",
        "| nsa - nsa_random | position 128+ | - | not tested | not tested |",
    ):
        assert words in text, words


def test_short_documents_are_told(tmp_path):
    facts = {"name": "text", "hash": "c" * 64, "share_past": {"1024": 0.3, "2048": 0.4}, "epochs": {}}
    runs = [str(make_run(tmp_path, arm, manifest={"corpus": facts})) for arm in ("full", "nsa")]
    assert main(["compare", *runs, "--out", str(tmp_path / "out")]) == 0
    assert "TOO FEW" in (tmp_path / "out" / "comparison_tiny.md").read_text()


@pytest.mark.parametrize(("shift", "factor"), [(0, 1.0), (DOCUMENTS, 0.5**0.5)], ids=["the same", "others"])
def test_documents_that_another_seed_read_are_drawn_apart(shift, factor, tmp_path):
    """Both seeds have the same losses: of the same documents, whose error stays, or of others: errors even out."""
    ones, twos = ([make_run(tmp_path, arm, seed, noise=0.5) for arm in ("full", "nsa")] for seed in (0, 1))
    for one, two in zip(ones, twos, strict=True):
        with np.load(one / "heldout.npz") as file:
            arrays = dict(file)
        np.savez(two / "heldout.npz", **{**arrays, "document": arrays["document"] + shift})
    alone = find(paired_differences(Arms.read(ones)), "nsa", "full").se_data
    both = find(paired_differences(Arms.read([*ones, *twos])), "nsa", "full").se_data
    assert both == pytest.approx(factor * alone, rel=0.05)


def test_what_an_arm_is_stands_in_the_report(tmp_path):
    runs = [make_run(tmp_path, "full"), make_run(tmp_path, "nsa", overrides=["attention.branches=[cmp,win]"])]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    said = (tmp_path / "out" / "comparison_tiny.md").read_text()
    assert "| `full` | full | false | mlp | false | topn | 64 |" in said
    assert "| `nsa` | cmp, win | true | mlp | false | topn | 64 |" in said


def test_the_runs_table_tells_of_graphs_and_of_sources(tmp_path):
    graphs = ["trainer.cuda_graphs=auto", "trainer.dtype=bf16", "attention.backend=triton"]
    runs = [make_run(tmp_path, arm, seed, overrides=graphs, manifest={"device": "H100", "commit": commit * 40})
            for arm, commit in (("full", "a"), ("nsa", "b")) for seed in (0, 1)]  # fmt: skip
    for arm, commit, so in (("full", "a" * 40, True), ("nsa", "a" * 40 + "-dirty", False)):
        make_run(tmp_path, arm, 1, overrides=graphs, manifest={"device": "H100", "commit": commit, "cuda_graphs": so})
    runs += [make_run(tmp_path, arm, 2, overrides=graphs) for arm in ("full", "nsa")]
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    said = (tmp_path / "out" / "comparison_tiny.md").read_text()
    rows = json.loads((tmp_path / "out" / "comparison_tiny.json").read_text())["rows"]
    replayed = {(row["arm"], row["seed"]) for row in rows if row["what"] == "run" and row["cuda_graphs"]}
    assert replayed == {("nsa", 0), ("full", 1)}  # older runs do not tell; then full attention was none
    assert "| replayed | 0 | H100 | bbbbbbbbbbbb |" in said
    assert "Not all runs replayed CUDA graphs" in said
    assert "**Runs of one seed come from different sources**: of 0, 1.\n" in said
    assert "**Trained from source with changes that no commit has**: nsa-1.\n" in said


def test_runs_that_shared_a_device_tell_no_speed(tmp_path):
    runs = [make_run(tmp_path, arm, seed, manifest={"runs_a_device": 1 + seed})
            for arm in ("full", "nsa") for seed in (0, 1)]  # fmt: skip
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    said = (tmp_path / "out" / "comparison_tiny.md").read_text()
    rows = json.loads((tmp_path / "out" / "comparison_tiny.json").read_text())["rows"]
    assert [row["runs_a_device"] for row in rows if row["what"] == "run"] == [1, 2] * 2
    alone = {row["arm"]: row["tokens_per_s"] for row in rows if row["what"] == "run" and row["seed"] == 0}
    assert {row["arm"]: row["tokens_per_s"] for row in rows if row["what"] == "arm"} == alone
    assert "so that their seconds tell nothing: full-1, nsa-1.\n" in said
    assert said.count("| shared | shared |") == 2
    make_run(tmp_path, "full", manifest={"runs_a_device": 2})
    make_run(tmp_path, "nsa", manifest={"runs_a_device": 2})
    assert main(["compare", *map(str, runs), "--out", str(tmp_path / "out")]) == 0
    rows = json.loads((tmp_path / "out" / "comparison_tiny.json").read_text())["rows"]
    assert {row["tokens_per_s"] for row in rows if row["what"] == "arm"} == {None}


def test_without_full_the_first_arm_is_the_baseline(tmp_path):
    runs = [make_run(tmp_path, arm) for arm in ("window", "nsa_no_win")]
    assert Arms.read(runs).pairs == [("nsa_no_win", "window")]


def test_two_files_with_gates_of_one_arm_are_refused(tmp_path, capsys):
    runs = [str(make_run(tmp_path, arm)) for arm in ("full", "nsa")]
    gates = {"schema": "nsa-train/gates/1", "rows": [passed("full")]}
    for name in ("old.json", "new.json"):
        (tmp_path / name).write_text(json.dumps(gates))
    words = ["--gates", str(tmp_path / "old.json"), "--gates", str(tmp_path / "new.json")]
    assert main(["compare", *runs, "--out", str(tmp_path), *words]) == 2
    assert "new.json: an earlier file has gates of full, too" in capsys.readouterr().err


def test_gates_of_another_experiment_are_refused(tmp_path, capsys):
    runs = [str(make_run(tmp_path, arm)) for arm in ("full", "nsa")]
    gates = {"schema": "nsa-train/gates/1", "rows": [{**PASSED[0], "experiment": "r1"}]}
    (tmp_path / "gates.json").write_text(json.dumps(gates))
    assert main(["compare", *runs, "--gates", str(tmp_path / "gates.json")]) == 2
    assert "of r1, but the runs are of tiny" in capsys.readouterr().err


def test_gates_of_another_model_are_refused(tmp_path, capsys):
    runs = [str(make_run(tmp_path, arm, overrides=["attention.window=32"])) for arm in ("full", "nsa")]
    unknown = passed("nsa_random")
    del unknown["recipe"]
    gates = {"schema": "nsa-train/gates/1", "rows": [passed("nsa"), passed("window"), unknown]}
    (tmp_path / "gates.json").write_text(json.dumps(gates))
    assert main(["compare", *runs, "--gates", str(tmp_path / "gates.json")]) == 2
    said = capsys.readouterr().err
    assert (
        "gates.json: nsa, nsa_random had another model, attention, moe or trainer.dtype there than in the runs" in said
    )


def test_a_file_in_place_of_the_folder_is_told(tmp_path, capsys):
    runs = [str(make_run(tmp_path, arm)) for arm in ("full", "nsa")]
    (tmp_path / "out").write_text("mine")
    for out in (tmp_path / "out", tmp_path / "out" / "deeper"):
        assert main(["compare", *runs, "--out", str(out)]) == 2
        assert f"--out {out}: there is a file of that name" in capsys.readouterr().err
    assert (tmp_path / "out").read_text() == "mine"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--name", "a/b"], "--name 'a/b' may hold letters"),
        (["--gates", "missing.json"], "--gates missing.json: cannot be read"),
    ],
)
def test_wrong_options_are_one_message(words, message, tmp_path, capsys):
    runs = [str(make_run(tmp_path, arm)) for arm in ("full", "nsa")]
    assert main(["compare", *runs, "--out", str(tmp_path / "out"), *words]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
