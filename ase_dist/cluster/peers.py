"""Waiting for the other nodes of a cluster: which are missing and why; and how workers register."""

from __future__ import annotations

import json
import logging
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from ase_dist.cluster.hostfile import Node
from ase_dist.errors import UserError
from ase_dist.files import write_atomic
from ase_dist.json_files import read_object

LOGGER = logging.getLogger("ase_dist")
PAUSE = 1.0  # seconds between two checks
REPEAT = 15.0  # seconds after which the same message is logged again
CONNECT = 3.0  # seconds that a connection may take


def wait_until(missing: Callable[[], list[str]], *, timeout: float, pause: float = PAUSE) -> None:
    """Return when ``missing()`` is empty; its clauses are logged when they change, and every ``REPEAT`` seconds.

    Raises UserError with them after ``timeout`` seconds.
    """
    began, logged, logged_at = time.monotonic(), "", 0.0
    while clauses := missing():
        text, now = "; ".join(clauses), time.monotonic()
        if now - began > timeout:
            raise UserError(f"gave up after {timeout:g} s of waiting: {text}")
        if text != logged or now - logged_at > REPEAT:
            LOGGER.info("waiting: %s", text)
            logged, logged_at = text, now
        time.sleep(pause)


def unreachable_hosts(hosts: Sequence[tuple[str, int | None]]) -> list[str]:
    """A clause for each (host, port) whose name is unknown or whose port is closed (port None: only the name)."""
    return [clause for host, port in hosts if (clause := _why_unreachable(host, port))]


def host_and_port(text: str) -> tuple[str, int | None]:
    """``host`` or ``host:port``; UserError for anything else."""
    host, colon, port = text.partition(":")
    if not host or (colon and not (port.isascii() and port.isdigit() and 0 < int(port) < 2**16)):
        raise UserError(f"got the peer {text!r}, wanted HOST or HOST:PORT with a port from 1 to 65535")
    return host, int(port) if colon else None


def register(folder: Path, node: Node) -> Path:
    """Write a file about ``node`` into ``folder``, and return its path; the node removes it when it stops."""
    write_atomic(folder / node.host, json.dumps(node._asdict()))
    return folder / node.host


def registered(folder: Path) -> list[Node]:
    """The nodes registered in ``folder``, by name; some may have died since."""
    found = []
    for path in sorted(folder.glob("[!.]*")):
        try:
            found.append(Node(**read_object(path)))
        except (OSError, UserError, TypeError):
            LOGGER.warning("%s is not the file of a node and is ignored", path)
    return found


def wait_for_nodes(folder: Path, *, count: int, port: int, timeout: float) -> tuple[Node, ...]:
    """Wait until ``count`` registered nodes answer on ``port``; those nodes by name.

    Raises UserError after ``timeout`` seconds.
    """
    answering: list[Node] = []

    def missing() -> list[str]:
        reasons = {node: _why_unreachable(node.host, port) for node in registered(folder)}
        answering[:] = [node for node, reason in reasons.items() if not reason]
        if len(answering) >= count:
            return []
        names = ", ".join(node.host for node in answering) or "none yet"
        return [f"{len(answering)} of {count} workers are there ({names})", *filter(None, reasons.values())]

    wait_until(missing, timeout=timeout)
    return tuple(answering[:count])


def _why_unreachable(host: str, port: int | None) -> str:
    try:
        if port is None:
            socket.getaddrinfo(host, None)
        else:
            socket.create_connection((host, port), timeout=CONNECT).close()
    except socket.gaierror:
        return f"the name {host} is not known yet"
    except OSError as error:
        return f"{host} does not answer on port {port} ({error.strerror or error})"
    return ""
