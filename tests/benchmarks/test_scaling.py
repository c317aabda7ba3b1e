"""A simulated fleet, and the rule that sets its size."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import report, scaling
from benchmarks.autoscaling import Autoscaler, Policy, by_pods, by_total
from benchmarks.pods import MODEL, Arrival, FixedCosts, Fleet, Pod, latencies
from dd_core.noise import NoiseKey
from dd_core.plan import Plan
from server.scheduling.costs import Work
from server.scheduling.jobs import Job
from tests.benchmarks.filed import filed

STEP, HYBRID, TEACHER = scaling.PLANS


@pytest.fixture(scope="module")
def record() -> dict[str, Any]:
    """The newest record of the engine that has the costs."""
    found: dict[str, Any] = json.loads(scaling.newest_record().read_text())
    return found


@pytest.fixture(scope="module")
def costs(record: dict[str, Any]) -> FixedCosts:
    return scaling.cost_table(record)


def a_fleet(costs: FixedCosts, rate: float, pods: int, plan: Plan = STEP, **more: Any) -> Fleet:
    fleet = Fleet(costs, lambda _: rate, lambda *_: Arrival(plan, 1), rate, 5.0, **more)
    fleet.resize(pods, started=True)
    return fleet


@pytest.mark.parametrize("images", [1, 8])
@pytest.mark.parametrize("plan", scaling.PLANS, ids=lambda plan: plan.name)
def test_costs_are_those_of_the_record(
    record: dict[str, Any], costs: FixedCosts, plan: Plan, images: int
) -> None:
    """The passes and the decoding of a plan are as long as the plan was, but for noise and conversion."""
    [row] = [r for r in record["results"]["plans"] if (r["plan"], r["batch"]) == (plan.name, images)]
    works = [Work(MODEL, s.actor, "" if s.actor == "student" else plan.name) for s in plan.segments]
    passes = [segment.passes for segment in plan.segments]
    seconds = sum(n * costs.seconds(work, images) for n, work in zip(passes, works, strict=True))
    seconds += costs.seconds(Work(MODEL, "decode"), images)
    assert seconds == pytest.approx(row["median_ms"] / 1e3, rel=0.08)
    assert costs.seconds(works[0], 1) < costs.seconds(works[0], 4) < costs.seconds(works[0], 8)


def test_a_record_without_its_figures_is_refused(record: dict[str, Any]) -> None:
    with pytest.raises(report.BenchmarkError, match="--batches 1,8"):
        scaling.cost_table({"results": {**record["results"], "stages": []}})


def test_a_request_alone_takes_as_long_as_its_passes(costs: FixedCosts) -> None:
    fleet = a_fleet(costs, 0.2, 1)
    fleet.run(100.0)
    fleet.drain()
    alone = costs.seconds(Work(MODEL, "student"), 1) + costs.seconds(Work(MODEL, "decode"), 1) + costs.gap
    assert len(fleet.replies) > 5
    assert latencies(fleet.replies) == pytest.approx([alone] * len(fleet.replies))


def test_every_request_is_served_or_refused_once(costs: FixedCosts) -> None:
    """In a fleet that is too small for them, and shrinks."""
    fleet = a_fleet(costs, 400.0, 3, queue_size=20)
    fleet.run(4.0)
    fleet.resize(1)
    fleet.run(8.0)
    served = latencies(fleet.replies)
    waiting = sum(len(pod.scheduler.jobs) for pod in fleet.pods)
    refused = len(fleet.replies) - len(served)
    assert waiting > 10 and refused > 100
    fleet.drain()
    assert len(latencies(fleet.replies)) == fleet.admitted == len(fleet.replies) - refused
    assert all(not pod.scheduler.jobs and pod.running is None for pod in fleet.pods)
    assert len(fleet.replies) == pytest.approx(8 * 400, rel=0.1)


def test_pods_count_from_their_creation_until_their_work_is_done(costs: FixedCosts) -> None:
    fleet = a_fleet(costs, 100.0, 2, TEACHER)
    fleet.run(2.0)
    fleet.resize(4)
    assert len(fleet.samples()) == 2
    fleet.run(6.9)
    assert len(fleet.samples()) == 2 and fleet.pod_seconds == pytest.approx(2 * 2 + 4 * 4.9)
    fleet.run(7.1)
    assert len(fleet.samples()) == 4
    fleet.resize(2)
    before = fleet.pod_seconds
    fleet.drain()
    assert fleet.pod_seconds - before > 2 * (fleet.now - 7.1), "those that leave have work"


def test_the_same_seed_is_the_same_day(costs: FixedCosts) -> None:
    day = scaling.Day(costs, 2, 60.0)
    way = scaling.ways(day)[-1]
    first, again, other = (scaling.simulate(day, 5.0, 1, seed, way) for seed in (0, 0, 1))
    assert first == again != other
    assert first["requests"] > 1000


def test_a_backlog_in_seconds_tells_a_teacher_from_one_step(costs: FixedCosts) -> None:
    """As many waiting images, but many times the work."""
    found = []
    for plan in (STEP, TEACHER):
        pod = Pod(costs, 256, 0.0)
        for _ in range(8):
            assert pod.scheduler.admit(Job(MODEL, plan, 0, (NoiseKey(0, 0),), 0.0), 0.0) is None
        found.append(pod.sample(0.0))
    few, many = found
    assert few.waiting == many.waiting == 8
    assert many.backlog > 5 * few.backlog > 0.2


def test_one_pod_in_some_stands_for_the_others(costs: FixedCosts) -> None:
    """A sample of a fleet has its latencies and its cost, with its share of the requests."""
    whole, part = a_fleet(costs, 600.0, 8), a_fleet(costs, 600.0, 8, each=4)
    for fleet in (whole, part):
        fleet.run(20.0)
    assert (len(whole.pods), len(part.pods)) == (8, 2)
    assert whole.pod_seconds == part.pod_seconds
    assert len(part.replies) == pytest.approx(len(whole.replies) / 4, rel=0.1)
    p99 = [report.percentile(latencies(fleet.replies), 99) for fleet in (whole, part)]
    assert p99[1] == pytest.approx(p99[0], rel=0.2)


def test_the_load_of_a_day_needs_its_pods(costs: FixedCosts) -> None:
    """As many as were asked for, just after noon; at most half of them before, with fewer teachers."""
    day = scaling.Day(costs, 100, 1000.0)
    assert day.need(500.0) == pytest.approx(100)
    assert max(day.need(at) for at in range(1000)) == day.need(500.0) > 1.5 * day.need(499.9)
    chance = random.Random(0)
    teachers = [sum(day.draw(at, chance).plan is TEACHER for _ in range(1000)) for at in (0.0, 999.0)]
    assert teachers[0] == pytest.approx(20, abs=15) and teachers[1] == pytest.approx(200, abs=50)


@pytest.mark.parametrize(
    ("current", "measured", "average", "pods"),
    [
        (4, 4, 1.05, 4),  # within the tolerance
        (4, 4, 1.5, 6),
        (4, 4, 0.5, 2),
        (4, 2, 2.0, 4),  # two that start are thought to take their share
        (4, 2, 4.0, 8),
        (4, 2, 0.5, 3),  # and to be as busy as they should
        (4, 0, 9.0, 4),  # nobody knows
    ],
)
def test_the_rule_by_a_metric_of_each_pod(current: int, measured: int, average: float, pods: int) -> None:
    assert by_pods(current, measured, average, 1.0) == pods


@pytest.mark.parametrize(("total", "pods"), [(4.3, 4), (4.5, 5), (3.5, 4), (1.1, 2), (0.0, 0)])
def test_the_rule_by_a_sum(total: float, pods: int) -> None:
    assert by_total(4, total, 1.0) == pods


def scaler(replicas: int) -> Autoscaler:
    return Autoscaler(replicas, 2, 50, Policy(100, 0, 30), Policy(10, 1, 60), 300)


def test_pods_are_doubled_at_most_every_half_minute() -> None:
    found = scaler(4)
    assert [found.sync(at, [100]) for at in (0, 15, 30, 45, 60, 75)] == [8, 8, 16, 16, 32, 32]
    assert found.sync(90, [100]) == 50


def test_pods_leave_after_five_minutes_and_few_a_minute() -> None:
    """Their number was too high for all of the time: in a large fleet a tenth goes, in a small one a pod."""
    found = scaler(40)
    sizes = {at: found.sync(at, [40 if at < 15 else 0]) for at in range(0, 700, 15)}
    assert sizes[300] == 40 and sizes[315] == 36 == sizes[360] and sizes[375] == 32
    small = scaler(3)
    sizes = {at: small.sync(at, [3 if at < 15 else 0]) for at in range(0, 700, 15)}
    assert (sizes[300], sizes[315], sizes[690]) == (3, 2, 2)


def test_the_highest_proposal_counts() -> None:
    assert scaler(4).sync(0, [1, 6, 5]) == 6


def test_a_small_day_is_filed_and_drawn(tmp_path: Path) -> None:
    picture = tmp_path / "scaling.png"
    options = ["--smoke", "--pods", "2", "--day", "45", "--processes", "1", "--rate", "20"]
    assert scaling.main([*options, "--out", str(tmp_path), "--plot", str(picture)]) == 0
    record, page = filed(tmp_path, "scaling")
    assert record["status"] == "ok" and len(record["results"]["day"]) == 5
    for row in record["results"]["day"]:
        assert row["requests"] > 500 and row["refused"] == 0
        assert 0 < row["one_step_p50_ms"] <= row["one_step_p99_ms"]
        assert row["pod_seconds"] >= 2 * 45
    assert len(record["results"]["capacity"]) == 9
    assert "KEDA" in page
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_record_that_is_none_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "none.json").write_text("{")
    assert scaling.main(["--record", str(tmp_path / "none.json"), "--out", str(tmp_path)]) == 1
    assert "is no record" in capsys.readouterr().err
