"""Several jobs that make the pairs of one folder: with one recipe, and with nothing else beside them."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest
from safetensors.torch import save_file

from dd_core.errors import RecipeError
from tests.training import ranks
from training.options import Options
from training.prepared import prepared
from training.recipes.named import get_recipe
from training.recipes.saved import read_recipe
from training.stages import pairs
from training.stages.teacher import new_teacher
from training.stages.tokenizer import new_tokenizer

GIVEN = ("pairs.count=24", "pairs.shard=4", "pairs.batch=4", "evaluate.images=12")
HOLDER = """
import sys
from pathlib import Path
from training.options import Options
from training.prepared import prepared
out, shard, *overrides = sys.argv[1:]
with prepared(Options("tiny", Path(out), "cpu", overrides), shard=shard):
    print("held", flush=True)
    sys.stdin.read()
"""


def _options(out: Path, *overrides: str) -> Options:
    return Options(None, out, "cpu", list(overrides))


@pytest.fixture(scope="module")
def begun(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which pairs can be made."""
    out, recipe = tmp_path_factory.mktemp("jobs") / "run", get_recipe("tiny")
    out.mkdir()
    tokenizer = new_tokenizer(recipe, ranks.CPU)
    for name, module in (("tokenizer", tokenizer), ("teacher", new_teacher(recipe, tokenizer, ranks.CPU))):
        save_file(
            {k: v.contiguous() for k, v in module.state_dict().items()}, str(out / f"{name}.safetensors")
        )
    return out


@pytest.fixture(scope="module")
def holders(begun: Path) -> Iterator[list[subprocess.Popen[str]]]:
    """Three jobs that begin at once, each in a process of its own, and have the folder together."""
    with ExitStack() as stack:
        started = []
        for i in range(3):
            command = [sys.executable, "-c", HOLDER, str(begun), f"{i}/5", *GIVEN]
            process = stack.enter_context(
                subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            )
            stack.callback(process.kill)
            started.append(process)
        for process in started:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
        yield started


def test_one_more_job_of_the_same_recipe_joins(begun: Path, holders: list[subprocess.Popen[str]]) -> None:
    recipe = get_recipe("tiny", GIVEN)
    assert read_recipe(begun) == recipe
    for overrides in ((), GIVEN):
        with prepared(_options(begun, *overrides), shard="3/5") as run:
            assert run.recipe == recipe and (run.job.number, run.job.count) == (3, 5)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (
            ["distill.lr=0.5"],
            r"recipe\.json was made with other settings: distill\.lr was 0\.001 and is 0\.5",
        ),
        (["pairs.count=28"], r"pairs\.count was 24 and is 28; give all jobs the same settings"),
        (["pairs.count=+4"], r"cannot each add to pairs\.count: give all of them its new value, not \+4"),
        (["pairs.cout=4"], r"pairs has no field 'cout'"),
    ],
)
def test_a_job_of_another_recipe_is_refused(
    overrides: list[str], says: str, begun: Path, holders: list[subprocess.Popen[str]]
) -> None:
    before = (begun / "recipe.json").read_bytes()
    with (
        pytest.raises(RecipeError, match=says) as refused,
        prepared(_options(begun, *overrides), shard="3/5"),
    ):
        pass
    assert "\n" not in refused.value.message and (begun / "recipe.json").read_bytes() == before


def test_nothing_else_works_beside_jobs_until_the_last_one_has_ended(
    begun: Path, holders: list[subprocess.Popen[str]]
) -> None:
    for process in holders[:2]:
        process.kill()
        process.wait()
    with pytest.raises(RecipeError, match=f"in use by .*{holders[2].pid}"), prepared(_options(begun)):
        pass
    holders[2].kill()
    holders[2].wait()
    with (
        prepared(_options(begun)),
        pytest.raises(RecipeError, match="in use by process"),
        prepared(_options(begun), shard="0/5"),
    ):
        pass


def test_what_the_first_job_asked_for_in_vain_is_forgotten(tmp_path: Path) -> None:
    """Until then other jobs may go by it."""
    with (
        pytest.raises(RecipeError, match="run `dd-train tokenizer"),
        prepared(_options(tmp_path, "seed=4"), shard="0/2") as run,
    ):
        pairs.run(run)
    assert not (tmp_path / "recipe.json").exists()


def test_processes_that_begin_at_once_make_one_set(begun: Path) -> None:
    command = [sys.executable, "-m", "training", "pairs", "--recipe", "tiny", "--out", str(begun)]
    command += ["--device", "cpu", "--threads", "1", *(part for item in GIVEN for part in ("--set", item))]
    jobs = [
        subprocess.Popen([*command, "--shard", f"{i}/2"], stderr=subprocess.PIPE, text=True) for i in range(2)
    ]
    said = [job.communicate(timeout=120)[1] for job in jobs]
    assert [job.returncode for job in jobs] == [0, 0], said
    assert pairs.load_pairs(begun / "pairs").tokens.shape == (24, 64)
