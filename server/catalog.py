"""The loaded models as requests name them: model names, class names, plans, what `/models` says."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dd_core.errors import InvalidRequestError
from dd_core.hub.spec import ModelSpec
from dd_core.manifest import Manifest
from dd_core.plan import Preset
from server.budget import BudgetTable
from server.errors import BadRequestError, OtherWeightsError, UnknownModelError
from server.labels import LabelTable

Determinism = Literal["exact", "fast"]
DETERMINISM: dict[Determinism, str] = {
    "exact": "Image i of a request is a function of (model, plan, label, seed, i) alone: the same bytes "
    "whether it is computed alone or with other requests, on the same kind of device and build. The noise "
    "is the same on every device; pixels may differ in their last bits between kinds of device.",
    "fast": "Image i of a request is drawn from (seed, i) alone, but arithmetic is shared between the "
    "images of a batch: its last bits, and so now and then a token, depend on what it is computed with.",
}


@dataclass(frozen=True)
class ServedModel:
    """A bundle's folder and manifest, with the look-up tables that requests need."""

    folder: Path
    manifest: Manifest
    presets: tuple[Preset, ...]
    budgets: BudgetTable
    labels: LabelTable

    @classmethod
    def of(cls, folder: Path, manifest: Manifest) -> ServedModel:
        """Index a bundle's classes and plans.

        Raises:
            InvalidPlanError: the bundle offers no plan.
            InvalidRequestError: it is conditioned on text.
        """
        refuse_text(manifest)
        presets = tuple(entry.preset() for entry in manifest.presets)
        return cls(folder, manifest, presets, BudgetTable(presets), LabelTable.of(manifest.classes))

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def classes(self) -> list[str]:
        return list(self.manifest.classes)

    def offered(self) -> list[Preset]:
        """The plans that a budget can lead to, cheapest first."""
        return sorted((p for p in self.presets if p.offered), key=lambda p: p.plan.cost)

    @property
    def digest(self) -> str:
        """The identity of the weights."""
        return self.manifest.digest

    @property
    def blocks(self) -> int:
        """T, the number of blocks of tokens."""
        return self.presets[0].plan.num_blocks

    @property
    def refined(self) -> Preset:
        """The best offered plan in which the student has a part, or the best of all."""
        with_student = [p for p in self.budgets.ladder if "student" in p.plan.needs]
        return (with_student or self.budgets.ladder)[-1]

    def preset(self, plan: str) -> Preset:
        """The offered plan of this name.

        Raises:
            OtherWeightsError: the model has none.
        """
        for preset in self.presets:
            if preset.offered and preset.plan.name == plan:
                return preset
        raise OtherWeightsError(f"model {self.name} offers no plan {plan[:64]!r} any more", param="receipt")

    def condition(self, label: int | str | None, prompt: str | None) -> int:
        """The class index that a request asks for.

        Raises:
            BadRequestError: both or none of label and prompt, a prompt, or an unknown class.
        """
        if label is not None and prompt is not None:
            raise BadRequestError("send either label or prompt, not both", param="prompt")
        if prompt is not None:
            raise BadRequestError(
                f"model {self.name} is conditioned on classes, not on text: send label", param="prompt"
            )
        if label is None:
            raise BadRequestError(f"label is missing; {self.labels.choices()}", param="label")
        return self.labels.find(label)

    def condition_again(self, condition: int | str) -> int:
        """The condition of a receipt of this model.

        Raises:
            BadRequestError: the receipt was made up: this model has no such condition.
        """
        if isinstance(condition, int) and 0 <= condition < len(self.manifest.classes):
            return condition
        raise BadRequestError("receipt is damaged: the model has no such class", param="receipt")

    def describe(self, max_images: int, determinism: Determinism) -> dict[str, Any]:
        """The model's entry in `GET /models`."""
        manifest = self.manifest
        metrics = {entry.name: dict(entry.metrics) for entry in manifest.presets}
        return {
            "name": self.name,
            "family": manifest.family,
            "description": manifest.description,
            "conditioning": "class",
            "image": {"width": manifest.image_size, "height": manifest.image_size},
            "classes": self.classes,
            "steps": {"min": self.budgets.least, "max": self.budgets.most},
            "plans": [
                {
                    "name": preset.plan.name,
                    "steps": preset.plan.cost,
                    "segments": [[s.actor, s.start, s.stop] for s in preset.plan.segments],
                    "offered": preset.offered,
                    "published": preset.published,
                    "metrics": metrics.get(preset.plan.name, {}),
                }
                for preset in sorted(self.presets, key=lambda p: (not p.offered, p.plan.cost))
            ],
            "qualities": {
                word: self.budgets.of_quality(word).plan.name for word in ("low", "medium", "high")
            },
            "budgets": [
                {"from": run.first, "to": run.last, "plan": run.preset.plan.name}
                for run in self.budgets.ranges
            ],
            "defaults": {"steps": self.budgets.least, "n": 1, "format": "png"},
            "limits": {"n": max_images},
            "metrics": manifest.metrics,
            "determinism": DETERMINISM[determinism],
            "determinism_mode": determinism,
            "data": manifest.data,
            "licence": manifest.licence,
            "weights": manifest.digest,
        }


class Catalog:
    """The models that may be asked for, by name."""

    def __init__(self) -> None:
        self.models: dict[str, ServedModel] = {}

    def find(self, name: str | None) -> ServedModel:
        """The named model, or the only one.

        Raises:
            UnknownModelError: no model of that name.
            BadRequestError: no name although several are loaded.
        """
        if name is None:
            if len(self.models) == 1:
                return next(iter(self.models.values()))
            raise BadRequestError(f"several models are loaded, name one: {self._names()}", param="model")
        if name not in self.models:
            shown = name if len(name) <= 64 else name[:64] + "…"
            raise UnknownModelError(f"no model {shown!r} is loaded; there is {self._names()}", param="model")
        return self.models[name]

    def _names(self) -> str:
        return ", ".join(sorted(self.models))


def refuse_text(about: Manifest | ModelSpec) -> None:
    """Refuses a model that this server has no way to ask.

    Raises:
        InvalidRequestError: it is conditioned on text.
    """
    if about.reads_text:
        raise InvalidRequestError(
            f"model {about.name} is conditioned on text, and this build cannot answer prompts yet: it can "
            "be pulled and converted, but not served",
            param="model",
        )
