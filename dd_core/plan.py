"""Every sampler is a plan: a frozen list of segments that one loop (`dd_core.sampling`) runs.

This module knows no torch: clients and planners can import it alone. A step is a 0-based block
index and T the number of blocks; the paper counts from 1, so its {1, 81} is `few_steps(T, 80)`
and its pre-trained-61-81 is `hybrid(T, 60, 80)`. `docs/07-sampling.md` has the table of all plans.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, NamedTuple

from dd_core.errors import InvalidPlanError

Actor = Literal["student", "teacher", "marginal"]
Draw = Literal["multinomial", "flow"]


class Traits(NamedTuple):
    """An actor as planning and scheduling see it; `dd_core.sampling` computes what it makes.

    Args:
        stepwise: it needs a forward pass for each block, over images that begin together; else one for all.
        whole: it makes all tokens from its first block on, so that it leaves a picture wherever it stops;
            images of any plans may share its pass.
        free: its pass runs no model.
    """

    stepwise: bool = False
    whole: bool = False
    free: bool = False


ACTORS: dict[Actor, Traits] = {
    "student": Traits(whole=True),
    "teacher": Traits(stepwise=True),
    "marginal": Traits(free=True),
}


@dataclass(frozen=True)
class Segment:
    """One actor makes the blocks `start <= block < stop`; afterwards they count as final.

    A student makes all tokens from `start` on and only those before `stop` are kept; a teacher
    needs a forward pass for each block; a marginal draws independently from frequencies.
    """

    actor: Actor
    start: int
    stop: int

    @property
    def passes(self) -> int:
        """Advances of its run (`dd_core.sampling.SegmentRun`)."""
        return self.stop - self.start if ACTORS[self.actor].stepwise else 1


@dataclass(frozen=True)
class Plan:
    """A sampler as data; hashable, so that it can be a batch key and, by name, a metric label.

    Args:
        name: short name (`dd-1`, `dd-2`, `pre-trained-61-81`, `teacher`, …).
        segments: contiguous from block 0 to T.
        draw: how a teacher segment turns probabilities into a token.
        split: in the last student segment, tokens of blocks before `split` come from the logits
            head (argmax), the others stay the embedding head's continuous output. None = all
            from logits.

    Raises:
        InvalidPlanError: a gap, an overlap, an empty segment or an unknown actor.
    """

    name: str
    segments: tuple[Segment, ...]
    draw: Draw = "multinomial"
    split: int | None = None

    def __post_init__(self) -> None:
        place = 0
        for segment in self.segments:
            if segment.actor not in ACTORS:
                raise InvalidPlanError(
                    f"plan {self.name}: actor must be one of {', '.join(ACTORS)}, not {segment.actor!r}",
                    param="segments",
                )
            if segment.start != place or segment.stop <= segment.start:
                raise InvalidPlanError(
                    f"plan {self.name}: segment {segment.start}→{segment.stop} must start at "
                    f"block {place} and must not be empty",
                    param="segments",
                )
            place = segment.stop
        if not self.segments:
            raise InvalidPlanError(f"plan {self.name} has no segments", param="segments")
        if self.draw not in ("multinomial", "flow"):
            raise InvalidPlanError(
                f"plan {self.name}: draw must be multinomial or flow, not {self.draw!r}", param="draw"
            )
        if self.split is not None and not 0 <= self.split <= place:
            raise InvalidPlanError(f"plan {self.name}: split must be between 0 and {place}", param="split")

    @property
    def num_blocks(self) -> int:
        """T, the number of blocks of the layout that this plan fits."""
        return self.segments[-1].stop

    @property
    def first_continuous(self) -> int:
        """First block whose tokens come from the embedding head (T where none does)."""
        return self.num_blocks if self.split is None else self.split

    @cached_property
    def cost(self) -> int:
        """Forward passes of a model: 1 a student segment, 1 a block of a teacher segment, none for a
        look-up of marginals; but a plan costs at least 1 (as the paper counts onestep*).
        """
        return max(1, sum(s.passes for s in self.segments if not ACTORS[s.actor].free))

    @property
    def needs(self) -> frozenset[Actor]:
        """The actors that take part."""
        return frozenset(s.actor for s in self.segments)


def one_step(num_blocks: int, split: int | None = None) -> Plan:
    """The student alone: noise → image in one pass."""
    return Plan("dd-1", (Segment("student", 0, num_blocks),), split=split)


def few_steps(num_blocks: int, *steps: int, split: int | None = None) -> Plan:
    """Algorithm 3: student jumps from block 0 and from each of `steps` (ascending)."""
    places = (0, *steps, num_blocks)
    segments = tuple(Segment("student", a, b) for a, b in itertools.pairwise(places))
    return Plan(f"dd-{len(segments)}", segments, split=split)


def hybrid(
    num_blocks: int, start: int, stop: int, split: int | None = None, draw: Draw = "multinomial"
) -> Plan:
    """Algorithm 4: student, then the teacher's blocks `start..stop-1`, then the student.

    Named `pre-trained-n-m` as in the paper's Table 2, whose n, m are 1-based. With `draw` "flow" the
    teacher's tokens follow the noise too, so they refine the picture that the student begins.
    """
    segments = [Segment("student", 0, start)] if start else []
    segments.append(Segment("teacher", start, stop))
    if stop < num_blocks:
        segments.append(Segment("student", stop, num_blocks))
    return Plan(f"pre-trained-{start + 1}-{stop + 1}", tuple(segments), draw, split)


def teacher(num_blocks: int, draw: Draw = "multinomial") -> Plan:
    """The teacher alone, drawing each block from its distribution: T passes."""
    return Plan("teacher", (Segment("teacher", 0, num_blocks),), draw)


def trajectory(num_blocks: int, begin: int = 0) -> Plan:
    """Algorithm 1: the teacher with the flow-matching map of the noise as its draw; of the blocks before
    `begin` those of the student.
    """
    segments = (Segment("student", 0, begin),) if begin else ()
    return Plan("trajectory", (*segments, Segment("teacher", begin, num_blocks)), draw="flow")


def skip(num_blocks: int, skipped: int) -> Plan:
    """Baseline skip-n: the teacher stops n blocks early, the rest comes from the marginals."""
    stop = num_blocks - skipped
    segments = (Segment("teacher", 0, stop), Segment("marginal", stop, num_blocks))
    return Plan(f"skip-{skipped}", segments)


def onestep(num_blocks: int) -> Plan:
    """Baseline onestep*: every token from its own marginal, the optimum of Proposition 3.1."""
    return Plan("onestep", (Segment("marginal", 0, num_blocks),))


@dataclass(frozen=True)
class Preset:
    """A plan that a model offers, with what it is known to cost and to reach.

    Args:
        plan: the plan.
        fid: its measured FID, or None.
        published: True when the figure is the authors', not measured on this bundle.
        offered: False for plans that exist for comparison only (baselines, trajectories).
    """

    plan: Plan
    fid: float | None = None
    published: bool = False
    offered: bool = True

    def reaches(self, fid: float) -> bool:
        """True if it is known to be at least as good as `fid`."""
        return self.fid is not None and self.fid <= fid


def plan_for_budget(presets: Sequence[Preset], budget: int) -> Preset:
    """The best offered plan that costs at most `budget` forward passes.

    Best is the lowest FID among those measured; a plan without a figure counts as worse than
    any with one, and between equals the dearer plan wins, since it was offered for its quality.

    Raises:
        InvalidPlanError: no plan fits; the message says what the cheapest one costs.
    """
    offered = [p for p in presets if p.offered]
    affordable = [p for p in offered if p.plan.cost <= budget]
    if not affordable:
        costs = ", ".join(str(p.plan.cost) for p in sorted(offered, key=lambda p: p.plan.cost))
        raise InvalidPlanError(
            f"no plan fits a budget of {budget} forward passes; plans cost {costs or 'nothing'}",
            param="steps",
        )
    return min(affordable, key=lambda p: (p.fid if p.fid is not None else float("inf"), -p.plan.cost))
