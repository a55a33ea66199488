"""What a container of the image does: ``worker``, ``launch``, ``wait`` for peers, or any other command as it stands.

    worker                            ssh server for the launcher; says on the shared volume that it is there
    launch --nodes 2 SCRIPT [...]     waits for the workers, checks them, starts DeepSpeed's launcher
    wait --for HOST COMMAND [...]     waits for peers by name and port, then runs the command

The shared volume is mounted at /cluster (see ``ssh``): keys, and in nodes/ one file for each worker.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from ase_dist.cluster import peers, ready, ssh, worker
from ase_dist.cluster.environment import FILE
from ase_dist.cluster.hostfile import read_hostfile, write_hostfile
from ase_dist.cluster.job import Job
from ase_dist.errors import UserError

CLUSTER = Path("/cluster")
NOTES = "nodes"  # below it: a file for each worker that is there
ROLES = ("worker", "launch", "wait", "--help", "-h")
WAIT = 600.0  # seconds
USAGE, NOT_FOUND = 2, 127


def parser() -> argparse.ArgumentParser:
    """The options of what is not just any command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cluster", type=Path, default=CLUSTER, metavar="FOLDER", help="default %(default)s")
    p.add_argument("--state", type=Path, default=Path.home() / ".cluster", metavar="FOLDER", help="default %(default)s")
    p.add_argument("--port", type=int, default=ssh.PORT, help="of the ssh servers (default %(default)s)")
    roles = p.add_subparsers(dest="role", required=True)
    serve = roles.add_parser("worker", help="serve the launcher")
    serve.add_argument("--slots", type=int, help="ranks to run here (default: one for each accelerator, or one)")
    serve.add_argument("--grace", type=float, default=45.0, metavar="S", help="seconds that ranks get to save")
    serve.add_argument("--no-note", action="store_true", help="do not register: the hostfile comes from elsewhere")
    launch = roles.add_parser("launch", help="wait, check, start DeepSpeed's launcher")
    launch.add_argument("--nodes", type=int, help="workers to wait for")
    launch.add_argument("--hosts", type=Path, metavar="FILE", help="a hostfile, instead of --nodes")
    launch.add_argument("--wait", type=float, default=WAIT, metavar="S", help="seconds (default %(default)s)")
    launch.add_argument("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    wait = roles.add_parser("wait", help="wait for peers, then run a command")
    wait.add_argument("--for", action="append", default=[], dest="hosts", metavar="HOST[:PORT]")
    wait.add_argument("--wait", type=float, default=WAIT, metavar="S", help="seconds (default %(default)s)")
    wait.add_argument("command", nargs=argparse.REMAINDER)
    return p


def main(argv: Sequence[str]) -> int:
    """Run the command of a container; its exit code, 2 after one sentence where a peer or a key is missing."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    if argv and argv[0] not in ROLES and not argv[0].startswith("--"):
        _become(argv)
    arguments = parser().parse_args(argv)
    try:
        return {"worker": _serve, "launch": _launch, "wait": _wait}[arguments.role](arguments)
    except (ValueError, OSError) as error:
        sys.stderr.write(f"error: {error}\n")
        return USAGE


def _serve(arguments: argparse.Namespace) -> int:
    config = ssh.prepare(arguments.cluster, arguments.state, port=arguments.port)
    notes = None if arguments.no_note else arguments.cluster / NOTES
    return worker.serve(config, notes, slots=arguments.slots, grace=arguments.grace)


def _wait(arguments: argparse.Namespace) -> NoReturn:
    hosts = [peers.host_and_port(host) for host in arguments.hosts]
    peers.wait_until(lambda: peers.silent_hosts(hosts), timeout=arguments.wait)
    _become(_after_dashes(arguments.command))


def _launch(arguments: argparse.Namespace) -> NoReturn:
    """Wait for the workers, check them, become DeepSpeed's launcher."""
    ssh.prepare(arguments.cluster, arguments.state, port=arguments.port)
    if (arguments.hosts is None) == (arguments.nodes is None):
        raise UserError("launch: wanted either --nodes N, for workers that register, or --hosts FILE")
    if arguments.hosts is None:
        notes = arguments.cluster / NOTES
        nodes = peers.wait_for_nodes(notes, count=arguments.nodes, port=arguments.port, timeout=arguments.wait)
    else:
        nodes = read_hostfile(arguments.hosts)
        hosts = [(node.host, arguments.port) for node in nodes]
        peers.wait_until(lambda: peers.silent_hosts(hosts), timeout=arguments.wait)
    hostfile = arguments.state / "hosts"
    write_hostfile(hostfile, nodes)
    words = _after_dashes(arguments.command)
    checked = ready.check(hostfile, Job.of(words), env=Path.home() / FILE)
    if checked.problems:
        raise UserError("; ".join(checked.problems))
    _become(["deepspeed", "--hostfile", str(hostfile), "--master_addr", checked.master, *words])


def _after_dashes(words: Sequence[str]) -> list[str]:
    return list(words[1:] if words[:1] == ["--"] else words)


def _become(words: Sequence[str]) -> NoReturn:
    """Replace this process by a command, which then gets the container's signals."""
    if not words:
        raise SystemExit("error: got no command to run")
    try:
        os.execvp(words[0], list(words))
    except OSError as error:
        sys.stderr.write(f"error: cannot run {words[0]!r} ({error.strerror})\n")
        raise SystemExit(NOT_FOUND) from None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
