"""The loaded models as requests name them: model names, class names, plans, what `/models` says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from dd_core.bundle import Bundle
from dd_core.plan import Preset
from server.budget import BudgetTable
from server.errors import BadRequestError, UnknownModelError
from server.labels import LabelTable
from server.models import refuse_text
from server.schemas import GenerateRequest

DETERMINISM = (
    "Image i of a request is a function of (model, plan, label, seed, i) alone: the same bytes whether "
    "it is computed alone or with other requests. The noise is the same on every device; pixels may "
    "differ in their last bits between kinds of device."
)


@dataclass(frozen=True)
class ServedModel:
    """A bundle with the look-up tables that requests need."""

    bundle: Bundle
    budgets: BudgetTable
    labels: LabelTable

    @classmethod
    def of(cls, bundle: Bundle) -> ServedModel:
        """Index a bundle's classes and plans.

        Raises:
            InvalidPlanError: the bundle offers no plan.
            InvalidRequestError: it is conditioned on text.
        """
        refuse_text(bundle.manifest)
        return cls(bundle, BudgetTable(bundle.presets), LabelTable.of(bundle.manifest.classes))

    @property
    def name(self) -> str:
        return self.bundle.name

    @property
    def classes(self) -> list[str]:
        return list(self.bundle.manifest.classes)

    def offered(self) -> list[Preset]:
        """The plans that a budget can lead to, cheapest first."""
        return sorted((p for p in self.bundle.presets if p.offered), key=lambda p: p.plan.cost)

    def condition(self, request: GenerateRequest) -> int:
        """The class index that a request asks for.

        Raises:
            BadRequestError: both or none of label and prompt, a prompt, or an unknown class.
        """
        if request.label is not None and request.prompt is not None:
            raise BadRequestError("send either label or prompt, not both", param="prompt")
        if request.prompt is not None:
            raise BadRequestError(
                f"model {self.name} is conditioned on classes, not on text: send label", param="prompt"
            )
        if request.label is None:
            raise BadRequestError(f"label is missing; {self.labels.choices()}", param="label")
        return self.labels.find(request.label)

    def describe(self, max_images: int) -> dict[str, Any]:
        """The model's entry in `GET /models`."""
        manifest = self.bundle.manifest
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
                for preset in sorted(self.bundle.presets, key=lambda p: (not p.offered, p.plan.cost))
            ],
            "budgets": [
                {"from": run.first, "to": run.last, "plan": run.preset.plan.name}
                for run in self.budgets.ranges
            ],
            "defaults": {"steps": 1, "n": 1, "format": "png"},
            "limits": {"n": max_images},
            "metrics": manifest.metrics,
            "determinism": DETERMINISM,
            "data": manifest.data,
            "licence": manifest.licence,
            "weights": self.bundle.digest,
        }


class Catalog:
    """The models that are loaded, by name."""

    def __init__(self, bundles: Iterable[Bundle]) -> None:
        self.models = {model.name: model for model in map(ServedModel.of, bundles)}

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
