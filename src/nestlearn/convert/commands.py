"""``nestlearn pull`` and ``nestlearn convert``. Heavy imports are inside."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nestlearn.errors import UserError
from nestlearn.json_option import Json


def pull(
    model: Annotated[str, typer.Argument(help="Which model: smollm2 (SmolLM2-135M-Instruct, Apache-2.0).")],
    to: Annotated[
        Path | None, typer.Option(help="The folder. By default one in the user's cache.", metavar="DIR")
    ] = None,
    as_json: Json = False,
) -> None:
    """Bring a pretrained model: download, check, convert to a Hugging Face folder.

    Other commands then take the model by its name. The cache is HF_HOME, or huggingface in XDG_CACHE_HOME or ~/.cache.

    Example: nestlearn pull smollm2
    """
    from nestlearn.convert.pretrained import pull

    folder = pull(model, to, report=lambda line: print(line, file=sys.stderr, flush=True))
    print(json.dumps({"model": model, "folder": str(folder)}) if as_json else folder)


def convert(
    model: Annotated[str, typer.Argument(help="A pretrained model: smollm2, or any folder of save_pretrained.")],
    out: Annotated[Path, typer.Option(help="The folder to write: the levels, for learn and chat.")],
    kind: Annotated[
        str, typer.Option(help="depthwise, a level a group of layers; split, all levels in each.")
    ] = "depthwise",
    layers: Annotated[
        str, typer.Option(help="late (the last quarter), all, or indices.", metavar="late|all|N,N")
    ] = "late",
    periods: Annotated[
        str, typer.Option(help="Tokens between two updates of each level, fast to slow.", metavar="N,N")
    ] = "512,1024,2048",
    lr: Annotated[
        str | None,
        typer.Option(
            help="Learning rate, one for all levels or one for each; by default, for adamw alone, 2e-4 at a period of "
            "512, growing with the root of the period.",
            metavar="X[,X]",
        ),
    ] = None,
    rule: Annotated[str, typer.Option(help="adamw, sgd, m3 or delta-momentum.")] = "adamw",
    clip: Annotated[
        str, typer.Option(help="The largest norm of a level's gradient; longer ones are shortened.", metavar="X[,X]")
    ] = "1",
    retention: Annotated[
        str, typer.Option(help="Share of the way back to the pretrained weights, each update.", metavar="X[,X]")
    ] = "0",
    budget: Annotated[
        str | None,
        typer.Option(
            help="How far a level may move, relative to its pretrained norm; by default any way.", metavar="X[,X]"
        ),
    ] = None,
    consolidation: Annotated[
        str,
        typer.Option(
            help="How much of what a level has learned of a text later updates leave alone: 0.1 where texts are alike, "
            "3 where they conflict.",
            metavar="X[,X]",
        ),
    ] = "0",
    keep: Annotated[
        Path | None,
        typer.Option(
            help="A text that learning must not disturb: some pages of what the model should stay good at.",
            metavar="FILE",
        ),
    ] = None,
    keep_strength: Annotated[
        float | None,
        typer.Option(
            help="How much less a step moves what is kept: by 1 / (1 + strength). By default 10.", metavar="X"
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Turn a pretrained model into levels that can learn.

    Nothing is trained and no weight is copied: the folder names the model, its hash and the levels.

    Example: nestlearn convert smollm2 --out learner --periods 512,4096
    """
    from transformers.utils import logging

    from nestlearn.convert.config import RULES, Level, LevelsConfig, default_rate
    from nestlearn.convert.model import convert
    from nestlearn.convert.pretrained import model_folder
    from nestlearn.convert.saved import LEVELS, load_base
    from nestlearn.data.text_files import read_text
    from nestlearn.data.tokenizers import read_tokenizer

    if (out / LEVELS).exists():
        raise UserError(f"{out} holds a converted model already: give another --out, or remove it")
    if (out / "config.json").exists():
        raise UserError(f"{out} holds a model, which it would hide: give another folder with --out")
    chunks = _numbers("--periods", periods, int)
    count = len(chunks)
    if lr is None and rule in RULES and rule != "adamw":
        raise UserError(f"--rule {rule} has no default rate: give --lr, as 1 for sgd")
    rates = [default_rate(max(period, 1)) for period in chunks] if lr is None else _each("--lr", lr, count)
    clips, retentions = _each("--clip", clip, count), _each("--retention", retention, count)
    consolidations = _each("--consolidation", consolidation, count)
    budgets = [None] * count if budget is None else _each("--budget", budget, count)
    config = LevelsConfig(
        kind=kind,
        levels=tuple(
            Level(period, rate, rule, longest, share, most, fixed)
            for period, rate, longest, share, most, fixed in zip(
                chunks, rates, clips, retentions, budgets, consolidations, strict=True
            )
        ),
        layers=layers if layers in ("late", "all") else tuple(_numbers("--layers", layers, int)),
    )
    logging.disable_progress_bar()
    if keep is None and keep_strength is not None:
        raise UserError(f"--keep-strength {keep_strength:g} is that of a text: give --keep FILE with it")
    text = None if keep is None else read_text(keep)
    converted = convert(load_base(model), config)
    if text is not None:
        options: dict[str, Any] = {} if keep_strength is None else {"strength": keep_strength}
        converted.keep(read_tokenizer(model_folder(model)), text, **options)
    converted.save_pretrained(out)
    rows = [
        {
            "level": level.number,
            "period": level.config.period,
            "rule": level.config.rule,
            "lr": level.config.lr,
            "layers": list(level.layers),
            "parameters": level.parameters,
        }
        for level in converted.levels
    ]
    if as_json:
        print(json.dumps({"model": model, "folder": str(out), "config": config.to_dict(), "levels": rows}))
    else:
        _print(rows, out)
        whole = math.gcd(*chunks)
        if whole < min(chunks):
            print(f"it reads {whole:,} tokens at a time, the most that divides every period")


def _each(option: str, text: str, levels: int) -> list[float]:
    """A number for every level, from one for all or one for each."""
    given = _numbers(option, text, float)
    if len(given) not in (1, levels):
        raise UserError(f"{option} has {len(given)} numbers for {levels} levels: give one, or one for each")
    return given * levels if len(given) == 1 else given


def _numbers(option: str, text: str, kind: type) -> list[Any]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        what = "whole numbers" if kind is int else "numbers"
        raise UserError(f"{option} {text!r}: give {what} with commas between them") from None


def _print(rows: list[dict[str, Any]], out: Path) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table()
    for column in rows[0]:
        table.add_column(column, justify="left" if column in ("rule", "layers") else "right", no_wrap=True)
    for row in rows:
        layers = row["layers"]
        run = layers == list(range(layers[0], layers[-1] + 1))
        shown = {**row, "parameters": f"{row['parameters']:,}"}
        shown["layers"] = f"{layers[0]}-{layers[-1]}" if run else ",".join(map(str, layers))
        table.add_row(*map(str, shown.values()))
    console = Console(highlight=False)
    console.print(table)
    console.print(f"converted model: {out}", markup=False, soft_wrap=True)
