"""Run folders as finished runs leave them, with losses that a test chooses."""

import json

import numpy as np

from nsa_train.cli import main
from nsa_train.config.load import load_config, to_yaml
from nsa_train.train.heldout import HeldOut

DOCUMENTS = 40
LABELS = 4 * np.random.default_rng(1).integers(5, 50, (DOCUMENTS, 3))  # by position bucket of rows of 512
WEIGHTS = {"embed.weight [8, 4]": "a", "head.weight [8, 4]": "b"}

ORIGIN = {"folder": "before", "step": 6, "initial_weights_sha256": WEIGHTS, "origin": None,
          "rows_fingerprint": "rows of before", "rows_sample_sha256": "x"}  # fmt: skip


def make_run(
    runs, arm, seed=0, gain=0.0, noise=0.001, far_gain=0.0, used=(0, 0, 0), overrides=(), manifest=(), summary=()
):
    """A run of 6 steps whose held-out loss is `gain` below 5 nats, and `far_gain` more in the last bucket.

    In each of its three validations the last tokens of documents have `used` nats less than the first ones.
    """
    config = load_config([f"attention={arm}", f"seed={seed}", f"name={arm}-{seed}", f"runs_dir={runs}",
                          "trainer.steps=6", *overrides])  # fmt: skip
    folder = runs / config.name
    folder.mkdir(parents=True, exist_ok=True)
    draw = np.random.default_rng([seed, len(arm), ord(arm[-1])])
    shared = np.random.default_rng(seed).normal(5, 0.5, (DOCUMENTS, 1))  # a document is hard for every arm
    mean = shared - gain - far_gain * np.array([0, 0, 1]) + draw.normal(0, noise, (DOCUMENTS, 3))
    position = np.stack([mean * LABELS, LABELS.astype(float)], -1)
    recall = np.stack([position[:, 0] / 2, position[:, 1] / 4, position[:, 1] / 4, position[:, 2] / 2], 1)
    edges = (np.array([0, 128, 256, 512]), np.array([0, 64, 128, 256, 512]))
    source = np.arange(DOCUMENTS, dtype=np.int32) % 2
    HeldOut(np.arange(DOCUMENTS), source, np.array(["code", "prose"]), position, edges[0], recall, edges[1]).save(
        folder / "heldout.npz"
    )
    loss, labels = position.sum((0, 1))
    tokens = config.trainer.seq_len * config.trainer.batch_rows
    speeds = {1: 1e3, 5: 2e4}  # the first one holds start-up
    rows = [{"split": "train", "step": s, "tokens": s * tokens, "loss": 6.0, "tokens_per_s": speeds.get(s, 1e4),
             "mem_gib": 1.0, "load_peak": [2.0, 3.0, 4.0] if s > 4 else [9.0] * 3} for s in range(1, 7)]  # fmt: skip
    probe = {"gates": dict.fromkeys(config.attention.branches, 0.5)} if config.attention.gate else {}
    probe["common"] = 0.1
    rows += [{"split": "val", "step": s, "tokens": s * tokens, "loss": 7.0 + (loss / labels - 7) * s / 6,
              "by_position": {"0-128": 6.0, "128-256": 6.5, "256-512": 6.0 - less, "512-1024": None},
              "layers": [probe] * 4} for s, less in zip((0, 3, 6), used, strict=True)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    facts = {
        "corpus": {"name": "text", "hash": "c" * 64, "share_past": {"1024": 0.6, "2048": 0.4}, "epochs": {"code": 1.5}},
        "rows_fingerprint": f"rows of seed {seed}", "commit": "f" * 40, "device": "CPU", "world_size": 1,
        "versions": {},
        "initial_weights_sha256": {name: f"{value}{seed}" for name, value in WEIGHTS.items()},
    }  # fmt: skip
    (folder / "manifest.json").write_text(json.dumps({**facts, **dict(manifest)}))
    ended = {"status": "done", "tokens": 6 * tokens, "steps": 6, "params_active": 500_000, "params_total": 10**6,
             "unigram_entropy": 7.5, "skipped_steps": 0}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps({**ended, **dict(summary)}))
    (folder / "config.yaml").write_text(to_yaml(config))
    return folder


def compared(out, runs, *words):
    """Rows of the JSON, and the Markdown, of a comparison of runs of `tiny` into the folder `out`."""
    assert main(["compare", *map(str, runs), *map(str, words), "--out", str(out)]) == 0
    rows = json.loads((out / "comparison_tiny.json").read_text())["rows"]
    return rows, (out / "comparison_tiny.md").read_text()
