"""WHAT is stored and by which rule: structures, internal objectives, learning rules (sections 2, 4 and 5)."""

from nestlearn.memory import objectives, rules
from nestlearn.memory.nonparametric import nadaraya_watson
from nestlearn.memory.structures import LinearMemory, MLPMemory, SwiGLUMemory

__all__ = ["LinearMemory", "MLPMemory", "SwiGLUMemory", "nadaraya_watson", "objectives", "rules"]
