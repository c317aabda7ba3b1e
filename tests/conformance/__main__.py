"""`make conformance FIXTURES=DIR`: our models against tensors recorded from the reference.

    manifest.json ─▶ fixtures by name ─▶ reference weights through our adapters ─▶ ours ─▶ table

Exit status 0 if every quantity agrees, 1 otherwise: also for a fixture of a kind that no check
knows, a quantity of the manifest that is missing, a recorded output that no check compares, a key
of the reference's weights that is neither used nor known not to be needed, and a damaged folder.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dd_core.engine.arithmetic import choose
from dd_core.errors import InvalidRequestError
from tests.conformance import arithmetics, llamagen, var
from tests.conformance.captions import check_captions
from tests.conformance.report import Fixture, Report, read_manifest

CHECKS: dict[str, Callable[[Fixture], None]] = {
    "var_vqvae": var.check_vqvae,
    "var_quant10": var.check_quantizer,
    "var_teacher": var.check_teacher,
    "var_teacher_saln": var.check_teacher,
    "var_teacher_nol2": var.check_teacher,
    "var_filter": var.check_filter,
    "var_dd": var.check_dd,
    "var_hybrid": var.check_hybrid,
    "lg_vq": llamagen.check_vq,
    "lg_gpt_c2i": llamagen.check_class_teacher,
    "lg_gpt_t2i": llamagen.check_text_teacher,
    "lg_filter": llamagen.check_filter,
    "lg_dd": llamagen.check_dd,
    "lg_hybrid": llamagen.check_hybrid,
}

OTHER_FILES: dict[str, Callable[[Path, Report], None]] = {"t5_caption_clean.json": check_captions}


def run(folder: Path) -> Report:
    """Checks every fixture of a folder.

    Raises:
        ValueError: the folder has no manifest of fixtures.
    """
    manifest, report = read_manifest(folder), Report()
    _check_files(folder, manifest, report)
    for name, facts in manifest["fixtures"].items():
        check = CHECKS.get(name)
        if check is None:
            report.fail(name, "*", f"no check for this kind; known: {', '.join(CHECKS)}")
            continue
        try:
            with torch.inference_mode():
                fixture = Fixture(name, folder, facts, report)
                check(fixture)
            fixture.finish()
        except Exception as error:  # noqa: BLE001 - whatever it is, this fixture fails and the others go on
            report.fail(name, "*", f"{type(error).__name__}: {error}")
    for name, about in manifest.get("other_files", {}).items():
        if name in OTHER_FILES:
            OTHER_FILES[name](folder / name, report)
            continue
        report.skip("other_files", name, f"not covered: {about}")
    return report


def _check_files(folder: Path, manifest: dict[str, Any], report: Report) -> None:
    """Every file has the manifest's hash; one that a fixture reads and that has none is named."""
    hashes = {name: entry["sha256"] for name, entry in manifest.get("files", {}).items()}
    for name, told in hashes.items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "not there"
        if found != told:
            report.fail("files", name, f"SHA-256 {found[:16]}, the manifest says {told[:16]}")
    read = {f for facts in manifest["fixtures"].values() for f in (facts["io"], *facts.get("weights", []))}
    for name in sorted(read - set(hashes)):
        report.skip("files", name, "read by a fixture, and the manifest has no hash of it")


def _deviations(folder: Path, name: str) -> int:
    """Print the deviations of an arithmetic; 1 if they are more than rounding explains."""
    arithmetic = choose(name, torch.device("cpu"), exact=False)
    rows = arithmetics.measure(folder, arithmetic)
    print(arithmetics.table(rows, arithmetic))
    return int(not rows or not all(row.explained(arithmetic) for row in rows))


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="folder with manifest.json and safetensors")
    parser.add_argument("--failures", action="store_true", help="print only what fails or is not covered")
    parser.add_argument(
        "--arithmetic", help=f"in place of it: how far the engine is off in {', '.join(arithmetics.BOUNDS)}"
    )
    args = parser.parse_args()
    try:
        if args.arithmetic:
            return _deviations(args.folder, args.arithmetic)
        report = run(args.folder)
    except (ValueError, InvalidRequestError) as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    failed = [line for line in report.lines if line.passed is False]
    skipped = [line for line in report.lines if line.passed is None]
    print((Report([*failed, *skipped]) if args.failures else report).table())
    if report.ignored and not args.failures:
        print(f"\n{report.keys()}\n")
    compared = len(report.lines) - len(skipped)
    print(f"{compared} quantities compared, {len(failed)} failed, {len(skipped)} not covered")
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
