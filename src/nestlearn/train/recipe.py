"""A recipe: every number of a training run in one TOML file, read strictly and written back in full.

A key that no section has, a value of the wrong type and a value out of range are each one line for the user,
with the nearest valid name. ``dump`` and ``parse`` are inverse to each other, so the ``run.toml`` of a run
folder repeats that run.
"""

from __future__ import annotations

import dataclasses
import json
import math
import tomllib
import types
import typing
from importlib import resources
from pathlib import Path
from typing import Any

from nestlearn.errors import UserError, nearest

MODEL_KINDS = ("hope", "transformer++")
BASELINE_KINDS = ("none", "transformer++")
# As `nestlearn.train.optimizers` builds them; named here because reading a recipe does not load torch.
OPTIMIZERS = (
    *("adamw", "sgd-momentum", "momentum", "delta-momentum", "deep-momentum"),
    *("preconditioned", "feature", "muon", "m3"),
)
SCHEDULES = ("cosine", "linear", "constant")
PRECISIONS = ("auto", "bf16", "fp32")

NAMES = {int: "an integer", float: "a number", str: "a string", bool: "true or false", dict: "a table"}


def _number(default: Any, least: float, most: float = math.inf) -> Any:
    return dataclasses.field(default=default, metadata={"least": least, "most": most})


def _choice(default: str, options: tuple[str, ...]) -> Any:
    return dataclasses.field(default=default, metadata={"options": options})


@dataclasses.dataclass(frozen=True)
class DataRecipe:
    """What is read.

    ``source``: ``"stdlib"``, a file, a folder or ``"hf:NAME"``; ``tokenizer``: ``"bytes"``, ``"bpe:SIZE"`` or an
    ``AutoTokenizer`` folder; ``sequence_length``: tokens of one training sequence.
    """

    source: str = "stdlib"
    tokenizer: str = "bytes"
    sequence_length: int = _number(256, 2)


@dataclasses.dataclass(frozen=True)
class ModelRecipe:
    """Which model: ``kind`` and the keyword arguments of its configuration class.

    ``"hope"`` takes the arguments of `HopeConfig`, ``"transformer++"`` those of ``LlamaConfig``. The vocabulary
    size, the special tokens and the maximal length are no keys here: they follow from ``[data]``. TOML has no
    None: ``"none"`` stands for it.
    """

    kind: str = _choice("hope", MODEL_KINDS)
    options: dict[str, Any] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class TrainRecipe:
    """How long and how fast it learns.

    ``tokens``: the budget, in tokens, of each model. ``batch_size``: sequences of one forward pass, of all processes
    together.
    ``gradient_accumulation``: forward passes of one step. ``optimizer``: a name of
    `nestlearn.train.optimizers.build`. ``learning_rate``: its peak, in units of that optimizer (good ones for AdamW
    and Muon differ by a factor of ten). ``levelwise``: whether the levels of continuum memories are updated at their
    own frequencies, from the mean gradient of their chunk (Eq. 71), instead of all at every step. ``warmup``: the
    share of the steps that rise to the peak. ``schedule``: the shape after it. ``weight_decay``: decoupled, on
    matrices only, in units of the learning rate. ``max_grad_norm``: the L2 norm at which gradients are clipped
    (0: never). ``log_every``, ``eval_every``, ``save_every``: in steps.
    ``eval_tokens`` and ``final_eval_tokens``: how much of the validation set, at most, an evaluation during
    training and the one after it read. ``precision``: ``"auto"`` is bf16 on a GPU that has it and fp32 elsewhere.
    ``sharded``: whether each of several processes holds a part of the weights, of their gradients and of the
    optimizer's memory (FSDP2) instead of all (DDP); not for deep-momentum, nor for cms_online.
    """

    tokens: int = _number(1_000_000, 1)
    batch_size: int = _number(8, 1)
    gradient_accumulation: int = _number(1, 1)
    optimizer: str = _choice("adamw", OPTIMIZERS)
    learning_rate: float = _number(2e-3, 0)
    levelwise: bool = False
    warmup: float = _number(0.1, 0, 0.999)
    schedule: str = _choice("cosine", SCHEDULES)
    weight_decay: float = _number(0.1, 0)
    max_grad_norm: float = _number(1.0, 0)
    log_every: int = _number(10, 1)
    eval_every: int = _number(100, 1)
    eval_tokens: int = _number(50_000, 2)
    final_eval_tokens: int = _number(500_000, 2)
    save_every: int = _number(100, 1)
    precision: str = _choice("auto", PRECISIONS)
    sharded: bool = False


@dataclasses.dataclass(frozen=True)
class BaselineRecipe:
    """The Transformer++ of as many parameters that is trained on the same tokens in the same order, or ``"none"``.

    ``learning_rate``: its own peak; the one of ``[train]`` when left out.
    """

    kind: str = _choice("none", BASELINE_KINDS)
    learning_rate: float | None = _number(None, 0)


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A whole training run. ``seed`` fixes the weights at the start and the order of the data.

    >>> Recipe(train=TrainRecipe(tokens=4096, batch_size=4)).steps
    4
    """

    seed: int = _number(0, 0, 2**32 - 1)
    data: DataRecipe = DataRecipe()
    model: ModelRecipe = ModelRecipe()
    train: TrainRecipe = TrainRecipe()
    baseline: BaselineRecipe = BaselineRecipe()

    @property
    def tokens_per_step(self) -> int:
        """Tokens of one optimizer step."""
        return self.train.batch_size * self.train.gradient_accumulation * self.data.sequence_length

    @property
    def steps(self) -> int:
        """The optimizer steps that fit into the budget. Raises `UserError` if not even one does."""
        if self.train.tokens < self.tokens_per_step:
            raise UserError(
                f"train.tokens is {self.train.tokens}, less than one step of {self.tokens_per_step} tokens "
                "(batch_size x gradient_accumulation x sequence_length): raise it or lower one of those"
            )
        return self.train.tokens // self.tokens_per_step

    def replace(self, section: str | None = None, **values: Any) -> Recipe:
        """A copy with other values in one section (or at the top level), checked like those of a file."""
        table = to_dict(self)
        (table if section is None else table[section]).update(values)
        return from_dict(table, "recipe")


def load_recipe(path: str | Path) -> Recipe:
    """Read a recipe file. Raises `UserError` if it is missing, no TOML, or holds an unknown key or a bad value."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read the recipe {path}: {reason}") from error
    return parse(text, str(path))


def load_preset(name: str) -> Recipe:
    """A recipe that comes with the package, by name. Raises `UserError` for an unknown one.

    >>> load_preset("tiny").model.kind
    'hope'
    """
    names = preset_names()
    if name not in names:
        raise UserError(f"unknown preset '{name}'; {nearest(name, names)}")
    return parse(_presets().joinpath(f"{name}.toml").read_text(encoding="utf-8"), f"preset {name}")


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(file.name.removesuffix(".toml") for file in _presets().iterdir() if file.name.endswith(".toml"))


def _presets() -> Any:
    return resources.files("nestlearn").joinpath("configs")


def parse(text: str, origin: str = "recipe") -> Recipe:
    """Read TOML text; ``origin`` names it in error messages.

    >>> parse("[train]\\nbatch_size = 2").train.batch_size
    2
    """
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{origin} is not valid TOML: {error}") from error
    return from_dict(table, origin)


def from_dict(table: dict[str, Any], origin: str) -> Recipe:
    """Check nested tables and build the recipe. Raises `UserError`."""
    sections = {field.name: field for field in dataclasses.fields(Recipe) if field.name != "seed"}
    for key, value in table.items():
        if key not in sections and key != "seed":
            what = "section" if isinstance(value, dict) else "key"
            raise UserError(f"unknown {what} '{key}' in {origin}; {nearest(key, [*sections, 'seed'])}")
        if key in sections and not isinstance(value, dict):
            raise UserError(f"'{key}' in {origin} must be a section [{key}], got {_shown(value)}")
    values: dict[str, Any] = {}
    if "seed" in table:
        field = next(field for field in dataclasses.fields(Recipe) if field.name == "seed")
        values["seed"] = _checked(field, int, table["seed"], "seed", origin)
    classes = {"data": DataRecipe, "train": TrainRecipe, "baseline": BaselineRecipe}
    for name, cls in classes.items():
        values[name] = _section(cls, table.get(name, {}), name, origin)
    values["model"] = _model(dict(table.get("model", {})), origin)
    return Recipe(**values)


def _model(table: dict[str, Any], origin: str) -> ModelRecipe:
    kind = table.pop("kind", "hope")
    field = dataclasses.fields(ModelRecipe)[0]
    kind = _checked(field, str, kind, "model.kind", origin)
    for name, value in table.items():
        for number in value if isinstance(value, list) else [value]:
            _check_finite(number, f"model.{name}", origin)
    return ModelRecipe(kind, {name: None if value == "none" else value for name, value in table.items()})


def _section(cls: type, table: dict[str, Any], name: str, origin: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(cls)}
    hints = typing.get_type_hints(cls)
    for key in table:
        if key not in fields:
            raise UserError(f"unknown key '{key}' in [{name}] of {origin}; {nearest(key, fields)}")
    return cls(**{k: _checked(fields[k], hints[k], v, f"{name}.{k}", origin) for k, v in table.items()})


def _checked(field: dataclasses.Field, hint: Any, value: Any, name: str, origin: str) -> Any:
    if isinstance(hint, types.UnionType):  # "float | None": None is a key left out, which TOML cannot write
        if value is None:
            return None
        hint = next(option for option in typing.get_args(hint) if option is not types.NoneType)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        value = float(value) if abs(value) < 2**1023 else math.inf
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        raise UserError(f"{name} in {origin} must be {NAMES[hint]}, got {_shown(value)}")
    _check_finite(value, name, origin)
    options = field.metadata.get("options")
    if options and value not in options:
        raise UserError(f"unknown {name} '{value}' in {origin}; {nearest(value, options)}")
    least, most = field.metadata.get("least"), field.metadata.get("most")
    if least is not None and not least <= value <= most:
        bound = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise UserError(f"{name} in {origin} must be {bound}, got {value}")
    return value


def _check_finite(value: Any, name: str, origin: str) -> None:
    if isinstance(value, float) and not math.isfinite(value):
        raise UserError(f"{name} in {origin} must be a finite number, got {value}")


def _shown(value: Any) -> str:
    return f"{_toml_value(value)} ({NAMES.get(type(value), 'a ' + type(value).__name__)})"


def to_dict(recipe: Recipe) -> dict[str, Any]:
    """The nested tables of the file."""
    model = {"kind": recipe.model.kind, **recipe.model.options}
    table: dict[str, Any] = {"seed": recipe.seed, "data": dataclasses.asdict(recipe.data), "model": model}
    return table | {"train": dataclasses.asdict(recipe.train), "baseline": dataclasses.asdict(recipe.baseline)}


def dump(recipe: Recipe) -> str:
    """The recipe as TOML text; ``parse`` of it gives the recipe back.

    A None of ``[model]`` is written as ``"none"``, any other is left out.

    >>> parse(dump(Recipe(seed=3))) == Recipe(seed=3)
    True
    """
    lines: list[str] = []
    for key, value in to_dict(recipe).items():
        if isinstance(value, dict):
            lines += ["", f"[{key}]"]
            if key == "model":
                value = {k: "none" if v is None else v for k, v in value.items()}
            lines += [f"{_toml_key(k)} = {_toml_value(v)}" for k, v in value.items() if v is not None]
        else:
            lines.append(f"{key} = {_toml_value(value)}")
    return "\n".join(lines) + "\n"


def _toml_key(key: str) -> str:
    bare = key.replace("_", "").replace("-", "")
    return key if bare.isascii() and bare.isalnum() else _toml_value(key)


def _toml_value(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, int):
        return str(value)
    if isinstance(value, float):
        return repr(value)  # also inf and nan, which TOML spells the same way
    if isinstance(value, str):  # JSON's escapes are TOML's, except for the delete character
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(item) for item in value) + "]"
    if isinstance(value, dict):
        items = (f"{_toml_key(str(k))} = {_toml_value(v)}" for k, v in value.items() if v is not None)
        return "{" + ", ".join(items) + "}"
    return json.dumps(str(value))


def changes(given: Recipe, stored: Recipe) -> str:
    """The keys in which two recipes differ, with both values, in words; at most three."""
    a, b = _flat(to_dict(given)), _flat(to_dict(stored))
    keys = differences(given, stored)
    shown = [f"{key} is {_toml_value(a.get(key))}, was {_toml_value(b.get(key))}" for key in keys[:3]]
    return "; ".join(shown) + (f"; and {len(keys) - 3} more" if keys[3:] else "")


def differences(given: Recipe, stored: Recipe) -> list[str]:
    """The keys in which two recipes differ, as ``section.key``."""
    a, b = to_dict(given), to_dict(stored)
    flat_a, flat_b = _flat(a), _flat(b)
    return [key for key in sorted(flat_a | flat_b) if flat_a.get(key) != flat_b.get(key)]


def _flat(table: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{name}": item for name, item in value.items()}
        else:
            flat[key] = value
    return flat
