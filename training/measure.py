"""Evaluation as a tool: the plans of any model against any real images.

    model ─▶ plan ─▶ chunks of images ─▶ features ─▶ FID KID IS precision recall ─▶ row ─▶ table

`training.stages.evaluate` measures a run on the data that it was trained on, with the tokenizer and real
images beside the plans; here the model may be one that was never trained here, and the reference a folder or
statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields, replace
from pathlib import Path

import torch

from dd_core import plan
from dd_core.bundle import load_bundle
from dd_core.condition import Condition
from dd_core.errors import InvalidRequestError
from dd_core.hub.locate import locate
from dd_core.models.config import ModelConfig
from dd_core.plan import Plan
from dd_core.sampling import Sampler, sample_images
from dd_core.text.encoder import checked_prompt
from training import parallel
from training.data.beside import pictures_with_captions
from training.data.conditions import ClassConditions, Conditions, EncodedConditions
from training.data.packages import DataError
from training.data.text import encoder_of
from training.digest import weights_digest
from training.metrics.chunks import Chunks
from training.metrics.classifier import Classifier
from training.metrics.clip import ClipScore
from training.metrics.comparison import write_comparison
from training.metrics.features import Extractor
from training.metrics.fid import frechet_distance, inception_score, kernel_distance, precision_recall
from training.metrics.judge import MANIFOLD
from training.metrics.paper import paper_figures
from training.metrics.reference import LEAST, Reference, read_reference
from training.metrics.report import Row, write_grid
from training.metrics.rows import fingerprint_of, measured, once
from training.metrics.timing import plan_times
from training.presets import presets, runs
from training.run import Run
from training.trained import load_models, sampler_of, weights_of

log = logging.getLogger("dd_train")

_VERSION = 1  # raise it when a measure changes, so that no old row survives


@dataclass(frozen=True)
class Subject:
    """A model to measure.

    Args:
        name: for the report.
        model: its architecture, by which the paper's figures are found.
        plans: those to measure; which of them run is found here.
        weights: a hash of its weights.
        parts: of a run, one of each part (`weights_of`), by which its bundle knows whose figures they are.
        encode: prompts → condition; None for a model of classes, and where there is no encoder.
    """

    name: str
    model: ModelConfig
    sampler: Sampler
    plans: Sequence[Plan]
    weights: str
    encode: Callable[[Sequence[str]], Condition] | None = None
    parts: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of_bundle(cls, source: str, device: torch.device) -> Subject:
        """A bundle by name or folder; a published one is fetched and converted.

        Raises:
            BundleNotFoundError, HubError, BundleError: it cannot be had.
        """
        bundle = load_bundle(locate(source), device)
        encode = None if bundle.text is None else bundle.text.encode
        plans = [preset.plan for preset in bundle.presets]
        return cls(bundle.name, bundle.manifest.model, bundle.sampler, plans, bundle.digest, encode)

    @classmethod
    def of_run(cls, run: Run) -> Subject:
        """The models of a run.

        Raises:
            RecipeError: an earlier stage is missing.
        """
        models, plans = load_models(run), [preset.plan for preset in presets(run.recipe)]
        sampler = sampler_of(run, *models)
        encode, parts = encoder_of(run.recipe, run.device), weights_of(sampler)
        return cls(run.recipe.name, run.recipe.model, sampler, plans, weights_digest(*models), encode, parts)

    def runnable(self, names: Sequence[str] = ()) -> list[Plan]:
        """The model's plans and, beside them, the baselines that it can run: the teacher, skip-n, onestep*.

        Raises:
            InvalidRequestError: `names` has one that there is not.
        """
        blocks = self.sampler.layout.num_blocks
        skips = {10: (1, 2), 256: (106, 156)}.get(blocks, (max(1, blocks * 106 // 256),))  # as in Table 1
        found = {p.name: p for p in self.plans}
        for baseline in (plan.teacher(blocks), *(plan.skip(blocks, n) for n in skips), plan.onestep(blocks)):
            found.setdefault(baseline.name, baseline)
        can = {name: p for name, p in found.items() if runs(self.sampler, p)}
        if missing := [name for name in names if name not in can]:
            raise InvalidRequestError(
                f"{self.name} has no plan {missing[0]!r} that it can run; it runs {', '.join(can)}",
                param="plans",
            )
        return [can[name] for name in names] if names else list(can.values())


@dataclass(frozen=True)
class Request:
    """What to measure.

    Args:
        reference: a folder of pictures, or an .npz (`training.metrics.reference`).
        images: how many a plan draws; where texts are the condition, at most one a caption.
        plans: names; none = all.
        captions: a file of captions for a model of texts; None = those beside the pictures.
        inception: pytorch-fid's weights for the Inception score, or `fetch`; None = no score.
        samples: also write the pictures of each plan as an .npz.
        timing: False leaves out the time an image takes.
        clip: the folder of a CLIP model for the CLIP score of a model of texts; None = no score.
    """

    reference: Path
    images: int = 50_000
    plans: tuple[str, ...] = ()
    captions: Path | None = None
    inception: str | None = None
    samples: bool = True
    batch: int = 100
    seed: int = 0
    timing: bool = True
    clip: Path | None = None

    def changed(self) -> list[str]:
        """Names of the fields that are not as they are by default."""
        return [f.name for f in fields(self) if f.default not in (MISSING, getattr(self, f.name))]


def measure(subject: Subject, request: Request, extractor: Extractor, out: Path) -> list[Row]:
    """Measure every plan of the request; `out` gets `evaluation.md`, `evaluation.json`, `rows/`, `samples/`,
    `grids/`, and while it runs `chunks/`.

    All of it resumes: rows, and the chunks of a row that is not finished. Of several ranks each draws its
    share of the chunks. All leave then but rank 0, which makes the rows of them, and times plans undisturbed.

    Returns:
        the rows; none on the other ranks.

    Raises:
        DataError: a reference, captions or classifier that cannot be used.
        InvalidRequestError: too few images, an unknown plan, or a model of texts without an encoder.
    """
    plans = subject.runnable(request.plans)
    conditions, captions, images = _conditions(subject, request)
    with parallel.in_turn():
        classifier = None if request.inception is None else Classifier(request.inception)
        clip = _clip(subject, request, conditions)
    real = read_reference(request.reference, extractor)
    paper = paper_figures(subject.model)
    sampler = replace(subject.sampler, exact=False)
    for folder in ("rows", "samples", "grids"):
        (out / folder).mkdir(parents=True, exist_ok=True)
    notes = _notes(subject, request, real, extractor, classifier, clip, images)
    identity = {
        "version": _VERSION,
        "network": extractor.fingerprint,
        "precision": extractor.precision,
        "weights": subject.weights,
        "seed": request.seed,
        "captions": captions,
        "classes": conditions.count,
        "draw": repr(sampler.draw),
        "flow": repr(sampler.flow),
        "clip": clip and clip.fingerprint,
    }
    settings = {"model": subject.name, "reference": real.source, "images": images, **identity}
    asked = {"images": images, "reference": real.fingerprint, "timing": request.timing}
    asked |= {"inception": classifier is not None, "samples": request.samples}
    sets = []
    for chosen in plans:
        drawn = {**identity, "plan": asdict(chosen)}
        row_of = out / "rows" / f"{chosen.name}.json", fingerprint_of({**drawn, **asked})
        chunks = Chunks(out / "chunks" / chosen.name, images, fingerprint_of(drawn), request.samples, clip)
        sets.append((chosen, chunks, row_of))

    def draw(chosen: Plan, chunks: Chunks) -> None:
        chunks.draw(sampler, chosen, conditions, extractor, seed=request.seed, batch=request.batch)

    if parallel.connected():
        for chosen, chunks, row_of in sets:
            if measured(*row_of) is None:
                draw(chosen, chunks)
    if not parallel.leave():
        return []
    rows: list[Row] = []
    for chosen, chunks, row_of in sets:

        def row(chosen: Plan = chosen, chunks: Chunks = chunks) -> Row:
            draw(chosen, chunks)
            if request.samples:
                chunks.write_npz(out / "samples" / f"{chosen.name}.npz", conditions)
            _grid(sampler, chosen, conditions, request.seed, out / "grids" / f"{chosen.name}.png")
            made = _row(chosen, chunks, real, classifier)
            if not request.timing:
                return made.with_cost(chosen.cost, None, None)
            times = plan_times(sampler, chosen, request.batch, request.seed, conditions)
            return made.with_cost(chosen.cost, *times)

        weights = {
            part: subject.parts[part] for part in ("tokenizer", *chosen.needs) if part in subject.parts
        }
        rows.append(once(*row_of, row, weights))
        write_comparison(rows, paper, settings, notes, out)
        chunks.remove()
    return rows


def reference_folder(run: Run) -> Path:
    """The place of figures against a given reference: of a run without images, that of its evaluation."""
    return run.out / ("evaluation" if run.recipe.data == "none" else "evaluation-reference")


def _conditions(subject: Subject, request: Request) -> tuple[Conditions, str | None, int]:
    """The conditions of the images, for texts a hash of them, and how many images a plan draws."""
    if request.images < LEAST:
        raise InvalidRequestError(
            f"a plan needs {LEAST} or more images, not {request.images}", param="images"
        )
    if not subject.model.text_dim:
        if request.captions is not None:
            raise InvalidRequestError(f"{subject.name} is conditioned on classes", param="captions")
        return ClassConditions(subject.model.num_classes), None, request.images
    if subject.encode is None:
        raise InvalidRequestError(f"{subject.name} has no encoder of texts to be asked with", param="bundle")
    if not request.reference.is_dir():
        raise DataError("texts are measured against a folder of pictures with captions", param="reference")
    found = pictures_with_captions(request.reference, request.captions)
    captions = [caption for caption in found if _readable(caption)]
    if len(captions) < len(found):
        log.warning("%d of %d captions cannot be prompts", len(found) - len(captions), len(found))
    if not captions:
        raise DataError(f"none of the {len(found)} captions can be a prompt", param="captions")
    if len(captions) < LEAST:
        raise InvalidRequestError(f"{len(captions)} captions; a plan needs {LEAST} or more", param="captions")
    images = min(request.images, len(captions))
    return EncodedConditions(captions, subject.encode), fingerprint_of({"captions": captions}), images


def _clip(subject: Subject, request: Request, conditions: Conditions) -> ClipScore | None:
    if request.clip is None:
        return None
    if not isinstance(conditions, EncodedConditions):
        raise InvalidRequestError(
            f"{subject.name} is conditioned on classes: the CLIP score needs captions", param="clip"
        )
    return ClipScore(request.clip, conditions.prompts, subject.sampler.device)


def _readable(caption: str) -> bool:
    try:
        checked_prompt(caption)
    except InvalidRequestError:
        return False
    return True


def _row(chosen: Plan, chunks: Chunks, real: Reference, classifier: Classifier | None) -> Row:
    features, fits = chunks.features(), chunks.scores()
    score, score_std = (None, None) if classifier is None else inception_score(classifier(features))
    row = Row(
        name=chosen.name,
        kind="plan",
        images=len(features),
        reference_images=real.images,
        fid=frechet_distance(real.gaussian, features),
        kid=None,
        kid_std=None,
        precision=None,
        recall=None,
        manifold_images=0,
        inception_score=score,
        inception_score_std=score_std,
        clip_score=None if fits is None else float(fits.mean()),
    )
    if real.features_MD is None:
        return row
    kid, kid_std = kernel_distance(real.features_MD, features)
    equal = min(len(real.features_MD), len(features), MANIFOLD)
    precision, recall = precision_recall(real.features_MD[:equal], features[:equal])
    return replace(row, kid=kid, kid_std=kid_std, precision=precision, recall=recall, manifold_images=equal)


def _grid(sampler: Sampler, chosen: Plan, conditions: Conditions, seed: int, path: Path) -> None:
    """Eight pictures of a plan."""
    labels = torch.arange(8) % conditions.count
    write_grid(sample_images(sampler, chosen, conditions(labels), [(seed, i) for i in range(8)]), path, 8)


def _notes(
    subject: Subject,
    request: Request,
    real: Reference,
    extractor: Extractor,
    classifier: Classifier | None,
    clip: ClipScore | None,
    images: int,
) -> list[str]:
    """The protocol, in words."""
    asked = (
        "caption i of the folder" if subject.model.text_dim else f"label i mod {subject.model.num_classes}"
    )
    notes = [
        f"{subject.name} against {real.source}; seed {request.seed}, {asked}.",
        f"Inception features in {extractor.precision}.",
        "FID falls as images are added: compare rows with equal numbers only.",
    ]
    if real.skipped:
        notes.append(f"{real.skipped} files of the folder are no readable pictures and were left out.")
    if images <= extractor(torch.zeros(1, 3, 32, 32, dtype=torch.uint8)).shape[1]:
        notes.append(f"{images:,} images are fewer than the features are wide: FID is far too high.")
    if real.features_MD is None:
        notes.append("The reference is statistics alone: KID, precision and recall need its pictures.")
    else:
        equal = min(len(real.features_MD), images, MANIFOLD)
        notes.append(f"Precision and recall are of {equal:,} images against as many.")
    if classifier is None:
        notes.append(
            "IS is missing: the Inception file has features only; `--inception` names its classifier."
        )
    else:
        notes.append(f"IS is by the classifier of {classifier.name} on the same features, without its bias.")
    if clip is not None:
        notes.append(f"CLIP score: 100 × the cosine by {clip.name}, at least 0; the mean.")
    if request.timing:
        notes.append(
            f"Times on {subject.sampler.device} with {torch.get_num_threads()} threads, one image alone and "
            f"batches of {request.batch}."
        )
    return notes
