"""Mistakes in one line: what is near, and what has to be installed."""

from __future__ import annotations

import pytest

from nestlearn.errors import UserError, nearest, require_extra


def test_a_near_name_is_offered_and_a_far_one_is_not() -> None:
    assert nearest("atention", ["hope", "attention"]) == "did you mean 'attention'? (allowed: attention, hope)"
    assert nearest("xyz", ["hope", "attention"]) == "allowed: attention, hope"


def test_what_is_not_installed_is_named_with_its_command() -> None:
    assert require_extra("json.decoder", "reading") is __import__("json.decoder").decoder
    with pytest.raises(UserError, match=r"^training needs nopackage: pip install 'nestlearn\[train\]'$"):
        require_extra("nopackage.part", "training")
