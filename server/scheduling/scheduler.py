"""The scheduler: admits jobs and forms the next pass for them. Pure logic, without torch, threads or clocks.

    admit(job) → its images wait at their stage → next_batch() → Batch → finish(batch) → job complete

Images at the same stage of work share a pass, whatever request they belong to: a student takes any
mix of segments and plans; a teacher takes a *teacher batch*, which starts together and goes on in step.
Passes of teacher batches are interleaved with everything else, so nothing waits for a whole teacher.

Order: the highest priority that waits; within it, *light* work (students, marginals) and *heavy* work
(teachers, and the decoding after them) by their share of the device; within those, what is due
first. An image is due after a multiple of the time that its plan takes alone, so short plans go ahead of long
ones and none starves. Times are seconds on whatever monotonic clock the caller reads.
"""

from __future__ import annotations

import itertools
from bisect import insort
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Literal, NamedTuple

from server.scheduling.backlog import Backlog, Forecast
from server.scheduling.costs import CostTable, Lane, RemainingWork, Work, lane_of
from server.scheduling.deadlines import Deadlines
from server.scheduling.jobs import Batch, Job, Rank, Sample, TeacherBatch
from server.scheduling.pace import Pace

# Device time that each lane gets while both have work.
SHARES: dict[Lane, float] = {"light": 0.75, "heavy": 0.25}
_OTHER: dict[Lane, Lane] = {"light": "heavy", "heavy": "light"}
# An image is due after so many times the time that it takes alone.
_PATIENCE = 4.0
# A promise to be in time leaves room for the wait to be longer than forecast by this part of it. It costs
# nothing where much waits, since then the device is busy anyway.
_SAFETY_MARGIN = 0.5


class Refusal(NamedTuple):
    """The reason that a job was not admitted: no room, or its deadline. Seconds from now: until there is
    room, or until it would have started, and until it would surely have been done.
    """

    reason: Literal["full", "deadline"]
    start: float
    finish: float


class _Group(NamedTuple):
    """Images that one pass may take together. `stage` is −1 where any stages may mix."""

    work: Work
    stage: int
    isolation_group: int


# By lane with work that can run, what of it is due first.
Heads = dict[Lane, tuple[Rank, _Group | TeacherBatch]]


@dataclass(eq=False)
class Scheduler:
    """The queue. Not thread-safe: its owner calls it from one thread."""

    costs: CostTable  # measured seconds of passes; `finish` adds to them
    queue_size: int  # most images that wait for their next pass
    max_teacher_batches: int = 2  # under way

    def __post_init__(self) -> None:
        self.backlog = Backlog(self.costs, SHARES["light"])
        self.dropped: list[int] = []  # numbers of images and teacher batches that the device may forget
        self._jobs: dict[Job, None] = {}  # an ordered set: order of arrival
        self._ready: dict[_Group, list[Sample]] = {}  # each in order of rank
        self._teacher_batches: list[TeacherBatch] = []
        self._running: list[Batch] = []  # in the order in which they run
        self._used: dict[Lane, float] = {"light": 0.0, "heavy": 0.0}
        self._deadlines: Deadlines[Job] = Deadlines()
        self.pace = Pace(self.costs)
        self._images = 0
        self._numbers = itertools.count(1)

    @property
    def jobs(self) -> list[Job]:
        """Jobs that are not over, in order of arrival."""
        return list(self._jobs)

    @property
    def depth(self) -> int:
        """Images that wait: all but those of passes that the device has."""
        return self._images - sum(len(_live(batch.samples)) for batch in self._running)

    def admit(self, job: Job, now: float, busy: float = 0.0) -> Refusal | None:
        """Take a job, or refuse it at once.

        Args:
            busy: seconds that the running pass still takes.
        """
        excess = self.depth + job.count - self.queue_size
        if excess > 0:
            wait = self.pace.slowdown * self.backlog.seconds() * min(1.0, excess / max(1, self._images))
            return Refusal("full", busy + wait, busy + wait)
        if job.deadline is not None:
            start, finish, _ = self.forecast(job, busy)
            finish += _SAFETY_MARGIN * start
            if now + finish > job.deadline:
                return Refusal("deadline", start, finish)
            self._deadlines.check_at(job, job.deadline - self._shortest(job))
        due = self._due(job, now)
        for index in range(job.count):
            number = next(self._numbers)
            job.samples.append(Sample(job, index, number, (-job.priority, due, number)))
        self._jobs[job] = None
        self._images += job.count
        self.backlog.add(_remaining(job.samples))
        self._queue(job.samples)
        return None

    def forecast(self, job: Job, busy: float = 0.0) -> Forecast:
        """Seconds until a job would start and be done, were it admitted now; `busy` as for `admit`."""
        start, finish, alone = (
            self.pace.slowdown * seconds for seconds in self.backlog.forecast(job.remaining(), job.count)
        )
        return Forecast(busy + start, busy + finish, alone)

    def ahead(self, busy: float = 0.0) -> float:
        """Return the seconds until all that waits is done; `busy` as for `admit`."""
        return busy + self.pace.slowdown * self.backlog.seconds()

    def next_batch(self) -> Batch | None:
        """Form the next pass; None when nothing waits.

        It may be formed while others run, which end before it. Where images of these go on, it is not: they
        may have a better claim to it, or a place in it, than what is left.
        """
        if any(batch.goes_on for batch in self._running):
            return None
        heads = {lane: head for lane in _OTHER if (head := self._head(lane)) is not None}
        if not heads:
            return None
        batch = self._form(heads[self._choose(heads)])
        self._running.append(batch)
        return batch

    def expected(self, batch: Batch) -> float:
        """Return the expected seconds of a pass, with its prompts and its decoding."""
        passing = 0.0 if batch.work.kind == "decode" else self.costs.seconds(batch.work, batch.bucket)
        if self.pace.prompt_s:
            passing += self.pace.prompt_s * sum(isinstance(s.job.condition, str) for s in batch.new)
        if not batch.decoding:
            return passing
        decode = Work(batch.work.model, "decode")
        return passing + self.costs.seconds(decode, self.costs.bucket_for(len(batch.decoding)))

    def finish(
        self, done: Batch, seconds: float, decode_seconds: float, now: float, text_seconds: float = 0.0
    ) -> list[Job]:
        """Record a pass that was run; return the jobs that are complete now.

        Args:
            seconds, decode_seconds: time of the pass, and of decoding pictures after it.
            text_seconds: time of encoding new prompts before it.
        """
        self._end_of(done)
        # Before its images move on.
        work, passes, decoding = done.work, done.samples[0].at.passes, len(done.decoding)
        if text_seconds and done.new:
            self.pace.encoded(len(done.new), text_seconds)
        decode = Work(work.model, "decode")
        complete = self._account(done, seconds, decode_seconds, now)
        expected = 0.0
        if self.pace.busy and done.teacher_batch is None and work.kind != "decode":
            expected = self.costs.total(work, len(done.samples)) + self.costs.total(decode, decoding)
        passing = seconds + decode_seconds
        self.pace.ended(
            now,
            more=bool(self._images),
            ahead=done.ahead,
            passing=passing,
            text=text_seconds,
            expected=expected,
        )
        # Last, since a new cost changes the worth of all that waits.
        if decoding:
            self.costs.observe(decode, self.costs.bucket_for(decoding), decode_seconds)
        if work.kind != "decode" and not work.traits.stepwise:
            self.costs.observe(work, done.bucket, seconds)
        if done.teacher_batch is not None and not done.teacher_batch.passes_left:
            # Blocks of a plan may differ in size: what counts is their mean.
            self.costs.observe(work, done.bucket, done.teacher_batch.seconds / passes)
        return complete

    def _end_of(self, batch: Batch) -> None:
        first = self._running.pop(0)
        assert first is batch, "passes end in the order in which they were formed"

    def _account(self, done: Batch, seconds: float, decode_seconds: float, now: float) -> list[Job]:
        moving, teacher_batch = _live(done.samples), done.teacher_batch
        lane = lane_of(done.work)
        self._used[lane] += (seconds + decode_seconds) / SHARES[lane]
        for job in done.jobs:
            job.compute_s += seconds + decode_seconds
        if teacher_batch is not None:
            teacher_batch.passes_left -= 1
            teacher_batch.seconds += seconds
            if not moving or not teacher_batch.passes_left:
                self._drop(teacher_batch)
            if moving and teacher_batch.passes_left:
                self._teacher_batches.append(teacher_batch)
                return []
        return [sample.job for sample in moving if self._advance(sample, now)]

    def split(self, failed: Batch, *, out_of_memory: bool) -> Job | None:
        """Queue the halves of a pass that failed, to be tried apart; of one image, return the guilty job."""
        self._end_of(failed)
        self.pace.interrupted()
        if out_of_memory and failed.bucket > 1:
            self.costs.limit(failed.work, failed.bucket // 2)
        moving = _live(failed.samples)
        self.dropped.extend(s.number for s in failed.samples if s.job.over)
        if len(failed.samples) == 1:
            return moving[0].job if moving else None
        middle = (len(moving) + 1) // 2
        for half in (moving[:middle], moving[middle:]):
            self._queue(half, isolation_group=next(self._numbers))
        return None

    def restart(self, *, crashed: bool) -> Job | None:
        """Begin all images again after the device died and lost everything, those that it was at work on
        one by one. Returns the job to give up, if it was at work on that one alone and died too often.

        Args:
            crashed: it died of itself; otherwise somebody else ended it, which says nothing of its work.
        """
        suspects = _live(self._running[0].samples) if self._running else []
        hopeless = [job for job in dict.fromkeys(s.job for s in suspects) if job.count_death(crashed=crashed)]
        self._running.clear()
        self.pace.interrupted()
        self._ready.clear()
        self._teacher_batches.clear()
        self.dropped.clear()
        for job in self._jobs:
            left = job.unfinished
            self.backlog.remove(_remaining(left))
            for sample in left:
                sample.stage, sample.begun = 0, False
            self.backlog.add(_remaining(left))
            for sample in left:
                self._queue(
                    [sample],
                    isolation_group=next(self._numbers) if sample in suspects else sample.isolation_group,
                )
        return hopeless[0] if len(suspects) == 1 and hopeless else None

    def end(self, job: Job) -> None:
        """Forget a job whose client has left, that failed or whose time is over: images of it that have
        not started never will.
        """
        if job.over:
            return
        left = self._forget(job)
        self._images -= len(left)
        self.backlog.remove(_remaining(left))
        # A teacher batch goes on in step: the device needs all its images until it ends.
        bound = {s.number for teacher_batch in self._under_way for s in teacher_batch.samples}
        self.dropped.extend(s.number for s in left if s.begun and s.number not in bound)
        for group, queue in list(self._ready.items()):
            if kept := _live(queue):
                self._ready[group] = kept
            else:
                del self._ready[group]
        for teacher_batch in self._teacher_batches:
            if not _live(teacher_batch.samples):
                self._drop(teacher_batch)
        self._teacher_batches = [t for t in self._teacher_batches if _live(t.samples)]

    def expired(self, now: float) -> list[Job]:
        """Return the jobs to give up, each once (see `Deadlines`)."""
        return self._deadlines.expired(now)

    @property
    def next_deadline(self) -> float | None:
        """Time of the next call of `expired`, or None."""
        return self._deadlines.next

    @property
    def _under_way(self) -> list[TeacherBatch]:
        running = [batch.teacher_batch for batch in self._running if batch.teacher_batch is not None]
        return [*self._teacher_batches, *running]

    def _drop(self, teacher_batch: TeacherBatch) -> None:
        """Let the device forget a teacher batch that has ended, and the images that nobody waits for."""
        self.dropped.append(teacher_batch.number)
        self.dropped.extend(s.number for s in teacher_batch.samples if s.job.over)

    def _due(self, job: Job, now: float) -> float:
        """Return the time by which a job that arrives now should be done, to which the order is kept."""
        due = now + _PATIENCE * sum(s.passes * self.costs.seconds(s.work, 1) for s in job.stages)
        return due if job.deadline is None else min(due, job.deadline)

    def _shortest(self, job: Job) -> float:
        """Return the seconds that a job takes once it begins, in batches of what waits."""
        decode, count = Work(job.model, "decode"), self._images + job.count
        parts = [(s.work, s.passes) for s in job.stages if s.work != decode] + [(decode, 1)]
        return sum(n * self.costs.seconds(w, self.costs.best(w, count)) for w, n in parts)

    def _forget(self, job: Job) -> list[Sample]:
        job.over = True
        del self._jobs[job]
        return job.unfinished

    def _advance(self, sample: Sample, now: float) -> bool:
        """Move an image on to its next stage; return True if its job is complete."""
        job = sample.job
        self.backlog.remove(sample.remaining)
        sample.stage += 1
        self.backlog.add(sample.remaining)
        if sample.stage < len(job.stages):
            self._queue([sample])
            return False
        self._images -= 1
        if job.unfinished:
            return False
        job.finished = now
        self._forget(job)
        return True

    def _queue(self, samples: Iterable[Sample], isolation_group: int | None = None) -> None:
        for sample in samples:
            sample.isolation_group = sample.isolation_group if isolation_group is None else isolation_group
            work = sample.at.work
            group = _Group(work, -1 if work.traits.whole else sample.stage, sample.isolation_group)
            insort(self._ready.setdefault(group, []), sample, key=attrgetter("rank"))

    def _head(self, lane: Lane) -> tuple[Rank, _Group | TeacherBatch] | None:
        """Return the group or teacher batch of a lane that is due first and can run, with its rank."""
        full = len(self._under_way) >= self.max_teacher_batches
        found: list[tuple[Rank, _Group | TeacherBatch]] = [
            (queue[0].rank, group)
            for group, queue in self._ready.items()
            if lane_of(group.work) == lane and not (full and group.work.traits.stepwise)
        ]
        if lane == "heavy":
            teachers = [queue for group, queue in self._ready.items() if group.work.traits.stepwise]
            blocked = [queue[0].rank[0] for queue in teachers if full]
            # Priority inheritance: teacher batches that others wait for are as urgent as these, or they would
            # wait for ever.
            for teacher_batch in self._teacher_batches:
                urgency, due, number = teacher_batch.rank
                found.append(((min([urgency, *blocked]), due, number), teacher_batch))
        return min(found, key=lambda entry: entry[0], default=None)

    def _choose(self, heads: Heads) -> Lane:
        """Return the lane that runs next, of those that have work."""
        if len(heads) == 1:
            [lane] = heads
            other = _OTHER[lane]
            if all(lane_of(batch.work) == lane for batch in self._running):
                # Time that a lane did not want is not saved up for later.
                self._used[other] = max(self._used[other], self._used[lane])
            return lane
        urgent = min(rank[0] for rank, _ in heads.values())
        used = dict(self._used)
        for batch in self._running:
            used[lane_of(batch.work)] += self.expected(batch) / SHARES[lane_of(batch.work)]
        return min((lane for lane in heads if heads[lane][0][0] == urgent), key=lambda lane: used[lane])

    def _form(self, head: tuple[Rank, _Group | TeacherBatch]) -> Batch:
        chosen = head[1]
        if isinstance(chosen, TeacherBatch):
            self._teacher_batches.remove(chosen)
            return Batch(chosen.samples[0].at.work, chosen.samples, chosen.bucket, chosen)
        queue = self._ready.pop(chosen)
        last = chosen.work.kind != "decode" and all(s.last for s in queue)
        bucket = self.costs.best(chosen.work, len(queue), Work(chosen.work.model, "decode") if last else None)
        samples, rest = queue[:bucket], queue[bucket:]
        if rest:
            self._ready[chosen] = rest
        for sample in samples:
            sample.begun = True
        teacher_batch = None
        if chosen.work.traits.stepwise:
            teacher_batch = TeacherBatch(next(self._numbers), samples, bucket, samples[0].at.passes)
        return Batch(chosen.work, samples, bucket, teacher_batch, ahead=bool(self._running))


def _remaining(samples: Iterable[Sample]) -> Iterator[RemainingWork]:
    return itertools.chain.from_iterable(sample.remaining for sample in samples)


def _live(samples: Iterable[Sample]) -> list[Sample]:
    return [s for s in samples if not s.job.over]
