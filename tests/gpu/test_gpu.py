"""What only a GPU can show: forced backends, grouped matmul, bf16, the same bits twice, and a short training."""

import hashlib
import json
import subprocess
import sys

import pytest
import torch

from nsa_train.config.load import load_config
from nsa_train.model.transformer import Transformer
from nsa_train.ops.dense import choose_backend, dense_attention
from nsa_train.ops.experts import grouped_matmul, matmul_loop
from nsa_train.ops.nsa import NSASpec, compressed_lengths, nsa_attention
from nsa_train.ops.reference import attend, win_visible
from nsa_train.packing import Packing

pytestmark = pytest.mark.gpu


def relative_error(got: torch.Tensor, want: torch.Tensor) -> float:
    got, want = got.double().cpu(), want.double().cpu()
    assert got.isfinite().all()
    return ((got - want).norm() / want.norm()).item()


@pytest.mark.parametrize("counts", [[70, 0, 130, 56], [0, 0, 256, 0], [64, 64, 64, 64]])
def test_grouped_matmul_equals_the_loop_also_for_experts_without_tokens(counts):
    rows = torch.randn(sum(counts), 128, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weights = torch.randn(4, 128, 192, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    ends = torch.tensor(counts, device="cuda").cumsum(0).to(torch.int32)
    grad = torch.randn(sum(counts), 192, device="cuda", dtype=torch.bfloat16)
    got = grouped_matmul(rows, weights, ends)
    got_grads = torch.autograd.grad(got, (rows, weights), grad)
    want = matmul_loop(rows.double(), weights.double(), ends)
    want_grads = torch.autograd.grad(want, (rows, weights), grad.double())
    assert relative_error(got, want) < 5e-3
    for a, b in zip(got_grads, want_grads, strict=True):
        assert relative_error(a, b) < 1e-2


@pytest.mark.parametrize(("heads", "dims"), [((16, 1), (64, 64)), ((32, 2), (192, 128)), ((4, 2), (32, 32))])
@pytest.mark.parametrize("window", [None, 100])
@pytest.mark.parametrize("lengths", [(300, 64, 1, 147), (512,)], ids=str)
@pytest.mark.parametrize("backend", [None, "cudnn", "flash", "varlen"])
def test_dense_attention_equals_the_masked_softmax_on_every_backend(heads, dims, window, lengths, backend):
    if (backend is not None and window and backend != "varlen") or (
        backend in ("flash", "varlen") and dims[0] != dims[1]
    ):
        pytest.skip("this backend does not take it")
    shapes = [(heads[0], dims[0]), (heads[1], dims[0]), (heads[1], dims[1])]
    q, k, v = (torch.randn(512, h, d, device="cuda", dtype=torch.bfloat16, requires_grad=True) for h, d in shapes)
    assert choose_backend(q, v, lengths, window) != "torch"
    got = dense_attention(q, k, v, lengths, window=window, backend=backend)
    want = torch.cat(
        [
            attend(a, b, c, win_visible(len(a), window or len(a), a.device), dims[0] ** -0.5)[0]
            for a, b, c in zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True)
        ]
    )
    grad = torch.randn_like(got)
    assert relative_error(got, want) < 1e-2
    for a, b in zip(
        torch.autograd.grad(got, (q, k, v), grad), torch.autograd.grad(want, (q, k, v), grad.double()), strict=True
    ):
        assert relative_error(a, b) < 2e-2


def test_nsa_in_bf16_on_the_gpu_is_close_to_fp64_on_the_cpu():
    spec = NSASpec(window=100, slc_count=6)
    packing = Packing.from_lengths([700, 31, 293])
    rows = 1024 // spec.cmp_stride
    shapes = [(1024, 16, 64), *[(rows, 1, 64)] * 2, *[(1024, 1, 64)] * 4, (1024, 16, 3)]
    inputs = [torch.randn(shape, dtype=torch.bfloat16) for shape in shapes]
    exact, details = nsa_attention(*(x.double() for x in inputs), spec, packing.cu_seqlens, return_details=True)
    got = nsa_attention(*(x.cuda() for x in inputs), spec, packing.cu_seqlens.cuda(), blocks=details.blocks.cuda())
    assert int(compressed_lengths(packing.cu_seqlens, spec).sum()) <= rows
    assert relative_error(got, exact) < 1e-2


@pytest.mark.parametrize("arm", ["nsa", "full", "window"])
def test_two_passes_of_the_model_give_the_same_bits(arm):
    config = load_config([f"attention={arm}"])
    packing = Packing.from_lengths([300, 212]).to("cuda")
    tokens = torch.randint(0, config.model.vocab, (512,), device="cuda")

    def losses_and_gradients():
        model = Transformer(config.model, config.attention, config.moe)
        model.start(0)
        model.to("cuda", torch.bfloat16)
        for router in model.routers():
            router.bias = router.bias.float()
        out = model(tokens, tokens, packing, 256)
        out.token_losses.sum().backward()
        return [out.token_losses, *(p.grad for p in model.parameters())]

    assert all(torch.equal(a, b) for a, b in zip(losses_and_gradients(), losses_and_gradients(), strict=True))


def test_compiled_layers_give_the_gradients_of_plain_ones():
    config = load_config(["experiment=tiny"])
    packing = Packing.from_lengths([1280, 768]).to("cuda")
    tokens = torch.randint(0, config.model.vocab, (2048,), device="cuda")

    def gradients(compiled):
        model = Transformer(config.model, config.attention, config.moe)
        model.start(0)
        model.to("cuda", torch.bfloat16)
        if compiled:
            model.compile_attention()
        model(tokens, tokens, packing, 2048).token_losses.sum().backward()
        return {name: p.grad for name, p in model.named_parameters() if ".attention." in name}

    plain, compiled = gradients(False), gradients(True)
    for name, want in plain.items():
        if want.any():  # phi's first layer waits for its second
            assert relative_error(compiled[name], want) < 0.1, name


def test_a_bf16_training_learns_and_goes_on_after_a_stop(tmp_path):
    command = [sys.executable, "-m", "nsa_train", "train", f"runs_dir={tmp_path}", f"data.prepared_dir={tmp_path}/data",
               "trainer.steps=40", "trainer.checkpoint_every=20", "logging.wandb=disabled"]  # fmt: skip
    whole = subprocess.run([*command, "name=whole"], capture_output=True, text=True, check=True)
    summary = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert summary["val_loss_last"] < summary["val_loss_first"] - 1, whole.stdout
    (tmp_path / "whole" / "summary.json").unlink()
    for path in (tmp_path / "whole" / "checkpoints" / "step_40").iterdir():
        path.write_bytes(b"")
    again = subprocess.run([*command, "name=whole"], capture_output=True, text=True, check=True)
    resumed = json.loads((tmp_path / "whole" / "summary.json").read_text())
    assert "step_20" in again.stdout
    assert abs(resumed["val_loss_last"] - summary["val_loss_last"]) < 0.02


def test_a_sharded_model_starts_with_the_bits_of_a_whole_one(tmp_path):
    command = [sys.executable, "-m", "nsa_train", "train", f"runs_dir={tmp_path}", f"data.prepared_dir={tmp_path}/data",
               "trainer.steps=1", "trainer.dtype=bf16", "logging.wandb=disabled"]  # fmt: skip
    found = {}
    for layout in ("zero2", "zero3"):
        subprocess.run([*command, f"name={layout}", f"parallel={layout}"], capture_output=True, check=True)
        files = [json.loads((tmp_path / layout / f"{name}.json").read_text()) for name in ("manifest", "summary")]
        found[layout] = files[0]["initial_weights_sha256"], files[1]["val_loss_first"]
    assert found["zero2"][0] == found["zero3"][0]
    assert abs(found["zero2"][1] - found["zero3"][1]) < 1e-4
    config = load_config([])
    model = Transformer(config.model, config.attention, config.moe)
    model.start(config.seed)
    assert found["zero3"][0] == {
        f"{name} {list(p.shape)}": hashlib.sha256(p.detach().numpy()).hexdigest()
        for name, p in model.named_parameters()
    }
