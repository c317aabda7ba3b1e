"""What Prometheus itself makes of `/metrics`: its linter, and a real one that scrapes the server."""

from __future__ import annotations

import json
import math
import re
import subprocess
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing.managers import SyncManager
from pathlib import Path
from typing import Any

import httpx
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.processes import free_port
from server.observability.metrics import OUTCOMES
from tests.prometheus import needs_prometheus, promtool
from tests.server.helpers import OK, Gate, Running, busy, eventually, running

pytestmark = needs_prometheus

ALERTS = Path(__file__).parents[3] / "deploy" / "prometheus" / "alerts.yml"
# All of ours, and those among them that change in a server that only answers `/metrics`.
NAMES = "dd_.+"
RESTLESS = "dd_http_.+|dd_worker_cpu_.+|dd_worker_resident_.+"
Series = dict[frozenset[tuple[str, str]], float]


def _ok(live: Running, gate: Gate, pool: Executor) -> None:
    assert live.post({"label": 0, "n": 1, "format": "webp"}).status_code == 200


def _invalid(live: Running, gate: Gate, pool: Executor) -> None:
    assert live.post({"label": "nothing"}).status_code == 400


def _rejected(live: Running, gate: Gate, pool: Executor) -> None:
    """The device is busy and the one place in the queue is taken."""
    runs = busy(live, gate, pool)
    waits = pool.submit(live.post, {"label": 1})
    eventually(lambda: live.depth == 1, "one waits")
    assert live.post({"label": 2}).status_code == 429
    gate.open.set()
    assert runs.result().status_code == waits.result().status_code == 200


def _canceled(live: Running, gate: Gate, pool: Executor) -> None:
    gate.open.clear()
    with pytest.raises(httpx.ReadTimeout):
        live.client.post("/generate", json={"label": 6}, timeout=0.3)
    eventually(lambda: _counted(live, "canceled") == 1, "the server notices")
    gate.open.set()


def _error(live: Running, gate: Gate, pool: Executor) -> None:
    gate.poisoned.value = 5
    assert live.post({"label": 5}).status_code == 500
    gate.poisoned.value = -1


def _oom(live: Running, gate: Gate, pool: Executor) -> None:
    gate.exhausting.value = 5
    assert live.post({"label": 5}).status_code == 500
    gate.exhausting.value = -1


def _deadline(live: Running, gate: Gate, pool: Executor) -> None:
    assert live.post({"label": 1, "deadline_ms": 0.001}).status_code in (503, 504)


PROVOKE: dict[str, Callable[[Running, Gate, Executor], None]] = {
    "ok": _ok,
    "invalid": _invalid,
    "rejected": _rejected,
    "canceled": _canceled,
    "error": _error,
    "oom": _oom,
    "deadline": _deadline,
}


def _series(live: Running) -> Series:
    """All of ours that `/metrics` shows now."""
    families = text_string_to_metric_families(live.client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples]
    return {
        _key({**s.labels, "__name__": s.name}): s.value
        for s in samples
        if re.fullmatch(NAMES, s.name) and not re.fullmatch(RESTLESS, s.name)
    }


def _key(labels: dict[str, str]) -> frozenset[tuple[str, str]]:
    # Versions of Prometheus write the bounds of buckets differently: 1 and 1.0.
    return frozenset((k, str(float(v)) if k == "le" else v) for k, v in labels.items())


def _counted(live: Running, outcome: str) -> float:
    wanted = {("__name__", "dd_requests_total"), ("outcome", outcome)}
    return sum(value for key, value in _series(live).items() if wanted <= key)


@pytest.fixture(scope="module")
def lived(bundle_folder: Path, manager: SyncManager) -> Iterator[Running]:
    """A server that has answered requests of every outcome, and rests."""
    gate = Gate(calls=manager.list())
    assert set(PROVOKE) == set(OUTCOMES), "an outcome that nothing here provokes"
    with (
        running(bundle_folder, gate, queue_size=1, max_images=1, max_batch=1) as live,
        ThreadPoolExecutor(4) as pool,
    ):
        for provoke in PROVOKE.values():
            provoke(live, gate, pool)
        idle = {"dd_inflight_requests", "dd_queue_depth"}
        eventually(lambda: all(_series(live)[_key({"__name__": n})] == 0 for n in idle), "it rests")
        assert all(_counted(live, outcome) >= 1 for outcome in OUTCOMES)
        yield live


def test_promtool_has_no_remark_on_the_metrics(lived: Running) -> None:
    """Names, units, help texts and types; of every series that requests can bring about."""
    assert promtool("check", "metrics", given=lived.client.get("/metrics").text) == ""


class Prometheus:
    """A Prometheus that scrapes one server, asked through its own interface."""

    def __init__(self, url: str) -> None:
        self._client = httpx.Client(base_url=url, timeout=30, trust_env=False)

    def is_ready(self) -> bool:
        try:
            return self._client.get("/-/ready").status_code == 200
        except httpx.TransportError:
            return False

    def get(self, path: str, **parameters: str) -> Any:
        reply = self._client.get(f"/api/v1/{path}", params=parameters).raise_for_status().json()
        assert reply["status"] == "success", reply
        return reply["data"]

    def series(self, query: str) -> Series:
        """The newest value of each series, without the labels that scraping adds."""
        found = self.get("query", query=query)["result"]
        scraped = {"instance", "job"}
        return {
            _key({k: v for k, v in each["metric"].items() if k not in scraped}): float(each["value"][1])
            for each in found
        }

    def close(self) -> None:
        self._client.close()


@contextmanager
def prometheus(target: str, folder: Path) -> Iterator[Prometheus]:
    """A real Prometheus in `folder`, with our alerts, until the block ends."""
    config = {
        # Long enough for a busy machine: a scrape that takes longer is none.
        "global": {"scrape_interval": "1s", "scrape_timeout": "1s", "evaluation_interval": "1s"},
        "rule_files": [str(ALERTS)],
        "scrape_configs": [{"job_name": "dd-server", "static_configs": [{"targets": [target]}]}],
    }
    (folder / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    address = f"127.0.0.1:{free_port()}"
    command = ["prometheus", f"--config.file={folder / 'prometheus.yml'}", "--log.level=error"]
    command += [f"--storage.tsdb.path={folder / 'data'}", f"--web.listen-address={address}"]
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(command, cwd=folder, stdout=log, stderr=log)
    asked = Prometheus(f"http://{address}")
    try:
        eventually(lambda: process.poll() is not None or asked.is_ready(), "Prometheus is ready")
        assert process.poll() is None, (folder / "log").read_text(encoding="utf-8")
        yield asked
    finally:
        asked.close()
        process.terminate()
        process.wait(60)


@pytest.fixture(scope="module")
def asked(lived: Running, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """A Prometheus that scrapes that server, and has seen requests and a stream."""
    with prometheus(lived.url.removeprefix("http://"), tmp_path_factory.mktemp("prometheus")) as found:
        eventually(lambda: bool(found.series("dd_ready")), "a scrape")
        for body in (OK, {"label": "nothing"}):
            lived.post(body)
        streamed = lived.post(OK, accept="text/event-stream")
        assert "event: done" in streamed.text
        eventually(lambda: bool(found.series("rate(dd_images_total[10m]) > 0")), "scrapes before and after")
        yield found


def test_prometheus_scrapes_what_the_server_counts(lived: Running, asked: Prometheus) -> None:
    shown = _series(lived)
    eventually(
        lambda: asked.series(f'{{__name__=~"{NAMES}",__name__!~"{RESTLESS}"}}') == shown, "it has scraped"
    )
    assert set(asked.series("up").values()) == {1.0}
    sums = asked.series("sum by (outcome) (dd_requests_total)")
    assert sums == {_key({"outcome": name}): _counted(lived, name) for name in OUTCOMES}
    # A rule that Prometheus cannot evaluate on these series says so.
    eventually(lambda: {rule["health"] for rule in _rules(asked)} == {"ok"}, json.dumps(_rules(asked)))


def _rules(asked: Prometheus) -> list[Any]:
    return [rule for group in asked.get("rules")["groups"] for rule in group["rules"]]


DASHBOARD = ALERTS.parents[1] / "grafana" / "dd-server.json"
# Queries of the dashboard that find nothing on this server: it has no GPU, and no request got a cheaper plan.
EMPTY = {"Memory B", "Cheaper plans than asked for A"}


def _queries() -> dict[str, str]:
    """The queries of the dashboard by panel, with its variables filled in as Grafana does."""
    panels = json.loads(DASHBOARD.read_text(encoding="utf-8"))["panels"]
    values = {"$job": ".*", "$instance": ".*", "$__rate_interval": "10m"}
    found = {}
    for panel in panels:
        for target in panel.get("targets", ()):
            query = target["expr"]
            for name, value in values.items():
                query = query.replace(name, value)
            found[f"{panel['title']} {target['refId']}"] = query
    return found


def _unanswered(asked: Prometheus, queries: Mapping[str, str]) -> set[str]:
    """The queries that find nothing, or no number."""
    found = {name: asked.get("query", query=query)["result"] for name, query in queries.items()}
    return {
        name
        for name, series in found.items()
        if not any(math.isfinite(float(each["value"][1])) for each in series)
    }


def test_every_query_of_the_dashboard_finds_something(asked: Prometheus) -> None:
    """By a real Prometheus that has seen requests of every outcome; Grafana itself is not run."""
    queries = _queries()
    assert len(queries) > 20
    eventually(lambda: _unanswered(asked, queries) == EMPTY, f"each finds something, but {EMPTY}")


PAGE = ALERTS.parents[2] / "docs" / "04-metrics.md"
# Of the questions, those whose subject this server has not: prompts, a GPU, plans to choose from, a death.
SUBJECTS_ELSEWHERE = {
    *("dd_text_encode_seconds", "dd_device_memory_bytes", "dd_plan_downgrades_total"),
    "dd_worker_recovery_seconds",
}


def _questions() -> dict[str, str]:
    """The queries of the page, each by its question and its place under that."""
    found: dict[str, str] = {}
    for block in re.findall(
        r"^```promql\n(.*?)^```$", PAGE.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE
    ):
        for part in block.strip().split("\n\n"):
            question, rest = part.split("\n", 1)
            assert question.startswith("# "), part
            queries = re.split(r"\n(?! )", rest)  # a line that is indented goes on with the one before
            found |= {f"{question} {number}": query for number, query in enumerate(queries)}
    return found


def test_every_question_of_the_page_is_answered(asked: Prometheus) -> None:
    """By the query as it stands there: copied, it works."""
    queries = _questions()
    assert len(queries) > 30
    elsewhere = {name for name, query in queries.items() if any(word in query for word in SUBJECTS_ELSEWHERE)}
    assert len(elsewhere) == len(SUBJECTS_ELSEWHERE)
    for name, query in queries.items():
        if name not in elsewhere:
            eventually(
                lambda query=query: not _unanswered(asked, {"": query}), f"{name} is answered: {query}"
            )
