"""What is captured of a layer's input: every key against the layer's own output, and when nothing may be captured."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.func import functional_call
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from nestlearn.errors import UserError
from nestlearn.optim import inputs
from nestlearn.optim.inputs import Grams, LayerOptimizer, Pairs, answers_of, grouped, keys_of, pieces

EXACT = {"rtol": 1e-10, "atol": 1e-10}
LAYERS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@st.composite
def convolutions(draw_one):
    """A convolution with any of its options, in float64, and an input that it accepts."""
    n = draw_one(st.integers(1, 3))
    per_axis = lambda low, high: tuple(draw_one(st.integers(low, high)) for _ in range(n))  # noqa: E731
    groups = draw_one(st.integers(1, 3))
    kernel, dilation = per_axis(1, 3), per_axis(1, 2)
    padding = draw_one(st.sampled_from(["same", "valid", "numbers"]))
    stride = (1,) * n if padding == "same" else per_axis(1, 3)
    mode = draw_one(st.sampled_from(["zeros", "reflect", "replicate", "circular"]))
    space = tuple(draw_one(st.integers(5, 7)) for _ in range(n))  # at least the widest reach, 5
    layer = LAYERS[n](
        groups * draw_one(st.integers(1, 2)),
        groups * draw_one(st.integers(1, 2)),
        kernel,
        stride=stride,
        dilation=dilation,
        groups=groups,
        padding=per_axis(0, 2) if padding == "numbers" else padding,
        padding_mode=mode,
        bias=False,
        dtype=torch.float64,
    )
    shape = (layer.in_channels, *space)
    return layer, draw(*shape) if draw_one(st.booleans()) else draw(draw_one(st.integers(1, 3)), *shape)


@given(case=convolutions(), limit=st.sampled_from([1, 10**6]))
@settings(max_examples=80, deadline=None)
def test_a_convolution_is_its_weight_on_its_keys(case, limit: int) -> None:
    """W k for every captured key is the layer's own output, for any stride, padding, dilation and groups."""
    layer, x = case
    y = layer(x)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inputs, "PATCHES", limit)  # 1: one sample at a time
        parts = list(pieces(layer, x, y))
    assert len(parts) == (1 if limit > 1 or x.ndim < layer.weight.ndim else len(x))
    for some, out in parts:
        keys, rows = keys_of(layer, some), answers_of(layer, out)
        torch.testing.assert_close(keys @ grouped(layer.weight, layer.groups).mT, rows, **EXACT)


pair = st.tuples(st.integers(1, 3), st.integers(1, 3))


@given(kernel=pair, stride=pair, dilation=pair, padding=pair, groups=st.integers(1, 3), batch=st.integers(1, 3))
@settings(max_examples=40, deadline=None)
def test_the_gram_of_a_convolution_is_that_of_unfolded_patches(
    kernel, stride, dilation, padding, groups, batch
) -> None:
    options = dict(stride=stride, dilation=dilation, padding=padding, groups=groups)
    layer, x = nn.Conv2d(2 * groups, groups, kernel, **options).double(), draw(batch, 2 * groups, 7, 8)
    grams = Grams(layer)
    layer(x)
    patches = F.unfold(x, kernel, dilation, padding, stride).unflatten(1, (groups, -1))  # (B, groups, k, positions)
    expected = torch.einsum("bgip,bgjp->gij", patches, patches) / (batch * patches.shape[-1])
    torch.testing.assert_close(grams.mean(layer.weight), expected if groups > 1 else expected[0], **EXACT)


def test_the_gram_of_a_linear_layer_is_the_mean_over_all_leading_dimensions() -> None:
    layer, x = nn.Linear(3, 2).double(), draw(4, 5, 3)
    grams = Grams(layer)
    layer(input=x[:1])
    layer(x[1:])
    torch.testing.assert_close(grams.mean(layer.weight), torch.einsum("bti,btj->ij", x, x) / 20, **EXACT)
    grams.clear()
    assert grams.mean(layer.weight) is None


def test_the_keys_of_an_embedding_are_counted_without_its_padding() -> None:
    table = nn.Embedding(5, 2, padding_idx=0, dtype=torch.float64)
    grams = Grams(table)
    table(torch.tensor([[1, 1, 0], [4, 1, 0]], dtype=torch.int32))
    expected = torch.tensor([0.0, 3.0, 0.0, 0.0, 1.0], dtype=torch.float64) / 6
    torch.testing.assert_close(grams.mean(table.weight), expected)


def test_only_training_forwards_with_gradients_are_captured() -> None:
    layer, x = nn.Linear(3, 2), torch.ones(1, 3)
    grams = Grams(layer)
    layer.eval()(x)
    layer.train()
    with torch.no_grad():
        layer(x)
    with torch.inference_mode():
        layer(x)
    layer.weight.requires_grad_(False)
    layer(x)
    layer.weight.requires_grad_(True)
    swapped = {name: p.detach().clone().requires_grad_() for name, p in layer.named_parameters()}
    functional_call(layer, swapped, x)
    assert grams.mean(layer.weight) is None
    layer(x)
    torch.testing.assert_close(grams.mean(layer.weight), torch.ones(3, 3))


def test_a_weight_used_twice_sums_its_keys_and_one_of_two_kinds_is_left_out() -> None:
    first, second = nn.Linear(3, 3).double(), nn.Linear(3, 3).double()
    second.weight = first.weight
    x = draw(4, 3)
    grams = Grams(nn.Sequential(first, second))
    h = first(x)
    second(h)
    torch.testing.assert_close(grams.mean(first.weight), (x.T @ x + h.T @ h) / 8, **EXACT)

    table, head = nn.Embedding(7, 3), nn.Linear(3, 7)
    head.weight = table.weight
    plain, split = nn.Conv1d(2, 4, 3), nn.Conv1d(4, 4, 3, groups=2)
    split.weight = plain.weight  # one shape, keys from other channels
    assert not Grams(nn.ModuleList([table, head, plain, split])).kinds


def test_modules_that_multiply_something_else_are_not_captured() -> None:
    class Scaled(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(2 * x)

    normed = nn.utils.parametrizations.weight_norm(nn.Linear(3, 3))
    attention = nn.MultiheadAttention(4, 2)  # multiplies by out_proj.weight without calling out_proj
    grams = Grams(nn.ModuleList([Scaled(3, 3), normed, attention, nn.ConvTranspose1d(2, 2, 3), nn.LayerNorm(3)]))
    assert list(grams.kinds) == [attention.out_proj.weight]
    attention(*[torch.ones(2, 1, 4)] * 3)
    assert grams.mean(attention.out_proj.weight) is None


def test_a_copy_of_the_model_is_not_watched_and_the_hooks_go_with_their_owner() -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    grams = Grams(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):  # noqa: S301
        other(torch.ones(1, 3))
        assert grams.mean(model[0].weight) is None
        assert grams.mean(other[0].weight) is None
    model(torch.ones(1, 3))
    assert grams.mean(model[0].weight) is not None
    gone = weakref.ref(grams)
    del grams
    gc.collect()
    assert gone() is None
    assert not model[0]._forward_hooks
    grams = Grams(model)
    grams.close()
    assert not model[0]._forward_hooks


def test_moments_are_float32_under_autocast_and_half_precision_weights() -> None:
    x = draw(64, 8).float()
    for layer, seen in ((nn.Linear(8, 2), x), (nn.Linear(8, 2).bfloat16(), x.bfloat16())):
        grams = Grams(layer)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            layer(seen)
        mean = grams.mean(layer.weight)
        assert mean.dtype == torch.float32
        torch.testing.assert_close(mean, seen.float().T @ seen.float() / 64, rtol=1e-5, atol=1e-5)


def test_a_moment_that_is_not_finite_counts_as_none() -> None:
    layer = nn.Linear(2, 1)
    grams = Grams(layer)
    layer(torch.tensor([[1.0, float("inf")]]))
    assert grams.mean(layer.weight).tolist() == [[0.0, 0.0], [0.0, 0.0]]


@pytest.mark.parametrize("reentrant", [False, True])
def test_activation_checkpointing_changes_neither_means_nor_rows(reentrant: bool) -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh()).double()
    x = draw(5, 3).requires_grad_()
    found = []
    for run in (lambda: body(x), lambda: checkpoint(body, x, use_reentrant=reentrant)):
        grams, rows = Grams(body), Pairs(body)
        run().square().mean().backward()
        found.append([grams.mean(body[i].weight) for i in (0, 2)])
        assert [rows.rows(body[i].weight) for i in (0, 2)] == [5, 5]
        deltas = [[delta for _, delta in rows.of(body[i].weight)] for i in (0, 2)]
        found[-1] += [torch.cat(delta) for delta in deltas]
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **EXACT)


@given(case=convolutions(), seed=st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_pairs_make_up_the_gradient(case, seed: int) -> None:
    """The sum of (dL/dy) x^T over the rows is p.grad, over two calls and two backward passes through one of them."""
    layer, x = case
    rows = Pairs(layer)
    y = layer(x)
    (y * draw(*y.shape, seed=seed)).sum().backward(retain_graph=True)
    y.square().mean().backward()
    layer(2 * x).mean().backward()
    layer(x)  # no backward pass reaches it
    total = sum(delta.mT @ keys for keys, delta in rows.of(layer.weight))
    torch.testing.assert_close(total, grouped(layer.weight.grad, layer.groups), **EXACT)
    assert rows.rows(layer.weight) == 2 * y.numel() // layer.out_channels
    rows.clear()
    assert rows.rows(layer.weight) == 0


def test_a_module_that_works_in_place_on_the_output_does_not_disturb_the_pairs() -> None:
    body = nn.Sequential(nn.Linear(3, 4), nn.ReLU(inplace=True), nn.Linear(4, 1)).double()
    rows = Pairs(body)
    body(draw(6, 3)).mean().backward()
    for layer in (body[0], body[2]):
        total = sum(delta.mT @ keys for keys, delta in rows.of(layer.weight))
        torch.testing.assert_close(total, layer.weight.grad, **EXACT)


def test_a_compiled_model_is_captured_too() -> None:
    layer = nn.Linear(3, 2)
    grams, rows = Grams(layer), Pairs(layer)
    torch.compile(layer, backend="eager")(torch.ones(4, 3)).sum().backward()
    torch.testing.assert_close(grams.mean(layer.weight), torch.ones(3, 3))
    assert rows.rows(layer.weight) == 4


def test_what_is_no_model_is_refused_in_one_line() -> None:
    with pytest.raises(UserError, match=r"give it the module$"):
        LayerOptimizer(nn.Linear(2, 2).parameters(), {"lr": 0.1})  # type: ignore[arg-type]


def test_sharded_parameters_are_refused() -> None:
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
    try:
        layer = fully_shard(nn.Linear(2, 2), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UserError, match="sharded"):
            LayerOptimizer(layer, {"lr": 0.1})
    finally:
        distributed.destroy_process_group()
