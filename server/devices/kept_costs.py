"""Measured costs of passes, kept in files across starts: one for each model and kind of device.

    what costs follow from ─▶ a file's name ─ read ─▶ costs by work, to be checked ─ write ─▶ the same file

A file is untrusted: one that is damaged, or of something else, counts as none. Servers that start at once
replace it one after the other, each as a whole.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from dd_core.errors import reason
from dd_core.files import replacing
from dd_core.hub.storage import home_folder
from dd_core.regular import read_regular
from dd_core.runtime import cpu_name
from server.devices.placement import usable_cores
from server.scheduling.costs import Kind, Work, WorkCosts

log = logging.getLogger("dd_server.warmup")

_FORMAT = 1
_MAX_BYTES = 2**20

Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    kind: Kind
    plan: str
    seconds: dict[int, Seconds]
    largest: int


class _Content(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    follows_from: dict[str, Any]
    costs: list[_Entry]


@dataclass(frozen=True)
class CostFile:
    """The file of the costs of one model that follow from `facts`, which JSON can hold."""

    folder: Path | None  # None = `$DD_HOME/costs`
    facts: Mapping[str, Any]

    @property
    def path(self) -> Path:
        """Its place; other facts have another."""
        name = hashlib.sha256(json.dumps(self._facts, sort_keys=True).encode()).hexdigest()[:32]
        return (self.folder or home_folder() / "costs") / f"{name}.json"

    @property
    def _facts(self) -> dict[str, Any]:
        return {"format": _FORMAT, **self.facts}

    def read(self, model: str) -> dict[Work, WorkCosts]:
        """Return the costs that it holds, as of `model`; none where it does not exist or cannot be used."""
        try:
            text = read_regular(self.path, _MAX_BYTES)
        except (FileNotFoundError, RuntimeError):  # not yet; there is no home folder
            return {}
        except (OSError, ValueError) as error:
            return self._passed_over(reason(error))
        try:
            content = _Content.model_validate_json(text)
        except ValidationError as error:
            return self._passed_over(error.errors()[0]["msg"])
        if content.follows_from != json.loads(json.dumps(self._facts)):
            return self._passed_over("they are of another machine, build or model")
        buckets = set(self.facts["buckets"])  # of which the check runs the smallest
        for entry in content.costs:
            fits = min(buckets) in entry.seconds and {*entry.seconds, entry.largest} <= buckets
            if not fits:
                return self._passed_over("they are of other sizes of batch")
        return {
            Work(model, entry.kind, entry.plan): WorkCosts(entry.seconds, entry.largest)
            for entry in content.costs
        }

    def write(self, costs: Mapping[Work, WorkCosts]) -> None:
        """Keep costs in the place of those before; where that is not possible, the log says so."""
        entries = [
            {"kind": work.kind, "plan": work.plan, **known._asdict()} for work, known in sorted(costs.items())
        ]
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as temporary:
                text = json.dumps({"follows_from": self._facts, "costs": entries}, indent=1)
                temporary.write_text(text + "\n", encoding="utf-8")
        except (OSError, RuntimeError) as error:
            # No warning: a server that may not write measures at each start, as may be wanted.
            log.info("the measured costs are not kept: %s", error)

    def _passed_over(self, why: str) -> dict[Work, WorkCosts]:
        log.warning("the costs in %s are passed over: %s", self.path, why)
        return {}


def device_facts(hardware: str, threads: int, processes: int) -> dict[str, Any]:
    """Return all of the machine that costs on a device follow from.

    Args:
        hardware: the kind of device, as its process names it.
        threads: as of `DeviceOptions`.
        processes: device processes of the server, which share the CPU.
    """
    return {
        "torch": torch.__version__,
        "cpu": cpu_name(),
        "cores": usable_cores(),
        "device": hardware,
        "threads": threads,
        "processes": processes,
    }
