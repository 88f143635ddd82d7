"""The continuum memory system (section 7.1): MLPs that are updated at their own frequencies (Eq. 70-74)."""

from nestlearn.nn.continuum.level import ContinuumLevel
from nestlearn.nn.continuum.memory import ContinuumMemory
from nestlearn.nn.continuum.schedule import continuum_periods
from nestlearn.nn.continuum.state import ContinuumState, LevelState
from nestlearn.nn.continuum.update import LevelUpdate

__all__ = ["ContinuumLevel", "ContinuumMemory", "ContinuumState", "LevelState", "LevelUpdate", "continuum_periods"]
