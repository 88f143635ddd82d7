"""Nested Learning in PyTorch: models, memories and optimizers that keep learning."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from nestlearn.models.registration import register_on_import

if TYPE_CHECKING:
    from nestlearn.convert import LevelsConfig, convert
    from nestlearn.learner import ContinualLearner
    from nestlearn.levels import describe
    from nestlearn.models.hope import HopeConfig, HopeForCausalLM

__version__ = "0.1.0"
__all__ = ["ContinualLearner", "HopeConfig", "HopeForCausalLM", "LevelsConfig", "__version__", "convert", "describe"]

# Names that load torch or transformers when they are first used, so that ``import nestlearn`` itself is quick.
_LAZY = {
    "ContinualLearner": "nestlearn.learner",
    "HopeConfig": "nestlearn.models.hope",
    "HopeForCausalLM": "nestlearn.models.hope",
    "LevelsConfig": "nestlearn.convert",
    "convert": "nestlearn.convert",
    "describe": "nestlearn.levels",
}

register_on_import()


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LAZY[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
