"""Several processes that train one model: ranks, and all that passes between them.

    torchrun --nproc_per_node 4 -m training distill --recipe gpu --out runs/gpu

Every rank makes the same updates from its rows of each batch, and rank 0 alone writes. A loss is a part's
share of the mean over the whole batch, so gradients and figures of parts and ranks add up to those of one
process. They are summed here, after the last backward pass of an update, instead of by
DistributedDataParallel: an update has several backward passes (accumulation, a discriminator), and sums that
are no gradients (a codebook's counts). What is given up is that sums overlap the backward pass.

Without torchrun everything here does nothing, or is the whole batch.
"""

from __future__ import annotations

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from rich.console import Console
from rich.markup import escape
from torch import Tensor, nn
from torch.distributed.rendezvous import rendezvous

from dd_core.errors import DDError, RecipeError
from dd_core.runtime import pick_device

# A process that ends closes its connections, which the others notice at once. This is for a machine that
# vanishes, and has to outlast what rank 0 does alone: fetching data, drawing previews.
_TIMEOUT = timedelta(hours=1)
_BUCKET = 2**25  # numbers that are summed in one message
_store: list[Any] = []  # of the ranks that are connected


class RankError(DDError):
    """Another rank has ended, or cannot be reached."""


@dataclass(frozen=True)
class World:
    """The place of this process among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1


def world() -> World:
    """The place that torchrun gave to this process by RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE.

    Raises:
        RecipeError: they contradict each other.
    """
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    found = [os.environ.get(name, default) for name, default in zip(names, ("", "1", "", "1"), strict=True)]
    if found[1] == "1":
        return World()
    if not all(text.isdecimal() for text in found) or int(found[0]) >= int(found[1]):
        said = ", ".join(f"{name}={text}" for name, text in zip(names, found, strict=True))
        raise RecipeError(f"start several processes with torchrun, which sets {said}", param="WORLD_SIZE")
    return World(*map(int, found))


def pick_rank_device(name: str) -> torch.device:
    """The device of this process: of several, each has the GPU of its local rank.

    Raises:
        RecipeError: one GPU is named for several processes.
        InvalidRequestError: no such device on this machine.
    """
    here = world()
    if here.size == 1:
        return pick_device(name)
    if name.startswith("cuda:"):
        raise RecipeError(
            f"--device {name} would give one GPU to {here.size} processes; choose auto, cuda or cpu",
            param="device",
        )
    device = pick_device(name)
    if device.type == "cuda":
        device = pick_device(f"cuda:{here.local_rank}")
        torch.cuda.set_device(device)
    return device


@contextmanager
def joined(device: torch.device) -> Iterator[None]:
    """Connect this process with the others, within the block."""
    if world().size == 1:
        yield
        return
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    try:
        store, rank, size = next(iter(rendezvous("env://")))
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_TIMEOUT)
    except (ValueError, RuntimeError) as error:
        raise RankError(f"the ranks do not find each other: {_first_line(error)}") from error
    _store[:] = [store]
    _end_at_sigterm()
    yield  # after an error the others cannot be waited for: `end` leaves without a word to them
    leave()


def leave() -> bool:
    """Disconnect for what one process does: True on rank 0, which does it; the others have nothing to do."""
    if dist.is_initialized():
        dist.destroy_process_group()
    return world().rank == 0


def is_main() -> bool:
    """True on the rank that writes."""
    return world().rank == 0


def connected() -> bool:
    """True within `joined`, where there are several processes, until they `leave`."""
    return dist.is_initialized()


def end(message: str, status: int) -> NoReturn:
    """End this process; the first one to come here says why."""
    try:
        for store in _store:
            store.set_timeout(timedelta(seconds=5))
        first = all(store.add("ended", 1) == 1 for store in _store)
    except RuntimeError:  # the store went down with another rank
        first = True
    if first:
        Console(stderr=True).print(f"[red]dd-train:[/red] {escape(message)}", highlight=False, soft_wrap=True)
    sys.stdout.flush()
    sys.stderr.flush()
    if _store:
        os._exit(status)  # the backends' threads may wait for ranks that are gone
    raise SystemExit(status)


def _end_at_sigterm() -> None:
    """End at SIGTERM, which torchrun sends when another rank ended. A thread hears it: sums may wait."""
    ours, theirs = socket.socketpair()
    theirs.setblocking(False)
    signal.signal(signal.SIGTERM, lambda *_: None)
    signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)

    def listen() -> None:
        with theirs:
            while signal.SIGTERM not in ours.recv(64):
                pass
        end(f"rank {world().rank} was told to end, as when another rank ended; {_AGAIN}", 143)

    threading.Thread(target=listen, daemon=True).start()


_AGAIN = "the same command goes on from the last checkpoint"


def _ranks() -> tuple[int, int]:
    """Rank and number of the processes that are connected."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _together(collective: Callable[[], object]) -> None:
    try:
        collective()
    except RuntimeError as error:
        raise RankError(f"rank {_ranks()[0]} lost another rank; {_AGAIN} ({_first_line(error)})") from error


def _first_line(error: Exception) -> str:
    return str(error).partition("\n")[0][:200]


def barrier() -> None:
    """Wait until every rank is here."""
    summed(torch.zeros(1))


@contextmanager
def in_turn() -> Iterator[None]:
    """Rank 0 first, then one rank of each other machine, then the rest: the first ones leave files that the
    others find, in the run folder and in each machine's cache.
    """
    turn = 0 if _ranks()[0] == 0 else 1 if world().local_rank == 0 else 2
    for _ in range(turn):
        barrier()
    yield
    for _ in range(2 - turn):
        barrier()


def summed(tensor: Tensor) -> Tensor:
    """The tensor, which now holds the sum over the ranks, the same bits on each."""
    if dist.is_initialized():
        _together(lambda: dist.all_reduce(tensor))
    return tensor


def agree(step: int) -> None:
    """Do nothing where all ranks are at one step of a stage.

    Raises:
        RecipeError: they are not, so they read different checkpoints.
    """
    if not dist.is_initialized():
        return
    most = torch.tensor([step, -step])
    _together(lambda: dist.all_reduce(most, dist.ReduceOp.MAX))
    if most[0] != -most[1]:
        raise RecipeError(
            f"ranks resume at steps {-int(most[1])} to {int(most[0])}: --out must be one folder for all "
            "machines",
            param="out",
        )


def send_to_all(tensors: Iterable[Tensor]) -> None:
    """Give every rank what rank 0 has in these tensors."""
    if dist.is_initialized():
        for tensor in tensors:
            _together(partial(dist.broadcast, tensor.detach(), 0))


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Sum gradients over the ranks; a parameter without one here has zeros if another rank has one."""
    params = [p for p in parameters if p.requires_grad]
    if not (dist.is_initialized() and params):
        return
    known = torch.tensor([p.grad is not None for p in params], dtype=torch.int32)
    gradients: list[Tensor] = []
    for p, count in zip(params, summed(known).tolist(), strict=True):
        if count and p.grad is None:
            p.grad = torch.zeros_like(p)
        if p.grad is not None:
            gradients.append(p.grad)
    while gradients:
        bucket: list[Tensor] = []
        numbers = 0
        while gradients and (not bucket or numbers + gradients[-1].numel() <= _BUCKET):
            bucket.append(gradients.pop())
            numbers += bucket[-1].numel()
        flat = summed(torch.cat([g.flatten() for g in bucket]))
        for g, total in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            g.copy_(total.view_as(g))


@dataclass(frozen=True)
class Part:
    """Rows of a batch that go through the model at once: every `stride`-th from `first` on."""

    first: int = 0
    stride: int = 1

    @property
    def rows(self) -> slice:
        """The rows of a batch that are this part's."""
        return slice(self.first, None, self.stride)

    def among(self, count: int) -> int:
        """Number of this part's rows among the first `count` of the batch."""
        return len(range(self.first, count, self.stride))


def parts(batch: int, rounds: int, param: str) -> list[Part]:
    """The parts of a batch that this rank works on, one after another.

    Rows are dealt out in turn, so the first rows of a batch, which some losses are of, are everybody's.

    Raises:
        RecipeError: the number of all parts does not divide the batch; `param` is the batch's name.
    """
    rank, size = _ranks()
    if batch % (size * rounds):
        raise RecipeError(
            f"{param} is {batch}, which {size} processes times accumulate={rounds} do not divide", param=param
        )
    return [Part(rank + size * i, size * rounds) for i in range(rounds)]


def own_rows() -> slice:
    """The rows of a batch that are this rank's: those of all its parts."""
    rank, size = _ranks()
    return slice(rank, None, size)


def rows_of_machine() -> slice:
    """The rows that are this rank's where each machine does them all, as for a cache of its own."""
    here = world() if dist.is_initialized() else World()
    return slice(here.local_rank, None, here.local_size)


class Figures:
    """Scalars of an update to log: sums over its parts and, at its end, over the ranks."""

    def __init__(self, device: torch.device, *names: str) -> None:
        self.names = names
        self._sums = torch.zeros(len(names), device=device)

    def add(self, **values: Tensor) -> None:
        """Add a part's share of some of the figures."""
        for name, value in values.items():
            self._sums[self.names.index(name)] += value.detach()

    def total(self) -> dict[str, Tensor]:
        """The figures of the whole batch, by name; to be called once."""
        return dict(zip(self.names, summed(self._sums).unbind(), strict=True))
