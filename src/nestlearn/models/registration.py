"""Let ``AutoConfig`` and ``AutoModelForCausalLM`` know the models here, without importing transformers for it.

``import transformers`` with its auto classes takes about 1.5 s and brings torch; ``nestlearn --help`` should not
wait for it. So ``import nestlearn`` only leaves word: when transformers' registry of configurations is imported,
before or after nestlearn, ``HopeConfig`` is registered in it. The first ``HopeConfig`` that is made, by a user or
by ``AutoConfig``, imports and registers its models.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType

REGISTRY = "transformers.models.auto.configuration_auto"
CONFIGURATION = "nestlearn.models.hope.configuration_hope"  # registers its class at its end


class _RegisterAfter(MetaPathFinder):
    """Finds the registry as usual, once, and imports our configuration right after the registry has been run."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != REGISTRY:
            return None
        sys.meta_path.remove(self)
        spec = find_spec(fullname)
        if spec is None or spec.loader is None:
            return spec
        execute = spec.loader.exec_module

        def execute_then_register(module: ModuleType) -> None:
            execute(module)
            # Only imported, not looked into: this may be running inside the import of our configuration itself.
            import_module(CONFIGURATION)

        spec.loader.exec_module = execute_then_register  # type: ignore[method-assign]
        return spec


def register_on_import() -> None:
    """Register now if transformers' auto classes are loaded already, else when they are."""
    if REGISTRY in sys.modules:
        import_module(CONFIGURATION)
    elif not any(isinstance(finder, _RegisterAfter) for finder in sys.meta_path):
        sys.meta_path.insert(0, _RegisterAfter())
