"""A client of the page that speaks HTTP as a browser does, with nothing in between."""

from __future__ import annotations

import json
import re
import urllib.error
import urllib.request
import uuid
from collections.abc import Iterator
from html import unescape
from pathlib import Path
from typing import Any

SECONDS = 120.0
PARTS = ("message", "picture", "talk", "maps", "times")


class Refused(Exception):
    """An answer other than 200, with its text."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(f"{status}: {text}")
        self.status, self.text = status, text


class Client:
    """One browser session.

    Attributes:
        shown: what each part of the page shows last.
    """

    def __init__(self, url: str) -> None:
        self.url, self.key = url, uuid.uuid4().hex
        self.shown = dict.fromkeys(PARTS, "")

    def picture(self, path: Path, name: str | None = None) -> str:
        """Upload a file and open it. Returns the message."""
        uploaded = self.upload(path.read_bytes(), name or path.name)
        return self.open(uploaded)

    def open(self, path: str) -> str:
        data = {"path": path, "meta": {"_type": "gradio.FileData"}, "orig_name": "picture"}
        for _ in self.events("picture", [data]):
            pass
        return self.text("message")

    def ask(self, question: str) -> str:
        """Ask, read the answer to its end. Returns the message."""
        for _ in self.events("ask", [question]):
            pass
        return self.text("message")

    def text(self, part: str) -> str:
        """A part of the page without its marks."""
        return unescape(re.sub(r"<[^>]+>", " ", self.shown[part])).strip()

    def answers(self) -> list[str]:
        return [unescape(text) for text in re.findall(r"FlashSloth</span>(.*?)</p>", self.shown["talk"], re.DOTALL)]

    def events(self, name: str, data: list[Any]) -> Iterator[str]:
        """Call a function of the page; the kinds of its events as they come, what they show in ``shown``."""
        event = self.begin(name, data)
        with urllib.request.urlopen(f"{self.url}gradio_api/call/{name}/{event}", timeout=SECONDS) as stream:
            kind = ""
            for line in stream:
                label, _, value = line.decode().strip().partition(": ")
                if label == "event":
                    kind = value
                elif label == "data" and kind == "error":
                    raise RuntimeError(f"{name}: {value}")
                elif label == "data" and kind in ("generating", "complete"):
                    values = json.loads(value)
                    if len(values) < len(PARTS):  # of another call of this session
                        continue
                    self._show(values)
                    yield kind
                    if kind == "complete":
                        return

    def begin(self, name: str, data: list[Any]) -> str:
        """Put a call into the queue. Returns its id."""
        answer = self.post(f"gradio_api/call/{name}", {"data": data, "session_hash": self.key})
        return str(json.loads(answer)["event_id"])

    def cancel(self, name: str, event: str) -> None:
        functions = json.loads(self.get("config"))["dependencies"]
        index = next(one["id"] for one in functions if one["api_name"] == name)
        self.post("gradio_api/cancel", {"session_hash": self.key, "fn_index": index, "event_id": event})

    def upload(self, data: bytes, name: str) -> str:
        """Returns the path of the file on the server."""
        edge = uuid.uuid4().hex
        head = f'--{edge}\r\nContent-Disposition: form-data; name="files"; filename="{name}"\r\n\r\n'
        body = head.encode() + data + f"\r\n--{edge}--\r\n".encode()
        kind = f"multipart/form-data; boundary={edge}"
        return str(json.loads(self._send("gradio_api/upload", body, kind))[0])

    def post(self, path: str, value: Any) -> str:
        return self._send(path, json.dumps(value).encode(), "application/json")

    def get(self, path: str) -> str:
        return self._send(path, None, "")

    def _send(self, path: str, body: bytes | None, kind: str) -> str:
        headers = {"Content-Type": kind} if body is not None else {}
        try:
            request = urllib.request.Request(self.url + path, data=body, headers=headers)
            with urllib.request.urlopen(request, timeout=SECONDS) as answer:
                return str(answer.read().decode(errors="replace"))
        except urllib.error.HTTPError as error:
            raise Refused(error.code, error.read().decode(errors="replace")) from error

    def _show(self, values: list[Any]) -> None:
        for part, value in zip(PARTS, values, strict=False):
            if isinstance(value, str):
                self.shown[part] = value
