"""Which network interface the ranks of several nodes communicate over, chosen by the route to a peer."""

from __future__ import annotations

import ipaddress
import socket
import time
from typing import Any, NamedTuple

import psutil

ATTEMPTS, PAUSE = 3, 1.0  # at a name when the name server does not answer, and seconds between them
PORT = 9  # of a UDP socket that only asks the system for a route: nothing is sent


class Interface(NamedTuple):
    """A network interface of this machine, and its address on the route to a peer."""

    name: str
    address: str

    @property
    def is_loopback(self) -> bool:
        """Whether no other machine can reach it."""
        return ipaddress.ip_address(self.address).is_loopback


def interface_towards(host: str) -> Interface | None:
    """The interface over which this machine reaches ``host``, or None where there is no route or no such name.

    A name of this machine itself gives the loopback interface on many systems; see ``interface_for``.
    """
    try:
        family, address = _resolve(host)
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(address)
            source = str(probe.getsockname()[0])
    except OSError:
        return None
    name = name_of(source)
    return None if name is None else Interface(name, source)


def interface_for(master: str) -> Interface | None:
    """The interface for a job whose first node is ``master``; None where it cannot be determined.

    On other nodes it is the one towards the master. On the master it is the one that has the master's address;
    where the name resolves to a loopback address there (Debian's 127.0.1.1), it is the one that is up, if there is just
    one.
    """
    found = interface_towards(master)
    if found is None:
        return None
    try:
        own = str(_resolve(master)[1][0])
    except OSError:
        return None
    if (name := name_of(own)) is not None and not ipaddress.ip_address(own).is_loopback:
        return Interface(name, own)
    if not found.is_loopback:
        return found
    others = reachable_interfaces()
    return others[0] if len(others) == 1 else None


def _resolve(host: str) -> tuple[int, tuple[Any, ...]]:
    """Address family and socket address of a host; a name server that did not answer in time is asked again."""
    for attempt in range(ATTEMPTS):
        try:
            family, _, _, _, address = socket.getaddrinfo(host, PORT, type=socket.SOCK_DGRAM)[0]
            return family, address
        except socket.gaierror as error:
            if error.errno != socket.EAI_AGAIN or attempt == ATTEMPTS - 1:
                raise
            time.sleep(PAUSE)
    raise AssertionError


def name_of(address: str) -> str | None:
    """The name of this machine's interface with that IP address."""
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == address for entry in addresses):
            return name
    return None


def reachable_interfaces() -> list[Interface]:
    """Every interface that is up and has an IPv4 address which is not a loopback one."""
    status = psutil.net_if_stats()
    found = [
        Interface(name, entry.address)
        for name, entries in psutil.net_if_addrs().items()
        for entry in entries
        if entry.family == socket.AF_INET and name in status and status[name].isup
    ]
    return [interface for interface in found if not interface.is_loopback]
