"""FLAN-T5's encoder through `transformers`, for LlamaGen's published text models (the extra `t5`).

Nothing is imported or loaded before the first prompt: the encoder is larger than the model that reads it,
and a bundle can be looked at without it. A prompt is encoded alone and unpadded; T5 knows places only
relative to each other and the reference masks its padding, so its states are those of the padded prompt.

Shapes: n positions, N state dimension.
"""

from __future__ import annotations

from collections.abc import Sequence
from threading import Lock
from typing import Any

import torch
from torch import Tensor

from dd_core.errors import EncoderError, InvalidRequestError
from dd_core.text.clean import clean_caption
from dd_core.text.config import T5Config


def cleaned(prompt: str) -> str:
    """The prompt as T5 gets it.

    Raises:
        InvalidRequestError: cleaning leaves nothing.
    """
    text = clean_caption(prompt)
    if not text:
        raise InvalidRequestError(
            "nothing of the prompt is left when links, ids and the like are removed", param="prompt"
        )
    return text


class T5States:
    """A prompt's states by T5: cleaned, cut into pieces, encoded. Call it for one prompt: `[n, N]` float32.

    Args:
        dtype: of the weights; None = bfloat16 on a GPU (as the reference has it), float32 on a CPU.
        model, tokenizer: given instead of loaded from the hub.
    """

    def __init__(
        self,
        cfg: T5Config,
        device: torch.device,
        dtype: torch.dtype | None = None,
        model: Any = None,
        tokenizer: Any = None,
    ) -> None:
        self.cfg, self.device = cfg, device
        self.dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
        self._model, self._tokenizer = model, tokenizer
        self._lock = Lock()

    @torch.inference_mode()
    def __call__(self, prompt: str) -> Tensor:
        """States of the pieces, `</s>` the last.

        Raises:
            EncoderError: the extra `t5` is missing, or the weights cannot be had.
            InvalidRequestError: cleaning leaves nothing of the prompt.
        """
        text = cleaned(prompt)
        self.load()
        pieces = self._tokenizer(text, max_length=self.cfg.length, truncation=True, return_tensors="pt")
        states = self._model(input_ids=pieces["input_ids"].to(self.device)).last_hidden_state[0]
        return states.float()  # type: ignore[no-any-return]

    @torch.inference_mode()
    def many(self, prompts: Sequence[str]) -> list[Tensor]:
        """States of many prompts, padded and encoded together: for training. Raises as for one.

        The last bits depend on what is encoded together; a server uses one at a time.
        """
        texts = [cleaned(p) for p in prompts]
        self.load()
        pieces = self._tokenizer(
            texts, max_length=self.cfg.length, truncation=True, padding="longest", return_tensors="pt"
        )
        ids, mask = (pieces[name].to(self.device) for name in ("input_ids", "attention_mask"))
        states = self._model(input_ids=ids, attention_mask=mask).last_hidden_state.float()
        return [row[kept] for row, kept in zip(states, mask.bool(), strict=True)]

    def load(self) -> None:
        """Loads tokenizer and weights, if they are not there yet.

        Raises:
            EncoderError: the extra `t5` is missing, or the weights cannot be had or are of another size.
        """
        with self._lock:
            if self._model is not None:
                return
            try:
                from transformers import AutoTokenizer, T5EncoderModel
            except ImportError as error:
                raise EncoderError(
                    "this model reads prompts with T5, which needs the extra t5: "
                    "pip install 'distilled-decoding[t5]'",
                    param="text",
                ) from error
            where = {"revision": self.cfg.revision}
            try:
                tokenizer = AutoTokenizer.from_pretrained(self.cfg.repo, **where)
                model = T5EncoderModel.from_pretrained(
                    self.cfg.repo, dtype=self.dtype, use_safetensors=True, **where
                )
            except (OSError, ValueError) as error:
                raise EncoderError(f"{self.cfg.repo} could not be loaded: {error}", param="text") from error
            if model.config.d_model != self.cfg.dim:
                raise EncoderError(
                    f"{self.cfg.repo} has states of {model.config.d_model}, the manifest says {self.cfg.dim}",
                    param="text",
                )
            self._tokenizer, self._model = tokenizer, model.to(self.device).eval().requires_grad_(False)
