"""Stage (c): noise–data pairs by Algorithm 1, as sharded safetensors.

A pair is only (condition, noise, final tokens): every X_t is recomputed from it. The noise of
pair i is a function of (seed, i), so a shard stores labels and tokens alone, and the manifest
the seed. A shard that exists is not made again; each is written atomically, so a killed run
goes on with the first missing shard and ends with the same files. A larger count later adds
shards to those that are there. Several jobs, each with every n-th shard, need not know of each other: a
set is complete when all its shards are there, whoever came last.

Where a student makes more than one jump, the later ones begin with tokens that it made itself,
while the trajectories of Algorithm 1 begin with the teacher's. So pairs may also have a student's
first tokens and the teacher's for the rest: what the teacher would do from where the student gets.

Shapes: N pairs, L tokens, C code dimension.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from bisect import bisect
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from dd_core import plan
from dd_core.codebook import nearest
from dd_core.errors import NotANumberError, RecipeError
from dd_core.files import replacing, save_tensors
from dd_core.flow import FlowSettings
from dd_core.models.build import AnyStudent, AnyTeacher, AnyTokenizer
from dd_core.noise import gaussian_noise
from dd_core.runtime import mixed_precision
from dd_core.sampling import Sampler, sample_codes
from training import parallel
from training.data import captions, text
from training.data.conditions import ClassConditions, Conditions
from training.digest import weights_digest
from training.mismatch import refuse_mismatch
from training.recipes.settings import PairsRecipe
from training.run import WHOLE, Job, Run, load_teacher, load_tokenizer

log = logging.getLogger("dd_train")
FOLDER, OWN_FOLDER, PROMPTS = "pairs", "own-pairs", "prompts.safetensors"  # in a run folder
# Settings that say of which distribution, and by which map, the tokens are.
_DRAWING = ("guidance", "guidance_schedule", "top_k", "top_p", "temperature", "solver", "evaluations")
# What may change while a set is made: a pair is a function of (seed, i), whatever it was computed with.
_FREE = ("count", "own", "batch")
_SCHEDULE = {"guidance_schedule": "constant"}  # not written, so that pairs from before it existed stay good


@dataclass(frozen=True)
class Pairs:
    """Labels `[N]`, final tokens `[N, L]`, and the seed of their noise.

    Tokens of the blocks before `begin` are a student's: they say nothing of what the teacher makes there.
    """

    labels: Tensor
    tokens: Tensor
    seed: int
    begin: int = 0

    def first(self, count: int) -> Pairs:
        """The first pairs; 0 = all."""
        return replace(self, labels=self.labels[: count or None], tokens=self.tokens[: count or None])

    def noise(self, code_dim: int) -> Tensor:
        """The noise of every pair, `[N, L, C]`, from (seed, i)."""
        return noise_of([self], torch.arange(len(self.tokens)), code_dim)


def noise_of(sets: Sequence[Pairs], index_B: Tensor, code_dim: int) -> Tensor:
    """The noise of some pairs, `[B, L, C]` float16, drawn from (seed, i): that of all takes too much room.

    Args:
        index_B: places of the pairs, as if the sets were one after another.
    """
    length = sets[0].tokens.shape[1]
    noise = torch.empty(len(index_B), length, code_dim, dtype=torch.float16)
    starts = list(accumulate((len(p.tokens) for p in sets), initial=0))
    for row, i in zip(noise, index_B.tolist(), strict=True):
        k = bisect(starts, i) - 1
        row.copy_(gaussian_noise(sets[k].seed, i - starts[k], length, code_dim))
    return noise


@torch.inference_mode()
def make_pairs(
    sampler: Sampler,
    cfg: PairsRecipe,
    classes: int | Conditions,
    out: Path,
    *,
    seed: int,
    identity: str,
    prompts: str = "",
    begin: int = 0,
    stop_after: int | None = None,
    job: Job = WHOLE,
) -> Path:
    """Writes `out/manifest.json` and `out/pairs-00000.safetensors`, …; returns `out`.

    Pair i has the label i mod `classes`: a number of classes, or what the labels stand for. `prompts` is a
    hash of the texts where they are that, of which pairs are then. The sampler's student makes the blocks
    before `begin`. `job` makes its share of the shards; `stop_after` ends after that many, as a kill would.

    Raises:
        RecipeError: `out` holds pairs of other settings or of another teacher.
        NotANumberError: the teacher has gone astray.
    """
    out.mkdir(parents=True, exist_ok=True)
    settings = {k: v for k, v in asdict(cfg).items() if k not in _FREE}
    if settings["guidance_schedule"] == _SCHEDULE["guidance_schedule"]:
        del settings["guidance_schedule"]
    made_with: dict[str, object] = {"pairs": settings, "seed": seed}
    conditions = ClassConditions(classes) if isinstance(classes, int) else classes
    made_with |= {"weights": identity, "classes": conditions.count}
    made_with |= {"prompts": prompts} if prompts else {}
    made_with |= {"begin": begin} if begin else {}
    manifest = out / "manifest.json"
    if manifest.exists():
        before = json.loads(manifest.read_text())["made_with"]
        before["pairs"] = {k: v for k, v in before["pairs"].items() if k not in _FREE}
        refuse_mismatch(out, before, made_with, "choose another --out")
    facts = {"made_with": made_with, "count": cfg.count}
    with replacing(manifest) as temporary:  # by each job, and with the same bytes
        temporary.write_text(json.dumps(facts, indent=1))
    chosen = plan.trajectory(sampler.layout.num_blocks, begin)
    sampler = replace(sampler, flow=FlowSettings(cfg.solver, cfg.evaluations), exact=False)
    missing = [k for k in _missing(out, cfg.count, cfg.shard) if k % job.count == job.number]
    for made, number in enumerate(track(missing, description="pairs", disable=not parallel.is_main())):
        if stop_after is not None and made >= stop_after:
            return out
        began, start = time.perf_counter(), number * cfg.shard
        stop = min(start + cfg.shard, cfg.count)
        labels = torch.arange(start, stop) % conditions.count
        tokens = torch.cat(
            [
                trajectory_tokens(sampler, chosen, range(i, min(i + cfg.batch, stop)), conditions, seed)
                for i in range(start, stop, cfg.batch)
            ]
        )
        dtype = torch.int16 if len(sampler.codebook_VC) <= 2**15 else torch.int32
        save_tensors({"labels": labels.to(torch.int32), "tokens": tokens.to(dtype)}, _shard(out, number))
        rate = (stop - start) / (time.perf_counter() - began)
        left = sum(min(cfg.shard, cfg.count - k * cfg.shard) for k in missing[made + 1 :]) / rate
        log.info("pairs: shard %d, %d of %d, %.1f/s, %.0f s left", number, made + 1, len(missing), rate, left)
    return out


def maker_of(teacher: AnyTeacher, tokenizer: AnyTokenizer, student: AnyStudent | None = None) -> str:
    """Names the weights that pairs are made by: a hash of the models and the codes."""
    first: list[nn.Module | Tensor] = [teacher, tokenizer.codebook_VC]
    return weights_digest(*first, *([] if student is None else [student]))


def load_pairs(folder: Path, cfg: PairsRecipe | None = None, maker: str | None = None) -> Pairs:
    """Reads a complete set of pairs.

    Args:
        cfg: how they must have been drawn; None = however it was.
        maker: by which weights (`maker_of`); None = by whichever it was.

    Raises:
        RecipeError: no manifest, or not all shards were made yet; or they were drawn in another way, or by
            another teacher.
    """
    manifest = folder / "manifest.json"
    facts = json.loads(manifest.read_text()) if manifest.exists() else {}
    shard = facts["made_with"]["pairs"]["shard"] if facts else 1
    missing = _missing(folder, facts["count"], shard) if facts else []
    if not facts or missing:
        lost = f": {len(missing)} shards are missing, the first is {missing[0]}" if missing else ""
        raise RecipeError(
            f"{folder} holds no complete set of pairs{lost}; run the pairs stage (again)", param="pairs"
        )
    if maker is not None and facts["made_with"]["weights"] != maker:
        raise RecipeError(
            f"{folder} holds pairs of another teacher than the run has now; remove it to make others, or "
            "choose another --out",
            param="pairs",
        )
    if cfg is not None:
        made, wanted = (
            {"pairs": {name: settings[name] for name in _DRAWING}}
            for settings in (_SCHEDULE | facts["made_with"]["pairs"], asdict(cfg))
        )
        refuse_mismatch(folder, made, wanted, "name the same again, or choose another --out")
    number = -(-facts["count"] // shard)
    shards = [load_file(_shard(folder, k)) for k in range(number)]
    labels = torch.cat([s["labels"] for s in shards]).long()
    made_with, tokens = facts["made_with"], torch.cat([s["tokens"] for s in shards])
    return Pairs(labels, tokens, made_with["seed"], made_with.get("begin", 0))


def pairs_of(run: Run, teacher: AnyTeacher, tokenizer: AnyTokenizer) -> Pairs:
    """The run's pairs, by the teacher and the codes that it has now.

    Raises:
        RecipeError: as `load_pairs`.
    """
    return load_pairs(run.out / FOLDER, run.recipe.pairs, maker_of(teacher, tokenizer))


def marginals(tokens_NL: Tensor, labels_N: Tensor, classes: int, codebook_size: int) -> Tensor:
    """Log-frequency of each token at each place for each class, `[K, L, V]` float32.

    The optimum of Proposition 3.1, with the condition as it is known at sampling time. A token
    that never occurs at a place has log-frequency −∞.
    """
    length = tokens_NL.shape[1]
    flat = (labels_N[:, None] * length + torch.arange(length)) * codebook_size + tokens_NL.long()
    count = torch.bincount(flat.flatten(), minlength=classes * length * codebook_size)
    count = count.view(classes, length, codebook_size).float()
    return (count / count.sum(-1, keepdim=True).clamp(min=1)).log()


def trajectory_tokens(
    sampler: Sampler, chosen: plan.Plan, index: range, conditions: Conditions, seed: int
) -> Tensor:
    """Final tokens of pairs by their numbers, `[B, L]` on the CPU.

    Raises:
        NotANumberError: the teacher has gone astray.
    """
    cond = conditions(torch.tensor(index) % conditions.count)
    with mixed_precision(sampler.device):
        codes = sample_codes(sampler, chosen, cond, [(seed, i) for i in index])
    good_B = codes.isfinite().flatten(1).all(1).tolist()
    if not all(good_B):  # the nearest code of what is not a number would be the first one
        raise NotANumberError(f"pair {index[good_B.index(False)]}: the teacher's output is not a number")
    return nearest(sampler.codebook_VC, codes.float()).cpu()


def _missing(out: Path, count: int, shard: int) -> list[int]:
    """Numbers of the shards that are not there, or are shorter or longer than they should be."""
    starts = range(0, count, shard)
    return [k for k, s in enumerate(starts) if _rows(_shard(out, k)) != min(shard, count - s)]


def _rows(shard: Path) -> int:
    """Number of pairs of a shard, 0 where there is none."""
    if not shard.exists():
        return 0
    with safe_open(shard, "pt") as file:
        return int(file.get_slice("labels").get_shape()[0])


def _shard(out: Path, number: int) -> Path:
    return out / f"pairs-{number:05d}.safetensors"


def run(run: Run, prompts: Path | None = None) -> None:
    """Stage (c). For a model of texts, of the prompts of a file, or of the captions of the pictures.

    Pairs need prompts alone, no images: `pairs/prompts.txt` keeps them, and settles them for this run.

    Raises:
        RecipeError: an earlier stage is missing, prompts for a model of classes, or pairs of others.
    """
    if prompts is not None and run.recipe.text is None:
        raise RecipeError(f"the recipe {run.recipe.name!r} is conditioned on classes", param="prompts")
    make_run_pairs(run, run.out / FOLDER, prompts=prompts)


def make_run_pairs(
    run: Run, out: Path, student: AnyStudent | None = None, begin: int = 0, prompts: Path | None = None
) -> None:
    """The pairs of a run, in `out`; `student` makes their blocks before `begin`."""
    recipe, tokenizer = run.recipe, load_tokenizer(run)
    teacher = load_teacher(run, tokenizer)
    conditions: int | Conditions = recipe.model.num_classes
    digest = ""
    if recipe.text is not None:
        lines = pair_prompts(run, prompts)
        conditions = text.prompt_conditions(recipe, lines, run.out / PROMPTS, run.device)
        digest = hashlib.sha256("\n".join(lines).encode()).hexdigest()
    draw, device = recipe.pairs.draw_settings, run.device
    make_pairs(
        Sampler(recipe.model.layout, tokenizer, student, teacher, draw=draw, device=device),
        recipe.pairs if student is None else replace(recipe.pairs, count=recipe.pairs.own),
        conditions,
        out,
        # Neighbours of seeds of other legs, as these are, may meet; `measuring_seed` meets none.
        seed=recipe.seed + (1 if student is None else 3),
        identity=maker_of(teacher, tokenizer, student),
        prompts=digest,
        begin=begin,
        stop_after=run.stop_after,
        job=run.job.of_rank(),
    )
    parallel.barrier()  # where distillation follows, it needs all shards


def pair_prompts(run: Run, file: Path | None = None) -> list[str]:
    """The prompts that the run's pairs are of; `pairs/prompts.txt` holds them from the first call on.

    Without a file they are captions of the pictures to learn from, no more of them than pairs.
    """
    kept = run.out / FOLDER / "prompts.txt"
    lines = text.readable(run.recipe, captions.read_prompts(file)) if file else None
    if kept.exists():
        found = captions.read_prompts(kept)
        if lines is not None and lines != found:
            raise RecipeError(
                f"{kept.parent} holds pairs of other prompts; choose another --out", param="prompts"
            )
        return found
    if lines is None and run.recipe.data == "none":
        raise RecipeError(
            f"the recipe {run.recipe.name!r} has no captions of its own: name a file with --prompts",
            param="prompts",
        )
    lines = lines or text.train_prompts(run.recipe)[: run.recipe.pairs.count]
    kept.parent.mkdir(parents=True, exist_ok=True)
    with replacing(kept) as temporary:
        temporary.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return lines
