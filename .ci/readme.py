"""Run the commands of the README and of docs/ in their order, as somebody does who has just cloned it, in a copy.

    python .ci/readme.py FOLDER [--quick] [--only TEXT] [--page NAME]

Each command's output becomes FOLDER/NN.txt, and the copy of this checkout is FOLDER/checkout. What the pages expect
their reader to have (PASCAL-Context, photographs, weights) is put there first: generated scenes in the same layout,
untrained weights. With --quick every command gets settings that make it short: minutes in all, where the studies alone
take hours. The README goes first and docs/start.md second, since the other pages use their run; of these two at a time
are followed. A command that several pages have is run once.
Not run: what installs and tests, which is .ci/run's; what needs several machines, which is tests/cluster's; what serves
a page until it is stopped; the pages that a test of their own follows, in a folder of their own and with small models
(``followed_by``); with --quick the benchmarks, of which tests/test_benchmarks.py runs each at a tiny size.
The exit code is 1 where a command failed.
"""

import argparse
import itertools
import os
import re
import shutil
import subprocess
import sys
import tarfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import psutil

ROOT = Path(__file__).parents[1]
FIRST = ("README.md", "start.md")  # their run is what other pages evaluate, export and report
ELSEWHERE = re.compile(r"^(pip|pytest|sphinx-build|pre-commit|sudo) |HOST|--watch|ase-dist demo ")
LAUNCHERS = re.compile(r"^(deepspeed|torchrun) ")  # all of them meet at port 29500: one at a time
LIMIT = 600  # seconds that a command may take with --quick
LEFT = (".git", "__pycache__", ".*_cache", "*.egg-info", "build", "dist", "runs", "studies", "exports", ".venv")

# What is appended to the commands that match; all that match, in this order
ALWAYS = (
    (r"prepare_data\.py pascal", "--subset"),  # fewer images than the published lists
    (r"(--config|--data) (pascal|ccp)", "model.pretrained=none"),
)
SMALL = "train.batch_size=2 train.log_every=1 eval.batch_size=2 data.scenes.train_images=8 data.scenes.val_images=2"
STUDY = f"--seeds 1 --steps 1 {SMALL} data.limit_train=8 data.limit_val=2"
SMALL_VIT = "model.backbone=vit_tiny_patch16_224"
QUICK = (
    (r"(launch/train\.py|ase[_-]dist train) ", f"train.max_steps=2 {SMALL}"),
    (r"pretrain_backbone", f"train.max_steps=2 {SMALL}"),
    (r"train\.py .*--config pascal", "data.limit_val=2 data.size=64"),
    (r"train\.py ((?!--baseline).)*--config pascal", SMALL_VIT),
    (r"study\.py table1", f"--only stl_resnet18,ase_16_3_1_4 {STUDY}"),
    (r"study\.py naive_vs_ase", f"--only ase_16_3_1_4_pair 'model.backbone_args={{depth: 1}}' {STUDY}"),
    (r"study\.py topk", f"--only ase_k3 {SMALL_VIT} {STUDY}"),
)
QUICK_ELSEWHERE = re.compile(r"^python benchmarks/")  # tests/test_benchmarks.py runs each at a tiny size


def main():
    """Parse, copy, bring what the reader brings, run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="with settings that make every command short")
    parser.add_argument("--only", default="", metavar="TEXT", help="the commands that contain it")
    parser.add_argument("--page", default="", metavar="NAME", help="the commands of one page, such as export.md")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=shutil.ignore_patterns(*LEFT))
    (folder / "home").mkdir()
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(folder / "cache"),
                   "HOME": str(folder / "home")}  # fmt: skip
    if arguments.quick:  # several commands and CI's other stages share the cores
        environment["OMP_NUM_THREADS"] = "1"
    bring_data(checkout, environment)
    words = ALWAYS + QUICK * arguments.quick
    launching, numbers = threading.Lock(), itertools.count(1)

    def follow(lines):
        """The commands of a page in their order; returns how many failed."""
        failed = 0
        for line in lines:
            command = f"{line} {appended(line, words)}".strip()
            output = folder / f"{next(numbers):02}.txt"
            with launching if LAUNCHERS.search(line) else threading.Lock():
                failed += not ran(command, checkout, environment, output, LIMIT if arguments.quick else None)
        return failed

    chosen = {page: [line for line in lines if arguments.only in line
                     and not (arguments.quick and QUICK_ELSEWHERE.search(line))]
              for page, lines in to_run().items() if arguments.page in ("", page)}  # fmt: skip
    failed = sum(follow(chosen.pop(page, ())) for page in FIRST)
    with ThreadPoolExecutor(2) as pool:
        failed += sum(pool.map(follow, chosen.values()))
    done = next(numbers) - 1
    print(f"{done} commands, {failed} failed")
    return 1 if failed or not done else 0


def to_run():
    """The commands of each page that are run here, each once, by the page's name, ``FIRST`` in front."""
    seen, found = set(), {}
    pages = {path.name: path for path in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))}
    for name in (*FIRST, *(name for name in pages if name not in FIRST)):
        if not followed_by(name):
            lines = dict.fromkeys(commands(pages[name]))
            found[name] = [line for line in lines if line not in seen]
            seen.update(lines)
    return found


def followed_by(page):
    """The tests that read a page by its name and run its commands."""
    tests = (ROOT / "tests").rglob("test_*.py")
    return [test for test in tests if test.name not in ("test_docs.py", "test_readme.py")
            and f'"{page}"' in test.read_text(encoding="utf-8") and page != "README.md"]  # fmt: skip


def commands(page):
    """The lines of the bash blocks that are run here, continued ones joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks if "ssh-copy-id" not in block for line in block.replace("\\\n", " ").splitlines()]
    parts = [re.sub(r"^pip [^&]*&& ", "", line) for line in lines]  # what follows an installation
    return [re.sub(r" +", " ", part) for part in parts if part and not ELSEWHERE.search(part)]


def appended(command, table):
    """The words that a table adds to a command."""
    return " ".join(words for pattern, words in table if re.search(pattern, command))


def bring_data(checkout, environment):
    """PASCAL_MT.tgz and what it unpacks to, ccp_mt in the same layout, photographs."""
    make = [sys.executable, "launch/make_scenes.py", "made", "--train", "8", "--val", "2"]
    subprocess.run(make, cwd=checkout, env=environment, check=True, capture_output=True)
    (made,) = (checkout / "made").glob("scenes-*")
    made.rename(checkout / "PASCAL_MT")
    with tarfile.open(checkout / "PASCAL_MT.tgz", "w:gz") as archive:
        archive.add(checkout / "PASCAL_MT", "PASCAL_MT")
    (checkout / "ccp_mt").symlink_to("PASCAL_MT")
    photographs = sorted((checkout / "PASCAL_MT" / "JPEGImages").iterdir())
    (checkout / "photo.jpg").symlink_to(photographs[0])
    (checkout / "photographs").symlink_to("PASCAL_MT/JPEGImages")
    (checkout / "holiday").mkdir()
    for photograph in photographs[1:3]:
        (checkout / "holiday" / photograph.name).symlink_to(photograph)


def ran(command, checkout, environment, output, limit):
    """Whether the command ended well, in ``limit`` seconds; prints how it went, and the end of what it said if not."""
    began = time.monotonic()
    with output.open("w") as said:
        said.write(f"$ {command}\n\n")
        said.flush()
        process = subprocess.Popen(["bash", "-c", command], cwd=checkout, env=environment, stdin=subprocess.DEVNULL,
                                   stdout=said, stderr=subprocess.STDOUT)  # fmt: skip
        try:
            code = process.wait(limit)
        except subprocess.TimeoutExpired:
            for each in (*psutil.Process(process.pid).children(recursive=True), process):
                each.kill()
            code = f"{process.wait()} (it took too long)"
    text = f"{output.stem}  {command}\n    exit code {code} after {time.monotonic() - began:.1f} s"
    if code:
        text += "\n" + "\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:])
    print(text, flush=True)
    return code == 0


if __name__ == "__main__":
    sys.exit(main())
