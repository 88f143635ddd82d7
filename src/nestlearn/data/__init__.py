"""Text in: corpora with a held-out part, tokenizers, lazy token streams and packed training blocks."""

from nestlearn.data.corpus import SOURCE_KEYWORDS, Corpus, load_corpus, stream_documents
from nestlearn.data.packing import PackedTokens, pack
from nestlearn.data.streams import TokenUnit, token_units
from nestlearn.data.text_files import absolute
from nestlearn.data.tokenizers import TOKENIZER_KEYWORDS, load_tokenizer

__all__ = [
    "SOURCE_KEYWORDS",
    "TOKENIZER_KEYWORDS",
    "Corpus",
    "PackedTokens",
    "TokenUnit",
    "absolute",
    "load_corpus",
    "load_tokenizer",
    "pack",
    "stream_documents",
    "token_units",
]
