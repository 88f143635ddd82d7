"""For tests and doctests alike, before anything imports Triton: its kernels run in its interpreter, on the CPU."""

import importlib.util
import os

os.environ.setdefault("TRITON_INTERPRET", "1")

# Doctests are looked for in every module; these cannot be imported without Triton (extra `oracles`).
kernels = ("tiles", "scratch", "sequence", "gate_memories", "linear", "linear_forward", "linear_backward")
kernels += ("mlp", "mlp_tiles", "mlp_forward", "mlp_stages", "mlp_backward")
if importlib.util.find_spec("triton") is None:
    collect_ignore = [f"src/nestlearn/ops/triton/{name}.py" for name in kernels]
