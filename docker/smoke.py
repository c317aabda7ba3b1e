"""Asks a built image for a picture: starts the server, waits, generates, stops it.

Runs inside the image, with nothing but the standard library:

    docker run --rm --entrypoint python distilled-decoding -c "$(cat docker/smoke.py)"
"""

import base64
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

# Generous, since a machine that builds images is often busy.
START_SECONDS = 600
STOP_SECONDS = 120
BILL = Path("/opt/sbom.cdx.json")


def wait_until_ready(base: str, server: subprocess.Popen[bytes]) -> float:
    """Seconds until /readyz said 200; exits where the server ended or took too long."""
    began = time.monotonic()
    while time.monotonic() - began < START_SECONDS:
        if server.poll() is not None:
            sys.exit(f"the server ended with status {server.returncode} before it was ready")
        try:
            with urllib.request.urlopen(f"{base}/readyz", timeout=2):
                return time.monotonic() - began
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.2)
    sys.exit(f"the server was not ready after {START_SECONDS} s")


def generate(base: str, accept: str, **body: object) -> bytes:
    """The reply to one generate request."""
    headers = {"content-type": "application/json", "accept": accept}
    request = urllib.request.Request(f"{base}/generate", json.dumps(body).encode(), headers)
    with urllib.request.urlopen(request, timeout=300) as reply:
        return bytes(reply.read())


def main() -> None:
    if os.getuid() == 0:
        sys.exit("the image runs as root")
    installers = [name for name in ("pip", "setuptools") if importlib.util.find_spec(name)]
    if installers:
        sys.exit(f"the image can install: it has {' and '.join(installers)}")
    bill = json.loads(BILL.read_text(encoding="utf-8"))
    listed = {component["name"]: component["version"] for component in bill["components"]}
    if "torch" not in listed:
        sys.exit(f"the bill of materials has no torch: {sorted(listed)}")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    base = f"http://127.0.0.1:{port}"
    server = subprocess.Popen(["dd-server", "serve", "--host", "127.0.0.1", "--port", str(port)])
    try:
        seconds = wait_until_ready(base, server)
        picture = generate(base, "image/png", label=0, seed=7)
        if not picture.startswith(b"\x89PNG\r\n\x1a\n"):
            sys.exit(f"not a PNG: {picture[:80]!r}")
        reply = json.loads(generate(base, "application/json", label=0, seed=7))
        if base64.b64decode(reply["images"][0]["data"]) != picture:
            sys.exit("the same seed gave two pictures")
        drawn = generate(base, "image/png", prompt="a smiling cat with sunglasses", seed=7)
        if not drawn.startswith(b"\x89PNG\r\n\x1a\n"):
            sys.exit(f"not a PNG of a prompt: {drawn[:80]!r}")
        server.send_signal(signal.SIGTERM)
        status = server.wait(STOP_SECONDS)
        if status != 0:
            sys.exit(f"the server ended with status {status} after SIGTERM")
    finally:
        server.kill()
    made = f"{reply['model']} made a PNG of {len(picture)} bytes by plan {reply['plan']}"
    made += f", and one of {len(drawn)} bytes followed a prompt"
    packages = f"{len(listed)} packages are listed, torch {listed['torch']} among them"
    sys.stdout.write(f"ready after {seconds:.1f} s; {made}; {packages}\n")


main()
