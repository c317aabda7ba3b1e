"""A run folder: its recipe, where it is, and the weights that stages leave in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, is_dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from dd_core.bundle import Bundle, load_bundle
from dd_core.errors import RecipeError
from dd_core.files import metadata_of, save_tensors
from dd_core.flow import FlowSettings
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer, new_student, new_teacher, new_tokenizer
from dd_core.models.layers import carry_over
from dd_core.noise import stream_seed
from dd_core.sampling import Sampler
from training import parallel
from training.mismatch import refuse_mismatch
from training.optim.loop import Callback, Ema, Stage, run_stage
from training.recipes.settings import Recipe

log = logging.getLogger("dd_train")

# Facts that are no settings: of a stage at its end, and the hash of the tokenizer that tokens are by.
_BESIDE = ("steps", "tokenizer")
M = TypeVar("M", AnyTokenizer, AnyTeacher, AnyStudent)


@dataclass(frozen=True)
class Job:
    """One of `count` jobs that make a set of pairs together, each with every `count`-th shard."""

    number: int = 0
    count: int = 1

    @classmethod
    def of(cls, text: str) -> Job:
        """The job of `--shard`, "I/N".

        Raises:
            RecipeError: it is not of this form, or I is not below N.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.isdecimal() and count.isdecimal() and int(number) < int(count)):
            raise RecipeError(
                f"--shard takes I/N with I from 0 to N - 1, as 0/4, not {text!r}", param="shard"
            )
        return cls(int(number), int(count))

    def of_rank(self) -> Job:
        """This process's part of the job, where torchrun started several."""
        here = parallel.world()
        return Job(self.number * here.size + here.rank, self.count * here.size)


WHOLE = Job()


@dataclass(frozen=True)
class Run:
    """One training run: what to make, where, on what.

    `stop_after` ends a stage early. `job` is the part of the pairs to make, where several jobs share them.
    """

    recipe: Recipe
    out: Path
    device: torch.device
    stop_after: int | None = None
    job: Job = WHOLE

    def command(self, stage: str) -> str:
        """The command of a stage of this run, for a hint."""
        return f"dd-train {stage} --recipe {self.recipe.name} --out {self.out}"


def load_tokenizer(run: Run) -> AnyTokenizer:
    """The tokenizer that stage (a) left.

    Raises:
        RecipeError: it has not been trained yet.
    """
    return load(run, new_tokenizer(run.recipe.tokenizer_model), "tokenizer", "tokenizer")


def load_drawing_tokenizer(run: Run) -> AnyTokenizer:
    """The tokenizer that makes pictures: stage (a′)'s, or stage (a)'s where the recipe has no (a′).

    Raises:
        RecipeError: it has not been trained yet.
    """
    if not run.recipe.decoder.steps:
        return load_tokenizer(run)
    return load(run, new_tokenizer(run.recipe.tokenizer_model), "decoder", "decoder")


def load_teacher(run: Run, tokenizer: AnyTokenizer) -> AnyTeacher:
    """The teacher that stage (b) left, of that tokenizer's tokens.

    Raises:
        RecipeError: it has not been trained yet.
    """
    return load(run, new_teacher(run.recipe.model, tokenizer), "teacher", "teacher")


def load_student(run: Run) -> AnyStudent:
    """The student that stage (d) left.

    Raises:
        RecipeError: it has not been trained yet.
    """
    return load(run, new_student(run.recipe.student), "student", "distill")


def load_first_student(run: Run) -> AnyStudent:
    """The student that the run was started from; how many blocks it has is seen from its tensors.

    Raises:
        RecipeError: it was not.
    """
    stack = next(iter(new_student(run.recipe.model).GROWS))
    keys = [key for key in read(run, "first-student", "start") if key.startswith(f"{stack}.")]
    layers = len({key.split(".")[1] for key in keys})
    return load(run, new_student(run.recipe.model.with_layers(layers)), "first-student", "start")


def sampler_without_marginals(
    run: Run, tokenizer: AnyTokenizer, student: AnyStudent | None, teacher: AnyTeacher
) -> Sampler:
    """The sampler of a run's models, as its pairs are drawn: guidance, filters and the flow map's solver."""
    pairs = run.recipe.pairs
    return Sampler(
        run.recipe.model.layout,
        tokenizer,
        student,
        teacher,
        draw=pairs.draw_settings,
        flow=FlowSettings(pairs.solver, pairs.evaluations),
        device=run.device,
    )


def measuring_seed(recipe: Recipe, purpose: Literal["evaluation", "choice"]) -> int:
    """The seed of noise to measure by: of no pairs, whichever leg of a run they are of. What is chosen by
    pictures, as guidance is, is chosen by others than those that it is judged by in the end.
    """
    return stream_seed(recipe.seed, 0, purpose) >> 11  # which JSON's readers keep as it is


def begun_from(run: Run) -> Bundle:
    """The bundle that `begin_from` of the recipe names."""
    return load_bundle(str(run.recipe.begin_from), run.device)


def begin_with(recipe: Recipe, first: nn.Module, model: nn.Module, what: str) -> int:
    """Carry over to `model` what fits of `first`, which is of `begin_from`; return how many tensors do."""
    fitting = carry_over(first, model)
    log.log(
        logging.INFO if fitting else logging.WARNING,
        "%s: begins with %d of its %d tensors from %s",
        what,
        fitting,
        len(model.state_dict()),
        recipe.begin_from,
    )
    return fitting


def save(run: Run, name: str, module: nn.Module, steps: int | None = None) -> None:
    """Writes `name.safetensors`; `steps` are those of a stage at its end."""
    state = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    facts = _architecture(module) | ({} if steps is None else {"steps": steps})
    save_tensors(state, run.out / f"{name}.safetensors", facts_of(facts))


def train(run: Run, stage: Stage, ema: Ema, shape_of: nn.Module, *callbacks: Callback) -> bool:
    """Train a stage, and write the averaged weights if it came to its end, which every rank finds then.

    Args:
        shape_of: a model of the architecture that is written.
        callbacks: of the stage, see `run_stage`.

    Returns:
        True if it came to its end.
    """
    r = run.recipe
    step = run_stage(
        stage,
        run.out,
        seed=r.seed,
        log_every=r.log_every,
        save_every=r.save_every,
        preview_every=r.preview_every,
        stop_after=run.stop_after,
        tensorboard=r.tensorboard,
        callbacks=callbacks,
    )
    if step < stage.steps:
        return False
    shape_of.load_state_dict(ema.average)
    if parallel.is_main():
        save(run, stage.name, shape_of, stage.steps)
    parallel.barrier()
    return True


def keep_exports(run: Run, name: str, ema: Ema, shape_of: nn.Module) -> Callback:
    """A callback that writes the averaged weights as `NAME-STEP.safetensors` every `keep_every` updates."""

    def call(step: int) -> None:
        if parallel.is_main():
            shape_of.load_state_dict(ema.average)
            save(run, f"{name}-{step}", shape_of)

    return Callback(run.recipe.keep_every, call)


def given(run: Run, name: str) -> bool:
    """True if `name.safetensors` was put into the run folder, as by `start`, and is to stay.

    A teacher may be trained on there where the recipe says from which bundle (`begin_from`).
    """
    known, begun = ((run.out / f"{name}.{end}").exists() for end in ("safetensors", "pt"))
    trained_on = name == "teacher" and run.recipe.begin_from is not None
    return known and not begun and not trained_on


def refuse_given(run: Run, name: str) -> None:
    """Do nothing where training would replace nothing but what it made itself.

    Raises:
        RecipeError: the weights there may be the only copy.
    """
    if given(run, name):
        raise RecipeError(
            f"{run.out} has a {name}.safetensors that was not trained there; remove it to train one in its "
            "place, or choose another --out",
            param="out",
        )


def facts_of(settings: Mapping[str, Any]) -> dict[str, str]:
    """The metadata of a file that was made with `settings`, for `read` to compare. Under one key: of several
    the order is left to chance, and the same run must end with the same bytes.
    """
    return {"made_with": json.dumps(settings)}


def facts_in(path: Path) -> dict[str, Any]:
    """The facts of a file, as far as it has some."""
    found: dict[str, Any] = json.loads(metadata_of(path).get("made_with", "{}"))
    return found


def _architecture(module: nn.Module) -> dict[str, Any]:
    cfg = getattr(module, "cfg", None)
    return asdict(cfg) if is_dataclass(cfg) and not isinstance(cfg, type) else {}


def read(run: Run, name: str, stage: str, wanted: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """The tensors of `name.safetensors`, which a stage leaves.

    Args:
        wanted: settings that it must have been made with, as far as it says so.

    Raises:
        RecipeError: it is not there yet, or was made with others.
    """
    path = run.out / f"{name}.safetensors"
    if not path.exists():
        raise RecipeError(
            f"{path} is not there yet: run `{run.command(stage)}` first",
            param="out",
        )
    made = {name: value for name, value in facts_in(path).items() if name not in _BESIDE}
    if made and wanted:
        refuse_mismatch(path, made, wanted, f"the recipe {run.recipe.name!r} needs another --out")
    return load_file(path)


def load(run: Run, module: M, name: str, stage: str) -> M:
    """`module` with the weights of `name.safetensors`, frozen, on the run's device.

    Raises:
        RecipeError: it is not there yet, is of another architecture, or its stage was asked for more steps
            since.
    """
    state = read(run, name, stage, _architecture(module))
    made = facts_in(run.out / f"{name}.safetensors").get("steps")
    asked = getattr(getattr(run.recipe, stage, None), "steps", 0)
    if made is not None and made < asked:
        raise RecipeError(
            f"{name}.safetensors in {run.out} is of {made} steps, and {asked} were asked for: run "
            f"`{run.command(stage)}` to its end",
            param=f"{stage}.steps",
        )
    try:
        module.load_state_dict(state)
    except RuntimeError as error:
        problem = str(error).splitlines()[-1].strip()
        raise RecipeError(
            f"{name}.safetensors in {run.out} is not of the recipe {run.recipe.name!r}: {problem}",
            param="recipe",
        ) from None
    return module.to(run.device).eval().requires_grad_(False)
