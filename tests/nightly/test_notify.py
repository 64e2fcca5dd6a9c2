"""Notifications through apprise itself, to a server of the test's own."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from sweeper.nightly.notify import notify

apprise = pytest.importorskip("apprise")


@pytest.fixture
def server() -> Iterator[tuple[int, list[dict[str, str]]]]:
    """A port of the loopback, and what was posted to it."""
    posted: list[dict[str, str]] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    listening = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listening.serve_forever, daemon=True)
    thread.start()
    yield listening.server_address[1], posted
    listening.shutdown()
    listening.server_close()


def test_digest_is_sent_to_every_address(server: tuple[int, list[dict[str, str]]]) -> None:
    """Title and text arrive; addresses that are not set are left out."""
    port, posted = server
    assert notify([f"json://127.0.0.1:{port}", None, ""], "nightly mine", "# The page") == []
    assert [each["title"] for each in posted] == ["nightly mine"]
    assert "The page" in posted[0]["message"]


def test_failure_is_a_sentence_without_the_address(
    server: tuple[int, list[dict[str, str]]],
) -> None:
    """An address nobody listens at and one of no known kind; the third is still served."""
    port, posted = server
    urls = ["json://user:hunter2@127.0.0.1:9", "nonsense://hunter2", f"json://127.0.0.1:{port}"]
    problems = notify(urls, "title", "text")
    assert problems == ["notify[0]: not sent", "notify[1]: apprise does not support this URL"]
    assert len(posted) == 1


def test_nothing_to_send_needs_no_apprise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without an address the extra need not be installed; with one, its absence is told."""
    monkeypatch.setitem(__import__("sys").modules, "apprise", None)
    assert notify([None], "title", "text") == []
    assert "pip install 'sweeper[nightly]'" in notify(["json://x"], "title", "text")[0]
