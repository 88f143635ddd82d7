"""A model in equal parts over the processes of a run (FSDP2), and whole again for a checkpoint.

A checkpoint is the same whether the model was sharded or not, so a run goes on in any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from nestlearn.errors import UserError
from nestlearn.nn import ContinuumMemory
from nestlearn.optim.base import is_sharded
from nestlearn.train.processes import join


def shard(model: PreTrainedModel) -> None:
    """Leave each process its part of every weight. A block's weights are whole while it computes, and no longer.

    Raises `UserError` for a model with levels that learn along the sequence: the rate of each is a single number, which
    FSDP2 does not cut. A vector of one would not load from a checkpoint of before.
    """
    online = [name for name, module in model.named_modules() if isinstance(module, ContinuumMemory) and module.online]
    if online:
        raise UserError(
            f"{online[0]} learns along the sequence (cms_online), which a sharded model does not: leave train.sharded "
            "out, or cms_online"
        )
    here = join()
    assert here.device is not None
    mesh = init_device_mesh(here.device.type, (here.num_processes,))
    model.to(here.device)  # pyrefly: ignore[bad-argument-type]
    for module in model.modules():
        if type(module).__name__ in (model._no_split_modules or ()):
            fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def sharded(model: nn.Module) -> bool:
    """Whether `shard` was here."""
    return any(map(is_sharded, model.parameters()))


def whole(tree: Any) -> Any:
    """A tree of dicts, lists and tuples with every sharded tensor gathered, on the CPU; all processes must ask.

    Only the first keeps the tensors, the others get empty ones.
    """
    keep = join().is_main_process

    def gather(tensor: Tensor) -> Tensor:
        if not isinstance(tensor, DTensor):
            return tensor
        full = tensor.full_tensor()
        return full.cpu() if keep else full.new_empty(0)

    return _map(tree, gather)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The weights of a sharded model by name, gathered as by `whole`; those that are tied to another are left out."""
    tied = getattr(model, "all_tied_weights_keys", {})
    return whole({name: value for name, value in model.state_dict().items() if name not in tied})


def whole_model(model: PreTrainedModel) -> PreTrainedModel:
    """In the first process a model that is not sharded, with the weights of ``model``; in the others ``model``, as
    everywhere if it never was."""
    if not sharded(model):
        return model
    weights = whole_weights(model)
    if not join().is_main_process:
        return model
    alone = type(model)(model.config)
    alone.load_state_dict(weights, strict=False)
    return alone.to(join().device)  # pyrefly: ignore[bad-argument-type]


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """``value`` sharded as ``like`` is, if it is and their shapes agree; else ``value``."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value
    return distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def parts_of_state(state: dict[str, Any], optimizer: Optimizer) -> dict[str, Any]:
    """The whole state of an optimizer with every tensor that has its parameter's shape sharded like that parameter."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    like = lambda memory, i: _map(memory, lambda t: part_of(t, parameters[i]))  # noqa: E731
    parts = {**state, "state": {i: like(memory, i) for i, memory in state["state"].items()}}
    if "levelwise" in state:
        own = state["levelwise"]
        parts["levelwise"] = {**own, "kept": {i: like(gradient, i) for i, gradient in own["kept"].items()}}
    return parts


def _map(tree: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map(value, change) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(_map(value, change) for value in tree)
    return tree
