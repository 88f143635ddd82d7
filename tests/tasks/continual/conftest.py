"""What tests of this folder share."""

import pytest

from tests.tasks.continual import small_data


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(small_data.write(tmp_path_factory.mktemp("data")))
