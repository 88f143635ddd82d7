"""What the kernels of the linear memories ask of a GPU: compiled ahead of time, on a machine without one.

For every size: the shared memory of a program, and the bytes of a thread that its registers do not hold. A compiler
says so; nothing runs. An H100 (compute capability 9.0) has 227 KiB.

    python benchmarks/triton_tiles.py [--only "64 64 bf16"] [--capability 90]
"""

from __future__ import annotations

import argparse
import re
import subprocess
import tempfile
import warnings
from typing import Any

import torch
from triton import JITFunction, compile, knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from nestlearn.ops.triton.linear import tile_sizes
from nestlearn.ops.triton.linear_backward import linear_backward
from nestlearn.ops.triton.linear_forward import linear_forward
from nestlearn.ops.triton.sequence import compiled_for

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SIZES = ((16, 16), (16, 64), (64, 32), (64, 64), (64, 128))
TOKENS = {"x_eta", "x_alpha", "x_k", "x_v", "q", "y"}
"""The tensors in the precision of the inputs, and their derivatives."""
WHOLE = {"accumulates", "clock", "lengths"}
NUMBERS = {"eta_max", "stretch", "norm_limit", "reach"}


def compiled(kernel: JITFunction, chunk: int, width: int, dtype: str, capability: int) -> Any:
    """A kernel for tiles of so many tokens and channels, all of them in use."""
    sizes = compiled_for(chunk, DTYPES[dtype]) | tile_sizes(chunk, width, DTYPES[dtype])
    options = {name: sizes.pop(name) for name in ("num_warps", "num_stages")}
    fixed = sizes | {"d": width, "chunk": chunk, "KEEP": True}
    types, constants, aligned = {}, {}, {}
    for i, name in enumerate(kernel.arg_names):
        tensor = name.removesuffix("_ptr")
        if name in fixed:
            types[name], constants[(i,)] = "constexpr", fixed[name]
        elif tensor == name:
            types[name] = "fp32" if name in NUMBERS else "i32"
        else:
            types[name] = "*i32" if tensor in WHOLE else f"*{dtype}" if tensor.removeprefix("d_") in TOKENS else "*fp32"
            aligned[(i,)] = [["tt.divisibility", 16]]
    return compile(ASTSource(kernel, types, constants, aligned), GPUTarget("cuda", capability, 32), options)


def outside_registers(binary: bytes) -> int:
    """Bytes of a thread's stack."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        told = subprocess.run(
            [knobs.nvidia.cuobjdump.path, "-res-usage", file.name], capture_output=True, text=True, check=True
        )
    return sum(map(int, re.findall(r"STACK:(\d+)", told.stdout)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="tokens, channels and precision of one row")
    parser.add_argument("--capability", type=int, default=90, help="of the GPU, times ten")
    args = parser.parse_args()
    warnings.filterwarnings("ignore", message="TRITON_DEFAULT_FP_FUSION")
    print("| tokens x channels | inputs | forward, KiB | outside registers, bytes | backward, KiB | outside, bytes |")
    print("|---|---|---|---|---|---|")
    for chunk, width in SIZES:
        for dtype in DTYPES:
            if args.only not in (None, f"{chunk} {width} {dtype}"):
                continue
            row = [f"{chunk} x {width}", dtype]
            for kernel in (linear_forward, linear_backward):
                made = compiled(kernel, chunk, width, dtype, args.capability)
                row += [f"{made.metadata.shared / 1024:g}", f"{outside_registers(made.asm['cubin']):,}"]
            print("| " + " | ".join(row) + " |", flush=True)


if __name__ == "__main__":
    main()
