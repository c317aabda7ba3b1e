"""The process that owns a device: it holds models and half-made images, and runs the passes it is told.

    Forward ─▶ gather rows → one advance of their `SegmentRun` → decode what is to be shown ─▶ Done

What runs next, and with what, is the scheduler's choice, in the server's process; how many idle rows fill a
batch up is decided here, by the kind of device. If this process dies, the server starts another and sends
again all but what this one died on too often: an image is a function of its request.
"""

from __future__ import annotations

import logging
import signal
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import torch
from torch import Tensor

from dd_core.bundle import Bundle, load_bundle
from dd_core.condition import ClassCondition, Condition
from dd_core.engine.arithmetic import choose
from dd_core.errors import BundleError, DDError
from dd_core.noise import batch_noise
from dd_core.plan import Plan
from dd_core.runtime import pick_device
from dd_core.sampling import SegmentRun, decode
from server.devices import messages
from server.observability import logs

log = logging.getLogger("dd_server.device")
_NO_MEMORY = "can't allocate memory"  # of a RuntimeError, on a CPU
_MEMORY_SECONDS = 1.0  # from one reading of a GPU's memory, which costs as much as a small pass, to the next


@dataclass
class _Image:
    plan: Plan
    cond: Condition  # one row
    noise_LC: Tensor
    uniform_L: Tensor
    x_LC: Tensor


@dataclass
class Device:
    """Models and images on one device."""

    device: torch.device
    options: messages.DeviceOptions
    bundles: dict[str, Bundle] = field(default_factory=dict)
    images: dict[int, _Image] = field(default_factory=dict)
    runs: dict[int, SegmentRun] = field(default_factory=dict)  # the teacher batches under way, by number
    _read: float = 0.0  # time of the last reading of its memory

    def load(self, command: messages.Load) -> Bundle:
        """Load a bundle, which is not kept yet.

        Raises:
            DDError: what is wrong with it.
        """
        arithmetic = choose(self.options.arithmetic, self.device, self.options.exact)
        bundle = load_bundle(command.folder, self.device, arithmetic)
        if bundle.text is not None:
            bundle.text.load()  # T5 may have to be fetched first: here nothing waits for it but this model
        bundle = replace(bundle, sampler=replace(bundle.sampler, exact=self.options.exact))
        return self.options.prepare(bundle) if self.options.prepare else bundle

    @torch.inference_mode()
    def forward(self, command: messages.Forward) -> messages.Done:
        """Run a forward pass, and decode the images that it finishes."""
        began = self._now()
        sampler = self.bundles[command.model].sampler
        text_seconds = self._add(command)
        started = began + text_seconds
        images = [self.images[number] for number in command.numbers]
        codes_BLC = self._advance(command, images) if command.kind != "decode" else None
        if codes_BLC is not None:
            for image, x_LC in zip(images, codes_BLC, strict=True):
                image.x_LC = x_LC
        computed = self._now()
        shown = (*command.finishing, *command.previewing)
        if not shown:
            return messages.Done(computed - started, 0.0, {}, text_seconds=text_seconds)
        pixels, good = decode(sampler, torch.stack([self.images[number].x_LC for number in shown]))
        found = zip(shown, pixels.cpu().numpy(), good.tolist(), strict=True)
        pictures = {number: picture for number, picture, fine in found if fine}
        broken = tuple(number for number in shown if number not in pictures)
        self.forget(command.finishing)
        return messages.Done(computed - started, self._now() - computed, pictures, broken, text_seconds)

    def _advance(self, command: messages.Forward, images: Sequence[_Image]) -> Tensor | None:
        """The images' codes after a forward pass, or None while their segment goes on."""
        number = command.teacher_batch
        run = self.runs.pop(number) if number in self.runs else self._begin(command, images)
        run.advance()
        if run.done:
            return run.codes()[: len(images)]  # without the idle rows
        assert number is not None, "only a teacher's segment takes several passes"
        self.runs[number] = run
        return None

    def _begin(self, command: messages.Forward, images: Sequence[_Image]) -> SegmentRun:
        # A GPU runs the shapes that it was warmed up with; a CPU gains nothing from idle rows.
        idle = command.bucket - len(images) if self.device.type == "cuda" else 0
        rows = [*images, *[images[-1]] * idle]
        segments = [*command.segments, *[command.segments[-1]] * idle]
        return SegmentRun.begin(
            self.bundles[command.model].sampler,
            [(image.plan, segment) for image, segment in zip(rows, segments, strict=True)],
            torch.stack([image.x_LC for image in rows]),
            rows[0].cond.joined(*(image.cond for image in rows[1:])),
            torch.stack([image.noise_LC for image in rows]),
            torch.stack([image.uniform_L for image in rows]),
        )

    def recover(self, command: messages.Forward) -> None:
        """After a pass that raised: its teacher batch is void, and its memory free again."""
        if command.teacher_batch is not None:
            self.runs.pop(command.teacher_batch, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _add(self, command: messages.Forward) -> float:
        """Noise and conditions of images that are new here; gives the seconds that their prompts took."""
        new = [image for image in command.new if image.number not in self.images]
        if not new:
            return 0.0
        sampler = self.bundles[command.model].sampler
        began = self._now()
        conds = [self._condition(self.bundles[command.model], image.condition) for image in new]
        text_seconds = self._now() - began if isinstance(new[0].condition, str) else 0.0
        keys = [image.key for image in new]
        noise, uniform = batch_noise(keys, sampler.layout, sampler.codebook_VC.shape[1])
        noise, uniform = noise.to(self.device), uniform.to(self.device)
        for row, image in enumerate(new):
            self.images[image.number] = _Image(image.plan, conds[row], noise[row], uniform[row], noise[row])
        return text_seconds

    def _condition(self, bundle: Bundle, condition: int | str) -> Condition:
        """One row: a class, or the states of a prompt (which its encoder remembers)."""
        if isinstance(condition, int):
            return ClassCondition(torch.tensor([condition], device=self.device))
        assert bundle.text is not None, "a model without an encoder is not served"
        return bundle.text.encode([condition])

    def forget(self, numbers: Sequence[int]) -> None:
        """Drop images and teacher batches; unknown ones are passed over."""
        for number in numbers:
            self.images.pop(number, None)
            self.runs.pop(number, None)

    def memory(self) -> dict[str, int]:
        """Bytes of a GPU: of tensors, of PyTorch's allocator, free and in all. Empty on a CPU, or where they
        were read within the last second.
        """
        now = time.perf_counter()
        if self.device.type != "cuda" or now - self._read < _MEMORY_SECONDS:
            return {}
        self._read = now
        free, total = torch.cuda.mem_get_info(self.device)
        allocated = torch.cuda.memory_allocated(self.device)
        reserved = torch.cuda.memory_reserved(self.device)
        return {"allocated": allocated, "reserved": reserved, "free": free, "total": total}

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


def main(connection: Connection, options: messages.DeviceOptions) -> None:
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
    finally:
        logging.shutdown()  # a process of multiprocessing does nothing of the kind at its end


def serve(connection: Connection, device: Device) -> None:
    """Do what comes, until the other end is closed.

    Raises:
        EOFError, ConnectionError: it was.
    """
    sending = threading.Lock()
    loading: dict[str, messages.Load] = {}  # of each model the last one, until it is unloaded
    keeping = threading.Lock()

    def answer(found: messages.Answer) -> None:
        with sending:
            connection.send(found)

    def load(command: messages.Load) -> None:
        bundle: Bundle | None = None
        error: DDError | None = None
        try:
            bundle = device.load(command)
        except DDError as found:
            error = found
        except Exception as found:
            log.exception("loading %s failed", command.model)
            error = BundleError(f"{command.model}: {type(found).__name__} while loading")
        with keeping:
            if loading.get(command.model) is not command:  # unloaded in the meantime, perhaps loaded again
                return
            if bundle is not None:
                device.bundles[command.model] = bundle
        answer(messages.Loaded(command, error))

    while True:
        command: messages.Command = connection.recv()
        if isinstance(command, messages.Forward):
            answer(_forward(device, command))
        elif isinstance(command, messages.Load):
            loading[command.model] = command
            threading.Thread(target=load, args=(command,), daemon=True).start()
        elif isinstance(command, messages.Unload):
            with keeping:
                loading.pop(command.model, None)
                device.bundles.pop(command.model, None)
        else:
            device.forget(command.numbers)


def _forward(device: Device, command: messages.Forward) -> messages.Answer:
    try:
        done = device.forward(command)
        used = device.memory()
        return replace(done, memory=used) if used else done
    except Exception as error:
        log.exception("a pass of %d images of %s failed", len(command.numbers), command.model)
        reason = error.message if isinstance(error, DDError) else type(error).__name__
        memory = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or _NO_MEMORY in str(error)
        failed = messages.Failed(memory, reason)
    # Outside of the handler, whose traceback holds on to the batch's tensors.
    device.recover(command)
    return failed
