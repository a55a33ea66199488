"""How much of the package a reader must open: files of one MoE forward pass and of one training step, and functions.

    python .ci/structure.py            # of this checkout; PYTHONPATH=OTHER python .ci/structure.py is of another one

Files are counted by what runs: every module of the package of which a function is entered. Figures to see by, not to
chase: where a number and a reader disagree, the reader is right.
"""

import ast
import collections
import importlib.util
import statistics
import sys
import tempfile
import threading
from pathlib import Path

PACKAGE = Path(importlib.util.find_spec("ase_dist").origin).parent
STEP = ("_step", "train_step")  # of the trainer, in this version and in earlier ones


class Entered:
    """The files of the package of which a function was entered while ``active``."""

    def __init__(self, *, inside=None):
        self.files, self.inside, self.depth = {}, inside, 0

    def __call__(self, frame, event, argument):
        """Take one event of ``sys.setprofile``."""
        name = frame.f_code.co_filename
        if not name.startswith(str(PACKAGE)):
            return
        is_gate = self.inside and frame.f_code.co_name in self.inside and name.endswith("trainer.py")
        if event == "call":
            self.depth += bool(is_gate)
            if self.depth or not self.inside:
                self.files.setdefault(str(Path(name).relative_to(PACKAGE)), frame.f_code.co_name)
        elif event == "return" and is_gate:
            self.depth -= 1


def moe_forward():
    """Files of one forward and backward pass of a layer on one rank."""
    import torch
    from timm.layers import Mlp

    from ase_dist.moe import MoEFFN

    layer = MoEFFN(Mlp(16, 32), num_experts=4, k=1, num_tasks=2)
    x = torch.randn(2, 5, 16)
    layer(x)
    entered = Entered()
    sys.setprofile(entered)
    layer(x)
    sys.setprofile(None)
    return sorted(entered.files)


def training_step():
    """Files of the training steps of a tiny run in this process, loader threads included."""
    from ase_dist.commands.train import main

    entered = Entered(inside=STEP)
    with tempfile.TemporaryDirectory() as folder:
        settings = [
            f"output={folder}/run", f"data.root={folder}/scenes", "data.train_images=4", "data.val_images=2",
            "data.scene_size=64", "data.size=64", "train.batch_size=2", "train.max_steps=3", "model.head=linear",
            "model.moe.num_experts=4", "model.moe.k=1", "eval.at_start=false", "eval.pictures=0",
            "monitor.tensorboard=false", "model.pretrained=none",
        ]  # fmt: skip
        threading.setprofile(entered)
        sys.setprofile(entered)
        try:
            code = main(settings)
        finally:
            sys.setprofile(None)
            threading.setprofile(None)
    assert code == 0, code
    return sorted(entered.files)


def functions():
    """Lines of functions, private module functions, and those of them that are used once."""
    lengths, private, once, directives, lines = [], 0, 0, 0, 0
    for path in PACKAGE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        tree = ast.parse(text)
        directives += text.count("# fmt: skip")
        lines += 0 if "scenes" in path.parts else text.count("\n")
        used = collections.Counter(n.id for n in ast.walk(tree) if isinstance(n, ast.Name))
        used += collections.Counter(n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute))
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                lengths.append(node.end_lineno - node.lineno + 1)
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and node.name.startswith("_") and not node.name.startswith("__"):
                private, once = private + 1, once + (used[node.name] == 1)
    lengths.sort()
    return {
        "private functions of modules": private,
        "of these used once": once,
        "median lines of a function": statistics.median(lengths),
        "90th percentile": lengths[int(0.9 * len(lengths))],
        "# fmt: skip": directives,
        "lines without scenes": lines,
    }


if __name__ == "__main__":
    for title, files in (("one MoE forward pass", moe_forward()), ("one training step", training_step())):
        print(f"{title}: {len(files)} files\n  {' '.join(files)}")
    for name, value in functions().items():
        print(f"{name}: {value:g}")
