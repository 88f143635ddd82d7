"""The layers of `nestlearn.nn` as memories: the mixers around `nestlearn.ops`, and the continuum memory; and the levels
of a model of `nestlearn.convert`.

Both packages stand above `levels`, so their classes are looked up when a model is described and not when this module
is loaded; and only if someone has loaded them, as whoever built such a layer has.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import Any

from torch import nn

from nestlearn.levels.describe.parts import Link, Part, size
from nestlearn.levels.frequency import NON_PARAMETRIC, UpdateFrequency
from nestlearn.ops import MEMORY, WriteRule

CONTINUUM, LEVEL = "ContinuumMemory", "ContinuumLevel"
START, ALONG = "start", "weights along the sequence"
OTHERS, MAIN = "start of the memories", "start of the main memory"
PROJECTIONS = ("k", "v", "q", "eta", "alpha")
# Objectives and updates of `nestlearn.ops.WriteRule` in words; "" leaves the objective to the rule's own.
OBJECTIVES = {"dot": "-<M k, v>", "l2": "1/2 ||M k - v||^2"}
UPDATES = {
    "dgd": ("", "DGD"),
    "delta": ("1/2 ||M k - v||^2", "delta rule"),
    "oja": ("-<M k, v> + 1/2 ||M^T v||^2", "Oja's rule"),
    "omega": ("", "Omega rule"),
}


def _is(module: nn.Module, name: str, package: str = "nestlearn.nn") -> bool:
    layers = sys.modules.get(package)
    return layers is not None and isinstance(module, getattr(layers, name))


def _is_converted(module: nn.Module) -> bool:
    """Whether it is a pretrained model whose MLPs are levels."""
    return _is(module, "ContinualModel", "nestlearn.convert")


def _mixes(module: nn.Module) -> bool:
    """Whether it is a mixer around `nestlearn.ops.self_modify`, such as the self-referential Titans."""
    return isinstance(getattr(module, "rule", None), WriteRule)


def knows(module: nn.Module) -> bool:
    """Whether the module is a layer that is described here."""
    return _mixes(module) or _is(module, CONTINUUM) or _is(module, LEVEL) or _is_converted(module)


def states(path: str, module: nn.Module) -> list[Part]:
    """What the layer updates along a sequence, its states."""
    if _mixes(module):
        return _mixer(path, module)
    if _is(module, CONTINUUM) and module.online is not None:
        return _continuum(path, module)
    if _is_converted(module):
        return _converted(path, module)
    return []


def weights(path: str, module: nn.Module) -> list[tuple[Part, list[str]]]:
    """Weights that several children of the layer hold together, as a part without parameters and the children."""
    if _is(module, LEVEL):
        learns = module.update is not None
        if learns:
            objective, context = "outer loss, through the updates", "all sequences"
            part = Part(path, START, "weights", f"{mlp(module)}, start", objective, context)
        else:
            part = Part(path, "", "weights", f"{mlp(module)}, chunk {module.chunk_size}")
        return [(part, ["up", "down", "gate"])]
    if not _mixes(module):
        return []
    others = [f"start.{name}" for name in _adaptive(module)]
    start = Part(path, OTHERS, "weights", "start of the memories", "outer loss, through the writes", "all sequences")
    main = replace(start, role=MAIN, structure="start of the main memory")
    gates = Part(path, "gates", "weights", "scalars, per head", "<W, dL/dW>", "-dL/dW")
    return [(start, others), (main, [f"start.{MEMORY}"]), (gates, ["bias", "write_scale"])]


def _adaptive(layer: Any) -> list[str]:
    return sorted(getattr(layer, "adaptive", ()), key=PROJECTIONS.index)


def _mixer(path: str, layer: Any) -> list[Part]:
    """Eq. 62 to 69 and 83 to 90: writes count per token, what is read of a chunk is its anchor's state."""
    rule, others = layer.rule, _adaptive(layer)
    waits = "each token is written, reads wait for the chunk"
    reads = waits if rule.read == "anchor" else "each token is written, then read"
    main = _memories(path, layer, "main memory", [MEMORY], 1 if _exact(layer) else rule.chunk_size, reads)
    parts = [main]
    if getattr(getattr(layer, "design", None), "attention", False):  # AdaTransformer: attention makes the query
        parts = [attention(path, layer, Link("direct", main.key, "query")), main]
    if others:
        named = f"memories {', '.join(others)}"
        main = replace(main, links=(*main.links, Link("context generation", (path, named), "k, v, gates", False)))
        parts = [_memories(path, layer, named, others, rule.other, waits), main]
    if getattr(layer, "momentum", None) is None:
        return parts
    written, momenta = [part for part in parts if part.kind == "state"], []
    for part in written:
        role = f"momentum of {part.role}"
        step = replace(part, role=role, objective="<S, dL/dM>", rule="gradient descent, learned decay", links=())
        momenta.append(replace(step, links=(Link("direct", part.key, "S"),)))
    needing = [replace(part, needs=(m.key,)) for part, m in zip(written, momenta, strict=True)]
    return [*(part for part in parts if part not in written), *momenta, *needing]


def _exact(layer: Any) -> bool:
    """Whether every token changes what the next one reads, so that the chunk size is a matter of speed alone."""
    rule = layer.rule
    own_error = rule.update in ("delta", "oja") or (rule.update == "dgd" and rule.objective == "dot")
    return own_error and rule.read == "inclusive" and not _adaptive(layer)


def attention(path: str, module: Any, *links: Link) -> Part:
    """Eq. 62 and 63: a non-parametric memory, solved anew for every query."""
    # A layer says so itself, or else its model's configuration does.
    places = [(module, "window"), (module, "sliding_window"), (getattr(module, "config", None), "sliding_window")]
    window = next((getattr(place, name) for place, name in places if hasattr(place, name)), None)
    limited = isinstance(window, int) and window > 0
    reach = f"last {window} tokens" if limited else "tokens of the sequence"
    return Part(
        path,
        "attention",
        "context",
        f"non-parametric: its context ({type(module).__name__})",
        "sum_i s(k_i, q) ||v_i - m||^2",
        f"{reach}: k -> v",
        "Nadaraya-Watson: solved anew for every query",
        NON_PARAMETRIC,
        None,  # grows with the sequence, up to the window
        links=(Link("context generation", (path, "*"), "keys, values", outward=False), *links),
    )


def _memories(path: str, layer: Any, role: str, names: list[str], chunk: int, reads: str) -> Part:
    rule, starts = layer.rule, getattr(layer, "start", None)
    held = [list(starts[name]) for name in names if starts is not None and name in starts]
    linear = not held or len(held[0]) == 1
    kind = ("matrices" if linear else "MLPs") if len(names) > 1 else ("matrix" if linear else "MLP")
    objective, write = UPDATES.get(rule.update, ("", rule.update))
    if rule.update == "dgd" and not rule.delta:
        write = "gradient descent"
    state = sum(size(p) for weights in held for p in weights) if held else layer.heads * layer.width**2
    generated = rule.self_values and bool(_adaptive(layer))
    return Part(
        path,
        role,
        "state",
        f"{kind}, {layer.heads} heads, per sequence",
        objective or OBJECTIVES.get(rule.objective, f"{rule.objective} of M k - v"),
        "tokens: k -> v = M(v)" if generated else "tokens: k -> v",
        f"{write}{' with decay' if rule.decay else ''}; {reads}",
        UpdateFrequency.every(chunk, "token"),
        state,
        links=(Link("initialisation", (path, MAIN if role == "main memory" else OTHERS), "start", False),),
    )


def _continuum(path: str, memory: Any) -> list[Part]:
    """Eq. 70 to 74, online: the weights of each row are the state, the parameters their start."""
    parts = []
    last = len(memory.levels) - 1
    for i, level in enumerate(memory.levels):
        here = f"{path}.levels.{i}" if path else f"levels.{i}"
        starts = [Link("initialisation", (here, START), "start", False)]
        if memory.variant == "nested" and i < last:
            slower = f"{path}.levels.{i + 1}" if path else f"levels.{i + 1}"
            starts.append(Link("initialisation", (slower, ALONG), "start, learned along", False))
        local = f"{memory.objective.name} of M(x_t), V x_(t+1)"
        parts.append(
            Part(
                here,
                ALONG,
                "state",
                f"{mlp(level)}, per sequence",
                local if memory.online == "local" else "next-token loss of the model",
                "tokens of a chunk",
                f"{level.update.rule}, lr {level.update.lr:g} times a learned factor",
                UpdateFrequency.every(level.chunk_size, "token"),
                sum(size(w) for w in level.weights),
                links=tuple(starts),
            )
        )
    return parts


def _converted(path: str, model: Any) -> list[Part]:
    """Eq. 71 after training: what a learner adds to each MLP of a level; the pretrained weights are its start."""
    parts = []
    for level in model.levels:
        for found, _ in model.replaced:
            own = [piece for name, piece in level.start.pieces.items() if name.startswith(f"{found.name}.")]
            if not own:
                continue
            here = ".".join(name for name in (path, "base", found.name) if name)
            parts.append(
                Part(
                    here,
                    f"learned weights, level {level.number}",
                    "state",
                    "MLP, per learner" if model.config_levels.kind == "depthwise" else "neurons of an MLP, per learner",
                    "next-token loss of the model",
                    "tokens of a chunk",
                    f"{level.config.rule}, lr {level.config.lr:g}",
                    UpdateFrequency.every(level.config.period, "token"),
                    sum(piece.pretrained().numel() for piece in own),
                    links=(Link("initialisation", (here, "*"), "start", False),),
                )
            )
    return parts


def mlp(level: Any) -> str:
    """The memory of one level of a continuum memory, with its sizes."""
    kind = "MLP" if level.gate is None else "SwiGLU MLP"
    return f"{kind} {level.up.in_features} -> {level.up.out_features} -> {level.down.out_features}"
