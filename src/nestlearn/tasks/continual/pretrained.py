"""The pretrained language model that learns, and for quick runs a tiny one with random weights."""

from __future__ import annotations

from typing import TYPE_CHECKING

from nestlearn.convert.pretrained import model_folder
from nestlearn.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TINY = "tiny"
CHAT = (  # of the tiny model
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def lacking_model(name: str) -> str | None:
    """Why a model cannot be had, in one line; ``None`` if it can.

    >>> lacking_model("tiny")
    """
    if name == TINY:
        return None
    try:
        folder = model_folder(name)
    except UserError as error:
        return str(error)
    return None if (folder / "config.json").exists() else f"{folder} holds no model"


def load_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer.

    Args:
        name: "tiny" (random weights, one byte a token), the name of a model that was pulled, or a folder.

    >>> model, tokenizer = load_model("tiny")
    >>> tokenizer("ab")["input_ids"]
    [97, 98]
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if name != TINY:
        folder = model_folder(name)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer is not None
        return AutoModelForCausalLM.from_pretrained(folder).to(device).eval(), tokenizer
    return _tiny()


def _tiny() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from nestlearn.data import load_tokenizer

    tokenizer = load_tokenizer("bytes")
    tokenizer.chat_template = CHAT
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=4,
        num_attention_heads=2,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return LlamaForCausalLM(config).eval(), tokenizer
