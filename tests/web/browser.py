"""Chromium without a window, driven by its own debugging protocol over a pipe: no driver, no package."""

from __future__ import annotations

import base64
import fcntl
import json
import os
import select
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
SECONDS = 60.0
# The protocol is spoken on file descriptors 3 (to the browser) and 4 (from it).
_BECOME = (
    "import os, sys; os.dup2(int(sys.argv[1]), 3); os.dup2(int(sys.argv[2]), 4); os.execv(sys.argv[3], sys.argv[3:])"
)


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


_CONTRAST = """element => {
  const channels = text => text.match(/[\\d.]+/g).map(Number);
  let behind = element;
  const seen = node => channels(getComputedStyle(node).backgroundColor);
  while (behind.parentElement && seen(behind).length == 4 && seen(behind)[3] == 0) behind = behind.parentElement;
  const light = colour => colour.slice(0, 3).map(value => value / 255)
    .map(value => value <= 0.03928 ? value / 12.92 : ((value + 0.055) / 1.055) ** 2.4)
    .reduce((sum, value, at) => sum + value * [0.2126, 0.7152, 0.0722][at], 0);
  const both = [light(channels(getComputedStyle(element).color)), light(seen(behind))].sort((a, b) => b - a);
  return (both[0] + 0.05) / (both[1] + 0.05);
}"""


class Browser:
    """One page in a browser of its own.

    Attributes:
        requested: the URL of everything the page asked for.
        errors: what was thrown, or written to the console as an error.
    """

    def __init__(self, program: str, profile: Path, width: int = 1200, height: int = 1000, dark: bool = False) -> None:
        read_theirs, write_ours = os.pipe()
        read_ours, write_theirs = os.pipe()
        theirs = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_theirs, write_theirs)]  # not 3, not 4
        flags = ("--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", "--no-first-run")
        quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--mute-audio")
        command = [program, *flags, *quiet, "--remote-debugging-pipe", f"--user-data-dir={profile}", "about:blank"]
        self._process = subprocess.Popen(
            [sys.executable, "-c", _BECOME, *map(str, theirs), *command],
            pass_fds=theirs,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        for end in (read_theirs, write_theirs, *theirs):
            os.close(end)
        self._to, self._from, self._buffer = write_ours, read_ours, b""
        self._number, self._session = 0, ""
        self.requested: list[str] = []
        self.errors: list[str] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log", "DOM"):
            self.call(f"{domain}.enable")
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])

    def close(self) -> None:
        try:
            self._session = ""
            self.call("Browser.close", seconds=5)
        except (OSError, TimeoutError):
            pass
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, seconds: float = SECONDS, **parameters: Any) -> dict[str, Any]:
        """Send one command and wait for its result."""
        self._number += 1
        message: dict[str, Any] = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        data = json.dumps(message).encode() + b"\0"
        while data:
            data = data[os.write(self._to, data) :]
        until = time.monotonic() + seconds
        while True:
            answer = self._read(until, method)
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']}")
                result: dict[str, Any] = answer["result"]
                return result

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def evaluate(self, script: str) -> Any:
        """The value of an expression of JavaScript; a promise is waited for."""
        found = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in found:
            raise RuntimeError(f"{script}: {found['exceptionDetails']}")
        return found["result"].get("value")

    def wait(self, script: str, seconds: float = SECONDS) -> None:
        """Wait until an expression is true; TimeoutError says what the page shows instead."""
        until = time.monotonic() + seconds
        while not self.evaluate(f"Boolean({script})"):
            if time.monotonic() > until:
                shown = self.evaluate("document.body ? document.body.innerText : ''")
                raise TimeoutError(f"{script}\nis not true; errors: {self.errors}; the page shows:\n{shown}")
            time.sleep(0.05)

    def upload(self, selector: str, path: Path) -> None:
        """Choose a file in an ``<input type=file>``."""
        root = self.call("DOM.getDocument")["root"]["nodeId"]
        node = self.call("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        if not node:
            raise LookupError(f"no element {selector}")
        self.call("DOM.setFileInputFiles", files=[str(path)], nodeId=node)

    def type(self, selector: str, text: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)})")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).focus()")
        self.call("Input.insertText", text=text)

    def click(self, selector: str) -> None:
        self.wait(f"document.querySelector({json.dumps(selector)})")
        self.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def press_enter(self) -> None:
        key = {"key": "Enter", "code": "Enter", "windowsVirtualKeyCode": 13, "text": "\r"}
        self.call("Input.dispatchKeyEvent", type="keyDown", **key)
        self.call("Input.dispatchKeyEvent", type="keyUp", **key)

    def unnamed(self, roles: tuple[str, ...]) -> list[str]:
        """The visible controls of these roles, as the browser tells a screen reader, that have no name."""
        nodes = [node for node in self.call("Accessibility.getFullAXTree")["nodes"] if not node["ignored"]]
        found = [node for node in nodes if node.get("role", {}).get("value") in roles]
        if not found:
            raise LookupError(f"no control of {roles}")
        return [node["role"]["value"] for node in found if not node.get("name", {}).get("value", "").strip()]

    def contrast(self, selector: str) -> float:
        """Of the text to what is behind it (WCAG 2), where both are plain colours."""
        return float(self.evaluate(f"({_CONTRAST})(document.querySelector({json.dumps(selector)}))"))

    def screenshot(self, path: Path, whole: bool = True) -> None:
        data = self.call("Page.captureScreenshot", captureBeyondViewport=whole)["data"]
        path.write_bytes(base64.b64decode(data))

    def _read(self, until: float, what: str) -> dict[str, Any]:
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, until - time.monotonic()))[0]:
                raise TimeoutError(f"the browser does not answer {what}")
            data = os.read(self._from, 1 << 16)
            if not data:
                raise OSError("the browser has ended")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(line)
        self._note(message)
        return message

    def _note(self, message: dict[str, Any]) -> None:
        given = message.get("params", {})
        if message.get("method") == "Network.requestWillBeSent":
            self.requested.append(given["request"]["url"])
        elif message.get("method") == "Runtime.exceptionThrown":
            self.errors.append(str(given["exceptionDetails"]))
        elif message.get("method") == "Log.entryAdded" and given["entry"]["level"] == "error":
            self.errors.append(f"{given['entry']['text']} {given['entry'].get('url', '')}")
