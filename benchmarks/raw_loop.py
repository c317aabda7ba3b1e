"""The raw loop: what a bare Python process makes of the same model, without any server.

    for each batch: sample_images → encode each image

It runs as a process of its own and waits for orders, one JSON object a line, so that a benchmark
can interleave it with a server under load:

    {"plan": "dd-1", "batch": 4, "images": 100}  →  {"images": 100, "seconds": 1.9}

Encoder, arithmetic and precision are the server's own: both sides make the same bytes, in the same way.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from typing import Any, get_args

from dd_core.bundle import Bundle, load_bundle
from dd_core.engine.arithmetic import choose
from dd_core.engine.cuda import settle
from dd_core.plan import Plan
from dd_core.runtime import pick_device
from dd_core.sampling import sample_images
from distilled_decoding.contract import ImageFormat
from server.generation.encoder import encode
from server.settings import Determinism


def run_loop(
    bundle: Bundle, plan: Plan, batch: int, images: int, form: ImageFormat = "png"
) -> dict[str, Any]:
    """Make at least `images` files of images, in full batches, after one that is not counted."""
    classes = len(bundle.manifest.classes)
    batches = -(-images // batch)
    started = 0.0
    for number in range(-1, batches):
        if number == 0:
            started = time.perf_counter()
        seeds = range((number + 1) * batch, (number + 2) * batch)
        labels, keys = [seed % classes for seed in seeds], [(seed, 0) for seed in seeds]
        for image in sample_images(bundle.sampler, plan, labels, keys).numpy():
            encode(image, form)
    return {"images": batches * batch, "seconds": time.perf_counter() - started}


def main() -> int:
    """Load the bundle, tell its digest, then obey until standard input ends."""
    parser = argparse.ArgumentParser("python -m benchmarks.raw_loop")
    parser.add_argument("bundle")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--format", choices=get_args(ImageFormat), default="png")
    parser.add_argument("--determinism", choices=get_args(Determinism), default="exact")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    settle(device)
    exact = arguments.determinism == "exact"  # in all of this as a server does
    bundle = load_bundle(arguments.bundle, device, choose("auto", device, exact))
    bundle = replace(bundle, sampler=replace(bundle.sampler, exact=exact))
    plans = {preset.plan.name: preset.plan for preset in bundle.presets}
    print(json.dumps({"digest": bundle.digest}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        reply = run_loop(bundle, plans[order["plan"]], order["batch"], order["images"], arguments.format)
        print(json.dumps(reply), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
