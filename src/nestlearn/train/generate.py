"""Text that continues a prompt, given out as it comes."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TextStreamer,
)

from nestlearn.convert import ContinualModel
from nestlearn.data.text_files import is_undecoded
from nestlearn.errors import UserError
from nestlearn.train.positions import check_positions

COLDEST = 1e-4  # below it, logits divided by the temperature may overflow, and the most likely token is certain


class _Finite(LogitsProcessor):
    """Refuses logits that no token can be chosen from."""

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if not scores.amax().isfinite():
            raise UserError("the model's logits are not finite (NaN or infinite): use another checkpoint")
        return scores


class _Relay(TextStreamer):
    """Hands finished text to a function.

    The base class holds text back until a space, a line end or a CJK character follows, so a character whose
    bytes are not all there is never given out; one that is cut off by the end of the generation is dropped.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, on_text: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.on_text = on_text

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text.rstrip("\N{REPLACEMENT CHARACTER}") if stream_end else text
        if text:
            self.on_text(text)


def check_options(max_new_tokens: int, temperature: float, top_p: float, seed: int | None) -> None:
    """Raises `UserError` for what `generate_text` does not take.

    >>> check_options(256, temperature=0.7, top_p=0.95, seed=None)
    """
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens}: give 1 or more")
    if not 0 <= temperature < math.inf:
        raise UserError(f"temperature={temperature}: give 0 (the most likely token) or more")
    if not 0 < top_p <= 1:
        raise UserError(f"top_p={top_p}: give a share above 0, at most 1")
    if seed is not None and not 0 <= seed < 2**64:
        raise UserError(f"seed={seed}: give 0 to {2**64 - 1}")


def generate_text(
    model: PreTrainedModel | ContinualModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    max_new_tokens: int = 256,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """Continue ``prompt`` until the model ends the document or ``max_new_tokens`` are made; the new text.

    ``on_text`` is called with every finished piece of it, in the thread of the caller. An empty prompt
    begins a document. ``temperature``: divides the logits; 0 (or below 1e-4) takes the most likely token each time.
    ``top_p``: the share of the probability, from the top, that is sampled from. ``seed``: the same text for
    the same seed; the random state of the caller is left alone if it is given. What ``model.generation_config``
    says has no effect. Raises `UserError` for values out of range, for more tokens than the model has positions, and
    for logits that are not finite.

    >>> import transformers; from nestlearn.data import load_tokenizer
    >>> model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=258, hidden_size=8,
    ...     intermediate_size=8, num_hidden_layers=1, num_attention_heads=1))
    >>> text = generate_text(model, load_tokenizer("bytes"), "def ", max_new_tokens=2, seed=0)
    """
    check_options(max_new_tokens, temperature, top_p, seed)
    owner: Any = model.base if isinstance(model, ContinualModel) else model  # of the configuration
    inputs = _inputs(tokenizer, prompt)
    length = inputs["input_ids"].shape[1]
    asked = f"a prompt of {length:,} tokens with max_new_tokens={max_new_tokens}"
    check_positions(owner, length + max_new_tokens - 1, asked)  # the last token that is made is not read
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=pad,
        **(sampling if temperature >= COLDEST else {"do_sample": False}),
    )
    pieces: list[str] = []

    def relay(text: str) -> None:
        pieces.append(text)
        if on_text is not None:
            on_text(text)

    generator: Any = model  # for the type checker every attribute of a module is a tensor
    cuda = [model.device] if model.device.type == "cuda" else []
    own, owner.generation_config = owner.generation_config, config  # it would fill in what ours leaves out
    try:
        with torch.random.fork_rng(devices=cuda, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            generator.generate(
                **{name: value.to(model.device) for name, value in inputs.items()},
                generation_config=config,
                logits_processor=LogitsProcessorList([_Finite()]),
                streamer=_Relay(tokenizer, relay),
            )
    finally:
        owner.generation_config = own
    return "".join(pieces)


def _inputs(tokenizer: PreTrainedTokenizerBase, prompt: str) -> dict[str, torch.Tensor]:
    """``input_ids`` and ``attention_mask`` (1, T) of a prompt; of the start token if it is empty."""
    if is_undecoded(prompt):
        raise UserError("the prompt is not UTF-8: give it in UTF-8")
    ids = tokenizer(prompt)["input_ids"]
    if not ids:
        start = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
        if start is None:
            raise UserError("the tokenizer has no token that begins a document: give a prompt")
        ids = [start]
    row = torch.tensor([ids])
    return {"input_ids": row, "attention_mask": torch.ones_like(row)}
