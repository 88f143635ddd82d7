"""What every test shares: checked shapes, where the real data is, and one thread so that runs are bit-repeatable."""

import os
from pathlib import Path

import pytest
import torch
from jaxtyping import install_import_hook

# Shapes in the signatures are checked in tests and cost nothing in use. Left out are modules that check what a user
# gives (beartype would speak before they do) and the layers (a compiler cannot trace the checks).
CHECKED = ["memory.rules", "ops.segment", "ops.linear", "ops.mlp", "ops.oja", "ops.omega", "ops.chunk"]
install_import_hook([f"nestlearn.{name}" for name in CHECKED], "beartype.beartype")

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of real data sets: ``NESTLEARN_DATA``, or ``shared/data`` beside the repository."""
    folder = Path(os.environ.get("NESTLEARN_DATA", ROOT.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no real data: set NESTLEARN_DATA (looked in {folder})")
    return folder


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The folder of SmolLM2-135M-Instruct, brought by `nestlearn pull` where it is not in the cache yet."""
    from nestlearn.convert import pull
    from nestlearn.errors import UserError

    try:
        return pull("smollm2")
    except UserError as error:
        pytest.skip(f"no pretrained weights: {error}")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)
