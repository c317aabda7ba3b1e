"""The CLIP score, by tiny models in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, PreTrainedTokenizerFast

from training.data.packages import DataError
from training.metrics.clip import ClipScore

CPU, WORDS = torch.device("cpu"), ("red", "blue", "heart", "car", "star")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CLIP model with random weights that reads five words and pictures of 16 pixels."""
    out = tmp_path_factory.mktemp("models") / "tiny-clip"
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
    torch.manual_seed(3)
    config = CLIPConfig(text_config=text, vision_config={**size, "image_size": 16, "patch_size": 8})
    CLIPModel(config).save_pretrained(out)
    return out


def pictures(count: int, side: int) -> Tensor:
    return torch.randint(0, 256, (count, side, side, 3), generator=torch.Generator().manual_seed(1)).byte()


def test_the_score_is_the_cosine_of_each_picture_with_its_own_caption(folder: Path) -> None:
    captions, images = ["red heart", "blue car", "star"], pictures(3, 16)
    label = torch.tensor([2, 0, 1])
    found = ClipScore(folder, captions, CPU)(images, label)
    model = CLIPModel.from_pretrained(folder).eval()
    ids = torch.tensor([[1, 6, 8, 0], [1, 2, 4, 8], [1, 3, 5, 8]])
    mean, std = (
        torch.tensor(v) for v in ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))
    )
    pixels = ((images.float() / 255 - mean) / std).permute(0, 3, 1, 2)
    with torch.no_grad():
        made = model(input_ids=ids, attention_mask=(ids > 0).long(), pixel_values=pixels)
    expected = 100 * (made.image_embeds * made.text_embeds).sum(1).clamp(min=0)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-3)
    assert len(set(found.tolist())) > 1


def test_other_sizes_long_captions_and_many_pictures(folder: Path) -> None:
    score = ClipScore(folder, ["red " * 50], CPU)
    images = pictures(130, 24)
    found = score(images, torch.zeros(130, dtype=torch.long))
    assert found.shape == (130,) and (found >= 0).all() and (found <= 100).all()
    torch.testing.assert_close(found[128:], score(images[128:], torch.zeros(2, dtype=torch.long)))


def test_a_folder_says_how_pictures_are_normalised(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for path in folder.iterdir():
        (other / path.name).write_bytes(path.read_bytes())
    (other / "preprocessor_config.json").write_text(
        json.dumps({"image_mean": [0, 0, 0], "image_std": [9, 9, 9]})
    )
    images, label = pictures(2, 16), torch.tensor([0, 0])
    assert not torch.equal(*(ClipScore(f, ["red heart"], CPU)(images, label) for f in (folder, other)))


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "it has no config.json"),
        ({"model_type": "bert"}, "type 'bert', not clip"),
        ({"model_type": "clip"}, "nothing"),
        ("{", "nothing"),
    ],
)
def test_what_is_no_clip_model_is_refused(config: object, message: str, tmp_path: Path) -> None:
    if config is not None:
        text = config if isinstance(config, str) else json.dumps(config)
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError) as refused:
        ClipScore(tmp_path, ["red"], CPU)
    assert refused.value.param == "clip" and str(tmp_path) in refused.value.message
    assert message in (refused.value.message, "nothing") or message in refused.value.message
