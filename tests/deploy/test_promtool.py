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


def test_every_alert_fires_when_it_should_and_not_before() -> None:
    assert "SUCCESS" in promtool("test", "rules", FOLDER / "alerts_test.yml")
    tests = yaml.safe_load((FOLDER / "alerts_test.yml").read_text(encoding="utf-8"))["tests"]
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))["groups"][0]["rules"]
    seen = {
        rule["alertname"]: seen
        for test in tests
        if (seen := [bool(r["exp_alerts"]) for r in test["alert_rule_test"]])
        for rule in test["alert_rule_test"]
    }
    assert seen == {rule["alert"]: [False, True] for rule in rules}


def test_the_alerts_are_valid() -> None:
    rules = yaml.safe_load((FOLDER / "alerts.yml").read_text(encoding="utf-8"))
    count = sum(len(group["rules"]) for group in rules["groups"])
    said = promtool("check", "rules", "--lint-fatal", FOLDER / "alerts.yml")
    assert f"SUCCESS: {count} rules found" in said
