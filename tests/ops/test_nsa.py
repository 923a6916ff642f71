"""The public op: what it refuses, in which words, and how many compressed keys a document has."""

import re

import pytest
import torch
from helpers import SMALL, WIDE, packed_case

from nsa_train.ops.nsa import NSASpec, compressed_lengths, nsa_attention


def test_spec_names_every_broken_rule_at_once():
    with pytest.raises(ValueError, match="NSASpec") as caught:
        NSASpec(cmp_block=30, cmp_stride=16, slc_block=40, slc_count=2)
    for words in ("cmp_block=30", "slc_block=40", "slc_count=2", "slc_init + slc_local = 3"):
        assert words in str(caught.value)


@pytest.mark.parametrize("name", ["cmp_block", "cmp_stride", "slc_block", "slc_count", "slc_local", "window"])
@pytest.mark.parametrize("value", [0, -4, 2.0])
def test_spec_refuses_sizes_that_are_not_positive_integers(name, value):
    with pytest.raises(ValueError, match=f"{name}={value}"):
        NSASpec(**{name: value})


def test_spec_may_force_no_first_block_but_not_minus_one():
    assert NSASpec(slc_init=0).slc_init == 0
    with pytest.raises(ValueError, match="slc_init=-1"):
        NSASpec(slc_init=-1)


@pytest.mark.parametrize("spec", [SMALL, WIDE, NSASpec(), NSASpec(1, 1, 1), NSASpec(12, 4, 8)], ids=str)
def test_compressed_lengths_count_the_blocks_that_fit(spec):
    lengths = [*range(1, 100), 0, 0]
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)
    want = [sum(s + spec.cmp_block <= n for s in range(0, n, spec.cmp_stride)) for n in lengths]
    got = compressed_lengths(cu_seqlens, spec)
    assert got.dtype == torch.int32
    assert got.tolist() == want


@pytest.mark.parametrize("name", ["k_cmp", "v_cmp", "k_slc", "v_slc", "k_win", "v_win", "gates"])
def test_a_wrong_shape_is_refused_by_the_arguments_name(name):
    case = packed_case([11, 14])
    axis = 0 if name == "v_slc" else -1  # the width of v_slc is what the other values are measured by
    case[name] = torch.cat([case[name], case[name].narrow(axis, 0, 1)], axis)
    with pytest.raises(ValueError, match=rf"\b{name} is"):
        nsa_attention(**case)


def test_all_wrong_shapes_are_named_at_once():
    case = packed_case([11, 14])
    case |= {name: case[name][:-1] for name in ("k_slc", "gates")}
    with pytest.raises(ValueError, match=r"k_slc is .* gates is "):
        nsa_attention(**case)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("blocks", torch.zeros(25, 2, 2, dtype=torch.int32)),
        ("blocks is torch.int64", torch.zeros(25, 2, 3, dtype=torch.int64)),
        ("scale=-0.25", -0.25),
        ("scale=nan", float("nan")),
        ("cu_seqlens", torch.tensor([0, 11, 25])),
        ("cu_seqlens", torch.tensor([[0, 25]], dtype=torch.int32)),
        ("cu_seqlens", torch.tensor([0, 11, 24], dtype=torch.int32)),
        ("cu_seqlens", torch.tensor([1, 11, 25], dtype=torch.int32)),
        ("cu_seqlens", torch.tensor([0, 14, 11, 25], dtype=torch.int32)),
        ("q", torch.zeros(25, 32)),
    ],
)
def test_what_does_not_fit_is_refused_by_its_name(name, value):
    with pytest.raises(ValueError, match=name):
        nsa_attention(**{**packed_case([11, 14]), re.split(" |=", name)[0]: value})


def test_too_few_compressed_keys_are_refused():
    case = packed_case([11, 14])
    case |= {name: case[name][:-1] for name in ("k_cmp", "v_cmp")}
    with pytest.raises(ValueError, match="k_cmp has 9 rows, but the documents have 10"):
        nsa_attention(**case)


def test_query_heads_must_be_a_multiple_of_kv_heads():
    with pytest.raises(ValueError, match="3 query heads are not a multiple of 2 KV heads"):
        nsa_attention(**packed_case([11], Hq=3, Hk=2))


def test_an_unknown_backend_is_refused():
    with pytest.raises(ValueError, match="backend='cuda' must be 'auto', 'reference' or 'triton'"):
        nsa_attention(**packed_case([11]), backend="cuda")


def test_the_kernels_refuse_fp64():
    with pytest.raises(ValueError, match=r"backend='triton' takes bf16, fp16 and fp32, not torch.float64"):
        nsa_attention(**packed_case([11]), backend="triton")


def test_the_kernels_on_a_cpu_say_that_they_need_the_interpreter(monkeypatch):
    monkeypatch.setattr("nsa_train.ops.nsa.INTERPRETED", False)
    with pytest.raises(ValueError, match=r"needs CUDA tensors, q is on cpu.*TRITON_INTERPRET=1"):
        nsa_attention(**packed_case([11], dtype=torch.float32), backend="triton")


def test_reference_is_what_auto_runs_on_a_cpu():
    case = packed_case([11, 14])
    assert torch.equal(nsa_attention(**case), nsa_attention(**case, backend="reference"))
