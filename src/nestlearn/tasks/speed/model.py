"""Whole models: a training step and the reading of a prompt, Hope beside a Llama of as many parameters with SDPA."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from nestlearn.models.hope import HopeConfig
from nestlearn.tasks.speed.timing import AGAIN, Run, ceilings, in_turns, machine, rates, rows
from nestlearn.train.baseline import matching_config
from nestlearn.train.model import count_parameters, parameter_count

HOPE, LLAMA = "Hope", "Llama, SDPA"
SIZES = {
    "nano": dict(
        vocab_size=64,
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=48,
        chunk_size=16,
    ),
    "25m": dict(vocab_size=4096, hidden_size=512, num_hidden_layers=6, num_attention_heads=8, intermediate_size=1536),
}  # beside the preset "tiny"


def configuration(size: str) -> HopeConfig:
    """Of the preset ``"tiny"``, or of one of `SIZES`."""
    if size in SIZES:
        return HopeConfig(**SIZES[size], tie_word_embeddings=True)  # type: ignore[arg-type]
    from nestlearn.train.structure import load_structure

    return load_structure(size).model.config  # type: ignore[return-value]


def pair(size: str) -> dict[str, PreTrainedModel]:
    """Fresh models of equal size, within 2 %.

    >>> [model.num_parameters() for model in pair("nano").values()]
    [5188, 5168]
    """
    torch.manual_seed(0)
    config = configuration(size)
    beside = matching_config(config, parameter_count(config))
    return {
        HOPE: AutoModelForCausalLM.from_config(config),
        LLAMA: AutoModelForCausalLM.from_config(beside, attn_implementation="sdpa"),
    }


def train(size: str, seq: int, rounds: int, budget: float, product: int, megabytes: int) -> dict[str, Any]:
    """A cell: one step of AdamW (fused) on one sequence of ``seq`` tokens, float32.

    Returns ``machine``, ``ceilings``, ``parameters`` by model, and ``rows``.
    """
    before, models = machine(), pair(size)
    tokens = torch.randint(models[HOPE].config.vocab_size, (1, seq))
    runs: dict[str, Run] = ceilings(product, megabytes)
    runs |= {name: _step(model, tokens) for name, model in models.items()}
    runs[HOPE + AGAIN] = runs[HOPE]
    seconds = in_turns(runs, rounds, budget)
    return {
        "machine": before,
        "ceilings": rates(seconds, product, megabytes),
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "rows": rows(seconds, [LLAMA], seq),
    }


@torch.no_grad()
def prefill(size: str, tokens: int, rounds: int, budget: float) -> dict[str, Any]:
    """A cell: a prompt of ``tokens`` tokens read into a fresh cache, and the logits of its last token."""
    before, models = machine(), pair(size)
    prompt = torch.randint(models[HOPE].config.vocab_size, (1, tokens))
    runs: dict[str, Run] = {
        name: lambda model=model: model.eval()(input_ids=prompt, use_cache=True, logits_to_keep=1)
        for name, model in models.items()
    }
    runs[HOPE + AGAIN] = runs[HOPE]
    seconds = in_turns(runs, rounds, budget)
    return {
        "machine": before,
        "parameters": {name: count_parameters(model) for name, model in models.items()},
        "rows": rows(seconds, [LLAMA], tokens),
    }


def _step(model: PreTrainedModel, tokens: torch.Tensor) -> Run:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    model.train()

    def run() -> None:
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return run
