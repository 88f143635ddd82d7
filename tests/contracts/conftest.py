import pytest

from tests.contracts.optimizer_cases import EVERY


@pytest.fixture(params=EVERY)
def make(request):
    constructor, rate = EVERY[request.param]
    return lambda model, lr=rate, **kwargs: constructor(model, lr, **kwargs)
