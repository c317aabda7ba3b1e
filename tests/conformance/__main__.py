"""`make conformance FIXTURES=DIR`: our models against tensors recorded from the reference.

    manifest.json ─▶ fixtures by name ─▶ reference weights through our adapters ─▶ ours ─▶ table

Exit status 0 if every quantity agrees, 1 otherwise: also for a fixture of a kind that no check
knows, a recorded output that no check compares, and a damaged folder.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from dd_core.errors import DDError
from tests.conformance import llamagen, var
from tests.conformance.report import Fixture, Report, SafetensorError, read_manifest

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
        except (DDError, KeyError, ValueError, OSError, SafetensorError, RuntimeError) as error:
            report.fail(name, "*", f"{type(error).__name__}: {error}")
    return report


def _check_files(folder: Path, manifest: dict[str, Any], report: Report) -> None:
    for name, entry in manifest.get("files", {}).items():
        path = folder / name
        found = hashlib.sha256(path.read_bytes()).hexdigest() if path.exists() else "not there"
        if found != entry["sha256"]:
            report.fail("files", name, f"SHA-256 {found[:16]}, the manifest says {entry['sha256'][:16]}")


def main() -> int:
    """Prints the table; returns the exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("folder", type=Path, help="folder with manifest.json and safetensors")
    parser.add_argument("--failures", action="store_true", help="print only what fails")
    args = parser.parse_args()
    try:
        report = run(args.folder)
    except ValueError as error:
        print(f"conformance: {error}", file=sys.stderr)
        return 1
    failed = [line for line in report.lines if line.passed is False]
    print((Report(failed) if args.failures else report).table())
    compared = sum(line.passed is not None for line in report.lines)
    print(f"{compared} quantities compared, {len(failed)} failed", end="")
    print(
        f", {len(report.lines) - compared} depend on random numbers" if compared < len(report.lines) else ""
    )
    return 0 if report.passed else 1


if __name__ == "__main__":
    raise SystemExit(main())
