"""Messages between the server and the process that owns a device.

Load ─▶ Loaded      Forward ─▶ Done │ Failed      Unload, Drop, Foresee: nothing is answered
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np
from numpy.typing import NDArray

from dd_core.errors import DDError
from dd_core.plan import Plan
from server.scheduling.costs import Kind

if TYPE_CHECKING:  # torch, which a process that only sends messages can do without
    from dd_core.bundle import Bundle
    from dd_core.noise import NoiseKey

Prepare = Callable[["Bundle"], "Bundle"]
Pixels = NDArray[np.uint8]


@dataclass(frozen=True)
class DeviceOptions:
    """Settings of a device process."""

    device: str  # auto, cpu, cuda or cuda:N
    threads: int = 0  # of torch on a CPU; 0 = its choice
    exact: bool = True  # an image has the same bytes in every batch (`dd_core.sampling.Sampler.exact`)
    arithmetic: str = "auto"  # `dd_core.engine.arithmetic.choose`
    log_level: str = "info"
    log_format: Literal["text", "json"] = "text"
    prepare: Prepare | None = None  # applied to each bundle that is loaded; tests put their faults in here


@dataclass(frozen=True)
class Load:
    """Load the bundle in `folder`; answered by `Loaded` while forward passes go on."""

    model: str
    folder: Path
    number: int = 0  # tells apart the loads of a model


@dataclass(frozen=True)
class Unload:
    """Forget a model, or the load of it that goes on. Nothing is answered."""

    model: str


@dataclass(frozen=True)
class Drop:
    """Forget images and teacher batches, by number. Nothing is answered."""

    numbers: tuple[int, ...]


@dataclass(frozen=True)
class Foresee:
    """Images with this noise were admitted and will come, if nobody leaves. Nothing is answered."""

    model: str
    keys: tuple[NoiseKey, ...]


@dataclass(frozen=True)
class NewImage:
    """An image that the device does not know yet; `condition` is a class index, or a prompt."""

    number: int
    plan: Plan
    condition: int | str
    key: NoiseKey


@dataclass(frozen=True)
class Forward:
    """One forward pass, or the decoding alone; answered by `Done` or `Failed`."""

    model: str
    kind: Kind
    numbers: tuple[int, ...]  # of the images
    segments: tuple[int, ...]  # the index of the segment that each is at in its plan
    bucket: int  # rows of the batch on a GPU, idle ones included
    new: tuple[NewImage, ...] = ()  # those among them that the device does not know yet
    teacher_batch: int | None = None  # number of the teacher's batch; an unknown one begins
    finishing: tuple[int, ...] = ()  # to decode afterwards, and to forget
    previewing: tuple[int, ...] = ()  # of which a picture is wanted now, before they go on


@dataclass(frozen=True)
class Loaded:
    """The model of `load` is there, or `error` says why not."""

    load: Load
    error: DDError | None = None
    hardware: str = ""  # the kind of device: bytes are the same on all of one kind


@dataclass(frozen=True)
class Done:
    """A forward pass is done."""

    seconds: float  # of the pass
    decode_seconds: float
    pictures: dict[int, Pixels]  # `[H, W, 3]` by number, of images that are finished or in between
    broken: tuple[int, ...] = ()  # numbers of images in which something was not a number
    text_seconds: float = 0.0  # of reading new prompts
    memory: Mapping[str, int] = field(default_factory=dict)  # bytes by kind, of a GPU, now and then
    # Numbers and shape of pictures on their way in a `PixelBuffer`, in place of `pictures`.
    placed: tuple[tuple[int, ...], tuple[int, ...]] | None = None


@dataclass(frozen=True)
class Failed:
    """The pass raised, or the process died. Sent once more, a pass gives what it would have given: what lies
    before an image's segment is as it was, and a teacher batch begins again.
    """

    out_of_memory: bool
    reason: str
    killed: bool = False  # somebody ended the process; said in its place


Command = Load | Unload | Drop | Foresee | Forward
Answer = Loaded | Done | Failed
