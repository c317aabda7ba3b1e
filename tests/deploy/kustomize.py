"""The manifests as `kubectl kustomize` renders them, where there is a kubectl."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

KUBERNETES = Path(__file__).parents[2] / "deploy" / "kubernetes"
OVERLAYS = ("cpu", "gpu", "published")
# Where `make kubernetes` puts them; else those of the machine.
_PATH = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
KUBECTL, HELM = (shutil.which(name, path=_PATH) for name in ("kubectl", "helm"))
needs_kubectl = pytest.mark.skipif(
    KUBECTL is None, reason="no kubectl on this machine (`make kubernetes` installs one)"
)
needs_helm = pytest.mark.skipif(
    HELM is None, reason="no helm on this machine (`make kubernetes` installs it)"
)


def rendered(folder: Path) -> list[Any]:
    """All manifests of a kustomization."""
    done = subprocess.run(
        [str(KUBECTL), "kustomize", "--load-restrictor", "LoadRestrictionsNone", str(folder)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def overlaid(folder: Path, overlay: str, *components: str) -> list[Any]:
    """An overlay with components, rendered from a kustomization in `folder`."""
    here = Path(os.path.relpath(KUBERNETES, folder))
    kustomization = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "resources": [str(here / "overlays" / overlay)],
        "components": [str(here / "components" / name) for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(kustomization), encoding="utf-8")
    return rendered(folder)


def one(manifests: list[Any], kind: str) -> Any:
    """The only manifest of a kind."""
    [found] = [manifest for manifest in manifests if manifest["kind"] == kind]
    return found
