"""A pretrained language model that can go on learning (section 7.3)."""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestlearn.convert.config import Level, LevelsConfig
    from nestlearn.convert.identity import base_hash
    from nestlearn.convert.model import ContinualModel, ModelLevel, convert
    from nestlearn.convert.pretrained import model_folder, pull

__all__ = [
    "ContinualModel",
    "Level",
    "LevelsConfig",
    "ModelLevel",
    "base_hash",
    "convert",
    "model_folder",
    "pull",
]

# Loaded when first used: the command line registers the commands of this package without loading torch.
_LAZY = {
    "ContinualModel": "model",
    "Level": "config",
    "LevelsConfig": "config",
    "ModelLevel": "model",
    "base_hash": "identity",
    "convert": "model",
    "model_folder": "pretrained",
    "pull": "pretrained",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)


class _Callable(ModuleType):
    """``from nestlearn import convert`` finds this package once it is imported, the function before: both convert."""

    def __call__(self, *args: Any, **kwargs: Any) -> ContinualModel:
        return self.convert(*args, **kwargs)


sys.modules[__name__].__class__ = _Callable
