"""Documents packed into blocks of one sequence length, for training and for the evaluation during it."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerBase

from nestlearn.data.streams import token_units
from nestlearn.errors import UserError


class PackedTokens(Dataset):
    """Token blocks without padding: ``[i]`` is ``{"input_ids": (T,), "labels": (T,)}``, both the same tokens.

    The model shifts the labels. The last tokens of a split, fewer than T, are in no block.
    """

    def __init__(self, ids: np.ndarray) -> None:
        self.ids = ids  # (blocks, T), uint16 or int32

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        block = torch.from_numpy(self.ids[index].astype(np.int64))
        return {"input_ids": block, "labels": block.clone()}


def pack(
    documents: Iterable[str], tokenizer: PreTrainedTokenizerBase, sequence_length: int, *, name: str = "train"
) -> PackedTokens:
    """Tokenise documents, join them with eos and cut the stream into blocks of ``sequence_length`` tokens.

    Two bytes a token are held in memory (four if the vocabulary exceeds 65,536). ``name`` is what errors call
    the text. Raises `UserError` if the text is shorter than one block.

    >>> from nestlearn.data import load_tokenizer
    >>> pack(["abc", "de"], load_tokenizer("bytes"), 3)[1]["input_ids"]
    tensor([256, 100, 101])
    """
    small = len(tokenizer) <= 1 << 16
    parts = [np.empty(0, np.uint16 if small else np.int32)]
    parts += [unit.ids.astype(parts[0].dtype) for unit in token_units(documents, tokenizer)]
    ids = np.concatenate(parts)
    blocks = len(ids) // sequence_length
    if blocks == 0:
        raise UserError(
            f"the {name} text has {len(ids)} tokens and one sequence needs {sequence_length}: "
            "give more text or a smaller sequence_length"
        )
    return PackedTokens(ids[: blocks * sequence_length].reshape(blocks, sequence_length))
