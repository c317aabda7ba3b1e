"""`make fleet`: what its Prometheus is told; `tests/slow` runs it."""

from __future__ import annotations

from pathlib import Path

from benchmarks import local_fleet
from tests.prometheus import needs_prometheus, promtool


@needs_prometheus
def test_the_scrape_configuration_names_the_replicas(tmp_path: Path) -> None:
    text = local_fleet.prometheus_configuration([9001, 9002])
    assert 'targets: ["127.0.0.1:9001", "127.0.0.1:9002"]' in text
    assert "kubernetes_sd_configs" not in text
    (tmp_path / "prometheus.yml").write_text(text, encoding="utf-8")
    assert "rules found" in promtool("check", "config", tmp_path / "prometheus.yml")
