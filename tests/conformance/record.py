"""Makes `tests/conformance/fixtures`: `python -m tests.conformance.record FOLDER`.

The same kinds and the same format as fixtures recorded from the released code, at another size, so
that the check runs without those. The numbers come from a recomputation that shares no code with
what is checked (`tests.conformance.naive`). A seed with a near-tie in any decision is passed over.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from tests.conformance import record_llamagen, record_var
from tests.conformance.recording import LEAST_CHOICE, LEAST_MASS, Recording

# The first seed without a near-tie, so that a recording need not look for it.
SEEDS = {"var": 0, "llamagen": 1}
_FAMILIES: dict[str, Callable[[int], tuple[list[Recording], dict[str, dict[str, Tensor]]]]] = {
    "var": record_var.fixtures,
    "llamagen": record_llamagen.fixtures,
}
_CONVENTIONS = [
    "in.* inputs, out.* outputs; weights carry the reference's own state-dict keys.",
    "Outputs are computed in float64 from float32 inputs and weights, and stored as float32.",
    f"Every choice leads the next by at least {LEAST_CHOICE:g}.",
    f"Every cumulated probability is at least {LEAST_MASS:g} away from top-p.",
    "−inf is expected in filtered and final_logits tensors.",
    "VAR's more_smooth sampling is not recorded: nothing of it but what ar_sample shows is comparable.",
]


def record(folder: Path, tries: int = 1) -> None:
    """Writes all fixtures.

    Args:
        tries: seeds to look at in each family, from its `SEEDS` on.

    Raises:
        ValueError: none of them is without a near-tie.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fixtures: dict[str, Any] = {}
    tensors: dict[str, dict[str, Tensor]] = {}
    for family, make in _FAMILIES.items():
        recordings, states = _search(family, make, tries)
        fixtures |= {r.name: r.entry() for r in recordings}
        tensors |= {f"{r.name}.io.safetensors": r.io for r in recordings}
        tensors |= {f"{name}.weights.safetensors": state for name, state in states.items()}
    files = {}
    for name, content in sorted(tensors.items()):
        path = folder / name
        save_file({k: v.contiguous() for k, v in content.items()}, str(path))
        data = path.read_bytes()
        files[name] = {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    manifest = {
        "set": "own",
        "dtype": "float32; indices int64 (int32 where generate() returns them)",
        "generated_with": {"torch": torch.__version__, "program": "python -m tests.conformance.record"},
        "conventions": _CONVENTIONS,
        "fixtures": fixtures,
        "files": files,
    }
    text = json.dumps(manifest, indent=1, ensure_ascii=False)
    # Lists of numbers and a tensor's [shape, type] are a line each, not a line an element.
    text = re.sub(r"\[\s+([^\[\]{}]*?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    text = re.sub(r"\[\s+(\[[^\[\]]*\]),\s+(\"\w+\")\s+\]", r"[\1, \2]", text)
    (folder / "manifest.json").write_text(text + "\n", encoding="utf-8")


def _search(
    family: str, make: Callable[[int], tuple[list[Recording], dict[str, dict[str, Tensor]]]], tries: int
) -> tuple[list[Recording], dict[str, dict[str, Tensor]]]:
    for seed in range(SEEDS[family], SEEDS[family] + tries):
        recordings, states = make(seed)
        close = [r for r in recordings if not r.clear]
        if not close:
            return recordings, states
        said = "; ".join(f"{r.name} {r.margins.choice:.1e} {r.margins.mass:.1e}" for r in close)
        print(f"{family}: seed {seed} has near-ties: {said}", flush=True)  # noqa: T201
    raise ValueError(f"{family}: no seed without a near-tie among {tries} from {SEEDS[family]} on")


def main() -> None:
    """Writes the folder."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--tries", type=int, default=1, help="seeds to look at; more than 1 searches")
    args = parser.parse_args()
    with torch.inference_mode():
        record(args.folder, args.tries)


if __name__ == "__main__":
    main()
