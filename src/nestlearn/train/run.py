"""A training run: the model of a recipe, and the baseline beside it, into one folder.

RUN/run.toml            the full recipe: ``nestlearn train --config RUN/run.toml`` repeats the run
RUN/config.json, RUN/model.safetensors, tokenizer files: for ``AutoModelForCausalLM.from_pretrained(RUN)``
RUN/metrics.jsonl       a line a log event
RUN/result.json         parameters, tokens per second, validation perplexity and bits per byte, a sample; of a run whose
                        numbers became NaN or infinite, at which step, and its last losses
RUN/curves.png          loss against tokens of every model
RUN/baseline/           the same for the baseline
RUN/checkpoints/        while it runs: what ``--resume`` continues from
"""

from __future__ import annotations

import dataclasses
import errno
import hashlib
import os
import shlex
import shutil
import statistics
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch.utils.data import Subset
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase, PrinterCallback, set_seed

from nestlearn.data import (
    SOURCE_KEYWORDS,
    TOKENIZER_KEYWORDS,
    Corpus,
    PackedTokens,
    absolute,
    load_corpus,
    load_tokenizer,
    pack,
)
from nestlearn.errors import UserError, require_extra
from nestlearn.files import alone, make_readable, read_json, sync_file, write_atomic, write_json
from nestlearn.train.baseline import matching_config
from nestlearn.train.callbacks import Interrupt, Metrics, Progress, Throughput, read_metrics
from nestlearn.train.checkpoint import list_checkpoints, step_of, sweep, verify
from nestlearn.train.curves import plot_curves
from nestlearn.train.evaluate import NotFinite, evaluate_text
from nestlearn.train.generate import generate_text
from nestlearn.train.model import architecture, build, count_parameters, model_config, parameter_count, resolved_options
from nestlearn.train.processes import check_shares, join
from nestlearn.train.recipe import BaselineRecipe, ModelRecipe, Recipe, differences, dump, load_recipe
from nestlearn.train.sharding import shard, whole_model
from nestlearn.train.trainer import RECIPE, LanguageModelTrainer, check_weights, export, training_arguments

RESULT, METRICS, CURVES = "result.json", "metrics.jsonl", "curves.png"
CHECKPOINTS, BASELINE, LOCK = "checkpoints", "baseline", ".lock"
ENTRY = {"model", "folder", "parameters", "steps", "tokens", "learning_rate", "tokens_per_second", "validation"}


class Interrupted(KeyboardInterrupt):
    """The run was stopped by Ctrl-C; the message says how to resume it."""


class Data(NamedTuple):
    """What both models read: the corpus, its tokens in training blocks, and a hash that names them."""

    corpus: Corpus
    tokenizer: PreTrainedTokenizerBase
    train: PackedTokens
    validation: PackedTokens
    fingerprint: str


class Phase(NamedTuple):
    """One model of the run: its folder, the recipe that would train it alone, and its architecture."""

    folder: Path
    recipe: Recipe
    config: PreTrainedConfig

    @property
    def name(self) -> str:
        return self.recipe.model.kind


def train(recipe: Recipe, out: str | Path, resume: bool = False) -> dict[str, Any]:
    """Train what ``recipe`` says into the folder ``out`` and return what ``result.json`` holds.

    With ``resume`` the run in ``out`` is continued from its last checkpoint; on a CPU the final weights are
    those of an uninterrupted run to the bit. Raises `UserError` for everything a user can put right (a folder
    that holds something else, bad data, a damaged checkpoint, a full disk, a loss that is not finite),
    `Interrupted` after Ctrl-C, and ``BrokenPipeError`` when nobody reads the progress bar any more.

    >>> result = train(load_preset("tiny"), "runs/tiny")                              # doctest: +SKIP
    >>> result["models"][0]["validation"]["bits_per_byte"]                            # doctest: +SKIP
    """
    out = Path(out)
    require_extra("accelerate", "training")  # the Trainer of transformers does
    require_extra("matplotlib", "the plot of a run")
    try:
        _check_folder(out, resume)
        recipe = resolve(recipe)
        if resume:
            _check_same_recipe(recipe, out)
        _ = recipe.steps  # raises before anything is read
        check_shares(recipe.train.batch_size)
        data = read_data(recipe)
        phases = _phases(recipe, data, out)
        join().wait_for_everyone()  # until all have looked at the folder
        busy = f"another process trains in {out}: wait for it, or give another folder with --out"
        first = join().is_main_process
        with alone(out / LOCK, busy) if first else nullcontext():
            if first and not resume:
                _check_folder(out, resume)  # again, as another process may have trained here in the meantime
                _write_recipe(recipe, out)
            return _run(recipe, phases, data, out)
    except KeyboardInterrupt as error:
        if not os.path.isfile(out / RECIPE):
            raise Interrupted("interrupted before the first step: nothing was saved") from error
        raise Interrupted(f"interrupted: {_kept(out)}; resume with: {resume_command(out)}") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise UserError(_file_error(error, out)) from error


def _file_error(error: OSError, out: Path) -> str:
    """What failed, what is left of the run, and how to go on."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    what = "the disk is full" if full else f"cannot write to {out} ({error.strerror or error})"
    if not os.path.isfile(out / RECIPE):  # unlike `Path.is_file`, False also for a name that is too long
        return f"{what}: {'free some space, or ' if full else ''}give another folder with --out"
    remedy = "free some space" if full else "put that right"
    return f"{what}: {_kept(out)}; {remedy} and resume with: {resume_command(out)}"


def resume_command(out: Path) -> str:
    """The command line that continues the run in ``out``.

    >>> resume_command(Path("runs/tiny"))
    'nestlearn train --resume --out runs/tiny'
    """
    return f"nestlearn train --resume --out {shlex.quote(str(out))}"


def resolve(recipe: Recipe) -> Recipe:
    """The same recipe with every default written out and paths made absolute, so that it can be run anywhere."""
    if recipe.model.kind == recipe.baseline.kind:
        raise UserError(f'baseline.kind is {recipe.baseline.kind!r} like the model: set it to "none"')
    source = absolute(recipe.data.source, SOURCE_KEYWORDS)
    tokenizer = absolute(recipe.data.tokenizer, TOKENIZER_KEYWORDS)
    resolved = recipe.replace("data", source=source, tokenizer=tokenizer).replace(
        "model", **resolved_options(recipe.model)
    )
    if recipe.baseline.kind != "none" and recipe.baseline.learning_rate is None:
        resolved = resolved.replace("baseline", learning_rate=recipe.train.learning_rate)
    return resolved


def read_data(recipe: Recipe) -> Data:
    """Corpus, tokenizer and blocks of a recipe. Raises `UserError` for data that cannot be trained on."""
    corpus = load_corpus(recipe.data.source)
    tokenizer = load_tokenizer(recipe.data.tokenizer, corpus)
    length = recipe.data.sequence_length
    train = pack(corpus.train, tokenizer, length)
    validation = pack(corpus.validation, tokenizer, length, name="validation")
    batch = recipe.train.batch_size
    if len(train) < batch:
        raise UserError(
            f"the train text has {len(train)} sequences of {length} tokens, less than one batch of {batch}: "
            "give more text, or lower data.sequence_length or train.batch_size"
        )
    fingerprint = hashlib.sha256(train.ids.tobytes()).hexdigest()
    return Data(corpus, tokenizer, train, validation, fingerprint)


def _check_folder(out: Path, resume: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is a file: give a folder for the run with --out")
    if resume and not (out / RECIPE).is_file():
        raise UserError(f"{out} holds no run to resume ({RECIPE} is missing): check --out, or leave out --resume")
    if not resume and out.is_dir() and any(path.name != LOCK for path in out.iterdir()):
        raise UserError(f"{out} is not empty: add --resume to continue its run, or give another folder with --out")


def _check_same_recipe(recipe: Recipe, out: Path) -> None:
    stored = load_recipe(out / RECIPE)
    if resolve(stored) != stored:  # emptied or shortened: what is missing would become a default
        found = list_checkpoints(out / CHECKPOINTS)
        remedy = f"copy {found[-1] / RECIPE} over it" if found else "restore it, or start a new run in another folder"
        raise UserError(f"{out / RECIPE} is no longer the full recipe that the run began with: {remedy}")
    keys = differences(recipe, stored)
    if keys:
        raise UserError(
            f"{out} was started with another recipe ({', '.join(keys[:3])} differ): resume with "
            f"'{resume_command(out)}', or start a new run in another folder"
        )


def _kept(out: Path) -> str:
    """Where the newest checkpoint of a run is, in words."""
    found = [*list_checkpoints(out / CHECKPOINTS), *list_checkpoints(out / BASELINE / CHECKPOINTS)]
    if found:
        return f"the last checkpoint is {found[-1]}"
    return "its model is finished" if _is_finished(out) else "there is no checkpoint yet"


def _is_finished(out: Path) -> bool:
    try:
        return _read_result(out) is not None
    except UserError:  # damaged, which is told where it is read
        return True


def _phases(recipe: Recipe, data: Data, out: Path) -> list[Phase]:
    """The model, and the baseline if there is one. Raises `UserError` for a model that cannot be built."""
    config = model_config(recipe.model, data.tokenizer, recipe.data.sequence_length)
    parameters = parameter_count(config)
    phases = [Phase(out, recipe, config)]
    if recipe.baseline.kind != "none":
        beside = matching_config(config, parameters)
        model = ModelRecipe(recipe.baseline.kind, architecture(beside, recipe.baseline.kind))
        alone = dataclasses.replace(recipe, model=model, baseline=BaselineRecipe())
        alone = alone.replace("train", learning_rate=recipe.baseline.learning_rate)
        phases.append(Phase(out / BASELINE, alone, beside))
    return phases


def _run(recipe: Recipe, phases: list[Phase], data: Data, out: Path) -> dict[str, Any]:
    first = join().is_main_process  # the others compute, and read what it writes
    results = []
    for phase in phases:
        if _read_result(phase.folder) is None:
            if phase.folder != out:
                _write_recipe(phase.recipe, phase.folder)
            try:
                _train_phase(phase, data)
            except NotFinite as error:
                if first:
                    write_json(phase.folder / RESULT, _diverged_result(error, phase, data))
                raise UserError(_diverged(error, phase, phases[0])) from error
        result = _read_result(phase.folder)
        assert result is not None
        results.append(result)
        if first:
            shutil.rmtree(phase.folder / CHECKPOINTS, ignore_errors=True)
    entries = [result["models"][0] | {"folder": name} for result, name in zip(results, (".", BASELINE), strict=False)]
    whole = results[0] | {"models": entries}
    if first:
        write_json(out / RESULT, whole)
        rows = {entry["model"]: read_metrics(out / entry["folder"] / METRICS) for entry in entries}
        plot_curves(out / CURVES, rows, f"{' and '.join(rows)} on {Path(recipe.data.source).name}")
    return whole | {"folder": str(out)}


def _diverged(error: NotFinite, phase: Phase, first: Phase) -> str:
    """What became of a phase whose numbers are not finite, and of the model before it."""
    what = f"{error} of {phase.recipe.steps}: {_kept(phase.folder)}"
    if phase is first:
        return f"{what}; start again with a lower learning rate"
    return (
        f"the baseline {phase.name} diverged: {what}; the model {first.name} is finished, in {first.folder}; "
        "for both start again with a lower baseline.learning_rate"
    )


def _diverged_result(error: NotFinite, phase: Phase, data: Data) -> dict[str, Any]:
    """What is known of a phase that ended early; `_read_result` does not take it for a finished one."""
    rows = read_metrics(phase.folder / METRICS)
    last = [row for row in rows if "loss" in row][-3:] + [row for row in rows if "eval_loss" in row][-1:]
    entry = {
        "model": phase.name,
        "folder": ".",
        "parameters": parameter_count(phase.config),
        "steps": phase.recipe.steps,
        "learning_rate": phase.recipe.train.learning_rate,
        "diverged": {"reason": str(error), "step": error.step, "last": last},
    }
    return {"data": data.corpus.description, "models": [entry]}


def _write_recipe(recipe: Recipe, folder: Path) -> None:
    if join().is_main_process:
        write_atomic(folder / RECIPE, lambda path: path.write_text(dump(recipe), encoding="utf-8"))


def _read_result(folder: Path) -> dict[str, Any] | None:
    """What a finished phase wrote; None before, and after it has diverged."""
    path = folder / RESULT
    if not path.exists():
        return None
    remedy = "delete it and resume again, then what it held is computed anew"
    result = read_json(path, remedy)
    models = result.get("models")
    if isinstance(models, list) and models and isinstance(models[0], dict) and "diverged" in models[0]:
        return None
    described = isinstance(models, list) and models and all(isinstance(m, dict) and m.keys() >= ENTRY for m in models)
    if not described or not result.keys() >= {"data", "sample"}:
        raise UserError(f"{path} is damaged (it describes no model): {remedy}")
    return result


def _train_phase(phase: Phase, data: Data) -> None:
    """Train one model, from its last checkpoint if there is one, until its ``result.json`` is there."""
    here, recipe = join(), phase.recipe
    checkpoints = phase.folder / CHECKPOINTS
    if here.is_main_process:
        sweep(checkpoints)
    here.wait_for_everyone()
    if here.is_main_process:
        (phase.folder / RESULT).unlink(missing_ok=True)  # of an earlier try, which diverged
    last = max(list_checkpoints(checkpoints), key=step_of, default=None)
    if last is not None:
        verify(last)
    set_seed(recipe.seed)
    model = build(phase.config)
    if recipe.train.sharded and here.num_processes > 1:
        shard(model)
    throughput, interrupt = Throughput(), Interrupt()
    progress = Progress(phase.name, throughput)
    trainer = LanguageModelTrainer(
        model=model,
        args=training_arguments(recipe, checkpoints),
        train_dataset=data.train,
        eval_dataset=_spread(data.validation, recipe.train.eval_tokens),
        tokenizer=data.tokenizer,
        recipe=recipe,
        fingerprint=data.fingerprint,
        callbacks=[throughput, Metrics(phase.folder / METRICS, phase.name, throughput), progress, interrupt],
    )
    trainer.remove_callback(PrinterCallback)
    if last is not None and step_of(last) >= recipe.steps:  # killed between the last step and the result
        trainer._load_from_checkpoint(str(last))
    else:
        try:
            with interrupt:
                trainer.train(resume_from_checkpoint=None if last is None else str(last))
        finally:
            progress.close()
        if interrupt.requested:
            raise KeyboardInterrupt
    check_weights(model, recipe.steps)
    model = whole_model(model)
    if here.is_main_process:
        write_json(phase.folder / RESULT, _finish(phase, data, model))
    here.wait_for_everyone()


def _spread(blocks: PackedTokens, tokens: int) -> Subset:
    """About ``tokens`` tokens of the blocks, taken at even distances."""
    count = min(len(blocks), max(1, tokens // blocks.ids.shape[1]))
    return Subset(blocks, [i * len(blocks) // count for i in range(count)])


def _finish(phase: Phase, data: Data, model: PreTrainedModel) -> dict[str, Any]:
    """Evaluate the trained model, publish its files and describe it."""
    model.eval()
    model.config.use_cache = True
    rates = [row["tokens_per_second"] for row in read_metrics(phase.folder / METRICS) if "loss" in row]
    entry = {
        "model": phase.name,
        "folder": ".",
        "parameters": count_parameters(model),
        "steps": phase.recipe.steps,
        "tokens": phase.recipe.steps * phase.recipe.tokens_per_step,
        "learning_rate": phase.recipe.train.learning_rate,
        "tokens_per_second": statistics.median(rates or [0.0]),
        "validation": _validate(model, phase, data),
    }
    sample = _sample(model, phase, data)
    _publish(model, data, phase.folder)
    return {"data": data.corpus.description, "models": [entry], "sample": sample}


def _validate(model: PreTrainedModel, phase: Phase, data: Data) -> dict[str, Any]:
    try:
        return evaluate_text(
            model,
            data.tokenizer,
            data.corpus.validation,
            context_length=phase.recipe.data.sequence_length,
            batch_size=phase.recipe.train.batch_size,
            max_tokens=phase.recipe.train.final_eval_tokens,
        )
    except NotFinite as error:
        raise NotFinite("the validation loss became infinite or too large", phase.recipe.steps) from error


def _sample(model: PreTrainedModel, phase: Phase, data: Data) -> dict[str, str]:
    """How the model goes on after the first words of the validation text."""
    prompt = data.corpus.validation[0].lstrip()[:40].rpartition(" ")[0]
    text = generate_text(model, data.tokenizer, prompt, max_new_tokens=200, temperature=0.8, seed=phase.recipe.seed)
    return {"prompt": prompt, "text": text}


def _publish(model: PreTrainedModel, data: Data, folder: Path) -> None:
    """Put the model's files into the run folder, each complete when it appears, the weights last."""
    beside = folder / ".export"
    shutil.rmtree(beside, ignore_errors=True)
    try:
        export(model, data.tokenizer, beside)
        for path in sorted(beside.iterdir(), key=lambda path: path.name == "model.safetensors"):
            make_readable(path)
            sync_file(path)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
    sync_file(folder)
