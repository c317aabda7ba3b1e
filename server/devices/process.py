"""The process that owns a device: it holds models and half-made images, and runs the passes it is told.

    Forward ─▶ gather rows → one pass (student, teacher block, marginals) → decode what is finished ─▶ Done

It decides nothing: what runs next is the scheduler's choice, in the server's process. If this process
dies, the server starts another and sends everything again: an image is a function of its request.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from dd_core.bundle import Bundle, load_bundle
from dd_core.condition import Condition, stacked
from dd_core.errors import BundleError, DDError
from dd_core.noise import batch_noise
from dd_core.plan import Plan
from dd_core.runtime import pick_device
from dd_core.sampling import TeacherRun, decode, marginal_draw, student_pass
from server.generation.encoder import Pixels
from server.generation.origins import Origin
from server.observability import logs
from server.scheduling.costs import Kind

log = logging.getLogger("dd_server.device")
Prepare = Callable[[Bundle], Bundle]


@dataclass(frozen=True)
class DeviceOptions:
    """How the process computes.

    Args:
        device: auto, cpu, cuda or cuda:N.
        threads: of torch on a CPU; 0 = its choice.
        exact: an image has the same bytes in every batch (`dd_core.sampling.Sampler.exact`).
        prepare: applied to each bundle that is loaded; tests put their faults in here.
    """

    device: str
    threads: int = 0
    exact: bool = True
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    prepare: Prepare | None = None


@dataclass(frozen=True)
class Load:
    """Load the bundle in `folder`; answered by `Loaded` while passes go on."""

    model: str
    folder: Path


@dataclass(frozen=True)
class Unload:
    """Forget a model. Nothing is answered."""

    model: str


@dataclass(frozen=True)
class Drop:
    """Forget images and cohorts, by number. Nothing is answered."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class NewImage:
    """What an image follows from; `condition` is a class index, or a prompt."""

    number: int
    plan: Plan
    condition: int | str
    origin: Origin


@dataclass(frozen=True)
class Forward:
    """One forward pass, or the decoding alone; answered by `Done` or `Failed`.

    Args:
        numbers, segments: the images, and at which segment of its plan each is.
        new: those that the device does not know yet.
        teacher_batch: number of the teacher's cohort; an unknown one begins.
        bucket: rows of the batch.
        finishing: images to decode afterwards, and to forget.
        previewing: images of which a picture is wanted now, before they go on.
    """

    model: str
    kind: Kind
    numbers: tuple[int, ...]
    segments: tuple[int, ...]
    bucket: int
    new: tuple[NewImage, ...] = ()
    teacher_batch: int | None = None
    finishing: tuple[int, ...] = ()
    previewing: tuple[int, ...] = ()


@dataclass(frozen=True)
class Loaded:
    """A model is there, or `error` says why not."""

    model: str
    error: DDError | None = None


@dataclass(frozen=True)
class Done:
    """Seconds of the pass, of the decoding and of reading new prompts, the pictures `[H, W, 3]`, finished
    or in between, and the images in which something was not a number.
    """

    seconds: float
    decode_seconds: float
    pictures: dict[int, Pixels]
    broken: tuple[int, ...] = ()
    text_seconds: float = 0.0


@dataclass(frozen=True)
class Failed:
    """The pass raised; the images are as they were before it (those of a teacher batch: before it began)."""

    out_of_memory: bool
    reason: str


Command = Load | Unload | Drop | Forward
Answer = Loaded | Done | Failed


@dataclass
class _Image:
    told: NewImage
    cond: Condition  # one row
    noise_LC: Tensor
    uniform_L: Tensor
    x_LC: Tensor


@dataclass
class Device:
    """Models and images on one device."""

    device: torch.device
    options: DeviceOptions
    bundles: dict[str, Bundle] = field(default_factory=dict)
    images: dict[int, _Image] = field(default_factory=dict)
    teacher_batches: dict[int, TeacherRun] = field(default_factory=dict)

    def load(self, command: Load) -> None:
        """Load a bundle and keep it.

        Raises:
            DDError: what is wrong with it.
        """
        bundle = load_bundle(command.folder, self.device)
        if bundle.text is not None:
            bundle.text.load()  # T5 may have to be fetched first: here nothing waits for it but this model
        bundle = replace(bundle, sampler=replace(bundle.sampler, exact=self.options.exact))
        self.bundles[command.model] = self.options.prepare(bundle) if self.options.prepare else bundle

    @torch.inference_mode()
    def forward(self, command: Forward) -> Done:
        """Run a pass."""
        began = self._now()
        sampler = self.bundles[command.model].sampler
        text_seconds = self._begin(command)
        started = began + text_seconds
        images = [self.images[number] for number in command.numbers]
        made = self._pass(command, images) if command.kind != "decode" else None
        if made is not None:
            for image, x_LC in zip(images, made[: len(images)], strict=True):  # without the idle rows
                image.x_LC = x_LC
        computed = self._now()
        shown = (*command.finishing, *command.previewing)
        if not shown:
            return Done(computed - started, 0.0, {}, text_seconds=text_seconds)
        codes_BLC = torch.stack([self.images[number].x_LC for number in shown])
        pixels, good = decode(sampler, codes_BLC)
        found = zip(shown, pixels.cpu().numpy(), good.tolist(), strict=True)
        pictures = {number: picture for number, picture, fine in found if fine}
        broken = tuple(number for number in shown if number not in pictures)
        self.forget(command.finishing)
        return Done(computed - started, self._now() - computed, pictures, broken, text_seconds)

    def _pass(self, command: Forward, images: Sequence[_Image]) -> Tensor | None:
        """The images' codes after the pass, or None while a teacher batch is under way."""
        sampler = self.bundles[command.model].sampler
        # A GPU runs the shapes that it was warmed up with; a CPU gains nothing from idle rows.
        idle = command.bucket - len(images) if self.device.type == "cuda" else 0
        rows = [*images, *[images[-1]] * idle]
        if command.teacher_batch is not None and command.teacher_batch in self.teacher_batches:
            run = self.teacher_batches[command.teacher_batch]
        else:
            cond = stacked([image.cond for image in rows])
            noise_BLC, uniform_BL = (
                torch.stack([getattr(image, name) for image in rows]) for name in ("noise_LC", "uniform_L")
            )
            x_BLC = torch.stack([image.x_LC for image in rows])
            plan = rows[0].told.plan
            segment = plan.segments[command.segments[0]]
            if command.kind == "student":
                plans = [image.told.plan for image in rows]
                segments = [*command.segments, *[command.segments[-1]] * idle]
                starts = [p.segments[s].start for p, s in zip(plans, segments, strict=True)]
                splits = [p.first_continuous for p in plans]
                step_B, split_B = torch.tensor([starts, splits], device=self.device)
                return student_pass(sampler, x_BLC, cond, noise_BLC, step_B, split_B)
            if command.kind == "marginal":
                return marginal_draw(sampler, x_BLC, cond, uniform_BL, segment.start, segment.stop)
            assert command.teacher_batch is not None
            run = TeacherRun.begin(sampler, plan.draw, x_BLC, cond, noise_BLC, uniform_BL, segment.start)
            self.teacher_batches[command.teacher_batch] = run
        run.advance()
        if run.step < images[0].told.plan.segments[command.segments[0]].stop:
            return None
        del self.teacher_batches[command.teacher_batch]
        return run.codes(torch.stack([image.noise_LC for image in rows]))

    def recover(self, command: Forward) -> None:
        """After a pass that raised: its teacher batch is void, and its memory free again."""
        if command.teacher_batch is not None:
            self.teacher_batches.pop(command.teacher_batch, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _begin(self, command: Forward) -> float:
        """Noise and conditions of images that are new here; the seconds that their prompts took."""
        new = [image for image in command.new if image.number not in self.images]
        if not new:
            return 0.0
        sampler = self.bundles[command.model].sampler
        began = self._now()
        conds = [self._condition(self.bundles[command.model], image.condition) for image in new]
        text_seconds = self._now() - began if isinstance(new[0].condition, str) else 0.0
        keys = [image.origin.key(sampler.layout) for image in new]
        noise, uniform = batch_noise(keys, sampler.layout.num_tokens, sampler.codebook_VC.shape[1])
        noise, uniform = noise.to(self.device), uniform.to(self.device)
        for row, image in enumerate(new):
            self.images[image.number] = _Image(image, conds[row], noise[row], uniform[row], noise[row])
        return text_seconds

    def _condition(self, bundle: Bundle, condition: int | str) -> Condition:
        """One row: a class, or the states of a prompt (which its encoder remembers)."""
        if isinstance(condition, int):
            return torch.tensor([condition], device=self.device)
        assert bundle.text is not None, "a model without an encoder is not served"
        return bundle.text.encode([condition])

    def forget(self, numbers: Sequence[int]) -> None:
        """Drop images and cohorts; unknown ones are passed over."""
        for number in numbers:
            self.images.pop(number, None)
            self.teacher_batches.pop(number, None)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def _out_of_memory(error: Exception) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def main(connection: Connection, options: DeviceOptions) -> None:
    """The process: commands in, answers out, until the other end is closed."""
    # A signal to the whole group is the server's to act on: it drains, and then closes the connection.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logs.configure(options.log_level, options.log_format)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = Device(pick_device(options.device), options)
    try:
        serve(connection, device)
    except (EOFError, ConnectionError):  # the server is gone, or wants us to go
        log.debug("the connection is closed")


def serve(connection: Connection, device: Device) -> None:
    """Do what comes, until the other end is closed.

    Raises:
        EOFError, ConnectionError: it was.
    """
    sending = threading.Lock()

    def answer(found: Answer) -> None:
        with sending:
            connection.send(found)

    def load(command: Load) -> None:
        error: DDError | None = None
        try:
            device.load(command)
        except DDError as found:
            error = found
        except Exception as found:
            log.exception("loading %s failed", command.model)
            error = BundleError(f"{command.model}: {type(found).__name__} while loading")
        answer(Loaded(command.model, error))

    while True:
        command: Command = connection.recv()
        if isinstance(command, Forward):
            answer(_forward(device, command))
        elif isinstance(command, Load):
            threading.Thread(target=load, args=(command,), daemon=True).start()
        elif isinstance(command, Unload):
            device.bundles.pop(command.model, None)
        else:
            device.forget(command.numbers)


def _forward(device: Device, command: Forward) -> Answer:
    try:
        return device.forward(command)
    except Exception as error:
        log.exception("a pass of %d images of %s failed", len(command.numbers), command.model)
        reason = error.message if isinstance(error, DDError) else type(error).__name__
        failed = Failed(_out_of_memory(error), reason)
    # Outside of the handler, whose traceback holds on to the batch's tensors.
    device.recover(command)
    return failed
