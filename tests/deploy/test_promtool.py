"""Prometheus' own opinion of our scrape configuration and alerts."""

from __future__ import annotations

import shutil
from pathlib import Path

import yaml

from tests.prometheus import needs_prometheus, promtool

pytestmark = needs_prometheus

FOLDER = Path(__file__).parent.parent.parent / "deploy" / "prometheus"


def test_the_scrape_configuration_is_valid(tmp_path: Path) -> None:
    """All of it but the discovery of pods, which Debian's Prometheus is built without."""
    config = yaml.safe_load((FOLDER / "prometheus.yml").read_text(encoding="utf-8"))
    for job in config["scrape_configs"]:
        if job.pop("kubernetes_sd_configs", None) is not None:
            job["static_configs"] = []
    for name in config["rule_files"]:
        shutil.copy(FOLDER / name, tmp_path / name)
    (tmp_path / "prometheus.yml").write_text(yaml.safe_dump(config), encoding="utf-8")
    said = promtool("check", "config", "--lint-fatal", tmp_path / "prometheus.yml")
    assert "prometheus.yml is valid prometheus config file syntax" in said
    assert all(name in said for name in config["rule_files"])


def test_the_alerts_are_valid() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
    count = sum(len(group["rules"]) for group in rules["groups"])
    said = promtool("check", "rules", "--lint-fatal", FOLDER / "alerts.yml")
    assert f"SUCCESS: {count} rules found" in said
