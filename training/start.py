"""The start of a run from a bundle, or on another run's tokenizer, instead of stages that train them anew."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

from torch import nn

from dd_core.bundle import load_bundle
from dd_core.errors import RecipeError
from dd_core.hub.locate import locate
from training.data.origin import write_origin
from training.mismatch import difference
from training.run import Run, load_tokenizer, save
from training.stages.tokens import write_tokens


def start_from(run: Run, source: str | Path) -> None:
    """Puts a bundle's weights and its tokens of the training images, if there are any, into a new run folder.

    Args:
        source: a built-in or published model, or a bundle's folder; it may lack a student. Or the folder of
            another run: then its tokenizer alone, for a teacher of its own.

    Every stage can then go on from there: `decoder`, `pairs` and, with `distill.start=student`,
    `distill`.

    Raises:
        RecipeError: the folder has a tokenizer already, or the bundle's architecture is not the
            recipe's.
    """
    if (run.out / "tokenizer.safetensors").exists():
        raise RecipeError(f"{run.out} has a tokenizer already; choose another --out", param="out")
    if _is_run(Path(source)):
        tokenizer = load_tokenizer(replace(run, out=Path(source)))
        run.out.mkdir(parents=True, exist_ok=True)
        save(run, "tokenizer", tokenizer)
        _encode(run)
        return
    bundle = load_bundle(locate(source), run.device)
    manifest, sampler = bundle.manifest, bundle.sampler
    student = manifest.student
    if student is not None:  # which may have blocks of its own
        student = student.with_layers(run.recipe.model.num_layers)
    if manifest.vq != run.recipe.tokenizer_model or {student, manifest.teacher} - {None} != {
        run.recipe.model
    }:
        raise RecipeError(
            f"{bundle.name} has another architecture than the recipe {run.recipe.name!r}: "
            + difference(
                {"tokenizer_model": asdict(manifest.vq), "model": asdict(student or manifest.model)},
                {
                    "tokenizer_model": asdict(run.recipe.tokenizer_model),
                    "model": asdict(run.recipe.model),
                },
            ),
            param="recipe",
        )
    run.out.mkdir(parents=True, exist_ok=True)
    parts: dict[str, object] = {"tokenizer": sampler.tokenizer, "teacher": sampler.teacher}
    parts |= {"first-student": sampler.student}
    for name, part in parts.items():
        if isinstance(part, nn.Module):
            save(run, name, part)
    write_origin(run.out, manifest)
    _encode(run)


def _encode(run: Run) -> None:
    if run.recipe.data != "none":
        write_tokens(run)


def _is_run(folder: Path) -> bool:
    return (folder / "tokenizer.safetensors").is_file() and not (folder / "manifest.json").exists()
