"""A pretrained language model as levels that can learn (section 7.3): `convert` and `ContinualModel`."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from nestlearn.convert.blocks import AdaptiveMLP, Piece, Scope, Using, Weights
from nestlearn.convert.config import Level, LevelsConfig
from nestlearn.convert.families import SUPPORTED, FoundMLP, find_mlps, neuron_axis, same_function
from nestlearn.convert.kept import Kept, is_transposed, kept_besides, kept_inputs, seen_inputs
from nestlearn.convert.saved import read_base, read_converted, save_converted
from nestlearn.errors import UserError, nearest
from nestlearn.train.positions import longest

KEPT_WINDOWS, KEPT_WINDOW = 8, 512  # read by `ContinualModel.keep`, and tokens of one


class Start(Mapping[str, Tensor]):
    """The pretrained weights of a level by name, in fp32 (fp64 of an fp64 model): read only.

    Of an fp32 model they are views of its parameters, so never write to them; of others copies, made at each reading.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = {piece.name: piece for piece in pieces}

    def __getitem__(self, name: str) -> Tensor:
        weight = self.pieces[name].pretrained()
        return weight if weight.dtype == torch.float64 else weight.float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.pieces)

    def __len__(self) -> int:
        return len(self.pieces)


@dataclass(frozen=True)
class ModelLevel:
    """One level of a converted model.

    Args:
        number: 0 is the fastest, as in `nestlearn.levels`.
        config: how it learns.
        layers: indices of the layers that it has neurons in.
        start: theta_0, its pretrained weights by name.
        kept: what its updates must not disturb, by the name of the weight; filled by `ContinualModel.keep`.
    """

    number: int
    config: Level
    layers: tuple[int, ...]
    start: Start
    kept: dict[str, Kept] = field(default_factory=dict)

    @property
    def parameters(self) -> int:
        """How many numbers it learns."""
        return sum(weight.numel() for weight in self.start.values())


def convert(model: PreTrainedModel, config: LevelsConfig | None = None) -> ContinualModel:
    """A pretrained causal language model as a continual learner: its MLPs become levels (section 7.3).

    The model is changed in place; `ContinualModel.unload` gives it back. Until weights are learned its logits are those
    of the model, bit for bit. All its parameters are frozen: what learns is handed to `ContinualModel.using`.

    Args:
        model: of transformers, with MLPs as in Llama, Qwen, Mistral, Gemma or GPT-2.
        config: which layers learn at which level; by default the last quarter, in three levels.

    Raises:
        UserError: a model of another kind or converted already, or a configuration that does not fit it.

    >>> from transformers import LlamaConfig, LlamaForCausalLM
    >>> small = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
    ...                     num_attention_heads=2)
    >>> [(level.number, level.layers) for level in convert(LlamaForCausalLM(small)).levels]
    [(0, (3,)), (1, (2,)), (2, (1,))]
    """
    config = LevelsConfig() if config is None else config
    if not isinstance(config, LevelsConfig):
        raise UserError(f"cannot convert by a {type(config).__name__}: give a LevelsConfig")
    if isinstance(model, ContinualModel) or any(isinstance(module, AdaptiveMLP) for module in model.modules()):
        raise UserError("the model is converted already: take what convert() returned, or unload() it first")
    mlps = find_mlps(model)
    chosen = config.chosen_layers(len(mlps))
    for mlp in (mlps[index] for index in chosen):
        ours = AdaptiveMLP(mlp.module, mlp.family, [_whole(mlp)], Scope()).eval()
        if not same_function(mlp, lambda x, ours=ours: ours.adapted(x, {})):
            raise UserError(f"cannot convert {mlp.name}: it is no MLP as in {SUPPORTED}")
    parts = (_depthwise if config.kind == "depthwise" else _split)(mlps, chosen, config)
    return ContinualModel(model, config, mlps, parts)


# Pieces by layer, then by level, then by their local name ("up_proj.weight").
Parts = dict[int, dict[int, dict[str, Piece]]]


def _whole(mlp: FoundMLP) -> dict[str, Piece]:
    locals_ = [(local, *local.rpartition(".")[::2]) for local, _ in mlp.module.named_parameters()]
    return {
        local: Piece(f"{mlp.name}.{local}", mlp.module.get_submodule(layer), attribute)
        for local, layer, attribute in locals_
    }


def _depthwise(mlps: Sequence[FoundMLP], chosen: Sequence[int], config: LevelsConfig) -> Parts:
    levels = len(config.levels)  # late layers are fast
    return {
        index: {levels - 1 - place * levels // len(chosen): _whole(mlps[index])} for place, index in enumerate(chosen)
    }


def _split(mlps: Sequence[FoundMLP], chosen: Sequence[int], config: LevelsConfig) -> Parts:
    levels = len(config.levels)
    parts: Parts = {}
    for index in chosen:
        mlp = mlps[index]
        if mlp.neurons < levels:
            raise UserError(f"{mlp.name} has {mlp.neurons} neurons for {levels} levels: give fewer levels")
        bounds = [level * mlp.neurons // levels for level in range(levels + 1)]
        parts[index] = {level: {} for level in range(levels)}
        for local, whole in _whole(mlp).items():
            axis = neuron_axis(whole.layer, local.split(".")[0] in mlp.family.inputs, whole.attribute)
            for level in range(levels):
                name = f"{whole.name}.level{level}"
                if axis is not None:
                    start, end = bounds[level : level + 2]
                    parts[index][level][local] = Piece(name, whole.layer, whole.attribute, axis, start, end - start)
                elif level == levels - 1:  # the bias of the output is no neuron's: it goes to the slowest level
                    parts[index][level][local] = Piece(name, whole.layer, whole.attribute)
    return parts


class ContinualModel(nn.Module):
    """A language model whose levels can learn. Made by `convert`; what is not here is the base model's (``generate``,
    ``config``, ``device``, ...). The Trainer of transformers trains adapters in it, and what else asks for a gradient.

    Attributes:
        base: the Hugging Face model, frozen, with the MLPs of the chosen layers replaced in place.
        config_levels: the `LevelsConfig`.
        levels: the `ModelLevel` of each, fast to slow.
    """

    def __init__(self, base: PreTrainedModel, config: LevelsConfig, mlps: Sequence[FoundMLP], parts: Parts) -> None:
        super().__init__()
        self.scope = Scope()
        blocks = {i: AdaptiveMLP(mlps[i].module, mlps[i].family, list(parts[i].values()), self.scope) for i in parts}
        self.base = base
        self.config_levels = config
        self.replaced = tuple((mlps[index], block) for index, block in blocks.items())
        self.levels = tuple(
            ModelLevel(
                number,
                level,
                tuple(index for index in parts if number in parts[index]),
                Start([piece for index in parts for piece in parts[index].get(number, {}).values()]),
            )
            for number, level in enumerate(config.levels)
        )
        self.flags = tuple((parameter, parameter.requires_grad) for parameter in base.parameters())
        base.requires_grad_(False)
        for mlp, block in self.replaced:
            setattr(mlp.parent, mlp.attribute, block)
        if _checkpointing(base):
            self.activation_checkpointing_enable()

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":  # while the module is being made or copied
                raise
            return getattr(self.base, name)

    def forward(
        self,
        input_ids: Tensor | None = None,
        *args: Any,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """The base model's, with the learned weights. Transformers' Trainer keeps of a data set what is named here.

        Raises `UserError` in a training step of the Trainer that can train nothing.
        """
        named = dict(
            attention_mask=attention_mask, position_ids=position_ids, inputs_embeds=inputs_embeds, labels=labels
        )
        outputs = self.base(input_ids, *args, **{k: v for k, v in named.items() if v is not None}, **kwargs)
        training = self.training and torch.is_grad_enabled() and kwargs.get("num_items_in_batch") is not None
        if training and not outputs[0].requires_grad:  # the Trainer alone counts the items of a batch
            raise UserError(
                "nothing here can be trained, as a converted model is frozen and what it learns lies outside of its "
                "parameters: read the text with a ContinualLearner, train adapters beside the levels, or unload() it"
            )
        return outputs

    @property
    def weights(self) -> Weights:
        """The learned weights by name, fp32, that are read outside `using`. A name that is absent means its pretrained
        weight, so ``{}`` is the pretrained model. Setting them raises what `using` raises.
        """
        return self.scope.weights

    @weights.setter
    def weights(self, weights: Weights) -> None:
        self._check(weights)
        self.scope.weights = dict(weights)

    def using(self, weights: Weights) -> AbstractContextManager[None]:
        """A context in which the model reads these weights in place of its own; differentiable in each tensor.

        A tensor has the shape of the level's ``start``, and all rows of a batch share it, or (B, *shape), and row b has
        its own. A name that is absent means its pretrained weight. Weights of another data type are cast to the base's
        in the forward pass, and keep their own in the gradient. The context belongs to the thread that enters it.

        Raises:
            UserError: an unknown name, another shape, or different numbers of rows.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> model = convert(LlamaForCausalLM(LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24,
        ...                                              num_hidden_layers=4, num_attention_heads=2)))
        >>> mine = {name: weight.clone().requires_grad_() for name, weight in model.levels[0].start.items()}
        >>> tokens = torch.arange(8)[None]
        >>> with model.using(mine):
        ...     model(tokens, labels=tokens).loss.backward()
        >>> all(weight.grad is not None for weight in mine.values())
        True
        """
        self._check(weights)
        return Using(self.scope, dict(weights))

    def keep(
        self, tokenizer: PreTrainedTokenizerBase, text: str, *, strength: float = 10.0, rank: int | None = None
    ) -> None:
        """From now on updates disturb little of what the pretrained model answers to such a text.

        See `nestlearn.convert.kept`. The model reads up to 8 windows of 512 tokens, spread over the text. What is found
        replaces what was kept before and is saved with the model.

        Args:
            tokenizer: of the model.
            text: some pages of what it should stay good at.
            strength: how much less a step moves the answer to an input of mean size: by ``1 / (1 + strength)``.
            rank: directions of the inputs that are kept of each matrix, at most; by default all. With 64 of them
                SmolLM2 forgot as much as with none.

        Raises:
            UserError: a text without a token, or a number out of range.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> from nestlearn.data import load_tokenizer
        >>> model = convert(LlamaForCausalLM(LlamaConfig(vocab_size=258, hidden_size=16, intermediate_size=24,
        ...                                              num_hidden_layers=4, num_attention_heads=2)))
        >>> model.keep(load_tokenizer("bytes"), "What it knows.", rank=4)
        >>> model.levels[0].kept["model.layers.3.mlp.up_proj.weight"].matrix.shape
        torch.Size([16, 4])
        """
        ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"], dtype=torch.long)
        length = min(KEPT_WINDOW, longest(self.base) or KEPT_WINDOW)
        windows = ids.to(self.base.device).split(length) if len(ids) else ()
        spread = windows[:: max(1, -(-len(windows) // KEPT_WINDOWS))]
        seen = seen_inputs(self.scope, {}, [partial(self.base, window[None]) for window in spread])
        self.set_kept(kept_inputs(self._pieces(), seen, strength, rank))

    @property
    def consolidates(self) -> bool:
        """Whether any level does."""
        return any(level.config.consolidation for level in self.levels)

    def consolidate(
        self, weights: Weights, kept: Sequence[Mapping[str, Kept]], reads: Sequence[Callable[[], object]]
    ) -> list[dict[str, Kept]]:
        """What the updates of each level disturb little from now on, when it has learned one more text (`Level`).

        Args:
            weights: learned.
            kept: of each level, what it returned after the last text, ``{}`` before the first.
            reads: forward passes over the text, or over parts of it.

        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> small = LlamaConfig(vocab_size=32, hidden_size=16, intermediate_size=24, num_hidden_layers=4,
        ...                     num_attention_heads=2)
        >>> model = convert(LlamaForCausalLM(small), LevelsConfig(levels=[Level(64, 1e-3, consolidation=0.3)]))
        >>> (kept,) = model.consolidate({}, [{}], [lambda: model(torch.arange(8)[None])])
        >>> kept["model.layers.3.mlp.up_proj.weight"].matrix.shape
        torch.Size([16, 16])
        """
        seen = seen_inputs(self.scope, weights, reads if self.consolidates else ())
        return [
            kept_besides(level.start.pieces, seen, level.config.consolidation, own, level.kept)
            if level.config.consolidation and seen
            else dict(own)
            for level, own in zip(self.levels, kept, strict=True)
        ]

    def set_kept(self, kept: Mapping[str, Kept]) -> None:
        """What `keep` has found, in place of what was kept before."""
        for level in self.levels:
            level.kept.clear()
            level.kept.update({name: kept[name] for name in level.start if name in kept})

    def _pieces(self) -> dict[str, Piece]:
        return {name: piece for level in self.levels for name, piece in level.start.pieces.items()}

    def _check(self, weights: Weights) -> None:
        pieces = self._pieces()
        rows: set[int] = set()
        for name, weight in weights.items():
            if name not in pieces:
                raise UserError(f"no level has a weight {name!r}: {nearest(name, pieces)[:200]}")
            shape = pieces[name].pretrained().shape
            own = weight.shape[1:] == shape
            if not torch.is_floating_point(weight) or not (own or weight.shape == shape):
                raise UserError(
                    f"the weight {name} is {tuple(weight.shape)} of {weight.dtype}: give floating point of shape "
                    f"{tuple(shape)}, or that after the number of rows"
                )
            rows |= {len(weight)} if own and weight.shape != shape else set()
        if len(rows) > 1:
            raise UserError(f"weights for {sorted(rows)} rows: give every one for as many rows, or for all together")

    def activation_checkpointing_enable(
        self, activation_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """As the base's, with recomputation by the weights of the forward pass.

        Never reentrant, which knows no such thing (`UserError` if asked to be), and still without a gradient below the
        earliest learning layer.
        """
        given = {"use_reentrant": False, **(activation_checkpointing_kwargs or {})}
        if given["use_reentrant"]:
            raise UserError("use_reentrant=True cannot recompute with the learned weights: leave it out")
        _enable_checkpointing(self.base, {**given, "context_fn": self.scope.checkpoint_contexts}, **kwargs)
        self.base.disable_input_require_grads()

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **kwargs: Any
    ) -> None:
        """The older name of `activation_checkpointing_enable` in transformers, which its Trainer calls."""
        self.activation_checkpointing_enable(gradient_checkpointing_kwargs, **kwargs)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``levels.json`` and ``learned.safetensors``: only `weights`, as far as they differ from the pretrained
        ones, with the path and the hash of the base; and ``kept.safetensors``, if `keep` was called. Raises `UserError`
        for weights of several rows.
        """
        save_converted(self, Path(folder))

    @classmethod
    def from_pretrained(cls, folder: str | Path, base: PreTrainedModel | str | Path | None = None) -> ContinualModel:
        """What `save_pretrained` wrote, to the bit.

        Args:
            folder: of it.
            base: the base model or its folder, if it is no longer where it was.

        Raises:
            UserError: a file is missing or damaged, or the base is another one.
        """
        entry, config, weights, kept = read_converted(Path(folder))
        model = convert(read_base(entry, base), config)
        model.weights = weights
        model.set_kept(
            {name: Kept(kept[name], is_transposed(piece)) for name, piece in model._pieces().items() if name in kept}
        )
        return model

    def unload(self) -> PreTrainedModel:
        """The original model: the very modules that `convert` replaced, and every parameter learns as it did before.

        What was learned stays in `weights`; this object is of no use afterwards.
        """
        for mlp, block in self.replaced:
            mlp.module.training = block.training
            setattr(mlp.parent, mlp.attribute, mlp.module)
        for parameter, flag in self.flags:
            parameter.requires_grad_(flag)
        if _checkpointing(self.base):
            _enable_checkpointing(self.base, {"use_reentrant": False})
        return self.base


# By this table the Trainer knows whose labels it has to shift where it takes the loss itself (label smoothing).
MODEL_FOR_CAUSAL_LM_MAPPING_NAMES["continual"] = ContinualModel.__name__


def _checkpointing(model: nn.Module) -> bool:
    return any(getattr(module, "gradient_checkpointing", False) for module in model.modules())


def _enable_checkpointing(base: PreTrainedModel, given: dict[str, Any], **kwargs: Any) -> None:
    # transformers 5.6 has only the older name, 5.23 warns of it.
    enable = getattr(base, "activation_checkpointing_enable", None) or base.gradient_checkpointing_enable
    enable(given, **kwargs)
