"""Text in: corpora with a held-out part, tokenizers, lazy token streams and packed training blocks."""

from nestlearn.data.corpus import Corpus, load_corpus, stream_documents
from nestlearn.data.packing import PackedTokens, pack
from nestlearn.data.streams import TokenUnit, token_units
from nestlearn.data.tokenizers import load_tokenizer

__all__ = [
    "Corpus",
    "PackedTokens",
    "TokenUnit",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "stream_documents",
    "token_units",
]
