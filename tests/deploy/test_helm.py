"""The chart renders what the overlays and components render, by Helm itself."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.deploy.kustomize import HELM, KUBERNETES, needs_helm, needs_kubectl, overlaid

pytestmark = [needs_kubectl, needs_helm]

CHART = KUBERNETES.parent / "helm" / "distilled-decoding"
# Components, and the options of the chart that are called after them.
OPTIONS = {
    "api-keys": "apiKeys.enabled=true",
    "costs": "costs.enabled=true",
    "podmonitor": "podMonitor.enabled=true",
    "gateway": "gateway.enabled=true",
    "keda": "scaling.kind=keda",
    "hpa": "scaling.kind=hpa",
}
VALUES = {"cpu": "values.yaml", "gpu": "values-gpu.yaml", "published": "values-published.yaml"}


def helm(command: str, *arguments: str) -> str:
    done = subprocess.run(
        [str(HELM), command, *arguments], capture_output=True, text=True, check=False, cwd=CHART.parent
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _plain(value: Any) -> Any:
    """With lists of named things as dictionaries: their order means nothing."""
    if isinstance(value, list):
        names = [
            each.get("name", each.get("mountPath")) if isinstance(each, dict) else None for each in value
        ]
        if names and None not in names and len(set(names)) == len(names):
            return {name: _plain(each) for name, each in zip(names, value, strict=True)}
        return [_plain(each) for each in value]
    return {key: _plain(each) for key, each in value.items()} if isinstance(value, dict) else value


def _by_name(manifests: list[Any]) -> Any:
    return {(m["kind"], m["metadata"]["name"]): _plain(m) for m in manifests if m is not None}


@pytest.mark.parametrize("overlay", VALUES)
@pytest.mark.parametrize(
    "components", [(), ("api-keys", "podmonitor", "keda"), ("gateway", "hpa", "costs")], ids=str
)
def test_the_chart_is_the_overlay(overlay: str, components: tuple[str, ...], tmp_path: Path) -> None:
    chosen = [word for name in components for word in ("--set", OPTIONS[name])]
    said = helm("template", "any", str(CHART), "-f", str(CHART / VALUES[overlay]), *chosen)
    charted = _by_name(list(yaml.safe_load_all(said)))
    overlays = _by_name(overlaid(tmp_path, overlay, *components))
    assert charted.keys() == overlays.keys()
    for name, manifest in overlays.items():
        assert charted[name] == manifest, name


def test_every_component_is_an_option_of_the_chart() -> None:
    ours = {"gpu", "model-cache"}  # in the overlays already
    assert {path.name for path in (KUBERNETES / "components").iterdir()} == OPTIONS.keys() | ours


def test_helm_has_no_remark_on_the_chart() -> None:
    assert "0 chart(s) failed" in helm("lint", "--strict", str(CHART))


def test_a_scaler_that_does_not_exist_is_refused() -> None:
    with pytest.raises(AssertionError, match="keda, hpa or empty"):
        helm("template", "any", str(CHART), "--set", "scaling.kind=vpa")


@pytest.mark.parametrize("model", ["", "var-dd-d16,cifar10"])
def test_a_volume_is_of_one_published_model(model: str) -> None:
    """Its init containers fetch that, and wait for nothing else."""
    with pytest.raises(AssertionError, match="needs model: the name of one published model"):
        helm(
            "template",
            "any",
            str(CHART),
            "--set",
            "modelCache.enabled=true",
            "--set-string",
            f"model={model.replace(',', chr(92) + ',')}",
        )


@pytest.mark.parametrize("proxies", ["*", "fd00::/8", "10.0.0.0/8"])
def test_every_form_of_trusted_proxies_renders(proxies: str) -> None:
    manifests = list(
        yaml.safe_load_all(helm("template", "any", str(CHART), "--set", f"trustedProxies={proxies}"))
    )
    [deployment] = [m for m in manifests if m is not None and m["kind"] == "Deployment"]
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    assert {"name": "DD_SERVER_TRUSTED_PROXIES", "value": proxies} in container["env"]


def test_a_scaler_counts_this_releases_pods_alone() -> None:
    chosen = ("scaling.kind=keda", "name=emoji", "scaling.namespace=pictures")
    said = helm("template", "any", str(CHART), *(word for each in chosen for word in ("--set", each)))
    [scaler] = [m for m in yaml.safe_load_all(said) if m is not None and m["kind"] == "ScaledObject"]
    for trigger in scaler["spec"]["triggers"]:
        [pods] = re.findall(r'namespace="pictures",pod=~"([^"]+)"', trigger["metadata"]["query"])
        assert re.fullmatch(pods, "emoji-7d4b9c6f5-x2x9k")
        assert not re.fullmatch(pods, "emoji-large-7d4b9c6f5-x2x9k")
    assert "fallback" not in scaler["spec"], "while Prometheus is away the fleet stays as it is"
