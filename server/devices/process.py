"""The process that owns a device: it holds models and half-made images, and runs the passes it is told.

    Forward ─▶ a `Runner` takes new images in → advances those of the pass → decodes what is shown ─▶ Done

What runs next, and with what, is the scheduler's choice, in the server's process; which runner runs it is
decided here, by the kind of device. If this process dies, the server starts another and sends
again all but what this one died on too often: an image is a function of its request.
"""

from __future__ import annotations

import logging
import os
import platform
import queue
import signal
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection

import torch

from dd_core.bundle import Bundle, load_bundle
from dd_core.condition import ClassCondition, Condition
from dd_core.engine.arithmetic import choose
from dd_core.engine.clock import Mark, mark, seconds_between, wait_for
from dd_core.engine.cuda import CudaGraphs, is_lost, settle
from dd_core.engine.graphs import GraphRunner
from dd_core.engine.runner import EagerRunner, Runner
from dd_core.errors import BundleError, DDError
from dd_core.runtime import pick_device
from server.devices import messages
from server.devices.pixels import PixelBuffer
from server.observability import logs

log = logging.getLogger("dd_server.device")
# Images that a GPU holds before its graphs have to be recorded anew for more.
_GPU_SLOTS = 512
_NO_MEMORY = "can't allocate memory"  # of a RuntimeError, on a CPU
_MEMORY_SECONDS = 1.0  # from one reading of a GPU's memory, which costs as much as a small pass, to the next


@dataclass
class Device:
    """Models and images on one device."""

    device: torch.device
    options: messages.DeviceOptions
    bundles: dict[str, Bundle] = field(default_factory=dict)
    runners: dict[str, Runner] = field(default_factory=dict)  # of each model
    # Held while a model is loaded, and while a graph is recorded: the first may not disturb the second.
    loading: threading.Lock = field(default_factory=threading.Lock)
    _read: float = 0.0  # time of the last reading of its memory

    def load(self, command: messages.Load) -> Bundle:
        """Load a bundle, which is not kept yet.

        Raises:
            DDError: what is wrong with it.
        """
        settle(self.device)
        arithmetic = choose(self.options.arithmetic, self.device, self.options.exact)
        guard: AbstractContextManager[object] = self.loading if self.device.type == "cuda" else nullcontext()
        with guard:
            bundle = load_bundle(command.folder, self.device, arithmetic)
            if bundle.text is not None:
                bundle.text.load()  # T5 may have to be fetched first: here no pass waits for it
        bundle = replace(bundle, sampler=replace(bundle.sampler, exact=self.options.exact))
        return self.options.prepare(bundle) if self.options.prepare else bundle

    def keep(self, model: str, bundle: Bundle, runner: Runner) -> None:
        """Run passes of a model from now on."""
        self.bundles[model], self.runners[model] = bundle, runner

    def unload(self, model: str) -> None:
        """Forget a model; an unknown one is passed over."""
        self.bundles.pop(model, None)
        self.runners.pop(model, None)

    @property
    def hardware(self) -> str:
        """The kind of device: bytes are the same on all of one kind."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return platform.machine()

    @property
    def held(self) -> set[int]:
        """Numbers of images and teacher batches that are here."""
        return set().union(*(runner.held for runner in list(self.runners.values())))

    def runner_of(self, bundle: Bundle) -> Runner:
        """A runner of a bundle's passes, which holds no images yet."""
        if self.device.type != "cuda":
            return EagerRunner(bundle.sampler)
        return GraphRunner(bundle.sampler, CudaGraphs(self.device, self.loading), _GPU_SLOTS)

    def forward(self, command: messages.Forward) -> messages.Done:
        """Run a forward pass, and decode the images that it finishes."""
        began, runner = mark(self.device), self.runners[command.model]
        encoded = self._add(command, runner) or began
        if command.kind != "decode":
            runner.advance(command.numbers, command.segments, command.bucket, command.teacher_batch)
        computed = mark(self.device)
        shown, pictures = (*command.finishing, *command.previewing), {}
        if shown:
            pixels, good = runner.decode(shown)
            found = zip(shown, pixels.numpy(), good.tolist(), strict=True)
            pictures = {number: picture for number, picture, fine in found if fine}
        broken = tuple(number for number in shown if number not in pictures)
        runner.drop(command.finishing)
        ended = mark(self.device)
        wait_for(self.device)
        seconds, text_seconds = seconds_between(encoded, computed), seconds_between(began, encoded)
        decode_seconds = seconds_between(computed, ended) if shown else 0.0
        return messages.Done(seconds, decode_seconds, pictures, broken, text_seconds)

    def recover(self, command: messages.Forward) -> None:
        """After a pass that raised: its teacher batch is void, and its memory free again."""
        runner = self.runners.get(command.model)
        if runner is not None:
            runner.recover(command.teacher_batch)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _add(self, command: messages.Forward, runner: Runner) -> Mark | None:
        """Take in images that are new here; return the time at which their prompts, if any, were read."""
        held = runner.held if command.new else ()
        new = [image for image in command.new if image.number not in held]
        if not new:
            return None
        bundle, encoded = self.bundles[command.model], None
        conditions = [image.condition for image in new]
        cond: Condition
        if isinstance(conditions[0], int):
            cond = ClassCondition(torch.tensor(conditions, device=self.device))
        else:
            assert bundle.text is not None, "a model without an encoder is not served"
            # One by one: each row as it would be alone.
            rows = [bundle.text.encode([str(prompt)]) for prompt in conditions]
            cond = rows[0].joined(*rows[1:])
            encoded = mark(self.device)
        runner.put([i.number for i in new], [i.plan for i in new], cond, [i.key for i in new])
        return encoded

    def foresee(self, command: messages.Foresee) -> None:
        """Begin what can be begun of images that will come; any thread may say so."""
        runner = self.runners.get(command.model)
        if runner is not None:
            runner.foresee(command.keys)

    def forget(self, numbers: Sequence[int]) -> None:
        """Drop images and teacher batches; unknown ones are passed over."""
        for runner in list(self.runners.values()):  # a thread that has loaded a model may add its own
            runner.drop(numbers)

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


def main(connection: Connection, options: messages.DeviceOptions, pixels: PixelBuffer | None = None) -> None:
    """The process: commands in, answers out, until the other end is closed.

    Args:
        pixels: the way of pictures; None = the connection.
    """
    # A signal to the whole group is the server's to act on: it drains, and then closes the connection.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    logs.configure(options.log_level, options.log_format)
    if options.threads:
        torch.set_num_threads(options.threads)
    device = Device(pick_device(options.device), options)
    settle(device.device)
    try:
        serve(connection, device, pixels)
    except (EOFError, ConnectionError):  # the server is gone, or wants us to go
        log.debug("the connection is closed")
    finally:
        logging.shutdown()  # a process of multiprocessing does nothing of the kind at its end


def serve(connection: Connection, device: Device, pixels: PixelBuffer | None = None) -> None:
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
        made: tuple[Bundle, Runner] | None = None
        error: DDError | None = None
        try:
            bundle = device.load(command)
            made = bundle, device.runner_of(bundle)
        except DDError as found:
            error = found
        except Exception as found:
            log.exception("loading %s failed", command.model)
            _end_if_lost(device)
            error = BundleError(f"{command.model}: {type(found).__name__} while loading")
        with keeping:
            if loading.get(command.model) is not command:  # unloaded in the meantime, perhaps loaded again
                return
            if made is not None:
                device.keep(command.model, *made)
        answer(messages.Loaded(command, error, device.hardware))

    receive = _received_meanwhile(connection, device) if device.device.type == "cuda" else connection.recv
    while True:
        command: messages.Command = receive()
        if isinstance(command, messages.Forward):
            answer(_placed(_forward(device, command), pixels))
        elif isinstance(command, messages.Load):
            loading[command.model] = command
            threading.Thread(target=load, args=(command,), daemon=True).start()
        elif isinstance(command, messages.Unload):
            with keeping:
                loading.pop(command.model, None)
                device.unload(command.model)
        elif isinstance(command, messages.Foresee):
            device.foresee(command)
        else:
            device.forget(command.numbers)


def _received_meanwhile(connection: Connection, device: Device) -> Callable[[], messages.Command]:
    """In place of `recv`: a thread receives while passes run, and has noise made of images to come."""
    inbox: queue.SimpleQueue[messages.Command | None] = queue.SimpleQueue()

    def receive() -> None:
        with suppress(EOFError, ConnectionError):
            while True:
                command = connection.recv()
                if isinstance(command, messages.Foresee):
                    device.foresee(command)
                else:
                    inbox.put(command)
        inbox.put(None)

    def take() -> messages.Command:
        command = inbox.get()
        if command is None:
            raise EOFError
        return command

    threading.Thread(target=receive, name="dd-receive", daemon=True).start()
    return take


def _forward(device: Device, command: messages.Forward) -> messages.Done | messages.Failed:
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
    _end_if_lost(device)
    device.recover(command)
    return failed


def _placed(answer: messages.Done | messages.Failed, pixels: PixelBuffer | None) -> messages.Answer:
    """The answer to a pass, with its pictures in the buffer where there is one and they fit."""
    if pixels is None or isinstance(answer, messages.Failed):
        return answer
    placed = pixels.put(answer.pictures)
    return answer if placed is None else replace(answer, pictures={}, placed=placed)


def _end_if_lost(device: Device) -> None:
    """End the process where its device has an error that stays; the server starts another."""
    if is_lost(device.device):
        log.critical(
            "%s has an error that stays: the process ends, and another takes its place", device.device
        )
        logging.shutdown()
        os._exit(1)  # nothing of CUDA can be ended in order any more
