"""Every reader of files that this package did not write: a valid folder, what of it is changed, and how it is read."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from scipy.io import savemat

from ase_dist.cluster.hostfile import read_hostfile
from ase_dist.config import Settings
from ase_dist.data import decode
from ase_dist.data.archive import unpack
from ase_dist.data.files import read_image
from ase_dist.data.folder import read_list
from ase_dist.data.packed.dataset import PackedDataset
from ase_dist.data.packed.prepare import Request, prepare
from ase_dist.deployment.exported import load
from ase_dist.deployment.images import read_rgb
from ase_dist.deployment.reference import read_reference
from ase_dist.json_files import json_digest, read_json
from ase_dist.models.backbone import build_backbone
from ase_dist.read_config import load_settings, read_tree
from ase_dist.report.page import write_report
from ase_dist.tasks import PASCAL_TASKS
from ase_dist.training.ds_config import read_ds_config, resolve
from ase_dist.training.record.metrics import read_metrics
from ase_dist.training.state.checkpoint import open_checkpoint
from ase_dist.training.state.meta import read_meta
from tests.data.conftest import PascalFolder, struct_array
from tests.deployment.conftest import make_export
from tests.report.conftest import write_run, write_study

SHAPE = (12, 16)
CHECKPOINT = Path(__file__).parents[1] / "fixtures/checkpoint_b13e2a2/lora/checkpoints/step_2"
BACKBONE = {"embed_dim": 32, "depth": 1, "num_heads": 2}


class Reader(NamedTuple):
    """``make`` writes a valid folder, ``targets`` are the files of it that are changed, ``read`` reads the folder.

    ``own_hash`` is the key under which a target has a hash of its own; half of the changed ones get a right one.
    """

    make: Callable[[Path], object]
    targets: tuple[str, ...]
    read: Callable[[Path], object]
    own_hash: str = ""


def with_hash(data: bytes, key: str) -> bytes:
    """A JSON object with a right hash of its own; other data as they are."""
    try:
        tree = json.loads(data)
        tree.pop(key, None)
        return json.dumps({**tree, key: json_digest(tree)}).encode()
    except (ValueError, AttributeError, RecursionError, TypeError):
        return data


def _file(name: str, content: Callable[[], bytes] | bytes) -> Callable[[Path], object]:
    return lambda folder: (folder / name).write_bytes(content if isinstance(content, bytes) else content())


def _npy(array: Any) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def _picture(form: str, array: Any, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, form, **options)
    return buffer.getvalue()


def _mat(compressed: bool = False, **variables: Any) -> bytes:
    buffer = io.BytesIO()
    savemat(buffer, variables, do_compression=compressed)
    return buffer.getvalue()


NOISE = np.random.default_rng(0).integers(0, 256, (*SHAPE, 3), dtype=np.uint8)
IDS = (NOISE[..., 0] % 5).astype(np.uint8)
PARTS = struct_array(("part_name", "mask"), [("head", IDS % 2), ("rfoot", 1 - IDS % 2)])
PERSON = [("person", 15, np.ones(SHAPE, np.uint8), PARTS), ("dog", 12, np.ones(SHAPE, np.uint8), np.zeros((0, 0)))]
ANNO = struct_array(("imname", "objects"), [("a", struct_array(("class", "class_ind", "mask", "parts"), PERSON))])
DEPTH = np.linspace(0.5, 9, IDS.size).reshape(SHAPE)


def _labels(folder: Path) -> None:
    """A label of each form; the name says which decoder reads it."""
    vectors = np.where(IDS[..., None] % 2, (0.6, 0.0, -0.8), (0.0, 0.0, 0.0)).astype(np.float16)
    for name, content in {
        "class_ids.npy": _npy(IDS.astype(">i4")),
        "mask.npy": _npy(IDS % 2 == 0),
        "edge_picture.npy": _npy(np.asfortranarray(IDS % 2)),
        "normals.npy": _npy(vectors),
        "depth.npy": _npy(DEPTH),
        "disparity.npy": _npy(DEPTH / 10),
        "class_ids.png": _picture("PNG", IDS),
        "mask.png": _picture("PNG", IDS % 2 * 255),
        "edge_picture.png": _picture("PNG", IDS % 2 == 1),
        "normals.png": _picture("PNG", NOISE),
        "label_map.mat": _mat(LabelMap=IDS.astype(np.uint16)),
        "nyud_classes.mat": _mat(True, segmentation=IDS.astype(float)),
        "depth.mat": _mat(depth=DEPTH.astype(np.float32)),
        "human_parts.mat": _mat(anno=ANNO),
    }.items():
        (folder / name).write_bytes(content)


def _read_label(name: str) -> Callable[[Path], object]:
    return lambda folder: getattr(decode, name.partition(".")[0])(folder / name, SHAPE)


def _pictures(folder: Path) -> None:
    exif = Image.Exif()
    exif[274] = 1
    (folder / "a.jpg").write_bytes(_picture("JPEG", NOISE, exif=exif))
    (folder / "b.jpg").write_bytes(_picture("JPEG", NOISE, progressive=True))
    palette = Image.fromarray(NOISE).convert("P")
    palette.info["transparency"] = 3
    palette.save(folder / "c.png")
    (folder / "i.npy").write_bytes(_npy(NOISE / 255))
    (folder / "d.png").write_bytes(_picture("PNG", NOISE[..., 0].astype(np.uint16)))
    for name, form in (("e.gif", "GIF"), ("f.tif", "TIFF"), ("g.webp", "WEBP"), ("h.bmp", "BMP")):
        (folder / name).write_bytes(_picture(form, NOISE))


EIGHT_BIT = ("a.jpg", "b.jpg", "c.png", "e.gif", "f.tif", "g.webp", "h.bmp", "i.npy")
PICTURES = (*EIGHT_BIT, "d.png")


def _read_pictures(read: Callable[[Path], object], names: tuple[str, ...]) -> Callable[[Path], object]:
    return lambda folder: [read(folder / name) for name in names]


def _weights(folder: Path) -> None:
    net = build_backbone("vit_tiny_patch16_224", size=32, weights="none", args=BACKBONE)
    state = {f"blocks.{i}.{k}": v for i, block in enumerate(net.blocks) for k, v in block.state_dict().items()}
    state |= net.stem.state_dict() | {f"norm.{k}": v for k, v in net.norm.state_dict().items()}
    torch.save(state, folder / "a.pth")
    torch.save({"model": state, "epoch": 3}, folder / "b.pth", _use_new_zipfile_serialization=False)


def _read_weights(folder: Path, name: str) -> object:
    return build_backbone("vit_tiny_patch16_224", size=32, weights=str(folder / name), args=BACKBONE)


def _pack(folder: Path) -> None:
    pascal = PascalFolder(folder.with_name("source"))
    pascal.add("a")
    pascal.add("b", split="val")
    prepare(Request("pascal_context", pascal.root, subset=True, workers=1), folder / "packed")


def _read_packed(folder: Path) -> None:
    for split in ("train", "val"):
        dataset = PackedDataset(folder / "packed", split, tuple(PASCAL_TASKS.values()), data="pascal_context")
        for i in range(len(dataset)):
            dataset[i]


def _archive(folder: Path) -> None:
    for name, mode in (("a.tar", "w"), ("b.tgz", "w:gz"), ("c.tar.bz2", "w:bz2"), ("d.tar.xz", "w:xz")):
        with tarfile.open(folder / name, mode, format=tarfile.PAX_FORMAT if mode == "w" else tarfile.GNU_FORMAT) as tar:
            for member in ("data/a.txt", "data/" + "long" * 30, "data/deep/b\u00e9.txt"):
                info = tarfile.TarInfo(member)
                info.size = 700
                tar.addfile(info, io.BytesIO(bytes(range(7)) * 100))


def _read_archive(name: str) -> Callable[[Path], object]:
    def read(folder: Path) -> None:
        shutil.rmtree(folder.parent / "out", ignore_errors=True)
        unpack(folder / name, folder.parent / "out")

    return read


DS_CONFIG: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": 1,
    "gradient_clipping": 1.0,
    "bf16": {"enabled": "auto"},
    "optimizer": {"type": "AdamW", "params": {"lr": "auto", "betas": [0.9, 0.99]}},
    "zero_optimization": {"stage": 2, "reduce_bucket_size": "auto", "overlap_comm": True},
    "steps_per_print": 10,
}


def _read_checkpoint(folder: Path) -> object:
    with open_checkpoint(folder / "step_2") as found:
        return read_meta(found), [found.shape(name) for name in found.names()]


def _config(folder: Path) -> None:
    shutil.copy(Path(read_tree.__code__.co_filename).parent / "configs/scenes.yaml", folder / "a.yaml")
    (folder / "b.yaml").write_text(
        "base: &b {k: 2}\nseed: 1\ntrain: {lr: 1e-3, adam: {betas: [0.9, 0.99]}}\nmodel:\n  moe: {<<: *b, rank: 2}\n"
        "  backbone_args: {depth: 2}\ntasks: [semseg, edge]\n".replace("base: &b {k: 2}\n", "").replace("<<: *b, ", "")
    )


REPORTED = ("summary.json", "env.json", "metrics.jsonl", "config.yaml", "rank_0.log", "predictions/step_000006.png")
READERS: dict[str, Reader] = {
    "json": Reader(_file("a.json", json.dumps(DS_CONFIG).encode()), ("a.json",), lambda f: read_json(f / "a.json")),
    "yaml": Reader(_config, ("a.yaml", "b.yaml"), lambda f: [load_settings(f / n) for n in ("a.yaml", "b.yaml")]),
    "ds_config": Reader(
        _file("z.json", json.dumps(DS_CONFIG).encode()),
        ("z.json",),
        lambda f: resolve(Settings(), read_ds_config(f / "z.json"), world=2, native_bf16=False),
    ),
    "image": Reader(_pictures, EIGHT_BIT, _read_pictures(lambda path: read_image(path, labelled=True), EIGHT_BIT)),
    "predicted image": Reader(_pictures, PICTURES, _read_pictures(read_rgb, PICTURES)),
    "pth": Reader(_weights, ("a.pth", "b.pth"), lambda f: [_read_weights(f, name) for name in ("a.pth", "b.pth")]),
    "card": Reader(lambda f: make_export(f / "e"), ("e/export.json",), lambda f: load(f / "e"), own_hash="card_sha256"),
    "export": Reader(lambda f: make_export(f / "e"), ("e/model.safetensors",), lambda f: load(f / "e")),
    "checkpoint": Reader(
        lambda f: shutil.copytree(CHECKPOINT, f / "step_2"), ("step_2/manifest.json",), _read_checkpoint, "sha256"
    ),
    "checkpoint tensors": Reader(
        lambda f: shutil.copytree(CHECKPOINT, f / "step_2"), ("step_2/random_0.safetensors",), _read_checkpoint
    ),
    "packed": Reader(
        _pack, ("packed/packed.json", "packed/train-000.json", "packed/train-000.bin"), _read_packed, "sha256"
    ),
    "list": Reader(
        lambda f: ((f / "lists").mkdir(), (f / "lists/train.txt").write_text("2008_01\n2008_02\na b\n")),
        ("lists/train.txt",),
        lambda f: read_list(f, "lists", "train"),
    ),
    "metrics": Reader(
        lambda f: write_run(f / "run"), ("run/metrics.jsonl",), lambda f: read_metrics(f / "run/metrics.jsonl")
    ),
    "reference": Reader(
        _file("r.json", b'{"semseg": {"miou": 1.5}, "edge": {"odsf": 70}}'),
        ("r.json",),
        lambda f: read_reference(str(f / "r.json")),
    ),
    "hostfile": Reader(_file("h", b"n1 slots=8\nn2 slots=8 # two\n"), ("h",), lambda f: read_hostfile(f / "h")),
    "run report": Reader(
        lambda f: write_run(f / "run"), tuple(f"run/{name}" for name in REPORTED), lambda f: write_report(f / "run")
    ),
    "study report": Reader(
        lambda f: write_study(f / "s"), ("s/study.json", "s/results.json"), lambda f: write_report(f / "s")
    ),
}
for _name in (
    *("class_ids.npy", "mask.npy", "edge_picture.npy", "normals.npy", "depth.npy", "disparity.npy"),
    *("class_ids.png", "mask.png", "edge_picture.png", "normals.png"),
    *("label_map.mat", "nyud_classes.mat", "depth.mat", "human_parts.mat"),
):
    READERS[_name] = Reader(_labels, (_name,), _read_label(_name))
for _name in ("a.tar", "b.tgz", "c.tar.bz2", "d.tar.xz"):
    READERS[_name] = Reader(_archive, (_name,), _read_archive(_name))
