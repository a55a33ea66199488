"""Folders of made-up runs and studies, and a page as a tree that says where its markup is wrong."""

import json
import logging
from dataclasses import dataclass, field
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from ase_dist.read_config import load_settings, to_yaml
from ase_dist.training.record.metrics import Recorder

TASKS = ["semseg", "edge", "normals"]
LAYERS, EXPERTS, SHARED = 2, 5, [4]
STEPS = range(1, 7)
VOID = {"meta", "link", "img", "input", "br", "hr"}
METRIC = {"semseg": "miou", "edge": "bce", "normals": "mean"}

# ---------------------------------------------------------------------------------------------------------------------
# Runs


def load_at(step):
    """Activation frequency [layers][tasks][N], different for every cell and step; 1 for the shared expert."""
    cells = np.arange(LAYERS * len(TASKS) * EXPERTS).reshape(LAYERS, len(TASKS), EXPERTS)
    load = ((cells * 7 + step * 13) % 97) / 100
    load[..., SHARED] = 1.0
    return load


def train_values(step):
    load = load_at(step)
    return {
        "loss": 3.0 / step,
        "losses": {name: 1.0 / step + i for i, name in enumerate(TASKS)},
        "aux_loss": -0.01,
        "lr": 0.001 * step,
        "epoch": step // 3,
        "images_per_second": 5.0,
        "memory_bytes": 2_000_000_000,
        "expert_load": load,
        "mean_gates": load / 4,
        "shared_gate": load[..., -1] / 4,
    }


def eval_values(step):
    metrics = {"semseg": {"miou": 10.0 + step, "accuracy": 50.0}, "edge": {"bce": 0.1 - 0.01 * step},
               "normals": {"mean": 60.0 - step}}  # fmt: skip
    trivial = {"semseg": {"miou": 12.0, "accuracy": 40.0}, "edge": {"bce": 0.09}, "normals": {"mean": 50.0}}
    return {"metrics": metrics, "trivial": trivial}


def conflict_values(step):
    cosines = np.eye(3) + (1 - np.eye(3)) * (0.1 * step - 0.3)
    return {"cosines": cosines, "cosines_by_layer": [0.1, -0.1 * step], "conflicting": 0.5}


def write_metrics(folder):
    recorder = Recorder(folder / "metrics.jsonl", enabled=True)
    recorder.write("run", step=0, values={"tasks": TASKS, "data": "scenes", "shared_experts": SHARED, "world": 2})
    recorder.write("eval", step=0, values=eval_values(0))
    for step in STEPS:
        if step % 3 == 1:
            recorder.write("conflict", step=step, values=conflict_values(step))
        recorder.write("train", step=step, values=train_values(step))
        if step % 3 == 0:
            recorder.write("eval", step=step, values=eval_values(step))
    recorder.close()


def write_picture(path, *, size=(640, 400), grain=8, seed=0):
    """Noise of squares of ``grain`` pixels, which no encoder makes small altogether."""
    path.parent.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(seed).integers(0, 255, (size[1] // grain, size[0] // grain, 3), dtype=np.uint8)
    Image.fromarray(noise).resize(size, Image.Resampling.NEAREST).save(path)


def write_log(folder, rank, *lines):
    """A log as ``RunFolder`` has it: a start table, the steps, then ``lines``."""
    stamp = "2026-01-02 03:04:0{},678 [rank {}] INFO {}\n"
    text = stamp.format(1, rank, "") + "run\n-----\ntasks  semseg\n-----\n"
    text += stamp.format(2, rank, "train 3/6  loss 1.0  eta 0:00:01") + stamp.format(3, rank, "train 6/6  loss 0.5")
    (folder / f"rank_{rank}.log").write_text(text + "".join(line + "\n" for line in lines))


def write_run(folder):
    """A run of two ranks that took its last step."""
    folder.mkdir(parents=True)
    write_metrics(folder)
    settings = load_settings(None, ["tasks=[semseg,edge,normals]", "train.max_steps=6", f"output={folder}", "seed=7"])
    (folder / "config.yaml").write_text(to_yaml(settings))
    (folder / "ds_config.json").write_text("{}")
    summary = {"exit": "done", "step": 6, "total_steps": 6, "data": "scenes", "best_step": 6, "world_size": 2,
               "parameters": {"all": {"total": 3_769_457, "trained": 1_325_457}}, "train_seconds": 61.0,
               "images_per_second": 5.25, **{"metrics": eval_values(6)["metrics"], "metrics_step": 6,
                                             "trivial": eval_values(6)["trivial"]}}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    environment = {"python": "3.11", "packages": {"torch": "2.4"}, "hostname": "node7", "device": "cpu",
                   "world_size": 2, "command": ["launch/train.py", "--local_rank=0", "train.max_steps=6"]}  # fmt: skip
    (folder / "env.json").write_text(json.dumps(environment))
    for rank in (0, 1):
        write_log(folder, rank)
    for step in (0, 3, 6):
        write_picture(folder / "predictions" / f"step_{step:06d}.png", seed=step)
    return folder


@pytest.fixture
def run_folder(tmp_path):
    return write_run(tmp_path / "first_run")


# ---------------------------------------------------------------------------------------------------------------------
# Studies

VARIANTS = {"stl": "Single task", "naive": "Naive shared", "ase": "Adaptive shared"}
SEEDS = {"stl": [0, 1], "naive": [0, 1], "ase": [0]}


def variant_values(name):
    """A variant of results.json; "naive" is best where every seed is needed, "ase" has but one."""
    seeds, place = SEEDS[name], list(VARIANTS).index(name)
    runs = [f"runs/{name}/seed_{seed}" for seed in seeds]
    curve = {"steps": [1, 2, 3], "conflicting": [[0.5 + seed / 10 for seed in seeds]] * 3,
             "cosine": [[0.1 * place for _ in seeds]] * 3}  # fmt: skip
    return {
        "name": name,
        "label": VARIANTS[name],
        "settings": {"row": name, "model.moe.k": 3},
        "seeds": seeds,
        "runs": runs,
        "missing": [f"{name}/seed_{seed}" for seed in (0, 1) if seed not in seeds],
        "metrics": {"semseg": {"miou": [20.0 + 2 * place + seed for seed in seeds]},
                    "edge": {"bce": [0.05 - 0.01 * place for _ in seeds]}},
        "reference": "stl",
        "delta_m": [float(place) for _ in seeds],
        "parameters": {"total": 4_000_000, "trained": 2_000_000 - 100_000 * place},
        "flops": {"forward": 2e9, "backward": 4e9},
        "images_per_second": [4.0 - place for _ in seeds],
        "memory_bytes": [1.5e9 for _ in seeds],
        **({} if name == "stl" else {"conflict": curve}),
    }  # fmt: skip


def write_study(folder):
    """Three variants, one of them with a seed that is missing; a run is there for the first seed of two of them."""
    folder.mkdir(parents=True)
    facts = {"name": "toy", "title": "A toy study", "data": "generated scenes", "steps": 6, "seeds": [0, 1],
             "references": dict.fromkeys(VARIANTS, "stl")}  # fmt: skip
    (folder / "study.json").write_text(json.dumps(facts))
    variants = [variant_values(name) for name in VARIANTS]
    (folder / "results.json").write_text(
        json.dumps({"data": "scenes", "tasks": ["semseg", "edge"], "variants": variants})
    )
    write_picture(folder / "plots" / "gains.png", size=(480, 240))
    for name in ("naive", "ase"):
        write_run(folder / "runs" / name / "seed_0")
    return folder


@pytest.fixture
def study_folder(tmp_path):
    return write_study(tmp_path / "toy_study")


# ---------------------------------------------------------------------------------------------------------------------
# Pages


@dataclass
class Element:
    tag: str
    attributes: dict
    children: list = field(default_factory=list)
    parts: list = field(default_factory=list)  # texts and children as they come

    @property
    def text(self):
        """All text inside, spaces made single."""
        return " ".join(self.raw.split())

    @property
    def raw(self):
        return "".join(part if isinstance(part, str) else part.raw for part in self.parts)

    def all(self, tag=None, **attributes):
        """Every element below of this tag and with these attributes (class_: one of its classes), in order."""
        wanted = attributes.pop("class_", None)
        found = []
        for child in self.children:
            classes = (child.attributes.get("class") or "").split()
            if (
                tag in (None, child.tag)
                and (wanted is None or wanted in classes)
                and all(child.attributes.get(name) == value for name, value in attributes.items())
            ):
                found.append(child)
            found += child.all(tag, **attributes, **({} if wanted is None else {"class_": wanted}))
        return found

    def one(self, tag=None, **attributes):
        found = self.all(tag, **attributes)
        assert len(found) == 1, f"{len(found)} of {tag} {attributes}"
        return found[0]


class Page(HTMLParser):
    """A page as a tree; raises where an element is not closed by its own tag."""

    def __init__(self, source):
        super().__init__(convert_charrefs=True)
        self.source, self.root = source, Element("", {})
        self._open = [self.root]
        self.feed(source)
        self.close()
        assert self._open == [self.root], f"not closed: {[element.tag for element in self._open[1:]]}"

    def handle_starttag(self, tag, attrs):
        names = [name for name, _ in attrs]
        assert len(names) == len(set(names)), f"{tag} has an attribute twice"
        element = Element(tag, dict(attrs))
        self._open[-1].children.append(element)
        self._open[-1].parts.append(element)
        if tag not in VOID:
            self._open.append(element)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self._open.pop()

    def handle_endtag(self, tag):
        assert self._open[-1].tag == tag, f"</{tag}> closes <{self._open[-1].tag}> at {self.getpos()}"
        self._open.pop()

    def handle_data(self, data):
        self._open[-1].parts.append(data)

    def rows(self, table):
        """The texts of a table's cells, heads included."""
        return [[cell.text for cell in row.children] for row in table.all("tr")]


@pytest.fixture
def read_page():
    """Reads a written page as a ``Page``."""
    return lambda path: Page(path.read_text(encoding="utf-8"))


@pytest.fixture(autouse=True)
def quiet():
    """The package's logger as it was before."""
    logger = logging.getLogger("ase_dist")
    before = list(logger.handlers)
    yield
    logger.handlers[:] = before
