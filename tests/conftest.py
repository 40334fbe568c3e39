"""What tests of every folder share."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.standins.redis_server import RedisServer


@pytest.fixture
def redis_server(tmp_path: Path) -> Iterator[RedisServer]:
    """A real, empty Redis for one test."""
    server = RedisServer(tmp_path).start()
    yield server
    server.kill()
