"""What ptxas makes of the kernels of a host function, for Hopper, on a machine that needs no GPU.

Run in a process without TRITON_INTERPRET: the host function is called on meta tensors, its launches are recorded, and
each is compiled for sm_90 with the very arguments of the launch.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.experimental.gluon._runtime import GluonASTSource
from triton.runtime.jit import JITFunction

NAMES = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int32: "i32", torch.int64: "i64",
    torch.uint8: "u8", torch.bool: "i1",
}  # fmt: skip
BIN = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
SHARED_LIMIT = 227 * 1024  # bytes of shared memory that a program may use on Hopper


def _type(value) -> str:
    if isinstance(value, torch.Tensor):
        return f"*{NAMES[value.dtype]}"
    if hasattr(value, "block_shape"):
        layout = f",{value.layout!r}" if hasattr(value, "layout") else ""
        return f"tensordesc<{NAMES[value.base.dtype]}{list(value.block_shape)}{layout}>"
    return "fp32" if isinstance(value, float) else "i32"


def _compile(kernel, values, options):
    """Figures of one launch, as `reports` gives them."""
    constant = {
        i: value
        for i, (parameter, value) in enumerate(zip(kernel.params, values, strict=True))
        if parameter.is_constexpr or value is None or (isinstance(value, int) and value == 1)
    }
    types = {
        name: "constexpr" if i in constant else _type(value)
        for i, (name, value) in enumerate(zip(kernel.arg_names, values, strict=True))
    }
    aligned = {
        (i,): [["tt.divisibility", 16]]
        for i, value in enumerate(values)
        if i not in constant and (isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0))
    }
    source = GluonASTSource if kernel.is_gluon() else ASTSource
    made = triton.compile(
        source(kernel, types, {(i,): value for i, value in constant.items()}, aligned),
        target=GPUTarget("cuda", 90, 32), options=options,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "a.cubin"), Path(folder, "a.ptx")
        cubin.write_bytes(made.asm["cubin"])
        ptx.write_text(made.asm["ptx"])
        run = lambda *command: subprocess.run(map(str, command), capture_output=True, text=True)  # noqa: E731
        assembler = run(BIN / "ptxas", "-v", "--gpu-name=sm_90a", ptx, "-o", Path(folder, "b.cubin")).stderr
        usage = run(BIN / "cuobjdump", "-res-usage", cubin).stdout
        sass = run(BIN / "cuobjdump", "-sass", cubin).stdout
    return {
        "kernel": kernel.__name__,
        "registers": int(re.search(r"REG:(\d+)", usage)[1]),
        "spills": len(re.findall(r"\b(?:LDL|STL)\b", sass)),
        "wgmma": len(re.findall("HGMMA", sass)),
        "serialised": "serializ" in assembler,
        "shared": made.metadata.shared,
    }


def record(call):
    """The figures of every launch of `call()`, by kernel name."""
    found = []

    def run(self, *args, grid, warmup, **kwargs):
        options = {k: v for k, v in kwargs.items() if k in ("num_warps", "num_stages", "maxnreg")}
        given = dict(zip(self.arg_names, args, strict=False)) | kwargs
        found.append((self, [given[name] for name in self.arg_names], options))

    plain, JITFunction.run = JITFunction.run, run
    try:
        call()
    finally:
        JITFunction.run = plain
    return [_compile(*launch) for launch in found if not launch[0].__name__.startswith("_tile_table")]


def reports(script: str) -> list[dict]:
    """Runs `script` (a test file that prints JSON of `record`'s figures) in a process without the interpreter."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent), *sys.path])
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)
