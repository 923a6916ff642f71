"""Plant one fault after another in a copy of the code and see which tests turn red: docs/results/planted_faults.json.

python scripts/planted_faults.py            # all, on a CPU, kernels in Triton's interpreter: some 45 minutes
python scripts/planted_faults.py selected   # those of files, or for tests, with this in their name

A fault that no test sees, and a test that no fault turns red, are named at the end, with exit code 1.
"""

# ruff: noqa: E501  (a fault a line)
from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

from nsa_train.bench import results

ROOT = Path(__file__).resolve().parents[1]
CARRIED = ("nsa_train", "configs", "tests", "pyproject.toml")
NOT_RUN = re.compile("compile|pytorch_accepts|half_precision")  # of compilers and number formats, not of the kernels


class Fault(NamedTuple):
    """`old` stands in <file>.py and becomes `new`; `tests` are the files test_<name>.py that should notice."""

    file: str
    what: str
    old: str
    new: str
    tests: tuple[str, ...]


WHOLE = "nsa_triton"
LAYOUTS = ("layouts",)
FAULTS = (
    Fault("documents", "a document's last, partial tile is left out", "rows + SIZE - 1) // SIZE, BLOCK", "rows) // SIZE, BLOCK", ("documents",)),
    Fault("documents", "tiles are counted from the first document on, not from the own one", "place = table + first + tile", "place = table + tile", ("documents", WHOLE)),
    Fault("documents", "the table has as many columns as the first document needs", "M = rows // size + N", "M = int(self.cu_seqlens[1]) // size + N", ("documents",)),
    Fault("segments", "a block begins one segment late", "torch.where(self.used, first_segment[document] + local, 0)", "torch.where(self.used, first_segment[document] + local + 1, 0)", ("compress",)),
    Fault("segments", "first tokens are counted inside the document", "torch.where(self.used, start[document] + local * d, 0)", "torch.where(self.used, local * d, 0)", ("compress",)),
    Fault("compress", "gradients also go to tokens of no block", "return dx.masked_fill(~segments.in_segment[:, None, None], 0), None", "return dx, None", ("compress",)),
    Fault("compress", "the second layer's gradient is lost", "F.linear(F.silu(_linear(x, segments, w1, bias)), w2)", "F.linear(F.silu(_linear(x, segments, w1, bias)), w2.detach())", ("compress",)),
    Fault("compress_triton", "segments that are none are read", "mask=mask & there, other=0.0)\n        if parts", "mask=mask, other=0.0)\n        if parts", ("compress_triton",)),
    Fault("compress_triton", "tokens are taken as contiguous", "x.stride(0), x.stride(1),", "x.shape[1] * x.shape[2], x.shape[2],", ("compress_triton",)),
    Fault("compress_triton", "a block's last segment gives nothing to its linear map", "for i in range(r):\n            total += tl.load(z", "for i in range(r - 1):\n            total += tl.load(z", ("compress_triton",)),
    Fault("compress_triton", "there is a bias behind the last block", "total = tl.where(there, total + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32), 0.0)", "total = total + tl.load(bias + column, mask=inside, other=0.0).to(tl.float32)", ("compress_triton",)),
    Fault("compress_triton", "silu's slope is its sigmoid", "d *= s * (1.0 + h * (1.0 - s))", "d *= s", ("compress_triton",)),
    Fault("compress_triton", "gradients behind the last block count", "tl.load(dy + at, mask=there & inside", "tl.load(dy + at, mask=inside", ("compress_triton",)),
    Fault("compress_triton", "gradients also go to tokens of no block", "there = tl.load(in_segment + token, mask=exists, other=False)", "there = exists & (R > 0)", ("compress_triton",)),
    Fault("compress_triton", "a segment's mean gradient comes from blocks that do not hold it", "mask=covered & inside", "mask=there & inside", ("compress_triton",)),
    Fault("compress_triton", "a token takes the gradient of its segment's first", "own // d, own % d", "own // d, 0 * own", ("compress_triton",)),
    Fault("compress_triton", "gradients differ from run to run", "dw1 = torch.empty_like(w1)", "dw1, dz = torch.empty_like(w1), dz * (1 + 1e-6 * torch.rand_like(dz))", ("compress_triton",)),
    Fault("compressed", "a block is seen one stride early: tokens of the future", "tl.maximum(position + 1 + CMP_STRIDE - CMP_BLOCK, 0)", "tl.maximum(position + 1 + 2 * CMP_STRIDE - CMP_BLOCK, 0)", ("compressed", "select", WHOLE)),
    Fault("compressed", "a query that sees nothing has no infinite log-sum-exp", 'tl.where(nothing, float("inf"), m + tl.log2(total))', "m + tl.log2(total)", ("compressed",)),
    Fault("compressed", "keys of the first document for all", "k += (doc_cmp.to(tl.int64) * Hk + g) * D\n    v +=", "k += g * D\n    v +=", ("compressed", WHOLE)),
    Fault("compressed", "delta is not subtracted in dQ", "ds = (p * (dp - delta[:, None])).to(k1.dtype)", "ds = (p * dp).to(k1.dtype)", ("compressed", WHOLE)),
    Fault("compressed", "dQ overwrites what is there", "dq1 * dq_scale, ok, 0, D1, D, ADD", "dq1 * dq_scale, ok, 0, D1, D, False", ("compressed", WHOLE)),
    Fault("compressed", "the last chunk of queries is left out of dK, dV", "(length + CHUNK - 1) // CHUNK):", "length // CHUNK):", ("compressed",)),
    Fault("compressed", "dK is not scaled", "row, dk1 * dk_scale, there, 0, D1", "row, dk1, there, 0, D1", ("compressed",)),
    Fault("compressed", "dK differs from run to run", "dk, dv = torch.zeros_like(k), torch.zeros_like(v)", "dk, dv = torch.zeros_like(k), torch.zeros_like(v)\n    partial += 1e-4 * torch.rand_like(partial)", ("compressed", WHOLE)),
    Fault("select", "a key gives nothing to the block it reaches into", "overlap = tl.maximum(to_slot - from_slot, 0).to(tl.float32)", "overlap = tl.where(plane[None, :] > 0, 0, tl.maximum(to_slot - from_slot, 0)).to(tl.float32)", ("select",)),
    Fault("select", "scores of one head instead of the group", "p = tl.sum(tl.reshape(p, [BLOCKS * STEP, HEADS, TOKENS]), 1)", "p = tl.max(tl.reshape(p, [BLOCKS * STEP, HEADS, TOKENS]), 1)", ("select",)),
    Fault("select", "ties go to the higher block", "block = tl.min(tl.where((s == value) & (s >= 0.0), j, NONE), 1)[:, None]", "block = tl.max(tl.where((s == value) & (s >= 0.0), j, -1), 1)[:, None]", ("select",)),
    Fault("select", "keys that a token does not see are scored", "(at < PER_BLOCK)[:, None] & (key[:, None] < seen[None, :])", "(at < PER_BLOCK)[:, None] & (key[:, None] < some)", ("select",)),
    Fault("select", "NaN is a score", "tl.where(may, tl.where(total > 0.0, total, 0.0), -1.0)", "tl.where(may, total, -1.0)", ("select",)),
    Fault("select", "one local block less", "forced = tl.where(slot[None, :] < INIT, slot[None, :], (m - LOCAL + 1)[:, None] + local)", "forced = tl.where(slot[None, :] < INIT, slot[None, :], (m - LOCAL)[:, None] + local)", ("select", WHOLE)),
    Fault("select", "later parts of a long sequence are scored like the first", "token_piece(table, M, first_piece + piece, TOKENS, TABLE_TILE)\n    wanted", "token_piece(table, M, piece, TOKENS, TABLE_TILE)\n    wanted", ("select",)),
    Fault("selected_plan", "blocks behind the own one count", "visible = (block >= 0) & (block <= column - first)", "visible = block >= 0", ("selected",)),
    Fault("selected_plan", "a block's work is cut short", "tl.store(place + 2 * W, lo + tl.minimum((i + 1) * ITEM, count), mask=here)", "tl.store(place + 2 * W, lo + tl.minimum((i + 1) * ITEM, count) - 1, mask=here)", ("selected",)),
    Fault("selected_plan", "only the first partial sum of a popular block counts", "for i in range(items):\n            total", "for i in range(tl.minimum(items, 1)):\n            total", ("selected",)),
    Fault("selected", "no causal mask in the own block", "newest = tl.where(mine & (((entry >> token) & 1) == 1), t, -1)", "newest = tl.where(mine & (((entry >> token) & 1) == 1), t + L, -1)", ("selected", WHOLE)),
    Fault("selected", "a token reads blocks that its neighbour chose", "newest = tl.where(mine & (((entry >> token) & 1) == 1), t, -1)", "newest = tl.where(mine, t, -1)", ("selected",)),
    Fault("selected", "blocks are counted from the first document", "key = doc_start + (entry >> MASK_BITS) * L + inside", "key = (entry >> MASK_BITS) * L + inside", ("selected", WHOLE)),
    Fault("selected", "a query without blocks has log-sum-exp 0", 'tl.where(nothing, float("inf"), m + tl.log2(total)), mask=mine', "tl.where(nothing, 0.0, m + tl.log2(total)), mask=mine", ("selected",)),
    Fault("selected", "dQ overwrites what is there", "dq1 * scale, mine, 0, D1, D, ADD", "dq1 * scale, mine, 0, D1, D, False", ("selected",)),
    Fault("selected", "dV without the mask", "p = tl.where(key[:, None] <= t[None, :], p, 0.0)", "p = p", ("selected", WHOLE)),
    Fault("selected", "a gate of 0 passes gradients to dK", 'other=float("inf"))[None, :])\n        p = tl.where(key', 'other=float("inf"))[None, :])\n        p = tl.where(p == 0.0, 0.1, p)\n        p = tl.where(key', ("selected",)),
    Fault("selected", "dV differs from run to run", "add_partial_sums(read, part_k, part_v, dk, dv, documents, spec)\n", "add_partial_sums(read, part_k, part_v, dk, dv, documents, spec)\n    dv += 1e-6 * torch.rand_like(dv)\n", ("selected", WHOLE)),
    Fault("window", "the window is one token longer", "oldest = tl.maximum(t - W + 1, doc_start)\n    acc", "oldest = tl.maximum(t - W, doc_start)\n    acc", ("window", WHOLE)),
    Fault("window", "it reaches into the document before", "oldest = tl.maximum(t - W + 1, doc_start)\n    acc", "oldest = t - W + 1\n    acc", ("window",)),
    Fault("window", "it reaches into the future", "seen = (key[None, :] >= oldest[:, None]) & (key[None, :] <= t[:, None])", "seen = (key[None, :] >= oldest[:, None]) & (key[None, :] <= t[:, None] + 1)", ("window", WHOLE)),
    Fault("window", "dK, dV stop at the first document's end", "t_end = tl.minimum(last + W, tl.load(table + 3 * M + column))", "t_end = tl.minimum(last + W, tl.load(table + 3 * M))", ("window",)),
    Fault("window", "dQ overwrites what is there", "dq1 * scale, mine, 0, D1, D, ADD", "dq1 * scale, mine, 0, D1, D, False", ("window", WHOLE)),
    Fault("window", "a gate of 0 passes gradients to dQ", "p = tl.exp2(s * scale - lse[:, None])", "p = tl.exp2(s * scale - tl.minimum(lse, 1e4)[:, None] * 0)", ("window",)),
    Fault("window", "o differs from run to run", "return o, lse", "o += 1e-6 * torch.rand_like(o)\n    return o, lse", ("window", WHOLE)),
    Fault("combine", "the last branch is left out", "y += gate[:, None] * _load(o, row, d, R, Dv)", "y += (gate * (b < 2))[:, None] * _load(o, row, d, R, Dv)", ("combine", WHOLE)),
    Fault("combine", "the gradient of a gate is multiplied by the gate", "product.to(dgates.dtype.element_ty)", "(product * gate).to(dgates.dtype.element_ty)", ("combine", WHOLE)),
    Fault("combine", "a gate of 0 leaves the log-sum-exp as it is", 'tl.where(gate > 0, gate, 1.0)), float("inf"))', "tl.where(gate > 0, gate, 1.0)), own)", ("combine", WHOLE)),
    Fault("combine", "dgates differ from run to run", "return dgates, delta, lse_gated", "return dgates + 1e-5 * torch.rand_like(dgates), delta, lse_gated", ("combine",)),
    Fault("nsa_triton", "given blocks are not used", "if blocks is None:\n        blocks = part", "if True:\n        blocks = part", (WHOLE,)),
    Fault("nsa_triton", "rows behind the last compressed key are read", "documents.used_rows(k_cmp), documents.used_rows(v_cmp)", "k_cmp, v_cmp + v_cmp[-1:].mean()", (WHOLE,)),
    Fault("nsa_triton", "what is recomputed differs", "out = combine.forward(gates, o_cmp, o_slc, o_win)", "out = combine.forward(gates, o_cmp, o_slc, o_win) + 1e-6 * torch.rand(1)", (WHOLE,)),
    Fault("engine", "the loss is not multiplied by the processes", "(self.accumulation * dist.get_world_size())", "self.accumulation", LAYOUTS),
    Fault("engine", "the loss is not multiplied by the micro-batches", "(self.accumulation * dist.get_world_size())", "dist.get_world_size()", LAYOUTS),
    Fault("engine", "gradients are clipped as if each process had its own", '"gradient_clipping": clip,', '"gradient_clipping": clip * world,', LAYOUTS),
    Fault("engine", "pieces of weights are saved from the other end of what a process holds", "group, start - first)", "group, size - (stop - first))", LAYOUTS),
    Fault("engine", "pieces of weights that are sharded are saved one element off", "start, stop, group, at)", "start, stop, group, at + 1)", LAYOUTS),
    Fault("loop", "labels are counted by micro-batch, not by step", "out.token_losses.sum() / labels", "out.token_losses.sum() / ((batch.labels != NO_LABEL).sum() * self.micro_batches * self.world)", LAYOUTS),
    Fault("loop", "every process reads the rows of the first", ".micro_batches(step, runtime.rank(), self.world", ".micro_batches(step, 0, self.world", LAYOUTS),
    Fault("loop", "loads are not summed over processes", "sum_over_ranks(load, stop)", "sum_over_ranks(stop)", LAYOUTS),
    Fault("loop", "loads are those of the last micro-batch", "load += out.load", "load = out.load.clone()", LAYOUTS),
    Fault("loop", "biases of routers stay where they are", "self.model.balance_experts(load)", "pass", LAYOUTS),
    Fault("transformer", "what is computed again has other inputs", "checkpoint(run, *inputs, ", "checkpoint(lambda x, *rest, seen=[]: run(1.01 * x if seen else seen.append(x) or x, *rest), *inputs, ", LAYOUTS),
)  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", nargs="?", default="", help="or a part of it; default: all")
    wanted = parser.parse_args().name
    chosen = [fault for fault in FAULTS if any(wanted in name for name in (fault.file, *fault.tests))]
    if not chosen:
        there = sorted({name for fault in FAULTS for name in (fault.file, *fault.tests)})
        parser.error(f"no fault is of a file, or for a test, with {wanted!r} in its name; there are {', '.join(there)}")
    rows, seen = [], set()
    with tempfile.TemporaryDirectory() as place:
        copy = Path(place)
        for name in CARRIED:
            source = ROOT / name
            (shutil.copytree if source.is_dir() else shutil.copy)(source, copy / name)
        for fault in chosen:
            red = _red(copy, fault)
            tests_red = {case.partition("[")[0] for case in red}
            seen |= tests_red
            rows.append({"file": fault.file, "fault": fault.what, "red": sorted(red)})
            print(f"{fault.file}: {fault.what}: {len(tests_red)} tests red, in {len(red)} cases", flush=True)
        tests = {test for fault in chosen for name in fault.tests for test in _tests(copy, name)}
    missed = [f"{row['file']}: {row['fault']}" for row in rows if not row["red"]]
    never = sorted(test for test in tests - seen if not NOT_RUN.search(test))
    print("\n".join([*(f"no test saw: {fault}" for fault in missed), *(f"never red: {test}" for test in never)]))
    if not wanted:
        print(results.write_result("planted_faults", "planted_faults", rows))
    return int(bool(missed or never))


def _red(copy: Path, fault: Fault) -> set[str]:
    """Cases of tests, `<file>::<function>[<case>]`, that fail with the fault in place."""
    path = _only(copy / "nsa_train", fault.file)
    text = path.read_text()
    if fault.old not in text:
        raise SystemExit(f"{path.name} does not hold {fault.old!r} any more; plant the fault {fault.what!r} anew")
    path.write_text(text.replace(fault.old, fault.new))
    files = [_only(copy / "tests", f"test_{name}") for name in fault.tests]
    command = [sys.executable, "-m", "pytest", "-q", "-o", "addopts=", "-p", "no:cacheprovider", "--tb=no", "-rfE",
               "-n", "2", "-m", "not gpu", *map(str, files)]  # fmt: skip
    here = {"PYTHONPATH": f"{copy}:{copy / 'tests'}", "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    done = subprocess.run(command, cwd=copy, env=os.environ | here, capture_output=True, text=True, check=False)
    path.write_text(text)
    if done.returncode not in (0, 1):
        raise SystemExit(f"{fault.what}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    failed = r"^(?:FAILED|ERROR) tests/\w+/test_(\w+\.py::\w+(?:\[.*?\])?)(?: - .*)?$"
    return set(re.findall(failed, done.stdout, flags=re.MULTILINE))


def _only(folder: Path, name: str) -> Path:
    """The only file of that name anywhere below a folder."""
    (path,) = folder.rglob(f"{name}.py")
    return path


def _tests(copy: Path, name: str) -> set[str]:
    text = _only(copy / "tests", f"test_{name}").read_text()
    return {f"{name}.py::{test}" for test in re.findall(r"^def (test_\w+)", text, flags=re.MULTILINE)}


if __name__ == "__main__":
    sys.exit(main())
