"""Text and synthetic tasks for training: corpora, tokenizers, samples that are a function of a counter.

>>> corpus = build_data({"name": "stdlib", "seq_len": 256}, {"name": "bytes"}, seed=1)  # doctest: +SKIP
>>> inputs, labels, segment_ids = targets(corpus.sample(0))                             # doctest: +SKIP
"""

from __future__ import annotations

from .build import build_data
from .corpus import IGNORED, Corpus, TrainStream, collate, targets
from .text import TextCorpus, ValidationSet
from .tokenizer import ByteTokenizer, HFTokenizer, SymbolTokenizer, Tokenizer, load_tokenizer

__all__ = [
    "IGNORED",
    "ByteTokenizer",
    "Corpus",
    "HFTokenizer",
    "SymbolTokenizer",
    "TextCorpus",
    "Tokenizer",
    "TrainStream",
    "ValidationSet",
    "build_data",
    "collate",
    "load_tokenizer",
    "targets",
]
