"""What goes into the images: the locks, and nothing but what is needed."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]
DOCKERFILES = [*sorted((ROOT / "docker").glob("*.Dockerfile")), ROOT / "docker/redis/Dockerfile"]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def locked(name: str) -> dict[str, str]:
    """Package -> version."""
    text = (ROOT / f"docker/locks/{name}.lock").read_text()
    return dict(re.findall(r"^([a-z0-9.-]+)==([^ ;\\]+)", text, re.MULTILINE))


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@pytest.mark.parametrize(
    ("locks", "extras"),
    [(["bot"], ["discord", "telegram"]), (["worker", "torch-cpu"], ["model"]), (["worker", "torch-cuda"], ["model"])],
)
def test_the_locks_hold_what_the_project_asks_for(locks: list[str], extras: list[str]) -> None:
    versions = {name: version for lock in locks for name, version in locked(lock).items()}
    needed = [*PROJECT["dependencies"], *(d for extra in extras for d in PROJECT["optional-dependencies"][extra])]
    for requirement in map(Requirement, needed):
        assert _normal(requirement.name) in versions, f"{requirement} is not locked: run docker/locks/update.sh"
        assert requirement.specifier.contains(versions[_normal(requirement.name)]), requirement


@pytest.mark.parametrize("lock", ["bot", "worker", "torch-cpu", "torch-cuda"])
def test_every_locked_package_has_the_hashes_of_its_files(lock: str) -> None:
    paragraphs = re.split(r"^(?=[a-z])", (ROOT / f"docker/locks/{lock}.lock").read_text(), flags=re.MULTILINE)
    for paragraph in paragraphs:
        if "==" in paragraph:
            assert "--hash=sha256:" in paragraph, paragraph


def test_the_adapters_image_has_no_torch() -> None:
    assert not {"torch", "tokenizers", "safetensors"} & set(locked("bot"))


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_an_image_runs_as_nobody_special_and_says_what_it_is(dockerfile: Path) -> None:
    text = dockerfile.read_text()
    final = text[text.rindex("\nFROM ") :]
    assert re.search(r"^USER [1-9]\d*(:\d+)?$", final, re.MULTILINE)
    for label in ("title", "description", "licenses", "version", "revision"):
        assert f"org.opencontainers.image.{label}=" in final
    assert "TOKEN" not in text
    assert "PASSWORD" not in text
    assert "--require-hashes" in text or "pip" not in text


@pytest.mark.parametrize("dockerfile", DOCKERFILES, ids=lambda path: path.name)
def test_the_dockerfiles_are_well_made(dockerfile: Path) -> None:
    hadolint = Path(sys.executable).with_name("hadolint")
    lint = subprocess.run([hadolint, dockerfile], capture_output=True, text=True, check=False)
    assert lint.stdout + lint.stderr == ""


def test_the_builder_gets_neither_secrets_nor_history() -> None:
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if line and line[0] != "#"]
    assert lines[0] == "*"
    allowed = {line[1:].split("/")[0] for line in lines if line.startswith("!")}
    assert allowed == {"bot", "guppylm", "docker"}
