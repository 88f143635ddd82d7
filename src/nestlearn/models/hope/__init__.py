"""Hope: self-referential Titans and a continuum memory in every block, and its attention twins."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nestlearn.models.hope.cache_hope import BlockState, HopeCacheLayer
    from nestlearn.models.hope.configuration_hope import BLOCK_TYPES, HopeConfig
    from nestlearn.models.hope.modeling_hope import HopeForCausalLM, HopeModel

_LAZY = {
    "BLOCK_TYPES": "configuration_hope",
    "BlockState": "cache_hope",
    "HopeCacheLayer": "cache_hope",
    "HopeConfig": "configuration_hope",
    "HopeForCausalLM": "modeling_hope",
    "HopeModel": "modeling_hope",
}
__all__ = ["BLOCK_TYPES", "BlockState", "HopeCacheLayer", "HopeConfig", "HopeForCausalLM", "HopeModel"]


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_LAZY[name]}"), name)
