"""`benchmarks.fleet` to its end: replicas are killed and restarted under load, behind both proxies."""

from __future__ import annotations

from pathlib import Path

from benchmarks import fleet, replicas
from tests.benchmarks.filed import filed
from tests.benchmarks.test_fleet import needs_proxies
from tests.tiny import tiny_bundle


@needs_proxies
def test_nothing_is_lost(tmp_path: Path) -> None:
    """Three replicas, as the configurations have them, and little load. Of two, one that HAProxy, which looks
    once a second, has not seen come back is missed while the other goes.
    """
    bundle = tiny_bundle(tmp_path / "tiny")
    options = ["--replicas", "3", "--clients", "2", "--seconds", "0.5", "--out", str(tmp_path)]
    code = fleet.main(["--bundle", str(bundle), *options])
    record, _ = filed(tmp_path, fleet.THEME)
    results = record["results"]
    assert (code, results["failures"]) == (0, [])
    rows = results["rows"]
    assert [(row["proxy"], row["event"]) for row in rows] == [
        (proxy, event) for proxy in replicas.PROXIES for event in fleet.EVENTS
    ]
    assert all(row["requests"] > 0 and row["lost"] == 0 for row in rows)
