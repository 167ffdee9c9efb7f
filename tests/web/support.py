"""The server of the tests: a model of random weights, in a thread, at a free port."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from flashsloth import tiny
from flashsloth.web.desk import Desk
from flashsloth.web.server import build_application, build_server, listening
from flashsloth.web.sessions import Sessions
from flashsloth.web.uploads import Limits


def tiny_desk(
    limits: Limits | None = None, sessions: Sessions | None = None, answer_tokens: int = 12, **changes: Any
) -> Desk:
    config = tiny.tiny_config(**changes)
    return Desk(
        tiny.random_model(config), tiny.processor_for(config), limits or Limits(), sessions, answer_tokens=answer_tokens
    )


@contextmanager
def served(desk: Desk, folder: Path) -> Iterator[str]:
    """The address of a server that is there within the block."""
    folder.mkdir(exist_ok=True)
    server = build_server(build_application(desk, folder, "random weights, 0.1 M parameters"))
    opened = listening("127.0.0.1", 0)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [opened]}, daemon=True)
    thread.start()
    try:
        until = time.monotonic() + 30
        while not server.started:
            if time.monotonic() > until or not thread.is_alive():
                raise TimeoutError("the server did not start")
            time.sleep(0.02)
        yield f"http://127.0.0.1:{opened.getsockname()[1]}/"
    finally:
        server.should_exit = True
        thread.join(20)
        logging.getLogger(__name__).debug("the server has ended")
        opened.close()
