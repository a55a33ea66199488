"""Run the README's commands in its order, as somebody does who has just cloned it, in a copy of this checkout.

    python .ci/readme.py FOLDER [--quick] [--only TEXT]

Each command's output becomes FOLDER/NN.txt, and the copy is FOLDER/checkout. What the README expects its reader to have
(PASCAL-Context, photographs, weights) is put there first: generated scenes in the same layout, untrained weights.
With --quick every command gets settings that make it short: minutes in all, where the studies alone take hours.
Not run: what installs and tests, which is .ci/run's, and what needs several machines, which is tests/cluster's.
The exit code is 1 where a command failed.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
ELSEWHERE = re.compile(r"^(pip|pytest) |HOST")
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
    (r"(launch/train\.py|ase_dist train) ", f"train.max_steps=2 {SMALL}"),
    (r"train\.py .*--config pascal", "data.limit_val=2 data.size=64"),
    (r"train\.py ((?!--baseline).)*--config pascal", SMALL_VIT),
    (r"study\.py table1", f"--only stl_resnet18,ase_16_3_1_4 {STUDY}"),
    (r"study\.py naive_vs_ase", f"--only ase_16_3_1_4_pair 'model.backbone_args={{depth: 1}}' {STUDY}"),
    (r"study\.py topk", f"--only ase_k3 {SMALL_VIT} {STUDY}"),
    (r"benchmarks/roofline", "--tokens 6 --depth 1 --size 64 --step-shapes tiny"),
    (r"benchmarks/layer", "--images 1 --few-images 1 --tokens 6 --repeats 1 --threads 1"),
    (r"benchmarks/train_step", "--depth 1 --size 64 --head linear --repeats 1 --threads 1"),
    (r"benchmarks/scaling", "--points 2 --images 1 --repeats 1"),
)


def main():
    """Parse, copy, bring what the reader brings, run."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--quick", action="store_true", help="with settings that make every command short")
    parser.add_argument("--only", default="", metavar="TEXT", help="the commands that contain it")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True)
    checkout = folder / "checkout"
    shutil.copytree(ROOT, checkout, symlinks=True, ignore=shutil.ignore_patterns(*LEFT))
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                   "PYTHONPATH": str(checkout), "XDG_CACHE_HOME": str(folder / "cache")}  # fmt: skip
    bring_data(checkout, environment)
    words = ALWAYS + QUICK * arguments.quick
    chosen = [command for command in commands(checkout / "README.md") if arguments.only in command]
    failed = [number for number, command in enumerate(chosen, start=1)
              if not ran(f"{command} {appended(command, words)}".strip(), checkout, environment,
                         folder / f"{number:02}.txt")]  # fmt: skip
    print(f"{len(chosen)} commands, {len(failed)} failed")
    return 1 if failed or not chosen else 0


def commands(readme):
    """The lines of the bash blocks that are run here, continued ones joined."""
    blocks = re.findall(r"^```bash\n(.*?)^```$", readme.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks if "ssh-copy-id" not in block for line in block.replace("\\\n", " ").splitlines()]
    parts = [re.sub(r"^pip [^&]*&& ", "", line) for line in lines]  # what follows an installation
    return [re.sub(r" +", " ", part) for part in parts if not ELSEWHERE.search(part)]


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
    (checkout / "holiday").mkdir()
    for photograph in photographs[1:3]:
        (checkout / "holiday" / photograph.name).symlink_to(photograph)


def ran(command, checkout, environment, output):
    """Whether the command ended well; prints how it went, and the end of what it said where it did not."""
    print(f"{output.stem}  {command}", flush=True)
    began = time.monotonic()
    with output.open("w") as said:
        said.write(f"$ {command}\n\n")
        said.flush()
        done = subprocess.run(["bash", "-c", command], cwd=checkout, env=environment, stdin=subprocess.DEVNULL,
                              stdout=said, stderr=subprocess.STDOUT, check=False)  # fmt: skip
    print(f"    exit code {done.returncode} after {time.monotonic() - began:.1f} s", flush=True)
    if done.returncode:
        print("\n".join(output.read_text(encoding="utf-8", errors="replace").splitlines()[-15:]))
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
