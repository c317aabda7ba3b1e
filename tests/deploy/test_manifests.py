"""The manifests, the image and the alerts agree with the server that they run."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from server.app import create_app
from server.devices.placement import devices_of
from server.observability import tracing
from server.observability.metrics import OUTCOMES, Metrics
from server.settings import ENV_PREFIX, Settings

ROOT = Path(__file__).parent.parent.parent
KUBERNETES = ROOT / "deploy" / "kubernetes"
BASE, COMPONENTS, OVERLAYS = (KUBERNETES / name for name in ("base", "components", "overlays"))
PROMETHEUS = ROOT / "deploy" / "prometheus"
DOCKERFILE = (ROOT / "docker" / "Dockerfile").read_text(encoding="utf-8")


def _yaml(path: Path) -> Any:
    return yaml.safe_load(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def paths() -> set[str]:
    return set(create_app(Settings()).openapi()["paths"])


@pytest.fixture
def pod() -> Any:
    return _yaml(BASE / "deployment.yaml")["spec"]["template"]


@pytest.fixture
def container(pod: Any) -> Any:
    (only,) = pod["spec"]["containers"]
    return only


def _environment(container: Any) -> dict[str, str]:
    return {entry["name"]: entry["value"] for entry in container["env"]}


@pytest.mark.parametrize("folder", [BASE, *COMPONENTS.iterdir(), *OVERLAYS.iterdir()], ids=lambda p: p.name)
def test_kustomization_names_every_manifest(folder: Path) -> None:
    found = _yaml(folder / "kustomization.yaml")
    patches = [patch["path"] for patch in found.get("patches", []) if "path" in patch]
    resources = [name for name in found.get("resources", []) if name.endswith(".yaml")]
    others = {path.name for path in folder.glob("*.yaml")} - {"kustomization.yaml"}
    assert {*patches, *resources} == others
    assert all("namespace" not in _yaml(folder / name)["metadata"] for name in others)


def test_environment_is_valid_settings(container: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each variable exists and has a value that the server accepts."""
    variables = {n: v for n, v in _environment(container).items() if n.startswith(ENV_PREFIX)}
    known = {ENV_PREFIX + name.upper() for name in Settings.model_fields}
    assert set(variables) <= known
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert settings.host == "0.0.0.0"
    assert settings.log_format == "json"
    assert {port["name"]: port["containerPort"] for port in container["ports"]} == {"http": settings.port}


def test_threads_are_the_cores_that_a_pod_asks_for() -> None:
    [cpu] = _yaml(OVERLAYS / "cpu" / "deployment.yaml")["spec"]["template"]["spec"]["containers"]
    variables = _environment(cpu)
    processes = devices_of(variables[ENV_PREFIX + "DEVICE"])
    threads = len(processes) * int(variables[ENV_PREFIX + "THREADS"])
    assert threads == int(cpu["resources"]["requests"]["cpu"])


@pytest.mark.parametrize("kind", ["startupProbe", "readinessProbe", "livenessProbe"])
def test_probes_ask_paths_that_exist(kind: str, container: Any, paths: set[str]) -> None:
    probe = container[kind]["httpGet"]
    assert probe["port"] == "http"
    assert probe["path"] in paths
    assert probe["path"] == ("/healthz" if kind == "livenessProbe" else "/readyz")


def test_scrape_annotations_match(pod: Any, container: Any, paths: set[str]) -> None:
    annotations = pod["metadata"]["annotations"]
    assert annotations["prometheus.io/scrape"] == "true"
    assert annotations["prometheus.io/path"] in paths
    assert int(annotations["prometheus.io/port"]) == container["ports"][0]["containerPort"]


def test_a_pod_is_given_time_to_drain(pod: Any, container: Any) -> None:
    """preStop, the drain, the last batch (5 s, server/app.py) and the last traces all fit before the kill."""
    sleep, seconds = container["lifecycle"]["preStop"]["exec"]["command"]
    assert sleep == "sleep"
    drain = float(_environment(container)[ENV_PREFIX + "DRAIN_TIMEOUT"])
    assert pod["spec"]["terminationGracePeriodSeconds"] > int(seconds) + drain + 5 + tracing._FLUSH_SECONDS


@pytest.fixture
def keyed() -> Any:
    """The pod of the patch that the component of API keys puts on the Deployment."""
    component = KUBERNETES / "components" / "api-keys"
    kustomization = _yaml(component / "kustomization.yaml")
    assert kustomization["kind"] == "Component"
    [patch] = kustomization["patches"]
    deployment, patched = _yaml(BASE / "deployment.yaml"), _yaml(component / patch["path"])
    for part in ("apiVersion", "kind"):
        assert patched[part] == deployment[part]
    assert patched["metadata"]["name"] == deployment["metadata"]["name"]
    return patched["spec"]["template"]["spec"]


def test_components_are_offered_in_the_kustomization() -> None:
    folder = OVERLAYS / "cpu"
    text = (folder / "kustomization.yaml").read_text(encoding="utf-8")
    uncommented = yaml.safe_load(re.sub(r"^# (?=components|  - )", "", text, flags=re.MULTILINE))
    assert "../../components/api-keys" in uncommented["components"]
    assert all((folder / path / "kustomization.yaml").exists() for path in uncommented["components"])


def test_the_component_of_keys_fits_the_pod(keyed: Any, pod: Any, container: Any) -> None:
    """The file that the server is told of is in a folder that the Secret is mounted at, for its group."""
    [patched] = keyed["containers"]
    assert patched["name"] == container["name"]
    [mount] = patched["volumeMounts"]
    assert mount["readOnly"] is True
    assert "subPath" not in mount, "would never be updated"
    assert mount["mountPath"] not in {m["mountPath"] for m in container["volumeMounts"]}
    [volume] = keyed["volumes"]
    assert volume["name"] == mount["name"]
    assert volume["name"] not in {v["name"] for v in pod["spec"]["volumes"]}
    assert volume["secret"]["defaultMode"] == 0o440
    assert pod["spec"]["securityContext"]["fsGroup"] == pod["spec"]["securityContext"]["runAsGroup"]
    variables = _environment(patched)
    assert not set(variables) & set(_environment(container))
    assert set(variables) == {ENV_PREFIX + "API_KEYS_FILE"}
    folder, _, key = variables[ENV_PREFIX + "API_KEYS_FILE"].rpartition("/")
    assert folder == mount["mountPath"]
    made = (KUBERNETES / "components" / "api-keys" / "kustomization.yaml").read_text(encoding="utf-8")
    assert f"secret generic {volume['secret']['secretName']} --from-file={key}=" in made


def test_no_secret_is_in_the_repository() -> None:
    texts = [path.read_text(encoding="utf-8") for path in KUBERNETES.rglob("*.yaml")]
    kinds = [manifest.get("kind") for text in texts for manifest in yaml.safe_load_all(text)]
    assert len(kinds) > 5
    assert "Secret" not in kinds


def test_selectors_select_the_pod(pod: Any) -> None:
    labels = pod["metadata"]["labels"].items()
    names = ("deployment", "service", "pdb", "networkpolicy")
    deployment, service, budget, policy = (_yaml(BASE / f"{name}.yaml") for name in names)
    assert deployment["spec"]["selector"]["matchLabels"].items() <= labels
    assert service["spec"]["selector"].items() <= labels
    assert budget["spec"]["selector"]["matchLabels"].items() <= labels
    assert policy["spec"]["podSelector"]["matchLabels"].items() <= labels
    # One can always go: a minimum would hold up the drain of a node for ever where there is one replica.
    assert (budget["spec"]["maxUnavailable"], "minAvailable" in budget["spec"]) == (1, False)
    assert service["spec"]["ports"][0]["targetPort"] == "http"


def test_the_pod_runs_as_the_image_does(pod: Any, container: Any) -> None:
    """The same user, no rights, and the one writable place is the image's HOME."""
    user, group = re.findall(r"^USER (\d+):(\d+)$", DOCKERFILE, re.MULTILINE)[-1]
    security = pod["spec"]["securityContext"]
    assert security["runAsNonRoot"] is True
    assert (str(security["runAsUser"]), str(security["runAsGroup"])) == (user, group)
    assert int(user) != 0
    rights = container["securityContext"]
    assert rights["readOnlyRootFilesystem"] is True
    assert rights["allowPrivilegeEscalation"] is False
    assert rights["capabilities"] == {"drop": ["ALL"]}
    assert container["volumeMounts"] == [{"name": "tmp", "mountPath": "/tmp"}]
    assert "HOME=/tmp" in DOCKERFILE


def test_kserve_runs_the_server_as_the_manifests_do(paths: set[str], monkeypatch: pytest.MonkeyPatch) -> None:
    text = (KUBERNETES.parent / "kserve" / "inferenceservice.yaml").read_text(encoding="utf-8")
    runtime, service = yaml.safe_load_all(text)
    model = service["spec"]["predictor"]["model"]
    assert model["runtime"] == runtime["metadata"]["name"]
    assert model["modelFormat"]["name"] == runtime["spec"]["supportedModelFormats"][0]["name"]
    [container] = runtime["spec"]["containers"]
    assert (container["name"], container["args"]) == ("kserve-container", ["serve", "/mnt/models"])
    for name, value in _environment(container).items():
        monkeypatch.setenv(name, value)
    settings = Settings()
    assert {port["containerPort"] for port in container["ports"]} == {settings.port}
    probe = container["readinessProbe"]["httpGet"]
    assert (probe["path"] in paths, probe["port"]) == (True, settings.port)
    assert runtime["spec"]["annotations"]["prometheus.io/path"] in paths


def test_the_image_listens_where_it_says() -> None:
    (port,) = re.findall(r"^EXPOSE (\d+)$", DOCKERFILE, re.MULTILINE)
    variables = dict(re.findall(rf"\b({ENV_PREFIX}[A-Z_]+)=(\S+)", DOCKERFILE))
    assert variables == {
        "DD_SERVER_HOST": "0.0.0.0",
        "DD_SERVER_PORT": port,
        "DD_SERVER_LOG_FORMAT": "json",
    }
    entry, command = (
        json.loads(re.findall(rf"^{word} (\[.*\])$", DOCKERFILE, re.MULTILINE)[-1])
        for word in ("ENTRYPOINT", "CMD")
    )
    assert (entry, command) == (["dd-server"], ["serve"])


def test_the_image_gets_what_it_copies() -> None:
    """A path that the Dockerfile copies and .dockerignore hides would fail the build."""
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    copied = re.findall(r"^COPY (?!--from)(.+) \S+$", DOCKERFILE, re.MULTILINE)
    sources = {source for line in copied for source in line.split()}
    assert sources == {line[1:] for line in ignore if line.startswith("!")}
    assert all((ROOT / source).exists() for source in sources)


def test_alerts_use_metrics_and_outcomes_that_exist() -> None:
    """An alert on a series that is never exposed never fires."""
    exposed = {"up", "process_start_time_seconds"}
    metrics = Metrics()
    for family in metrics.registry.collect():
        exposed |= {family.name}
        exposed |= {family.name + suffix for suffix in ("_total", "_bucket", "_sum", "_count")}
    (group,) = _yaml(PROMETHEUS / "alerts.yml")["groups"]
    assert group["rules"]
    for rule in group["rules"]:
        names = set(re.findall(r"\b(dd_[a-z_]+|up|process_[a-z_]+)\b", rule["expr"]))
        assert names, rule["alert"]
        assert names <= exposed, rule["alert"]
        outcomes = re.findall(r'outcome[!=~]+"([\w|]+)"', rule["expr"])
        assert {outcome for found in outcomes for outcome in found.split("|")} <= set(OUTCOMES)
        assert rule["annotations"]["summary"]


def test_every_alert_has_its_section_of_the_runbook() -> None:
    """In the order of the alerts, each with its three parts; the annotation leads there."""
    (group,) = _yaml(PROMETHEUS / "alerts.yml")["groups"]
    page = (ROOT / "docs" / "19-runbook.md").read_text(encoding="utf-8")
    _, *sections = re.split(r"^## ", page, flags=re.MULTILINE)
    assert [section.split("\n")[0] for section in sections] == [rule["alert"] for rule in group["rules"]]
    for rule, section in zip(group["rules"], sections, strict=True):
        assert rule["annotations"]["runbook_url"] == f"docs/19-runbook.md#{rule['alert'].lower()}"
        assert re.findall(r"^\*\*(.*?)\*\*:", section, re.MULTILINE) == ["Means", "First look", "Remedy"]


def test_the_table_of_proxies_says_what_their_files_say() -> None:
    """A proxy closes an idle connection before the server does, and bears the pauses of a stream."""
    page = (ROOT / "docs" / "20-fleet.md").read_text(encoding="utf-8")
    patterns = {
        "nginx.conf": (r"keepalive_timeout (\d+)s", r"proxy_read_timeout (\d+)s"),
        "haproxy.cfg": (r"timeout http-keep-alive (\d+)s", r"timeout server (\d+)s"),
    }
    for name, found in patterns.items():
        text = (KUBERNETES.parent / "proxy" / name).read_text(encoding="utf-8")
        idle, silence = (re.findall(pattern, text)[0] for pattern in found)
        assert f"| `deploy/proxy/{name}` | {idle} s | {silence} s |" in page
        assert int(idle) < Settings().keep_alive_timeout
        assert int(silence) > 10
    assert f"`DD_SERVER_KEEP_ALIVE_TIMEOUT`, {Settings().keep_alive_timeout:.0f} s" in page


def test_prometheus_scrapes_the_default_address(paths: set[str]) -> None:
    config = _yaml(PROMETHEUS / "prometheus.yml")
    local = config["scrape_configs"][0]
    assert local["metrics_path"] in paths
    assert local["static_configs"] == [{"targets": [f"{Settings().host}:{Settings().port}"]}]
    assert all((PROMETHEUS / name).exists() for name in config["rule_files"])
