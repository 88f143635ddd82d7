"""For tests and doctests alike, before anything imports Triton: its kernels run in its interpreter, on the CPU."""

import importlib.util
import os
from pathlib import Path

os.environ.setdefault("TRITON_INTERPRET", "1")
TRITON = Path(__file__).parent / "src/nestlearn/ops/triton"

# Doctests are looked for in every module; these cannot be imported without Triton (extra `oracles`).
if importlib.util.find_spec("triton") is None:
    collect_ignore = [path for path in TRITON.glob("*.py") if path.name not in ("__init__.py", "support.py")]
