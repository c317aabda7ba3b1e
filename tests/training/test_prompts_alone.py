"""A student for a teacher that reads with T5: from a bundle with a teacher and a file of prompts alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dd_core.bundle import load_bundle, save_bundle
from dd_core.errors import InvalidRequestError, RecipeError
from dd_core.flow import FlowSettings
from dd_core.logits import LogitSettings
from dd_core.manifest import Manifest, PresetEntry
from dd_core.models.config import LlamaGenConfig, VQConfig
from dd_core.models.vq import VQTokenizer
from dd_core.plan import teacher
from dd_core.text.config import T5Config
from dd_core.text.encoder import PromptEncoder
from dd_core.text.t5 import T5States, cleaned
from tests.training.test_stages import RandomLpips
from training.data import text as text_data
from training.recipes.named import get_recipe
from training.recipes.settings import PairsRecipe, Recipe
from training.run import Run
from training.stages import distill, evaluate, export, pairs, tokenizer
from training.stages.pairs import load_pairs
from training.stages.teacher import new_teacher
from training.start import start_from

CPU = torch.device("cpu")
T5 = T5Config(repo="local/tiny", length=6, dim=16)


class FewWords(T5States):
    """States that depend on the words, without the library: one of `dim` numbers a word."""

    def __call__(self, prompt: str) -> Tensor:
        words = cleaned(prompt).split()[: self.cfg.length]
        rows = [torch.randn(self.cfg.dim, generator=torch.Generator().manual_seed(len(w))) for w in words]
        return torch.stack(rows)

    def many(self, prompts: Sequence[str]) -> list[Tensor]:
        return [self(p) for p in prompts]


@pytest.fixture
def recipe(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Recipe:
    """LlamaGen's recipe for texts at the size of a test."""
    RandomLpips(tmp_path)
    monkeypatch.setenv("DD_LPIPS", str(tmp_path / "lpips.safetensors"))
    monkeypatch.setattr(text_data, "t5_states", FewWords)
    return tiny_t2i()


def tiny_t2i() -> Recipe:
    """LlamaGen's recipe for texts at the size of a test."""
    whole, tiny = get_recipe("llamagen-t2i"), get_recipe("tiny")
    gpt = LlamaGenConfig(
        layers=2, heads=2, dim=32, codebook_size=64, code_dim=4, grid=8, text_tokens=6, text_dim=16
    )
    return replace(
        whole,
        text=T5,
        tokenizer_model=VQConfig(64, 4, 32, 32, (1, 1, 1), 1),
        model=gpt,
        pairs=PairsRecipe(count=20, batch=8, shard=8, guidance=7.5, top_k=20),
        distill=replace(tiny.distill, train_steps=(0, 20)),
        log_every=2,
        save_every=2,
        preview_every=6,
    )


@pytest.fixture
def published(recipe: Recipe, tmp_path: Path) -> Path:
    publish(tmp_path / "published", recipe)
    return tmp_path / "published"


def publish(folder: Path, recipe: Recipe) -> None:
    """Write a bundle as `convert` makes it of a published model of texts: no student, no encoder."""
    preset = PresetEntry.of(teacher(64))
    manifest = Manifest(
        name="published",
        family="llamagen",
        description="A teacher of texts.",
        image_size=32,
        classes=[],
        text=T5,
        vq=recipe.tokenizer_model,
        student=None,
        teacher=recipe.model,
        draw=LogitSettings(guidance=7.5, top_k=20),
        flow=FlowSettings(),
        presets=[preset],
        data="none",
        licence="none",
    )
    torch.manual_seed(0)
    tokenizer = VQTokenizer(recipe.tokenizer_model)
    save_bundle(
        folder,
        manifest,
        tokenizer=tokenizer,
        student=None,
        teacher=new_teacher(recipe, tokenizer, CPU),
        marginals_KLV=None,
    )


def test_from_a_teacher_and_prompts_to_a_bundle_with_a_student(
    recipe: Recipe, published: Path, tmp_path: Path
) -> None:
    run = Run(recipe, tmp_path / "run", CPU)
    start_from(run, published)
    with pytest.raises(RecipeError, match="--prompts"):
        pairs.run(run)
    file = tmp_path / "prompts.txt"
    file.write_text("A red cat\nhttps://example.com/a.png\ntwo blue dogs in the snow\n")
    pairs.run(run, file)
    assert pairs.pair_prompts(run) == ["A red cat", "two blue dogs in the snow"]
    assert load_pairs(run.out / "pairs").labels.tolist() == [i % 2 for i in range(20)]
    distill.run(run)
    manifest = export.run(run, "drawn", tmp_path / "bundle")
    assert {p.name for p in manifest.presets if p.offered} == {
        "dd-1", "dd-2", "pre-trained-14-21", "pre-trained-7-21", "pre-trained-1-21", "teacher",
    }  # fmt: skip
    assert manifest.text == T5 and manifest.draw.guidance == 7.5
    assert set(manifest.files) == {f"{part}.safetensors" for part in ("tokenizer", "student", "teacher")}
    assert load_bundle(tmp_path / "bundle", CPU).sampler.student is not None


def test_what_a_run_of_prompts_has_no_images_for_is_refused(
    recipe: Recipe, published: Path, tmp_path: Path
) -> None:
    run = Run(recipe, tmp_path / "run", CPU)
    with pytest.raises(RecipeError, match="dd-train start"):
        tokenizer.run(run)
    start_from(run, published)
    with pytest.raises(RecipeError, match="measure"):
        evaluate.run(run)
    other = Run(replace(recipe, model=replace(recipe.model, layers=3)), tmp_path / "other", CPU)
    with pytest.raises(RecipeError, match="another architecture"):
        start_from(other, published)
    empty = tmp_path / "links.txt"
    empty.write_text("https://example.com/a.png\n")
    with pytest.raises(RecipeError, match="none of the prompts"):
        pairs.run(run, empty)


def test_conditions_are_what_a_server_encodes(recipe: Recipe) -> None:
    prompts = ["a red cat", "two blue dogs in the snow tonight"]
    conditions = text_data.prompt_conditions(recipe, prompts, Path("never written"))
    found = conditions(torch.tensor([1, 0]))
    served = PromptEncoder(FewWords(T5, CPU), T5.length, T5.dim).encode(prompts[::-1])
    assert torch.equal(found.states_BTN, served.states_BTN)  # type: ignore[union-attr]
    assert torch.equal(found.mask_BT, served.mask_BT)  # type: ignore[union-attr]
    assert conditions.count == 2
    with pytest.raises(InvalidRequestError):
        text_data.prompt_conditions(recipe, ["#1"], Path("never written"))(torch.tensor([0]))


def test_the_recipe_is_that_of_the_published_teacher() -> None:
    from dd_core.hub.registry import registry

    spec, recipe = registry()["llamagen-t2i-256"], get_recipe("llamagen-t2i")
    assert (recipe.tokenizer_model, recipe.model) == (spec.vq, spec.teacher)
    assert (recipe.pairs.guidance, recipe.pairs.top_k) == (spec.draw.guidance, spec.draw.top_k)
