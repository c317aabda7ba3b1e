"""The raw loop: what a bare Python process makes of the same model, without any server.

    for each batch: sample_images → encode each image as PNG

It runs as a process of its own and waits for orders, one JSON object a line, so that a benchmark
can interleave it with a server under load:

    {"plan": "dd-1", "batch": 4, "images": 100}  →  {"images": 100, "seconds": 1.9}

The encoder is the server's own: both sides make the same bytes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from dd_core.bundle import Bundle, load_bundle
from dd_core.engine.arithmetic import choose
from dd_core.plan import Plan
from dd_core.runtime import pick_device
from dd_core.sampling import sample_images
from server.generation.encoder import encode


def run_loop(bundle: Bundle, plan: Plan, batch: int, images: int) -> dict[str, Any]:
    """Make at least `images` images as PNG, in full batches, after one that is not counted."""
    classes = len(bundle.manifest.classes)
    batches = -(-images // batch)
    started = 0.0
    for number in range(-1, batches):
        if number == 0:
            started = time.perf_counter()
        seeds = range((number + 1) * batch, (number + 2) * batch)
        labels, keys = [seed % classes for seed in seeds], [(seed, 0) for seed in seeds]
        for image in sample_images(bundle.sampler, plan, labels, keys).numpy():
            encode(image, "png")
    return {"images": batches * batch, "seconds": time.perf_counter() - started}


def main() -> int:
    """Load the bundle, tell its digest, then obey until standard input ends."""
    parser = argparse.ArgumentParser("python -m benchmarks.raw_loop")
    parser.add_argument("bundle")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    device = pick_device(arguments.device)
    bundle = load_bundle(arguments.bundle, device, choose("auto", device))  # as a server does
    plans = {preset.plan.name: preset.plan for preset in bundle.presets}
    print(json.dumps({"digest": bundle.digest}), flush=True)
    for line in sys.stdin:
        order = json.loads(line)
        reply = run_loop(bundle, plans[order["plan"]], order["batch"], order["images"])
        print(json.dumps(reply), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
