"""The probes of ``ase-dist doctor``. Each runs in a process of its own, see ``examination``.

A probe imports what it needs inside its function, so that a package that is missing or broken is one finding and the
other probes still tell theirs.
"""

from __future__ import annotations

import json
import os
import platform
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

from ase_dist.doctor.findings import HARMLESS_VARIABLES, Severity, Teller

BROKEN, WARNING, NOTE = Severity.BROKEN, Severity.WARNING, Severity.NOTE
GB = 1e9
LITTLE_MEMORY = 2 * GB  # a rank of the default run takes about 1 GB, and its loader processes as much again
LITTLE_SHARED_MEMORY = 0.5 * GB
LITTLE_DISK = 2 * GB  # the generated scenes, and a run with its checkpoints
FEW_FILES = 1024  # open files of a process: fewer end loader processes
FEW_INODES = 10_000
WALK_SECONDS = 5.0  # for the size of one cache
REQUIRED = ("torch", "torchvision", "deepspeed", "timm", "fairscale")  # what is imported here; see ``libraries``
EXTRAS = (
    "triton",
    "onnxruntime",
    "torchjd",
    "wandb",
    "mlflow-skinny",
    "mlflow",
    "comet_ml",
    "gradio",
    "huggingface-hub",
)
LAUNCHERS = ("deepspeed", "torchrun", "pdsh", "ssh", "srun", "mpirun", "git")
REINSTALL = "pip install --force-reinstall {}, or make a new environment and install ase-dist there"
Options = dict[str, Any]


# ---------------------------------------------------------------------------------------------------------------------
# The machine


def machine(tell: Teller, options: Options) -> None:
    """System, processor, memory, limits of the container and of the shell."""
    tell.fact("system", platform.platform())
    tell.fact("python", platform.python_version())
    with tell.doing("reading the processor's name", advice="it has no effect on a run", severity=NOTE):
        tell.fact("cpu", _processor())
    with tell.doing("counting the cores", advice="set train.threads and data.workers yourself"):
        import psutil

        from ase_dist.cores import cpu_quota, usable_cores

        tell.fact("cores, logical", psutil.cpu_count())
        tell.fact("cores, physical", psutil.cpu_count(logical=False))
        tell.fact("cores, usable", usable_cores())
        if hasattr(os, "sched_getaffinity"):
            tell.fact("cores, affinity", len(os.sched_getaffinity(0)))
        tell.fact("cores, quota of the container", cpu_quota())
        load = os.getloadavg()[0]
        tell.fact("load", round(load, 2))
        if load > 2 * usable_cores():
            tell.find(
                NOTE,
                f"the load is {load:.1f} on {usable_cores()} usable cores, so every time measured here is too long; "
                "wait until the other programs have ended",
            )
    with tell.doing("reading the size of the memory", advice="watch it yourself while a run starts"):
        import psutil

        memory, limit = psutil.virtual_memory(), _memory_limit()
        tell.fact("memory", memory.total)
        tell.fact("memory, free", memory.available)
        tell.fact("memory, limit of the container", limit)
        free = min(memory.available, limit or memory.available)
        if free < LITTLE_MEMORY:
            tell.find(
                WARNING,
                f"{free / GB:.1f} GB of memory are free, and a run may be killed while it starts; end other programs, "
                "or set a smaller train.batch_size and data.workers=0",
            )
    with tell.doing("looking at /dev/shm", advice="set data.workers=0 if loader processes fail"):
        _shared_memory(tell)
    with tell.doing("reading ulimit -n", advice="set data.workers=0 if loader processes fail", severity=NOTE):
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        tell.fact("open files, allowed", soft)
        tell.fact("open files, allowed at most", hard)
        if soft != resource.RLIM_INFINITY and soft < FEW_FILES:
            tell.find(
                WARNING,
                f"a process may open {soft} files, and loader processes end where that is too few; allow more with "
                f"ulimit -n {FEW_FILES}, or set data.workers=0",
            )
    if not Path("/proc/self/stat").exists():
        tell.find(BROKEN, "/proc is not mounted, and neither torch nor the watchdog works without it; mount it")
    _variables(tell)


def _processor() -> str:
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return " ".join(found[1].split()) if found else platform.processor() or platform.machine()


def _memory_limit(cgroup: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that the control group grants; None where there is no limit. Versions 2 and 1."""
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        try:
            limit = int((cgroup / name).read_text())
        except (OSError, ValueError):  # no such file, or "max"
            continue
        return limit if limit < 1 << 60 else None
    return None


def _shared_memory(tell: Teller, folder: Path = Path("/dev/shm")) -> None:
    if not folder.is_dir():
        tell.fact("shared memory", None)
        tell.find(
            WARNING,
            f"there is no {folder}, over which loader processes hand their batches and NCCL its messages; mount a "
            "tmpfs there (docker --shm-size=1g), or set data.workers=0",
        )
        return
    usage = shutil.disk_usage(folder)
    tell.fact("shared memory", usage.total)
    tell.fact("shared memory, free", usage.free)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0" * 4096)
    except OSError as error:
        tell.find(
            WARNING,
            f"{folder} cannot be written ({error.strerror}), and loader processes hand their batches over it; mount it "
            "as a tmpfs that this user may write to, or set data.workers=0",
        )
        return
    if usage.free < LITTLE_SHARED_MEMORY:
        tell.find(
            WARNING,
            f"{folder} has {usage.free / 1e6:.0f} MB free, and batches of large images need more; give the container a "
            "larger one (docker --shm-size=1g, in Kubernetes a volume in memory), or set data.workers=0",
        )


def _variables(tell: Teller) -> None:
    """The harmless variables that are set; what is left over from a launcher is a finding."""
    tell.fact("variables", {name: os.environ[name] for name in HARMLESS_VARIABLES if name in os.environ})
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in names if name not in os.environ]
    if missing and ("RANK" in os.environ or "WORLD_SIZE" in os.environ):
        tell.find(
            WARNING,
            f"RANK or WORLD_SIZE is set and {', '.join(missing)} {'is' if len(missing) == 1 else 'are'} not, so that a "
            "run takes this for half a launcher and ends; unset both, or start with deepspeed or torchrun",
        )


# ---------------------------------------------------------------------------------------------------------------------
# Packages


def versions(tell: Teller, options: Options) -> None:
    """Versions of what a run depends on, as installed, against what this package asks for; nothing is imported."""
    import ase_dist
    from ase_dist.versions import version_of

    tell.fact("ase-dist", ase_dist.__version__)
    with tell.doing(
        "asking git for the commit", advice="it is then missing in env.json, and nothing else", severity=NOTE
    ):
        from ase_dist.training.record.environment import git_commit

        tell.fact("commit", git_commit())
    for name, bounds in _requirements(tell).items():
        found = version_of(name)
        tell.fact(name, found)
        if found is None:
            tell.find(BROKEN, f"{name} is not installed, and every run needs it: pip install '{name}{bounds}'")
        elif not _is_within(found, bounds):
            tell.find(WARNING, f"{name} is {found} and this version needs {bounds}: pip install '{name}{bounds}'")
    for name in EXTRAS:
        if (found := version_of(name)) is not None:
            tell.fact(name, found)


def _requirements(tell: Teller) -> dict[str, str]:
    """What the installed package asks for without extras, name to bounds; a checkout's pyproject.toml else."""
    from importlib import metadata

    try:
        lines = metadata.requires("ase-dist") or []
    except metadata.PackageNotFoundError:
        project = Path(__file__).parents[2] / "pyproject.toml"
        try:
            block = re.search(r"^dependencies = \[\n(.*?)^\]", project.read_text(encoding="utf-8"), re.M | re.S)
        except OSError:
            block = None
        lines = re.findall(r'"([^"]+)"', block[1]) if block else list(REQUIRED)
        tell.fact("installed", "no: it runs from a folder on the path")
    found = [re.fullmatch(r"([\w.-]+)([^;]*)", line) for line in lines if "extra ==" not in line]
    return {match[1]: match[2].strip(" ()") for match in found if match}


def _is_within(version: str, bounds: str) -> bool:
    try:
        from packaging.specifiers import SpecifierSet
    except ImportError:
        return True
    return SpecifierSet(bounds, prereleases=True).contains(version)


def devices(tell: Teller, options: Options) -> None:
    """torch: its build, a product on the CPU and on each GPU, driver, CUDA and NCCL."""
    driver = _nvidia_driver()
    tell.fact("NVIDIA driver", driver)
    with tell.doing("importing torch", advice=REINSTALL.format("torch torchvision"), severity=BROKEN):
        began = time.perf_counter()
        import torch

        tell.fact("torch", torch.__version__)
        tell.fact("seconds to import torch", round(time.perf_counter() - began, 1))
        tell.fact("torch's CUDA", torch.version.cuda)
        tell.fact("torch's threads", torch.get_num_threads())
        tell.fact("CPU instructions", torch.backends.cpu.get_cpu_capability())
    if "torch" not in sys.modules or not hasattr(sys.modules["torch"], "matmul"):
        return
    with tell.doing("multiplying two matrices on the CPU", advice=REINSTALL.format("torch"), severity=BROKEN):
        _multiply("cpu")
    with tell.doing("counting the GPUs", advice="a run would compute on the CPU; look at what nvidia-smi says"):
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        tell.fact("GPUs", count)
        if driver and not torch.version.cuda:
            tell.find(
                WARNING,
                f"this machine has an NVIDIA driver, {driver}, and torch {torch.__version__} is built without CUDA, so "
                "that runs compute on the CPU; install the torch for your CUDA from pytorch.org",
            )
        elif driver and not count:
            tell.find(
                WARNING,
                f"torch finds no GPU although there is a driver, {driver} (CUDA_VISIBLE_DEVICES may hide them, a "
                f"container may lack --gpus all, or the driver is too old for CUDA {torch.version.cuda}); runs compute "
                "on the CPU",
            )
        if not count:
            return
        tell.fact("NCCL", ".".join(map(str, torch.cuda.nccl.version())) if _has_nccl() else None)
    for i in range(count):
        with tell.doing(f"multiplying two matrices on GPU {i}", advice="leave it out with CUDA_VISIBLE_DEVICES"):
            properties = torch.cuda.get_device_properties(i)
            free, total = torch.cuda.mem_get_info(i)
            major, minor = torch.cuda.get_device_capability(i)
            tell.fact(f"GPU {i}", f"{properties.name}, {total / GB:.0f} GB, {free / GB:.0f} GB free, sm_{major}{minor}")
            _multiply(f"cuda:{i}")
            if free < 0.5 * total:
                tell.find(
                    NOTE,
                    f"GPU {i} has {free / GB:.0f} of {total / GB:.0f} GB free, as another program computes there; wait "
                    "for it, or choose others with CUDA_VISIBLE_DEVICES",
                )


def _multiply(device: str) -> None:
    """Raise where a small product is wrong."""
    import torch

    a = torch.arange(64 * 64, dtype=torch.float32, device=device).view(64, 64) % 7
    if float((a @ torch.eye(64, device=device) - a).abs().max()) != 0:
        raise ArithmeticError("a product with the identity is wrong")


def _has_nccl() -> bool:
    import torch

    return bool(torch.distributed.is_available() and torch.distributed.is_nccl_available())


def _nvidia_driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text(encoding="ascii", errors="replace")
    except OSError:
        return None
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", text)
    return found[1] if found else "of an unknown version"


def libraries(tell: Teller, options: Options) -> None:
    """Import what every run imports, one after another; what DeepSpeed finds here."""
    for name in REQUIRED:
        module = "fairscale.nn.checkpoint" if name == "fairscale" else name
        with (
            tell.doing(f"importing {name}", advice=REINSTALL.format(name), severity=BROKEN),
            tell_seconds(tell, f"seconds to import {name}"),
        ):
            import_module(module)
    if "deepspeed" not in sys.modules or not hasattr(sys.modules["deepspeed"], "initialize"):
        return
    with tell.doing("asking DeepSpeed for the accelerator", advice="set DS_ACCELERATOR=cpu or cuda", severity=BROKEN):
        from deepspeed.accelerator import get_accelerator

        from ase_dist.training.loop.default_type import cpu_has_bf16
        from ase_dist.training.process.device import has_native_bf16

        accelerator = get_accelerator()
        is_cpu = accelerator.device_name() == "cpu"
        tell.fact("accelerator", accelerator.device_name())
        tell.fact("native bf16", cpu_has_bf16() if is_cpu else has_native_bf16(accelerator))
    with tell.doing("looking for locks of torch's compiler", advice="see docs/doctor.md", severity=NOTE):
        from ase_dist.training.process.runtime import build_locks

        for sentence in build_locks():
            tell.find(WARNING, sentence)


@contextmanager
def tell_seconds(tell: Teller, name: str) -> Iterator[None]:
    """Tell how long what is inside took, where it did not fail."""
    began = time.perf_counter()
    yield
    tell.fact(name, round(time.perf_counter() - began, 1))


# ---------------------------------------------------------------------------------------------------------------------
# Compilers


def compilers(tell: Teller, options: Options) -> None:
    """The C++ compiler that torch.compile and DeepSpeed's ops use, tried; ninja, Python's headers, CUDA's compiler."""
    compiler = next(filter(None, map(shutil.which, (os.environ.get("CXX") or "g++", "c++", "clang++"))), None)
    tell.fact("C++ compiler", compiler)
    advice = (
        "needed by train.compile, the C++ side of torch.compile and optimisers on the host; Debian: apt install g++"
    )
    if compiler is None:
        tell.find(NOTE, f"there is no C++ compiler; {advice}")
    else:
        with tell.doing("compiling a C++ program", advice=advice, severity=NOTE):
            tell.fact("C++ compiler, version", _first_line(compiler, "--version"))
            _compile(compiler, "#include <vector>\nint main() { return std::vector<int>(3).size() - 3; }\n", "-fopenmp")
        with tell.doing(
            "compiling a Python extension",
            advice="train.compile needs Python's headers; Debian: apt install python3-dev",
            severity=NOTE,
        ):
            include = sysconfig.get_path("include")
            _compile(compiler, "#include <Python.h>\nint main() { return 0; }\n", f"-I{include}", "-c")
    tell.fact("ninja", shutil.which("ninja"))
    if shutil.which("ninja") is None:
        tell.find(NOTE, "there is no ninja, and DeepSpeed's Adam on the host is replaced by torch's: pip install ninja")
    tell.fact("nvcc", shutil.which("nvcc"))


def _first_line(*command: str) -> str:
    done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    return done.stdout.partition("\n")[0]


def _compile(compiler: str, program: str, *flags: str) -> None:
    """Compile ``program`` in a temporary folder; raises RuntimeError with the compiler's first error."""
    with tempfile.TemporaryDirectory() as folder:
        command = [compiler, "-x", "c++", "-", *flags, "-o", f"{folder}/out"]
        done = subprocess.run(command, input=program, capture_output=True, text=True, timeout=60, check=False)
    if done.returncode:
        errors = [line for line in done.stderr.splitlines() if "error" in line] or done.stderr.splitlines()
        raise RuntimeError(errors[0] if errors else f"exit code {done.returncode}")


# ---------------------------------------------------------------------------------------------------------------------
# Folders


def folders(tell: Teller, options: Options) -> None:
    """Caches, the temporary folder and the output folder: size, free disk, and whether they can be written to."""
    with tell.doing("looking for the temporary folder", advice="set TMPDIR to a folder that can be written to"):
        tell.fact("temporary folder", tempfile.gettempdir())
    for name, find in _caches().items():
        with tell.doing(
            f"looking at the cache of {name}", advice="name another place in its variable", severity=WARNING
        ):
            folder, variable = find(), VARIABLES[name]
            tell.fact(f"cache of {name}", f"{folder}, {_size_in_words(folder)}")
            if why := _why_unwritable(folder):
                tell.find(
                    WARNING,
                    f"the cache of {name}, {folder}, cannot be written to ({why}); set {variable} to a folder that can",
                )
    output = Path(options["output"]).absolute()
    with tell.doing(f"looking at the output folder {output}", advice="name another with output=FOLDER"):
        place = _nearest(output)
        usage = shutil.disk_usage(place)
        tell.fact("output folder", str(output))
        tell.fact("output folder, disk", usage.total)
        tell.fact("output folder, free", usage.free)
        tell.fact("output folder, file system", _file_system(place))
        if why := _why_unwritable(output):
            tell.find(
                WARNING, f"output: cannot write to {output} ({why}); name a folder that can be written to with output="
            )
        elif usage.free < LITTLE_DISK:
            tell.find(
                WARNING,
                f"output: {usage.free / GB:.1f} GB are free at {output}, and a run whose disk is full ends with exit "
                "code 74; free some, name another folder with output=, or keep fewer checkpoints (checkpoint.keep)",
            )
        inodes = os.statvfs(place)
        if inodes.f_files and inodes.f_favail < FEW_INODES:
            tell.find(WARNING, f"output: the disk of {output} has room for {inodes.f_favail} more files; delete some")


VARIABLES = {
    "data sets": "XDG_CACHE_HOME",
    "torch's extensions": "TORCH_EXTENSIONS_DIR",
    "torch.compile": "TORCHINDUCTOR_CACHE_DIR",
    "triton": "TRITON_CACHE_DIR",
    "weights from the hub": "HF_HOME",
    "matplotlib": "MPLCONFIGDIR",
}


def _caches() -> dict[str, Callable[[], Path]]:
    """Where the libraries keep what they have made or fetched, by what it is; see ``VARIABLES``."""
    from ase_dist.data.cache import cache_folder
    from ase_dist.files import home_folder

    def of_variable(name: str, default: Callable[[], Path]) -> Callable[[], Path]:
        return lambda: Path(os.environ[name]) if os.environ.get(name) else default()

    def xdg() -> Path:
        return Path(os.environ["XDG_CACHE_HOME"]) if os.environ.get("XDG_CACHE_HOME") else home_folder() / ".cache"

    defaults: dict[str, Callable[[], Path]] = {
        "torch's extensions": lambda: xdg() / "torch_extensions",
        "torch.compile": lambda: Path(tempfile.gettempdir()) / f"torchinductor_{_user()}",
        "triton": lambda: home_folder() / ".triton",
        "weights from the hub": lambda: xdg() / "huggingface",
        "matplotlib": lambda: home_folder() / ".config" / "matplotlib",
    }
    return {
        "data sets": cache_folder,
        **{name: of_variable(VARIABLES[name], default) for name, default in defaults.items()},
    }


def _user() -> str:
    import getpass

    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return str(os.getuid())


def _nearest(folder: Path) -> Path:
    """``folder``, or the nearest folder above it that is there."""
    return next(place for place in (folder, *folder.parents) if place.exists())


def _why_unwritable(folder: Path) -> str:
    """Why no file can be made in ``folder``, or in the nearest folder above it that is there; empty where one can."""
    place = _nearest(folder.absolute())
    if not place.is_dir():
        return f"{place} is a file"
    try:
        with tempfile.TemporaryFile(dir=place) as file:
            file.write(b"0" * 4096)
            file.flush()
    except OSError as error:
        return error.strerror or str(error)
    return ""


def _size_in_words(folder: Path) -> str:
    """The size of all files, as far as they can be counted in ``WALK_SECONDS``."""
    if not folder.exists():
        return "not there yet"
    total, deadline = 0, time.monotonic() + WALK_SECONDS
    for root, _, names in os.walk(folder):
        for name in names:
            try:
                total += os.lstat(os.path.join(root, name)).st_size  # noqa: PTH118  (many files)
            except OSError:
                continue
        if time.monotonic() > deadline:
            return f"more than {total / GB:.1f} GB"
    return f"{total / 1e6:,.0f} MB"


def _file_system(place: Path) -> str:
    import psutil

    mounts = [part for part in psutil.disk_partitions(all=True) if place.resolve().is_relative_to(part.mountpoint)]
    return max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"


def data(tell: Teller, options: Options) -> None:
    """The folders of data that were named: there, readable, how much is at their first level."""
    for name in options["data"]:
        root = Path(name).absolute()
        with tell.doing(f"looking at the data in {root}", advice="name another with data.root="):
            if not root.exists():
                tell.find(WARNING, f"data: there is no {root}; name the folder of the data set with data.root=FOLDER")
                continue
            began = time.perf_counter()
            names = sorted(entry.name for entry in root.iterdir()) if root.is_dir() else [root.name]
            seconds = time.perf_counter() - began
            shown = ", ".join(names[:6]) + (", ..." if len(names) > 6 else "")
            tell.fact(f"data in {root}", f"{len(names)} entries on {_file_system(root)}: {shown}")
            if not names:
                tell.find(WARNING, f"data: {root} is empty; unpack the data set there, or name another with data.root=")
            if seconds > 2:
                tell.find(
                    NOTE,
                    f"data: listing {root} took {seconds:.0f} s; pack the data set with ase-dist prepare-data onto a "
                    "faster disk",
                )


# ---------------------------------------------------------------------------------------------------------------------
# Several ranks


def network(tell: Teller, options: Options) -> None:
    """The interface that ranks of several nodes would use, names only, and whether this host's name is known."""
    with tell.doing("listing the network interfaces", advice="name one in GLOO_SOCKET_IFNAME", severity=NOTE):
        import psutil

        from ase_dist.cluster.environment import INTERFACE, refused_exports
        from ase_dist.cluster.network import interface_towards

        status = psutil.net_if_stats()
        tell.fact("interfaces", [name for name, state in status.items() if state.isup])
        route = interface_towards("192.0.2.1")  # an address of documentation: nothing is sent
        tell.fact("interface used", route.name if route else None)
        for variable in INTERFACE:
            name = os.environ.get(variable, "").lstrip("^=")
            if name and not any(each.startswith(name.split(",")[0].split(":")[0]) for each in status):
                tell.find(
                    WARNING,
                    f"{variable} names {name!r}, which is no interface of this machine; unset it or name another",
                )
        if not any(state.isup and name.startswith("lo") for name, state in status.items()):
            tell.find(
                WARNING, "the loopback interface is down, over which ranks of one machine meet: ip link set lo up"
            )
        for sentence in refused_exports(os.environ):
            tell.find(NOTE, f"with several nodes: {sentence}")
    with tell.doing(
        "looking up this host's own name",
        advice="ranks over gloo may not meet; add the name to /etc/hosts, or set GLOO_SOCKET_IFNAME=lo on one machine",
    ):
        import socket

        socket.getaddrinfo(platform.node(), None)


def launchers(tell: Teller, options: Options) -> None:
    """The programs that start ranks."""
    for name in LAUNCHERS:
        tell.fact(name, shutil.which(name))
    own = Path(sys.executable).parent
    found = shutil.which("deepspeed")
    if found and (own / "deepspeed").exists() and Path(found).parent.resolve() != own.resolve():
        tell.find(
            WARNING,
            f"the program deepspeed on the path, {found}, belongs to another Python than this one; activate the "
            f"environment in {own.parent}",
        )
    for name, what in (("pdsh", "deepspeed --hostfile needs it to start other nodes"), ("ssh", "other nodes need it")):
        if shutil.which(name) is None:
            tell.find(NOTE, f"there is no {name}; {what} (not torchrun, srun or mpirun): Debian: apt install {name}")


def collective(tell: Teller, options: Options) -> None:
    """Two ranks on this machine add up a tensor: over gloo, and over NCCL where there are two GPUs."""
    from ase_dist.doctor.ranks import add_up

    advice = "runs of several ranks fail here; see the findings on the network, and docs/doctor.md"
    with tell.doing("adding up a tensor of two ranks over gloo", advice=advice):
        tell.fact("gloo, two ranks", add_up("gloo", timeout=options["timeout"]))
    with tell.doing("adding up a tensor of two GPUs over NCCL", advice=advice):
        import torch

        if torch.cuda.is_available() and torch.cuda.device_count() > 1:
            tell.fact("NCCL, two ranks", add_up("nccl", timeout=options["timeout"]))


PROBES: dict[str, Callable[[Teller, Options], None]] = {
    function.__name__: function
    for function in (
        machine,
        versions,
        devices,
        libraries,
        compilers,
        folders,
        data,
        network,
        launchers,
        collective,
    )
}


def main(arguments: list[str]) -> int:
    """Run the probe that ``arguments`` name, with its options as JSON; what it tells goes to the standard output.

    What libraries print goes to the standard error.
    """
    name, options = arguments
    with os.fdopen(os.dup(1), "w", encoding="utf-8") as stream:
        os.dup2(2, 1)
        PROBES[name](Teller(stream), json.loads(options))
    return 0
