"""How far a stage of a run is, in the cells of a report."""

from __future__ import annotations

from training.report.folder import RunRecord


def progress_cells(run: RunRecord, stage: str) -> str:
    """Steps, images, epochs, rate and memory of the stage's last logged line; a dash where it has none.

    A line of a run from before images, epochs and memory were logged has steps and rate alone.
    """
    if stage not in run.journals:
        return "–"
    last = run.journals[stage][-1]
    parts = [f"{last['step']:,} of {run.steps(stage):,} steps"]
    if "images" in last:
        parts += [f"{last['images']:,} images", f"{last['epochs']:.2f} epochs"]
    parts.append(f"{last['per_s']:.2f} steps/s")
    if "memory_gb" in last:
        parts.append(f"{last['memory_gb']:.1f} GB")
    return ", ".join(parts)
