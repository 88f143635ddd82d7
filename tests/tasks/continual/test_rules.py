"""The methods behind one interface."""

import numpy as np
import pytest
import torch

from nestlearn.errors import UserError
from nestlearn.tasks.continual.late import LateModel
from nestlearn.tasks.continual.learners import GradientLearner, Reader
from nestlearn.tasks.continual.pretrained import load_model
from nestlearn.tasks.continual.rules import EWC, Rule, make_rule
from tests.tasks.continual.small_data import EXAMPLES, LABELS

LEVELS = {"layers": "all", "levels": [{"period": 1}, {"period": 10_000}]}


def learner(method: str, lr: float = 3e-2, epochs: int = 8, **options: object) -> GradientLearner:
    model, tokenizer = load_model("tiny")
    torch.manual_seed(0)  # of LoRA's adapters
    first = 0 if method in ("all", "lora") else 2
    late = LateModel(model, first)
    rule = make_rule(method, late.top, lr, **{"levels": LEVELS, "strength": 0.0, "rank": 4, **options})
    reader = Reader(tokenizer, LABELS)
    return GradientLearner(late, rule, reader, epochs=epochs, batch=2, generator=np.random.default_rng(0))


@pytest.mark.parametrize("method", ["hope", "mlp", "all", "ewc", "lora"])
def test_every_method_learns_its_examples(method: str) -> None:
    if method == "lora":
        pytest.importorskip("peft")
    one = learner(method, epochs=20)
    loss = one._loss(EXAMPLES)[0]

    def now() -> float:
        with one.rule.reading(), torch.no_grad():
            return loss().item()

    before = now()
    one.learn(EXAMPLES)
    assert now() < before - 2
    assert one.scores(EXAMPLES, 1).shape == (4, 1)


def test_one_level_of_hope_at_every_step_is_fine_tuning_of_the_same_blocks() -> None:
    both = []
    for method in ("hope", "mlp"):
        one = learner(method, levels={"layers": "all", "levels": [{"period": 1}]}, epochs=2)
        one.learn(EXAMPLES)
        both.append(one.scores(EXAMPLES, 2))
        assert one.parameters == 2 * 3 * 16 * 32
    torch.testing.assert_close(*both, atol=1e-4, rtol=1e-4)


def test_a_slow_level_waits_and_what_is_not_converted_stays() -> None:
    one = learner("hope")
    frozen = {name: p.clone() for name, p in one.late.model.named_parameters()}
    one.learn(EXAMPLES)
    fast, slow = one.rule.states
    assert fast.updates == 8 * 2
    assert (slow.updates, slow.weights) == (0, {})
    assert slow.scored > 0
    for name, p in one.late.model.named_parameters():
        assert torch.equal(p, frozen[name])


def test_hope_consolidates_a_group_at_its_end_and_forgets_it_less() -> None:
    groups, forgotten = ([EXAMPLES[0], EXAMPLES[2]], [EXAMPLES[1], EXAMPLES[3]]), []
    for strength in (0.0, 1.0):
        levels = {"layers": "all", "levels": [{"period": 1, "consolidation": strength}]}
        one = learner("hope", levels=levels, epochs=10)
        first, second = (one._loss(group)[0] for group in groups)

        def now(loss=first, one=one) -> float:
            with one.rule.reading(), torch.no_grad():
                return loss().item()

        one.learn(groups[0])
        assert one.rule.states[0].kept.keys() == (one.rule.weights.keys() if strength else set())
        learned, other = now(), now(second)
        one.learn(groups[1])
        forgotten.append(now() - learned)
        assert now(second) < other
    assert forgotten[1] < 0.7 * forgotten[0]


def test_ewc_pulls_important_weights_back() -> None:
    weight = torch.nn.Parameter(torch.tensor([1.0, 1.0]))
    important = torch.tensor([1.0, 0.0])
    rule = EWC([weight], lr=1e-2, strength=100.0)
    rule.end_group([lambda: (important * weight).sum()])
    assert rule.fisher[0].tolist() == [1.0, 0.0]
    for _ in range(100):
        rule.step(-weight.sum(), 1, 1)  # wants both to grow
    assert weight[0].item() < 1.1 < 1.5 < weight[1].item()


def test_ewc_without_strength_is_fine_tuning() -> None:
    both = []
    for method in ("ewc", "mlp"):
        one = learner(method)
        one.learn(EXAMPLES[:2])
        one.learn(EXAMPLES[2:])
        both.append(one.scores(EXAMPLES, 2))
    torch.testing.assert_close(*both)


def test_lora_changes_adapters_alone() -> None:
    pytest.importorskip("peft")
    one = learner("lora")
    before = {name: p.clone() for name, p in one.late.model.named_parameters() if "lora_" not in name}
    one.learn(EXAMPLES)
    after = dict(one.late.model.named_parameters())
    assert all(torch.equal(after[name], p) for name, p in before.items())
    assert one.parameters == sum(p.numel() for name, p in after.items() if "lora_" in name) > 0


def test_an_unknown_method_is_named() -> None:
    model, _ = load_model("tiny")
    with pytest.raises(UserError, match="unknown method 'hoep'; did you mean 'hope'"):
        make_rule("hoep", model, 1e-3)


def test_rules_are_of_the_protocol() -> None:
    rule: Rule = learner("mlp").rule
    assert rule.parameters > 0
