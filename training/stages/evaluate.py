"""Stage (e): every plan measured against real images, in one table.

    plan ─▶ images (i mod K, keys (seed, i)) ─▶ features ─▶ FID KID precision recall ─▶ row ─▶ table

Beside the plans stand what they cannot pass (the tokenizer's reconstructions) and what real
images measure among themselves, with as many images: without these rows no figure here says
how much of it is the sampler's.

All of it resumes: images, features and rows are on disk under a fingerprint of what made them,
and a row is measured again only where that changed.

Shapes: N images, K classes, H W pixels.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dd_core.codebook import lookup
from dd_core.errors import InvalidRequestError
from dd_core.files import save_tensors
from dd_core.models.build import AnyTokenizer
from dd_core.plan import Plan, Preset
from dd_core.sampling import Sampler, sample_images, to_pixels
from training.data.cifar10 import CIFAR10_CLASSES
from training.data.conditions import ClassConditions, Conditions
from training.data.images import ImageSet
from training.metrics.caption_retrieval import Agreement
from training.metrics.features import Extractor, FeatureExtractor, content_hash, features_of, real_store
from training.metrics.judge import Judge
from training.metrics.report import Row, write_grid, write_report
from training.metrics.rows import fingerprint_of, once
from training.metrics.timing import plan_times
from training.recipes.settings import EvaluateRecipe

log = logging.getLogger("dd_train")

_VERSION = 2  # raise it when a measure changes, so that no old row survives


@dataclass(frozen=True)
class Prompted:
    """Prompts that a model of texts is asked for, and the measure of whether they show.

    `fingerprint` names the prompts and all that the agreement was made of.
    """

    conditions: Conditions
    agreement: Agreement
    fingerprint: str


def evaluate_plans(
    sampler: Sampler,
    presets: Sequence[Preset | Plan],
    recipe: EvaluateRecipe,
    reference: ImageSet,
    test: ImageSet,
    out: Path,
    *,
    weights: Mapping[str, str],
    seed: int = 0,
    extractor: Extractor | None = None,
    class_names: Sequence[str] = CIFAR10_CLASSES,
    timing: bool = True,
    prompts: Prompted | None = None,
) -> list[Row]:
    """Measures every plan, the tokenizer and real images.

    Args:
        presets: plans to measure, in the order of the table.
        recipe: `images` a plan; the first `reference` images of `reference`; sampling `batch`.
        reference: real images that every set is held against and that the probe learns from,
            the training images by the usual protocol.
        test: other real images, at least 20: the tokenizer reconstructs the first
            `recipe.images` of them (all of them where there are fewer), the same ones are held
            against the reference, and one half of all against the other.
        out: gets `samples/PLAN.safetensors`, `grids/PLAN.png`, `comparison.png`,
            `evaluation.json`, `evaluation.md`, `features/`, `rows/`.
        weights: a hash for each of `tokenizer`, `student`, `teacher`, `marginal`: a row is reused as
            long as those that its plan needs stay the same.
        extractor: None = Inception in float32 on the sampler's device.
        timing: False leaves out the time an image takes (say, on a machine that is busy).
        prompts: for a model of texts; the reference's label i is then that of prompt i, and the tokenizer
            reconstructs the reference, since `test` was learned from.

    Returns:
        the rows of the table: plans, `reconstruction`, `real-test`, `real-split`.

    Raises:
        InvalidRequestError: too few images, two plans of one name, or `test` is the reference.
        InvalidPlanError: a plan that the sampler cannot run.
        DataError: the Inception weights cannot be had.
    """
    plans = [p.plan if isinstance(p, Preset) else p for p in presets]
    _check(plans, recipe, reference, test)
    measurer = extractor or FeatureExtractor(sampler.device)
    reference = ImageSet(reference.images[: recipe.reference], reference.labels[: recipe.reference])
    conditions: Conditions = ClassConditions(len(class_names)) if prompts is None else prompts.conditions
    judge = Judge(reference, measurer, conditions.count, None if prompts is None else prompts.agreement)
    identity = {
        "version": _VERSION,
        "network": measurer.fingerprint,
        "precision": measurer.precision,
        "reference": content_hash(reference.images, reference.labels),
    }
    made: dict[str, object] = {"seed": seed, "images": recipe.images, "classes": conditions.count}
    if prompts is not None:
        identity["prompts"] = prompts.fingerprint
        made["prompts"] = prompts.fingerprint
    settings = {
        **identity,
        **made,
        "weights": dict(weights),
        "device": str(sampler.device),
        "threads": torch.get_num_threads(),
        "batch": recipe.batch,
    }
    if prompts is not None:
        settings["right_caption_of_real"] = prompts.agreement(reference.images, reference.labels)
    columns = min(10, conditions.count)
    for folder in ("samples", "grids", "rows"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    first: list[Tensor] = []

    def add(name: str, key: dict[str, object], make: Callable[[], Row]) -> None:
        rows.append(once(out / "rows" / f"{name}.json", fingerprint_of({**identity, **key}), make))
        write_report(rows, settings, out)

    for plan in plans:
        parts = {part: weights[part] for part in sorted({"tokenizer", *plan.needs})}
        key = {
            **made,
            "weights": parts,
            "plan": asdict(plan),
            "draw": repr(sampler.draw),
            "flow": repr(sampler.flow),
        }
        images, labels = _samples(sampler, plan, recipe, seed, conditions, out, fingerprint_of(key))
        write_grid(images[: 10 * columns], out / "grids" / f"{plan.name}.png", columns)
        first.append(images[:columns])

        def plan_row(plan: Plan = plan, images: Tensor = images, labels: Tensor = labels) -> Row:
            pixels = _channels_first(images)
            features = features_of(pixels, measurer, out / "features", plan.name)
            row = judge.measure(plan.name, "plan", features, labels, prompted=pixels)
            times = plan_times(sampler, plan, recipe.batch, seed, conditions) if timing else (None, None)
            return row.with_cost(plan.cost, *times)

        # A row without times is not the row that was asked for with them.
        add(
            plan.name,
            {**key, "timing": timing, "batch": recipe.batch, "device": str(sampler.device)},
            plan_row,
        )
    if first:
        write_grid(torch.cat(first), out / "comparison.png", len(first[0]))

    held = ImageSet(test.images[: recipe.images], test.labels[: recipe.images])
    drawn = held if prompts is None else reference.first(recipe.images)

    def reconstruction() -> Row:
        pixels = _reconstruct(sampler, drawn.images, recipe.batch)
        write_grid(_pairs(drawn.images, pixels), out / "grids" / "reconstruction.png", 10)
        pixels = _channels_first(pixels)
        features = features_of(pixels, measurer, out / "features", "reconstruction")
        return judge.measure(
            "reconstruction", "reconstruction", features, drawn.labels, prompted=pixels if prompts else None
        )

    def real_test() -> Row:
        features = features_of(held.images, measurer, real_store(), "test images")
        return judge.measure("real-test", "real", features, held.labels)

    def real_split() -> Row:
        half = len(test.images) // 2
        one = features_of(test.images[:half], measurer, real_store(), "first half")
        two = features_of(test.images[half : 2 * half], measurer, real_store(), "second half")
        return judge.measure("real-split", "real", two, test.labels[half : 2 * half], real=one)

    add(
        "reconstruction",
        {"tokenizer": weights["tokenizer"], "test": content_hash(drawn.images, drawn.labels)},
        reconstruction,
    )
    add("real-test", {"test": content_hash(held.images, held.labels)}, real_test)
    add("real-split", {"test": content_hash(test.images, test.labels)}, real_split)
    return rows


def _check(plans: list[Plan], recipe: EvaluateRecipe, reference: ImageSet, test: ImageSet) -> None:
    names = [p.name for p in plans]
    if len(set(names)) < len(names):
        raise InvalidRequestError(f"two plans have one name among {', '.join(names)}", param="presets")
    if recipe.images < 10:
        raise InvalidRequestError(f"a plan needs 10 or more images, not {recipe.images}", param="images")
    for what, have, want in (
        ("reference", len(reference.images), max(10, recipe.reference)),
        ("test", len(test.images), 20),
    ):
        if have < want:
            raise InvalidRequestError(f"evaluation needs {want} {what} images and has {have}", param=what)
    same = min(len(reference.images), len(test.images))
    if torch.equal(reference.images[:same], test.images[:same]):
        raise InvalidRequestError(
            "reference and test must be different images: the probe learns from the reference", param="test"
        )


def _samples(
    sampler: Sampler,
    plan: Plan,
    recipe: EvaluateRecipe,
    seed: int,
    conditions: Conditions,
    out: Path,
    fingerprint: str,
) -> tuple[Tensor, Tensor]:
    """A plan's images `[N, H, W, 3]` and labels `[N]`, from disk as far as they are there.

    The file is rewritten at every tenth of the way, so a killed run loses no more than that.
    """
    path = out / "samples" / f"{plan.name}.safetensors"
    parts: list[Tensor] = []
    if path.exists():
        with safe_open(path, "pt") as file:
            known = (file.metadata() or {}).get("fingerprint") == fingerprint
        if known:
            parts = [load_file(path)["images"]]
    done = len(parts[0]) if parts else 0
    labels = torch.arange(recipe.images) % conditions.count
    saved, began, start = done, time.perf_counter(), done
    while done < recipe.images:
        stop = min(done + recipe.batch, recipe.images)
        parts.append(
            sample_images(
                sampler, plan, conditions(labels[done:stop]), [(seed, i) for i in range(done, stop)]
            )
        )
        done = stop
        if done == recipe.images or done - saved >= max(recipe.batch, recipe.images // 10):
            images = {"images": torch.cat(parts), "labels": labels[:done].clone()}
            save_tensors(images, path, {"fingerprint": fingerprint})
            saved = done
            rate = (done - start) / (time.perf_counter() - began)
            left = (recipe.images - done) / rate
            log.info("%s: %d/%d images %.1f/s %.0fs left", plan.name, done, recipe.images, rate, left)
    return torch.cat(parts), labels


@torch.inference_mode()
def _reconstruct(sampler: Sampler, image_N3HW: Tensor, batch: int) -> Tensor:
    """Images through the tokenizer and back, `[N, H, W, 3]` uint8."""
    tokenizer, parts = sampler.tokenizer, []
    assert isinstance(tokenizer, AnyTokenizer), "one that was prepared for inference has no encoder"
    for part in torch.split(image_N3HW, batch):
        x = part.to(sampler.device).float() / 127.5 - 1
        codes = lookup(tokenizer.codebook_VC, tokenizer.encode(x))
        parts.append(to_pixels(tokenizer.to_image(codes)).cpu())
    return torch.cat(parts)


def _channels_first(image_NHW3: Tensor) -> Tensor:
    return image_NHW3.permute(0, 3, 1, 2).contiguous()


def _pairs(image_N3HW: Tensor, other_NHW3: Tensor, columns: int = 10, rows: int = 5) -> Tensor:
    """Rows of real images, each above its reconstructions, `[·, H, W, 3]`."""
    real = image_N3HW.permute(0, 2, 3, 1)
    lines = min(rows, len(real) // columns)
    sheet = [p[i * columns : (i + 1) * columns] for i in range(lines) for p in (real, other_NHW3)]
    return torch.cat(sheet)
