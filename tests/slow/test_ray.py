"""deploy/ray/serve.py in a Ray cluster of this machine, with two replicas behind Ray's own proxy."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
import yaml

from benchmarks.accounts import descendants
from benchmarks.processes import free_port
from tests.server.helpers import OK, PATIENCE
from tests.tiny import tiny_bundle

# In an environment of its own, which sees the packages of this one.
SERVE = Path(f"{sys.prefix}-ray") / "bin" / "serve"
pytestmark = pytest.mark.skipif(not SERVE.exists(), reason="Ray is not installed (`make ray` does it)")
ROOT = Path(__file__).parent.parent.parent
FOLDER = ROOT / "deploy" / "ray"
LONG = 5 * PATIENCE  # Ray, the server and PyTorch start anew
# `serve run` ends with this after 60 s, which no setting moves: a busy machine needs another go.
GAVE_UP = "HTTP proxies not available"


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, subprocess.Popen[bytes]]]:
    """The application as `serve run` runs it; its address, and the process below which all others are."""
    folder = tmp_path_factory.mktemp("ray")
    url = f"http://127.0.0.1:{(port := free_port())}"
    application = {"name": "pictures", "import_path": "serve:app", "route_prefix": "/"}
    configuration = {"http_options": {"host": "127.0.0.1", "port": port}, "applications": [application]}
    (folder / "serve.yaml").write_text(yaml.safe_dump(configuration))
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}:{FOLDER}",
        "DD_SERVER_MODEL": str(tiny_bundle(folder / "tiny")),
        "DD_SERVER_DEVICE": "cpu",
        "DD_SERVER_THREADS": "1",
        "DD_SERVER_MAX_BATCH": "2",
        "RAY_USAGE_STATS_ENABLED": "0",
        # Ray kills a proxy that is not there within 5 s; beside other processes of tests on two cores its
        # imports alone take longer.
        "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S": str(PATIENCE),
    }

    def start() -> subprocess.Popen[bytes]:
        with (folder / "log").open("ab") as log:
            return subprocess.Popen(
                [SERVE, "run", folder / "serve.yaml"], env=environment, stdout=log, stderr=log
            )

    process = start()
    try:
        stop = time.monotonic() + LONG
        while not _answers(url):
            ended = process.poll() is not None
            last = (folder / "log").read_text(errors="replace")[-2000:]
            assert time.monotonic() < stop and (not ended or GAVE_UP in last), last
            if ended:
                process = start()
            time.sleep(0.2)
        yield url, process
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(LONG)


def _answers(url: str) -> bool:
    """True once Ray's proxy knows the application; until then it says 404."""
    try:
        return httpx.get(f"{url}/models", timeout=PATIENCE, trust_env=False).is_success
    except httpx.HTTPError:
        return False


@pytest.fixture
def client(cluster: tuple[str, object]) -> Iterator[httpx.Client]:
    url, _ = cluster
    with httpx.Client(base_url=url, timeout=PATIENCE, trust_env=False) as client:
        yield client


def replicas(client: httpx.Client, metric: str = "dd_ready") -> dict[str, float]:
    """By replica: the sum of a metric's series."""
    found: dict[str, float] = {}
    for labels, value in re.findall(
        rf"^{metric}\{{(.*)\}} (\S+)$", client.get("/metrics").text, re.MULTILINE
    ):
        [replica] = re.findall(r'replica="(\w+)"', labels)
        found[replica] = found.get(replica, 0.0) + float(value)
    return found


def processes(root: int) -> list[int]:
    """The processes of the replicas."""
    return [pid for pid in descendants(root) if b"ray::ServeReplica" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_requests_are_sent_to_replicas_that_are_ready(client: httpx.Client) -> None:
    """The very first: a replica starts until its models are warm. Both make the same bytes."""
    while len(replicas(client)) < 2:  # the other one starts
        assert client.post("/generate", json=OK).status_code == 200
    before = replicas(client, "dd_images_total")
    replies = [client.post("/generate", json=OK) for _ in range(20)]
    assert [reply.status_code for reply in replies] == [200] * 20
    assert len({str(reply.json()["images"]) for reply in replies}) == 1
    assert client.get("/readyz").status_code == 200
    made = replicas(client, "dd_images_total")
    assert sum(made.values()) == sum(before.values()) + 20 and len(made) == 2
    assert all(made.values()), "each has made some"


def test_errors_and_streams_come_through_as_they_are(client: httpx.Client) -> None:
    refused = client.post("/generate", json={**OK, "steps": 0})
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "steps")
    streamed = client.post("/generate", json=OK, headers={"accept": "text/event-stream"})
    assert "event: done" in streamed.text


def test_metrics_are_valid_and_of_every_replica(client: httpx.Client) -> None:
    from prometheus_client.parser import text_string_to_metric_families

    families = {family.name: family for family in text_string_to_metric_families(client.get("/metrics").text)}
    assert {sample.value for sample in families["dd_ready"].samples} == {1.0}
    seen = [tuple(sorted(s.labels.items())) for s in families["dd_requests"].samples]
    assert len(set(seen)) == len(seen)


def test_when_a_replica_is_killed_requests_go_on(
    client: httpx.Client, cluster: tuple[str, subprocess.Popen[bytes]]
) -> None:
    before = set(replicas(client))
    victim, *others = processes(cluster[1].pid)
    assert len(others) == 1
    os.kill(victim, signal.SIGKILL)
    stop, good = time.monotonic() + LONG, 0
    while good < 10:  # the other one answers; what the dead one had is lost, as Ray does not ask again
        assert time.monotonic() < stop
        good = good + 1 if client.post("/generate", json=OK).status_code == 200 else 0
    while len(replicas(client)) < 2:
        assert time.monotonic() < stop, "another one is ready"
        time.sleep(0.5)
    assert len(before & set(replicas(client))) == 1
    assert client.post("/generate", json=OK).status_code == 200
