"""The compose files: what they promise of every container, and that they and the settings know each other."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from bot.lifetime import GRACE
from bot.settings import Settings

ROOT = Path(__file__).parents[2]
OVERLAYS = sorted((ROOT / "docker").glob("compose.*.yml"))
ROLES = ("worker", "discord", "telegram")


class _Loader(yaml.SafeLoader):
    """YAML with compose's own tags."""


_Loader.add_constructor("!reset", lambda loader, node: loader.construct_sequence(node))


def compose(path: Path = ROOT / "docker-compose.yml") -> dict[str, Any]:
    loaded: dict[str, Any] = yaml.load(path.read_text(), _Loader)
    return loaded


SERVICES = compose()["services"]


@pytest.mark.parametrize("service", SERVICES)
def test_every_container_is_held_as_tight_as_it_can_work(service: str) -> None:
    of = SERVICES[service]
    assert of["read_only"] is True
    assert of["cap_drop"] == ["ALL"]
    assert "no-new-privileges:true" in of["security_opt"]
    assert of["init"] is True
    assert of["logging"]["options"] == {"max-size": "10m", "max-file": "3"}
    assert set(of["deploy"]["resources"]["limits"]) == {"memory", "pids"}
    assert not {"privileged", "cap_add", "devices", "pid", "ipc", "network_mode", "user"} & set(of)


@pytest.mark.parametrize("service", SERVICES)
def test_nothing_is_published_and_only_adapters_reach_the_internet(service: str) -> None:
    assert not {"ports", "expose"} & set(SERVICES[service])
    assert ("internet" in SERVICES[service]["networks"]) == (service in ("discord", "telegram"))
    assert compose()["networks"]["queue"] == {"internal": True}


@pytest.mark.parametrize("role", ROLES)
def test_every_role_is_asked_for_its_own_progress_and_has_time_to_finish(role: str) -> None:
    assert SERVICES[role]["command"] == ["/app/run-role.sh", role]
    assert SERVICES[role]["healthcheck"]["test"] == ["CMD", "python", "-m", "bot", "health", role]
    assert int(SERVICES[role]["stop_grace_period"].removesuffix("s")) > GRACE
    assert SERVICES[role]["depends_on"] == {"redis": {"condition": "service_healthy"}}


@pytest.mark.parametrize("service", SERVICES)
def test_every_service_comes_back_after_a_crash_and_after_the_host_restarts(service: str) -> None:
    # on-failure would leave a container down that ended in good order when the host did.
    assert SERVICES[service]["restart"] == "unless-stopped"


def test_every_setting_reaches_whom_it_concerns_and_no_other_name_does() -> None:
    known = {f"GUPPY_{name.upper()}" for name in Settings.model_fields}
    handed = {role: set(SERVICES[role]["environment"]) for role in ROLES}
    metrics = {"GUPPY_METRICS_HOST", "GUPPY_METRICS_PORT"}
    for role in ROLES:
        assert handed[role] <= known, role
        assert set(compose(ROOT / "docker/compose.metrics.yml")["services"][role]["environment"]) == metrics
    # The password is a secret, not a variable.
    assert set().union(*handed.values()) | metrics | {"GUPPY_REDIS_PASSWORD"} == known
    assert not any("TELEGRAM" in name for name in handed["discord"])
    assert not any("DISCORD" in name for name in handed["telegram"])
    assert not any("TOKEN" in name for name in handed["worker"])


@pytest.mark.parametrize("platform", ["discord", "telegram"])
def test_an_adapter_is_started_only_with_its_token(platform: str) -> None:
    assert SERVICES[platform]["deploy"]["replicas"] == f"0${{GUPPY_{platform.upper()}_TOKEN:+1}}"


@pytest.mark.parametrize("overlay", OVERLAYS, ids=lambda path: path.name)
def test_an_overlay_speaks_of_services_and_folders_that_exist(overlay: Path) -> None:
    services = compose(overlay)["services"]
    for name, service in services.items():
        assert name in SERVICES or {"image", "healthcheck", "read_only", "cap_drop", "restart"} <= set(service), name
        for volume in service.get("volumes", []):
            if volume.startswith("."):
                assert (ROOT / volume.split(":")[0]).exists(), volume
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "metrics are for this machine"


def test_every_compose_file_follows_the_published_schema(tmp_path: Path) -> None:
    checked = []
    for file in [ROOT / "docker-compose.yml", *OVERLAYS, ROOT / "docker/prove/compose.yml"]:
        checked.append(tmp_path / f"{file.parent.name}-{file.stem}.json")  # JSON, because it knows no !reset
        checked[-1].write_text(json.dumps(compose(file)))
    checker = Path(sys.executable).with_name("check-jsonschema")
    check = subprocess.run(
        [checker, "--builtin-schema", "vendor.compose-spec", *checked], capture_output=True, text=True, check=False
    )
    assert check.returncode == 0, check.stdout


@pytest.mark.skipif(
    shutil.which("docker") is None
    or subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode != 0,
    reason="needs docker compose, which holds the schema",
)
@pytest.mark.parametrize("overlay", [None, *OVERLAYS], ids=lambda path: path.name if path else "alone")
def test_compose_itself_reads_it(overlay: Path | None, tmp_path: Path) -> None:
    (tmp_path / "env").write_text("GUPPY_DISCORD_TOKEN=t\n")
    files = ["-f", "docker-compose.yml", *(["-f", str(overlay)] if overlay else [])]
    config = subprocess.run(
        ["docker", "compose", "--env-file", str(tmp_path / "env"), *files, "config"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert config.returncode == 0, config.stderr
    services = yaml.safe_load(config.stdout)["services"]
    assert services["discord"]["deploy"]["replicas"] == 1
    if overlay is None:
        assert services["telegram"]["deploy"]["replicas"] == 0


def test_the_proof_covers_every_service() -> None:
    script = (ROOT / "docker/prove.sh").read_text()
    for service in SERVICES:
        assert re.search(rf"\b{service}\b", script)
