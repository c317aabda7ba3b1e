"""CLIP score: how well pictures fit their captions (Hessel et al. 2021), by weights that you have.

    score = 100 · max(cos(CLIP(picture), CLIP(caption)), 0)

Shapes: N pictures, H W pixels, D the width of CLIP's shared space.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from training.data.packages import DataError
from training.digest import weights_digest

_BATCH = 64
# Of OpenAI's models; a folder's preprocessor_config.json may have others.
_MEAN, _STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


class ClipScore:
    """Scores of pictures whose label i has the caption `captions[i]`.

    Args:
        folder: a CLIP model as `transformers` saves it: `config.json`, `model.safetensors` and the
            tokenizer's files; `preprocessor_config.json` where mean and deviation are not OpenAI's.

    Raises:
        DataError: the extra `t5`, which has `transformers`, is missing, or the folder holds no CLIP model.
    """

    def __init__(self, folder: Path, captions: Sequence[str], device: torch.device) -> None:
        try:
            from transformers import AutoTokenizer, CLIPModel
        except ImportError as error:
            raise DataError(
                "the CLIP score needs the extra t5: pip install 'distilled-decoding[t5]'", param="clip"
            ) from error
        if not (folder / "config.json").is_file():
            raise DataError(f"{folder} is no folder of a CLIP model: it has no config.json", param="clip")
        try:
            kind = json.loads((folder / "config.json").read_text()).get("model_type")
            if kind != "clip":
                raise DataError(f"{folder} holds a model of the type {kind!r}, not clip", param="clip")
            self._tokenizer: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
            self._model: Any = CLIPModel.from_pretrained(folder, local_files_only=True, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise DataError(f"{folder}: {error}", param="clip") from error
        self._model = self._model.to(device).eval().requires_grad_(False)
        self.name, self.device, self.captions = folder.resolve().name, device, captions
        self.fingerprint = weights_digest(self._model)
        self._mean, self._std = (torch.tensor(v, device=device).view(3, 1, 1) for v in _normalisation(folder))

    @torch.no_grad()
    def __call__(self, image_NHW3: Tensor, label_N: Tensor) -> Tensor:
        """`[N]` float32 of uint8 pictures."""
        found = [
            self._scores(image, [self.captions[i] for i in label.tolist()])
            for image, label in zip(
                torch.split(image_NHW3, _BATCH), torch.split(label_N, _BATCH), strict=True
            )
        ]
        return torch.cat(found)

    def _scores(self, image_NHW3: Tensor, captions: list[str]) -> Tensor:
        side = self._model.config.vision_config.image_size
        pixels = image_NHW3.to(self.device).permute(0, 3, 1, 2).float()
        # As Pillow resizes: bicubic over the whole of a source pixel, whole grey levels.
        pixels = (
            F.interpolate(pixels, size=(side, side), mode="bicubic", antialias=True).round().clamp(0, 255)
        )
        pieces = self._tokenizer(
            captions,
            max_length=self._model.config.text_config.max_position_embeddings,
            truncation=True,
            padding=True,
            return_tensors="pt",
        )
        texts = {name: pieces[name].to(self.device) for name in ("input_ids", "attention_mask")}
        made = self._model(pixel_values=(pixels / 255 - self._mean) / self._std, **texts)
        cosine = F.cosine_similarity(made.image_embeds, made.text_embeds)
        return 100 * cosine.clamp(min=0).float().cpu()


def _normalisation(folder: Path) -> tuple[Sequence[float], Sequence[float]]:
    path = folder / "preprocessor_config.json"
    known = json.loads(path.read_text()) if path.is_file() else {}
    return known.get("image_mean", _MEAN), known.get("image_std", _STD)
