"""A small MLflow server of an older version: REST 2.0 in memory, no LoggedModels, with a password."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl
from uuid import uuid4

USER, PASSWORD = "anna", "geheim-4711"


@dataclass
class OldServer:
    """What it was told; metrics are appended as a file store does, also those that it has."""

    version: str = "2.9.2"
    runs: dict[str, dict[str, Any]] = field(default_factory=dict)
    metrics: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    uri: str = ""
    asked: list[str] = field(default_factory=list)
    lose_answers: int = 0
    """So many requests that store metrics are carried out, and then their connection is cut."""

    def answer(self, method: str, path: str, body: dict[str, Any]) -> dict[str, Any] | None:
        """The answer to a request; None if there is no such endpoint."""
        match path.removeprefix("/api/2.0/mlflow/"):
            case "experiments/get-by-name":
                return {"experiment": {"experiment_id": "1", "name": "x", "artifact_location": "x"}}
            case "experiments/set-experiment-tag" | "runs/log-inputs":
                return {}
            case "runs/create":
                run = uuid4().hex
                info = {"run_id": run, "experiment_id": "1", "status": "RUNNING"}
                info |= {"start_time": body["start_time"], "lifecycle_stage": "active"}
                info |= {"artifact_uri": f"mlflow-artifacts:/{run}", "run_name": body["run_name"]}
                self.runs[run] = {"info": info, "data": {"tags": body["tags"], "params": []}}
                return {"run": self.runs[run]}
            case "runs/search":
                return {"runs": []}
            case "runs/get":
                return {"run": self.runs[body["run_id"]]}
            case "runs/update":
                self.runs[body["run_id"]]["info"]["status"] = body["status"]
                return {"run_info": self.runs[body["run_id"]]["info"]}
            case "runs/log-batch":
                data = self.runs[body["run_id"]]["data"]
                data["params"] += body.get("params", [])
                data["tags"] = [*data["tags"], *body.get("tags", [])]
                self.metrics.setdefault(body["run_id"], []).extend(body.get("metrics", []))
                return {}
            case "metrics/get-history":
                points = self.metrics.get(body["run_id"], [])
                return {"metrics": [p for p in points if p["key"] == body["metric_key"]]}
        return None

    def steps(self, name: str) -> list[int]:
        """The steps of a metric of the second run, the trial's; doubles included."""
        points = self.metrics.get(list(self.runs)[1], [])
        return [int(point.get("step", 0)) for point in points if point["key"] == name]


@contextmanager
def old_server() -> Iterator[OldServer]:
    """Run one on a free port of the loopback."""
    state = OldServer()

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            """Say nothing."""

        def _send(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def _handle(self) -> None:
            path, _, query = self.path.partition("?")
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            state.asked.append(path)
            wanted = base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
            if path == "/version":
                return self._send(200, state.version.encode())
            if self.headers.get("Authorization") != f"Basic {wanted}":
                return self._send(401, b"You are not authenticated.")
            if path.startswith("/api/2.0/mlflow-artifacts/artifacts/"):
                state.files[path.partition("artifacts/artifacts/")[2]] = content
                return self._send(200, b"{}")
            body = json.loads(content) if content else dict(parse_qsl(query))
            answer = state.answer(self.command, path, body)
            if answer is not None and body.get("metrics") and state.lose_answers:
                state.lose_answers -= 1
                return self.connection.close()
            if answer is None:
                return self._send(404, b"<h1>Not Found</h1>")
            return self._send(200, json.dumps(answer).encode())

        do_GET = do_POST = do_PUT = do_PATCH = _handle

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    state.uri = f"http://127.0.0.1:{server.server_port}"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
