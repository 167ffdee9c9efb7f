"""``flashsloth serve``: the model, the page and the server around them."""

from __future__ import annotations

import argparse
import asyncio
import importlib.util
import ipaddress
import os
import socket
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from flashsloth import loading, shipped
from flashsloth.web.desk import Desk
from flashsloth.web.guard import Guard
from flashsloth.web.uploads import Limits

WAITING = 32  # questions and pictures that may wait in the queue
CONNECTIONS = 200  # each open page holds two
SWEEP_SECONDS, KEPT_SECONDS = 20, 60  # uploads that nobody asked to open


def build_application(desk: Desk, folder: Path, about: str) -> Any:
    """The ASGI application of one desk.

    ``folder``: an empty directory of its own, for uploads, each of which is there until it is opened, or a minute.
    ``about``: a short line on the model.

    Sets ``GRADIO_TEMP_DIR`` and switches analytics off for the process.
    """
    folder = folder.resolve()
    os.environ.update(GRADIO_TEMP_DIR=str(folder), GRADIO_ANALYTICS_ENABLED="False", GRADIO_RUN_HISTORY="False")
    import fastapi
    import gradio as gr

    from flashsloth.web.page import STYLE, build_page, head, theme

    @asynccontextmanager
    async def sweeping(_: Any) -> AsyncIterator[None]:
        task = asyncio.create_task(_sweep_for_ever(folder))
        try:
            yield
        finally:
            task.cancel()

    page = build_page(desk, about)
    page.queue(max_size=WAITING, default_concurrency_limit=1)
    page.state_session_capacity = 4 * desk.sessions.limit
    inner = gr.mount_gradio_app(
        fastapi.FastAPI(lifespan=sweeping, openapi_url=None),
        page,
        path="/",
        max_file_size=desk.limits.bytes,
        allowed_paths=[],
        show_error=False,
        footer_links=[],
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
        theme=theme(),
        css_paths=STYLE,
        head=head(desk.limits),
    )
    return Guard(inner, folder, desk.limits.bytes)


def build_server(application: Any) -> Any:
    """A uvicorn server; ``run(sockets=[...])`` serves until it is told to end."""
    import uvicorn

    config = uvicorn.Config(
        application,
        log_level="warning",
        access_log=False,
        limit_concurrency=CONNECTIONS,
        timeout_graceful_shutdown=2,
        server_header=False,
    )
    return uvicorn.Server(config)


def listening(host: str, port: int) -> socket.socket:
    """A socket bound to the address; OSError names the option that is wrong."""
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise OSError(f"--host: expected an address of this machine, got {host!r} ({error.strerror})") from error
    opened = socket.socket(family, kind, protocol)
    try:
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
        opened.listen(128)
    except OSError as error:
        opened.close()
        raise OSError(f"--host, --port: cannot listen at {host}:{port} ({error.strerror})") from error
    return opened


def sweep(folder: Path, older_than: float) -> None:
    """Delete what was put into ``folder`` more than ``older_than`` seconds ago, and the folders this leaves empty."""
    latest = time.time() - older_than
    for path in sorted(folder.rglob("*"), reverse=True):  # what is in a folder comes before it
        try:
            if path.lstat().st_mtime > latest:
                continue
            if path.is_dir() and not path.is_symlink():
                path.rmdir()
            else:
                path.unlink()
        except OSError:  # deleted meanwhile, or a folder that is not empty
            continue


async def _sweep_for_ever(folder: Path) -> None:
    while True:
        await asyncio.sleep(SWEEP_SECONDS)
        await asyncio.to_thread(sweep, folder, KEPT_SECONDS)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    loading.add_arguments(parser)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: everyone who reaches it (default: %(default)s)")
    parser.add_argument("--port", type=int, default=7860, help="0: any that is free (default: %(default)s)")
    parser.add_argument("--max-mb", type=float, default=Limits.megabytes, metavar="N", help="default: %(default)g")
    parser.add_argument(
        "--max-megapixels", type=float, default=Limits.megapixels, metavar="N", help="default: %(default)g"
    )


def main(options: argparse.Namespace) -> None:
    """Serve until interrupted."""
    limits = Limits(options.max_mb, options.max_megapixels)
    if not 0 <= options.port < 65536:
        raise ValueError(f"--port: expected 0 to 65535, got {options.port}")
    _check_installed()
    with listening(options.host, options.port) as opened, tempfile.TemporaryDirectory(prefix="flashsloth-") as folder:
        loaded = loading.load(options)
        desk = Desk(loaded.model, loaded.processor, limits, image_hd=loaded.image_hd)
        server = build_server(build_application(desk, Path(folder), _about(loaded)))
        host, port = opened.getsockname()[:2]
        print(f"serving     http://{f'[{host}]' if ':' in host else host}:{port}/   (Ctrl-C ends it)", flush=True)
        if not ipaddress.ip_address(host).is_loopback:
            print("open to     everyone who reaches this address; there is no password", flush=True)
        server.run(sockets=[opened])


def _check_installed() -> None:
    """Before the model, which takes longer to load. ModuleNotFoundError names what is missing."""
    for name in ("gradio", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


def _about(loaded: loading.Loaded) -> str:
    """One line for the page: no path, as that is nobody's business there."""
    model = loaded.model
    millions = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    size = f"{millions / 1000:.1f} billion" if millions >= 1000 else f"{millions:.1f} million"
    dtype = str(model.dtype).removeprefix("torch.")
    name = "the model that ships" if loaded.directory == shipped.WEIGHTS else loaded.directory.resolve().name
    return f"{name}: {size} parameters, {dtype} on {model.device.type}"
