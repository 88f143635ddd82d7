"""The last layers of a language model on what the layers below them give, computed once.

What lies below the first layer that learns never changes. So its output is the same whenever a text is read again, and
learning and scoring need only the layers above.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from nestlearn.errors import UserError
from nestlearn.tasks.continual.choice import Sheet


class LateModel:
    """A model that is read through sheets, cut at a layer.

    Args:
        model: of transformers, with ``model.layers``, ``model.embed_tokens`` and ``lm_head`` as in Llama.
        first: the first layer that may learn; the layers before it are frozen. 0 cuts nothing and freezes nothing.

    ``top`` is a model of the layers from ``first`` on that shares the modules of ``model``; it may be handed to
    `nestlearn.convert.convert`, which replaces its MLPs in place.

    Raises:
        UserError: a model of another build.
    """

    def __init__(self, model: PreTrainedModel, first: int) -> None:
        body: Any = getattr(model, "model", None)
        if not all(hasattr(body, name) for name in ("layers", "embed_tokens", "norm")) or not hasattr(model, "lm_head"):
            raise UserError(f"{type(model).__name__} has no model.layers and lm_head as Llama has: take such a model")
        self.first = first
        self.model = model
        self.top = _cut(model, first, len(body.layers))
        self.bottom = _cut(model, 0, first).model
        self.bottom.norm = torch.nn.Identity()
        self.kept: dict[int, tuple[Sheet, Tensor]] = {}  # with the sheet, so that its id stays its own
        for parameter in self.bottom.parameters() if first else ():
            parameter.requires_grad_(False)

    def hidden(self, sheet: Sheet) -> Tensor:
        """Last hidden states (B, T, D) after the final norm, with gradients of what learns.

        What the lower layers give is kept for the next time this very sheet is read.
        """
        device = self.model.device
        given = {"attention_mask": self._mask(sheet), "position_ids": sheet.positions.to(device), "use_cache": False}
        if not self.first:
            return self.top.model(input_ids=sheet.ids.to(device), **given).last_hidden_state
        return self.top.model(inputs_embeds=self._entry(sheet, given), **given).last_hidden_state

    def logits(self, hidden: Tensor) -> Tensor:
        """Of hidden states (..., D), the logits (..., vocabulary)."""
        return self.top.lm_head(hidden)

    @torch.no_grad()
    def _entry(self, sheet: Sheet, given: dict) -> Tensor:
        """What the first layer that may learn reads of a sheet."""
        if id(sheet) not in self.kept:
            read = self.bottom(input_ids=sheet.ids.to(self.model.device), **given).last_hidden_state
            self.kept[id(sheet)] = sheet, read
        return self.kept[id(sheet)][1]

    def _mask(self, sheet: Sheet) -> Tensor:
        """As what is added to the scores, which every attention of transformers takes."""
        mask = sheet.mask.to(self.model.device)
        low = torch.finfo(self.model.dtype).min
        return torch.zeros(mask.shape, dtype=self.model.dtype, device=mask.device).masked_fill_(~mask, low)


def _cut(model: PreTrainedModel, begin: int, end: int) -> PreTrainedModel:
    """A shell of the same class around some layers."""
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = end - begin
    if begin and getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[begin:end]
    shell = copy.copy(model)
    shell._modules = dict(model._modules)
    shell.config = config
    shell.model = copy.copy(model.model)
    shell.model._modules = dict(model.model._modules)
    shell.model.config = config
    shell.model.layers = torch.nn.ModuleList(list(model.model.layers)[begin:end])
    return shell
