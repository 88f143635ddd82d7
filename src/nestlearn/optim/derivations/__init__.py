"""Optimizers told as memories, PyTorch's and others' too (appendix B): derived, to be held to the real ones."""

from nestlearn.optim.derivations.as_memory import OptimizerMemory, as_memory

__all__ = ["OptimizerMemory", "as_memory"]
