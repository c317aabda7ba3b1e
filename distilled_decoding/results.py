"""What the client gives back: the models of the contract, with their images as bytes."""

from __future__ import annotations

import base64
import builtins
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from distilled_decoding.contract import GenerateReply, ImageReply
from distilled_decoding.contract import ImageEvent as ImageEventReply


class Image(ImageReply):
    """One image; `receipt` is all that it follows from."""

    @cached_property
    def bytes(self) -> builtins.bytes:
        """The encoded file."""
        return base64.b64decode(self.data)

    def save(self, path: str | Path) -> Path:
        """Writes the file, as it came: its name decides nothing. Returns the path."""
        path = Path(path)
        path.write_bytes(self.bytes)
        return path


class Generation(GenerateReply):
    """The images of one request, and what was spent on them."""

    images: Sequence[Image]


class ImageEvent(ImageEventReply):
    """A complete picture of one image; `final` where no better one follows."""

    image: Image


class Plan(BaseModel):
    """A way to sample: what it costs and what it was measured to reach."""

    model_config = ConfigDict(extra="allow")

    name: str
    steps: int
    offered: bool
    metrics: Mapping[str, Any]


class Model(BaseModel):
    """A loaded model: an entry of `GET /models`. What is not named here is there as well, untyped."""

    model_config = ConfigDict(extra="allow")

    name: str
    family: str
    description: str
    conditioning: str
    image: Mapping[str, int]
    classes: Sequence[str]
    steps: Mapping[str, int]
    plans: Sequence[Plan]
    qualities: Mapping[str, str]
    limits: Mapping[str, int]
    determinism_mode: str
    licence: str
    weights: str


class Models(BaseModel):
    """The reply of `GET /models`."""

    models: list[Model]
