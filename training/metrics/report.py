"""The report of an evaluation: one JSON file, one table, pictures."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from dd_core.files import replacing
from training.data.images import from_pixels
from training.metrics.plots import image_grid


@dataclass(frozen=True)
class Row:
    """One measured set of images.

    Args:
        name, kind: a plan's name and `plan`, or `reconstruction`, `real-test`, `real-split`.
        images, reference_images: how many were held against how many.
        fid, kid, kid_std: Fréchet and kernel distance (mean and deviation over subsets); where the reference
            is statistics alone, FID is all there is.
        precision, recall: of `manifold_images` against as many real ones.
        inception_score, inception_score_std: of the original network's classes, where its classifier was
            given.
        classifier_score, classifier_score_std: exp of the mean divergence of a linear probe's
            class probabilities from their mean, at most the number of classes. This is not
            the Inception score: that needs a classifier that the Inception file lacks.
        class_accuracy: share of images that the probe gives the class asked for;
            `probe_accuracy` is what it reaches on real images that it did not learn from.
        right_caption: share of pictures that lie closer to their prompt than to 99 others
            (`metrics.caption_retrieval`); None where classes are the condition, and then the figures of the
            classifier are None where texts are.
        clip_score: mean fit of pictures and captions, 0 to 100, where CLIP's weights were given.
        teacher_lpips, same_answer, same_colour: against the teacher's pictures of the same noise and
            conditions (`metrics.sameness`).
        passes: forward passes of the plan.
        ms_per_image: time of one image alone, whole call, median.
        images_per_s: throughput in a batch.
    """

    name: str
    kind: str
    images: int
    reference_images: int
    fid: float
    kid: float | None
    kid_std: float | None
    precision: float | None
    recall: float | None
    manifold_images: int
    inception_score: float | None = None
    inception_score_std: float | None = None
    classifier_score: float | None = None
    classifier_score_std: float | None = None
    class_accuracy: float | None = None
    probe_accuracy: float | None = None
    right_caption: float | None = None
    clip_score: float | None = None
    teacher_lpips: float | None = None
    same_answer: float | None = None
    same_colour: float | None = None
    passes: int | None = None
    ms_per_image: float | None = None
    images_per_s: float | None = None

    def with_cost(self, passes: int, ms_per_image: float | None, images_per_s: float | None) -> Row:
        """The row with what the plan costs."""
        return dataclasses.replace(self, passes=passes, ms_per_image=ms_per_image, images_per_s=images_per_s)

    def metrics(self) -> dict[str, float]:
        """The figures as a bundle's manifest holds them, those that were measured."""
        values = dataclasses.asdict(self)
        return {k: float(v) for k, v in values.items() if isinstance(v, int | float) and k != "passes"}


def write_grid(image_NHW3: Tensor, path: Path, columns: int) -> None:
    """uint8 images `[N, H, W, 3]` row by row as a PNG."""
    image_grid(from_pixels(image_NHW3), path, columns=columns)


def read_another_seed(folder: Path) -> dict[str, float]:
    """What the second table's figures are for pictures of two seeds; `{}` where that was not measured."""
    report = folder / "evaluation.json"
    settings = json.loads(report.read_text(encoding="utf-8"))["settings"] if report.exists() else {}
    found: dict[str, float] = settings.get("another_seed", {})
    return found


def write_report(rows: Sequence[Row], settings: dict[str, Any], out: Path) -> None:
    """Writes `evaluation.json` (settings and rows) and `evaluation.md` (the table)."""
    record = {"settings": settings, "rows": [dataclasses.asdict(r) for r in rows]}
    write_record(record, table(rows, settings), out / "evaluation")


def write_record(record: Mapping[str, Any], text: str, path: Path) -> None:
    """Write `PATH.json` and `PATH.md`, each whole or not at all."""
    for suffix, content in (("json", json.dumps(record, indent=1) + "\n"), ("md", text)):
        with replacing(path.with_name(f"{path.name}.{suffix}")) as temporary:
            temporary.write_text(content, encoding="utf-8")


_COLUMNS = (
    "sampler", "passes", "images", "FID", "FID ÷ teacher", "KID ·10³", "classifier score",
    "precision", "recall", "class accuracy", "ms an image", "images/s",
)  # fmt: skip
_TEXT_COLUMNS = tuple("right caption" if c == "class accuracy" else c
                      for c in _COLUMNS if c != "classifier score")  # fmt: skip


def table(rows: Sequence[Row], settings: dict[str, Any]) -> str:
    """The rows as one Markdown table, with the protocol under it."""
    teacher = next((r.fid for r in rows if r.name == "teacher"), None)
    by_text = any(r.right_caption is not None for r in rows)
    columns = _TEXT_COLUMNS if by_text else _COLUMNS
    if by_text:  # a column's name says how many captions a picture was told from
        columns = tuple(f"{c} of {settings['candidates']}" if c == "right caption" else c for c in columns)
    lines = ["| " + " | ".join(columns) + " |", "|---" * len(columns) + "|"]
    for r in rows:
        ratio = r.fid / teacher if teacher and r.kind == "plan" else None
        classes = () if by_text else (shown(r.classifier_score, ".2f"),)
        cells = (
            r.name,
            shown(r.passes, "d"),
            f"{r.images:,} against {r.reference_images:,}",
            f"{r.fid:.2f}",
            shown(ratio, ".2f"),
            with_spread(r.kid, r.kid_std, 1e3),
            *classes,
            shown(r.precision, ".3f"),
            shown(r.recall, ".3f"),
            shown(r.right_caption if by_text else r.class_accuracy, ".3f"),
            shown(r.ms_per_image, ".1f"),
            shown(r.images_per_s, ".1f"),
        )
        lines.append("| " + " | ".join(cells) + " |")
    same = _sameness(rows, settings)
    if by_text:
        return "\n".join([*lines, "", _text_notes(settings), "", *same])
    probe = shown(rows[0].probe_accuracy if rows else None, ".3f")
    counts = ", ".join(sorted({f"{r.manifold_images:,}" for r in rows}))
    notes = (
        f"Inception features in {settings['precision']}; seed {settings['seed']}, labels i mod "
        f"{settings['classes']}; times on {settings['device']} with {settings['threads']} threads, one image "
        f"alone and batches of {settings['batch']}. FID falls as images are added: compare rows "
        f"with equal numbers only. Precision and recall are of {counts} images against as many. "
        "The classifier score and the class accuracy are of a linear classifier on these features, "
        f"which is right on {probe} of the real images that it did not learn from; the usual Inception "
        "score cannot be computed, because the Inception file has no classifier. "
        "`real-test`: real test images against the reference; `real-split`: one half of the test images "
        "against the other; `reconstruction`: test images through the tokenizer."
    )
    return "\n".join([*lines, "", notes, "", *same])


def _sameness(rows: Sequence[Row], settings: Mapping[str, Any]) -> list[str]:
    """Lines of a second table: each plan's pictures beside the teacher's of the same seeds."""
    found = [(r.name, r.teacher_lpips, r.same_answer, r.same_colour) for r in rows]
    found = [line for line in found if line[1] is not None]
    if chance := settings.get("another_seed"):
        figures = (chance["teacher_lpips"], chance["same_answer"], chance["same_colour"])
        found.append(("the teacher, another seed", *figures))
    if not found:
        return []
    lines = ["| beside the teacher's picture of the same seed | LPIPS | same answer | same main colour |"]
    lines.append("|---" * 4 + "|")
    lines += [
        f"| {name} | {shown(lpips, '.3f')} | {shown(answer, '.3f')} | {shown(colour, '.3f')} |"
        for name, lpips, answer, colour in found
    ]
    notes = (
        "LPIPS: 0 for equal pictures. Same answer: share that the judge above takes for the same class or "
        "caption as the teacher's picture, right or wrong. Same main colour: hues less than 45° apart, or "
        "both grey."
    )
    return [*lines, "", notes, ""]


def _text_notes(settings: dict[str, Any]) -> str:
    among = settings["candidates"]
    return (
        f"Inception features in {settings['precision']}; seed {settings['seed']}, prompt i mod "
        f"{settings['classes']} of the held-out pairs of concept and style, whose real pictures are the "
        f"reference; times on {settings['device']} with {settings['threads']} threads, one image alone and "
        f"batches of {settings['batch']}. FID falls as images are added: compare rows with equal numbers "
        f"only. Right caption of {among}: see `training/metrics/caption_retrieval.py`; a blind guess reaches "
        f"{1 / among:.3f}, the real held-out pictures {settings['right_caption_of_real']:.3f}. `real-test`: "
        "real pictures that were learned from against the reference; `real-split`: one half of them against "
        "the other; `reconstruction`: the reference's pictures through the tokenizer, held against "
        "themselves."
    )


def with_spread(value: float | None, spread: float | None, scale: float = 1.0) -> str:
    """A mean and a deviation as a table has them."""
    return "–" if value is None or spread is None else f"{scale * value:.2f} ± {scale * spread:.2f}"


def shown(value: float | None, how: str) -> str:
    """A figure as a table has it; a dash for none."""
    return "–" if value is None else format(value, how)
