"""Totals of the work ahead and forecasts, on plain numbers."""

from __future__ import annotations

import pytest

from server.scheduling.backlog import Backlog, Forecast
from server.scheduling.costs import CostTable, RemainingWork, Work

STUDENT, TEACHER = Work("tiny", "student"), Work("tiny", "teacher", "teacher")
LIGHT, HEAVY = RemainingWork(0, "light", STUDENT, 1), RemainingWork(0, "heavy", TEACHER, 10)


def backlog() -> Backlog:
    """Passes of one image: a second of a student, two of a teacher; light work has half of the device."""
    costs = CostTable((1,))
    costs.observe(STUDENT, 1, 1.0)
    costs.observe(TEACHER, 1, 2.0)
    return Backlog(costs, light_share=0.5)


def test_what_is_taken_back_leaves_nothing() -> None:
    found = backlog()
    found.add([LIGHT, LIGHT, HEAVY])
    assert (found.seconds(), found.seconds("light"), found.seconds("heavy")) == (22.0, 2.0, 20.0)
    found.remove([LIGHT, HEAVY])
    found.remove([LIGHT])
    assert found.seconds() == 0 and not found._images


def test_work_of_a_lower_priority_is_not_in_the_way() -> None:
    found = backlog()
    found.add([LIGHT, LIGHT._replace(priority=-1)])
    assert found.seconds(priority=0) == 1.0 and found.seconds(priority=-1) == 2.0
    assert found.forecast([LIGHT], 1) == Forecast(1.0, 2.0, 1.0)
    assert found.forecast([LIGHT._replace(priority=1)], 1) == Forecast(0.0, 1.0, 1.0)


def test_light_work_has_its_share_beside_heavy_work_and_heavy_work_goes_last() -> None:
    found = backlog()
    found.add([LIGHT, HEAVY])
    assert found.forecast([LIGHT], 1) == Forecast(2.0, 4.0, 1.0)
    assert found.forecast([HEAVY], 1) == Forecast(21.0, 41.0, 20.0)
    mixed = found.forecast([LIGHT, HEAVY], 1)
    assert mixed == Forecast(2.0, 42.0, 21.0), "it starts as light work does and ends after all"


def test_images_of_one_request_share_passes_only_with_each_other_s() -> None:
    costs = CostTable((1, 2))
    costs.observe(STUDENT, 1, 1.0)
    costs.observe(STUDENT, 2, 1.0)
    found = Backlog(costs, light_share=0.5)
    assert found.forecast([LIGHT, LIGHT], 2).alone == pytest.approx(2.0), "two steps, of two images each"
