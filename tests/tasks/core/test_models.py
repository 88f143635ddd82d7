"""The models of the core tasks: equal in size, causal, and the self-referential matrix against its definition."""

import pytest
import torch
from torch import Tensor

from nestlearn.errors import UserError
from nestlearn.tasks.core.models import MODELS, Size, build, configure, language_model
from nestlearn.tasks.core.srwm import SelfReferentialMatrix


@pytest.mark.parametrize("name", MODELS)
def test_models_are_of_equal_size_and_causal(name: str) -> None:
    torch.manual_seed(0)
    hope, model = (sum(p.numel() for p in build(n, 5, 4, Size()).parameters()) for n in ("hope", name))
    assert abs(model - hope) < 0.05 * hope
    small = build(name, 5, 4, Size(dim=16, layers=1, heads=2, intermediate=48)).eval()
    tokens = torch.randint(0, 5, (3, 9))
    changed = tokens.clone()
    changed[:, 6:] = (changed[:, 6:] + 1) % 5
    logits, later = small(tokens), small(changed)
    assert logits.shape == (3, 9, 4)
    torch.testing.assert_close(logits[:, :6], later[:, :6])
    assert not torch.allclose(logits[:, 6:], later[:, 6:])


def test_a_language_model_is_the_package_s_own() -> None:
    model = language_model("transformer+conv", 32, Size(dim=16, layers=2, heads=2, intermediate=48))
    assert model.config.block_types == ["hope-attention"] * 2
    assert model.config.cms_chunk_sizes == [1]
    assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, 32)


def test_options_override_and_the_rest_is_matched() -> None:
    config = configure("hope", 8, Size(), {"chunk_size": 1, "num_hidden_layers": 1, "intermediate_size": 96})
    assert (config.chunk_size, config.intermediate_size, config.block_types) == (1, 96, ["hope"])
    levels = configure("hope-attention", 8, Size())
    assert levels.intermediate_size % len(levels.cms_chunk_sizes) == 0


def test_mistakes_are_one_line() -> None:
    with pytest.raises(UserError, match="unknown model 'hpe'; did you mean 'hope'"):
        build("hpe", 4, 4, Size())
    with pytest.raises(UserError, match="HopeConfig has no 'memory'; did you mean 'memory_type'"):
        build("hope", 4, 4, Size(dim=16), {"memory": "mlp"})
    with pytest.raises(UserError, match="model 'lstm' takes no options of HopeConfig, got chunk_size"):
        build("lstm", 4, 4, Size(), {"chunk_size": 1})
    with pytest.raises(UserError, match="model 'srwm' has no configuration"):
        configure("srwm", 4, Size())


def plain(layer: SelfReferentialMatrix, x: Tensor) -> Tensor:
    """The layer on one sequence x (T, D), one head and one number at a time."""
    d, outputs = layer.width, []
    W = [start for start in layer.start]
    for token in x:
        heads = []
        for h in range(layer.heads):
            phi = torch.softmax(token[h * d : (h + 1) * d], 0)
            z = W[h] @ phi
            y, k, q, b = (
                z[:d],
                torch.softmax(z[d : 2 * d], 0),
                torch.softmax(z[2 * d : 3 * d], 0),
                torch.sigmoid(z[3 * d :]),
            )
            old, new = W[h] @ k, W[h] @ q
            rows = [b[min(row // d, 3)] * (new[row] - old[row]) * k for row in range(3 * d + 4)]
            W[h] = W[h] + torch.stack(rows)
            heads.append(y)
        outputs.append(torch.cat(heads))
    return torch.stack(outputs) @ layer.out.weight.T


def test_the_self_referential_matrix_is_its_definition_in_outputs_and_gradients() -> None:
    torch.manual_seed(0)
    layer = SelfReferentialMatrix(6, heads=2).double()
    x = torch.randn(2, 7, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(2, 7, 6, dtype=torch.float64)
    leaves = [x, *layer.parameters()]
    fast, slow = layer(x), torch.stack([plain(layer, row) for row in x])
    torch.testing.assert_close(fast, slow)
    grads = (torch.autograd.grad((y * weight).sum(), leaves) for y in (fast, slow))
    for one, other in zip(*grads, strict=True):
        assert one.abs().max() > 0
        torch.testing.assert_close(one, other)
    with pytest.raises(UserError, match="heads=4 must divide dim=6"):
        SelfReferentialMatrix(6, heads=4)
