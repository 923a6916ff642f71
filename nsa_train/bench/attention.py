"""`nsa-train bench attention`: the NSA op, each of its parts and the dense kernels, timed side by side on one GPU.

Blocks are made up (`bench.inputs`) or those that a trained model chose (`bench.trained`). A card slows down as it warms
up, so all candidates of a length take turns, and a row holds the median of its turns.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nsa_train import runtime
from nsa_train.bench import results
from nsa_train.bench.exact import attention_of_rows
from nsa_train.bench.figures import plot_attention
from nsa_train.bench.inputs import Shape, index_set, realistic_lengths
from nsa_train.bench.timing import Timed, relative_error, spread, take_turns
from nsa_train.bench.trained import TrainedBlocks
from nsa_train.errors import NsaTrainError
from nsa_train.model.branches import PHI
from nsa_train.model.layers import apply_rope, rope_angles
from nsa_train.ops import combine, flash4
from nsa_train.ops.dense import dense_attention
from nsa_train.ops.documents import Documents
from nsa_train.ops.nsa import NSASpec, nsa_attention
from nsa_train.ops.nsa_triton import part
from nsa_train.ops.segments import Segments
from nsa_train.packing import Packing

SPEC = NSASpec()  # the paper's sizes
CHECKED_QUERIES = 48
MADE = ("local", "random")  # kinds of `index_set`
TRAINED = "trained"
DENSE = ("flash4", "cudnn", "flash", "varlen")
Key = tuple[str, str, str]  # impl, part, pass


class Case:
    """Inputs of one shape on the GPU, and what is timed on them."""

    def __init__(self, shape: Shape, packing: Packing, blocks: Tensor) -> None:
        torch.manual_seed(0)
        self.shape, self.packing = shape, packing.to("cuda")
        self.cu_seqlens = self.packing.cu_seqlens
        self.scale = shape.D**-0.5
        T, Hq, Hk, D, Dv = shape.T, shape.Hq, shape.Hk, shape.D, shape.Dv

        def leaf(*size: int) -> Tensor:
            return torch.randn(*size, device="cuda", dtype=shape.dtype).requires_grad_()

        self.q = leaf(T, Hq, D)
        self.raw = leaf(T, Hk, D), leaf(T, Hk, Dv)  # what phi compresses
        self.slc = leaf(T, Hk, D), leaf(T, Hk, Dv)
        self.win = leaf(T, Hk, D), leaf(T, Hk, Dv)
        self.gates = leaf(T, Hq, 3).detach().sigmoid().requires_grad_()
        self.do = leaf(T, Hq, Dv).detach()
        self.phi = [PHI["mlp"](SPEC.cmp_block, width).to("cuda", shape.dtype) for width in (D, Dv)]
        for phi in self.phi:
            for parameter in phi.parameters():
                torch.nn.init.normal_(parameter, std=0.02)
        self.segments = Segments(self.cu_seqlens, T, SPEC)
        cos, sin = rope_angles(self.packing.positions, D, 10000.0)
        self.cmp_angles = cos[self.segments.first_token], sin[self.segments.first_token]
        self.blocks = blocks
        self.inputs = [
            self.q,
            *self.raw,
            *self.slc,
            *self.win,
            self.gates,
            *(p for f in self.phi for p in f.parameters()),
        ]

    def compressed(self) -> tuple[Tensor, Tensor]:
        """phi of K and V, and RoPE of the compressed keys."""
        k, v = (phi(raw, self.segments) for phi, raw in zip(self.phi, self.raw, strict=True))
        return apply_rope(k, self.cmp_angles), v

    def documents(self) -> Documents:
        return Documents(self.cu_seqlens, self.shape.T, SPEC)

    def attend(self, k_cmp: Tensor, v_cmp: Tensor) -> Tensor:
        return nsa_attention(
            self.q, k_cmp, v_cmp, *self.slc, *self.win, self.gates, SPEC, self.cu_seqlens, blocks=self.blocks,
            backend="triton",
        )  # fmt: skip

    def prepare(self) -> None:
        """Run the forward parts once: what the backward parts start from."""
        with torch.no_grad():
            k, v = (x.detach() for x in self.compressed())
            self.keys = {"compressed": (k, v), "selected": self.slc, "window": self.win}
            made = [self.forward(name) for name in self.keys]
            self.outputs, self.lses = [o for o, _ in made], [lse for _, lse in made]
            _, self.delta, self.gated_lses = combine.backward(self.do, self.gates, self.outputs, self.lses)
            self.dq = torch.empty_like(self.q)

    @torch.no_grad()
    def forward(self, name: str) -> Any:
        blocks = (self.blocks,) if name == "selected" else ()
        kernels = part(name, self.q, *self.keys[name], SPEC)
        return kernels.forward(self.q, *self.keys[name], *blocks, self.documents(), SPEC, self.scale)

    @torch.no_grad()
    def backward(self, name: str) -> Any:
        blocks = (self.blocks,) if name == "selected" else ()
        i = list(self.keys).index(name)
        return part(name, self.q, *self.keys[name], SPEC).backward(
            self.q, *self.keys[name], *blocks, self.do, self.gated_lses[i], self.delta[i], self.documents(), SPEC,
            self.scale, self.dq, accumulate=name != "selected",
        )  # fmt: skip

    @torch.no_grad()
    def select(self, k_cmp: Tensor) -> Any:
        kernels = part("select", self.q, k_cmp, self.keys["compressed"][1], SPEC)
        return kernels.select_blocks(self.q, k_cmp, self.lses[0], self.documents(), SPEC, self.scale)

    def op(self) -> Tensor:
        """The whole op with given blocks; selection runs too, and its result is dropped."""
        k_cmp, v_cmp = self.compressed()
        self.select(k_cmp)
        return self.attend(k_cmp, v_cmp)

    def ours(self) -> dict[Key, Timed]:
        """The op and its parts; backward functions go again and again through one forward's graph."""
        self.prepare()
        compressed, out = self.compressed(), self.op()
        grads = [torch.randn_like(x) for x in compressed]
        phi_inputs = [*self.raw, *(p for f in self.phi for p in f.parameters())]
        back = partial(torch.autograd.grad, retain_graph=True)
        parts: dict[tuple[str, str], Timed] = {
            ("compress", "fwd"): self.compressed,
            ("compress", "bwd"): partial(back, compressed, phi_inputs, grads),
            ("topn", "fwd"): partial(self.select, self.keys["compressed"][0]),
            ("gate", "fwd"): partial(combine.forward, self.gates.detach(), *self.outputs),
            ("gate", "bwd"): partial(combine.backward, self.do, self.gates.detach(), self.outputs, self.lses),
            ("op", "fwd"): self.op,
            ("op", "bwd"): partial(back, out, self.inputs, self.do),
        }
        for name in self.keys:
            parts[name, "fwd"] = partial(self.forward, name)
            parts[name, "bwd"] = partial(self.backward, name)
        return {("nsa_train", name, direction): function for (name, direction), function in parts.items()}

    def dense(self, backends: tuple[str, ...]) -> tuple[dict[Key, Timed], dict[str, str]]:
        """Full attention on the same q and the selected branch's keys; and of kernels that fail, why."""
        timed: dict[Key, Timed] = {}
        failed: dict[str, str] = {}
        for backend in backends:
            if backend in ("flash", "varlen") and self.shape.Dv < self.shape.D:
                continue  # FlashAttention-2 takes equal widths only
            if backend == "flash4" and not flash4.kernels():
                continue
            name = backend if backend == "flash4" else f"torch-{backend}"
            forward = partial(dense_attention, self.q, *self.slc, self.packing.lengths, backend=backend)
            try:
                o = forward()
            except (RuntimeError, ValueError) as error:
                failed[name] = str(error)[:300]
                continue
            timed[name, "dense", "fwd"] = forward
            timed[name, "dense", "bwd"] = partial(
                torch.autograd.grad, o, (self.q, *self.slc), self.do, retain_graph=True
            )
        return timed, failed

    def peak_gib(self) -> float:
        """Peak of one forward and backward pass of the op, its inputs and gradients included."""
        torch.cuda.empty_cache()
        held = torch.cuda.memory_allocated()
        mine = sum(x.numel() * x.element_size() for x in (*self.inputs, self.do, self.blocks, self.cu_seqlens))
        torch.cuda.reset_peak_memory_stats()
        torch.autograd.grad(self.attend(*self.compressed()), self.inputs, self.do)
        return (torch.cuda.max_memory_allocated() - held + mine) / 2**30

    def relative_errors(self) -> dict[str, float]:
        """||got - exact|| / ||exact|| in fp32 of the output and of every gradient, for a few queries spread over T."""
        rows = torch.randperm(self.shape.T, device="cuda")[:CHECKED_QUERIES].sort().values
        do = torch.zeros_like(self.do)
        do[rows] = self.do[rows]
        with torch.no_grad():
            k_cmp, v_cmp = self.compressed()
        compressed = k_cmp.requires_grad_(), v_cmp.requires_grad_()
        inputs = [self.q, *compressed, *self.slc, *self.win, self.gates]
        got = self.attend(*compressed)
        want = attention_of_rows(
            rows, self.q, *compressed, *self.slc, *self.win, self.gates, SPEC, self.cu_seqlens, self.scale, self.blocks
        )
        names = ("dq", "dk_cmp", "dv_cmp", "dk_slc", "dv_slc", "dk_win", "dv_win", "dgates")
        errors = {"o": relative_error(got[rows], want)}
        pairs = zip(
            names, torch.autograd.grad(got, inputs, do),
            torch.autograd.grad(want, inputs, self.do[rows].float()), strict=True,
        )  # fmt: skip
        return errors | {name: relative_error(a, b) for name, a, b in pairs}


def rows_of(
    shape: Shape, lengths: list[int], indices: str, trained: TrainedBlocks | None, seconds: float,
    backends: tuple[str, ...], check: bool,
) -> list[dict[str, Any]]:  # fmt: skip
    """The rows of one shape; a part that failed has `error` in place of figures. Blocks are `trained`'s or made."""
    head = {
        "T": shape.T, "Hq": shape.Hq, "Hk": shape.Hk, "d_qk": shape.D, "d_v": shape.Dv,
        "dtype": str(shape.dtype).removeprefix("torch."), "docs": len(lengths),
    }  # fmt: skip
    try:
        packing, device = Packing.from_lengths(lengths), torch.device("cuda")
        if trained:
            blocks = trained.cut(shape.T, shape.Hk).to(device)
        else:
            blocks = index_set(indices, packing, shape.Hk, SPEC, device)
        case = Case(shape, packing, blocks)
        ours = case.ours()
        dense, failed = case.dense(backends)
        peak = case.peak_gib()
        errors = case.relative_errors() if check else {}
        times = take_turns(ours | dense, seconds, max_turns=50)
    except (RuntimeError, ValueError) as error:
        of = {"impl": "nsa_train", "part": "op", "pass": None, "indices": indices}
        return [{**head, **of, "error": str(error)[:300]}]
    rows = [{"impl": impl, "part": "dense", "pass": None, **head, "indices": None, "error": error}
            for impl, error in failed.items()]  # fmt: skip
    for (impl, name, direction), ms in times.items():
        row = {"impl": impl, "part": name, "pass": direction, **head, "indices": None if name == "dense" else indices}
        row |= spread(ms)
        if name == "op":
            row |= {"peak_gib": peak, "rel_err": max(errors.values(), default=None), "rel_errs": errors}
        rows.append(row)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """One line a shape: forward + backward of the op, of the fastest dense kernel, and of the parts."""
    lines = []
    shapes = sorted({(r["d_qk"], r["d_v"], r["T"], r["docs"], r["indices"] or "") for r in rows if r["indices"]})
    for D, Dv, T, docs, indices in shapes:
        here = [r for r in rows if (r["d_qk"], r["d_v"], r["T"], r["docs"]) == (D, Dv, T, docs)]
        for failed in (r for r in here if "error" in r):
            lines.append(f"{D}/{Dv} T={T} docs={docs} {indices}: {failed['error']}")
        ms = {(r["impl"], r["part"], r["pass"]): r["ms"] for r in here if r["indices"] in (indices, None) and "ms" in r}
        if not ms:
            continue
        names = list(dict.fromkeys((impl, name) for impl, name, _ in ms))
        cells = [
            f"{name if impl == 'nsa_train' else impl} "
            + "+".join(f"{ms[impl, name, d]:.2f}" for d in ("fwd", "bwd") if (impl, name, d) in ms)
            for impl, name in names
        ]
        op = next(r for r in here if r["part"] == "op" and r["indices"] == indices)
        error = f"{op['rel_err']:.1e}" if op.get("rel_err") is not None else "-"
        total = ms["nsa_train", "op", "fwd"] + ms["nsa_train", "op", "bwd"]
        lines.append(
            f"{D}/{Dv} T={T} docs={docs} {indices}: op {total:.2f} ms, {op['peak_gib']:.1f} GiB, error {error}"
        )
        lines.append("    " + ", ".join(cells))
    return "\n".join(lines)


def main(arguments: list[str]) -> int:
    """Run the benchmark and write <out>/attention_<gpu>.json; the exit code."""
    parser = argparse.ArgumentParser(prog="nsa-train bench attention", description=__doc__)
    parser.add_argument("--lengths", type=int, nargs="+", default=[8192, 16384, 32768, 65536], metavar="T")
    parser.add_argument("--widths", nargs="+", default=["192/128", "128/128", "64/64"], metavar="D/DV")
    parser.add_argument("--heads", default="64/4", metavar="HQ/HK")
    parser.add_argument("--indices", nargs="+", default=[*MADE], choices=[*MADE, TRAINED])
    parser.add_argument("--blocks", type=Path, metavar="NPZ", help="of `nsa-train eval RUN task=blocks`, for `trained`")
    parser.add_argument(
        "--docs", nargs="+", default=["one", "many"], choices=["one", "many"], help="trained blocks bring their own"
    )
    parser.add_argument("--seconds", type=float, default=3.0, help="time for the turns of one shape")
    parser.add_argument("--out", type=Path, default=results.RESULTS, help="folder of the JSON")
    parser.add_argument("--name", help="of the JSON file; default attention_<gpu>")
    parser.add_argument("--commit", help="source commit, where the tree is no git checkout")
    args = parser.parse_args(arguments)
    if (TRAINED in args.indices) != (args.blocks is not None):
        raise NsaTrainError("bench attention: --indices trained and --blocks FILE need one another")
    file = TrainedBlocks.load(args.blocks, SPEC) if args.blocks else None
    if not torch.cuda.is_available():
        raise NsaTrainError("bench attention: no CUDA device here; it measures kernels on a GPU")
    Hq, Hk = map(int, args.heads.split("/"))
    name = args.name or f"attention_{results.gpu_label()}"
    rows: list[dict[str, Any]] = []
    made = [indices for indices in args.indices if indices != TRAINED]
    kinds = [(docs, indices) for docs in args.docs for indices in (made if docs == "one" else made[:1])]
    kinds += [("file", TRAINED)] if file else []
    cases = list(product(args.widths, args.lengths, kinds))
    for i, (widths, T, (docs, indices)) in enumerate(cases):
        D, Dv = map(int, widths.split("/"))
        trained = file if docs == "file" else None
        lengths = trained.lengths(T) if trained else [T] if docs == "one" else realistic_lengths(T)
        backends = DENSE if trained or indices == made[0] else ()
        found = rows_of(Shape(T, Hq, Hk, D, Dv), lengths, indices, trained, args.seconds, backends, check=True)
        torch.cuda.empty_cache()
        rows += found
        runtime.log.info("[%d/%d] %s", i + 1, len(cases), table(found))
        written = results.write_result(name, "attention", rows, args.commit, args.out)
    plot_attention(json.loads(written.read_text()), written.with_suffix(".png"))
    return 0
