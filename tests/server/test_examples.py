"""Every block of docs/16-clients.md, run as it stands against a server.

An example that does nothing would end well, too: so what each one says and leaves is written down here.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from distilled_decoding import Generation
from tests.server.helpers import PATIENCE, Running

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "16-clients.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# What runs a language, the script's name, and what must be there for it.
RUNNERS = {
    "sh": (["bash", "-euo", "pipefail"], "example.sh", "curl"),
    "python": ([sys.executable], "example.py", sys.executable),
    "js": (["node"], "example.mjs", "node"),
}
# Of each block in turn: what it says, and the files that it leaves.
OUTCOMES: list[tuple[str, set[str]]] = [
    (r"", {"ship.png"}),
    (r"event: image\nevent: image\nevent: done\n", set()),
    (r"", {"cat.json"}),
    (r"dd-2 7 \d.*\ndd1\.\S+\ndd1\.\S+\n", {"ship-0.png", "ship-1.png"}),
    (r"(\S+ \d+ preview \d+\n)+teacher 64 final \d+\n", {f"ship-stage-{stage}.png" for stage in range(5)}),
    (r"(tiny dd-1 \d+\n){3}0 False\n1 True\n", set()),
    (r"teacher \[('dd1\.\S+', ){2}'dd1\.\S+'\]\ntiny .*\('dd-1', 1\), \('dd-2', 2\).*\n", set()),
    (r"ready\ninvalid_request label .*'shop'.*\n", set()),
    (r"dd-2 7 \{[^}]*compute_ms[^}]*\}\n", {"ship-0.png"}),
    (r"dd-1 preview \d+\ndd-2 final \d+\n", set()),
    (r"", {"ship-0.png", "ship-1.png"}),
    (r"(image_generation\.partial_image 32x32 \d+\n){2}image_generation\.completed 32x32 \d+\n", set()),
]


def test_no_block_goes_unrun() -> None:
    """Two fences a block, and two more of the line that installs the client, which names no language."""
    assert len(BLOCKS) == len(OUTCOMES)
    assert {language for language, _ in BLOCKS} == set(RUNNERS)
    assert len(re.findall(r"^```", PAGE, re.MULTILINE)) == 2 * len(BLOCKS) + 2


@pytest.mark.parametrize("number", range(len(OUTCOMES)), ids=[language for language, _ in BLOCKS])
def test_example(number: int, server: Running, tmp_path: Path) -> None:
    (language, code), (says, leaves) = BLOCKS[number], OUTCOMES[number]
    command, name, needed = RUNNERS[language]
    if shutil.which(needed) is None:
        pytest.skip(f"no {needed} on this machine (`make node` installs Debian's Node.js)")
    script = tmp_path / name
    here = re.sub(r"(http://)?localhost:8000", server.url, code).replace(
        "Client()", f'Client("{server.url}")'
    )
    script.write_text(here, encoding="utf-8")
    ended = subprocess.run(
        [*command, script],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=PATIENCE,
        check=False,
    )
    assert ended.returncode == 0, ended.stderr
    assert re.fullmatch(says, ended.stdout), ended.stdout
    script.unlink()
    assert {path.name for path in tmp_path.iterdir()} == leaves
    for path in tmp_path.iterdir():
        if path.suffix == ".json":
            assert Generation.model_validate_json(path.read_bytes()).images[0].bytes
        else:
            with Image.open(path) as image:
                assert image.size == (32, 32)
