"""Pairs that several jobs make, none of which knows of the others."""

from __future__ import annotations

import copy
import hashlib
import json
import threading
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from dd_core.errors import NotANumberError, RecipeError
from dd_core.sampling import Sampler
from training.recipes.named import get_recipe
from training.run import Job
from training.stages.pairs import Pairs, load_pairs, make_pairs, noise_of
from training.stages.teacher import new_teacher
from training.stages.tokenizer import new_tokenizer

CPU = torch.device("cpu")
RECIPE = replace(get_recipe("tiny"), pairs=replace(get_recipe("tiny").pairs, count=28, shard=8, batch=8))


@pytest.fixture(scope="module")
def sampler() -> Sampler:
    tokenizer = new_tokenizer(RECIPE, CPU)
    teacher = new_teacher(RECIPE, tokenizer, CPU).eval()
    return Sampler(RECIPE.model.layout, tokenizer, None, teacher, draw=RECIPE.pairs.draw_settings)


def _make(sampler: Sampler, folder: Path, number: int = 0, count: int = 1, **how: int) -> None:
    make_pairs(sampler, RECIPE.pairs, 10, folder, seed=0, identity="a", job=Job(number, count), **how)


def _files(folder: Path) -> dict[str, str]:
    return {p.name: hashlib.sha256(p.read_bytes()).hexdigest() for p in folder.iterdir()}


def test_jobs_make_the_files_of_one(sampler: Sampler, tmp_path: Path) -> None:
    """In any order; one dies and comes back; another comes twice, once while it still runs."""
    _make(sampler, tmp_path / "one")
    together = tmp_path / "together"
    _make(sampler, together, 2, 3)
    assert {p.name for p in together.iterdir()} == {"manifest.json", "pairs-00002.safetensors"}
    _make(sampler, together, 0, 3, stop_after=1)
    with pytest.raises(RecipeError, match="no complete set of pairs: 2 shards are missing, the first is 1"):
        load_pairs(together)
    _make(sampler, together, 0, 3)
    twins = [threading.Thread(target=_make, args=(sampler, together, 1, 3)) for _ in range(2)]
    for twin in twins:
        twin.start()
    for twin in twins:
        twin.join()
    assert _files(together) == _files(tmp_path / "one")
    assert len(load_pairs(together).tokens) == 28


def test_folders_of_earlier_versions_are_read(sampler: Sampler, tmp_path: Path) -> None:
    """They say whether they are complete; what counts is that the shards are there."""
    _make(sampler, tmp_path / "old")
    manifest = tmp_path / "old" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "complete": True}, indent=1))
    assert len(load_pairs(tmp_path / "old").tokens) == 28
    _make(sampler, tmp_path / "old")
    (tmp_path / "old" / "pairs-00003.safetensors").unlink()
    with pytest.raises(RecipeError, match="the first is 3"):
        load_pairs(tmp_path / "old")


def test_a_set_goes_on_in_batches_of_another_size(sampler: Sampler, tmp_path: Path) -> None:
    """As on a smaller GPU; manifests of before had the size."""
    _make(sampler, tmp_path, stop_after=1)
    manifest = tmp_path / "manifest.json"
    facts = json.loads(manifest.read_text())
    assert "batch" not in facts["made_with"]["pairs"]
    facts["made_with"]["pairs"]["batch"] = 8
    manifest.write_text(json.dumps(facts))
    make_pairs(sampler, replace(RECIPE.pairs, batch=3), 10, tmp_path, seed=0, identity="a")
    _make(sampler, tmp_path / "whole")
    assert torch.equal(load_pairs(tmp_path).tokens, load_pairs(tmp_path / "whole").tokens)


def test_pairs_of_another_teacher_are_refused(sampler: Sampler, tmp_path: Path) -> None:
    _make(sampler, tmp_path)
    assert len(load_pairs(tmp_path, RECIPE.pairs, "a").tokens) == 28
    with pytest.raises(RecipeError, match="holds pairs of another teacher than the run has now"):
        load_pairs(tmp_path, RECIPE.pairs, "b")


def test_a_teacher_gone_astray_makes_no_pairs(sampler: Sampler, tmp_path: Path) -> None:
    """The nearest code of what is not a number would be the first one."""
    astray = copy.deepcopy(sampler.teacher)
    assert isinstance(astray, nn.Module)
    next(astray.parameters()).data.fill_(torch.nan)
    with pytest.raises(NotANumberError, match="pair 0: the teacher's output is not a number"):
        _make(replace(sampler, teacher=astray), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["manifest.json"]


def test_a_job_is_named_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Job.of("3/8") == Job(3, 8).of_rank()
    for name, value in (("RANK", "1"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "1")):
        monkeypatch.setenv(name, value)
    ranks = {Job.of(f"{i}/2").of_rank() for i in range(2)}
    assert ranks == {Job(1, 4), Job(3, 4)}, "the other two are rank 0's"


@pytest.mark.parametrize("text", ["4/4", "1", "-1/4", "a/b", "1/0", ""])
def test_a_job_that_there_is_not_is_refused(text: str) -> None:
    with pytest.raises(RecipeError, match="--shard takes I/N with I from 0") as refused:
        Job.of(text)
    assert refused.value.param == "shard"


def test_noise_of_some_pairs_is_that_of_all_of_them() -> None:
    """Of two sets one after another; a pair's noise follows from its own set's seed and its place there."""
    tokens = torch.zeros(5, 6, dtype=torch.int16)
    sets = [Pairs(torch.zeros(5), tokens, seed=1), Pairs(torch.zeros(3), tokens[:3], seed=4)]
    whole = torch.cat([s.noise(4) for s in sets])
    index = torch.tensor([7, 0, 4, 5])
    assert whole.dtype == torch.float16 and len(whole.unique()) > 150
    assert torch.equal(noise_of(sets, index, 4), whole[index])
