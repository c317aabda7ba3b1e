"""Where the time of one step goes, stage by stage, against the most that this machine can do.

    noise ─▶ trunk ─▶ head ─▶ decoder ─▶ transfer ─▶ encode
    floor = max(FLOP ÷ product ceiling, bytes ÷ copy ceiling), of counted operations and measured ceilings

FLOP are of products, convolutions and attention. Bytes are what each operation reads and writes, one by one:
what fits into caches beats this floor, and fused kernels move less. Weights are random.

Shapes: B images, L tokens, C code dimension, V codebook size.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.naive import ALL, SEED, SIZES, SMOKE, Work, identity_of, in_arithmetic, prepare
from dd_core import plan
from dd_core.engine.arithmetic import NAMES, Arithmetic, choose
from dd_core.engine.clock import wait_for
from dd_core.engine.cuda import settle
from dd_core.noise import batch_noise
from dd_core.runtime import pick_device
from dd_core.sampling import run_plan, to_pixels
from distilled_decoding.contract import ImageFormat
from server.generation.encoder import encode

THEME = "roofline"
STAGES = ("noise", "trunk", "head", "decoder", "transfer")
_SMOKE = ("--models", ",".join(SMOKE), "--batches", "2", "--repeats", "2")


class Cost(NamedTuple):
    """Floating-point operations, and bytes read and written."""

    flop: int
    moved: int


class Ceilings(NamedTuple):
    """Most operations a second by type of number, and most bytes a second that a copy reads and writes."""

    flop_per_s: Mapping[torch.dtype, float]
    bytes_per_s: float

    def floor(self, cost: Cost, dtype: torch.dtype) -> float:
        """Seconds that the cost takes at least."""
        return max(cost.flop / self.flop_per_s[dtype], cost.moved / self.bytes_per_s)


class _Moved(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Adds up the bytes of operands and results; views move nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.moved = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        read = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        made = [t for t in tree_leaves(out) if isinstance(t, Tensor)]
        known = {t.untyped_storage().data_ptr() for t in read}
        view = all(t.untyped_storage().data_ptr() in known for t in made)
        if func._schema.is_mutable or not view:
            self.moved += sum(t.numel() * t.element_size() for t in (*read, *made))
        return out


def _attention_flop(
    q: Sequence[int], k: Sequence[int], v: Sequence[int], *_: object, out_shape: object = None, **__: object
) -> int:
    """Of q kᵀ and of the weighted sum of v; the operation of CPUs, which torch's counter does not know."""
    del out_shape
    return 2 * q[0] * q[1] * q[2] * k[2] * (q[3] + v[3])


def walk(work: Work, mark: Callable[[], Any]) -> list[tuple[Any, Any]]:
    """One step, from seeds to pixels on the CPU: `mark` before and after each of `STAGES`."""
    sampler = work.sampler
    chosen = plan.one_step(sampler.layout.num_blocks, work.split)
    keys = [(SEED, index) for index in range(len(work.cond))]
    marks = [mark()]
    noise, uniform = batch_noise(keys, sampler.layout, sampler.codebook_VC.shape[1])
    noise, uniform = noise.to(sampler.device), uniform.to(sampler.device)
    marks.append(mark())
    with before_head(sampler.student, len(sampler.codebook_VC), lambda: marks.append(mark())):
        codes = run_plan(sampler, chosen, work.cond, noise, uniform)
    marks.append(mark())
    image = sampler.tokenizer.to_image(codes)
    marks.append(mark())
    to_pixels(image).cpu()
    marks.append(mark())
    return list(pairwise(marks))


@contextmanager
def before_head(student: object, codebook_size: int, call: Callable[[], None]) -> Iterator[None]:
    """Call something whenever the product of the logits begins: the last one as wide as the codebook."""
    assert isinstance(student, nn.Module)
    [*_, head] = [
        m for m in student.modules() if isinstance(m, nn.Linear) and m.out_features == codebook_size
    ]
    handle = head.register_forward_pre_hook(lambda *_: call())
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def count(work: Work) -> dict[str, Cost]:
    """The cost of each stage; of the noise, which is made without torch, its copies alone."""
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flop, moved = FlopCounterMode(display=False, custom_mapping={attention: _attention_flop}), _Moved()
    with flop, moved:
        marks = walk(work, lambda: Cost(flop.get_total_flops(), moved.moved))
    return {s: Cost(b.flop - a.flop, b.moved - a.moved) for s, (a, b) in zip(STAGES, marks, strict=True)}


@torch.inference_mode()
def seconds(work: Work, repeats: int) -> dict[str, float]:
    """The median of each stage, after a run that does not count."""
    device = work.sampler.device

    def now() -> float:
        wait_for(device)
        return time.perf_counter()

    runs = [walk(work, now) for _ in range(repeats + 1)][1:]
    return {s: report.median([b - a for a, b in times]) for s, *times in zip(STAGES, *runs, strict=True)}


@torch.inference_mode()
def ceilings(device: torch.device, dtypes: set[torch.dtype]) -> Ceilings:
    """Measure square products and a copy too large for any cache, each the fastest of five."""
    cuda = device.type == "cuda"
    side, size = (8192, 2**30) if cuda else (1536, 2**27)

    def fastest(call: Callable[[], object]) -> float:
        found = []
        for _ in range(6):
            started = time.perf_counter()
            call()
            wait_for(device)
            found.append(time.perf_counter() - started)
        return min(found[1:])

    products = {}
    for dtype in dtypes:
        a = torch.ones(side, side, dtype=dtype, device=device)
        out = torch.empty_like(a)
        products[dtype] = 2 * side**3 / fastest(lambda a=a, out=out: torch.mm(a, a, out=out))  # type: ignore[misc]
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return Ceilings(products, 2 * size / fastest(lambda: target.copy_(source)))


def type_of(stage: str, arithmetic: Arithmetic) -> torch.dtype:
    """The type of a stage's numbers: the heads are float32 in every arithmetic."""
    return {"trunk": arithmetic.weights, "decoder": arithmetic.decoder}.get(stage, torch.float32)


def measure(
    name: str, batch: int, repeats: int, device: torch.device, arithmetic: Arithmetic, top: Ceilings
) -> list[dict[str, Any]]:
    """A row for each stage of a model at one batch size."""
    work = in_arithmetic(prepare(ALL[name], batch, device), arithmetic.name)
    costs, took = count(work), seconds(work, repeats)
    rows = []
    for stage in STAGES:
        cost, floor = costs[stage], top.floor(costs[stage], type_of(stage, arithmetic))
        rows.append(
            {
                "model": name,
                "batch": batch,
                "arithmetic": arithmetic.name,
                "stage": stage,
                "flop": cost.flop,
                "bytes": cost.moved,
                "ms": 1e3 * took[stage],
                "gflop_per_s": cost.flop / took[stage] / 1e9,
                "gb_per_s": cost.moved / took[stage] / 1e9,
                "floor_ms": 1e3 * floor,
                "of_floor": floor / took[stage],
            }
        )
    return rows


def encoding(size: int, repeats: int) -> list[dict[str, Any]]:
    """Of each file format: milliseconds of one core for an image of `size`, and the cores that 100 images a
    second take. The image is smooth with a little noise, as a picture is.
    """
    torch.manual_seed(SEED)
    coarse = torch.rand(1, 3, 8, 8)
    smooth = nn.functional.interpolate(coarse, (size, size), mode="bicubic")[0].permute(1, 2, 0)
    pixels = ((smooth + 0.02 * torch.randn(size, size, 3)).clamp(0, 1) * 255).byte().numpy()
    rows = []
    for form in get_args(ImageFormat):
        times = []
        for _ in range(repeats + 1):
            started = time.perf_counter()
            encode(pixels, form)
            times.append(time.perf_counter() - started)
        ms = 1e3 * report.median(times[1:])
        rows.append({"format": form, "size": size, "ms": ms, "cores_per_100": ms / 10})
    return rows


_ROWS = {
    "model": "{model}",
    "batch": "{batch}",
    "arithmetic": "{arithmetic}",
    "stage": "{stage}",
    "ms": "{ms:.2f}",
    "GFLOP": "{gflop:.2f}",
    "MB": "{mb:.1f}",
    "GFLOP/s": "{gflop_per_s:.0f}",
    "GB/s": "{gb_per_s:.1f}",
    "floor, ms": "{floor_ms:.2f}",
    "floor ÷ measured": "{of_floor:.0%}",
}
_ENCODING = {
    "format": "{format}",
    "pixels a side": "{size}",
    "ms an image and core": "{ms:.2f}",
    "cores for 100 images/s": "{cores_per_100:.2f}",
}


def table(results: Mapping[str, Any]) -> str:
    """The results as Markdown."""
    rows = [{**row, "gflop": row["flop"] / 1e9, "mb": row["bytes"] / 1e6} for row in results.get("rows", [])]
    top = results.get("ceilings", {})
    products = ", ".join(
        f"{name} {rate / 1e9:.0f} GFLOP/s" for name, rate in top.get("flop_per_s", {}).items()
    )
    parts = [
        f"Ceilings: products {products}; copies {top.get('bytes_per_s', 0) / 1e9:.1f} GB/s.",
        "One step from seeds to pixels, random weights:",
        report.table(_ROWS, rows),
        "Encoding:",
        report.table(_ENCODING, results.get("encoding", [])),
    ]
    return "\n\n".join(parts)


def run(arguments: argparse.Namespace) -> bool:
    """Measure and file; False if something failed on the way.

    Raises:
        DDError: no such device, model or arithmetic.
    """
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    identity = identity_of(arguments.models)
    device = pick_device(arguments.device)
    settle(device)
    arithmetics = [choose(name, device) for name in arguments.arithmetic]
    options = report.own_options(arguments)
    config = report.configuration(device, torch.get_num_threads(), identity, options)
    with report.filed(THEME, config, table, arguments.out) as results:
        top = ceilings(device, {torch.float32, *(a.weights for a in arithmetics)})
        flop = {str(dtype).removeprefix("torch."): rate for dtype, rate in top.flop_per_s.items()}
        results["ceilings"] = {"flop_per_s": flop, "bytes_per_s": top.bytes_per_s}
        results["encoding"] = encoding(arguments.pixels, arguments.repeats)
        results["rows"] = []
        for name, batch, arithmetic in itertools.product(arguments.models, arguments.batches, arithmetics):
            print(f"{name}, batch {batch}, {arithmetic.name}", flush=True)
            try:
                results["rows"] += measure(name, batch, arguments.repeats, device, arithmetic, top)
            except RuntimeError as error:  # out of memory, most likely: the others go on
                results["failures"].append(f"{name}, batch {batch}: {report.describe(error)}")
    return not results["failures"]


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit code."""
    about = "One step, stage by stage, against this machine's ceilings."
    parser = report.parser("benchmarks.roofline", about, bundle=False)
    parser.add_argument("--models", type=report.names, default=list(SIZES), help=f"of {', '.join(ALL)}")
    parser.add_argument("--batches", type=report.whole_numbers, default=[1], help="such as 1,8")
    parser.add_argument("--repeats", type=report.positive, default=3, help="of each stage")
    parser.add_argument("--pixels", type=report.positive, default=256, help="side of the image to encode")
    about = f"of {', '.join(NAMES)}"
    parser.add_argument("--arithmetic", type=report.names, default=["exact32"], help=about)
    return report.run_command(run, report.parse(parser, argv, _SMOKE))


if __name__ == "__main__":
    sys.exit(main())
