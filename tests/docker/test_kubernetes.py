"""The manifests of docker/kubernetes: valid by Kubernetes' published schemas, and as tight as the compose file."""

from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "docker/kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
MANIFESTS: dict[str, dict[str, Any]] = {
    f"{manifest['kind']} {manifest['metadata']['name']}": manifest
    for file in KUSTOMIZATION["resources"]
    for manifest in yaml.safe_load_all((FOLDER / file).read_text())
}
PODS = {
    name: manifest["spec"]["template"]["spec"]
    for name, manifest in MANIFESTS.items()
    if manifest["kind"] == "Deployment"
}


@pytest.mark.parametrize("name", MANIFESTS)
def test_a_manifest_follows_the_published_schema(name: str) -> None:
    kubernetes_validate.validate(MANIFESTS[name], "1.31", strict=True)


def test_every_file_is_applied() -> None:
    assert {path.name for path in FOLDER.glob("*.yaml")} == {"kustomization.yaml", *KUSTOMIZATION["resources"]}


@pytest.mark.parametrize("name", PODS)
def test_a_pod_is_held_as_tight_as_it_can_work(name: str) -> None:
    pod = PODS[name]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"] == {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}}
    [container] = pod["containers"]
    assert container["securityContext"] == {
        "readOnlyRootFilesystem": True,
        "allowPrivilegeEscalation": False,
        "capabilities": {"drop": ["ALL"]},
    }
    assert "memory" in container["resources"]["limits"]
    assert {"livenessProbe", "readinessProbe"} <= set(container)
    assert container["image"] in {image["name"] for image in KUSTOMIZATION["images"]}


@pytest.mark.parametrize("role", ["worker", "discord", "telegram"])
def test_a_role_is_asked_for_its_own_progress(role: str) -> None:
    pod = PODS[f"Deployment {role}"]
    [container] = pod["containers"]
    assert container["command"] == ["python", "-m", "bot", role]
    assert container["livenessProbe"]["exec"]["command"] == ["python", "-m", "bot", "health", role]
    secrets = {source["secret"]["name"] for source in pod["volumes"][0]["projected"]["sources"]}
    assert secrets == {"guppy-redis"} | ({f"guppy-{role}"} - {"guppy-worker"})
