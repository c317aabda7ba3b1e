"""checkov's opinion of what the overlays, the chart and the Dockerfile ask for, where it is installed."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kustomize import KUBERNETES, OVERLAYS, needs_helm, needs_kubectl, overlaid
from tests.deploy.test_helm import CHART, OPTIONS, VALUES, helm

ROOT = KUBERNETES.parents[1]
LIST = ROOT / ".ci" / "checkov.yaml"
# In an environment of its own, beside that of the tests: it pins what they use.
_OWN = Path(f"{sys.prefix}-checkov") / "bin" / "checkov"
CHECKOV = str(_OWN) if _OWN.exists() else shutil.which("checkov")
COMPONENTS = ("api-keys", "podmonitor", "gateway", "costs")

pytestmark = [
    needs_kubectl,
    needs_helm,
    pytest.mark.skipif(CHECKOV is None, reason="no checkov on this machine (`make checkov` installs it)"),
]


def _write(folder: Path) -> None:
    """All that is checked: each overlay with every component that fits it, and the chart with its options."""
    options = [word for name in (*COMPONENTS, "keda") for word in ("--set", OPTIONS[name])]
    for overlay in OVERLAYS:
        (folder / overlay).mkdir()
        manifests = overlaid(folder / overlay, overlay, *COMPONENTS, "keda")
        (folder / overlay / "kustomization.yaml").unlink()
        (folder / overlay / "overlay.yaml").write_text(yaml.safe_dump_all(manifests), encoding="utf-8")
        charted = helm("template", "any", str(CHART), "-f", str(CHART / VALUES[overlay]), *options)
        (folder / overlay / "chart.yaml").write_text(charted, encoding="utf-8")
    shutil.copy(KUBERNETES / "jobs" / "pairs.yaml", folder)
    shutil.copy(ROOT / "docker" / "Dockerfile", folder)


def test_what_checkov_finds_is_listed_with_its_reason(tmp_path: Path) -> None:
    """And nothing is listed that it does not find."""
    text = LIST.read_text(encoding="utf-8")
    config: dict[str, Any] = yaml.safe_load(text)
    reasons = dict(re.findall(r"^  - (\w+) # (.{20,})$", text, re.MULTILINE))
    assert list(reasons) == config["skip-check"]
    _write(tmp_path)
    frameworks = [word for name in config["framework"] for word in ("--framework", name)]
    command = [
        str(CHECKOV),
        "--skip-download",
        "--quiet",
        *frameworks,
        "--output",
        "json",
        "--directory",
        ".",
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    reports = {report["check_type"]: report for report in json.loads(done.stdout)}
    assert set(reports) == set(config["framework"])
    found = {name: report["results"]["failed_checks"] for name, report in reports.items()}
    assert all(report["summary"]["passed"] > 50 for report in reports.values())
    assert not any(report["summary"]["parsing_errors"] for report in reports.values())
    failed = {f"{each['check_id']}: {each['check_name']}" for every in found.values() for each in every}
    assert {line.split(":")[0] for line in failed} == set(reasons), failed
