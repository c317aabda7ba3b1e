"""Each finding on a run that has the trouble, and on one that has not; and whole diagnoses of tiny runs."""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from typer.testing import CliRunner

from dd_core.errors import RecipeError
from dd_core.layout import TokenLayout
from dd_core.models.build import new_teacher, new_tokenizer
from tests.training.fakes import Mean
from training.cli import app, main
from training.diagnose.finding import Finding
from training.diagnose.floor import floor
from training.diagnose.fresh import _alike
from training.diagnose.jumps import continuation, jumps, jumps_in_fid
from training.diagnose.run import diagnose, open_run, written
from training.diagnose.student import Scores, commonest_accuracy, memorisation, positions
from training.diagnose.teacher import condition, generalisation
from training.diagnose.tokens import codebook, codebook_in_training
from training.recipes.named import get_recipe
from training.run import Run, save
from training.stages import distill, pairs
from training.stages.tokens import write_tokens

CPU = torch.device("cpu")
LAYOUT = TokenLayout((1,) * 8)


def _drawn(used: int, count: int = 20_000) -> Tensor:
    return torch.randint(used, (count,), generator=torch.Generator().manual_seed(0))


def test_a_collapsed_codebook_is_found_and_a_healthy_one_is_not_blamed() -> None:
    healthy = codebook(_drawn(1024).view(2, -1, 10), 1024)
    assert not healthy.trouble and healthy.says.startswith("1,024 of 1,024 codes occur")
    collapsed = codebook(_drawn(3), 1024)
    assert collapsed.trouble and "3 of 1,024" in collapsed.says and "continuous_for" in collapsed.advice
    assert collapsed.numbers["perplexity"] == pytest.approx(3, abs=0.1)


def test_codes_that_all_occur_while_a_few_draw_nearly_everything_are_found() -> None:
    tokens = torch.cat([_drawn(2, 100_000), torch.arange(1024)])
    found = codebook(tokens, 1024)
    assert found.numbers["used"] == 1024 and found.numbers["perplexity"] < 3
    assert found.trouble and "one grey" in found.advice


def test_a_tokenizer_in_training_is_judged_by_its_running_counts() -> None:
    assert codebook_in_training(0.05, 1024, 780).trouble
    fine = codebook_in_training(0.5, 1024, 780)
    assert not fine.trouble and fine.says == "512 of 1,024 codes are in use at step 780, by a running count."


def _scores(nats: float, step: int = 0, right: float = 0.5, pairs: int = 50) -> Scores:
    """Cross entropies about `nats`, and that share of right tokens."""
    noise = 0.1 * torch.randn(pairs, 8, generator=torch.Generator().manual_seed(step))
    hits = torch.zeros(pairs * 8)
    hits[: round(right * pairs * 8)] = 1
    return Scores(nats + noise, hits[torch.randperm(pairs * 8)].view(pairs, 8), LAYOUT, step)


@pytest.mark.parametrize(("fresh", "trouble"), [(5.01, True), (4.70, False)])
def test_memorisation_is_a_gap_to_fresh_pairs(fresh: float, trouble: bool) -> None:
    """The lab notes' 4.68 and 5.01 nats, of a student whose further steps gained nothing."""
    found = memorisation({0: _scores(4.68), 3: _scores(4.6, 3)}, {0: _scores(fresh), 3: _scores(4.6, 3)})
    assert found.trouble == trouble and found.numbers["step 0"]["gap"] == pytest.approx(
        fresh - 4.68, abs=1e-4
    )
    assert ("pairs.count" in found.advice) == trouble


def test_a_gap_within_its_error_is_no_finding() -> None:
    """Two pairs of which one is hard: a mean gap of 0.5 with an error as large."""
    level = torch.zeros(2, 8)
    hard = level.clone()
    hard[0] = 1.0
    on, off = (Scores(4 + nats, level, LAYOUT, 0) for nats in (level, hard))
    assert not memorisation({0: on}, {0: off}).trouble


@pytest.mark.parametrize(
    ("nats", "right", "adversarial", "advice"),
    [
        (1.0, 0.5, False, ""),
        (1.0, 0.11, False, "distill.adversarial"),
        (1.0, 0.11, True, ""),
        (1.0, 0.021, True, "Train it longer"),
        (0.99 * math.log(64), 0.5, True, "Train it longer"),
    ],
)
def test_positions_tell_a_beginner_from_one_that_guesses_each_place(
    nats: float, right: float, adversarial: bool, advice: str
) -> None:
    found = positions({0: _scores(nats, right=right)}, 0.02, math.log(64), adversarial)
    assert found.trouble == bool(advice) and advice in found.advice
    assert len(found.numbers["by_block"]["step 0"]) == 8
    assert found.numbers["one_step"] == pytest.approx(right, abs=0.002)


def test_accuracy_by_block_begins_at_the_step() -> None:
    layout = TokenLayout((1, 3))
    scores = Scores(torch.zeros(2, 4), torch.tensor([[1.0, 1, 0, 0], [0, 1, 1, 1]]), layout, 0)
    assert scores.by_block() == [0.5, pytest.approx(4 / 6, abs=1e-4)]
    assert Scores(scores.nats_NL, scores.right_NL, layout, 1).by_block()[0] is None


def test_the_commonest_tokens_are_of_a_place() -> None:
    known = torch.tensor([[1, 2], [1, 2], [3, 0]])
    assert commonest_accuracy(known, torch.tensor([[1, 0], [2, 2]]), 4) == 0.5


def test_a_later_jump_that_fails_from_its_own_tokens_is_found() -> None:
    true = {0: _scores(4.6), 3: _scores(4.37, 3)}
    found = jumps(true, {3: _scores(4.51, 3)})
    assert found.trouble and "own-pairs" in found.advice
    assert "the jump 0→3" in found.says and "4.51 from its own" in found.says
    assert not jumps(true, {3: _scores(4.40, 3)}).trouble


def test_continuations_are_the_students_jumps_and_then_the_teacher() -> None:
    plan = continuation(8, [0, 2, 5], 5)
    assert [(s.actor, s.start, s.stop) for s in plan.segments] == [
        ("student", 0, 2),
        ("student", 2, 5),
        ("teacher", 5, 8),
    ]
    assert plan.draw == "flow"


def test_jumps_are_told_in_fid_where_the_evaluation_has_the_plans() -> None:
    """The lab notes: of 9.8 points behind the teacher 6 are the second jump's and 3.7 the first one's."""
    fids = {"teacher": 64.1, "pre-trained-1-21": 70.1, "dd-2": 73.9, "dd-1": 79.1}
    assert "teacher 64.1; +6.0 by the second jump, +3.8 by the first one" in jumps_in_fid(fids, 20)
    assert jumps_in_fid(fids, 19) == ""


def test_the_floor_is_blamed_where_the_teacher_is_at_it() -> None:
    assert floor({"reconstruction": 62.6, "teacher": 67.4}).trouble
    assert not floor({"reconstruction": 2.0, "teacher": 10.0, "dd-1": 12.0}).trouble
    assert floor({"reconstruction": 2.0}).trouble is None


def test_a_teacher_that_knows_its_images_by_heart_or_ignores_its_condition_is_found() -> None:
    images = torch.zeros(40, 8), torch.arange(40) % 4

    def score(heart: float, reads: float) -> object:
        """Nats of images that are class 0's: of others the condition is wrong."""
        noise = torch.rand(40, generator=torch.Generator().manual_seed(1)) / 100

        def of(tokens: Tensor, labels: Tensor) -> Tensor:
            return 4 + heart * tokens[:, 0] + reads * (labels != torch.arange(40) % 4) + noise

        return of

    held_out = torch.ones(40, 8), torch.arange(40) % 4
    assert generalisation(score(0.4, 0), images, held_out).trouble
    assert not generalisation(score(0.01, 0), images, held_out).trouble
    assert condition(score(0, 0), images).trouble
    reads = condition(score(0, 0.1), images)
    assert not reads.trouble and reads.numbers["share"] == 1.0


@pytest.mark.parametrize(("pairs", "labels"), [(48, 10), (1500, 10), (24, 24), (5, 3)])
def test_a_pair_that_was_learned_has_the_label_of_the_fresh_one(pairs: int, labels: int) -> None:
    found = [_alike(i, pairs, labels) for i in range(pairs)]
    assert all(k % labels == (pairs + i) % labels for i, k in enumerate(found))
    assert len(set(found)) > 0.9 * pairs - labels
    assert _alike(7, 4, 1000) < 4  # more classes than pairs


@pytest.fixture
def begun(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DD_CACHE", str(cache))
    monkeypatch.setenv("DD_LPIPS", str(cache / "lpips.safetensors"))


def _begin(out: Path, name: str, *overrides: str) -> Run:
    """A run with a tokenizer and a teacher that nothing was taught, and its pairs."""
    out.mkdir()
    common = [
        "decoder.steps=0",
        "train_images=32",
        "distill.lpips=0",
        "distill.mse=0",
        "distill.cross_entropy=1",
    ]
    run = Run(get_recipe(name, [*common, *overrides]), out, CPU)
    (out / "recipe.json").write_text(json.dumps(asdict(run.recipe)))
    torch.manual_seed(0)
    tokenizer = new_tokenizer(run.recipe.tokenizer_model)
    tokenizer.set_codes(torch.randn(tokenizer.codebook_VC.shape))
    save(run, "tokenizer", tokenizer)
    save(run, "teacher", new_teacher(run.recipe.model, tokenizer))
    write_tokens(run)
    pairs.run(run)
    return run


def _by_name(findings: list[Finding]) -> dict[str, Finding]:
    return {finding.name: finding for finding in findings}


@pytest.mark.usefixtures("begun")
@pytest.mark.parametrize(("name", "later"), [("tiny", 20), ("var-tiny", 2)])
def test_a_student_that_learned_its_pairs_by_heart_is_found_as_such(
    name: str, later: int, tmp_path: Path
) -> None:
    rare = ["log_every=60", "save_every=60", "preview_every=60"]
    few = ["pairs.count=16", "distill.steps=60", "distill.batch=16", "distill.lr=1e-2"]
    run = _begin(tmp_path / "run", name, *few, *rare)
    distill.run(run)
    found = _by_name(diagnose(run, 40, Mean()))
    blamed = found["memorisation"]
    assert blamed.trouble and "by heart" in blamed.advice
    assert set(blamed.numbers) == {"step 0", f"step {later}"}
    assert all(n["gap"] > 0.3 for n in blamed.numbers.values())
    blocks = run.recipe.model.layout.num_blocks
    by_block = found["positions"].numbers["by_block"]
    assert len(by_block["step 0"]) == blocks
    assert by_block[f"step {later}"][:later] == [None] * later
    assert [j["start"] for j in found["jumps"].numbers["jumps"]] == [0, later]
    assert (run.out / "diagnosis.png").stat().st_size > 1000


@pytest.mark.usefixtures("begun")
def test_a_run_is_diagnosed_as_far_as_it_is(tmp_path: Path) -> None:
    """Tokenizer and teacher alone; then a student under way, which has not learned its pairs by heart."""
    run = _begin(tmp_path / "run", "tiny", "distill.steps=6")
    found = _by_name(diagnose(run, 20, Mean()))
    assert found["student"].trouble is None and "none yet" in found["student"].says
    assert found["condition"].trouble is not None and found["floor"].numbers["quick_fid"] > 1
    distill.run(Run(run.recipe, run.out, CPU, stop_after=4))
    result = CliRunner().invoke(app, ["diagnose", str(run.out), "--pairs", "20", "--device", "cpu"])
    assert result.exit_code == 0, result.output
    record = json.loads((run.out / "diagnosis.json").read_text())
    assert record["progress"]["student"]["step"] == 4 and record["progress"]["student"]["steps"] == 6
    by_name = {finding["name"]: finding for finding in record["findings"]}
    assert by_name["memorisation"]["trouble"] is False and by_name["positions"]["trouble"] is True
    assert "Inception is not in the cache" in by_name["floor"]["says"]
    assert "✓ memorisation: The student's nats" in result.output
    (run.out / "teacher.safetensors").unlink()
    assert {"codebook", "teacher", "student"} <= _by_name(diagnose(run, 20, Mean())).keys()


@pytest.mark.parametrize(("step", "says"), [(278, "before step 280"), (280, "3 of 64 codes are in use")])
def test_codes_are_not_judged_before_they_are_used(step: int, says: str, tmp_path: Path) -> None:
    """From step 50 on images are quantised, and 230 later a code that is never drawn is down to a tenth."""
    run = Run(get_recipe("tiny", ["tokenizer.steps=1000"]), tmp_path, CPU)
    (tmp_path / "tokenizer.jsonl").write_text(json.dumps({"step": step, "codes_in_use": 0.05}) + "\n")
    found = _by_name(diagnose(run, 20))["codebook"]
    assert says in found.says and found.trouble == (True if step == 280 else None)


@pytest.mark.usefixtures("begun")
def test_the_first_figure_that_is_no_number_is_named(tmp_path: Path) -> None:
    run = _begin(tmp_path / "run", "tiny")
    lines = [{"step": 2, "loss": 1.0}, {"step": 4, "loss": math.nan}, {"step": 6, "loss": math.nan}]
    (run.out / "teacher.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step"')
    found = diagnose(run, 20, Mean())
    assert written(found).startswith("! numbers: loss of the teacher is no number at step 4.")
    record = json.loads((run.out / "diagnosis.json").read_text(), parse_constant=pytest.fail)
    assert record["progress"]["teacher"]["loss"] is None


def test_a_folder_that_is_no_run_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        monkeypatch.setattr("sys.argv", ["dd-train", "diagnose", str(folder)])
        with pytest.raises(SystemExit) as stopped:
            main()
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and said.count("\n") == 1
        assert f"{folder} is no run folder: it has no recipe.json" in said
    (tmp_path / "recipe.json").write_text(json.dumps(asdict(get_recipe("tiny"))))
    with pytest.raises(RecipeError, match="nothing to diagnose yet"):
        diagnose(open_run(tmp_path, CPU))


@pytest.mark.usefixtures("begun")
def test_weights_of_another_recipe_get_one_line(tmp_path: Path) -> None:
    run = _begin(tmp_path / "run", "tiny")
    save_file({"x": torch.zeros(1)}, str(run.out / "teacher.safetensors"))
    with pytest.raises(RecipeError, match=r"teacher\.safetensors .* is not of the recipe") as caught:
        diagnose(run, 20, Mean())
    assert "\n" not in caught.value.message
