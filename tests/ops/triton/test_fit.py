"""The kernels compile for an H100, within its shared memory. A compiler says so on any machine; nothing runs."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton", reason="needs Triton: pip install -e '.[oracles]'")
SCRIPT = Path(__file__).parents[3] / "benchmarks" / "triton_tiles.py"
H100 = 227  # KiB of shared memory that a program can have


@pytest.mark.parametrize("size", ["64 64 bf16", "64 64 fp32"])
def test_a_chunk_of_64_tokens_fits(size: str) -> None:
    """In a process of its own, since here Triton interprets."""
    run = [sys.executable, str(SCRIPT), "--only", size]
    told = subprocess.run(run, env=os.environ | {"TRITON_INTERPRET": "0"}, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    forward, _, backward, _ = told.stdout.splitlines()[-1].strip("| ").split(" | ")[2:]
    assert max(float(forward), float(backward)) < H100
