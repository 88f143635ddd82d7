"""ContinuumMemory: the chain of Eq. 70, its identity at one level, and its complaints."""

import pytest
import torch
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.nn import ContinuumMemory


def make(chunk_sizes: list[int], **options: object) -> ContinuumMemory:
    torch.manual_seed(0)
    return ContinuumMemory(6, chunk_sizes, **{"hidden": 12, **options})  # type: ignore[arg-type]


@pytest.mark.parametrize("activation", ["swiglu", "mlp"])
def test_one_level_is_the_plain_residual_mlp_bit_for_bit(activation: str) -> None:
    memory, x = make([64], activation=activation), torch.randn(2, 5, 6)
    level = memory.levels[0]
    u = F.rms_norm(x, (6,), level.norm.weight, 1e-6)
    hidden = F.silu(u @ level.gate.weight.T) * (u @ level.up.weight.T) if activation == "swiglu" else None
    hidden = F.silu(u @ level.up.weight.T) if hidden is None else hidden
    y, state = memory(x)
    assert torch.equal(y, x + hidden @ level.down.weight.T)
    assert state is None


def test_levels_are_chained_fast_to_slow() -> None:
    memory, x = make([4, 16, 64]), torch.randn(2, 5, 6)
    assert [level.chunk_size for level in memory.levels] == [4, 16, 64]
    fast, middle, slow = memory.levels
    assert torch.equal(memory(x)[0], slow(middle(fast(x))))
    assert not torch.allclose(memory(x)[0], fast(middle(slow(x))))


def test_levels_share_the_hidden_width() -> None:
    assert [level.up.out_features for level in make([4, 16, 64]).levels] == [4, 4, 4]


def test_a_level_with_a_zero_output_changes_nothing() -> None:
    memory, x = make([4, 16]), torch.randn(2, 5, 6)
    torch.nn.init.zeros_(memory.levels[1].down.weight)
    assert torch.equal(memory(x)[0], memory.levels[0](x))


@pytest.mark.parametrize(
    ("chunk_sizes", "options", "message"),
    [
        ([], {}, "at least one positive integer"),
        ([0, 4], {}, "positive integer"),
        ([4.0], {}, "positive integer"),
        ([True], {}, "positive integer"),
        ([16, 4], {}, "fast to slow"),
        ([4, 16], {"hidden": 13}, "evenly over 2 levels.*e.g. 12"),
        ([4, 16], {"hidden": 1}, "evenly"),
        ([4], {"activation": "swiglo"}, "did you mean 'swiglu'"),
        ([4], {"variant": "sequental"}, "did you mean 'sequential'"),
        ([4], {"variant": "nested"}, "does not exist yet"),
        ([4], {"variant": "independent"}, "does not exist yet"),
    ],
)
def test_rejects_in_one_line(chunk_sizes: list[int], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(chunk_sizes, **options)
    assert "\n" not in str(error.value)
