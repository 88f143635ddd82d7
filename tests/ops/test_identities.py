"""Where the core becomes a known model (SPEC 12.3, 12.4)."""

from __future__ import annotations

import torch
from torch import Tensor

from nestlearn.memory import MLPMemory, rules
from nestlearn.memory.objectives import l2
from nestlearn.ops import MEMORY, Start, WriteRule, kernel_for, self_modify
from nestlearn.ops.rule import unit
from tests.ops.test_parity import HEADS, HIDDEN, WIDTH, make_inputs

PLAIN = {
    "self_values": False,
    "retention": "zero",
    "bounded": False,
    "normalize_v": False,
    "clip_values": False,
    "norm_limit": None,
}


def only_memory(*weights: Tensor) -> Start:
    zero = torch.zeros(HEADS, dtype=torch.float64)
    return Start({MEMORY: weights}, {"eta": zero, "alpha": zero})


def no_weights() -> Tensor:
    return torch.zeros(HEADS, WIDTH, WIDTH, dtype=torch.float64)


def ready(tokens: int) -> dict[str, Tensor]:
    """Static projections: keys and queries of unit length, and eta = 1 for ``eta_max = 2``."""
    x = make_inputs(2, tokens, ())
    x["k"], x["q"] = unit(x["k"]), unit(x["q"])
    x["eta"] = torch.zeros_like(x["eta"])
    return x


def test_hebbian_writes_are_causal_linear_attention() -> None:
    x = ready(13)
    rule = WriteRule(chunk_size=4, objective="dot", delta=False, decay=False, **PLAIN)
    y, _ = self_modify(x, only_memory(no_weights()), rule)
    expected = (unit(x["q"]) @ unit(x["k"]).mT).tril() @ x["v"]
    torch.testing.assert_close(y, expected, rtol=1e-10, atol=1e-10)


def test_dot_product_with_erasure_is_the_gated_delta_rule() -> None:
    """Eq. 92: beta = eta / alpha and the value alpha v."""
    x = ready(13)
    rule = WriteRule(chunk_size=4, objective="dot", **{**PLAIN, "bounded": True})
    y, _ = self_modify(x, only_memory(no_weights()), rule)
    alpha, k, q = x["alpha"].sigmoid(), unit(x["k"]), unit(x["q"])
    w = torch.zeros(2, HEADS, WIDTH, WIDTH, dtype=torch.float64)
    for t in range(13):
        a = alpha[:, :, t]
        w = rules.delta(w, k[:, :, t], a[..., None] * x["v"][:, :, t], 1.0, a)
        torch.testing.assert_close(y[:, :, t], (w @ q[:, :, t, :, None])[..., 0], rtol=1e-10, atol=1e-10)


def test_a_step_of_zero_leaves_a_frozen_mlp() -> None:
    x = ready(9)
    x["eta"] = torch.full_like(x["eta"], -1e9)
    memory = MLPMemory(WIDTH, WIDTH, HIDDEN)
    weights = tuple(w.double() for w in memory.init((HEADS,)))
    y, _ = self_modify(x, only_memory(*weights), WriteRule(chunk_size=4, objective="l2", decay=False, **PLAIN))
    torch.testing.assert_close(y, memory.read(weights, unit(x["q"])))


def test_without_erasure_and_decay_a_chunk_is_one_gradient_step() -> None:
    """TTT: gradient descent on the chunk's summed loss, taken at the chunk's start."""
    x = ready(10)
    memory = MLPMemory(WIDTH, WIDTH, HIDDEN)
    weights = tuple(w.double() for w in memory.init((HEADS,), torch.Generator().manual_seed(0)))
    rule = WriteRule(chunk_size=5, objective="l2", delta=False, decay=False, eta_max=0.2, **PLAIN)
    start = only_memory(*weights)
    _, state = self_modify(x, start, rule)
    final = kernel_for(start, rule).named(state.current)[MEMORY]
    by_hand = tuple(w.expand(2, *w.shape) for w in weights)
    for chunk in (slice(0, 5), slice(5, 10)):
        k, v = unit(x["k"])[:, :, chunk], x["v"][:, :, chunk]
        leaves = [w.detach().clone().requires_grad_() for w in by_hand]
        loss = memory.objective(tuple(leaves), k, v, l2).sum()
        gradients = torch.autograd.grad(loss, leaves)
        by_hand = tuple(w - 0.1 * g for w, g in zip(leaves, gradients, strict=True))
    for ours, theirs in zip(final, by_hand, strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)


def test_one_token_chunks_are_delta_gradient_descent() -> None:
    """Eq. 93 with chunk size 1 is Eq. 57 with the error of the current weights."""
    x = ready(7)
    rule = WriteRule(chunk_size=1, objective="l2", eta_max=0.6, **PLAIN)
    start = only_memory(no_weights())
    _, state = self_modify(x, start, rule)
    alpha, k = x["alpha"].sigmoid(), unit(x["k"])
    w = torch.zeros(2, HEADS, WIDTH, WIDTH, dtype=torch.float64)
    for t in range(7):
        error = (w @ k[:, :, t, :, None])[..., 0] - x["v"][:, :, t]
        w = rules.dgd(w, k[:, :, t], error, 0.3, alpha[:, :, t])
    torch.testing.assert_close(state.current[0], w, rtol=1e-9, atol=1e-12)


def test_erasure_keeps_a_repeated_key_bounded_in_any_chunk() -> None:
    """SPEC 12.3: with frozen gradients plain descent explodes for C eta > 2, delta gradient descent does not."""
    x = ready(640)
    x["k"], x["v"] = (t[:, :, :1].expand_as(t) for t in (x["k"], x["v"]))
    grows = {}
    for delta in (True, False):
        rule = WriteRule(chunk_size=16, objective="l2", delta=delta, decay=False, eta_max=1.0, **PLAIN)
        _, state = self_modify(x, only_memory(no_weights()), rule)
        grows[delta] = state.current[0].abs().max().item()
    assert grows[True] < 10
    assert not grows[False] < 1e6
