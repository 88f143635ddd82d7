"""What Muon and M3 share: one optimizer for a whole model, its matrices orthogonalised, everything else by AdamW."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from nestlearn.errors import UserError, nearest
from nestlearn.optim.base import MemoryOptimizer, State, as_matrix, by_step, check_all, is_number, sweep, zeros
from nestlearn.optim.orthogonal import descend_to_orthogonal, newton_schulz

ORTHOGONALIZATIONS = {"newton-schulz": 5, "learned": 15}  # and the usual number of steps
ADJUSTMENTS = ("original", "match_rms_adamw", "none")
SMALL = 2**16  # elements: matrices up to this size are worth a batched product on a CPU too


def matrix_groups(model: nn.Module) -> list[dict[str, Any]]:
    """Named parameter groups of a model for `Muon` and `M3`.

    Hidden matrices (two-dimensional weights, and convolutions of one group) are orthogonalised. Embeddings, the output
    head (``model.get_output_embeddings()``), grouped convolutions and stacks of matrices go to AdamW; so do vectors,
    without weight decay. Frozen parameters are left out. Raises `UserError` for what is no module.

    >>> model = nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))
    >>> [(group.get("adam", False), [name for name, _ in group["params"]]) for group in matrix_groups(model)]
    [(False, ['1.weight']), (True, ['0.weight']), (True, ['1.bias'])]
    """
    if not isinstance(model, nn.Module):
        raise UserError(f"matrix_groups got a {type(model).__name__}: give it the model, whose modules it looks at")
    ends = [m for m in model.modules() if isinstance(m, nn.Embedding | nn.EmbeddingBag)]
    of_head = getattr(model, "get_output_embeddings", None)  # of Hugging Face models
    head = of_head() if callable(of_head) else None
    tables = {module.weight for module in [*ends, *([head] if head is not None else [])]}
    convolutions = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Conv3d)]
    kernels = {m.weight for m in convolutions if m.groups == 1}
    matrices, others, vectors = [], [], []
    for name, p in model.named_parameters():
        if p.requires_grad:
            hidden = p not in tables and (p in kernels or (p.ndim == 2 and min(p.shape) > 1))
            (matrices if hidden else others if p.ndim > 1 else vectors).append((name, p))
    groups = [
        {"params": matrices},
        {"params": others, "adam": True},
        {"params": vectors, "adam": True, "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]


class MatrixOptimizer(MemoryOptimizer):
    """Base of `Muon` and `M3`.

    Every group that is given is split: parameters of two or more dimensions are matrices (a convolution is flattened
    per output), the others form a group of their own with ``adam=True`` whose ``lr`` is ``adam_lr``, so that a
    schedule scales both. A group given with ``adam=True`` goes to AdamW whole: embeddings and output heads should.
    """

    _squares = True

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, split into its matrices and the rest unless it says ``adam``."""
        group = dict(param_group)
        given = group.pop("params")
        entries = [given] if isinstance(given, Tensor) else list(given)
        tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in entries]
        adam_lr = group.get("adam_lr", self.defaults["adam_lr"])
        if "adam" in group:
            if group["adam"]:
                group.setdefault("lr", adam_lr)
            super().add_param_group({**group, "params": entries})
            return
        matrices = [e for e, t in zip(entries, tensors, strict=True) if getattr(t, "ndim", 0) > 1]
        rest = [e for e, t in zip(entries, tensors, strict=True) if getattr(t, "ndim", 0) <= 1]
        if matrices:
            super().add_param_group({**group, "params": matrices, "adam": False})
        if rest:
            super().add_param_group({**group, "params": rest, "adam": True, "lr": adam_lr})

    def _check(self, group: dict[str, Any]) -> None:
        check_all(self, group, [("adam_lr", 0.0, math.inf), ("adam_eps", 0.0, 1.0)])
        betas = group["adam_betas"]
        pair = isinstance(betas, tuple | list) and len(betas) == 2
        if not pair or not all(is_number(beta) and 0.0 <= beta < 1.0 for beta in betas):
            raise UserError(f"{type(self).__name__} got adam_betas={betas!r}: give two fractions, each in [0, 1)")
        if group["orthogonalization"] not in ORTHOGONALIZATIONS:
            name = str(group["orthogonalization"])
            raise UserError(f"unknown orthogonalization {name!r}: {nearest(name, ORTHOGONALIZATIONS)}")
        if group["adjust"] not in ADJUSTMENTS:
            raise UserError(f"unknown adjust {group['adjust']!r}: {nearest(str(group['adjust']), ADJUSTMENTS)}")
        steps = group["steps"]
        if steps is not None and not (isinstance(steps, int) and 0 <= steps < 100):
            raise UserError(f"{type(self).__name__} got steps={steps}: it must be a whole number from 0 to 99, or None")

    def _memory(self, p: Tensor, group: dict[str, Any]) -> State:
        if group["adam"]:
            return {"exp_avg": zeros(p), "exp_avg_sq": zeros(p), "step": torch.tensor(0.0)}
        return self._matrix_memory(p, group)

    def _update(self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
        (adamw if group["adam"] else self._update_matrices)(group, params, grads, memories)

    def _matrix_memory(self, p: Tensor, group: dict[str, Any]) -> State:
        raise NotImplementedError

    def _update_matrices(
        self, group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]
    ) -> None:
        raise NotImplementedError


def adamw(group: dict[str, Any], params: list[Tensor], grads: list[Tensor], memories: list[State]) -> None:
    """Adam with bias correction (Eq. 105), in place; the decay of AdamW is the base class's."""
    (beta1, beta2), lr = group["adam_betas"], float(group["lr"])
    for t, at in by_step(memories):
        averages = [[memories[i][name] for i in at] for name in ("exp_avg", "exp_avg_sq")]
        for p, g, m, v in sweep([params[i] for i in at], [grads[i] for i in at], *averages):
            torch._foreach_lerp_(m, g, 1 - beta1)
            torch._foreach_mul_(v, beta2)
            torch._foreach_addcmul_(v, g, g, value=1 - beta2)
            root = torch._foreach_sqrt(v)
            torch._foreach_div_(root, math.sqrt(1 - beta2**t))
            torch._foreach_add_(root, group["adam_eps"])
            torch._foreach_add_(p, torch._foreach_div(m, root), alpha=-lr / (1 - beta1**t))


def orthogonalize(matrices: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """The orthogonal factor of each tensor, as a matrix (d_out, d_in) of it; equal shapes in one batched product.

    ``foreach=None`` batches on an accelerator and, on a CPU, small matrices. Products are in bfloat16 on an
    accelerator, as in Muon, and in the precision of the memory on a CPU, where that is the faster one.
    """
    result: list[Tensor] = [torch.empty(0)] * len(matrices)
    for indices in _buckets(matrices, group["foreach"]):
        stack = [as_matrix(matrices[i]) for i in indices]
        x = stack[0] if len(stack) == 1 else torch.stack(stack)
        steps = group["steps"] if group["steps"] is not None else ORTHOGONALIZATIONS[group["orthogonalization"]]
        if group["orthogonalization"] == "learned":
            o = descend_to_orthogonal(x, steps)
        else:
            fast = torch.bfloat16 if not x.is_cpu and x.dtype == torch.float32 else None
            o = newton_schulz(x, steps, dtype=fast).to(x.dtype)
        for i, matrix in zip(indices, [o] if len(stack) == 1 else o, strict=True):
            result[i] = matrix
    return result


def _buckets(matrices: list[Tensor], foreach: bool | None) -> Iterator[list[int]]:
    """Positions of the matrices that go through one product."""
    together: dict[tuple[object, ...], list[int]] = {}
    for i, m in enumerate(matrices):
        batch = foreach if foreach is not None else not m.is_cpu or m.numel() <= SMALL
        key = (tuple(as_matrix(m).shape), m.dtype, m.device) if batch else (i,)
        together.setdefault(key, []).append(i)
    yield from together.values()


def adjustment(shape: torch.Size, adjust: str) -> float:
    """The factor of the learning rate for a matrix (d_out, d_in), as `torch.optim.Muon` has it.

    ``"original"``: ``sqrt(max(1, d_out / d_in))``, equal spectral size seen from the input. ``"match_rms_adamw"``:
    ``0.2 sqrt(max(d_out, d_in))``, so that a learning rate of AdamW fits. ``"none"``: 1.
    """
    d_out, d_in = shape[0], math.prod(shape[1:])
    if adjust == "original":
        return math.sqrt(max(1.0, d_out / d_in))
    return 0.2 * math.sqrt(max(d_out, d_in)) if adjust == "match_rms_adamw" else 1.0
