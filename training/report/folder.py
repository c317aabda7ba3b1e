"""A run folder as a report reads it: recipe, journals, evaluation, diagnosis, pictures, all as they are."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dd_core.errors import RecipeError
from training.optim.progress import read_journal
from training.recipes.saved import read_recipe
from training.recipes.settings import Recipe

STAGES = ("tokenizer", "decoder", "teacher", "student")
_PICTURES = (*(f"{stage}-samples.png" for stage in STAGES), "evaluation/comparison.png")


@dataclass(frozen=True)
class RunRecord:
    """What a run folder holds.

    Args:
        name: of the run in the report.
        journals: lines of each stage that has begun.
        rows: of the evaluation on the run's own data, or against a reference where there is no such.
        diagnosis: `diagnosis.json`, or None.
        pictures: by their place in the folder.
    """

    name: str
    recipe: Recipe
    journals: Mapping[str, list[dict[str, float]]]
    rows: list[dict[str, Any]]
    diagnosis: dict[str, Any] | None
    pictures: Mapping[str, Path]

    def steps(self, stage: str) -> int:
        """Updates that a stage is to have."""
        part = self.recipe.distill if stage == "student" else getattr(self.recipe, stage)
        return int(part.steps)

    def settings(self) -> dict[str, str]:
        """The recipe's fields by their dotted names."""
        return dict(_flat(asdict(self.recipe)))


def read_runs(folders: list[Path]) -> list[RunRecord]:
    """The runs, named by their folders: by the last part, or by the whole path where two would be equal.

    Raises:
        RecipeError: one is no run folder, is named twice, or has a file that cannot be read.
    """
    resolved = [folder.resolve() for folder in folders]
    if len(set(resolved)) < len(resolved):
        raise RecipeError("a run is named twice", param="runs")
    names = [folder.name for folder in resolved]
    unique = len(set(names)) == len(names)
    return [_read(f, f.name if unique else str(f)) for f in resolved]


def _read(folder: Path, name: str) -> RunRecord:
    recipe = read_recipe(folder)
    if recipe is None:
        raise RecipeError(f"{folder} is no run folder: it has no recipe.json", param="runs")
    journals = {stage: read_journal(folder / f"{stage}.jsonl") for stage in STAGES}
    own, reference = (
        _json(folder / part / "evaluation.json") for part in ("evaluation", "evaluation-reference")
    )
    found = {part: folder / part for part in _PICTURES}
    return RunRecord(
        name,
        recipe,
        {stage: lines for stage, lines in journals.items() if lines},
        (own or reference or {"rows": []})["rows"],
        _json(folder / "diagnosis.json"),
        {part: path for part, path in found.items() if path.exists()},
    )


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    except ValueError as error:
        raise RecipeError(f"{path} is no JSON: {error}", param="runs") from None


def _flat(settings: Mapping[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    found = []
    for name, value in settings.items():
        if isinstance(value, Mapping):
            found += _flat(value, f"{prefix}{name}.")
        else:
            found.append((f"{prefix}{name}", json.dumps(value)))
    return found
