"""A bundle with random weights in a published size: what the server's speed depends on, without the weights.

    published name ─▶ architecture, random weights ─▶ bundle folder

`tiny` is no published model but the smallest that there is, for runs that ask how many, not how fast.
The teacher, which is most of the weights, is left out unless it is asked for.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import report
from dd_core.bundle import save_bundle
from dd_core.errors import InvalidRequestError
from dd_core.hub.convert import manifest_of
from dd_core.hub.registry import find_spec
from dd_core.manifest import Manifest
from tests.hub import random_modules
from tests.tiny import tiny_bundle, tiny_manifest

TINY = "tiny"


def make(name: str, folder: Path, *, teacher: bool = False) -> Manifest:
    """Writes the bundle of a published model to `folder`, in float32 as it will be computed.

    Raises:
        BundleNotFoundError: no such model.
        InvalidRequestError: a folder that is not empty, or a model without a student and no `teacher`.
    """
    if folder.exists() and any(folder.iterdir()):
        raise InvalidRequestError(f"{folder} is not empty", param="folder")
    if name == TINY:
        tiny_bundle(folder)
        return tiny_manifest()
    spec = find_spec(name) if teacher else find_spec(name).without_teacher()
    modules = random_modules(spec)
    return save_bundle(
        folder,
        manifest_of(spec, []),
        tokenizer=modules["tokenizer"],  # type: ignore[arg-type]
        student=modules.get("student"),  # type: ignore[arg-type]
        teacher=modules.get("teacher"),  # type: ignore[arg-type]
        marginals_KLV=None,
        dtype=None,
    )


def _run(chosen: argparse.Namespace) -> bool:
    manifest = make(chosen.name, chosen.folder, teacher=chosen.teacher)
    print(f"{manifest.name} with random weights in {chosen.folder}")
    return True


def main(argv: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.random_bundle", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("name", help=f"of a published model, or {TINY}")
    parser.add_argument("folder", type=Path, help="new or empty")
    parser.add_argument("--teacher", action="store_true", help="with the teacher and the plans that need it")
    return report.run_command(_run, parser.parse_args(argv))


if __name__ == "__main__":
    sys.exit(main())
