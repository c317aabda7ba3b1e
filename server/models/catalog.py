"""The loaded models as requests name them: names, classes, plans, and what `/models` says of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from dd_core.errors import InvalidRequestError
from dd_core.hub.locate import existing, locate
from dd_core.hub.registry import registry
from dd_core.manifest import Manifest, read_manifest
from dd_core.plan import ACTORS, Preset
from dd_core.text.clean import clean_caption
from dd_core.text.config import T5Config
from dd_core.text.encoder import MAX_CHARACTERS, checked_prompt
from server.errors import BadRequestError, ConflictError, UnknownModelError, shortened
from server.models.budgets import BudgetTable
from server.models.labels import LabelTable
from server.settings import Determinism

DETERMINISM: dict[Determinism, str] = {
    "exact": "Image i of a request is a function of (model, plan, label or prompt, seed, i) alone: the same "
    "bytes whether it is computed alone or with other requests, on the same kind of device and build. The "
    "noise is the same on every device; pixels may differ in their last bits between kinds of device.",
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
            InvalidRequestError: there is nothing to read prompts with.
        """
        check_encoder(manifest)
        presets = tuple(entry.preset() for entry in manifest.presets)
        return cls(folder, manifest, presets, BudgetTable(presets), LabelTable.of(manifest.classes))

    @property
    def name(self) -> str:
        return self.manifest.name

    @property
    def bytes(self) -> int:
        """Size of all its files."""
        return sum(entry.bytes for entry in self.manifest.files.values())

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of its images in pixels."""
        return self.manifest.image_size, self.manifest.image_size

    @cached_property
    def identities(self) -> dict[str, str]:
        """By plan: the identity of weights, settings and plan (`Manifest.identity`)."""
        return {preset.plan.name: self.manifest.identity(preset.plan.name) for preset in self.presets}

    @property
    def blocks(self) -> int:
        """T, the number of blocks of tokens."""
        return self.presets[0].plan.num_blocks

    @property
    def refined(self) -> Preset:
        """The best offered plan that makes whole pictures on its way, or the best of all."""
        refining = [p for p in self.budgets.ladder if any(ACTORS[actor].whole for actor in p.plan.needs)]
        return (refining or self.budgets.ladder)[-1]

    @cached_property
    def offered(self) -> dict[str, Preset]:
        """The plans that may be asked for, by name, cheapest first."""
        presets = sorted(self.presets, key=lambda preset: preset.plan.cost)
        return {preset.plan.name: preset for preset in presets if preset.offered}

    def preset(self, plan: str) -> Preset:
        """Return the offered plan of this name.

        Raises:
            BadRequestError: the model has none; `param` is `plan`.
        """
        if plan not in self.offered:
            names = ", ".join(self.offered)
            raise BadRequestError(f"unknown plan {shortened(plan)!r}; {self.name} has {names}", param="plan")
        return self.offered[plan]

    def condition(self, label: int | str | None, prompt: str | None) -> int | str:
        """Return the class index, or the prompt, that a request asks for.

        Raises:
            BadRequestError: both or none of label and prompt, the one that the model does not take, an
                unknown class, or a prompt with nothing to draw in it.
        """
        if label is not None and prompt is not None:
            raise BadRequestError("send either label or prompt, not both", param="prompt")
        if self.manifest.reads_text:
            if label is not None:
                raise BadRequestError(
                    f"model {self.name} is conditioned on text, not on classes: send prompt", param="label"
                )
            if prompt is None:
                raise BadRequestError(f"prompt is missing: say what {self.name} is to draw", param="prompt")
            return self._prompt(prompt)
        if prompt is not None:
            raise BadRequestError(
                f"model {self.name} is conditioned on classes, not on text: send label", param="prompt"
            )
        if label is None:
            raise BadRequestError(f"label is missing; {self.labels.choices()}", param="label")
        return self.labels.find(label)

    def condition_again(self, condition: int | str) -> int | str:
        """Check the condition of a receipt of this model.

        Raises:
            BadRequestError: the receipt was made up: this model has no such condition.
        """
        if isinstance(condition, str) and self.manifest.reads_text:
            return self._prompt(condition)
        if isinstance(condition, int) and 0 <= condition < len(self.manifest.classes):
            return condition
        raise BadRequestError("receipt is damaged: the model has no such condition", param="receipt")

    def _prompt(self, prompt: str) -> str:
        text = checked_prompt(prompt)
        # What T5's cleaning leaves nothing of would fail on the device, as nobody's fault.
        if isinstance(self.manifest.text, T5Config) and not clean_caption(text):
            raise BadRequestError("nothing of the prompt is left but links and ids", param="prompt")
        return text

    def describe(self, max_images: int, determinism: Determinism) -> dict[str, Any]:
        """The model's entry in `GET /models`."""
        manifest = self.manifest
        metrics = {entry.name: dict(entry.metrics) for entry in manifest.presets}
        return {
            "name": self.name,
            "family": manifest.family,
            "description": manifest.description,
            "conditioning": "text" if manifest.reads_text else "class",
            "image": {"width": manifest.image_size, "height": manifest.image_size},
            "classes": list(manifest.classes),
            "examples": list(manifest.examples),
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
                {"from": first, "to": last, "plan": preset.plan.name}
                for first, last, preset in self.budgets.ranges
            ],
            "defaults": {"steps": self.budgets.least, "n": 1, "format": "png"},
            "limits": {"n": max_images, **({"prompt": MAX_CHARACTERS} if manifest.reads_text else {})},
            "metrics": manifest.metrics,
            "determinism": DETERMINISM[determinism],
            "determinism_mode": determinism,
            "data": manifest.data,
            "licence": manifest.licence,
            "weights": manifest.digest,
        }


class Catalog:
    """The models that may be asked for, by name or alias. A reply says the name.

    Args:
        aliases: the name of a model by each alias; one whose model is not loaded leads nowhere.
    """

    def __init__(self, aliases: Mapping[str, str] | None = None) -> None:
        self.models: dict[str, ServedModel] = {}
        self.aliases = dict(aliases or {})

    def check_name(self, name: str, source: str) -> None:
        """Check that a model to be loaded may have its name.

        Raises:
            ConflictError: a model of this name is loaded, or another model has it as an alias.
        """
        if name in self.models:
            raise ConflictError(
                f"a model {name} is loaded already, from {self.models[name].folder}; {source} needs another "
                "name in its manifest",
                param="model",
            )
        if name in self.aliases:
            raise ConflictError(
                f"{name}, the name of {source}, is an alias of the model {self.aliases[name]}", param="model"
            )

    def aliases_of(self, name: str) -> list[str]:
        """Return the other names of a model."""
        return [alias for alias, meant in self.aliases.items() if meant == name]

    def find(self, name: str | None, by_text: bool | None = None) -> ServedModel:
        """Return the model of a name or an alias; without one, the only model that takes what is sent.

        Args:
            by_text: whether a prompt is sent, or a label; None where neither or both are.

        Raises:
            UnknownModelError: no model of that name.
            BadRequestError: no name although several are loaded.
        """
        if name is None:
            taking = [m for m in self.models.values() if by_text in (None, m.manifest.reads_text)]
            if len(taking) == 1:
                return taking[0]
            if len(self.models) == 1:  # it says itself what it takes
                return next(iter(self.models.values()))
            if not self.models:
                raise UnknownModelError("no model is loaded", param="model")
            raise BadRequestError(f"several models are loaded, name one: {self._names()}", param="model")
        found = self.models.get(name) or self.models.get(self.aliases.get(name, ""))
        if found is None:
            message = f"no model {shortened(name)!r} is loaded; there is {self._names()}"
            raise UnknownModelError(message, param="model")
        return found

    def _names(self) -> str:
        return ", ".join(
            sorted([*self.models, *(a for a, name in self.aliases.items() if name in self.models)])
        )


def find(source: str | Path) -> ServedModel:
    """Find a built-in model, a bundle's folder, or a published model, which is fetched when it is not here.

    Raises:
        InvalidRequestError: there is nothing to read its prompts with.
        BundleError, HubError, StorageError: the model cannot be had, or its manifest is wrong.
    """
    spec = registry().get(str(source))
    if spec is not None and spec.reads_text and existing(source) is None:
        require_t5(spec.name)  # before gigabytes are fetched
    folder = locate(source)
    return ServedModel.of(folder, read_manifest(folder))


def sources_of(text: str) -> list[str]:
    """Split the names of models at the commas; a folder that has commas in its name is one."""
    return [text] if Path(text).is_dir() else text.split(",")


def find_all(sources: Sequence[str]) -> list[ServedModel]:
    """Find every model that is to be served; raises as `find`.

    Raises:
        InvalidRequestError: two of them have the same name.
    """
    found: dict[str, tuple[str, ServedModel]] = {}
    for source in map(str.strip, sources):
        model = find(source)
        if model.name in found:
            raise InvalidRequestError(
                f"two models are called {model.name}: {found[model.name][0]} and {source}; "
                "one of them needs another name in its manifest",
                param="model",
            )
        found[model.name] = source, model
    return [model for _, model in found.values()]


def check_aliases(aliases: Mapping[str, str], names: Collection[str]) -> None:
    """Check that aliases are of models that are served, and are none of their names.

    Raises:
        InvalidRequestError: one is not; the message has both names.
    """
    for alias, name in aliases.items():
        if name not in names:
            raise InvalidRequestError(
                f"served_model_name gives {name} the alias {alias}, but serves no model {name}: there is "
                f"{', '.join(sorted(names))}",
                param="served_model_name",
            )
        if alias in names:
            raise InvalidRequestError(
                f"served_model_name gives {name} the alias {alias}, which is a model's own name",
                param="served_model_name",
            )


def check_encoder(manifest: Manifest) -> None:
    """Check that prompts can be read, where the model takes them.

    Raises:
        InvalidRequestError: the bundle names no encoder, or T5's library is not installed.
    """
    if not manifest.reads_text:
        return
    if manifest.text is None:
        raise InvalidRequestError(
            f"model {manifest.name} is conditioned on text, and its bundle names no encoder of prompts",
            param="model",
        )
    if isinstance(manifest.text, T5Config):
        require_t5(manifest.name)


def require_t5(model: str) -> None:
    """Raise InvalidRequestError where the library of a model's encoder of prompts is not installed."""
    if find_spec("transformers") is None:
        raise InvalidRequestError(
            f"model {model} reads prompts with T5, which needs the extra t5: "
            "pip install 'distilled-decoding[t5]'",
            param="model",
        )
