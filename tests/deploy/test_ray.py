"""deploy/ray/serve.py in a Ray cluster of this machine, with two replicas behind Ray's own proxy."""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from benchmarks.accounts import descendants
from benchmarks.processes import free_port
from tests.server.helpers import OK, PATIENCE
from tests.tiny import tiny_bundle

ray = pytest.importorskip("ray", reason="Ray is not installed (`pip install 'ray[serve]'`)")
pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of pydantic and asyncio
ROOT = Path(__file__).parent.parent.parent
LONG = 5 * PATIENCE  # Ray, the server and PyTorch start anew
FOLDER = ROOT / "deploy" / "ray"


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    from ray import serve

    bundle = tiny_bundle(tmp_path_factory.mktemp("bundle") / "tiny")
    variables = {
        "PYTHONPATH": f"{ROOT}:{FOLDER}",
        "DD_SERVER_MODEL": str(bundle),
        "DD_SERVER_DEVICE": "cpu",
        "DD_SERVER_THREADS": "1",
        "DD_SERVER_MAX_BATCH": "2",
    }
    port = free_port()
    ray.init(num_cpus=4, include_dashboard=False, runtime_env={"env_vars": variables})
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FOLDER))
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            sys.modules.pop("serve", None)
            import serve as ours

            serve.run(ours.app, route_prefix="/")
            yield f"http://127.0.0.1:{port}"
        finally:
            serve.shutdown()
            ray.shutdown()


@pytest.fixture
def client(url: str) -> Iterator[httpx.Client]:
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


def processes() -> list[int]:
    """The processes of the replicas."""
    return [pid for pid in descendants(os.getpid()) if b"ray::ServeReplica" in _command(pid)]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def test_requests_are_sent_to_replicas_that_are_ready(client: httpx.Client) -> None:
    """The very first: a replica starts until its models are warm. Both make the same bytes."""
    replies = [client.post("/generate", json=OK) for _ in range(20)]
    assert [reply.status_code for reply in replies] == [200] * 20
    assert len({str(reply.json()["images"]) for reply in replies}) == 1
    assert client.get("/readyz").status_code == 200
    made = replicas(client, "dd_images_total")
    assert sum(made.values()) == 20 and set(made) == set(replicas(client)) and len(made) == 2
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


def test_when_a_replica_is_killed_requests_go_on(client: httpx.Client) -> None:
    before = set(replicas(client))
    victim, *others = processes()
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
