"""Overlays with their components, as they would be applied."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from dd_core.hub.registry import find_spec
from dd_core.models.build import new_models, on_meta
from server.app import create_app
from server.settings import ENV_PREFIX, Settings
from tests.deploy.kustomize import KUBERNETES, OVERLAYS, needs_kubectl, one, overlaid, rendered

pytestmark = needs_kubectl

COMPONENTS = ("api-keys", "podmonitor", "gateway", "costs")
VERSIONS = ("1.37.0", "1.36.0", "1.35.0")
# Of the clients of other kinds: their schemas are not Kubernetes' own.
CUSTOM = {"ScaledObject", "PodMonitor", "HTTPRoute"}
UNITS = {"Mi": 2**20, "Gi": 2**30}


def _bytes(quantity: str) -> int:
    return int(quantity[:-2]) * UNITS[quantity[-2:]]


def _pod(manifests: list[Any]) -> Any:
    return one(manifests, "Deployment")["spec"]["template"]["spec"]


def _containers(manifests: list[Any]) -> list[Any]:
    pod = _pod(manifests)
    return [*pod.get("initContainers", []), *pod["containers"]]


@pytest.fixture(params=OVERLAYS)
def everything(request: pytest.FixtureRequest, tmp_path: Path) -> list[Any]:
    """An overlay with every component that fits any of them."""
    return overlaid(tmp_path, request.param, *COMPONENTS, "keda")


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("overlay", OVERLAYS)
@pytest.mark.parametrize("scaler", ["keda", "hpa"])
def test_kubernetes_knows_every_field(overlay: str, scaler: str, version: str, tmp_path: Path) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    manifests = overlaid(tmp_path, overlay, *COMPONENTS, scaler)
    for manifest in manifests:
        if manifest["kind"] not in CUSTOM:
            validate.validate(manifest, version, strict=True)
    assert {m["kind"] for m in manifests} >= {"Deployment", "Service", "PodDisruptionBudget", "NetworkPolicy"}


@pytest.mark.parametrize("version", VERSIONS)
def test_kubernetes_knows_every_field_of_the_job(version: str) -> None:
    validate = pytest.importorskip("kubernetes_validate")
    manifests = list(yaml.safe_load_all((KUBERNETES / "jobs" / "pairs.yaml").read_text(encoding="utf-8")))
    assert [manifest["kind"] for manifest in manifests] == ["Job", "NetworkPolicy"]
    for manifest in manifests:
        validate.validate(manifest, version, strict=True)
    job, policy = manifests
    selected = policy["spec"]["podSelector"]["matchLabels"].items()
    assert selected <= job["spec"]["template"]["metadata"]["labels"].items()


def test_the_folder_itself_is_the_overlay_of_cpus() -> None:
    assert rendered(KUBERNETES) == rendered(KUBERNETES / "overlays" / "cpu")


def test_every_container_has_no_rights_and_a_bound(everything: list[Any]) -> None:
    for container in _containers(everything):
        rights = container["securityContext"]
        assert rights["readOnlyRootFilesystem"] is True
        assert rights["allowPrivilegeEscalation"] is False
        assert rights["capabilities"] == {"drop": ["ALL"]}
        resources = container["resources"]
        assert "cpu" in resources["requests"]
        assert _bytes(resources["requests"]["memory"]) <= _bytes(resources["limits"]["memory"])


def test_every_volume_that_is_mounted_exists(everything: list[Any]) -> None:
    volumes = {volume["name"] for volume in _pod(everything)["volumes"]}
    for container in _containers(everything):
        assert {mount["name"] for mount in container["volumeMounts"]} <= volumes


def test_the_servers_variables_are_settings(everything: list[Any]) -> None:
    [container] = _pod(everything)["containers"]
    names = [entry["name"] for entry in container["env"]]
    assert len(names) == len(set(names))
    ours = {name for name in names if name.startswith(ENV_PREFIX)}
    assert ours <= {ENV_PREFIX + name.upper() for name in Settings.model_fields}


def test_a_rollout_needs_no_spare_gpu() -> None:
    for overlay in ("gpu", "published"):
        deployment = one(rendered(KUBERNETES / "overlays" / overlay), "Deployment")
        assert deployment["spec"]["strategy"]["rollingUpdate"] == {"maxUnavailable": 1, "maxSurge": 0}
        [server] = deployment["spec"]["template"]["spec"]["containers"]
        resources = server["resources"]
        assert resources["requests"]["nvidia.com/gpu"] == resources["limits"]["nvidia.com/gpu"] == "1"
        devices = {e["name"]: e["value"] for e in server["env"] if "value" in e}
        assert devices[ENV_PREFIX + "DEVICE"] == "auto"
        assert ENV_PREFIX + "THREADS" not in devices


def _weights(name: str) -> int:
    """Bytes of a published model's bundle, which is in float32."""
    spec = find_spec(name)
    with on_meta():
        models = [model for model in new_models(spec.vq, spec.student, spec.teacher) if model is not None]
    return sum(4 * tensor.numel() for model in models for tensor in model.state_dict().values())


def test_a_published_model_fits_into_its_memory_and_its_volume() -> None:
    manifests = rendered(KUBERNETES / "overlays" / "published")
    names = {e["value"] for c in _containers(manifests) for e in c["env"] if e["name"] == "DD_SERVER_MODEL"}
    [name] = names
    weights = _weights(name)
    assert weights > 2.5e9
    for container in _containers(manifests):
        assert _bytes(container["resources"]["requests"]["memory"]) >= 1.3 * weights
    volume = one(manifests, "PersistentVolumeClaim")["spec"]["resources"]["requests"]["storage"]
    assert _bytes(volume) >= 2 * weights
    [server] = _pod(manifests)["containers"]
    asked = {e["name"]: e.get("value") for e in server["env"]}
    home = [e for e in _pod(manifests)["initContainers"][0]["env"] if e["name"] == "DD_HOME"]
    assert home == [{"name": "DD_HOME", "value": asked["DD_HOME"]}]
    assert asked["HF_HUB_OFFLINE"] == "1"


def test_the_token_of_the_hub_is_a_file_of_those_who_fetch() -> None:
    manifests = rendered(KUBERNETES / "overlays" / "published")
    [hub] = [v["secret"] for v in _pod(manifests)["volumes"] if v["name"] == "hub"]
    assert hub == {"secretName": "dd-server-hub", "optional": True, "defaultMode": 0o440}
    for container in _containers(manifests):
        mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
        paths = [e["value"] for e in container["env"] if e["name"] == "HF_TOKEN_PATH"]
        assert paths == ([f"{mounts['hub']}/token"] if container["name"] != "server" else [])
        assert ("hub" in mounts) == (container["name"] != "server")


@pytest.mark.parametrize("scaler", ["keda", "hpa"])
def test_a_scaler_owns_the_number_of_replicas(scaler: str, tmp_path: Path) -> None:
    manifests = overlaid(tmp_path, "cpu", scaler)
    assert "replicas" not in one(manifests, "Deployment")["spec"]
    scaling = one(manifests, "ScaledObject" if scaler == "keda" else "HorizontalPodAutoscaler")
    assert scaling["spec"]["scaleTargetRef"]["name"] == one(manifests, "Deployment")["metadata"]["name"]


def test_a_pod_is_scraped_once(tmp_path: Path) -> None:
    manifests = overlaid(tmp_path, "cpu", "podmonitor")
    template = one(manifests, "Deployment")["spec"]["template"]
    assert "annotations" not in template["metadata"]
    monitor = one(manifests, "PodMonitor")["spec"]
    assert monitor["selector"]["matchLabels"].items() <= template["metadata"]["labels"].items()
    [container] = template["spec"]["containers"]
    assert monitor["podMetricsEndpoints"][0]["port"] in {port["name"] for port in container["ports"]}


def test_the_gateway_routes_what_clients_need_and_nothing_else(tmp_path: Path) -> None:
    route = one(overlaid(tmp_path, "cpu", "gateway"), "HTTPRoute")
    matches = [match["path"] for rule in route["spec"]["rules"] for match in rule["matches"]]

    def routed(path: str) -> bool:
        return any(
            path == match["value"]
            or (match["type"] == "PathPrefix" and path.startswith(match["value"] + "/"))
            for match in matches
        )

    paths = {re.sub(r"\{.*?\}", "x", path) for path in create_app(Settings()).openapi()["paths"]}
    own = {"/metrics", "/healthz"}
    assert own < paths
    assert {path for path in paths if not routed(path)} == own
    assert not routed("/admin/models") and not routed("/metrics.html")
    assert all(routed(path) for path in ("/", "/docs", "/static/style.css", "/favicon.ico"))
