"""`dd-server` as a user types it."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from dd_core.bundle import file_entry
from dd_core.manifest import read_manifest, write_manifest
from server.cli import main
from server.launcher import bind
from tests.server.helpers import PATIENCE, Running

ROOT = Path(__file__).parent.parent.parent
Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Run:
    """Runs the command in this process: exit code, standard output, standard error."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["dd-server", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            main()
        captured = capfd.readouterr()
        assert isinstance(ended.value.code, int)
        return ended.value.code, captured.out, captured.err

    return call


def test_generate_writes_the_image_that_the_server_sends(
    run: Run, server: Running, bundle_folder: Path, tmp_path: Path
) -> None:
    out = tmp_path / "ship.png"
    common = ("--model", bundle_folder, "--device", "cpu", "--seed", 7)
    code, said, _ = run("generate", "--label", "ship", "--out", out, *common, "--steps", 2)
    assert code == 0
    assert "dd-2" in said
    reply = server.post({"label": "ship", "seed": 7, "steps": 2}, accept="image/png")
    assert out.read_bytes() == reply.content
    by_name = ("--plan", "dd-2", *common)
    assert run("generate", "--label", "ship", "--out", tmp_path / "named.png", *by_name)[0] == 0
    assert (tmp_path / "named.png").read_bytes() == reply.content
    assert "dd-1" in run("generate", "--label", "8", "--out", tmp_path / "8.webp", *common)[1]
    with Image.open(tmp_path / "8.webp") as image:
        assert image.format == "WEBP"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"--label": "shop"}, "unknown class 'shop'"),
        ({"--label": "10"}, "0 to 9"),
        ({"--steps": "0"}, "from 1 to 64"),
        ({"--steps": "1000000000"}, "from 1 to 64"),
        ({"--plan": "teachr"}, "dd-1, dd-2,"),
        ({"--plan": "dd-2", "--steps": "2"}, "not both"),
        ({"--seed": "-1"}, "--seed"),
        ({"--out": "ship.gif"}, ".webp"),
        ({"--out": "/nowhere/ship.png"}, "/nowhere/ship.png"),
        ({"--model": "nothing"}, "no bundle 'nothing'"),
        ({"--device": "tpu"}, "tpu"),
        ({"--sed": "7"}, "No such option"),
    ],
)
def test_a_mistake_gets_one_clear_line(
    run: Run, bundle_folder: Path, tmp_path: Path, change: dict[str, str], says: str
) -> None:
    options = {
        "--label": "ship",
        "--out": str(tmp_path / "a.png"),
        "--model": str(bundle_folder),
        "--device": "cpu",
    }
    code, _, error = run("generate", *[part for pair in (options | change).items() for part in pair])
    assert code == (1 if "nowhere" in says else 2)
    assert says in error
    assert "Traceback" not in error
    if error.startswith("dd-server: error:"):
        assert error.count("\n") == 1


def test_a_request_that_cannot_be_met_is_refused_before_the_weights_are_read(
    run: Run, bundle_folder: Path, tmp_path: Path
) -> None:
    folder = shutil.copytree(bundle_folder, tmp_path / "damaged")
    (folder / "student.safetensors").write_bytes(b"damaged")
    code, _, error = run("generate", "--label", "shop", "--out", tmp_path / "a.png", "--model", folder)
    assert code == 2 and "unknown class 'shop'" in error


def test_what_is_no_picture_is_not_written(run: Run, bundle_folder: Path, tmp_path: Path) -> None:
    """As the server, which answers 500."""
    folder = shutil.copytree(bundle_folder, tmp_path / "broken")
    weights = folder / "student.safetensors"
    state = {name: torch.full_like(tensor, torch.nan) for name, tensor in load_file(weights).items()}
    save_file(state, weights)
    manifest = read_manifest(folder)
    files = {**manifest.files, weights.name: file_entry(weights)}
    write_manifest(folder, manifest.model_copy(update={"files": files}))
    out = tmp_path / "a.png"
    code, _, error = run("generate", "--label", "ship", "--out", out, "--model", folder, "--device", "cpu")
    assert code == 1 and "not a number" in error
    assert not out.exists()


def test_models_lists_plans_with_their_cost(run: Run, bundle_folder: Path) -> None:
    code, said, _ = run("models", bundle_folder)
    assert code == 0
    assert re.search(r"^tiny: ", said)
    assert re.search(r"dd-1 +1 forward pass +FID 50.00\n", said)
    assert re.search(r"teacher +64 forward passes +FID 30.00\n", said)
    assert "onestep" not in said


def test_serve_refuses_a_taken_port(run: Run, bundle_folder: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        code, _, error = run("serve", bundle_folder, "--port", taken.getsockname()[1])
    assert code == 2
    assert "cannot listen" in error


def test_serve_refuses_a_bad_setting_by_its_name(
    run: Run, bundle_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DD_SERVER_MAX_BATCH", "none")
    code, _, error = run("serve", bundle_folder, "--port", 0)
    assert code == 2
    assert "DD_SERVER_MAX_BATCH" in error


def test_every_setting_is_a_flag(run: Run) -> None:
    from server.settings import Settings

    _, said, _ = run("serve", "--help")
    for name in set(Settings.model_fields) - {"model"}:
        assert f"--{name.replace('_', '-')}" in said


def test_serve_says_where_it_listens_and_drains_on_sigterm(bundle_folder: Path, tmp_path: Path) -> None:
    """A request that runs when the signal comes is answered, and the exit code is 0; all that with a
    temporary folder whose path is too long for a socket.
    """
    long = tmp_path / ("x" * 100)
    long.mkdir()
    command = [sys.executable, "-m", "server", "serve", str(bundle_folder), "--port", "0", "--device", "cpu"]
    command += ["--max-batch", "1"]  # so that the request below takes a while
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "TMPDIR": str(long)}
    with subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True) as process:
        try:
            assert process.stderr is not None
            lines = iter(process.stderr.readline, "")
            url = next(m[1] for line in lines if (m := re.search(r"listening on (http://\S+)", line)))
            assert any(line.rstrip().endswith("ready") for line in lines)
            replies: list[httpx.Response] = []
            body = {"label": 0, "steps": 64, "n": 16, "seed": 0}
            client = threading.Thread(
                target=lambda: replies.append(httpx.post(f"{url}/generate", json=body, timeout=PATIENCE))
            )
            client.start()
            while "dd_inflight_requests 1.0" not in httpx.get(f"{url}/metrics").text:
                assert client.is_alive(), "the request was answered before the signal"
            process.send_signal(signal.SIGTERM)
            client.join(PATIENCE)
            assert replies[0].status_code == 200
            assert len(replies[0].json()["images"]) == 16
            assert process.wait(PATIENCE) == 0
            with pytest.raises(httpx.ConnectError):
                httpx.get(f"{url}/healthz")
        finally:
            process.kill()


def test_a_start_that_waits_for_a_hub_ends_on_sigterm(tmp_path: Path) -> None:
    """By a handler: a signal without one does not reach the first process of a container."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environment |= {"PYTHONPATH": str(ROOT), "HF_HOME": str(tmp_path), "DD_HOME": str(tmp_path)}
        environment["HF_ENDPOINT"] = "http://{}:{}".format(*silent.getsockname())
        command = [sys.executable, "-m", "server", "serve", "var-dd-d16", "--port", "0"]
        with subprocess.Popen(
            command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                silent.settimeout(PATIENCE)
                connection, _ = silent.accept()
                with connection:
                    process.send_signal(signal.SIGTERM)
                    said = process.communicate(timeout=PATIENCE)[1]
                assert process.returncode == 0
                assert "stopped before the models were found" in said
            finally:
                process.kill()


def test_a_signal_to_all_of_its_processes_ends_a_start(bundle_folder: Path) -> None:
    """As systemd sends it: the process that device processes are forked from ends, and that is no failure."""
    command = [sys.executable, "-m", "server", "serve", str(bundle_folder), "--port", "0", "--device", "cpu"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        try:
            assert process.stderr is not None
            assert any("listening on" in line for line in iter(process.stderr.readline, ""))
            os.killpg(process.pid, signal.SIGTERM)
            said = process.communicate(timeout=PATIENCE)[1]
            assert process.returncode == 0, said
            assert "Traceback" not in said
        finally:
            process.kill()


def test_the_socket_refuses_clients_until_the_server_listens() -> None:
    with bind("127.0.0.1", 0) as bound, pytest.raises(ConnectionRefusedError):
        socket.create_connection(bound.getsockname(), timeout=5)
