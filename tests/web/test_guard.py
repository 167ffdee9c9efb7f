"""What passes the guard, in front of an application that only notes what came."""

from __future__ import annotations

import asyncio
import json
from collections.abc import MutableMapping
from pathlib import Path
from typing import Any

import pytest

from flashsloth.web.guard import API, JSON_BYTES, UPLOAD, WAITING_FILES, Guard

FILE_BYTES = 100_000


class Noted:
    """The application behind the guard."""

    def __init__(self) -> None:
        self.bodies: list[bytes] = []

    async def __call__(self, scope: MutableMapping[str, Any], receive: Any, send: Any) -> None:
        body, more = b"", scope["method"] == "POST"
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        self.bodies.append(body)
        await send({"type": "http.response.start", "status": 200, "headers": []})
        await send({"type": "http.response.body", "body": b"passed"})


def answer(
    folder: Path, method: str, path: str, body: bytes = b"", length: str | None = None, kind: str = "http"
) -> tuple[int, str, list[bytes]]:
    """Status, text, and the bodies that passed; the body comes in two pieces."""
    noted = Noted()
    half = len(body) // 2
    pieces = [(body[:half], True), (body[half:], False)]
    sent: list[MutableMapping[str, Any]] = []

    async def receive() -> MutableMapping[str, Any]:
        piece, more = pieces.pop(0)
        return {"type": "http.request", "body": piece, "more_body": more}

    async def send(message: MutableMapping[str, Any]) -> None:
        sent.append(message)

    length = str(len(body)) if length is None else length
    headers = [(b"content-length", length.encode())] if length else []
    scope = {"type": kind, "method": method, "path": path, "headers": headers}
    asyncio.run(Guard(noted, folder, FILE_BYTES)(scope, receive, send))
    if kind == "websocket":
        return sent[0]["code"], sent[0]["type"], noted.bodies
    return sent[0]["status"], sent[1]["body"].decode(), noted.bodies


@pytest.mark.parametrize("path", ["/", "/config", "/assets/index.js", "/static/img/a.svg", f"{API}/heartbeat/abc"])
def test_what_the_page_reads_passes(tmp_path: Path, path: str) -> None:
    assert answer(tmp_path, "GET", path)[0] == 200


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", f"{API}/file=/etc/passwd"),
        ("GET", f"{API}/file/etc/passwd"),
        ("GET", f"{API}/proxy=http://127.0.0.1:1/"),
        ("GET", f"{API}/stream/a/b/c/playlist-file"),
        ("GET", f"{API}/vibe-code"),
        ("GET", f"{API}/runs"),
        ("GET", "/monitoring"),
        ("GET", "/docs"),
        ("GET", "/custom_component/a/b/c/d"),
        ("POST", f"{API}/run/ask"),
        ("POST", f"{API}/api/ask"),
        ("POST", f"{API}/component_server"),
        ("POST", f"{API}/process_recording"),
        ("POST", "/"),
        ("PUT", "/"),
        ("DELETE", UPLOAD),
        ("OPTIONS", UPLOAD),
    ],
)
def test_nothing_else_does(tmp_path: Path, method: str, path: str) -> None:
    assert answer(tmp_path, method, path) == (404, "There is nothing at this address.", [])


def test_sockets_are_closed(tmp_path: Path) -> None:
    assert answer(tmp_path, "GET", "/", kind="websocket") == (1008, "websocket.close", [])


def test_bodies_have_a_size(tmp_path: Path) -> None:
    join = f"{API}/queue/join"
    assert answer(tmp_path, "POST", join, b"{}", length="")[0] == 411
    assert answer(tmp_path, "POST", join, b"{}", length="-1")[0] == 411
    assert answer(tmp_path, "POST", join, b"{}", length=str(JSON_BYTES + 1))[0] == 413
    assert answer(tmp_path, "POST", UPLOAD, bytes(FILE_BYTES))[0] == 200
    status, text, passed = answer(tmp_path, "POST", UPLOAD, bytes(FILE_BYTES + 20_000))
    assert (status, text, passed) == (413, "The file is too large; 0.1 MB is the most.", [])


def test_uploads_wait_in_bounded_number(tmp_path: Path) -> None:
    for number in range(WAITING_FILES + 1):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "photo.png").touch()
    assert answer(tmp_path, "POST", UPLOAD, b"data")[0] == 503
    assert answer(tmp_path, "POST", f"{API}/queue/join", b"{}")[0] == 200


def test_a_request_may_name_uploads_only(tmp_path: Path) -> None:
    uploads = tmp_path / "uploads"
    uploads.mkdir()
    (tmp_path / "secret").touch()
    (uploads / "link").symlink_to(tmp_path / "secret")

    def named(path: Any) -> int:
        body = json.dumps({"data": ["question", {"deep": [{"path": path, "meta": {}}]}]}).encode()
        status, _, passed = answer(uploads, "POST", f"{API}/call/picture", body)
        assert passed == ([body] if status == 200 else [])
        return status

    assert named(str(uploads / "abc" / "photo.png")) == 200
    assert named(None) == 200
    wrong = ["/etc/passwd", "secret", "uploads/x", str(uploads), str(uploads / ".." / "secret"), str(uploads / "link")]
    for path in [*wrong, "http://127.0.0.1/x.png", "file:///etc/passwd", "a\0b", "x" * 5000, ""]:
        assert named(path) == 403, path


@pytest.mark.parametrize("body", [b"", b"no json", b"\xff\xfe", b"[" * 30_000])
def test_what_is_no_json_is_refused(tmp_path: Path, body: bytes) -> None:
    assert answer(tmp_path, "POST", f"{API}/queue/join", body)[0] == 400
