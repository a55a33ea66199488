"""Keys and configuration with which containers of one cluster log in to each other as an ordinary user.

One key pair serves the whole cluster, as login key and as host key of every container, so a container that has the key
belongs to the cluster. It lies in a folder that the containers share; the first container makes it, or an operator of
Kubernetes puts it there. No image holds a key. Private files that ssh requires, such as a copy of the key that only its
owner can read, are written into a state folder at every start.
"""

from __future__ import annotations

import fcntl
import getpass
import os
import pwd
import subprocess
from pathlib import Path

from ase_dist.errors import UserError, file_error
from ase_dist.files import write_atomic

PORT = 2222  # an ordinary user may not listen below 1024; docker/ssh_config has it too
NAMES = ("id_ed25519", "id_ecdsa", "id_rsa")  # Kubeflow's operators use id_rsa for keys of every kind
SERVER = "/usr/sbin/sshd"
SSHD_CONFIG = """# written at every start
Port {port}
HostKey {state}/key
AuthorizedKeysFile {state}/authorized_keys
PidFile {state}/sshd.pid
AllowUsers {user}
UsePAM no
PasswordAuthentication no
KbdInteractiveAuthentication no
AllowAgentForwarding no
AllowTcpForwarding no
X11Forwarding no
PrintMotd no
MaxStartups 1024
ClientAliveInterval 15
ClientAliveCountMax 4
SetEnv PATH={path}
"""


def prepare(keys: Path, state: Path, *, port: int = PORT) -> Path:
    """Write the state folder from the cluster's key, making the key if there is none; the path of sshd_config.

    Raises what ``errors.file_error`` makes of it where the key can be neither read nor made, and UserError for a user
    without a name, whom ssh does not let in.
    """
    try:
        user = getpass.getuser()
        pwd.getpwuid(os.getuid())
    except (KeyError, OSError):  # the second: Python 3.13
        raise UserError(
            f"ssh: this host knows no user of the id {os.getuid()}, and ssh lets in none without an entry in "
            "/etc/passwd; start the container as a user that its image has"
        ) from None
    try:
        private = find_key(keys) or make_key(keys)
        state.mkdir(parents=True, exist_ok=True, mode=0o700)
        state.chmod(0o700)
        _write_private(state / "key", private.read_bytes())
        public = _run("ssh-keygen", "-y", "-f", str(state / "key")).strip()
    except (OSError, subprocess.CalledProcessError) as error:
        reason = getattr(error, "strerror", None) or str(getattr(error, "stderr", "") or error).strip()
        raise file_error(
            error,
            f"ssh: no usable key in {str(keys)!r} ({reason}); mount a folder there that all containers share and that "
            f"{user} may write to, or one with a key pair in it",
        ) from None
    write_atomic(state / "authorized_keys", f"{public}\n")
    write_atomic(state / "known_hosts", f"* {public}\n")
    paths = {"state": state, "user": user, "port": port, "path": os.environ.get("PATH", os.defpath)}
    write_atomic(state / "sshd_config", SSHD_CONFIG.format(**paths))
    return state / "sshd_config"


def find_key(keys: Path) -> Path | None:
    """The private key in a folder, if there is one."""
    return next((keys / name for name in NAMES if (keys / name).is_file()), None)


def make_key(keys: Path) -> Path:
    """Make one key pair even if several containers start at the same moment; the private key's path."""
    keys.mkdir(parents=True, exist_ok=True)
    with (keys / ".lock").open("a", encoding="ascii") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if found := find_key(keys):
            return found
        making = keys / ".making"
        for old in keys.glob(f"{making.name}*"):  # of a container that died
            old.unlink()
        _run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "cluster", "-f", str(making))
        making.with_name(f"{making.name}.pub").replace(keys / f"{NAMES[0]}.pub")
        return making.replace(keys / NAMES[0])


def _write_private(path: Path, data: bytes) -> None:
    """Write a file that other users cannot read at any moment."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)
    with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def _run(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout
