"""Definitions 2 to 4 on the paper's own examples, and what is refused."""

import math
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.errors import UserError
from nestlearn.levels import FROZEN, NON_PARAMETRIC, Box, NestedSystem, Transfer, UpdateFrequency

STEP = UpdateFrequency.every(1)
TOKEN = UpdateFrequency.every(1, "token")


def names(*boxes: Box, tokens_per_step: int | None = None) -> list[tuple[str, ...]]:
    return [level.names for level in NestedSystem(boxes, (), tokens_per_step).levels]


# The paper's examples


def test_gradient_descent_on_one_layer_is_one_level() -> None:
    """Eq. 7-9."""
    assert names(Box("W", STEP)) == [("W",)]


def test_momentum_makes_it_two_levels() -> None:
    """Eq. 10-13: W needs the momentum of its own step, the momentum needs only the last W."""
    assert names(Box("W", STEP, needs=("m",)), Box("m", STEP)) == [("m",), ("W",)]


LINEAR_ATTENTION = [Box(name, STEP) for name in ("W_q", "W_k", "W_v")]


def test_linear_attention_trained_by_gradient_descent_and_with_momentum() -> None:
    """Eq. 14-18: the memory is written at every token, its projections once a step."""
    memory = Box("M", TOKEN)
    assert names(*LINEAR_ATTENTION, memory) == [("M",), ("W_q", "W_k", "W_v")]
    momenta = [Box(f"m_{box.name}", STEP) for box in LINEAR_ATTENTION]
    trained = [Box(box.name, STEP, needs=(f"m_{box.name}",)) for box in LINEAR_ATTENTION]
    assert names(*trained, *momenta, memory) == [("M",), ("m_W_q", "m_W_k", "m_W_v"), ("W_q", "W_k", "W_v")]


def test_both_memories_of_adamw_share_a_level() -> None:
    """Section 4.2 and appendix B: m and v are updated as often and do not need one another."""
    assert names(Box("W", STEP, needs=("m", "v")), Box("m", STEP), Box("v", STEP)) == [("m", "v"), ("W",)]


def test_ada_transformer() -> None:
    """Eq. 21, 69: attention holds its context itself; the MLP is a linear memory whose start is learned."""
    boxes = (Box("start of W_LA", STEP), Box("W_LA", TOKEN), Box("attention", NON_PARAMETRIC), Box("W_qkv", STEP))
    start = Transfer("initialisation", "start of W_LA", "W_LA")
    system = NestedSystem(boxes, (start, Transfer("direct", "attention", "W_LA", "query")))
    assert [level.names for level in system.levels] == [("attention",), ("W_LA",), ("start of W_LA", "W_qkv")]
    assert system.transfers[0] == start


def test_hope() -> None:
    """Fig. 5: memories at chunks of 16 tokens, then the levels of the continuum memory, then the outer parameters."""
    memories = [Box(f"M_{name}", UpdateFrequency.every(16, "token")) for name in ("k", "v", "eta", "alpha", "memory")]
    cms = [Box(f"MLP_{c}", UpdateFrequency.every(c, "token")) for c in (10**6, 10**3, 16)]
    outer = [Box("start", STEP, needs=("m", "v")), Box("m", STEP), Box("v", STEP)]
    system = NestedSystem((*outer, *cms, *memories, Box("frozen embedding", FROZEN)))
    assert [level.names for level in system.levels] == [
        ("MLP_16", "M_k", "M_v", "M_eta", "M_alpha", "M_memory"),
        ("MLP_1000",),
        ("MLP_1000000",),
        ("m", "v"),
        ("start",),
        ("frozen embedding",),
    ]
    assert system.level_of("MLP_1000") == 1


def test_attention_is_first_and_frozen_is_last() -> None:
    assert names(Box("frozen", FROZEN), Box("W", STEP), Box("attention", NON_PARAMETRIC), Box("M", TOKEN)) == [
        *[("attention",), ("M",), ("W",), ("frozen",)]
    ]


def test_needs_at_another_frequency_do_not_order() -> None:
    """A slow memory that a fast weight reads stays slower (M3)."""
    slow = Box("m2", UpdateFrequency.every(10))
    assert names(Box("W", STEP, needs=("m1", "m2")), slow, Box("m1", STEP)) == [("m1",), ("W",), ("m2",)]


def test_tokens_per_step_puts_both_clocks_in_one_order() -> None:
    slow, outer = Box("slow memory", UpdateFrequency.every(4096, "token")), Box("W", STEP)
    assert names(outer, slow) == [("slow memory",), ("W",)]
    assert names(outer, slow, tokens_per_step=512) == [("W",), ("slow memory",)]
    assert names(outer, slow, tokens_per_step=4096) == [("W", "slow memory")]


# Definition 2, from the definition


@st.composite
def systems(draw: st.DrawFn) -> NestedSystem:
    """Boxes of a few frequencies that need earlier ones, in any order."""
    frequencies = [NON_PARAMETRIC, TOKEN, UpdateFrequency.every(8, "token"), STEP, UpdateFrequency.every(3), FROZEN]
    count = draw(st.integers(1, 9))
    boxes = []
    for i in range(count):
        needs = draw(st.sets(st.integers(0, i - 1))) if i else set()
        boxes.append(Box(str(i), draw(st.sampled_from(frequencies)), needs=tuple(map(str, sorted(needs)))))
    return NestedSystem(tuple(draw(st.permutations(boxes))), (), draw(st.sampled_from([None, 4, 8])))


@given(systems())
def test_levels_are_those_of_definition_2(system: NestedSystem) -> None:
    def key(box: Box) -> tuple:
        return box.frequency.key(system.tokens_per_step)

    def depth(box: Box) -> int:
        equal = [system[name] for name in box.needs if key(system[name]) == key(box)]
        return 1 + max(map(depth, equal)) if equal else 0

    expected = sorted({(key(box), depth(box)) for box in system.boxes})
    found = [{(key(box), depth(box)) for box in level.boxes} for level in system.levels]
    assert found == [{pair} for pair in expected]
    assert sorted(box.name for level in system.levels for box in level.boxes) == sorted(b.name for b in system.boxes)


# Bad input


def test_a_circle_is_named() -> None:
    boxes = (Box("a", STEP, needs=("c",)), Box("b", STEP, needs=("a",)), Box("c", STEP, needs=("b",)))
    with pytest.raises(
        UserError, match=r"boxes of the frequency 1 per step need one another in a circle: '\w' -> '\w' "
    ):
        NestedSystem(boxes)
    fine = (*boxes[:2], Box("c", UpdateFrequency.every(2), needs=("b",)))
    assert names(*fine) == [("a",), ("b",), ("c",)]


@pytest.mark.parametrize(
    ("boxes", "transfers", "tokens", "message"),
    [
        ((), (), None, "without boxes"),
        ((Box("W", STEP), Box("W", STEP)), (), None, "two boxes are called 'W'"),
        (
            (Box("W", STEP, needs=("mm",)), Box("m", STEP)),
            (),
            None,
            "'W' needs 'mm', which is no box of the system; did",
        ),
        ((Box("W", STEP),), (Transfer("direct", "W", "V"),), None, r"a transfer \(direct\) joins 'V'"),
        ((Box("W", STEP),), (), 0, "tokens_per_step=0: it must be 1 or more"),
    ],
)
def test_systems_that_are_refused(boxes: tuple, transfers: tuple, tokens: int | None, message: str) -> None:
    with pytest.raises(UserError, match=message):
        NestedSystem(boxes, transfers, tokens)


def test_unknown_names_are_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown knowledge transfer 'initialization': did you mean 'initialisation'"):
        Transfer("initialization", "a", "b")
    with pytest.raises(UserError, match="asked for 'w', which is no box"):
        NestedSystem((Box("W", STEP),)).level_of("w")
    with pytest.raises(UserError, match="unknown unit 'tokens' of an update frequency: did you mean 'token'"):
        UpdateFrequency(1, "tokens")  # type: ignore[arg-type]


@pytest.mark.parametrize("rate", [-1, -0.5, math.nan, "fast", True])
def test_a_rate_is_a_number_from_zero(rate: object) -> None:
    with pytest.raises(UserError, match="it must be a positive number of updates"):
        UpdateFrequency(rate)  # type: ignore[arg-type]


@pytest.mark.parametrize("period", [0, -3, 1.5, "8", True])
def test_a_period_is_a_positive_integer(period: object) -> None:
    with pytest.raises(UserError, match="must be a whole number of steps, 1 or more"):
        UpdateFrequency.every(period)  # type: ignore[arg-type]
    with pytest.raises(UserError, match="must be positive and finite"):
        UpdateFrequency.every(2, updates=0)


def test_frequencies_are_exact_and_told_in_words() -> None:
    third = UpdateFrequency.every(3)
    assert third.rate == Fraction(1, 3)
    assert third.period == 3
    assert UpdateFrequency.every(1, updates=1 / 3) == third
    assert str(UpdateFrequency.every(2, "token", updates=3)) == "3/2 per token"
    assert (NON_PARAMETRIC.period, FROZEN.period) == (None, None)
    assert str(NON_PARAMETRIC) == "infinite (non-parametric)"


@pytest.mark.parametrize("period", [1, 3, 1_500_000_000, 10**10])
def test_any_period_is_kept(period: int) -> None:
    assert UpdateFrequency.every(period, "token").period == period


def test_a_small_rate_is_not_frozen() -> None:
    assert UpdateFrequency(0.1).rate == Fraction(1, 10)
    assert UpdateFrequency(1e-12).rate > 0
