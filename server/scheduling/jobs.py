"""Data of the scheduler: jobs, their images, and the batches in which these go through forward passes.

    Job (a request) ─▶ Samples (its images), each at a Stage of the plan ─▶ Batch (one forward pass)

A stage is a segment of the plan, or the decoding after it. An image that a student or a marginal finishes is
decoded in the same pass; after a teacher, whose whole batch ends at once, decoding is a stage of its own, so
that it can be interleaved. A student's earlier jump is a whole picture too: a job that asks for previews has
it decoded on the way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from dd_core.plan import ACTORS, Plan
from server.scheduling.costs import RemainingWork, Work, lane_of

if TYPE_CHECKING:  # torch, which scheduling can do without
    from dd_core.noise import NoiseKey

# A job fails after so many deaths of the device, in the last of which it was alone. A crash points at it; of
# a kill from outside it is the victim, but also the cause, where it takes more memory than there is.
_MAX_CRASHES = 2
_MAX_KILLS = 3

Rank = tuple[int, float, int]  # lowest first: (−priority, due, order of arrival)


class Stage(NamedTuple):
    """A part of a plan: `passes` passes of `work`, of the segment with the index `segment`."""

    work: Work
    passes: int
    segment: int


def stages(model: str, plan: Plan) -> tuple[Stage, ...]:
    """Cut a plan into stages. Students of all plans share their passes, other actors those of one plan."""
    found = []
    for number, segment in enumerate(plan.segments):
        shared = ACTORS[segment.actor].whole
        work = Work(model, segment.actor, "" if shared else plan.name)
        found.append(Stage(work, segment.passes, number))
    if found[-1].work.traits.stepwise:
        found.append(Stage(Work(model, "decode"), 1, len(plan.segments) - 1))
    return tuple(found)


@dataclass(eq=False)
class Job:
    """The images of one request."""

    model: str  # name of a loaded model
    plan: Plan
    condition: int | str  # class index, or prompt
    keys: tuple[NoiseKey, ...]  # the noise of each image
    submitted: float  # time of arrival
    priority: int = 0  # of two that wait the higher goes first
    deadline: float | None = None  # time by which it must be done
    previews: bool = False  # pictures of the student's earlier jumps are wanted as well
    over: bool = False  # complete, failed, expired or canceled
    crashes: int = 0  # times that the device died of itself while at it, maybe with others
    kills: int = 0  # times that the device was killed by somebody else meanwhile
    compute_s: float = 0.0
    finished: float = 0.0

    def __post_init__(self) -> None:
        self.stages = stages(self.model, self.plan)
        self.samples: list[Sample] = []

    @property
    def count(self) -> int:
        """Number of images."""
        return len(self.keys)

    @property
    def unfinished(self) -> list[Sample]:
        return [s for s in self.samples if s.stage < len(self.stages)]

    @property
    def begun(self) -> bool:
        """True if the device holds something of it, or did."""
        return any(sample.begun for sample in self.samples)

    @property
    def queue_s(self) -> float:
        """Seconds that it waited, also between its passes."""
        return max(0.0, self.finished - self.submitted - self.compute_s)

    def count_death(self, *, crashed: bool) -> bool:
        """Count a death of the device, by itself or by somebody else; return True if there were too many."""
        self.crashes += crashed
        self.kills += not crashed
        return self.crashes >= _MAX_CRASHES if crashed else self.kills >= _MAX_KILLS

    def remaining(self, stage: int = 0) -> list[RemainingWork]:
        """Return the work that one image has still to go through from `stage` on, in order."""
        found = [RemainingWork(self.priority, lane_of(s.work), s.work, s.passes) for s in self.stages[stage:]]
        if not found:
            return found
        decode, last = Work(self.model, "decode"), found[-1]
        decoded = [entry for entry in found[:-1] if self.previews and entry.work.traits.whole]
        if last.work.kind != "decode":  # it comes with the last pass
            decoded.append(last)
        return found + [RemainingWork(self.priority, entry.lane, decode, 1) for entry in decoded]


@dataclass(eq=False)
class Sample:
    """One image of a job on its way through the stages of its plan."""

    job: Job
    index: int
    number: int
    rank: Rank
    stage: int = 0
    isolation_group: int = 0  # images of a pass that failed share batches with this group alone; 0 = any
    begun: bool = False  # the device holds something of it

    @property
    def at(self) -> Stage:
        return self.job.stages[self.stage]

    @property
    def last(self) -> bool:
        """True if it is done after this stage."""
        return self.stage == len(self.job.stages) - 1

    @property
    def remaining(self) -> list[RemainingWork]:
        """The work that it has still to go through."""
        return self.job.remaining(self.stage)


@dataclass(eq=False)
class TeacherBatch:
    """Images whose teacher segment began together and goes on in step, with one key–value cache."""

    number: int
    samples: list[Sample]
    bucket: int
    passes_left: int
    seconds: float = 0.0

    @property
    def rank(self) -> Rank:
        return min(s.rank for s in self.samples)


@dataclass(frozen=True, eq=False)
class Batch:
    """One forward pass over `samples`, or their decoding alone; those `decoding` become pictures.

    Its cost is that of `bucket` rows; only a GPU fills it up with idle ones.
    """

    work: Work
    samples: list[Sample]
    bucket: int
    teacher_batch: TeacherBatch | None = None
    ahead: bool = False  # it was formed while the one before it ran

    @property
    def goes_on(self) -> bool:
        """True if an image that somebody waits for is not done after this pass."""
        return any(not s.last and not s.job.over for s in self.samples)

    @property
    def new(self) -> list[Sample]:
        """The samples that the device may not know yet."""
        goes_on = (
            self.teacher_batch is not None and self.teacher_batch.passes_left < self.samples[0].at.passes
        )
        return [] if goes_on else [s for s in self.samples if s.stage == 0]

    @property
    def finishing(self) -> list[Sample]:
        return [s for s in self.samples if s.last]

    @property
    def previewing(self) -> list[Sample]:
        """The samples of which a picture is wanted though they go on."""
        return [s for s in self.samples if s.job.previews and s.at.work.traits.whole and not s.last]

    @property
    def decoding(self) -> list[Sample]:
        """The samples of which the pass makes a picture."""
        return [*self.finishing, *self.previewing]

    @property
    def jobs(self) -> list[Job]:
        """The jobs that take part, each once."""
        return list(dict.fromkeys(s.job for s in self.samples))
