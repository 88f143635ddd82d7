"""The models of all core tasks by name, of equal size where they can be.

All but the LSTM and the self-referential weight matrix are Hope models with other block types, so that what is
measured is what the package ships. "transformer+conv" is the Transformer++ behind Hope's short convolution, "hope-mlp"
is Hope with the MLP memories of Eq. 89.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError, nearest
from nestlearn.models.hope import HopeConfig, HopeForCausalLM, HopeModel
from nestlearn.tasks.core.srwm import SelfReferentialModel
from nestlearn.train.model import RESERVED, option_names

BLOCKS = {
    "transformer": "attention",
    "transformer+conv": "hope-attention",
    "linear": "linear-attention",
    "deltanet": "deltanet",
    "gated-deltanet": "gated-deltanet",
    "titans": "titans",
    "hope-attention": "hope-attention",
    "hope": "hope",
    "hope-mlp": "hope",
}
OPTIONS: dict[str, dict[str, Any]] = {"hope-mlp": {"memory_type": "mlp"}}  # of a model, besides its blocks
RECURRENT = ("lstm", "srwm")
MODELS = (*BLOCKS, *RECURRENT)
LEVELLED = ("hope", "hope-mlp", "hope-attention")  # their MLPs are a continuum memory; all others have one plain MLP


@dataclasses.dataclass(frozen=True)
class Size:
    """The shape that models of one comparison share. Widths in channels; ``intermediate`` is Hope's.

    Every other model gets the MLP width that brings it to the parameters of Hope with this one.
    """

    dim: int = 64
    layers: int = 2
    heads: int = 4
    intermediate: int = 192


def configure(name: str, vocabulary: int, size: Size, options: Mapping[str, Any] | None = None) -> HopeConfig:
    """The configuration of a model of `BLOCKS`, for `HopeForCausalLM` too.

    Args:
        name: a model that has blocks; ``"lstm"`` and ``"srwm"`` have no configuration.
        vocabulary: number of symbols.
        size: the shared shape.
        options: fields of `HopeConfig` that override it. ``intermediate_size`` given here is not matched to Hope's
            parameters.

    Raises `UserError` for an unknown name or option, or what `HopeConfig` refuses.

    >>> configure("hope", 4, Size(dim=16), {"chunk_size": 1}).chunk_size
    1
    """
    if name in RECURRENT:
        raise UserError(f"model '{name}' has no configuration: it is made by build")
    if name not in BLOCKS:
        raise UserError(f"unknown model '{name}'; {nearest(name, MODELS)}")
    given = OPTIONS.get(name, {}) | dict(options or {})
    known = (*option_names("hope"), *RESERVED)
    for option in given:  # transformers would keep one that is mistyped and say nothing
        if option not in known:
            raise UserError(f"HopeConfig has no '{option}'; {nearest(option, known)}")

    def at_width(width: int) -> HopeConfig:
        fields: dict[str, Any] = dict(
            vocab_size=vocabulary,
            hidden_size=size.dim,
            num_hidden_layers=size.layers,
            num_attention_heads=size.heads,
            intermediate_size=width,
            use_cache=False,
        )
        if name not in LEVELLED:
            fields["cms_chunk_sizes"] = [1]
        layers = given.get("num_hidden_layers", size.layers)
        return HopeConfig(**{**fields, "block_types": [BLOCKS[name]] * layers, **given})

    if name == "hope" or "intermediate_size" in given:
        return at_width(given.get("intermediate_size", size.intermediate))
    unit = len(at_width(6).cms_chunk_sizes) if name in LEVELLED else 1
    reference = _count(lambda: HopeModel(configure("hope", vocabulary, size)))
    return at_width(unit * _matching(lambda width: HopeModel(at_width(unit * width)), reference))


def language_model(name: str, vocabulary: int, size: Size, options: Mapping[str, Any] | None = None) -> HopeForCausalLM:
    """A causal language model of `configure`, with fresh weights from torch's global generator."""
    return HopeForCausalLM(configure(name, vocabulary, size, options))


class Labeller(nn.Module):
    """A backbone and a linear head: tokens (B, T) -> logits (B, T, outputs)."""

    def __init__(self, backbone: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, outputs)

    def forward(self, tokens: Tensor) -> Tensor:
        """Logits of every token."""
        hidden = self.backbone(tokens)
        if isinstance(self.backbone, HopeModel):
            hidden = hidden.last_hidden_state
        elif isinstance(hidden, tuple):  # of an LSTM
            hidden = hidden[0]
        return self.head(hidden)


def build(name: str, vocabulary: int, outputs: int, size: Size, options: Mapping[str, Any] | None = None) -> Labeller:
    """A fresh model that gives ``outputs`` logits at every token, from torch's global generator.

    Args:
        name: one of `MODELS`.
        vocabulary, outputs: symbols read, numbers given.
        size: the shared shape; the LSTM keeps the layers and gets the width of equal parameters.
        options: fields of `HopeConfig` that override it.

    Raises `UserError` for an unknown name, or options of a model that has no configuration.

    >>> build("lstm", 4, 5, Size(dim=16))(torch.tensor([[1, 2, 3]])).shape
    torch.Size([1, 3, 5])
    """
    if name not in RECURRENT:
        config = configure(name, vocabulary, size, options)
        return Labeller(HopeModel(config), config.hidden_size, outputs)
    if options:
        raise UserError(f"model '{name}' takes no options of HopeConfig, got {', '.join(options)}")
    reference = _count(lambda: HopeModel(configure("hope", vocabulary, size)))
    if name == "srwm":

        def srwm(width: int) -> nn.Module:
            return SelfReferentialModel(vocabulary, size.dim, size.layers, size.heads, width)

        return Labeller(srwm(_matching(srwm, reference)), size.dim, outputs)
    width = min(
        range(4, 4 * size.dim, 4), key=lambda w: abs(_count(lambda: _LSTM(vocabulary, w, size.layers)) - reference)
    )
    return Labeller(_LSTM(vocabulary, width, size.layers), width, outputs)


class _LSTM(nn.Module):
    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.layers = nn.LSTM(width, width, layers, batch_first=True)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.layers(self.embed(tokens))[0]


def _count(make: Callable[[], nn.Module]) -> int:
    """Parameters of a module, without allocating them."""
    with torch.device("meta"):
        return sum(p.numel() for p in make().parameters())


def _matching(at_width: Callable[[int], nn.Module], parameters: int) -> int:
    """The width nearest to ``parameters``, in which the count is linear; at least 1."""
    one, two = _count(lambda: at_width(1)), _count(lambda: at_width(2))
    return max(1, round(1 + (parameters - one) / (two - one)))
