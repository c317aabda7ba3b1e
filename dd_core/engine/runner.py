"""Half-made images of one model, in arrays on its device, and the passes over them.

    put ─▶ slots ─ advance: gather ─▶ one advance of a `SegmentRun` ─▶ scatter ─▶ slots ─ decode ─▶ pixels

Shapes: N slots, B images of a pass, L tokens, C code dimension, H W pixels.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from dd_core.condition import Condition
from dd_core.noise import Key, batch_noise
from dd_core.plan import Plan
from dd_core.sampling import Sampler, SegmentRun, decode

# Of the row of no image: idle rows of a pass read and write it.
NOBODY = 0
_FIRST_SLOTS = 16


class Runner(Protocol):
    """Runs passes over images that it holds, by number."""

    @property
    def held(self) -> set[int]:
        """Numbers of images and of teacher batches under way."""
        ...

    def foresee(self, keys: Sequence[Key]) -> None:
        """Images with this noise will come; any thread may say so."""
        ...

    def put(
        self, numbers: Sequence[int], plans: Sequence[Plan], cond: Condition, keys: Sequence[Key]
    ) -> None:
        """Take new images in, a row of `cond` each."""
        ...

    def advance(
        self, numbers: Sequence[int], segments: Sequence[int], bucket: int, batch: int | None
    ) -> None:
        """One forward pass of images that are at these segments of their plans.

        Args:
            bucket: rows of the pass, idle ones included, where a device runs few shapes.
            batch: number of the teacher's batch; an unknown one begins.
        """
        ...

    def decode(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Images as they are now, `[B, H, W, 3]` uint8, and a mask `[B]` of those that are pictures; on the
        CPU.
        """
        ...

    def drop(self, numbers: Sequence[int]) -> None:
        """Forget images and teacher batches; unknown ones are passed over."""
        ...

    def recover(self, batch: int | None) -> None:
        """After a pass that raised: its teacher batch is void, and memory that can be had again is freed."""
        ...


class Slots:
    """Noise, state and condition of images, a row each; a row keeps its place until it is dropped.

    Args:
        capacity: rows at first. More images than rows double them, in new arrays (`grown` counts that).
    """

    def __init__(self, sampler: Sampler, capacity: int = _FIRST_SLOTS) -> None:
        shape, device = (sampler.layout.num_tokens, sampler.codebook_VC.shape[1]), sampler.device
        self.noise_NLC = torch.zeros(capacity, *shape, device=device)
        self.x_NLC = torch.zeros_like(self.noise_NLC)
        self.uniform_NL = self.noise_NLC.new_zeros(capacity, shape[0])
        self.cond: Condition | None = None  # of the kind of the first image
        self.grown = 0
        self._row: dict[int, int] = {}
        self._free = list(range(capacity - 1, NOBODY, -1))

    @property
    def numbers(self) -> set[int]:
        """The images that are here."""
        return set(self._row)

    def put(self, numbers: Sequence[int], cond: Condition, noise_BLC: Tensor, uniform_BL: Tensor) -> None:
        """Take images in; they begin as their noise."""
        if self.cond is None:
            self.cond = cond.blank(len(self.x_NLC))
        while len(self._free) < len(numbers):
            self._grow()
        for number in numbers:
            self._row[number] = self._free.pop()
        index_B = self.index(numbers)
        noise_BLC, uniform_BL = (moved(t, self.x_NLC.device) for t in (noise_BLC, uniform_BL))
        self.noise_NLC.index_copy_(0, index_B, noise_BLC)
        self.x_NLC.index_copy_(0, index_B, noise_BLC)
        self.uniform_NL.index_copy_(0, index_B, uniform_BL)
        self.cond.write(cond, index_B)

    def drop(self, numbers: Sequence[int]) -> None:
        """Free the rows of images; unknown ones are passed over."""
        self._free += [self._row.pop(number) for number in numbers if number in self._row]

    def row(self, number: int) -> int:
        """The row of an image."""
        return self._row[number]

    def index(self, numbers: Sequence[int], idle: int = 0) -> Tensor:
        """Rows of images, and as many idle ones after them, `[B]` on the device."""
        rows = [*(self._row[number] for number in numbers), *[NOBODY] * idle]
        return moved(torch.tensor(rows), self.x_NLC.device)

    def gather(self, index_B: Tensor) -> tuple[Tensor, Condition, Tensor, Tensor]:
        """State, condition, noise and uniform numbers of rows, as `SegmentRun.begin` takes them."""
        assert self.cond is not None
        noise_BLC, uniform_BL = (
            self.noise_NLC.index_select(0, index_B),
            self.uniform_NL.index_select(0, index_B),
        )
        return self.x_NLC.index_select(0, index_B), self.cond.select(index_B), noise_BLC, uniform_BL

    def scatter(self, index_B: Tensor, x_BLC: Tensor) -> None:
        """Write the state of rows."""
        self.x_NLC.index_copy_(0, index_B, x_BLC)

    def _grow(self) -> None:
        rows = len(self.x_NLC)
        for name in ("noise_NLC", "x_NLC", "uniform_NL"):
            old = getattr(self, name)
            setattr(self, name, torch.cat([old, torch.zeros_like(old)]))
        assert self.cond is not None
        self.cond = self.cond.joined(self.cond.blank(rows))
        self._free += range(2 * rows - 1, rows - 1, -1)
        self.grown += 1


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, without waiting for the device."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


class EagerRunner:
    """A `Runner` of operations one by one, each batch in its own size: a CPU gains nothing from idle rows."""

    @torch.inference_mode()
    def __init__(self, sampler: Sampler, capacity: int = _FIRST_SLOTS) -> None:
        self.sampler, self.slots = sampler, Slots(sampler, capacity)
        self._plans: dict[int, Plan] = {}
        self._runs: dict[int, SegmentRun] = {}  # the teacher batches under way

    @property
    def held(self) -> set[int]:
        return self.slots.numbers | self._runs.keys()

    def foresee(self, keys: Sequence[Key]) -> None:
        """Nothing: threads that make noise would take the cores that compute."""

    def noise(self, keys: Sequence[Key]) -> tuple[Tensor, Tensor]:
        """The noise of images, `[B, L, C]` normal and `[B, L]` uniform, on the CPU."""
        return batch_noise(keys, self.sampler.layout, self.sampler.codebook_VC.shape[1])

    @torch.inference_mode()
    def put(
        self, numbers: Sequence[int], plans: Sequence[Plan], cond: Condition, keys: Sequence[Key]
    ) -> None:
        self.slots.put(numbers, cond, *self.noise(keys))
        self._plans.update(zip(numbers, plans, strict=True))

    @torch.inference_mode()
    def advance(
        self, numbers: Sequence[int], segments: Sequence[int], bucket: int, batch: int | None
    ) -> None:
        del bucket
        index_B = self.slots.index(numbers)
        run = self._runs.pop(batch, None) if batch is not None else None
        if run is None:
            at = [(self._plans[number], segment) for number, segment in zip(numbers, segments, strict=True)]
            run = SegmentRun.begin(self.sampler, at, *self.slots.gather(index_B))
        run.advance()
        if run.done:
            self.slots.scatter(index_B, run.codes())
        else:
            assert batch is not None, "only a teacher's segment takes several passes"
            self._runs[batch] = run

    @torch.inference_mode()
    def decode(self, numbers: Sequence[int]) -> tuple[Tensor, Tensor]:
        pixels, good = decode(self.sampler, self.slots.x_NLC.index_select(0, self.slots.index(numbers)))
        return pixels.cpu(), good.cpu()

    def drop(self, numbers: Sequence[int]) -> None:
        self.slots.drop(numbers)
        for number in numbers:
            self._plans.pop(number, None)
            self._runs.pop(number, None)

    def recover(self, batch: int | None) -> None:
        if batch is not None:
            self._runs.pop(batch, None)
