"""Every block of docs/16-clients.md, run as it stands against the server that `make serve` starts."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from PIL import Image

from tests.server.helpers import PATIENCE

ROOT = Path(__file__).parent.parent.parent
PAGE = (ROOT / "docs" / "16-clients.md").read_text(encoding="utf-8")
BLOCKS: list[tuple[str, str]] = re.findall(r"^```(\w+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
# Of each language: the command, the script's name, and the program without which its blocks are skipped.
RUNNERS = {
    "sh": (["bash", "-euo", "pipefail"], "example.sh", "curl"),
    "python": ([sys.executable], "example.py", sys.executable),
    "js": (["node"], "example.mjs", "node"),
}
# Of each block: what it prints, and the files that it leaves. A block that did nothing would end well, too.
OUTCOMES: list[tuple[str, set[str]]] = [
    (r"", {"ship.png", "heart.png"}),
    (r"event: image\nevent: image\nevent: done\n", set()),
    (r"cifar10 dd-2 \d.*\n", {"ship-0.png", "ship-1.png"}),
    (
        r"dd-1 1 False\ndd-2 2 False\npre-trained-1-4 4 False\nteacher 6 True\n",
        {f"heart-{stage}.png" for stage in range(4)},
    ),
    (r"dd-1 dd-1\ndd-1 False\ndd-2 True\n", set()),
    (r"teacher 3\ncifar10 {'dd-1': 1, 'dd-2': 2, .*}\npictograms {'dd-1': 1, .*}\n", set()),
    (r"ready\n400 invalid_request label .*'shop'.* \S+ None\n", set()),
    (r"dd-1 false data:image/png;base64,\S+\ndd-2 true data:image/png;base64,\S+\n", set()),
    (r"(image_generation\.partial_image 64x64\n){2}image_generation\.completed 64x64\n", {"ship.png"}),
]


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """The address of a server with the default models and settings, warm-up aside."""
    command = [sys.executable, "-m", "server", "serve", "--port", "0", "--no-warmup"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("DD_SERVER_")}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            address = next(m[1] for line in lines if (m := re.search(r"listening on (http://\S+)", line)))
            assert any(line.rstrip().endswith("ready") for line in lines)
            yield address
        finally:
            process.terminate()


def test_no_block_goes_unrun() -> None:
    """Beside the blocks that name a language are the two that install the client (test_install.py) and the
    flag for other names of models (test_recorded_clients.py).
    """
    assert len(BLOCKS) == len(OUTCOMES)
    assert {language for language, _ in BLOCKS} == set(RUNNERS)
    assert len(re.findall(r"^```", PAGE, re.MULTILINE)) == 2 * (len(BLOCKS) + 3)


@pytest.mark.parametrize("number", range(len(OUTCOMES)), ids=[language for language, _ in BLOCKS])
def test_example(number: int, url: str, tmp_path: Path) -> None:
    (language, code), (prints, leaves) = BLOCKS[number], OUTCOMES[number]
    command, name, needed = RUNNERS[language]
    if shutil.which(needed) is None:
        pytest.skip(f"no {needed} on this machine (`make node` installs Debian's Node.js)")
    script = tmp_path / name
    here = re.sub(r"(http://)?localhost:8000", url, code)
    here = re.sub(r"(Client)\((\)|timeout)", rf'\1("{url}", \2', here)  # the default address
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
    assert re.fullmatch(prints, ended.stdout), ended.stdout
    script.unlink()
    assert {path.name for path in tmp_path.iterdir()} == leaves
    for path in tmp_path.iterdir():
        with Image.open(path) as image:
            assert image.size == ((64, 64) if path.name.startswith("heart") else (32, 32))


# A number beyond 2⁵³ − 1 as it stands in a body, then as text; then a seed that the server drew, sent back.
SEEDS_IN_JAVASCRIPT = """
const post = async (body) => {
  const reply = await fetch(process.argv[2] + "/generate", {
    method: "POST", headers: { "content-type": "application/json" }, body });
  return { status: reply.status, ...(await reply.json()) };
};
const large = await post('{"label": "ship", "seed": 1152921504606846977}');
console.log(large.status, large.error.param, large.error.message.includes("text of one"));
const text = await post('{"label": "ship", "seed": "1152921504606846977"}');
const again = await post(JSON.stringify({ label: "ship", seed: text.seed_text }));
console.log(text.seed_text, text.images[0].data === again.images[0].data);
const drawn = await post('{"label": "ship"}');
const same = await post(JSON.stringify({ label: "ship", seed: drawn.seed }));
console.log(Number.isSafeInteger(drawn.seed), drawn.images[0].data === same.images[0].data);
"""


@pytest.mark.skipif(shutil.which("node") is None, reason="no node on this machine (`make node` installs it)")
def test_a_seed_comes_back_from_javascript_as_it_went(url: str, tmp_path: Path) -> None:
    script = tmp_path / "seeds.mjs"
    script.write_text(SEEDS_IN_JAVASCRIPT, encoding="utf-8")
    done = subprocess.run(
        ["node", script, url], capture_output=True, text=True, timeout=PATIENCE, check=False
    )
    assert done.stdout.splitlines() == ["400 seed true", "1152921504606846977 true", "true true"], done.stderr
