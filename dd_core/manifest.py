"""`manifest.json`: what a bundle says about itself, validated field by field.

Architecture, plans with their figures, hashes of the files, data and licence.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

from dd_core.bounds import MAX_TOKENS, Figures, FileName, Line, Name, Step, Text, Word
from dd_core.errors import ManifestError, reason
from dd_core.files import replacing
from dd_core.flow import FlowSettings
from dd_core.logits import LogitSettings
from dd_core.models.config import Family, LlamaGenConfig, MultiScaleConfig, VARConfig, VQConfig
from dd_core.plan import Actor, Draw, Plan, Preset, Segment
from dd_core.regular import read_regular
from dd_core.text.config import MiniLMConfig, T5Config

FORMAT_VERSION = 1
_MOST_BYTES = 2**24  # of the file


def _architecture(value: Any) -> Family:
    """The family of a config, told by a field that only VAR's have: for errors about the right one."""
    names = value if isinstance(value, dict) else vars(value) if hasattr(value, "__dict__") else {}
    return "var" if "sides" in names else "llamagen"


TokenizerConfig = Annotated[
    Annotated[VQConfig, Tag("llamagen")] | Annotated[MultiScaleConfig, Tag("var")],
    Discriminator(_architecture),
]
ModelConfig = Annotated[
    Annotated[LlamaGenConfig, Tag("llamagen")] | Annotated[VARConfig, Tag("var")],
    Discriminator(_architecture),
]


TextConfig = Annotated[MiniLMConfig | T5Config, Field(discriminator="kind")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """One file of the bundle."""

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    bytes: int = Field(gt=0, le=2**42)


class Source(_Strict):
    """The file that one part's weights were converted from.

    `repo` and `revision` (a commit) are None for a file that was given by hand.
    """

    part: Literal["tokenizer", "student", "teacher"]
    file: Line
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    repo: Line | None = None
    revision: Line | None = None


class PresetEntry(_Strict):
    """A plan and what is known of it.

    `metrics` says with how many images it was measured, but for figures of the authors, `published`,
    which are theirs and of their harness.
    """

    name: Name
    segments: list[tuple[Actor, Step, Step]] = Field(max_length=64)
    draw: Draw = "multinomial"
    split: Step | None = None
    offered: bool = True
    published: bool = False
    cost: Step
    metrics: Figures = Field(default_factory=dict)

    @model_validator(mode="after")
    def _is_a_plan(self) -> PresetEntry:
        cost = self.preset().plan.cost
        if self.cost != cost:
            raise ValueError(f"cost is {self.cost}, its segments cost {cost}")
        return self

    def preset(self) -> Preset:
        """The entry as the planner wants it.

        Raises:
            InvalidPlanError: segments that are no plan.
        """
        plan = Plan(self.name, tuple(Segment(*s) for s in self.segments), self.draw, self.split)
        return Preset(plan, self.metrics.get("fid"), self.published, self.offered)

    @classmethod
    def of(
        cls,
        plan: Plan,
        *,
        offered: bool = True,
        published: bool = False,
        metrics: dict[str, float] | None = None,
    ) -> PresetEntry:
        segments = [(s.actor, s.start, s.stop) for s in plan.segments]
        return cls(
            name=plan.name, segments=segments, draw=plan.draw, split=plan.split,
            offered=offered, published=published, cost=plan.cost, metrics=metrics or {},
        )  # fmt: skip


class Manifest(_Strict):
    """`manifest.json`. `vq`, `student` and `teacher` are the architectures, as their dataclasses.

    At least one of student and teacher is there; `classes` is empty where a text is the condition;
    `sources` where the weights were trained here and not converted. `text` is the encoder of the prompts:
    None for a model of classes, and for one whose prompts are encoded by whoever runs it. `examples` are
    prompts, or classes, to show first.
    """

    format_version: Literal[1] = 1
    name: Name
    family: Family
    description: Text
    image_size: int = Field(gt=0, le=2048)
    classes: list[Line] = Field(default_factory=list, max_length=100_000)
    examples: list[Line] = Field(default_factory=list, max_length=50)
    vq: TokenizerConfig
    student: ModelConfig | None
    teacher: ModelConfig | None
    text: TextConfig | None = None
    draw: LogitSettings
    flow: FlowSettings
    presets: list[PresetEntry] = Field(min_length=1, max_length=64)
    data: Text
    licence: Text
    metrics: dict[Word, Figures] = Field(default_factory=dict, max_length=64)
    training: dict[str, Any] = Field(default_factory=dict)
    sources: list[Source] = Field(default_factory=list, max_length=16)
    files: dict[FileName, FileEntry] = Field(default_factory=dict, max_length=64)

    @model_validator(mode="after")
    def _agrees(self) -> Manifest:
        models = [m for m in (self.student, self.teacher) if m is not None]
        if not models:
            raise ValueError("neither student nor teacher")
        for m in models:
            if m.family != self.family:
                raise ValueError(f"{type(m).__name__} is no architecture of the family {self.family!r}")
            if m.layout != models[0].layout:
                raise ValueError("student and teacher have different layouts")
        if self.vq.family != self.family:
            raise ValueError(f"vq is no tokenizer of the family {self.family!r}")
        wanted = 0 if self.reads_text else models[0].num_classes
        if len(self.classes) != wanted:
            raise ValueError(f"{len(self.classes)} class names for {wanted} classes")
        if self.text is not None:
            for m in models:
                if (m.text_tokens, m.text_dim) != (self.text.length, self.text.dim):
                    raise ValueError(
                        f"text gives {self.text.length} states of {self.text.dim}, the model reads "
                        f"{m.text_tokens} of {m.text_dim}"
                    )
        self._check_sizes(models)
        self._check_plans()
        return self

    def _check_sizes(self, models: list[LlamaGenConfig | VARConfig]) -> None:
        """Refuse numbers that are each in bounds, and together no model."""
        vq, layout = self.vq, models[0].layout
        if layout.num_tokens > MAX_TOKENS:
            raise ValueError(f"{layout.num_tokens} tokens an image, the most is {MAX_TOKENS}")
        if any(vq.channels * multiplier % 32 for multiplier in vq.channel_multipliers) or vq.channels % 32:
            raise ValueError("vq.channels, times each of channel_multipliers, must be a multiple of 32")
        if isinstance(vq, MultiScaleConfig) and vq.layout != layout:
            raise ValueError(f"vq.sides {vq.sides} are not those of the model")
        side = math.isqrt(layout.num_tokens) if isinstance(vq, VQConfig) else vq.sides[-1]
        if self.image_size != side * vq.downsampling:
            raise ValueError(
                f"image_size is {self.image_size}, {side} tokens a side make {side * vq.downsampling} pixels"
            )
        for m in models:
            if (m.codebook_size, m.code_dim) != (vq.codebook_size, vq.code_dim):
                raise ValueError(
                    f"codebook_size and code_dim are {m.codebook_size} and {m.code_dim} of the model, "
                    f"{vq.codebook_size} and {vq.code_dim} of vq"
                )
            # Rotary embeddings turn pairs of dimensions, for a row and for a column.
            unit = 4 * m.heads if isinstance(m, LlamaGenConfig) else m.heads
            if m.dim % unit:
                raise ValueError(f"dim is {m.dim}, and must be a multiple of {unit} for {m.heads} heads")
            if bool(m.text_dim) != bool(m.text_tokens):
                raise ValueError("text_tokens and text_dim must both be 0 or neither")

    def _check_plans(self) -> None:
        names = [entry.name for entry in self.presets]
        twice = next((name for name in names if names.count(name) > 1), None)
        if twice is not None:
            raise ValueError(f"presets: two are called {twice}")
        for plan in (entry.preset().plan for entry in self.presets):
            blocks = self.model.layout.num_blocks
            if plan.num_blocks != blocks:
                raise ValueError(
                    f"presets: {plan.name} ends at block {plan.num_blocks}, the layout has {blocks}"
                )
            for actor in sorted(plan.needs):
                if getattr(self, actor, True) is None:  # marginals are no part of a bundle
                    raise ValueError(f"presets: {plan.name} needs a {actor}, and there is none")

    @property
    def model(self) -> LlamaGenConfig | VARConfig:
        """The student's architecture, or the teacher's where there is none: layout and classes."""
        found = self.student or self.teacher
        assert found is not None, "the validator asks for one"
        return found

    @property
    def digest(self) -> str:
        """SHA-256 over the hashes of all files: the identity of the weights."""
        joined = "".join(f"{name}:{file.sha256}\n" for name, file in sorted(self.files.items()))
        return hashlib.sha256(joined.encode()).hexdigest()

    def identity(self, plan: str) -> str:
        """SHA-256 over all that pictures by the plan of this name follow from, besides condition and
        noise: weights, architectures, how the teacher draws, and the plan itself.

        Raises:
            StopIteration: there is no such plan.
        """
        entry = next(preset for preset in self.presets if preset.name == plan)
        parts = {"vq", "student", "teacher", "text", "draw", "flow"}
        facts = {
            "weights": self.digest,
            **self.model_dump(mode="json", include=parts),
            "plan": entry.model_dump(mode="json", include={"segments", "draw", "split"}),
        }
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()

    @property
    def reads_text(self) -> bool:
        """True if the condition is a text."""
        return self.model.text_dim > 0


def read_manifest(folder: Path) -> Manifest:
    """Reads and validates `manifest.json`.

    Raises:
        ManifestError: not JSON, another format version, or a field that is wrong (named).
    """
    path = folder / "manifest.json"
    try:
        raw = json.loads(read_regular(path, _MOST_BYTES))
    except (OSError, ValueError) as error:
        raise _refusal(path, "", reason(error)) from error
    except RecursionError:
        raise _refusal(path, "", "lists within lists, too deep") from None
    version = raw.get("format_version") if isinstance(raw, dict) else None
    if version != FORMAT_VERSION:
        says = f"is {version!r}, this build reads {FORMAT_VERSION}"
        raise _refusal(path, "format_version", says)
    try:
        return Manifest.model_validate(raw)
    except (ValidationError, ValueError) as error:
        first = error.errors()[0] if isinstance(error, ValidationError) else {"loc": (), "msg": str(error)}
        # The second part of an architecture's place is the union's tag.
        parts = [p for i, p in enumerate(first["loc"]) if not (i == 1 and p in get_args(Family))]
        place = ".".join(str(p) for p in parts)
        raise _refusal(path, place, str(first["msg"]).removeprefix("Value error, ")) from error


def _refusal(path: Path, place: str, says: str) -> ManifestError:
    """An error about a field, as short as a log and a reply want it, whatever the manifest holds."""
    short = [text.encode("ascii", "backslashreplace").decode()[:300] for text in (place, says) if text]
    return ManifestError(": ".join([str(path), *short]), param=short[0] if place else "manifest")


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Writes `manifest.json` atomically."""
    with replacing(folder / "manifest.json") as temporary:
        temporary.write_text(json.dumps(manifest.model_dump(mode="json"), indent=1) + "\n")
