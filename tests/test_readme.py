"""The README speaks of what is there."""

from __future__ import annotations

import re
from pathlib import Path

from tests.conftest import ROOT


def test_every_file_in_the_tree_exists_and_every_module_is_in_the_tree() -> None:
    text = (ROOT / "README.md").read_text()
    tree = text.split("## The tree")[1].split("## Limits")[0]
    named = set(re.findall(r"[\w/-]+\.(?:py|toml|md)", tree))
    files = {
        path.name for pattern in ("*.py", "*.toml", "*.md") for path in ROOT.rglob(pattern) if ".venv" not in str(path)
    }
    assert {name for name in named if Path(name).name not in files} == set()
    modules = {path.name for path in (ROOT / "src").rglob("*.py") if not path.name.startswith("__")}
    hope = {"configuration_hope.py", "modeling_hope.py", "cache_hope.py"}  # named by their folder
    assert modules - {Path(name).name for name in named} - hope == set()
