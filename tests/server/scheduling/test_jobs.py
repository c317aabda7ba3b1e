"""Stages of plans, and the work that images have still to go through."""

from __future__ import annotations

from dd_core.plan import onestep, skip
from server.scheduling.costs import RemainingWork, Work
from server.scheduling.jobs import Sample, stages
from tests.server.scheduling.helpers import HYBRID, TEACHER
from tests.server.scheduling.simulation import job


def test_a_plan_is_cut_into_passes_that_others_can_share() -> None:
    assert [(s.work.kind, s.work.plan, s.passes) for s in stages("tiny", HYBRID)] == [
        ("student", "", 1),
        ("teacher", "pre-trained-3-7", 4),
        ("student", "", 1),
    ]
    assert [(s.work.kind, s.passes) for s in stages("tiny", TEACHER)] == [("teacher", 16), ("decode", 1)]
    assert [s.work.kind for s in stages("tiny", onestep(16))] == ["marginal"]
    assert [s.work.kind for s in stages("tiny", skip(16, 4))] == ["teacher", "marginal"]


def test_an_image_has_the_passes_of_its_stages_ahead_and_their_decoding() -> None:
    """Each picture is decoded once, in the lane of the pass that it comes with."""
    asked = job(HYBRID, priority=1)
    image = Sample(asked, 0, 1, (-1, 0.0, 1))
    teacher = RemainingWork(1, "heavy", Work("tiny", "teacher", HYBRID.name), 4)
    student, decode = (RemainingWork(1, "light", Work("tiny", kind), 1) for kind in ("student", "decode"))
    assert asked.remaining() == [student, teacher, student, decode]
    assert image.remaining == asked.remaining()
    image.stage = 2
    assert image.remaining == [student, decode]
    image.stage = 3
    assert image.remaining == []
    assert job(TEACHER).remaining()[1:] == [RemainingWork(0, "heavy", Work("tiny", "decode"), 1)]
    previewed = job(HYBRID, priority=1, previews=True).remaining()
    assert previewed.count(decode) == 2, "the first jump and the last"
