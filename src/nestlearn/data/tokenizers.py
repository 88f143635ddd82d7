"""Tokenizers: bytes (nothing to train), a byte-level BPE trained on the corpus, or any of Hugging Face's."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nestlearn.data.corpus import Corpus
from nestlearn.data.streams import text_units
from nestlearn.data.text_files import find_path
from nestlearn.errors import UserError

# One token begins and ends a document, as in GPT-2: a start token of its own would never be seen in packed
# training text, and so never be learned.
END = "<|endoftext|>"
PAD = "<|pad|>"
SPECIAL = (END, PAD)
TOKENIZER_KEYWORDS = ("bytes", "bpe")
FILES = ("tokenizer*", "*vocab*", "*.model", "*.tiktoken")  # of which a tokenizer's folder has some
LARGEST = 1_000_000  # tokens of a BPE vocabulary
ALLOWED = "'bytes', 'bpe:SIZE', or the folder or name of a Hugging Face tokenizer"


def load_tokenizer(spec: str, corpus: Corpus | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer that ``spec`` names.

    ``"bytes"``: ids 0 to 255 are the bytes of UTF-8, 256 begins and ends a document, 257 pads.
    ``"bpe:SIZE"``: byte-level BPE of at most SIZE tokens (fewer if no more pairs occur twice in the text),
    trained on ``corpus.train``, the same for the same text. Anything else goes to ``AutoTokenizer``.

    Text is only text for the first two: a document that spells ``<|endoftext|>`` gives no special token, and
    ``decode(encode(text)) == text`` for every string. Raises `UserError` for a spec that is none of these.

    >>> load_tokenizer("bytes").encode("né")
    [110, 195, 169]
    """
    if spec == "bytes":
        return _wrap(_byte_level(models.BPE(vocab=_byte_vocabulary(), merges=[]), words=False))
    if spec.partition(":")[0] == "bpe":
        return _train_bpe(spec, corpus)
    path = find_path(spec, "tokenizer")
    if spec and path.is_dir():
        return read_tokenizer(path)
    if not spec or difflib.get_close_matches(spec, TOKENIZER_KEYWORDS, n=1, cutoff=0.7):
        raise UserError(f"unknown tokenizer {spec!r}: give {ALLOWED}")
    return _from_pretrained(spec, f"cannot load tokenizer {spec!r} (give {ALLOWED})")


def read_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer that ``save_pretrained`` wrote into a folder. Raises `UserError` if none or a damaged one is."""
    if not any(any(folder.glob(pattern)) for pattern in FILES):
        raise UserError(f"{folder} has no tokenizer: copy the tokenizer files of the model into it")
    return _from_pretrained(folder, f"{folder} has a damaged tokenizer, copy its files again", local_files_only=True)


def _from_pretrained(name: str | Path, what: str, **options: Any) -> PreTrainedTokenizerBase:
    with blame(what):
        tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=False, **options)
        assert tokenizer is not None
        return tokenizer


@contextmanager
def blame(what: str) -> Iterator[None]:
    """Whatever goes wrong inside as a `UserError`: ``what``, then the reason.

    For reading what others wrote by means of transformers: a wrong type at a place that it does not check comes
    out as any exception at all, and tokenizers raises plain ``Exception``.
    """
    try:
        yield
    except Exception as error:
        raise UserError(f"{what}: {reason(error)}") from error


def reason(error: Exception) -> str:
    """What an error of one of Hugging Face's packages says, in one line."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    # A strict dataclass names the validator on the first line and what is wrong on the last one.
    text = lines[-1] if isinstance(error, StrictDataclassError) else " ".join(lines)
    text = " ".join(text.split()).removeprefix("ValueError: ").removeprefix("TypeError: ").removeprefix("UserError: ")
    if match := re.match(r"Field '(.+?)' (?:with value (.+?) doesn't match|expected \S.*\(value: (.+)\)$)", text):
        text = f"{match[1]}={match[2] or match[3]}: has the wrong type"
    elif isinstance(error, KeyError):
        text = f"{text} is missing"
    return text if len(text) <= 200 else f"{text[:200]}..."


def bpe_size(spec: str) -> int:
    """The vocabulary that ``"bpe:SIZE"`` asks for, in tokens. Raises `UserError` for a size out of range.

    >>> bpe_size("bpe:8192")
    8192
    """
    size = spec.partition(":")[2]
    least = 256 + len(SPECIAL)
    if not size.isdecimal() or len(size) > 9 or not least <= int(size) <= LARGEST:
        raise UserError(
            f"tokenizer {spec[:40]!r}: SIZE is the size of the vocabulary, {least} to {LARGEST}, as in bpe:8192"
        )
    return int(size)


def _train_bpe(spec: str, corpus: Corpus | None) -> PreTrainedTokenizerBase:
    size = bpe_size(spec)
    if corpus is None:
        raise UserError(f"tokenizer {spec!r} is trained on a corpus, and none is given: name one")
    tokenizer = _byte_level(models.BPE(), words=True)
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL],
        initial_alphabet=list(_byte_vocabulary()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((unit for text in corpus.train for unit in text_units([text])), trainer)
    return _wrap(tokenizer)


def _byte_level(model: models.Model, words: bool) -> Tokenizer:
    """``words``: split with GPT-2's expression first, so that no token crosses a word."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=words)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def _wrap(tokenizer: Tokenizer) -> PreTrainedTokenizerBase:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        padding_side="left",  # so that a batch of prompts ends with their last tokens
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


def _byte_vocabulary() -> dict[str, int]:
    """GPT-2's printable character of each byte: itself if it is one, else the next from U+0100 on."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    other = [byte for byte in range(256) if byte not in printable]
    characters = {**{byte: chr(byte) for byte in printable}, **{b: chr(256 + i) for i, b in enumerate(other)}}
    return {characters[byte]: byte for byte in range(256)}
