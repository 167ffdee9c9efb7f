"""What may reach Gradio at all: the few addresses the page uses, bodies of bounded size, files uploaded here."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable, MutableMapping
from pathlib import Path
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Application = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

API = "/gradio_api"
UPLOAD = f"{API}/upload"
READ = {"/", "/config", "/theme.css", "/favicon.ico", "/robots.txt", "/manifest.json"}
READ |= {f"{API}/{name}" for name in ("theme.css", "info", "queue/data", "startup-events", "app_id", "upload_progress")}
READ_BELOW = ("/assets/", "/static/", f"{API}/heartbeat/", f"{API}/call/")
WRITE = {UPLOAD, f"{API}/queue/join", f"{API}/cancel", f"{API}/reset"}
WRITE_BELOW = (f"{API}/call/",)
JSON_BYTES = 64_000  # a question and a file's name; no request of the page comes near it
AROUND_FILE = 16_000  # bytes of the form around an uploaded file
WAITING_FILES = 64


class Guard:
    """ASGI application in front of another one.

    Gradio has many more addresses than one page needs: it serves files, fetches URLs, runs functions past its queue.
    Only what is listed here is passed on; above all nothing that hands out files.

    Args:
        folder: where uploads lie; a request that names any other file is refused.
        file_bytes: the largest upload.
    """

    def __init__(self, application: Application, folder: Path, file_bytes: int) -> None:
        self.application, self.folder, self.file_bytes = application, folder.resolve(), file_bytes

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.application(scope, receive, send)
        elif scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
        elif not _known(scope["method"], scope["path"]):
            await _answer(send, 404, "There is nothing at this address.")
        elif scope["method"] == "POST":
            await self._post(scope, receive, send)
        else:
            await self.application(scope, receive, send)

    async def _post(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        upload = scope["path"] == UPLOAD
        length = next((value for name, value in scope["headers"] if name.lower() == b"content-length"), b"")
        if not length.isdigit():
            await _answer(send, 411, "The length of the request is missing.")
        elif int(length) > (self.file_bytes + AROUND_FILE if upload else JSON_BYTES):
            await _answer(send, 413, f"The file is too large; {self.file_bytes / 1e6:g} MB is the most.")
        elif upload and sum(1 for _ in self.folder.rglob("*")) > 2 * WAITING_FILES:  # each in a folder of its own
            await _answer(send, 503, "Too many pictures are waiting. Please try again in a minute.")
        elif upload:
            await self.application(scope, receive, send)
        else:
            await self._checked(scope, receive, send)

    async def _checked(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        body, more = b"", True
        while more:
            message = await receive()
            if message["type"] != "http.request":  # the client has gone
                return
            body, more = body + message.get("body", b""), message.get("more_body", False)
        try:
            known = self._uploaded_here(json.loads(body))
        except (ValueError, RecursionError):
            await _answer(send, 400, "The request is no JSON.")
            return
        if not known:
            await _answer(send, 403, "The request names a file that was not uploaded here.")
            return
        given: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

        async def again() -> Message:
            return given.pop() if given else await receive()

        await self.application(scope, again, send)

    def _uploaded_here(self, value: Any) -> bool:
        if isinstance(value, dict):
            path = value.get("path")
            if isinstance(path, str) and not self._inside(path):
                return False
            return all(self._uploaded_here(part) for part in value.values())
        return all(self._uploaded_here(part) for part in value) if isinstance(value, list) else True

    def _inside(self, path: str) -> bool:
        try:
            return Path(path).is_absolute() and self.folder in Path(path).resolve().parents
        except (OSError, ValueError):  # too long, or with a zero byte
            return False


def _known(method: str, path: str) -> bool:
    if method in ("GET", "HEAD"):
        return path in READ or path.startswith(READ_BELOW)
    return method == "POST" and (path in WRITE or path.startswith(WRITE_BELOW))


async def _answer(send: Send, status: int, text: str) -> None:
    body = text.encode()
    headers = [(b"content-type", b"text/plain; charset=utf-8"), (b"content-length", str(len(body)).encode())]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
