"""The accuracy tasks of table 2 through lm-eval, in process and offline, on files of the data folder.

Every task is scored without examples in the prompt, by the likelihood of its answers: LAMBADA's last word has to be the
most likely continuation, of several choices the most likely one counts, for HellaSwag and ARC-challenge the most likely
by character, as in the paper. The files hold prompts that are already written out. One is not what the paper has: SIQA
comes with two choices instead of three, given as letters.
"""

from __future__ import annotations

import contextlib
import io
import json
import logging
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nestlearn.errors import UserError
from nestlearn.tasks.core.paper import TABLE_2_COLUMNS

INSTALL = "not run: pip install 'nestlearn[eval]'"
ANSWER = {"doc_to_text": "{{query.rstrip()}}\nAnswer:", "doc_to_target": "gold", "doc_to_choice": "choices"}
# By column of table 2: the file, the metric, and how lm-eval makes prompt and answers of a row.
TASKS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lambada": (
        "lambada/lambada_openai.jsonl",
        "acc",
        {"doc_to_text": "{{context}}", "doc_to_target": "{{' ' + continuation}}", "output_type": "loglikelihood"},
    ),
    "piqa": ("commonsense/piqa.jsonl", "acc", ANSWER),
    "hellaswag": (
        "hellaswag/hellaswag_val.jsonl",
        "acc_norm",
        {"doc_to_text": "{{ctx}}", "doc_to_target": "label", "doc_to_choice": "endings"},
    ),
    # Two prompts and one continuation: the text is the number of the right prompt.
    "winogrande": (
        "commonsense/winogrande.jsonl",
        "acc",
        {"doc_to_text": "gold", "doc_to_target": "continuation", "doc_to_choice": "context_options"},
    ),
    "arc-easy": ("commonsense/arc_easy.jsonl", "acc", ANSWER),
    "arc-challenge": ("commonsense/arc_challenge.jsonl", "acc_norm", ANSWER),
    "siqa": ("commonsense/siqa.jsonl", "acc", {**ANSWER, "doc_to_text": "{{query}}"}),  # ends with "Answer:"
    "boolq": ("commonsense/boolq.jsonl", "acc", ANSWER),
}
LONGEST = (
    2048  # tokens that are read, of longer rows the last ones; nothing in a Hope model ends at its training length
)
LAMBADA_PERPLEXITY = "lambada ppl"


def missing() -> str | None:
    """Why nothing can be scored here, in one line; ``None`` if lm-eval is installed."""
    try:
        import lm_eval  # noqa: F401
    except ImportError:
        return INSTALL
    return None


def score(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    data: str | Path,
    examples: int | None = None,
    tasks: Sequence[str] = tuple(TASKS),
    batch: int = 16,
) -> dict[str, float]:
    """Accuracy in percent of a model by column of table 2, and the perplexity of LAMBADA's last words.

    Args:
        model: a causal language model; it is scored where its weights are.
        tokenizer: its tokenizer.
        data: the folder of real data. A task whose file is not there is left out.
        examples: of each task, the first ones of its file; ``None`` for all.
        tasks: names of `TASKS`.
        batch: sequences of one forward pass.

    Raises `UserError` if lm-eval is not installed or no file of ``tasks`` is there.

    >>> model, tokenizer = ...                                                     # doctest: +SKIP
    >>> score(model, tokenizer, "data", examples=100)["piqa"]                      # doctest: +SKIP
    """
    reason = missing()
    if reason is not None:
        raise UserError(f"accuracy tasks are {reason}")
    found = {name: Path(data) / TASKS[name][0] for name in tasks if (Path(data) / TASKS[name][0]).is_file()}
    if not found:
        raise UserError(f"{data} holds none of {', '.join(TASKS[name][0] for name in tasks)}: give the data folder")
    with tempfile.TemporaryDirectory() as folder:
        for name, path in found.items():
            # JSON is YAML. The data set's own cache would outlive the files it was made from.
            (Path(folder) / f"{name}.yaml").write_text(json.dumps(description(name, path, folder)))
        results = _evaluate(model, tokenizer, list(found), folder, examples, batch)
    scores = {name: 100 * float(results[name][f"{TASKS[name][1]},none"]) for name in found}
    if "lambada" in found:
        scores[LAMBADA_PERPLEXITY] = float(results["lambada"]["perplexity,none"])
    return {name: scores[name] for name in TABLE_2_COLUMNS if name in scores}


def description(name: str, path: Path, cache: str) -> dict[str, Any]:
    """The task of lm-eval for a column of table 2 and the file of its rows."""
    _, metric, fields = TASKS[name]
    mean = {"aggregation": "mean", "higher_is_better": True}
    metrics = [{"metric": metric, **mean}]
    if name == "lambada":
        metrics.append({"metric": "perplexity", "aggregation": "perplexity", "higher_is_better": False})
    return {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path.resolve())}, "cache_dir": cache},
        "test_split": "test",
        "output_type": "multiple_choice",
        "target_delimiter": " " if name != "lambada" else "",
        "metric_list": metrics,
        "metadata": {"version": 0},
        **fields,
    }


def _evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    names: list[str],
    folder: str,
    examples: int | None,
    batch: int,
) -> Mapping[str, Mapping[str, Any]]:
    import datasets
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    training, bars = model.training, datasets.is_progress_bar_enabled()
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    datasets.disable_progress_bars()
    model.eval()
    seeds = dict.fromkeys(("random_seed", "numpy_random_seed", "torch_random_seed"))  # None: they stay as they are
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # its bars, one a task and more
            found = simple_evaluate(
                model=HFLM(
                    pretrained=model,
                    tokenizer=tokenizer,  # type: ignore[arg-type]
                    backend="causal",
                    batch_size=batch,
                    max_length=LONGEST,
                ),
                tasks=list(names),
                task_manager=TaskManager(include_path=folder, include_defaults=False),
                limit=examples,
                bootstrap_iters=0,
                **seeds,
            )
    finally:
        model.train(training)
        if bars:
            datasets.enable_progress_bars()
    assert found is not None
    return found["results"]
