"""What a check saw: one line a quantity, and the outputs that nobody looked at."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dd_core.models.adapters import Adapted

# What the manifest's conventions ask of float32; exact equality for integers and masks.
ATOL, RTOL = 1e-4, 1e-4


@dataclass(frozen=True)
class Line:
    """One quantity of one fixture; `passed` None = cannot be compared, `note` says why."""

    fixture: str
    quantity: str
    absolute: float | None
    relative: float | None
    passed: bool | None
    note: str = ""


@dataclass
class Report:
    """All lines of a run, and which keys of the reference's weights were not needed, with the reason."""

    lines: list[Line] = field(default_factory=list)
    ignored: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def passed(self) -> bool:
        return bool(self.lines) and all(line.passed is not False for line in self.lines)

    def fail(self, fixture: str, quantity: str, note: str) -> None:
        self.lines.append(Line(fixture, quantity, None, None, False, note))

    def skip(self, fixture: str, quantity: str, why: str) -> None:
        self.lines.append(Line(fixture, quantity, None, None, None, why))

    def keys(self) -> str:
        """The keys that were not needed, a line each; numbers in them are shown as `*`."""
        return "\n".join(f"{file}: {key} not needed: {why}" for (file, key), why in self.ignored.items())

    def table(self) -> str:
        """The lines as text, failures marked."""
        rows = [("fixture", "quantity", "max abs", "max rel", "", "")]
        for line in self.lines:
            numbers = ["-" if v is None else f"{v:.1e}" for v in (line.absolute, line.relative)]
            verdict = {True: "pass", False: "FAIL", None: "skip"}[line.passed]
            rows.append((line.fixture, line.quantity, *numbers, verdict, line.note))
        widths = [max(len(r[i]) for r in rows) for i in range(5)]
        return "\n".join("  ".join([*(r[i].ljust(widths[i]) for i in range(5)), r[5]]).rstrip() for r in rows)


@dataclass
class Fixture:
    """One recorded fixture: its inputs, the reference's weights and outputs, and our findings."""

    name: str
    folder: Path
    facts: dict[str, Any]
    report: Report
    compared: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        path = self.folder / self.facts["io"]
        self.io = load_file(path)
        self._check_tensors(path)

    def _check_tensors(self, path: Path) -> None:
        """What the manifest lists must be there: a quantity that was left out is no quantity that agrees."""
        with safe_open(path, "pt") as stored:
            for name, told in self.facts.get("tensors", {}).items():
                if name not in self.io:
                    self.report.fail(self.name, name.removeprefix("out."), "in the manifest, not in the file")
                    continue
                entry = stored.get_slice(name)
                found = [entry.get_shape(), entry.get_dtype()]
                if found != told:
                    self.report.fail(
                        self.name, name.removeprefix("out."), f"{found}, the manifest says {told}"
                    )

    def ready(self, model: nn.Module) -> Any:
        """A model as it is to be checked: the reference model."""
        return model

    @property
    def config(self) -> dict[str, Any]:
        return self.facts.get("config", {})  # type: ignore[no-any-return]

    @property
    def cases(self) -> dict[str, Any]:
        return self.facts.get("cases", {})  # type: ignore[no-any-return]

    def inputs(self, name: str) -> Tensor:
        return self.io[f"in.{name}"]

    def weights(self, kind: str) -> dict[str, Tensor]:
        """The reference's state dict whose file name starts with `kind`."""
        found = [f for f in self.facts["weights"] if f.startswith(f"{kind}.")]
        if len(found) != 1:
            raise KeyError(f"no weights {kind}.* among {self.facts['weights']}")
        return load_file(self.folder / found[0])

    def adapted(self, kind: str, adapt: Callable[[dict[str, Tensor]], Adapted]) -> dict[str, Tensor]:
        """The same under our names; the keys that ours does not need are noted with their reason.

        Raises:
            WeightsError: a key that is neither used nor known not to be needed.
        """
        found = adapt(self.weights(kind))
        for key, why in found.ignored.items():
            self.report.ignored[kind, re.sub(r"\d+(?=\.|$)", "*", key)] = why
        return found.state

    def outputs(self, prefix: str) -> list[str]:
        """Names of the recorded outputs under a prefix, without `out.`."""
        return sorted(k[4:] for k in self.io if k.startswith(f"out.{prefix}"))

    def has(self, name: str) -> bool:
        return f"out.{name}" in self.io

    def compare(self, name: str, ours: Tensor, *, atol: float = ATOL, rtol: float = RTOL) -> None:
        """Holds ours against the recorded output `out.name`."""
        theirs = self.io[f"out.{name}"]
        self.compared.add(name)
        if ours.shape != theirs.shape:
            self.report.fail(self.name, name, f"shape {list(ours.shape)}, recorded {list(theirs.shape)}")
            return
        if not theirs.is_floating_point():
            wrong = int((ours.long() != theirs.long()).sum())
            note = "" if wrong == 0 else f"{wrong} of {theirs.numel()} differ"
            self.report.lines.append(Line(self.name, name, float(wrong > 0), None, wrong == 0, note))
            return
        ours, theirs = ours.float(), theirs.float()
        same_infinity = bool((torch.isinf(ours) == torch.isinf(theirs)).all()) and bool(
            (ours[torch.isinf(ours)] == theirs[torch.isinf(ours)]).all()
        )
        finite = torch.isfinite(theirs) & torch.isfinite(ours)
        difference = (ours - theirs)[finite].abs()
        size = theirs[finite].abs()
        absolute = float(difference.max()) if difference.numel() else 0.0
        relative = float((difference / size.clamp(min=1e-6)).max()) if difference.numel() else 0.0
        close = bool((difference <= atol + rtol * size).all())
        numbers = not bool(torch.isnan(ours).any() or torch.isnan(theirs).any())
        passed = same_infinity and close and numbers
        note = "" if same_infinity else "excluded entries differ"
        note = note if numbers else "not a number"
        if atol != ATOL:
            note = (note + f" (tolerance {atol:g})").strip()
        self.report.lines.append(Line(self.name, name, absolute, relative, passed, note))

    def check(self, name: str, holds: bool, note: str) -> None:
        """A condition that the recorded output `name` must meet, where it depends on random numbers."""
        self.compared.add(name)
        self.report.lines.append(Line(self.name, name, None, None, holds, note))

    def skip(self, name: str, why: str) -> None:
        """An output that depends on the reference's random numbers."""
        self.compared.add(name)
        self.report.skip(self.name, name, why)

    def finish(self) -> None:
        """Every recorded output must have been looked at."""
        for name in self.outputs(""):
            if name not in self.compared:
                self.report.fail(self.name, name, "recorded, but no check compares it")


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest.

    Raises:
        ValueError: not there, or not a manifest of fixtures.
    """
    path = folder / "manifest.json"
    try:
        manifest = json.loads(path.read_text())
        fixtures = manifest["fixtures"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a manifest of fixtures ({error})") from error
    if not isinstance(fixtures, dict) or not fixtures:
        raise ValueError(f"{path}: names no fixtures")
    return manifest  # type: ignore[no-any-return]


__all__ = ["Fixture", "Line", "Report", "SafetensorError", "read_manifest"]
