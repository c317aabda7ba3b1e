"""TensorBoard's event files, beside the journal of a stage, where `tensorboard=true` asks for them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from dd_core.errors import RecipeError


class Events:
    """The events of one stage.

    Args:
        folder: gets a file of events; files that an earlier call left stay, and are read as one with it.
        first: the step that the stage goes on from: what was written of later ones no longer counts.

    Raises:
        RecipeError: the package that writes them is not installed.
    """

    def __init__(self, folder: Path, first: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ModuleNotFoundError:
            raise RecipeError(
                "tensorboard=true needs tensorboardX: pip install 'distilled-decoding[tensorboard]'",
                param="tensorboard",
            ) from None
        # The step is in the file's name: with the second alone a stage that goes on at once would overwrite.
        self._writer = SummaryWriter(
            str(folder), purge_step=first + 1 if first else None, filename_suffix=f".{first:08d}"
        )

    def figures(self, record: Mapping[str, float]) -> None:
        """Write a line of the journal as scalars of its step."""
        for name in record.keys() - {"step"}:
            self._writer.add_scalar(name, record[name], record["step"])
        self._writer.flush()

    def picture(self, step: int, path: Path) -> None:
        """Write a picture of a step, as `samples`."""
        with Image.open(path) as picture:
            self._writer.add_image("samples", np.asarray(picture.convert("RGB")), step, dataformats="HWC")
        self._writer.flush()

    def close(self) -> None:
        """Write what is left."""
        self._writer.close()
