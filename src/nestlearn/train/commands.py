"""``nestlearn train``, ``eval``, ``generate`` and ``levels``. Heavy imports are inside."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from nestlearn.errors import UserError
from nestlearn.json_option import Json, print_json
from nestlearn.tasks.commands import evaluate_suite

MODEL = "A run folder, a folder of save_pretrained or of nestlearn convert, or smollm2."


def train(
    preset: Annotated[str | None, typer.Option(help="A recipe that comes with the package: tiny.")] = None,
    config: Annotated[Path | None, typer.Option(help="A recipe file; RUN/run.toml repeats a run.")] = None,
    data: Annotated[
        str | None, typer.Option(help="Train on this: stdlib, a file, a folder or hf:NAME.", metavar="SOURCE")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="The run folder. By default the next runs/NAME-NUMBER.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or the last one of that name.")
    ] = False,
    seed: Annotated[int | None, typer.Option(help="Of the first weights and the order of the data.")] = None,
    tokens: Annotated[int | None, typer.Option(help="The budget of each model, in tokens.")] = None,
    as_json: Json = False,
) -> None:
    """Train a model and the baseline beside it.

    Everything but these options stands in the recipe. The run folder holds the model as from_pretrained reads it,
    metrics.jsonl, curves.png, result.json and run.toml, the full recipe.

    torchrun --nproc-per-node N --no-python nestlearn train ... shares each batch between N processes.

    Example: nestlearn train --preset tiny --data book.txt
    """
    from nestlearn.train.recipe import load_preset, load_recipe

    if preset is not None and config is not None:
        raise UserError("--preset and --config are two recipes: give one of them")
    if preset is not None:
        recipe, name = load_preset(preset), preset
    elif config is not None:
        recipe, name = load_recipe(config), config.stem
    elif resume and out is not None:
        if not (out / "run.toml").is_file():
            raise UserError(f"{out} holds no run to resume (run.toml is missing): check --out")
        recipe, name = load_recipe(out / "run.toml"), out.name
    else:
        raise UserError("no recipe: give --preset tiny or --config FILE, or --resume with --out")
    if data is not None:
        recipe = recipe.replace("data", source=data)
    if seed is not None:
        recipe = recipe.replace(seed=seed)
    if tokens is not None:
        recipe = recipe.replace("train", tokens=tokens)

    first = os.environ.get("RANK", "0") == "0"  # of the processes that torchrun starts
    try:
        from nestlearn.train import run

        result = run.train(recipe, out or _run_folder(Path("runs"), name, resume), resume)
    except KeyboardInterrupt as stop:  # without a message while the imports go on
        kept = "the run is as it was" if resume else "nothing was saved"
        if first:
            print(str(stop) or f"interrupted before the first step: {kept}", file=sys.stderr)
        raise SystemExit(130) from stop
    if not first:
        return
    if as_json:
        print_json(result)
    else:
        _print_result(result)


def evaluate(
    model: Annotated[Path | None, typer.Argument(help=MODEL)] = None,
    data: Annotated[
        str | None,
        typer.Option(
            help="Read this: stdlib, a file, a folder or hf:NAME. Of a suite: a folder, else NESTLEARN_DATA.",
            metavar="SOURCE",
        ),
    ] = None,
    context: Annotated[
        int | None, typer.Option(help="Tokens the model sees at a time. By default its training length.")
    ] = None,
    stride: Annotated[int | None, typer.Option(help="Tokens between two windows. By default --context.")] = None,
    carry_state: Annotated[
        bool, typer.Option("--carry-state", help="Read the text in one pass; memory stays constant (recurrent blocks).")
    ] = False,
    suite: Annotated[
        str | None,
        typer.Option(
            help="In place of MODEL: core, the paper's models; continual, a pretrained one that keeps learning."
        ),
    ] = None,
    scale: Annotated[
        str | None, typer.Option(help="Of a suite: cpu (the default), gpu, or smoke to see that everything works.")
    ] = None,
    only: Annotated[str | None, typer.Option(help="Of a suite: some of its tasks.", metavar="NAME,NAME")] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="Of a suite: its folder, where it goes on. By default runs/eval-SUITE[-SCALE]."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Of a suite: runs at a time, by default 2.")] = None,
    as_json: Json = False,
) -> None:
    """Measure a model on text, or run the paper's evaluations.

    MODEL: perplexity and bits per byte. Of data with a validation split that split is read, of other data everything.

    Of a suite finished runs are kept at once, so after Ctrl-C or a crash the same command goes on. The folder holds
    report/report.html and report.md with every table beside the paper's, and the result of each run in cells/.

    Example: nestlearn eval runs/tiny-1 --data book.txt --context 512 --stride 256
    """
    of_suite = {"--scale": scale, "--only": only, "--out": out, "--workers": workers}
    of_model = {"MODEL": model, "--context": context, "--stride": stride, "--carry-state": carry_state or None}
    strange = [name for name, value in (of_model if suite is not None else of_suite).items() if value is not None]
    if suite is not None:
        if strange:
            raise UserError(f"{strange[0]} is not for --suite: leave one of them out")
        evaluate_suite(suite, scale or "cpu", data, only, out, 2 if workers is None else workers, as_json)
        return
    if model is None:
        raise UserError("nothing to evaluate: give MODEL and --data, or --suite core")
    if strange:
        raise UserError(f"{strange[0]} is for --suite, not for a model: leave it out, or give --suite core")
    if data is None:
        raise UserError("Missing option '--data': give the text to read")
    from nestlearn.data import stream_documents
    from nestlearn.train.evaluate import evaluate_text
    from nestlearn.train.positions import longest

    split, documents = stream_documents(data)
    loaded, tokenizer = _load(model)
    length = context if context is not None else longest(loaded)
    if length is None:
        raise UserError(f"{model} does not say how long a text it takes: give --context N")
    result = evaluate_text(loaded, tokenizer, documents, context_length=length, stride=stride, carry_state=carry_state)
    if as_json:
        print_json({"model": str(model), "data": data, "split": split, **result})
        return
    print(f"perplexity     {result['perplexity']:.4f}")
    print(f"bits per byte  {result['bits_per_byte']:.4f}")
    print(f"read           {data} ({split}): {result['tokens']:,} tokens, {result['bytes']:,} bytes")
    print(f"protocol       {result['protocol']}")


def generate(
    model: Annotated[Path, typer.Argument(help=MODEL)],
    prompt: Annotated[str, typer.Option(help="The text to continue; - reads it from standard input.")],
    max_new_tokens: Annotated[int, typer.Option(help="Stop after so many tokens.")] = 256,
    temperature: Annotated[float, typer.Option(help="Divides the logits; 0 takes the likeliest token.")] = 0.8,
    top_p: Annotated[float, typer.Option(help="Sample from this share of the probability.")] = 1.0,
    seed: Annotated[int | None, typer.Option(help="The same text for the same seed.")] = None,
    as_json: Json = False,
) -> None:
    """Continue a text, printed as it comes.

    Example: nestlearn generate runs/tiny-1 --prompt "def main("
    """
    given = _read_stdin() if prompt == "-" else prompt  # before the slow imports

    from nestlearn.train.generate import generate_text

    loaded, tokenizer = _load(model)

    waiting = [given]  # the prompt is printed with the first text, so that a bad option prints nothing else

    def show(text: str) -> None:
        print("".join([*waiting, text]), end="", flush=True)
        waiting.clear()

    text = generate_text(
        loaded,
        tokenizer,
        given,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        on_text=None if as_json else show,
    )
    if as_json:
        print_json({"model": str(model), "prompt": given, "text": text})
    else:
        show("\n")


def levels(
    model: Annotated[
        str,
        typer.Argument(
            help="A run folder, a folder of save_pretrained or of nestlearn convert, smollm2, a recipe or a preset."
        ),
    ],
    optimizer: Annotated[
        str | None, typer.Option(help="Train with this one, as in a recipe. By default the recipe's own.")
    ] = None,
    picture: Annotated[Path | None, typer.Option(help="Draw the levels to this file.", metavar="FILE.png")] = None,
    as_json: Json = False,
) -> None:
    """Show a model and its optimizer as nested memories, each at its own update frequency.

    No weight is read, so a model of any size is described at once; of a converted model they are read.

    Example: nestlearn levels tiny --optimizer m3 --picture levels.png
    """
    from nestlearn.levels import describe
    from nestlearn.train.structure import load_structure

    found = load_structure(model, optimizer)
    description = describe(found.model, found.optimizer, tokens_per_step=found.tokens_per_step)
    if picture is not None:
        description.draw(picture)
    print(description.to_json() if as_json else description)


def _run_folder(parent: Path, name: str, resume: bool) -> Path:
    """The first of ``NAME-1``, ``NAME-2``, ... that does not exist; the one before it to resume."""
    number = 1
    while (parent / f"{name}-{number}").exists():
        number += 1
    return parent / f"{name}-{max(1, number - 1) if resume else number}"


def _load(folder: Path) -> Any:
    """Model and tokenizer, without transformers' bar for the loading of the weights."""
    from transformers.utils import logging

    from nestlearn.train import loading

    logging.disable_progress_bar()
    return loading.load_model(folder)


def _read_stdin() -> str:
    try:
        if sys.stdin is None:
            raise UserError("--prompt - reads standard input, which is closed: pipe the text in")
        return sys.stdin.buffer.read().decode()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not UTF-8 text (byte {error.start}): convert it") from error
    except OSError as error:
        raise UserError(f"cannot read standard input ({error.strerror}): pipe the text in") from error


def _print_result(result: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    console.print(f"\ntrained on {result['data']}", markup=False, soft_wrap=True)
    table = Table(caption=f"validation: {result['models'][0]['validation']['protocol']}", caption_justify="left")
    for column in ("model", "parameters", "tokens", "perplexity", "bits/byte", "tokens/s"):
        table.add_column(column, justify="left" if column == "model" else "right", no_wrap=True)
    for entry in result["models"]:
        validation = entry["validation"]
        table.add_row(
            entry["model"],
            f"{entry['parameters']:,}",
            f"{entry['tokens']:,}",
            f"{validation['perplexity']:.3f}",
            f"{validation['bits_per_byte']:.3f}",
            f"{entry['tokens_per_second']:,.0f}",
        )
    console.print(table)
    sample = result["sample"]
    console.print(f"\n[bold]sample of {result['models'][0]['model']}[/bold]")
    console.print(sample["prompt"], style="dim", markup=False, end="")
    console.print(sample["text"], markup=False)
    console.print(f"\nrun folder: {result['folder']}", markup=False, soft_wrap=True)
