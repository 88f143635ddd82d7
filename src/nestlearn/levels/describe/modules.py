"""Which memory a module is: PyTorch's and Hugging Face's, by what they are made of, and any other by its class name."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from torch import Tensor, nn

from nestlearn.levels.describe import own_layers
from nestlearn.levels.describe.parts import PAIR, SURPRISE, Link, Part, size
from nestlearn.levels.frequency import FROZEN, UpdateFrequency

ATTENTION = re.compile(r"attention|attn", re.IGNORECASE)
# Mixers that carry a state along the sequence; some of them call themselves attention.
RECURRENT = re.compile(
    r"mamba|delta_?net|linear_?attention|retention|rwkv\w*attention|recurrent|\bssm|lstm|gru$", re.IGNORECASE
)
NO_MIXER = re.compile(r"Norm|MLP|FeedForward|Expert|Embedding", re.IGNORECASE)
# Structure and context of a module's weights, by its class name; the first that fits.
WEIGHTS = (
    (re.compile(r"Embedding(Bag)?$"), "table", "token id -> -dL/dy"),
    (re.compile(r"Norm(\dd|Gated)?$"), "vector, element-wise", "normalised x -> -dL/dy"),
    (re.compile(r"Conv(Transpose)?\dd|Conv$"), "matrix over patches", "patch -> -dL/dy"),
    (re.compile(r"Linear(\dbit\w*)?$|Conv1D$|Dense$"), "matrix", PAIR),
)
STATISTICS, KEPT = "running statistics", ("running_mean", "running_var", "num_batches_tracked")
JOIN = (nn.ModuleList, nn.ModuleDict, nn.Sequential, nn.ParameterList, nn.ParameterDict)


@dataclass
class Anatomy:
    """A model taken apart: its parts in the order of its modules, and the class names of what is no part.

    Args:
        parts: with every parameter in exactly one of them.
        functions: classes of modules that hold nothing and have no children, such as activations.
        containers: classes of modules that only join others.
    """

    parts: list[Part] = field(default_factory=list)
    functions: Counter[str] = field(default_factory=Counter)
    containers: Counter[str] = field(default_factory=Counter)


def take_apart(model: nn.Module) -> Anatomy:
    """Every component of ``model``. Nothing is left out: what is not known appears by its class name."""
    anatomy = Anatomy()
    modules: dict[nn.Module, str] = {}
    parameters: dict[nn.Parameter, str] = {}
    claimed: set[nn.Module] = set()
    for path, module in _walk(model, "", modules):
        if module in claimed:
            continue
        first = modules[module]
        name = type(module).__name__
        own = [(key, p) for key, p in module._parameters.items() if p is not None]
        buffers = {key: b for key, b in module._buffers.items() if b is not None}
        if first != path:
            if any(True for _ in module.parameters()):
                tied = tuple(module.parameters())
                anatomy.parts.append(Part(path, "", "weights", f"the same {name} as {first}", tied=tied))
            continue
        states = [*own_layers.states(path, module), *_states(path, module, buffers)]
        anatomy.parts += states
        if any(part.role == STATISTICS for part in states):
            buffers = {key: b for key, b in buffers.items() if key not in KEPT}
        anatomy.parts += _weights(path, module, own, parameters)
        for part, children in own_layers.weights(path, module):
            anatomy.parts += _together(part, module, children, parameters, claimed)
        for key, b in buffers.items():
            anatomy.parts.append(_buffer(path, name, key, b))
        if not (own or buffers) and (module._modules or not states):
            joins = bool(module._modules) or isinstance(module, JOIN)
            counter = anatomy.containers if joins else anatomy.functions
            counter[name] += 1
    return anatomy


def _walk(module: nn.Module, path: str, seen: dict[nn.Module, str]) -> Iterator[tuple[str, nn.Module]]:
    """As `named_modules`, but with every further name of a module too, at which it is not entered again."""
    again = module in seen
    seen.setdefault(module, path)
    yield path, module
    if again:
        return
    for name, child in module._modules.items():
        if child is not None:
            yield from _walk(child, f"{path}.{name}" if path else name, seen)


# Weights: the outer optimizer's


def _weights(
    path: str, module: nn.Module, own: list[tuple[str, nn.Parameter]], seen: dict[nn.Parameter, str]
) -> list[Part]:
    new = tuple((key, p) for key, p in own if p not in seen)
    tied = tuple(p for _, p in own if p in seen)
    owners = sorted({seen[p] for p in tied})
    for key, p in new:
        seen[p] = f"{path}.{key}" if path else key
    if not own:
        return []
    structure, objective, context = _structure(module, own)
    note = f", tied to {', '.join(owners)}" if tied else ""
    return [Part(path, "", "weights", structure + note, objective, context, parameters=new, tied=tied)]


def _together(
    part: Part, module: nn.Module, children: list[str], seen: dict[nn.Parameter, str], claimed: set[nn.Module]
) -> list[Part]:
    """The weights of several children as one part; the children are not looked at again."""
    held: list[tuple[str, nn.Parameter]] = []
    for name in children:
        try:
            child = module.get_submodule(name)
        except AttributeError:  # an optional child that is None
            continue
        claimed.update(child.modules())
        held += [(f"{name}.{key}", p) for key, p in child.named_parameters() if p not in seen]
    seen.update({p: f"{part.path}.{key}" if part.path else key for key, p in held})
    return [replace(part, parameters=tuple(held))] if held else []


def _structure(module: nn.Module, own: list[tuple[str, nn.Parameter]]) -> tuple[str, str, str]:
    name = type(module).__name__
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return f"matrices of the gates ({name})", SURPRISE, PAIR
    for pattern, structure, context in WEIGHTS:
        if pattern.search(name):
            return f"{structure} ({name})", SURPRISE, context
    if _is_attention(module) and any(p.ndim >= 2 for _, p in own):
        return f"matrix ({name})", SURPRISE, PAIR
    return f"tensor ({name})", "<W, dL/dW>", "-dL/dW"


# States: what the forward pass updates


def _states(path: str, module: nn.Module, buffers: dict[str, Tensor]) -> list[Part]:
    name = type(module).__name__
    if "running_mean" in buffers and "running_var" in buffers:
        return [_running_statistics(path, module, buffers)]
    if isinstance(module, (nn.RNNBase, nn.RNNCellBase)):
        return [_recurrent(path, name, _recurrent_size(module))]
    if own_layers.knows(module):
        return []
    if _innermost(module, _is_recurrent):
        return [_recurrent(path, name, None)]
    if _innermost(module, _is_attention):
        return [own_layers.attention(path, module)]
    return []


def _recurrent(path: str, name: str, state: int | None) -> Part:
    return Part(
        path,
        "state",
        "state",
        f"recurrent state ({name}), per sequence",
        "not known: set by its gates",
        "tokens of the sequence",
        f"recurrence of {name}",
        UpdateFrequency.every(1, "token"),
        state,
        links=(Link("weight generation", (path, "*"), "gates", outward=False),),
    )


def _recurrent_size(module: nn.Module) -> int:
    """Numbers of hidden state per sequence."""
    vectors = 2 if "LSTM" in type(module).__name__ else 1
    layers = getattr(module, "num_layers", 1) * (2 if getattr(module, "bidirectional", False) else 1)
    # An LSTM with projections keeps a short h beside its c.
    short = getattr(module, "proj_size", 0)
    width = vectors * module.hidden_size if not short else module.hidden_size + short  # type: ignore[operator]
    return int(layers * width)  # type: ignore[call-overload]


def _running_statistics(path: str, module: nn.Module, buffers: dict[str, Tensor]) -> Part:
    momentum = getattr(module, "momentum", None)
    step = "1/t" if momentum is None else f"{momentum:g}"
    return Part(
        path,
        STATISTICS,
        "state",
        f"average, element-wise ({type(module).__name__})",
        "1/2 ||m - batch mean||^2",
        "statistics of each batch",
        f"gradient descent, step {step}" if module.training else "none in eval mode",
        UpdateFrequency.every(1) if module.training else FROZEN,
        size(buffers["running_mean"]) + size(buffers["running_var"]),
    )


def _buffer(path: str, name: str, key: str, buffer: Tensor) -> Part:
    return Part(
        path,
        key,
        "buffer",
        f"buffer ({name})",
        "not known",
        "not known",
        f"constant, unless {name} writes it",
        FROZEN,
        size(buffer),
    )


def _has_projections(module: nn.Module) -> bool:
    """Whether matrices are its own or stand directly below it."""
    near = [module, *(child for child in module._modules.values() if child is not None)]
    return any(p is not None and p.ndim >= 2 for m in near for p in m._parameters.values())


def _is_attention(module: nn.Module) -> bool:
    return _is_called(module, ATTENTION) and not _is_recurrent(module)


def _is_recurrent(module: nn.Module) -> bool:
    # The logarithm of a state-space model's decay has this name everywhere.
    return "A_log" in module._parameters or _is_called(module, RECURRENT)


def _is_called(module: nn.Module, words: re.Pattern[str]) -> bool:
    name = type(module).__name__
    return bool(words.search(name)) and not NO_MIXER.search(name) and _has_projections(module)


def _innermost(module: nn.Module, test: Callable[[nn.Module], bool]) -> bool:
    """Of nested modules that pass, the one that does the work."""
    return test(module) and not any(test(m) for m in module.modules() if m is not module)
