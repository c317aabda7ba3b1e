"""A published model: where its parts lie, and what they must look like."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal, get_args

from dd_core.errors import InvalidRequestError
from dd_core.logits import LogitSettings
from dd_core.manifest import PresetEntry
from dd_core.models.config import Family, ModelConfig, TokenizerConfig, VARConfig

PartName = Literal["tokenizer", "student", "teacher"]
PARTS = get_args(PartName)


@dataclass(frozen=True)
class RemoteFile:
    """A file of a hub repository.

    Args:
        repo: `owner/name`.
        file: path inside the repository.
        places: paths of keys that lead to the state dict inside the file, best first; `()` is the
            file's own top level.
        revision: a commit or tag; None = whatever `main` is.
    """

    repo: str
    file: str
    places: tuple[tuple[str, ...], ...] = ((),)
    revision: str | None = None

    def __str__(self) -> str:
        return f"{self.repo}/{self.file}"


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """A model by name: its files, its architectures, and what its bundle's manifest will say.

    Args:
        image_size: side of an image in pixels.
        classes: names in the order of the indices; empty where a text is the condition.
        files: one for each part that the model has.
        vq, student, teacher: the architectures; a part without a file has none.
        presets: the plans, with the authors' figures.
        licence: what is known of the terms, in words.
    """

    name: str
    family: Family
    description: str
    image_size: int
    classes: tuple[str, ...]
    files: Mapping[PartName, RemoteFile]
    vq: TokenizerConfig
    student: ModelConfig | None = None
    teacher: ModelConfig | None
    draw: LogitSettings
    presets: tuple[PresetEntry, ...]
    data: str
    licence: str

    @property
    def reads_text(self) -> bool:
        """True if the condition is a text."""
        model = self.student or self.teacher
        return model is not None and model.text_dim > 0

    def without_teacher(self) -> ModelSpec:
        """The student alone, and the plans that it can run.

        Raises:
            InvalidRequestError: the model is a teacher.
        """
        if self.student is None:
            raise InvalidRequestError(
                f"{self.name} is a teacher alone: without it nothing is left", param="no-teacher"
            )
        presets = tuple(p for p in self.presets if "teacher" not in p.preset().plan.needs)
        files = dict(self.files)
        files.pop("teacher", None)
        return replace(self, files=files, teacher=None, presets=presets)

    def with_unmasked_prefix(self) -> ModelSpec:
        """The teacher reads a prefix without a mask, as the released hybrid script has it.

        Raises:
            InvalidRequestError: the model has no VAR teacher.
        """
        if not isinstance(self.teacher, VARConfig):
            raise InvalidRequestError(
                f"{self.name} has no VAR teacher: only the released VAR scripts read a prefix unmasked",
                param="unmasked-prefix",
            )
        note = " The teacher reads a prefix unmasked, as the released hybrid script does."
        teacher = replace(self.teacher, prefix_mask=False)
        return replace(self, teacher=teacher, description=self.description + note)
