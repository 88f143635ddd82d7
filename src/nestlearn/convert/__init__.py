"""A pretrained language model that can go on learning (section 7.3)."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

from nestlearn.convert.config import Level, LevelsConfig
from nestlearn.convert.identity import base_hash
from nestlearn.convert.model import ContinualModel, ModelLevel, convert

__all__ = ["ContinualModel", "Level", "LevelsConfig", "ModelLevel", "base_hash", "convert"]


class _Callable(ModuleType):
    """``from nestlearn import convert`` finds this package once it is imported, the function before: both convert."""

    def __call__(self, *args: Any, **kwargs: Any) -> ContinualModel:
        return convert(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
