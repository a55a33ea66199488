"""Two hosts on one machine: network namespaces joined by a cable, n1 and n2, each with an ssh server of its own."""

import contextlib
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

from ase_dist.cluster import ssh

HOSTS = {"n1": "10.213.0.1", "n2": "10.213.0.2"}
ETC = Path("/etc/netns")  # what lies in it under a namespace's name stands in /etc there (ip-netns)
CLIENT = """Host *
    Port {port}
    IdentityFile {state}/key
    UserKnownHostsFile {state}/known_hosts
    StrictHostKeyChecking yes
    BatchMode yes
"""


def why_not():
    """Why this machine cannot have such hosts, or nothing."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [name for name in ("ip", "unshare", "hostname") if shutil.which(name) is None]
    if missing:
        return f"not installed: {', '.join(missing)}"
    name = f"ase-probe-{os.getpid()}"
    tried = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, check=False)
    if tried.returncode:
        return f"no network namespaces here: {tried.stderr.strip()}"
    cable = ["ip", "-n", name, "link", "add", "v0", "type", "veth", "peer", "name", "v1"]
    tried = subprocess.run(cable, capture_output=True, text=True, check=False)
    subprocess.run(["ip", "netns", "del", name], check=False)
    return f"no virtual network cables here: {tried.stderr.strip()}" if tried.returncode else ""


def why_no_ssh():
    """Why ssh between such hosts cannot be tried here, or nothing."""
    missing = [name for name in ("ssh", "ssh-keygen", "pdsh", ssh.SERVER) if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)}" if missing else ""


class Hosts:
    """n1 and n2; ``run`` starts a process on one of them. Closing ends every process there and removes both."""

    def __init__(self, folder):
        self.folder = folder
        self.names = {host: f"ase-{os.getpid()}-{host}" for host in HOSTS}

    def __enter__(self):
        for name in self.names.values():
            ip("netns", "add", name)
        first, second = self.names.values()
        ip("link", "add", "eth0", "netns", first, "type", "veth", "peer", "name", "eth0", "netns", second)
        for host, name in self.names.items():
            ip("-n", name, "address", "add", f"{HOSTS[host]}/24", "dev", "eth0")
            ip("-n", name, "link", "set", "lo", "up")
            etc = ETC / name
            etc.mkdir(parents=True)
            own = f"127.0.1.1 {host}-of-debian\n" + "".join(f"{address} {known}\n" for known, address in HOSTS.items())
            (etc / "hosts").write_text(f"127.0.0.1 localhost\n{own}")
        self.connect(True)
        return self

    def __exit__(self, *_):
        for host, name in self.names.items():
            self.kill(host)
            subprocess.run(["ip", "netns", "del", name], check=False)
            shutil.rmtree(ETC / name, ignore_errors=True)

    def connect(self, yes):
        """Plug the cable in or out."""
        for name in self.names.values():
            ip("-n", name, "link", "set", "eth0", "up" if yes else "down")

    def serve_ssh(self):
        """Start both ssh servers, and make every client use their key."""
        Path("/run/sshd").mkdir(exist_ok=True)  # root's sshd insists on it
        for host, name in self.names.items():
            state = self.folder / host
            config = ssh.prepare(self.folder / "keys", state)
            (ETC / name / "ssh").mkdir()
            (ETC / name / "ssh" / "ssh_config").write_text(CLIENT.format(port=ssh.PORT, state=state))
            strict = ["-o", "StrictModes=no"]  # everybody may write to /tmp, in which the tests' folders lie
            with (self.folder / f"{host}.sshd.log").open("w") as log:
                self.run(host, [ssh.SERVER, "-D", "-e", "-f", config, *strict], stdout=log, stderr=log)

    def run(self, host, command, **options):
        """Start a command on a host, which has its own idea of its name."""
        named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', host]
        return subprocess.Popen(["ip", "netns", "exec", self.names[host], *named, *map(str, command)], **options)

    def processes(self, host):
        """Numbers of the processes on a host."""
        listed = subprocess.run(["ip", "netns", "pids", self.names[host]], capture_output=True, text=True, check=False)
        return [int(number) for number in listed.stdout.split()]

    def kill(self, host):
        """End every process of a host as a power cut does."""
        for number in self.processes(host):
            with contextlib.suppress(ProcessLookupError):
                os.kill(number, signal.SIGKILL)
        deadline = time.monotonic() + 10
        while self.processes(host) and time.monotonic() < deadline:
            time.sleep(0.05)


def ip(*words):
    subprocess.run(["ip", *words], check=True, timeout=20)
