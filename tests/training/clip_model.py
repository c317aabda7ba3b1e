"""A CLIP model with random weights in the published layout."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

WORDS = ("red", "blue", "heart", "car", "star")


def tiny_clip(out: Path) -> Path:
    """Writes a model that reads five words and pictures of 16 pixels."""
    vocabulary = {word: i for i, word in enumerate(("<pad>", "<start>", *WORDS, "<unknown>", "<end>"))}
    pieces = Tokenizer(WordLevel(vocabulary, unk_token="<unknown>"))
    pieces.pre_tokenizer = Whitespace()
    ends = [(word, vocabulary[word]) for word in ("<start>", "<end>")]
    pieces.post_processor = TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    PreTrainedTokenizerFast(
        tokenizer_object=pieces, pad_token="<pad>", bos_token="<start>", eos_token="<end>"
    ).save_pretrained(out)
    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = {**size, "vocab_size": len(vocabulary), "max_position_embeddings": 8}
    text |= {"bos_token_id": 1, "eos_token_id": len(vocabulary) - 1, "pad_token_id": 0}
    torch.manual_seed(3)  # with most seeds all cosines are negative, and so all scores 0
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8})
    CLIPModel(config).save_pretrained(out)
    return out
