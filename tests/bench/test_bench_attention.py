"""What `nsa-train bench attention` writes of a shape where a kernel fails: why, and the rows of all the others."""

import pytest
import torch

from nsa_train.bench import attention
from nsa_train.bench.inputs import Shape

SHAPE = Shape(64, 4, 1, 8, 8)


class Stub(attention.Case):
    """Nothing on a GPU."""

    def __init__(self, shape, packing, blocks):
        self.shape, self.packing = shape, packing
        self.q = torch.zeros(shape.T, shape.Hq, shape.D, requires_grad=True)
        self.slc = tuple(torch.zeros(shape.T, shape.Hk, width, requires_grad=True) for width in (shape.D, shape.Dv))
        self.do = torch.ones(shape.T, shape.Hq, shape.Dv)

    def ours(self):
        return {("nsa_train", "op", "fwd"): lambda: None}

    def peak_gib(self):
        return 1.0


@pytest.fixture
def rows(monkeypatch):
    def dense(q, k, v, lengths, backend):
        if backend == "cudnn":
            raise RuntimeError("no plan for this shape")
        return q * k.mean() * v.mean()

    monkeypatch.setattr(attention, "Case", Stub)
    monkeypatch.setattr(attention, "index_set", lambda *about: None)
    monkeypatch.setattr(attention, "dense_attention", dense)
    monkeypatch.setattr(attention, "take_turns", lambda timed, *about, **how: {key: [1.0, 2.0] for key in timed})
    return attention.rows_of(SHAPE, [64], "local", None, 0.1, ("cudnn", "varlen"), check=False)


def test_a_dense_kernel_that_fails_has_a_row_that_says_why_and_costs_no_other(rows):
    told = {(row["impl"], row["part"], row["pass"]): row.get("error") for row in rows}
    assert told == {
        ("torch-cudnn", "dense", None): "no plan for this shape",
        ("nsa_train", "op", "fwd"): None,
        ("torch-varlen", "dense", "fwd"): None,
        ("torch-varlen", "dense", "bwd"): None,
    }
    assert all("ms" in row for row in rows if "error" not in row)
