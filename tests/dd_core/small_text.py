"""A text encoder of a few thousand weights, with word pieces of its own."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from dd_core.text.config import MiniLMConfig
from dd_core.text.minilm import MiniLM

_WORDS = [
    "[PAD]",
    "[UNK]",
    "[CLS]",
    "[SEP]",
    "a",
    "red",
    "blue",
    "heart",
    "cat",
    "dog",
    "and",
    "style",
    "##s",
]
TEXT = MiniLMConfig(length=8, vocabulary=len(_WORDS), dim=32, layers=2, heads=4, hidden=48)


def pieces_file() -> bytes:
    """A `tokenizer.json` of a dozen words."""
    tokenizer = Tokenizer(models.WordPiece({w: i for i, w in enumerate(_WORDS)}, unk_token="[UNK]"))  # type: ignore[call-arg]
    tokenizer.normalizer = normalizers.BertNormalizer()  # type: ignore[assignment]
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # type: ignore[assignment]
    tokenizer.post_processor = processors.TemplateProcessing(  # type: ignore[assignment]
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer.to_str().encode()


def small_text(seed: int = 0) -> tuple[MiniLM, bytes]:
    """The encoder with random weights, and its `tokenizer.json`."""
    torch.manual_seed(seed)
    module = MiniLM(TEXT)
    with torch.no_grad():
        for p in module.parameters():
            p.normal_(std=0.3)
    return module.eval().requires_grad_(False), pieces_file()
