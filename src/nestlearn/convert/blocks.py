"""An MLP whose learned weights come from outside: one set for all rows of a batch, or a set for every row.

Shapes: B rows, T tokens, D model width, N hidden neurons.
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar, Token
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from nestlearn.convert.families import Family
from nestlearn.errors import UserError

Weights = Mapping[str, Tensor]
# Of every model that is inside `ContinualModel.using`. A context variable, so that one thread does not see another's.
_USING: ContextVar[Mapping[Scope, Using] | None] = ContextVar("nestlearn_using", default=None)


class Scope:
    """The learned weights that the blocks of one model read now."""

    def __init__(self) -> None:
        self.weights: Weights = {}

    def current(self) -> Weights:
        using = (_USING.get() or {}).get(self)
        return self.weights if using is None else using.learned

    def seen(self) -> dict[str, list[Tensor]] | None:
        """Where the inputs of every matrix are noted now, if they are."""
        using = (_USING.get() or {}).get(self)
        return None if using is None else using.seen

    def checkpoint_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For ``torch.utils.checkpoint``: what is recomputed in the backward pass, when the context has long been left
        and perhaps in another thread, is recomputed with the weights of the forward pass.
        """
        return nullcontext(), Using(self, self.current())


class Using(AbstractContextManager[None]):
    """The blocks of ``scope`` read ``weights`` inside, and note their matrices' inputs in ``seen``, by the names of
    the weights. May be entered again."""

    def __init__(self, scope: Scope, weights: Weights, seen: dict[str, list[Tensor]] | None = None) -> None:
        self.scope, self.learned, self.seen = scope, weights, seen
        self.tokens: list[Token[Mapping[Scope, Using] | None]] = []

    def __enter__(self) -> None:
        self.tokens.append(_USING.set({**(_USING.get() or {}), self.scope: self}))

    def __exit__(self, *error: object) -> None:
        _USING.reset(self.tokens.pop())


@dataclass(frozen=True)
class Piece:
    """The part of one parameter of the base model that belongs to one level.

    Args:
        name: unique over the model.
        layer, attribute: the linear layer and "weight" or "bias".
        axis: the axis of the parameter that is cut; None for the whole parameter.
        start, length: where the piece lies on it.
    """

    name: str
    layer: nn.Module
    attribute: str
    axis: int | None = None
    start: int = 0
    length: int = 0

    def pretrained(self) -> Tensor:
        """A view of the base's parameter: never write to it."""
        parameter: Tensor = getattr(self.layer, self.attribute).detach()
        return parameter if self.axis is None else parameter.narrow(self.axis, self.start, self.length)


class AdaptiveMLP(nn.Module):
    """Stands in the place of a pretrained MLP and computes the same, with learned weights where there are some.

    It has the submodules of the MLP under the same names, so the names of the base's parameters stay as they were.

    Args:
        mlp: the pretrained one.
        family: of it.
        parts: for each level that has neurons here, the pieces of its parameters by local name ("up_proj.weight").
        scope: where the learned weights are read.
    """

    def __init__(self, mlp: nn.Module, family: Family, parts: Sequence[Mapping[str, Piece]], scope: Scope) -> None:
        super().__init__()
        for name, child in mlp.named_children():
            self.add_module(name, child)
        self.__dict__["original"] = mlp  # not as a submodule: its parameters are here already
        self.training = mlp.training
        self.family, self.parts, self.scope = family, tuple(parts), scope
        self.cast: dict[str, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, T, D) -> (B, T, D). Raises `UserError` if one of the layers has been replaced, as PEFT's adapters do."""
        for name, piece in self.parts[0].items():
            here = self._modules.get(name.partition(".")[0])
            if here is not piece.layer:
                raise UserError(
                    f"{name} of an MLP that learns is now that of a {type(here).__name__}, which would be left out: "
                    "put adapters on layers that do not learn, or merge them before convert"
                )
        weights = self.scope.current()
        learned = any(piece.name in weights for part in self.parts for piece in part.values())
        if not learned and self.scope.seen() is None:
            return self.original(x)  # pyrefly: ignore[not-callable]
        return self.adapted(x, weights)

    def adapted(self, x: Tensor, weights: Weights) -> Tensor:
        """The same by the parts: what each level's neurons add to the output."""
        y = self._part(x, self.parts[0], weights)
        for part in self.parts[1:]:
            y = y + self._part(x, part, weights)
        dropout = self._modules.get("dropout")
        return y if dropout is None else dropout(y)

    def _part(self, x: Tensor, part: Mapping[str, Piece], weights: Weights) -> Tensor:
        hidden = self.family.hidden(self, *(self._linear(x, name, part, weights) for name in self.family.inputs))
        return self._linear(hidden, self.family.output, part, weights)

    def _linear(self, x: Tensor, name: str, part: Mapping[str, Piece], weights: Weights) -> Tensor:
        seen = self.scope.seen()
        if seen is not None:
            seen.setdefault(part[f"{name}.weight"].name, []).append(x)
        w = self._read(part[f"{name}.weight"], weights)
        bias = part.get(f"{name}.bias")
        b = None if bias is None else self._read(bias, weights)
        transposed = isinstance(self._modules[name], Conv1D)
        for tensor, dims in ((w, 2), (b, 1)):
            if tensor is not None and tensor.dim() > dims and len(tensor) != len(x):
                raise UserError(f"weights for {len(tensor)} rows and a batch of {len(x)}: give as many rows as weights")
        if w.dim() == 3:  # a weight for every row
            y = torch.bmm(x, w if transposed else w.mT)
        elif b is not None and b.dim() == 1:
            # The calls of the layers themselves, so that the result is theirs to the bit.
            return (
                torch.addmm(b, x.reshape(-1, x.shape[-1]), w).view(*x.shape[:-1], -1)
                if transposed
                else F.linear(x, w, b)
            )
        else:
            y = x @ w if transposed else F.linear(x, w)
        if b is None:
            return y
        return y + (b.unsqueeze(1) if b.dim() == 2 else b)

    def _read(self, piece: Piece, weights: Weights) -> Tensor:
        """The learned weight in the data type of the base, or the pretrained one."""
        base = piece.pretrained()
        if base.is_meta:  # PyTorch multiplies by it without a word, and the result is what lies in memory
            raise UserError(
                f"the weights of {piece.name} are on no device, where accelerate's offload leaves them: learn, and use "
                "what was learned, with the whole model in memory"
            )
        learned = weights.get(piece.name)
        if learned is None:
            return base
        if learned.dtype == base.dtype and learned.device == base.device:
            return learned
        if (learned.requires_grad and torch.is_grad_enabled()) or learned.is_inference():
            return learned.to(base)
        # Generation reads the same weights at every token: cast them once, until they are others or are written to.
        kept = self.cast.get(piece.name)
        if kept is not None and kept[0]() is learned and kept[1] == learned._version and kept[2].device == base.device:
            return kept[2]
        with torch.inference_mode(False), torch.no_grad():
            made = learned.detach().to(base)
        self.cast[piece.name] = (weakref.ref(learned), learned._version, made)
        return made
