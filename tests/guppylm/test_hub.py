"""Models of others: only a model folder's files are downloaded, and trouble is one sentence."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from guppylm import checkpoint
from guppylm.hub import is_repository
from tests.standins.hub import Hub, files_of


def guppy(home: Path, endpoint: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The command, its hub at `endpoint` and its cache in `home`."""
    environment = {**os.environ, "HF_ENDPOINT": endpoint, "HF_HOME": str(home), "HF_HUB_DISABLE_TELEMETRY": "1"}
    environment |= {"NO_PROXY": "127.0.0.1", "COLUMNS": "400"}
    command = [sys.executable, "-m", "guppylm", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, check=False, timeout=600)


def test_pull_takes_the_files_of_a_model_folder_and_no_others(small_fish: Path, tmp_path: Path) -> None:
    others = {"pytorch_model.bin": b"pickle", "modeling_guppy.py": b"print('gotcha')", "data.parquet": b"x"}
    with Hub("nemo/nibbles", files_of(small_fish) | others) as hub:
        first = guppy(tmp_path, hub.address, "pull", "nemo/nibbles")
        assert first.returncode == 0, first.stderr
        wanted = ["README.md", "config.json", "model.safetensors", "tokenizer.json"]
        assert sorted(hub.downloaded) == wanted
        folder = Path(first.stdout.strip())
        assert sorted(path.name for path in folder.iterdir()) == wanted
        assert checkpoint.load(folder).model.config == checkpoint.load(small_fish).model.config
        again = guppy(tmp_path, hub.address, "pull", "nemo/nibbles@v1")
        assert again.stdout == first.stdout
        assert sorted(hub.downloaded) == wanted
    offline = guppy(tmp_path, hub.address, "pull", "nemo/nibbles")
    assert offline.stdout == first.stdout, offline.stderr


def test_pull_takes_pickled_weights_where_there_are_no_others(tmp_path: Path) -> None:
    with Hub("nemo/old", {"config.json": b"{}", "pytorch_model.bin": b"pickle", "setup.py": b"1/0"}) as hub:
        assert guppy(tmp_path, hub.address, "pull", "nemo/old").returncode == 0
        assert sorted(hub.downloaded) == ["config.json", "pytorch_model.bin"]


@pytest.mark.parametrize(
    ("name", "complaint"),
    [
        ("nemo/dory", "The hub has no model 'nemo/dory'"),
        ("nemo/nibbles@v9", "has no revision 'v9'"),
        ("nemo/ni--bbles", "no name that a model on the hub can have"),
        ("nibbles", "write owner/name"),
    ],
)
def test_a_model_that_is_not_there_is_named(tmp_path: Path, name: str, complaint: str) -> None:
    with Hub("nemo/nibbles", {"config.json": b"{}"}) as hub:
        result = guppy(tmp_path, hub.address, "pull", name)
    assert result.returncode in (1, 2)
    assert complaint in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


def test_without_network_it_says_so(tmp_path: Path) -> None:
    result = guppy(tmp_path, "http://127.0.0.1:9", "chat", "-p", "hi", "--model", "nemo/nibbles")
    assert result.returncode == 1
    assert result.stdout == ""
    assert "no folder 'nemo/nibbles'" in result.stderr
    assert "Check the network" in result.stderr
    assert result.stderr.count("\n") == 1, result.stderr


@pytest.mark.parametrize(
    ("name", "right"),
    [("a/b", True), ("nemo/guppy-9m@v1.0", True), ("guppy-9m", False), ("../b", False), ("/a/b", False),
     ("./a", False), ("a/b/c", False), ("a/b@", False), ("a b/c", False), ("", False)],
)  # fmt: skip
def test_what_is_written_like_a_repository(name: str, right: bool) -> None:
    assert is_repository(name) is right
