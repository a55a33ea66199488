"""What a container of the image does: ``worker``, ``launch``, ``wait`` for peers, or any other command as it stands.

    worker                            ssh server for the launcher; says on the shared volume that it is there
    launch --nodes 2 SCRIPT [...]     waits for the workers, checks them, starts DeepSpeed's launcher
    wait --for HOST COMMAND [...]     waits for peers by name and port, then runs the command

The shared volume is mounted at /cluster (see ``ssh``): keys, and in nodes/ one file for each worker.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import NoReturn

import psutil

from ase_dist.cluster import peers, ssh
from ase_dist.cluster.check import Job, check_cluster
from ase_dist.cluster.environment import FILE
from ase_dist.cluster.facts import devices
from ase_dist.cluster.hostfile import Node, read_hostfile, write_hostfile
from ase_dist.errors import UserError
from ase_dist.files import expand_user

CLUSTER = Path("/cluster")
NOTES = "nodes"  # below it: a file for each worker that is there
ROLES = ("worker", "launch", "wait", "--help", "-h")
WAIT = 600.0  # seconds
RANK = "LOCAL_RANK"  # the variable that deepspeed and torchrun give to ranks and have not themselves
LOGGER = logging.getLogger("ase_dist")
USAGE, NOT_FOUND = 2, 127


def parser() -> argparse.ArgumentParser:
    """The options of what is not just any command."""
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--cluster", type=_path, default=CLUSTER, metavar="FOLDER", help="default %(default)s")
    p.add_argument(
        "--state", type=_path, default=Path.home() / ".cluster", metavar="FOLDER", help="default %(default)s"
    )
    p.add_argument("--port", type=int, default=ssh.PORT, help="of the ssh servers (default %(default)s)")
    roles = p.add_subparsers(dest="role", required=True)
    serve = roles.add_parser("worker", help="serve the launcher")
    serve.add_argument("--slots", type=int, help="ranks to run here (default: one for each accelerator, or one)")
    serve.add_argument("--grace", type=float, default=45.0, metavar="S", help="seconds that ranks get to save")
    serve.add_argument("--no-note", action="store_true", help="do not register: the hostfile comes from elsewhere")
    launch = roles.add_parser("launch", help="wait, check, start DeepSpeed's launcher")
    launch.add_argument("--nodes", type=int, help="workers to wait for")
    launch.add_argument("--hosts", type=_path, metavar="FILE", help="a hostfile, instead of --nodes")
    launch.add_argument("--wait", type=float, default=WAIT, metavar="S", help="seconds (default %(default)s)")
    launch.add_argument("command", nargs=argparse.REMAINDER, help="the script and its arguments")
    wait = roles.add_parser("wait", help="wait for peers, then run a command")
    wait.add_argument("--for", action="append", default=[], dest="hosts", metavar="HOST[:PORT]")
    wait.add_argument("--wait", type=float, default=WAIT, metavar="S", help="seconds (default %(default)s)")
    wait.add_argument("command", nargs=argparse.REMAINDER)
    return p


def _path(text: str) -> Path:
    return Path(expand_user(text))


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
    return serve(config, notes, slots=arguments.slots, grace=arguments.grace)


def serve(config: Path, notes: Path | None, *, slots: int | None, grace: float) -> int:
    """Serve ssh until SIGTERM or SIGINT; then ranks are asked to stop and get ``grace`` seconds to save. Exit code.

    ``notes`` is the folder in which this worker says that it is there; None where the hostfile comes from elsewhere.
    They are no children of the server's group, so that the container's signal does not reach them by itself.
    """
    server = subprocess.Popen([ssh.SERVER, "-D", "-e", "-f", str(config)])
    stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal stopped
        stopped = True
        end_ranks(grace=grace)
        server.terminate()

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    note = peers.register(notes, Node(platform.node(), slots or max(1, devices()))) if notes else None
    LOGGER.info("%s serves ssh and waits for the launcher", platform.node())
    try:
        code = server.wait()
    finally:
        if note is not None:
            note.unlink(missing_ok=True)
    return 0 if stopped else code


def end_ranks(*, grace: float) -> int:
    """Send SIGTERM to every process of this container that a launcher made a rank, and wait; how many there were.

    Not to what a rank has started itself, such as loader processes: it ends those when it has saved.
    """
    found = [process for process in psutil.process_iter() if _is_rank(process)]
    for process in found:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.terminate()
    _, alive = psutil.wait_procs(found, timeout=grace)
    if alive:
        LOGGER.warning("%d of %d ranks did not end within %g s", len(alive), len(found), grace)
    return len(found)


def _is_rank(process: psutil.Process) -> bool:
    try:
        parent = process.parent()
        return RANK in process.environ() and (parent is None or RANK not in parent.environ())
    except psutil.Error:
        return False


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
    checked = check_cluster(hostfile, Job.of(words), env=Path.home() / FILE)
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
