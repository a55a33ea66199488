"""A page that renews itself: served to this machine alone, made anew when a run's records have changed.

Nothing but that page and the number of its version is served, no file of the folder, whatever is asked for. It listens
on 127.0.0.1 and answers only requests that name this machine: a web site whose name is made to lead here (DNS
rebinding) is refused. The page's policy lets it ask this server and no other.
"""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ase_dist.errors import UserError, describe

LOGGER = logging.getLogger("ase_dist")
HOST = "127.0.0.1"
PAUSE = 1.0  # seconds between two looks at the records
SHARE = 0.2  # of the time that making pages may take: it is the run's processor
# Of a run's or a study's folder, and of the runs of a study. Logs and signs of life change at every moment.
RECORDS = ("*.json", "*.jsonl", "*.yaml", "predictions/*.png", "evaluation/*.json", "runs/*/*/*.jsonl",
           "runs/*/*/summary.json")  # fmt: skip
TYPES = {"/": "text/html; charset=utf-8", "/version": "text/plain; charset=utf-8"}
Build = Callable[[int], str]


class WatchedPage:
    """The newest page that ``build(version)`` has made of the records in ``folders``.

    ``renew`` makes another where these have changed; its errors are told once and leave the page as it is.
    """

    def __init__(self, folders: Sequence[Path], build: Build) -> None:
        self._folders, self._build = folders, build
        self._stamp = list(_stamp(folders))
        self.version, self._told = 1, ""
        self.page = build(1).encode()

    def renew(self) -> None:
        """Make the page anew if there is anything new."""
        stamp = list(_stamp(self._folders))
        if stamp == self._stamp:
            return
        try:
            self.page = self._build(self.version + 1).encode()
            self.version += 1
            self._stamp, self._told = stamp, ""
        except Exception as error:  # the next records may be whole again
            if describe(error) != self._told:
                LOGGER.warning("the page stays as it was (%s)", describe(error))
            self._told = describe(error)

    def keep_new(self) -> None:
        """Renew it for ever."""
        while True:
            began = time.monotonic()
            self.renew()
            time.sleep(max(PAUSE, (time.monotonic() - began) * (1 - SHARE) / SHARE))


def _stamp(folders: Iterable[Path]) -> Iterator[tuple[str, int, int]]:
    """What changes when records do: names, times and sizes; which ranks have a sign of life."""
    for folder in folders:
        for path in sorted(path for pattern in RECORDS for path in folder.glob(pattern)):
            try:
                status = path.stat()
            except OSError:
                continue
            yield str(path), status.st_mtime_ns, status.st_size
        yield from ((str(path), 0, 0) for path in sorted(folder.glob("rank_*.beat")))


class Server(ThreadingHTTPServer):
    """Answers on the loopback interface; ``port`` is the one that it has got."""

    daemon_threads = True

    def __init__(self, port: int, page: WatchedPage) -> None:
        super().__init__((HOST, port), _Handler)
        self.page = page
        self.port = int(self.server_address[1])

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A browser that goes away is no error."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    server_version, sys_version = "ase-dist", ""

    def do_GET(self) -> None:
        """The page, or its version; an error for everything else."""
        self._answer(has_body=True)

    def do_HEAD(self) -> None:
        """As GET, without the page."""
        self._answer(has_body=False)

    def _answer(self, *, has_body: bool) -> None:
        if self.headers.get("Host", "") not in (f"{HOST}:{self.server.port}", f"localhost:{self.server.port}"):
            self.send_error(HTTPStatus.FORBIDDEN, "This server answers its own machine only")
            return
        if self.path not in TYPES:
            self.send_error(HTTPStatus.NOT_FOUND, "There is one page here, /")
            return
        page = self.server.page
        body = page.page if self.path == "/" else str(page.version).encode()
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", TYPES[self.path])
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("X-Frame-Options", "DENY")
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.end_headers()
        if has_body:
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Requests are not logged."""


def serve(folders: Sequence[Path], build: Build, *, port: int, ready: Callable[[str], None]) -> None:
    """Serve the page of ``folders`` until Ctrl-C; ``ready`` is told its address. ``port`` 0 takes a free one.

    ``build(version)`` makes the page. Raises UserError where the port cannot be had, and what the first build raises.
    """
    page = WatchedPage(folders, build)
    try:
        server = Server(port, page)
    except (OSError, OverflowError) as error:
        reason = os.strerror(error.errno) if isinstance(error, OSError) and error.errno else str(error)
        raise UserError(
            f"--port: cannot listen on port {port} of {HOST} ({reason}); name another, or 0 for a free one"
        ) from None
    with server:
        threading.Thread(target=page.keep_new, daemon=True).start()
        ready(f"http://{HOST}:{server.port}/")
        try:
            server.serve_forever(poll_interval=0.2)
        except KeyboardInterrupt:
            LOGGER.info("the page is no longer served")
