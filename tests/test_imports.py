"""The two lines that keep the parts apart: guppylm never imports bot, and no adapter needs torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


def test_guppylm_never_imports_bot() -> None:
    for path in (ROOT / "guppylm").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not [name for name in names if name.split(".")[0] == "bot"], path


@pytest.mark.parametrize("module", ["bot.fish", "bot.discord", "bot.telegram", "bot.queue", "bot.__main__"])
def test_adapters_start_without_torch(module: str) -> None:
    """Their image has no torch: importing it there would be a crash at start."""
    code = f"import sys; sys.modules['torch'] = None; sys.modules['tokenizers'] = None; import {module}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
