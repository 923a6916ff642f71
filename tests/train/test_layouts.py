"""No layout changes the result: losses, gradient norms, weights and router biases of 20 steps, one row a layout.

Each row was seen red: `python scripts/planted_faults.py layouts` plants the faults; docs/reliability.md says what it
saw.
"""

from functools import partial

import pytest
import torch
from launch import rows
from safetensors.torch import load_file

from nsa_train.train.checkpoint import Found, Weights, verify

pytestmark = pytest.mark.process
STEPS, CLIP, NEAR = 20, 0.2, 1e-6
# fp32 sums in another order. A step changes the loss by 1e-2 and a weight by up to 3e-3.
LOSS_TOLERANCE, WEIGHT_TOLERANCE = 2e-6, 2e-5
RUN = [
    f"trainer.steps={STEPS}", f"trainer.checkpoint_every={STEPS}", f"trainer.val_every={STEPS}", "trainer.val_rows=3",
    f"optim.clip={CLIP}", "moe.bias_rate=0.01", "model.init_std=0.1",
    "attention.slc_count=12",  # every block is read: no top-n that rounding could tip
]  # fmt: skip
# At stage 3 matrices are gathered and given back, and the optimizer works in several parts, small as they are.
IN_PARTS = "parallel.deepspeed={zero_optimization: {stage3_param_persistence_threshold: 1000, sub_group_size: 9000}}"
RECOMPUTED = "trainer.activation_checkpointing=true"
LAYOUTS = {
    "accumulation 1": (1, ["trainer.micro_rows=4"]),
    "accumulation 4": (1, ["trainer.micro_rows=1"]),
    "recomputed": (1, [RECOMPUTED]),
    "recomputed mlp": (1, [RECOMPUTED, "trainer.recomputed=[mlp]"]),
    "ZeRO 1, 2 processes": (2, ["parallel=zero1"]),
    "ZeRO 2, 2 processes": (2, ["parallel=zero2"]),
    "ZeRO 2, 2 processes, offloaded": (2, ["parallel.offload_optimizer=cpu"]),
    "ZeRO 2, 4 processes": (4, ["parallel=zero2"]),
    "ZeRO 3, 2 processes": (2, ["parallel=zero3", IN_PARTS]),
    "ZeRO 3, 2 processes, accumulation 2, recomputed": (
        2, ["parallel=zero3", IN_PARTS, "trainer.micro_rows=1", RECOMPUTED],
    ),
    "ZeRO 3, 2 processes, offloaded": (
        2, ["parallel=zero3", "parallel.offload_optimizer=cpu", "parallel.offload_params=cpu"],
    ),
}  # fmt: skip


def note_what_parity_rests_on(file):
    """Write the smallest lead of a chosen expert over the next one, and each micro-batch's number of labels."""
    from nsa_train.data.loader import NO_LABEL
    from nsa_train.model.router import Router
    from nsa_train.model.transformer import Transformer

    route, forward = Router.forward, Transformer.forward

    @torch.no_grad()
    def leads(self, x):
        scores = torch.nn.functional.linear(x, self.weight).sigmoid() + self.bias
        best = scores.topk(self.config.top_k + 1).values
        return best[:, -2] - best[:, -1]

    def noting_leads(self, x, lengths):
        with file.open("a") as notes:
            print("lead", float(leads(self, x).min()), file=notes)
        return route(self, x, lengths)

    def noting_labels(self, tokens, labels, *rest):
        with file.open("a") as notes:
            print("labels", int((labels != NO_LABEL).sum()), file=notes)
        return forward(self, tokens, labels, *rest)

    Router.forward, Transformer.forward = noting_leads, noting_labels


def weights_of(run):
    path = run / "checkpoints" / f"step_{STEPS}"
    with Weights(Found(path, verify(path))) as weights:
        return {name: weights.whole(name) for name in weights.shapes}


def biases_of(run):
    return load_file(run / "checkpoints" / f"step_{STEPS}" / "buffers.safetensors")


@pytest.fixture(scope="module")
def reference(start_run, tmp_path_factory):
    """Folder of a run in one process, with the notes beside it."""
    folder = tmp_path_factory.mktemp("reference")
    job = start_run(folder, *RUN, before=partial(note_what_parity_rests_on, folder / "notes"))
    assert job.wait() == 0, job.text
    return folder / "run"


def test_the_reference_clips_balances_counts_unequal_labels_and_decides_no_near_tie(reference):
    notes = [line.split() for line in (reference.parent / "notes").read_text().splitlines()]
    assert min(float(value) for what, value in notes if what == "lead") > NEAR
    assert len({value for what, value in notes if what == "labels"}) > 3
    norms = [row["grad_norm"] for row in rows(reference) if row["split"] == "train"]
    assert len(norms) == STEPS
    assert min(norms) > CLIP
    assert all(bias.abs().max() > 0.02 for bias in biases_of(reference).values())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_layout_gives_the_losses_norms_weights_and_biases_of_one_process(layout, reference, train_ranks, tmp_path):
    world, words = LAYOUTS[layout]
    jobs = train_ranks(world, *RUN, *words)
    assert [job.wait() for job in jobs] == [0] * world, "\n".join(job.text for job in jobs)
    run = tmp_path / "run"
    for found, wanted in zip(rows(run), rows(reference), strict=True):
        assert found["loss"] == pytest.approx(wanted["loss"], rel=LOSS_TOLERANCE)
        if found["split"] == "train":
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=LOSS_TOLERANCE)
    got, want = weights_of(run), weights_of(reference)
    assert got.keys() == want.keys()
    worst = {name: float((got[name] - want[name]).abs().max()) for name in want}
    assert max(worst.values()) < WEIGHT_TOLERANCE, worst
    torch.testing.assert_close(biases_of(run), biases_of(reference), rtol=0, atol=1e-7)
