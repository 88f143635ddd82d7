"""ContinuumMemory with static levels: the chain of Eq. 70, its identity at one level, and its complaints."""

import copy
import pickle

import pytest
import torch
from torch.nn import functional as F

from nestlearn.errors import UserError
from nestlearn.nn import ContinuumMemory, LevelUpdate


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


@pytest.mark.parametrize("activation", ["swiglu", "mlp"])
@pytest.mark.parametrize("online", ["local", "next-token"])
def test_one_level_before_its_first_update_is_the_plain_mlp_bit_for_bit(activation: str, online: str) -> None:
    x = torch.randn(2, 5, 6)
    learning, static = make([6], activation=activation, online=online), make([6], activation=activation)
    learning.load_state_dict(static.state_dict(), strict=False)
    assert torch.equal(learning(x)[0], static(x)[0])


def test_levels_are_chained_fast_to_slow() -> None:
    memory, x = make([4, 16, 64]), torch.randn(2, 5, 6)
    assert [level.chunk_size for level in memory.levels] == [4, 16, 64]
    fast, middle, slow = memory.levels

    def chain(*levels: torch.nn.Module) -> torch.Tensor:
        h = x
        for level in levels:
            h = h + level(h)
        return h

    assert torch.equal(memory(x)[0], chain(fast, middle, slow))
    assert not torch.allclose(memory(x)[0], chain(slow, middle, fast))
    nested = make([4, 16, 64], variant="nested")
    nested.load_state_dict(memory.state_dict())
    assert torch.equal(nested(x)[0], memory(x)[0])


def test_independent_levels_read_the_same_input_and_are_mixed() -> None:
    memory, x = make([4, 16], variant="independent"), torch.randn(2, 5, 6)
    outputs = [level(x) for level in memory.levels]
    torch.testing.assert_close(memory(x)[0], x + (outputs[0] + outputs[1]) / 2)
    with torch.no_grad():
        memory.mix.copy_(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(memory(x)[0], x + outputs[1], rtol=0, atol=1e-7)
    (gradient,) = torch.autograd.grad(memory(x)[0].sum(), memory.mix)
    torch.testing.assert_close(gradient, torch.stack([o.sum() for o in outputs]))


def test_levels_share_the_hidden_width() -> None:
    assert [level.up.out_features for level in make([4, 16, 64]).levels] == [4, 4, 4]


def test_a_level_with_a_zero_output_changes_nothing() -> None:
    memory, x = make([4, 16]), torch.randn(2, 5, 6)
    torch.nn.init.zeros_(memory.levels[1].down.weight)
    assert torch.equal(memory(x)[0], x + memory.levels[0](x))


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
        ([4, 10], {"variant": "nested"}, "10 must be a multiple of 4, e.g. 8"),
        ([4], {"online": "next_token"}, "did you mean 'next-token'"),
        ([4], {"update": LevelUpdate()}, "give online='local'"),
        ([4, 8], {"online": "local", "update": [LevelUpdate()]}, "1 updates for 2 levels"),
        ([4], {"online": "local", "objective": "l2x"}, "unknown objective 'l2x'"),
        (16, {}, "at least one positive integer"),
        (None, {}, "at least one positive integer"),
        ([4, 8, 16], {"online": "local", "update": "m3x", "hidden": 12}, "update='m3x': give a LevelUpdate"),
        ([4, 8], {"online": "local", "update": ["sgd", "m3"]}, "update='sgd': give a LevelUpdate"),
    ],
)
def test_rejects_in_one_line(chunk_sizes: list[int], options: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        make(chunk_sizes, **options)
    assert "\n" not in str(error.value)


def test_static_levels_refuse_a_state_and_every_memory_a_wrong_input() -> None:
    x = torch.randn(2, 5, 6)
    learning = make([4], online="local")
    state = learning(x)[1]
    with pytest.raises(UserError, match="leave the state out"):
        make([4])(x, state)
    with pytest.raises(UserError, match=r"must be \(batch, tokens, 6\)"):
        learning(x[..., :5])
    with pytest.raises(UserError, match=r"torch\.int64: it must be .* floating point"):
        learning(torch.zeros(2, 5, 6, dtype=torch.long))
    with pytest.raises(UserError, match="the state is a dict"):
        learning(x, {})
    for lengths in ([5, 6], [-1, 3], [5], [5.0, 2.0]):
        with pytest.raises(UserError, match="one whole number from 0 to 5 for each of 2 rows"):
            learning(x, lengths=torch.tensor(lengths))
    with pytest.raises(UserError, match="the state holds 2 sequences, the input 3"):
        learning(torch.randn(3, 5, 6), state)
    with pytest.raises(UserError, match="use a state of this one"):
        make([4], online="local", hidden=18)(x, state)


def test_a_state_of_another_variant_rule_or_kind_of_learning_is_refused() -> None:
    x = torch.randn(2, 9, 6)
    kinds: list[dict[str, object]] = [
        {"update": LevelUpdate("sgd")},
        {"update": LevelUpdate("m3")},
        {"update": LevelUpdate("delta-momentum")},
        {"variant": "nested"},
        {"variant": "nested", "update": [LevelUpdate("sgd"), LevelUpdate("m3")]},
        {"online": "next-token"},
    ]
    memories = [make([2, 4], **{"online": "local", **options}) for options in kinds]
    with torch.no_grad():
        states = [memory(x)[1] for memory in memories]
        for state, made in zip(states, memories, strict=True):
            for memory in memories:
                if memory is made:
                    memory(x, state)
                    continue
                with pytest.raises(
                    UserError, match=f"level [01] of the state was not made with variant='{memory.variant}'"
                ):
                    memory(x, state)


@pytest.mark.parametrize("online", [None, "local", "next-token"])
def test_a_memory_and_its_state_can_be_copied_and_pickled(online: str | None) -> None:
    memory = make([2, 4], variant="nested", online=online)
    x, later = torch.randn(2, 5, 6), torch.randn(2, 3, 6)
    with torch.no_grad():
        state = memory(x)[1]
    expected = memory(later, state)[0]
    pickled = pickle.loads(pickle.dumps((memory, state)))  # noqa: S301
    for copied, remembered in (copy.deepcopy((memory, state)), pickled):
        assert torch.equal(copied(later, remembered)[0], expected)


def test_what_is_not_finite_is_seen_ever_after_and_in_its_own_row_only() -> None:
    memory, x = make([2, 4], online="local"), torch.randn(2, 9, 6)
    x[0, 3, 1] = float("nan")
    with torch.no_grad():
        y, state = memory(x)
        later, _ = memory(torch.randn(2, 4, 6), state)
    assert y[0, :3].isfinite().all()
    assert y[1].isfinite().all()
    assert later[1].isfinite().all()
    assert y[0, 4:].isnan().any(-1).all()
    assert later[0].isnan().any(-1).all()
