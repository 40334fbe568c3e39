"""A model hub for tests: serves one model as huggingface_hub asks for it, and remembers what was asked."""

from __future__ import annotations

import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """Serves `files` as the model `name`, at its revisions `main` and `v1`. Use it with `with`."""

    def __init__(self, name: str, files: dict[str, bytes]) -> None:
        self.name, self.files = name, files
        self.downloaded: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self) -> None:
                self._serve(body=False)

            def do_GET(self) -> None:
                self._serve(body=True)

            def _serve(self, *, body: bool) -> None:
                status, headers, content = hub.respond(unquote(urlsplit(self.path).path), body)
                self.send_response(status)
                for key, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(key, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_port}"

    def respond(self, path: str, body: bool) -> tuple[int, dict[str, str], bytes]:
        """(status, headers, content) for a path."""
        api, resolve = f"/api/models/{self.name}", f"/{self.name}/resolve/"
        if path.startswith(resolve):
            revision, _, name = path.removeprefix(resolve).partition("/")
            if name not in self.files:
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            if body:
                self.downloaded.append(name)
            content = self.files[name]
            return 200, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'}, content
        if path != api and not path.startswith(f"{api}/"):
            return 404, {"X-Error-Code": "RepoNotFound"}, b'{"error": "Repository not found"}'
        kind, _, revision = path.removeprefix(api).lstrip("/").partition("/")
        if revision not in ("", "main", "v1", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b'{"error": "Invalid rev id"}'
        found: object = {
            "id": self.name,
            "modelId": self.name,
            "sha": COMMIT,
            "private": False,
            "tags": [],
            "downloads": 0,
            "likes": 0,
            "siblings": [{"rfilename": name} for name in self.files],
        }
        if kind == "tree":
            found = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.files.items()
            ]
        return 200, {"Content-Type": "application/json"}, json.dumps(found).encode()

    def __enter__(self) -> Hub:
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()


def files_of(folder: Path) -> dict[str, bytes]:
    """The files of a model folder."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
