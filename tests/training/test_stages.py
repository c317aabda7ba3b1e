"""Training stages at tiny size: exact resume, determinism, and that each loss really teaches."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from dd_core.errors import RecipeError
from dd_core.models.config import VQConfig
from dd_core.models.llamagen import LlamaGenStudent
from dd_core.models.vq import VQTokenizer
from dd_core.sampling import Sampler
from tests.training.helpers import pictures_like
from training.data.images import ImageSet
from training.digest import weights_digest
from training.losses.lpips import Lpips
from training.optim.loop import Batches, Ema, Stage, one_cycle, run_stage
from training.recipes.named import get_recipe
from training.recipes.settings import Recipe
from training.stages.decoder import decoder_stage
from training.stages.distill import distill_stage, student_from_teacher
from training.stages.pairs import Pairs, load_pairs, make_pairs, marginals
from training.stages.teacher import new_teacher, teacher_stage
from training.stages.tokenizer import CodebookAverage, new_tokenizer, tokenizer_stage
from training.stages.tokens import encode_all

CPU = torch.device("cpu")


def tiny_images(count: int) -> ImageSet:
    return ImageSet(pictures_like(count), torch.arange(count) % 10)


class RandomLpips(Lpips):
    """LPIPS with random weights of the true shapes: the code path without the 29 MB file."""

    def __init__(self, folder: Path) -> None:
        from safetensors.torch import save_file

        generator = torch.Generator().manual_seed(0)
        state: dict[str, Tensor] = {}
        before = 3
        widths = {0: 64, 2: 64, 5: 128, 7: 128, 10: 256, 12: 256, 14: 256}
        widths |= dict.fromkeys((17, 19, 21, 24, 26, 28), 512)
        for i, width in widths.items():
            scale = (2 / (9 * before)) ** 0.5
            state[f"features.{i}.weight"] = scale * torch.randn(width, before, 3, 3, generator=generator)
            state[f"features.{i}.bias"] = torch.zeros(width)
            before = width
        for k, width in enumerate((64, 128, 256, 512, 512)):
            state[f"lin{k}.weight"] = torch.rand(1, width, 1, 1, generator=generator) / width
        save_file(state, str(folder / "lpips.safetensors"))
        super().__init__(folder / "lpips.safetensors")


@pytest.fixture(scope="module")
def recipe() -> Recipe:
    return get_recipe("tiny")


@pytest.fixture(scope="module")
def lpips(tmp_path_factory: pytest.TempPathFactory) -> Lpips:
    return RandomLpips(tmp_path_factory.mktemp("lpips"))


@pytest.fixture(scope="module")
def pairs(recipe: Recipe) -> Pairs:
    generator = torch.Generator().manual_seed(1)
    return Pairs(torch.arange(64) % 10, torch.randint(64, (64, 64), generator=generator), seed=5)


def _stage_maker(name: str, recipe: Recipe, lpips: Lpips, pairs: Pairs) -> Callable[[], tuple[Stage, Ema]]:
    images = tiny_images(64)
    tokenizer = new_tokenizer(recipe, CPU)
    tokens = torch.randint(0, 64, (2, 64, 64), generator=torch.Generator().manual_seed(2)).to(torch.int16)

    def make() -> tuple[Stage, Ema]:
        if name.endswith("tokenizer"):
            weight = 1.0 if name.startswith("judged") else 0.0
            cfg = replace(recipe.tokenizer, adversarial=weight, judged_from=0.4)
            return tokenizer_stage(replace(recipe, tokenizer=cfg), images, lpips, CPU)
        if name.endswith("decoder"):
            shown = 0.5 if name.startswith("shown") else 0.0
            cfg = replace(recipe, decoder=replace(recipe.decoder, drawn=shown))
            return decoder_stage(cfg, images, tokens, tokenizer, lpips, CPU, pairs.tokens)
        if name == "teacher":
            return teacher_stage(recipe, tokens, images.labels, tokenizer, CPU)
        weight = 1.0 if name == "judged student" else 0.0
        judged = replace(recipe, distill=replace(recipe.distill, adversarial=weight))
        stage, ema, _ = distill_stage(
            judged, pairs, new_teacher(recipe, tokenizer, CPU), tokenizer, lpips, CPU
        )
        return stage, ema

    return make


@pytest.mark.parametrize(
    "name",
    ["tokenizer", "judged tokenizer", "decoder", "shown decoder", "teacher", "student", "judged student"],
)
def test_resume_equals_an_uninterrupted_run(
    name: str, recipe: Recipe, lpips: Lpips, pairs: Pairs, tmp_path: Path
) -> None:
    """Killed after 1, 3 and 4 of 6 updates; the checkpoint holds every second one.

    The averaged weights, the raw weights and the journal must be those of one straight run. A
    random state that outlives a step, an optimizer or EMA left out of the checkpoint, or a
    journal written twice would show.
    """
    make = _stage_maker(name, recipe, lpips, pairs)

    def finish(folder: Path, stops: list[int | None]) -> tuple[Ema, dict[str, Tensor], list[str]]:
        for stop in stops:
            stage, ema = make()
            run_stage(stage, folder, seed=0, log_every=2, save_every=2, stop_after=stop)
        model = stage.parts["model"]
        assert isinstance(model, nn.Module)
        journal = [json.loads(line) for line in (folder / f"{stage.name}.jsonl").read_text().splitlines()]
        return (
            ema,
            model.state_dict(),
            [{k: v for k, v in j.items() if k not in ("per_s", "left_s", "memory_gb")} for j in journal],
        )

    straight = finish(tmp_path / "straight", [None])
    finish(tmp_path / "broken", [2, 2])
    broken = finish(tmp_path / "broken", [None])
    for key, value in straight[0].average.items():
        assert torch.equal(value, broken[0].average[key]), key
    for key, value in straight[1].items():
        assert torch.equal(value, broken[1][key]), key
    assert straight[2] == broken[2]
    assert (tmp_path / "broken" / f"{name.split()[-1]}-samples.png").stat().st_size > 1000


def test_a_checkpoint_of_other_settings_is_refused(
    recipe: Recipe, lpips: Lpips, pairs: Pairs, tmp_path: Path
) -> None:
    stage, _ = _stage_maker("teacher", recipe, lpips, pairs)()
    run_stage(stage, tmp_path, seed=0, stop_after=1)
    other = replace(recipe, teacher=replace(recipe.teacher, lr=0.5))
    stage, _ = _stage_maker("teacher", other, lpips, pairs)()
    with pytest.raises(RecipeError, match=r"other settings: teacher\.lr was 0\.001 and is 0\.5") as caught:
        run_stage(stage, tmp_path, seed=0)
    assert caught.value.param == "teacher.lr" and "\n" not in caught.value.message


@pytest.mark.parametrize(("name", "field"), [("student", "pairs"), ("shown decoder", "drawn")])
def test_pairs_that_became_more_do_not_go_on_with_a_checkpoint(
    name: str, field: str, recipe: Recipe, lpips: Lpips, pairs: Pairs, tmp_path: Path
) -> None:
    """A pass over them would begin anew with another order: no longer the run that was begun."""
    stage, _ = _stage_maker(name, recipe, lpips, pairs.first(32))()
    run_stage(stage, tmp_path, seed=0, stop_after=1)
    stage, _ = _stage_maker(name, recipe, lpips, pairs)()
    with pytest.raises(RecipeError, match=f"{field} was 32 and is 64"):
        run_stage(stage, tmp_path, seed=0)


def test_pairs_resume_to_the_same_files_and_depend_on_the_seed(recipe: Recipe, tmp_path: Path) -> None:
    tokenizer = new_tokenizer(recipe, CPU)
    teacher = new_teacher(recipe, tokenizer, CPU).eval()
    teacher.output.weight.data.mul_(20)
    sampler = Sampler(recipe.model.layout, tokenizer, None, teacher, draw=recipe.pairs.draw_settings)
    identity = weights_digest(teacher, tokenizer)

    def make(folder: Path, seed: int, *stops: int | None) -> dict[str, str]:
        for stop in stops:
            make_pairs(sampler, recipe.pairs, 10, folder, seed=seed, identity=identity, stop_after=stop)
        return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}

    straight = make(tmp_path / "a", 0, None)
    assert straight == make(tmp_path / "b", 0, 1, 1, None)
    assert len(straight) == 4
    shard = "pairs-00000.safetensors"
    assert straight[shard] != make(tmp_path / "c", 1, None)[shard]
    fewer = replace(recipe.pairs, count=24)
    make_pairs(sampler, fewer, 10, tmp_path / "e", seed=0, identity=identity)
    assert len(load_pairs(tmp_path / "e").tokens) == 24
    assert make(tmp_path / "e", 0, None) == straight, "a set that grew equals one made at once"
    loaded = load_pairs(tmp_path / "a")
    assert loaded.tokens.shape == (48, 64) and loaded.labels.tolist() == [i % 10 for i in range(48)]
    with pytest.raises(RecipeError, match="other settings: seed was 0 and is 1"):
        make(tmp_path / "a", 1, None)
    load_pairs(tmp_path / "a", replace(recipe.pairs, count=1))
    with pytest.raises(RecipeError, match=r"pairs\.guidance was 2\.0 and is 5\.0"):
        load_pairs(tmp_path / "a", replace(recipe.pairs, guidance=5.0))
    (tmp_path / "d").mkdir()
    with pytest.raises(RecipeError, match="no complete set"):
        load_pairs(tmp_path / "d")


def test_marginals_are_frequencies_by_class_and_place() -> None:
    tokens, labels = torch.tensor([[0, 1], [0, 2], [3, 3]]), torch.tensor([0, 0, 1])
    p = marginals(tokens, labels, 2, 4).exp()
    assert p[0].tolist() == [[1, 0, 0, 0], [0, 0.5, 0.5, 0]]
    assert p[1].tolist() == [[0, 0, 0, 1], [0, 0, 0, 1]]


def test_the_student_starts_with_everything_the_teacher_has(recipe: Recipe) -> None:
    tokenizer = new_tokenizer(recipe, CPU)
    teacher, codebook = new_teacher(recipe, tokenizer, CPU), tokenizer.codebook_VC.detach()
    # A table that is linear in the codes must be carried over without loss.
    linear = torch.randn(4, 32)
    teacher.tok_embeddings.weight.data = codebook @ linear + 0.3
    student = student_from_teacher(teacher, codebook, 0)
    theirs, own = teacher.state_dict(), student.state_dict()
    shared = [k for k in own if k in theirs and "tok_embeddings" not in k]
    assert len(shared) == len(theirs) - 1 and all(torch.equal(own[k], theirs[k]) for k in shared)
    assert torch.allclose(student.tok_embeddings(codebook), teacher.tok_embeddings.weight, atol=1e-4)


def test_distillation_learns_a_map_from_noise(recipe: Recipe, tmp_path: Path) -> None:
    """Tokens that are a function of their own noise are learned; the loss falls far below chance."""
    tokenizer = new_tokenizer(recipe, CPU).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(3)
    pairs = Pairs(torch.zeros(256, dtype=torch.long), torch.zeros(256, 64, dtype=torch.long), seed=9)
    direction = torch.randn(4, generator=generator)
    pairs.tokens.copy_((pairs.noise(4).float() @ direction > 0).long() * 7)
    settings = replace(recipe.distill, steps=60, batch=16, lpips=0.0, cross_entropy=1.0, lr=5e-3)
    stage, _, _ = distill_stage(
        replace(recipe, distill=settings), pairs, new_teacher(recipe, tokenizer, CPU), tokenizer, None, CPU
    )
    run_stage(stage, tmp_path, seed=0, log_every=20)
    last = json.loads((tmp_path / "student.jsonl").read_text().splitlines()[-1])
    assert last["cross_entropy"] < 0.45 and last["accuracy"] > 0.8
    assert last["mse"] < 0.5


@pytest.mark.parametrize("name", ["decoder", "shown decoder"])
def test_the_decoder_stage_moves_the_decoder_and_nothing_else(
    name: str, recipe: Recipe, lpips: Lpips, pairs: Pairs, tmp_path: Path
) -> None:
    stage, ema = _stage_maker(name, recipe, lpips, pairs)()
    run_stage(stage, tmp_path, seed=0)
    before = new_tokenizer(recipe, CPU).state_dict()
    moved = {k for k, v in ema.average.items() if not torch.equal(v, before[k])}
    assert moved and all(k.startswith(("decoder.", "post_quant_conv.")) for k in moved)
    assert {k for k in before if k.startswith("decoder.conv_out")} <= moved


def test_the_decoder_learns_from_pictures_of_a_teachers_tokens(
    recipe: Recipe, lpips: Lpips, pairs: Pairs, tmp_path: Path
) -> None:
    """Which tokens they are changes the decoder where it is shown them, and only there."""
    others = replace(pairs, tokens=pairs.tokens.flip(0))

    def trained(name: str, shown: Pairs) -> Tensor:
        stage, ema = _stage_maker(name, recipe, lpips, shown)()
        run_stage(stage, tmp_path / f"{name}{shown is pairs}", seed=0)
        return ema.average["decoder.conv_out.weight"]

    assert torch.equal(trained("decoder", pairs), trained("decoder", others))
    assert not torch.equal(trained("shown decoder", pairs), trained("shown decoder", others))


def test_distillation_can_go_on_from_a_student(recipe: Recipe, pairs: Pairs) -> None:
    tokenizer = new_tokenizer(recipe, CPU)
    teacher = new_teacher(recipe, tokenizer, CPU)
    first = LlamaGenStudent(recipe.model)
    settings = replace(recipe.distill, lpips=0.0)
    _, _, student = distill_stage(
        replace(recipe, distill=settings), pairs, teacher, tokenizer, None, CPU, first
    )
    assert all(torch.equal(v, first.state_dict()[k]) for k, v in student.state_dict().items())


def test_a_tokenizer_begins_with_what_fits_of_another(
    recipe: Recipe, lpips: Lpips, caplog: pytest.LogCaptureFixture
) -> None:
    """One family's encoder and decoder are a beginning for the other's."""
    first, images = new_tokenizer(recipe, CPU), tiny_images(64)
    scales = replace(get_recipe("var-tiny"), begin_from="mine", seed=recipe.seed + 1)
    with caplog.at_level("INFO", "dd_train"):
        stage, _ = tokenizer_stage(scales, images, lpips, CPU, first)
    model = stage.parts["model"]
    assert isinstance(model, nn.Module)
    found, theirs = model.state_dict(), first.state_dict()
    shared = {k for k, v in found.items() if k in theirs and theirs[k].shape == v.shape}
    assert all(torch.equal(found[k], theirs[k]) for k in shared)
    assert {"encoder.conv_in.weight", "decoder.conv_out.weight"} <= shared
    assert f"begins with {len(shared)} of its {len(found)} tensors from mine" in caplog.text
    nothing = nn.Linear(1, 1)
    with pytest.raises(RecipeError, match="nothing of the tokenizer of mine fits"):
        tokenizer_stage(scales, images, lpips, CPU, nothing)  # type: ignore[arg-type]


def test_codebook_average_finds_clusters_and_revives_dead_codes() -> None:
    torch.manual_seed(0)
    centres = nn.functional.normalize(torch.randn(8, 4), dim=-1)
    tokenizer = VQTokenizer(VQConfig(32, 4, 32, 32, (1, 1, 1), 1))
    tokenizer.set_codes(torch.ones(32, 4) + 1e-3 * torch.randn(32, 4))
    average = CodebookAverage(tokenizer, 0.9)
    for _ in range(200):
        z = nn.functional.normalize(centres[torch.randint(8, (256,))] + 0.02 * torch.randn(256, 4), dim=-1)
        average.update(z, (z @ tokenizer.codebook_VC.T).argmax(-1).detach())
    best = (centres @ tokenizer.codebook_VC.detach().T).max(-1).values
    assert (best > 0.98).all()


def test_encode_all_has_every_image_and_its_mirror_image(recipe: Recipe) -> None:
    model, images = new_tokenizer(recipe, CPU).eval(), tiny_images(6)
    tokens = encode_all(model, images, CPU, batch=4)
    x, _ = images.batch(torch.arange(6))
    assert tokens.shape == (2, 6, 64)
    assert torch.equal(tokens[1].long(), model.encode(x.flip(3)))


def test_batches_cover_an_epoch_and_depend_on_the_step_alone() -> None:
    batches = Batches(10, 3, seed=4)
    epoch = torch.cat([batches.at(s) for s in range(3)])
    assert len(epoch.unique()) == 9
    again = [Batches(10, 3, seed=4).at(s) for s in (7, 1)]
    assert torch.equal(again[1], epoch[3:6])
    assert not torch.equal(torch.cat([batches.at(s) for s in range(3, 6)]), epoch)


def test_one_cycle_rises_and_falls() -> None:
    rates = [one_cycle(s, 100, 1.0) for s in range(100)]
    assert rates[0] < rates[4] == pytest.approx(1.0) and rates[-1] < 0.03
    assert all(a >= b for a, b in itertools.pairwise(rates[5:]))


def test_ema_warms_up() -> None:
    module = nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(0.0)
    ema = Ema(module, 0.999)
    module.weight.data.fill_(1.0)
    ema.update(module)
    assert ema.average["weight"].item() == pytest.approx(0.9)


def test_lpips_is_zero_for_equal_images_and_symmetric(lpips: Lpips) -> None:
    x, y = torch.rand(2, 3, 32, 32) * 2 - 1, torch.rand(2, 3, 32, 32) * 2 - 1
    assert lpips(x, x).abs().max() == 0
    assert torch.allclose(lpips(x, y), lpips(y, x)) and (lpips(x, y) > 0).all()
    x.requires_grad_()
    lpips(x, torch.zeros_like(x)).sum().backward()
    assert x.grad is not None and torch.isfinite(x.grad).all()


def test_distillation_refuses_settings_that_cannot_be(recipe: Recipe, pairs: Pairs) -> None:
    tokenizer = new_tokenizer(recipe, CPU)
    teacher = new_teacher(recipe, tokenizer, CPU)

    def refuse(message: str, **settings: object) -> None:
        changed = replace(recipe, distill=replace(recipe.distill, **settings))  # type: ignore[arg-type]
        with pytest.raises(RecipeError, match=message):
            distill_stage(changed, pairs, teacher, tokenizer, None, CPU)

    refuse("0..63", train_steps=(0, 64))
    refuse("adamw or muon", optimizer="sgd", lpips=0.0)
    refuse("distill.lpips needs the LPIPS weights", lpips=1.0)
    refuse("distill.adversarial needs the LPIPS weights", lpips=0.0, adversarial=1.0)
