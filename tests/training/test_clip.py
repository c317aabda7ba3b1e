"""The CLIP score, by tiny models in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import CLIPModel

from tests.training.clip_model import tiny_clip
from training.data.packages import DataError
from training.metrics.clip import ClipScore

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_clip(tmp_path_factory.mktemp("models") / "tiny-clip")


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
