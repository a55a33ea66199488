"""A container engine, docker or podman, whichever answers: an image, a network, volumes and containers of one test."""

import os
import shlex
import shutil
import subprocess
import time

from tests.training.tiny_runs import ROOT

NAMES = ("docker", "podman")
START = 900  # seconds that a job may take on a busy machine


def find_engine():
    """The engine that answers, or None."""
    for name in filter(shutil.which, NAMES):
        with_answer = subprocess.run([name, "info"], capture_output=True, timeout=60, check=False)
        if with_answer.returncode == 0:
            return name
    return None


def why_not():
    """Why no container can be tried here, or nothing."""
    if find_engine() is None:
        return "no container engine answers (docker or podman)"
    if not {"ASE_IMAGE", "ASE_BASE_IMAGE"} & os.environ.keys():
        return ("a build takes ten minutes and 7 GB: name an image by ASE_IMAGE, or by ASE_BASE_IMAGE the base of "
                "one to build, with ASE_BUILD_OPTIONS for the engine's build")  # fmt: skip
    return ""


def find_image(engine):
    """The image under test, built where ASE_BASE_IMAGE names its base."""
    if image := os.environ.get("ASE_IMAGE"):
        return image
    image = "localhost/ase-dist:under-test"
    options = shlex.split(os.environ.get("ASE_BUILD_OPTIONS", ""))
    base = f"BASE_IMAGE={os.environ['ASE_BASE_IMAGE']}"
    build = [engine, "build", *options, "--build-arg", base, "-t", image, "-f", "docker/Dockerfile", "."]
    subprocess.run(build, cwd=ROOT, check=True, timeout=3000)
    return image


class Containers:
    """Containers with a network and two volumes of their own; closing removes all of them, by name."""

    def __init__(self, engine, image):
        self.engine, self.image = engine, image
        self.tag = f"ase-{os.getpid()}"
        self.started = []

    def __enter__(self):
        self.call("network", "create", self.tag)
        return self

    def __exit__(self, *_):
        for name in self.started:
            self.call("rm", "--force", name, check=False)
        for volume in ("keys", "shared"):
            self.call("volume", "rm", f"{self.tag}-{volume}", check=False)
        self.call("network", "rm", self.tag, check=False)

    def call(self, *words, check=True):
        """What the engine answers."""
        done = subprocess.run([self.engine, *map(str, words)], capture_output=True, text=True, timeout=300, check=False)
        assert not check or done.returncode == 0, f"{words}: {done.stderr}"
        return done.stdout

    def host(self, name):
        """The name by which the others know a container."""
        return f"{self.tag}-{name}"

    def start(self, name, *command):
        """Start a container of the image that others can call by ``host(name)``."""
        host = self.host(name)
        self.call("rm", "--force", host, check=False)
        self.started.append(host)
        volumes = ["--volume", f"{self.tag}-keys:/cluster", "--volume", f"{self.tag}-shared:/shared"]
        self.call("run", "--detach", "--network", self.tag, "--hostname", host, "--name", host, *volumes,
                  "--env", "OMP_NUM_THREADS=1", self.image, *command)  # fmt: skip

    def wait(self, name, seconds=START):
        """The exit code of a container, and all that it said."""
        deadline = time.monotonic() + seconds
        while self.state(name) == "running":
            assert time.monotonic() < deadline, self.said(name)[-3000:]
            time.sleep(2)
        return int(self.call("inspect", "--format", "{{.State.ExitCode}}", self.host(name))), self.said(name)

    def state(self, name):
        """Running, exited, ..."""
        return self.call("inspect", "--format", "{{.State.Status}}", self.host(name)).strip()

    def said(self, name):
        """Both outputs of a container so far."""
        command = [self.engine, "logs", self.host(name)]
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60, check=False
        ).stdout

    def look(self, *command):
        """What a command says in a passing container that sees the volumes."""
        volumes = ["--volume", f"{self.tag}-keys:/cluster", "--volume", f"{self.tag}-shared:/shared"]
        return self.call("run", "--rm", *volumes, self.image, *command)
