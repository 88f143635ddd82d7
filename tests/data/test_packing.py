"""Blocks of tokens."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from nestlearn.data import load_tokenizer, pack
from nestlearn.errors import UserError

BYTES = load_tokenizer("bytes")


@given(st.lists(st.text(min_size=1), min_size=1, max_size=5), st.integers(1, 9))
def test_blocks_are_the_joined_documents(documents, length):
    stream = list(documents[0].encode())
    for document in documents[1:]:
        stream += [256, *document.encode()]
    if len(stream) < length:
        with pytest.raises(UserError, match=f"{len(stream)} tokens and one sequence needs {length}"):
            pack(documents, BYTES, length)
        return
    packed = pack(documents, BYTES, length)
    assert len(packed) == len(stream) // length
    assert torch.cat([block["input_ids"] for block in packed]).tolist() == stream[: len(packed) * length]


def test_block_is_what_a_data_loader_takes():
    packed = pack(["abcdef"], BYTES, 3)
    assert packed.ids.dtype == np.uint16
    batch = next(iter(torch.utils.data.DataLoader(packed, batch_size=2)))
    assert batch["input_ids"].dtype == torch.int64
    assert torch.equal(batch["input_ids"], batch["labels"])
    batch["labels"][0] = -100
    assert packed[0]["input_ids"].tolist() == [97, 98, 99]


def test_error_names_the_text():
    with pytest.raises(UserError, match="the validation text has 0 tokens"):
        pack([], BYTES, 4, name="validation")
