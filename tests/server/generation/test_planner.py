"""Which plan a request gets: on an idle server, in a time, under load."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dd_core import plan
from dd_core.plan import Preset
from server.errors import BadRequestError
from server.generation.planner import PlanChoice, PlanQuery, choose
from server.models.budgets import BudgetTable
from server.models.catalog import find
from server.scheduling.backlog import Forecast
from tests.server.helpers import Gate, Running, busy, eventually, refused, running

T = 64
ONE, TWO = Preset(plan.one_step(T), 50.0), Preset(plan.few_steps(T, 20), 40.0)
HYBRID, TEACHER = Preset(plan.hybrid(T, 0, 20), 32.0), Preset(plan.teacher(T), 30.0)
TABLE = BudgetTable([ONE, TWO, HYBRID, TEACHER])
PASS = 0.01


def waiting(seconds: float) -> Callable[[Preset], Forecast]:
    """A device with so many seconds of work ahead of everything, and passes of 10 ms."""

    def forecast(preset: Preset) -> Forecast:
        alone = PASS * preset.plan.cost
        return Forecast(seconds, seconds + alone, alone)

    return forecast


def picked(wish: PlanQuery, wait: float = 0.0, longest: float = 2.0) -> tuple[str, str]:
    choice = choose(TABLE, wish, ONE, longest, waiting(wait))
    return choice.requested.plan.name, choice.applied.plan.name


def test_a_table_knows_its_ladder_and_words_for_it() -> None:
    assert TABLE.ladder == (ONE, TWO, HYBRID, TEACHER)
    words = {word: TABLE.of_quality(word) for word in ("low", "medium", "high")}  # type: ignore[arg-type]
    assert words == {"low": ONE, "medium": TWO, "high": TEACHER}
    only = BudgetTable([ONE])
    assert {only.of_quality(word) for word in ("low", "medium", "high", "auto")} == {ONE}  # type: ignore[arg-type]


def test_a_plan_that_no_budget_leads_to_is_on_no_ladder() -> None:
    worse = Preset(plan.hybrid(T, 10, 20), 60.0)
    assert worse not in BudgetTable([ONE, TWO, worse, TEACHER]).ladder


@pytest.mark.parametrize(
    ("wish", "name"),
    [
        (PlanQuery(), "dd-1"),
        (PlanQuery(steps=2), "dd-2"),
        (PlanQuery(steps=63), "pre-trained-1-21"),
        (PlanQuery(quality="high"), "teacher"),
        (PlanQuery(latency=0.011), "dd-1"),
        (PlanQuery(latency=0.03), "dd-2"),
        (PlanQuery(latency=0.3), "pre-trained-1-21"),
        (PlanQuery(latency=10.0), "teacher"),
        (PlanQuery(latency=0.001), "dd-1"),
        (PlanQuery(steps=2, latency=10.0), "dd-2"),
        (PlanQuery(steps=64, latency=0.03), "dd-2"),
        (PlanQuery(steps=64, max_fid=31), "teacher"),
        (PlanQuery(steps=64, deadline=0.3), "pre-trained-1-21"),
    ],
)
def test_on_an_idle_server_a_request_gets_what_it_asks_for(wish: PlanQuery, name: str) -> None:
    assert picked(wish) == (name, name)


@pytest.mark.parametrize(
    ("wish", "wait", "requested", "applied"),
    [
        (PlanQuery(steps=64), 1.9, "teacher", "teacher"),
        (PlanQuery(steps=64), 2.1, "teacher", "dd-1"),
        (PlanQuery(steps=64, brownout=False), 2.1, "teacher", "teacher"),
        (PlanQuery(steps=64, deadline=0.8), 0.2, "teacher", "pre-trained-1-21"),
        (PlanQuery(steps=64, deadline=0.5), 0.0, "pre-trained-1-21", "pre-trained-1-21"),
        (PlanQuery(steps=64, deadline=0.5, brownout=False), 0.2, "teacher", "teacher"),
        (PlanQuery(steps=64, deadline=0.1), 0.2, "dd-2", "dd-1"),
        (PlanQuery(steps=64, max_fid=35), 9.0, "teacher", "pre-trained-1-21"),
        (PlanQuery(quality="high", latency=1.0), 0.5, "teacher", "pre-trained-1-21"),
        (PlanQuery(quality="high", latency=1.0, brownout=False), 0.5, "teacher", "pre-trained-1-21"),
    ],
)
def test_under_load_fewer_passes_are_spent_unless_the_request_minds(
    wish: PlanQuery, wait: float, requested: str, applied: str
) -> None:
    assert picked(wish, wait) == (requested, applied)


def test_brownout_can_be_off() -> None:
    assert picked(PlanQuery(steps=64), wait=1000.0, longest=0.0) == ("teacher", "teacher")


def test_nothing_is_forecast_where_there_is_nothing_to_choose() -> None:
    def never(_: Preset) -> Forecast:
        raise AssertionError("a forecast costs time")

    assert choose(TABLE, PlanQuery(), ONE, 2.0, never) == PlanChoice(ONE, ONE)


@pytest.mark.parametrize(
    ("wish", "best"), [(PlanQuery(steps=2, max_fid=35), "40.00"), (PlanQuery(max_fid=1), "50.00")]
)
def test_a_quality_that_no_plan_reaches_is_refused(wish: PlanQuery, best: str) -> None:
    with pytest.raises(BadRequestError, match=best) as caught:
        choose(TABLE, wish, ONE, 2.0, waiting(0))
    assert caught.value.param == "min_quality"


def test_plans_without_a_figure_reach_no_quality() -> None:
    with pytest.raises(BadRequestError, match="none is measured"):
        choose(BudgetTable([Preset(plan.one_step(T))]), PlanQuery(max_fid=50), ONE, 2.0, waiting(0))


# ---- over HTTP


@pytest.mark.parametrize(
    ("body", "name"),
    [
        ({"quality": "low"}, "dd-1"),
        ({"quality": "medium"}, "pre-trained-11-21"),
        ({"quality": "high"}, "teacher"),
        ({"quality": "auto", "min_quality": 30}, "teacher"),
        ({"latency_budget_ms": 0.001}, "dd-1"),
        ({"latency_budget_ms": 3_600_000}, "teacher"),
        ({"steps": 64, "min_quality": 31, "latency_budget_ms": 0.001}, "teacher"),
        ({"steps": None}, "dd-1"),
    ],
)
def test_words_and_times_lead_to_plans(server: Running, body: dict[str, Any], name: str) -> None:
    assert server.post({"label": 0, "seed": 0, **body}).json()["plan"] == name


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"quality": "best"}, "quality", "low"),
        ({"quality": "low", "steps": 1}, "quality", "not both"),
        ({"quality": "auto", "latency_budget_ms": 5}, "quality", "one of the two"),
        ({"latency_budget_ms": 0}, "latency_budget_ms", "greater"),
        ({"latency_budget_ms": "5"}, "latency_budget_ms", "number"),
        ({"min_quality": 1}, "min_quality", "50.00"),
        ({"min_quality": -1}, "min_quality", "greater"),
        ({"brownout": 1}, "brownout", "boolean"),
        ({"plan": "teachr"}, "plan", "dd-1, dd-2, pre-trained-11-21, pre-trained-1-21, teacher"),
        ({"plan": "onestep"}, "plan", "'onestep'"),  # for comparison alone
        ({"plan": "x" * 5000}, "plan", "x…"),
        ({"plan": 1}, "plan", "string"),
        ({"plan": "dd-1", "steps": 1}, "plan", "steps"),
        ({"plan": "dd-1", "quality": "auto"}, "plan", "quality"),
        ({"plan": "dd-1", "latency_budget_ms": 5}, "plan", "latency_budget_ms"),
        ({"plan": "dd-1", "min_quality": 60}, "plan", "min_quality"),
    ],
)
def test_wishes_that_contradict_themselves(
    server: Running, body: dict[str, Any], param: str, says: str
) -> None:
    assert says in refused(server.post({"label": 0, **body}), 400, "invalid_request", param)


def test_a_named_plan_is_applied_where_a_cheaper_one_measures_better(bundle_folder: Path) -> None:
    found = find(bundle_folder)
    presets = tuple(replace(p, fid=10.0) if p.plan.name == "dd-2" else p for p in found.presets)
    model = replace(found, presets=presets, budgets=BudgetTable(presets))
    with running(model) as live:
        assert live.post({"label": 0, "seed": 0, "steps": 64}).json()["plan"] == "dd-2"
        reply = live.post({"label": 0, "seed": 0, "plan": "teacher"}).json()
        assert (reply["plan"], reply["requested_plan"], reply["steps"]) == ("teacher", "teacher", 64)
        [image] = reply["images"]
        assert live.post({"receipt": image["receipt"]}).json()["images"] == [image]
        two = live.post({"label": 0, "seed": 0, "steps": 2}).json()["images"][0]
        assert live.post({"receipt": two["receipt"], "plan": "teacher"}).json()["images"] == [image]
        last = live.post({"label": 0, "seed": 0, "plan": "teacher"}, accept="text/event-stream").text
        assert f'"receipt":"{image["receipt"]}"' in last
        openai = {"prompt": "airplane", "seed": 0, "plan": "teacher", "quality": "auto"}
        assert live.client.post("/v1/images/generations", json=openai).json()["plan"] == "teacher"
        both = live.client.post("/v1/images/generations", json={**openai, "quality": "hd"})
        assert "quality" in refused(both, 400, "invalid_request", "plan")


def test_models_say_where_words_lead(server: Running) -> None:
    [model] = server.client.get("/models").json()["models"]
    assert model["qualities"] == {"low": "dd-1", "medium": "pre-trained-11-21", "high": "teacher"}


def test_brownout_is_told_in_body_header_log_and_metric(bundle_folder: Path, gate: Gate) -> None:
    """Behind much work, two of four requests get one pass in place of 64, and are told so; the one that
    minds waits, and the one that names its plan.
    """
    with running(bundle_folder, gate, brownout_ms=1.0, max_batch=1) as live, ThreadPoolExecutor(30) as pool:
        first = busy(live, gate, pool)
        crowd = [pool.submit(live.post, {"label": 1, "seed": seed}) for seed in range(20)]
        eventually(lambda: live.depth == 20, "they wait")
        body = {"label": 2, "seed": 1, "steps": 64}
        in_json = pool.submit(live.post, body)
        in_headers = pool.submit(live.post, body, accept="image/png")
        minds = pool.submit(live.post, {**body, "brownout": False})
        named = pool.submit(live.post, {"label": 2, "seed": 1, "plan": "teacher"})
        eventually(lambda: live.depth == 24, "all wait")
        gate.open.set()
        reply = in_json.result().json()
        assert (reply["plan"], reply["steps"], reply["requested_plan"]) == ("dd-1", 1, "teacher")
        headers = in_headers.result().headers
        assert (headers["x-dd-plan"], headers["x-dd-requested-plan"]) == ("dd-1", "teacher")
        assert minds.result().json()["plan"] == named.result().json()["plan"] == "teacher"
        assert first.result().status_code == 200
        assert all(other.result().json()["requested_plan"] == "dd-1" for other in crowd)
        assert live.metric("dd_plan_downgrades_total", requested="teacher", applied="dd-1") == 2
        # The receipt is of what was made.
        again = live.post({"receipt": reply["images"][0]["receipt"]}).json()
        assert again["images"] == reply["images"]
