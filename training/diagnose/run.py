"""`dd-train diagnose`: every finding that a run folder has the files for, as text and `diagnosis.json`.

tokens.safetensors ─▶ codebook      teacher ─▶ teacher, condition      evaluation.json ─▶ floor
student, pairs and the teacher's fresh pairs ─▶ memorisation, positions, jumps
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dd_core import plan
from dd_core.errors import DDError, RecipeError
from dd_core.files import replacing
from training.data import text
from training.data.conditions import ClassConditions, Conditions
from training.data.packages import cache_dir
from training.data.sources import load_images
from training.diagnose.finding import Finding, judged, not_measured
from training.diagnose.floor import floor, quick_floor
from training.diagnose.fresh import Fresh
from training.diagnose.jumps import continuation, jumps, jumps_in_fid
from training.diagnose.plot import accuracy_figure
from training.diagnose.student import (
    Known,
    Scores,
    at_once,
    commonest_accuracy,
    memorisation,
    positions,
    score,
)
from training.diagnose.teacher import condition, generalisation, nats
from training.diagnose.tokens import codebook, codebook_in_training, first_judged
from training.diagnose.weights import student_of, teacher_of
from training.metrics.features import Extractor, FeatureExtractor
from training.optim.progress import read_journal
from training.recipes.saved import read_recipe
from training.run import Run, load_drawing_tokenizer, load_teacher, load_tokenizer
from training.stages.tokens import encode_all, read_tokens

STAGES = ("tokenizer", "decoder", "teacher", "student")


def open_run(folder: Path, device: torch.device) -> Run:
    """The run of a folder, by the recipe that it was begun with.

    Raises:
        RecipeError: it is no run folder.
    """
    recipe = read_recipe(folder)
    if recipe is None:
        raise RecipeError(f"{folder} is no run folder: it has no recipe.json", param="run")
    return Run(recipe, folder, device)


def diagnose(run: Run, count: int = 300, extractor: Extractor | None = None) -> list[Finding]:
    """The findings of a run; its folder gets `diagnosis.json`, and `diagnosis.png` with accuracy by block.

    Args:
        count: fresh pairs to make, and images to look at.
        extractor: the network of a quick FID; None = Inception, if it is in the cache.

    Raises:
        RecipeError: the folder holds nothing, or weights of another architecture than its recipe's.
    """
    progress = progress_of(run)
    if not progress and not (run.out / "tokenizer.safetensors").exists():
        raise RecipeError(f"{run.out} has nothing to diagnose yet: no stage has begun", param="run")
    torch.manual_seed(run.recipe.seed)
    findings = [*_numbers(run), *_codebook(run), *_floor(run, count, extractor)]
    findings += [*_teacher(run, count), *_student(run, count)]
    record = {
        "recipe": run.recipe.name,
        "progress": progress,
        "findings": [_as_json(vars(finding)) for finding in findings],
    }
    with replacing(run.out / "diagnosis.json") as temporary:
        temporary.write_text(json.dumps(record, indent=1, allow_nan=False) + "\n", encoding="utf-8")
    if (figure := accuracy_figure(record)) is not None:
        figure.savefig(run.out / "diagnosis.png", dpi=100)
    return findings


def progress_of(run: Run) -> dict[str, dict[str, float]]:
    """The last line of each stage's journal, with the number of `steps` that the stage is to have."""
    found = {}
    for name in STAGES:
        part = run.recipe.distill if name == "student" else getattr(run.recipe, name)
        if lines := read_journal(run.out / f"{name}.jsonl"):
            found[name] = _as_json(lines[-1] | {"steps": part.steps})
    return found


def written(findings: list[Finding]) -> str:
    """The findings for a terminal: `!` before what is past its limit, `-` before what was not judged."""
    marks = {True: "!", False: "✓", None: "-"}
    lines = []
    for finding in findings:
        lines.append(f"{marks[finding.trouble]} {finding.name}: {finding.says}")
        lines += [f"    {finding.advice}"] if finding.advice else []
    return "\n".join(lines)


def _numbers(run: Run) -> Iterator[Finding]:
    for name in STAGES:
        for line in read_journal(run.out / f"{name}.jsonl"):
            broken = [key for key, value in line.items() if not math.isfinite(value)]
            if broken:
                says = f"{broken[0]} of the {name} is no number at step {line['step']:,}."
                yield judged("numbers", says, {"stage": name, "step": line["step"]}, True)
                break


def _codebook(run: Run) -> Iterator[Finding]:
    size, lines = run.recipe.tokenizer_model.codebook_size, read_journal(run.out / "tokenizer.jsonl")
    if (run.out / "tokens.safetensors").exists():
        yield codebook(read_tokens(run)[0], size)
    elif lines and lines[-1]["step"] < (first := _first_judged(run)):
        yield not_measured("codebook", f"counts of a tokenizer in training say nothing before step {first:,}")
    elif lines:
        yield codebook_in_training(lines[-1]["codes_in_use"], size, int(lines[-1]["step"]))
    else:
        yield not_measured("codebook", "the run has no images of its own")


def _first_judged(run: Run) -> int:
    cfg = run.recipe.tokenizer
    return first_judged(cfg.continuous_for, cfg.steps, cfg.codebook_decay)


def _fids(run: Run) -> dict[str, float]:
    """FID of each row of the run's evaluation on its own data."""
    path = run.out / "evaluation" / "evaluation.json"
    rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
    return {row["name"]: row["fid"] for row in rows if row.get("fid") is not None}


def _floor(run: Run, count: int, extractor: Extractor | None) -> Iterator[Finding]:
    fids = _fids(run)
    if "reconstruction" in fids:
        yield floor(fids)
        return
    if not (run.out / "tokenizer.safetensors").exists():
        yield not_measured("floor", "the tokenizer is still in training")
    elif extractor is None and not (cache_dir() / "inception-fid.pt").exists():
        yield not_measured("floor", "there is no evaluation yet, and Inception is not in the cache")
    else:
        try:
            images = load_images(run)[1].first(count).images
        except DDError as error:
            yield not_measured("floor", error.message)
            return
        measurer = extractor or FeatureExtractor(run.device)
        decoder = (run.out / "decoder.safetensors").exists()
        tokenizer = load_drawing_tokenizer(run) if decoder else load_tokenizer(run)
        yield quick_floor(tokenizer, images, measurer, run.device)


def _teacher(run: Run, count: int) -> Iterator[Finding]:
    ready = all((run.out / f"{name}.safetensors").exists() for name in ("tokenizer", "tokens"))
    tokenizer = load_tokenizer(run) if ready else None
    teacher = teacher_of(run, tokenizer) if tokenizer else None
    if tokenizer is None or teacher is None:
        yield not_measured("teacher", "there is none yet, or the run has no images that it learned from")
        return
    tokens_FNL, labels_N = read_tokens(run)
    some = torch.linspace(0, len(labels_N) - 1, min(count, len(labels_N))).long()
    known = tokens_FNL[0, some], labels_N[some]
    conditions: Conditions = ClassConditions(run.recipe.model.num_classes)
    if run.recipe.text is not None:
        conditions = text.train_conditions(run.recipe, run.out / "captions.safetensors")

    def score_of(tokens_NL: Tensor, labels_N: Tensor) -> Tensor:
        batch = at_once(tokens_NL.shape[1] * run.recipe.model.codebook_size)
        return nats(teacher, tokens_NL, labels_N, conditions, run.device, batch)

    if run.recipe.text is None:  # pictures that are held out have captions of their own
        try:
            held_out = load_images(run)[1].first(count)
        except DDError as error:
            yield not_measured("teacher", error.message)
        else:
            tokens_NL = encode_all(tokenizer, held_out, run.device, mirrored=False)[0]
            yield generalisation(score_of, known, (tokens_NL, held_out.labels))
    yield condition(score_of, known)


def _student(run: Run, count: int) -> Iterator[Finding]:
    ready = all((run.out / f"{name}.safetensors").exists() for name in ("tokenizer", "teacher"))
    student = student_of(run) if ready else None
    if student is None:
        yield not_measured("student", "there is none yet")
        return
    tokenizer = load_tokenizer(run)
    teacher = load_teacher(run, tokenizer)
    try:
        fresh = Fresh.of(run, tokenizer, teacher, student, count)
    except RecipeError as error:  # its pairs are no longer there, or not all
        yield not_measured("student", error.message)
        return
    codes, layout = fresh.sampler.codebook_VC, student.layout
    steps = sorted(run.recipe.distill.train_steps)

    def scores(known: Known, chosen: Sequence[int]) -> dict[int, Scores]:
        return {t: score(student, codes, known, t, fresh.conditions, run.device) for t in chosen}

    made = fresh.made(plan.trajectory(layout.num_blocks))
    true = scores(made, steps)
    yield memorisation(scores(fresh.learned(), steps), true)
    commonest = commonest_accuracy(fresh.pairs.tokens, made.tokens, len(codes))
    yield positions(true, commonest, math.log(len(codes)), bool(run.recipe.distill.adversarial))
    if later := [t for t in steps if t]:
        own: dict[int, Scores] = {}
        for t in later:
            own |= scores(fresh.made(continuation(layout.num_blocks, steps, t)), [t])
        found = jumps(true, own)
        in_fid = jumps_in_fid(_fids(run), later[0]) if len(later) == 1 else ""
        yield replace(found, says=found.says + in_fid)


def _as_json(record: Mapping[str, Any]) -> dict[str, Any]:
    """The record with None for what is no number, which JSON has not."""
    return {
        key: _as_json(value)
        if isinstance(value, Mapping)
        else None
        if isinstance(value, float) and not math.isfinite(value)
        else value
        for key, value in record.items()
    }
