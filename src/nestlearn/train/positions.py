"""How many tokens a model can see: a learned table of positions ends, rotary ones only become unusual."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from nestlearn.errors import UserError

TABLES = ("wpe", "embed_positions", "position_embeddings")  # of GPT-2, OPT, BERT and their kin


def longest(model: nn.Module) -> int | None:
    """The tokens that a model's configuration says it sees; None if it says nothing."""
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)  # type: ignore[union-attr,operator]


def check_positions(model: PreTrainedModel, tokens: int, what: str) -> None:
    """Raise `UserError`, which calls them ``what``, if the model has a table of fewer positions than ``tokens``.

    >>> from transformers import GPT2Config, GPT2LMHeadModel
    >>> small = GPT2LMHeadModel(GPT2Config(vocab_size=8, n_positions=4, n_embd=8, n_layer=1, n_head=1))
    >>> check_positions(small, 4, "the prompt")
    """
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in TABLES and isinstance(module, nn.Embedding):
            most = min(module.num_embeddings, model.config.max_position_embeddings)
            if tokens > most:
                raise UserError(f"{what} takes {tokens:,} tokens: the model has positions for {most:,} in all")
