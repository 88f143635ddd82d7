"""Where a Hugging Face model keeps its MLPs, and which numbers of one belong to which hidden neuron."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from nestlearn.errors import UserError

SUPPORTED = "Llama, Qwen, Mistral, Gemma and GPT-2 and their like"


@dataclass(frozen=True)
class Family:
    """An MLP of two layers: ``output(hidden(input_1(x), ...))``, one neuron a coordinate of the hidden vector.

    Args:
        name: for people.
        inputs: names of the linear layers from x to the hidden neurons.
        output: name of the linear layer from the neurons back.
        other: names of its other submodules.
        hidden: the neurons from what the input layers give, with the activation of this very MLP.
    """

    name: str
    inputs: tuple[str, ...]
    output: str
    other: tuple[str, ...]
    hidden: Callable[..., Tensor]


def _gated(mlp: Any, gate: Tensor, up: Tensor) -> Tensor:
    return mlp.act_fn(gate) * up


def _plain(mlp: Any, z: Tensor) -> Tensor:
    return mlp.act(z)


# With functions that have a name, so that a converted model can be pickled.
GATED = Family("gated", ("gate_proj", "up_proj"), "down_proj", ("act_fn",), _gated)
PLAIN = Family("plain", ("c_fc",), "c_proj", ("act", "dropout"), _plain)
FAMILIES = (GATED, PLAIN)


@dataclass(frozen=True)
class FoundMLP:
    """One layer's MLP: the module, its family, and the module and attribute that it stands in."""

    name: str
    module: nn.Module
    family: Family
    parent: nn.Module
    attribute: str

    @property
    def neurons(self) -> int:
        """The size of the hidden vector."""
        weight: Tensor = self.module.get_submodule(self.family.output).weight  # pyrefly: ignore[bad-assignment]
        return weight.shape[neuron_axis(self.module.get_submodule(self.family.output), False, "weight") or 0]


def neuron_axis(layer: nn.Module, is_input: bool, parameter: str) -> int | None:
    """The axis of a linear layer's "weight" or "bias" that counts hidden neurons; None for the bias of the output.

    An input layer has them as outputs, the output layer as inputs; `Conv1D` holds its weight as (in, out).
    """
    if parameter == "bias":
        return 0 if is_input else None
    return int(is_input == isinstance(layer, Conv1D))


def find_mlps(model: nn.Module) -> list[FoundMLP]:
    """The MLP of every layer of a causal language model, in order.

    Raises `UserError` if some layer's is of no known family, on no device, quantised or adapted already.
    """
    if not isinstance(model, PreTrainedModel):
        raise UserError(f"cannot convert a {type(model).__name__}: give a causal language model of transformers")
    layers = model.config.get_text_config().num_hidden_layers
    found = []
    for name, parent in model.named_modules():
        mlp = getattr(parent, "mlp", None)
        family = _family(mlp) if isinstance(mlp, nn.Module) else None
        if isinstance(mlp, nn.Module) and family is not None:
            found.append(FoundMLP(f"{name}.mlp" if name else "mlp", mlp, family, parent, "mlp"))
    if len(found) != layers:
        raise UserError(
            f"cannot convert {type(model).__name__}: {len(found)} of its {layers} layers have an MLP of a known kind "
            f"({SUPPORTED}), in plain linear layers"
        )
    for mlp in found:
        if any(parameter.is_meta for parameter in mlp.module.parameters()):
            raise UserError(f"the weights of {mlp.name} are on no device: load the whole model before converting it")
    return found


def _family(mlp: nn.Module) -> Family | None:
    children = dict(mlp.named_children())
    for family in FAMILIES:
        linear = [children.get(name) for name in (*family.inputs, family.output)]
        # Exactly these classes: a subclass may compute something else with its weight.
        if set(children) == {*family.inputs, family.output, *family.other} and all(
            type(layer) in (nn.Linear, Conv1D) for layer in linear
        ):
            return family
    return None


@torch.no_grad()
def same_function(found: FoundMLP, forward: Callable[[Tensor], Tensor]) -> bool:
    """Whether ``forward`` gives for one input bit for bit what the MLP gives, without dropout: the last check that its
    class is no stranger with familiar names.
    """
    mlp = found.module
    first = mlp.get_submodule(found.family.inputs[0])
    weight: Tensor = first.weight  # pyrefly: ignore[bad-assignment]
    width = weight.shape[0 if isinstance(first, Conv1D) else 1]
    x = torch.linspace(-2, 2, width, dtype=weight.dtype, device=weight.device).view(1, 1, width)
    modes = [(module, module.training) for module in mlp.modules()]
    mlp.eval()
    try:
        return torch.equal(mlp(x), forward(x))
    finally:
        for module, mode in modes:
            module.training = mode
