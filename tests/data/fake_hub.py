"""A Hugging Face hub on localhost: enough of its HTTP interface for downloads and data sets."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" * 6 + "abcd"


@contextmanager
def fake_hub(root: Path) -> Iterator[str]:
    """Serve `root/models/org/name/...` and `root/datasets/org/name/...`; yields the endpoint.

    A repository with `gated` in its name answers as a gated one does.
    """

    class Handler(_Handler):
        folder = root

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    folder: Path

    def log_message(self, *_: Any) -> None:
        """Keep the tests' output quiet."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        """`paths-info`: what is known of some paths."""
        length = int(self.headers["Content-Length"])
        asked = self.rfile.read(length).decode()
        wanted = (
            json.loads(asked)["paths"]
            if asked.startswith("{")
            else [
                unquote(part.split("=", 1)[1].replace("+", " "))
                for part in asked.split("&")
                if part.startswith("paths=")
            ]
        )
        parts = self._parts()
        repo = self.folder / parts[1] / parts[2] / parts[3]
        self._json([_entry(repo, repo / path) for path in wanted if (repo / path).exists()])

    def _parts(self) -> list[str]:
        return [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]

    def _answer(self) -> None:
        parts = self._parts()
        if parts[0] == "api" and len(parts) > 3:
            return self._api(self.folder / parts[1] / parts[2] / parts[3], parts[4:])
        if parts[0] != "datasets":
            parts.insert(0, "models")
        if len(parts) > 4 and parts[3] == "resolve":
            return self._file(self.folder / "/".join(parts[:3]), "/".join(parts[5:]))
        return self._refuse(404, "RepoNotFound")

    def _api(self, repo: Path, rest: list[str]) -> None:
        if "gated" in repo.name:
            return self._refuse(403, "GatedRepo")
        if not repo.is_dir():
            return self._refuse(404, "RepoNotFound")
        if rest[:1] == ["revision"] and rest[1] not in ("main", COMMIT):
            return self._refuse(404, "RevisionNotFound")
        if rest[:1] == ["tree"]:
            folder = repo.joinpath(*rest[2:])
            if not folder.is_dir():
                return self._refuse(404, "EntryNotFound")
            recursive = "recursive=true" in self.path.lower()
            found = folder.rglob("*") if recursive else folder.iterdir()
            return self._json([_entry(repo, path) for path in sorted(found)])
        files = [path for path in sorted(repo.rglob("*")) if path.is_file()]
        siblings = [{"rfilename": str(path.relative_to(repo))} for path in files]
        name = f"{repo.parent.name}/{repo.name}"
        return self._json(
            {"id": name, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        )

    def _file(self, repo: Path, name: str) -> None:
        if "gated" in repo.name:
            return self._refuse(403, "GatedRepo")
        if not repo.is_dir():
            return self._refuse(404, "RepoNotFound")
        if not (repo / name).is_file():
            return self._refuse(404, "EntryNotFound")
        content = (repo / name).read_bytes()
        if asked := re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")):
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
            content = content[first : last + 1]
        else:
            self.send_response(200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self._send(content)

    def _json(self, value: object) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self._send(json.dumps(value).encode())

    def _refuse(self, status: int, code: str) -> None:
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        self._send(b"")

    def _send(self, content: bytes) -> None:
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _entry(repo: Path, path: Path) -> dict[str, Any]:
    name = str(path.relative_to(repo))
    oid = hashlib.sha1(name.encode()).hexdigest()
    if path.is_dir():
        return {"type": "directory", "path": name, "oid": oid, "size": 0}
    return {"type": "file", "path": name, "oid": oid, "size": path.stat().st_size}
