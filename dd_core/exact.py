"""Exactness: an image has the same bytes alone and in any batch. Nothing of it is elsewhere.

Libraries choose their kernels by the size of a batch, and kernels round differently. So products get idle
rows until their number no longer matters, attention gets idle queries, and pictures are decoded one by one,
on a CPU on one thread each. Noise of its own for each image (`dd_core.noise`) is the other half.

Shapes: B images, R rows of a teacher's batch (conditional and unconditional), L tokens, C code dimension,
V codebook size, H heads, S positions, E head dimension.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, lru_cache
from itertools import count
from threading import Barrier

import torch
import torch.nn.functional as F
from torch import Tensor

from dd_core.cache import KVCache
from dd_core.condition import Condition
from dd_core.models.protocols import BlockByBlock, Pictures

# With fewer rows, BLAS libraries choose their kernel by the number of rows, and the rounding of a
# row then depends on how many others there are. So it does when a thread is left with one to three rows:
# seen up to 63 rows on 64 threads, and never where the rows were a multiple of four.
_LEAST_ROWS, _ROWS_TOGETHER, _MANY_ROWS = 16, 4, 128
# With fewer queries, attention on a CPU rounds by which thread an image's head falls to, and that is
# decided by how many images there are.
_LEAST_QUERIES = 4


def exact_rows(rows: int) -> int:
    """Rows that a product of `rows` needs so that each is rounded as in any other number of them."""
    return rows if rows >= _MANY_ROWS else max(_LEAST_ROWS, -(-rows // _ROWS_TOGETHER) * _ROWS_TOGETHER)


def among_idle_rows(function: Callable[..., Tensor], *inputs: Tensor) -> Tensor:
    """`function` of tensors with a row each for the same things, computed with idle rows of zeros beneath."""
    rows = len(inputs[0])
    idle = exact_rows(rows) - rows
    return function(*(F.pad(t, (0, 0) * (t.dim() - 1) + (0, idle)) for t in inputs))[:rows]


def exact_tokens(first: int, stop: int, tokens: int) -> slice:
    """Tokens `first..stop-1` of a sequence of `tokens`, and so many more that any number of sequences has a
    number of rows in which each is rounded as in any other: all of them, or a multiple of 16.
    """
    count = -(-(stop - first) // _LEAST_ROWS) * _LEAST_ROWS
    if count >= tokens:
        return slice(0, tokens)
    first = min(first, tokens - count)
    return slice(first, first + count)


def exact_sequences(used: int, tokens: int) -> int:
    """Number of sequences, of `tokens` each, that a teacher's batch of `used` needs.

    At least two go together: a convolution of one is another kernel (VAR's teacher reads f̂).
    """
    return next(n for n in count(max(used, 2)) if exact_rows(n * tokens) == n * tokens)


def with_idle_sequences(cond: Condition, block_sizes: Iterable[int]) -> Condition:
    """The condition of a teacher's batch, with idle rows enough for blocks of each of the sizes."""
    return cond.padded(max(exact_sequences(len(cond), size) for size in set(block_sizes)) - len(cond))


def exact_block_logits(
    teacher: BlockByBlock, tokens_RL: Tensor, padded: Condition, step: int, cache: KVCache
) -> Tensor:
    """`BlockByBlock.block_logits` computed among idle sequences; `padded` is from `with_idle_sequences`."""
    used = len(tokens_RL)
    rows = exact_sequences(used, teacher.layout.block_sizes[step])
    tokens_RL = F.pad(tokens_RL, (0, 0, 0, rows - used))
    return teacher.block_logits(tokens_RL, padded.select(slice(rows)), step, cache)[:used]


def cached_sequences(
    cache: KVCache, q_RHSE: Tensor, k_RHSE: Tensor, v_RHSE: Tensor, mask: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Queries, keys, values and mask without idle sequences, which the cache has no room for."""
    used = cache.batch
    mask = mask[:used] if mask is not None and mask.dim() == 4 else mask
    return q_RHSE[:used], k_RHSE[:used], v_RHSE[:used], mask


def with_zero_sequences(out_RSD: Tensor, rows: int) -> Tensor:
    """The output of attention, with zeros for idle sequences."""
    return F.pad(out_RSD, (0, 0, 0, 0, 0, rows - len(out_RSD))) if len(out_RSD) < rows else out_RSD


def with_idle_queries(q_BHSE: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Queries, and the mask of who sees whom, with idle queries after them where they are few."""
    idle = _LEAST_QUERIES - q_BHSE.shape[2]
    if idle <= 0 or q_BHSE.device.type != "cpu":
        return q_BHSE, mask
    mask = F.pad(mask, (0, 0, 0, idle), value=True) if mask is not None else None
    return F.pad(q_BHSE, (0, 0, 0, idle)), mask


class ImageByImage:
    """The tokenizer's decoder, one image at a time: convolutions round differently by batch.

    On a CPU each image has one thread, but for a few, which would leave threads idle.

    Args:
        tokens: L, the length of a sequence.
    """

    def __init__(self, tokenizer: Pictures, tokens: int) -> None:
        self._tokenizer, self._tokens = tokenizer, tokens

    def __call__(self, codes_BLC: Tensor) -> Tensor:
        """Final codes → images `[B, 3, H, W]`."""
        to_image, images = self._tokenizer.to_image, torch.split(codes_BLC, 1)
        few = 2 * len(images) <= torch.get_num_threads()
        if codes_BLC.device.type == "cuda" or (few and self.any_threads):
            return torch.cat([to_image(image) for image in images])
        return torch.cat(on_one_thread_each(to_image, images))

    @cached_property
    def any_threads(self) -> bool:
        """True where an image's bytes are the same on one thread of the CPU as on all. Where they are not,
        each is decoded on one, whatever else there is to decode.
        """
        codes_VC = self._tokenizer.codebook_VC.detach()
        tokens = torch.arange(self._tokens, device=codes_VC.device) % len(codes_VC)
        codes_1LC = codes_VC[tokens][None]
        with torch.inference_mode():
            [alone] = on_one_thread_each(self._tokenizer.to_image, [codes_1LC])
            return torch.equal(alone, self._tokenizer.to_image(codes_1LC))


def on_one_thread_each(function: Callable[[Tensor], Tensor], images: Sequence[Tensor]) -> list[Tensor]:
    """`function` of every tensor, each on one thread, as many at a time as torch has threads.

    Threads that share an operation wait for each other at the end of it. Over one image that is hundreds
    of short operations, and a thread that the machine takes away for a moment holds all others up. A thread
    that has an image to itself waits for nobody, and takes the next one when it is done.

    The order of results is that of `images`. The first exception of any is raised here.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return [function(image) for image in images]
    inference = torch.is_inference_mode_enabled()  # of a thread, not of the process

    def run(image: Tensor) -> Tensor:
        with torch.inference_mode(inference):
            return function(image)

    return list(_pool(threads, os.getpid()).map(run, images))


@lru_cache(maxsize=1)
def _pool(threads: int, process: int) -> ThreadPoolExecutor:  # noqa: ARG001 - a fork has none of the threads
    pool, started = ThreadPoolExecutor(threads, "dd-image"), Barrier(threads)

    def alone(_: int) -> None:
        started.wait()  # or one thread would take this twice
        torch.set_num_threads(1)
        torch.get_num_threads()  # the first question takes the process's number: it is 1 only now

    list(pool.map(alone, range(threads)))
    torch.set_num_threads(threads)  # what it says is also the default of threads that come later
    return pool
