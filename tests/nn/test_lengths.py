"""Columns that do not count reach no state, whatever is in them."""

import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.nn import CausalAttention, ContinuumMemory, MemoryLayer, SelfReferentialTitans

LAYERS = {
    "titans": lambda: SelfReferentialTitans(8, heads=2, chunk_size=4),
    "titans, no convolution": lambda: SelfReferentialTitans(8, heads=2, chunk_size=4, conv_size=1),
    "deltanet": lambda: MemoryLayer(8, heads=2, chunk_size=4, design="deltanet"),
    "omega": lambda: MemoryLayer(8, heads=2, chunk_size=4, design="omega"),
    "attention": lambda: CausalAttention(8, heads=2),
    "window": lambda: CausalAttention(8, heads=2, window=3),
    "levels": lambda: ContinuumMemory(8, [2, 4], online="local"),
}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", LAYERS)
def test_what_does_not_count_may_be_anything(name: str, value: float) -> None:
    torch.manual_seed(0)
    layer, x = LAYERS[name](), torch.randn(2, 6, 8)
    filled, lengths = x.clone(), torch.tensor([3, 6])
    filled[0, 3:] = value
    y, state = layer(filled, lengths=lengths)
    clean, clean_state = layer(x, lengths=lengths)
    torch.testing.assert_close(y[0, :3], clean[0, :3])
    torch.testing.assert_close(y[1], clean[1])
    torch.testing.assert_close(layer(x, state)[0], layer(x, clean_state)[0])


def test_lengths_are_whole_numbers_up_to_the_tokens() -> None:
    for lengths in (torch.tensor([7, 1]), torch.tensor([-1, 1]), torch.tensor([1.0, 1.0]), torch.tensor([1])):
        with pytest.raises(UserError, match="one whole number from 0 to 6 for each of 2 rows"):
            CausalAttention(8, heads=2)(torch.zeros(2, 6, 8), lengths=lengths)
