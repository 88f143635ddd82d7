"""What may learn in a pretrained model, and how: the methods that are compared, behind one interface.

All take the same losses in the same order, use AdamW with the same betas and clip the gradient to the same norm.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from nestlearn.convert import LevelsConfig, convert
from nestlearn.errors import UserError, nearest
from nestlearn.learner.state import LevelState
from nestlearn.learner.update import ADAM_BETAS, update

CLIP = 1.0  # norm of the mean gradient: of a level, or of everything that a method trains
LORA_TARGETS = "all-linear"


class Rule(Protocol):
    """One method that learns from losses."""

    parameters: int  # numbers that may change

    def reading(self) -> AbstractContextManager[Any]:
        """Inside, the model reads with what was learned."""
        ...

    def step(self, loss: Tensor, scored: int, tokens: int) -> None:
        """Learn from a loss summed over ``scored`` predictions in ``tokens`` tokens."""
        ...

    def end_group(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        """A task has ended; ``losses`` give the loss of each of its examples, summed."""
        ...


class FineTuning:
    """Plain fine-tuning: AdamW on some parameters at every step, the mean gradient clipped to `CLIP`."""

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float) -> None:
        self.trained = list(parameters)
        self.parameters = sum(p.numel() for p in self.trained)
        self.optimizer = torch.optim.AdamW(self.trained, lr=lr, betas=ADAM_BETAS, weight_decay=0.0, fused=True)

    def reading(self) -> AbstractContextManager[Any]:
        return contextlib.nullcontext()

    def step(self, loss: Tensor, scored: int, tokens: int) -> None:
        (loss / scored).backward()
        self._add_to_gradient()
        nn.utils.clip_grad_norm_(self.trained, CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def end_group(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        pass

    def _add_to_gradient(self) -> None:
        pass


class EWC(FineTuning):
    """Elastic weight consolidation (Kirkpatrick et al. 2017): ``strength / 2 sum F (theta - theta*)^2`` is added.

    F is the diagonal of the empirical Fisher matrix, the mean over a task's examples of the squared gradient, summed
    over tasks and divided by its mean, so that ``strength`` has one meaning for all models; theta* are the weights at
    the end of the last task (Schwarz et al. 2018 without decay).
    """

    def __init__(self, parameters: Sequence[nn.Parameter], lr: float, strength: float) -> None:
        super().__init__(parameters, lr)
        self.strength = strength
        self.fisher = [torch.zeros_like(p) for p in self.trained]
        self.anchor: list[Tensor] = []
        self.scale = 1.0

    def _add_to_gradient(self) -> None:
        for p, f, anchor in zip(self.trained, self.fisher, self.anchor, strict=False):
            if p.grad is not None:
                p.grad.addcmul_(f, p.detach() - anchor, value=self.strength / self.scale)

    def end_group(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        for loss in losses:
            for f, g in zip(self.fisher, torch.autograd.grad(loss(), self.trained), strict=True):
                f.addcmul_(g, g, value=1 / len(losses))
        self.scale = float(sum(f.sum() for f in self.fisher)) / self.parameters
        self.anchor = [p.detach().clone() for p in self.trained]


class Levels:
    """Hope: a converted model whose levels learn each at its own frequency (Eq. 71), by the learner's own update."""

    def __init__(self, model: PreTrainedModel, config: LevelsConfig) -> None:
        self.model = convert(model, config)
        self.states = [LevelState() for _ in self.model.levels]
        self.parameters = sum(level.parameters for level in self.model.levels)
        self.weights = {}
        for level in self.model.levels:
            self._take(level.start)

    def reading(self) -> AbstractContextManager[Any]:
        return self.model.using(self.weights)

    def step(self, loss: Tensor, scored: int, tokens: int) -> None:
        gradients = dict(zip(self.weights, torch.autograd.grad(loss, list(self.weights.values())), strict=True))
        for number, level in enumerate(self.model.levels):
            state = self.states[number]
            mine = {name: gradients[name] for name in level.start}
            gathered = {name: g + state.gathered[name] if state.gathered else g for name, g in mine.items()}
            state = dataclasses.replace(
                state, gathered=gathered, tokens=state.tokens + tokens, scored=state.scored + scored
            )
            if state.tokens >= level.config.period:
                new = update(state, level.config, level.start, level.kept)
                if new is None:
                    raise FloatingPointError(f"level {number} learned weights that are not finite")
                state = new
                self._take(state.weights)
            self.states[number] = state

    def end_group(self, losses: Sequence[Callable[[], Tensor]]) -> None:
        kept = self.model.consolidate(self.weights, [state.kept for state in self.states], losses)
        self.states = [dataclasses.replace(state, kept=k) for state, k in zip(self.states, kept, strict=True)]

    def _take(self, weights: Mapping[str, Tensor]) -> None:
        self.weights.update({name: w.detach().requires_grad_() for name, w in weights.items()})


def mlp_parameters(model: PreTrainedModel) -> list[nn.Parameter]:
    """All parameters of the MLPs of all layers, which are then all that takes a gradient."""
    for p in model.parameters():
        p.requires_grad_(False)
    chosen = [p for layer in model.model.layers for p in layer.mlp.parameters()]
    for p in chosen:
        p.requires_grad_(True)
    return chosen


def make_rule(method: str, model: PreTrainedModel, lr: float, **options: Any) -> Rule:
    """The method by name, on a model whose layers may all learn.

    Args:
        method: "hope" (option ``levels``: keyword arguments of `LevelsConfig`), "mlp" (all MLPs
            of the model), "all" (every parameter), "ewc" (all MLPs; option ``strength``), "lora" (adapters in every
            linear layer; option ``rank``).
        lr: of AdamW, and of every level of Hope that names none.

    Raises:
        UserError: an unknown method, or LoRA without peft.
    """
    if method == "hope":
        given = options["levels"]
        config = {**given, "levels": [{"lr": lr, "clip": CLIP, **level} for level in given["levels"]]}
        return Levels(model, LevelsConfig.from_dict(config))
    if method == "mlp":
        return FineTuning(mlp_parameters(model), lr)
    if method == "ewc":
        return EWC(mlp_parameters(model), lr, options["strength"])
    if method == "all":
        for p in model.parameters():
            p.requires_grad_(True)
        return FineTuning(list(model.parameters()), lr)
    if method == "lora":
        return FineTuning(_adapters(model, options["rank"]), lr)
    raise UserError(f"unknown method '{method}'; {nearest(method, ('hope', 'mlp', 'all', 'ewc', 'lora'))}")


def _adapters(model: PreTrainedModel, rank: int) -> list[nn.Parameter]:
    """LoRA in place, in every linear layer but the head, scaled by ``alpha / rank = 2``."""
    if importlib.util.find_spec("peft") is None:
        raise UserError("the method lora needs peft: pip install 'nestlearn[peft]'")
    from peft import LoraConfig, inject_adapter_in_model

    for p in model.parameters():
        p.requires_grad_(False)
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=LORA_TARGETS, lora_dropout=0.0)
    inject_adapter_in_model(config, model)
    return [p for name, p in model.named_parameters() if "lora_" in name]
