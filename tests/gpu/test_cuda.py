"""The same promises on a CUDA device. Skipped where there is none."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dd_core.bundle import Bundle, load_bundle
from dd_core.codebook import nearest
from dd_core.condition import as_condition
from dd_core.noise import NoiseKey, batch_noise
from dd_core.runtime import pick_device
from dd_core.sampling import Sampler, run_plan, sample_images
from tests.tiny import tiny_bundle
from training.optim.loop import run_stage
from training.recipes.named import get_recipe
from training.stages.pairs import load_pairs, make_pairs
from training.stages.teacher import new_teacher, teacher_stage
from training.stages.tokenizer import new_tokenizer

T = 64


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_bundle(tmp_path_factory.mktemp("bundle"))


@pytest.fixture(scope="module")
def cuda(folder: Path) -> Bundle:
    return load_bundle(folder, pick_device("cuda"))


@pytest.mark.parametrize("name", ["dd-1", "dd-2", "pre-trained-11-21", "teacher"])
def test_cuda_draws_the_cpus_tokens(folder: Path, cuda: Bundle, name: str) -> None:
    """Float32 on both sides; a near tie may fall either way, so 99% of tokens must agree."""
    cpu = load_bundle(folder, torch.device("cpu"))
    chosen = next(p.plan for p in cpu.presets if p.plan.name == name)
    noise, uniform = batch_noise(NoiseKey.of_seed(0, 8), cpu.sampler.layout, 4)
    cond = as_condition(range(8))
    tokens = []
    with torch.inference_mode():
        for bundle in (cpu, cuda):
            s = bundle.sampler
            codes = run_plan(s, chosen, cond.to(s.device), noise.to(s.device), uniform.to(s.device))
            tokens.append(nearest(s.tokenizer.codebook_VC, codes).cpu())
    # After a first difference the teacher's continuation is free to differ: count leading tokens.
    agree = (tokens[0] == tokens[1]).cumprod(1).float().mean()
    assert agree > 0.99


@pytest.mark.parametrize("name", ["dd-1", "dd-2", "pre-trained-1-21", "teacher"])
def test_alone_equals_in_a_batch(cuda: Bundle, name: str) -> None:
    chosen = next(p.plan for p in cuda.presets if p.plan.name == name)
    alone = sample_images(cuda.sampler, chosen, [3], [(11, 2)])[0]
    for size in (2, 5, 8):
        keys = [(11, 2)] + [(99, i) for i in range(size - 1)]
        assert torch.equal(sample_images(cuda.sampler, chosen, [3] * size, keys)[0], alone)


@pytest.mark.parametrize("name", ["dd-1", "dd-2", "pre-trained-11-21"])
def test_a_plan_can_be_captured_as_a_graph(cuda: Bundle, name: str) -> None:
    """No host synchronisation, no data-dependent branch: capture would fail on either."""
    chosen = next(p.plan for p in cuda.presets if p.plan.name == name)
    sampler: Sampler = replace(cuda.sampler, exact=False)
    noise, uniform = (t.cuda() for t in batch_noise(NoiseKey.of_seed(0, 4), sampler.layout, 4))
    cond = as_condition(range(4)).to(sampler.device)
    with torch.inference_mode():
        eager = run_plan(sampler, chosen, cond, noise, uniform)
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            run_plan(sampler, chosen, cond, noise, uniform)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = run_plan(sampler, chosen, cond, noise, uniform)
        graph.replay()
        torch.cuda.synchronize()
    assert torch.allclose(captured, eager, atol=1e-4)


def test_training_runs_and_resumes(tmp_path: Path) -> None:
    recipe, device = get_recipe("tiny"), pick_device("cuda")
    tokens = torch.randint(0, 64, (2, 64, T)).to(torch.int16)
    tokenizer = new_tokenizer(recipe, device).eval()

    def stage() -> object:
        made, ema = teacher_stage(recipe, tokens, torch.arange(64) % 10, tokenizer, device)
        return run_stage(made, tmp_path, seed=0, log_every=2, save_every=2, stop_after=4), ema

    stage()
    stage()
    teacher = new_teacher(recipe, tokenizer, device).eval()
    sampler = Sampler(
        recipe.model.layout, tokenizer, None, teacher, draw=recipe.pairs.draw_settings, device=device
    )
    make_pairs(sampler, recipe.pairs, 10, tmp_path / "pairs", seed=0, identity="test")
    assert load_pairs(tmp_path / "pairs").tokens.shape == (48, T)


def test_the_flow_map_agrees_with_the_cpus() -> None:
    from dd_core.flow import FlowSettings, flow_map

    codes = torch.nn.functional.normalize(torch.randn(256, 8), dim=-1)
    noise, log_p = torch.randn(2000, 8), torch.randn(2000, 256).log_softmax(-1)
    here = flow_map(noise, log_p, codes, FlowSettings())
    there = flow_map(noise.cuda(), log_p.cuda(), codes.cuda(), FlowSettings()).cpu()
    assert (here == there).float().mean() > 0.99
