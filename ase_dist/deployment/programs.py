"""A trained model as one file that runs without this package: a program of torch.export (.pt2), or ONNX.

The program takes ``images`` float32 [B, 3, H, W], RGB from 0 to 1, any B, and gives the raw logits [B, C, h, w] of each
task by name. Normalisation is inside; the backbone's LoRA is merged into its weights; experts stay routed; only the
requested tasks are in the file. It also holds JSON that describes inputs and outputs, see ``facts``.
"""

from __future__ import annotations

import copy
import io
import json
import logging
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ase_dist.deployment.exported import ExportedModel
from ase_dist.errors import RunError, UserError, did_you_mean, file_error
from ase_dist.files import open_regular, replacing, require_room
from ase_dist.models.lora import merge_lora
from ase_dist.models.multitask import checked_tasks
from ase_dist.overwriting import contains, refuse_foreign
from ase_dist.tasks import Kind
from ase_dist.training.process.folder_lock import FolderLock, lock_beside
from ase_dist.versions import versions_of

LOGGER = logging.getLogger("ase_dist")
FACTS = "ase_dist.json"  # in a .pt2 an extra file of this name, in ONNX a property of the model
TOLERANCE = 1e-3  # relative error of an output (norm of the difference): rounding, and a token routed otherwise
MOST_ONNX_BYTES = 2 * 1000**3  # its format ends at 2 GiB
BATCHES = (1, 3)  # images at a time in the check
ONNX_LIBRARIES = ("onnx", "onnxscript")
DECODING: Mapping[Kind, str] = {
    "classes": "the class is that of the C channels which is largest",
    "mask": "sigmoid",
    "edges": "sigmoid",
    "normals": "over the length of the C channels",
    "depth": "metres",
}
Run = Callable[[Tensor], Mapping[str, Tensor]]


class DeployedModel(nn.Module):
    """Images to logits by task: a copy of an exported model for ``tasks`` (None: all) that can be traced."""

    mean: Tensor
    std: Tensor

    def __init__(self, model: ExportedModel, *, tasks: Sequence[str] | None = None) -> None:
        super().__init__()
        self.names = checked_tasks(tasks, tuple(task.name for task in model.tasks))
        self.model = copy.deepcopy(model.model).eval().requires_grad_(False)
        self.model.keep_tasks(self.names)
        merge_lora(self.model)
        device = next(model.parameters()).device
        for name, values in (("mean", model.image.mean), ("std", model.image.std)):
            self.register_buffer(name, torch.tensor(values, device=device).view(3, 1, 1))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """Raw logits [B, C, h, w] by task, for [B, 3, H, W]."""
        output = self.model((images - self.mean) / self.std, tasks=self.names)
        return dict(output.predictions)


def deploy(
    model: ExportedModel, folder: str | Path, *, formats: Iterable[str], tasks: Sequence[str] | None = None
) -> dict[str, float]:
    """Write ``model.pt2`` and ``model.onnx``, as ``formats`` say, into ``folder``, for ``tasks`` (None: all).

    Each is read back and compared with ``model`` on random images; returns the relative error of its outputs by
    format, NaN for ONNX where onnxruntime is not installed. Raises UserError for an unknown format or task, a missing
    library, a folder into which another process exports, a file that cannot be written or would replace one that is no
    such program, and a program whose outputs differ from the model's, which is not kept.
    """
    folder, formats = Path(folder), tuple(formats)
    check_formats(formats)
    try:
        require_room(folder)
    except OSError as error:
        raise _not_written(folder, error) from None
    with FolderLock(lock_beside(folder.absolute()), folder=folder, doing="exporting", other="another name") as lock:
        lock.take()
        return _deploy(model, folder, formats=formats, tasks=tasks)


def _deploy(
    model: ExportedModel, folder: Path, *, formats: Sequence[str], tasks: Sequence[str] | None
) -> dict[str, float]:
    """``deploy`` by the one process that may."""
    targets = [folder / f"model.{name}" for name in formats]
    refuse_foreign(targets, is_own=contains(FACTS.encode()), option="export")
    program, errors = trace(model, tasks=tasks), {}
    for name in formats:
        path = folder / f"model.{name}"
        try:
            with replacing(path) as temporary:
                FORMATS[name](program, temporary, facts(model, program))
                errors[name] = difference(model, RUNNERS[name](temporary), path=path)
        except OSError as error:
            raise _not_written(path, error) from None
        is_checked = math.isfinite(errors[name])
        checked = (
            f"off by {errors[name]:.1e} of the model's outputs" if is_checked else "not checked, install onnxruntime"
        )
        LOGGER.info("wrote %s, %.1f MB, %s", path, path.stat().st_size / 1e6, checked)
    return errors


def _not_written(path: Path, error: OSError) -> UserError | RunError:
    return file_error(error, f"export: cannot write {str(path)!r} ({error.strerror or error}); name another folder")


def check_formats(formats: Iterable[str]) -> None:
    """Raise UserError for an unknown format, or one whose library is not installed."""
    for name in formats:
        if name not in FORMATS:
            raise UserError(f"--format: got {name!r}, wanted some of {list(FORMATS)}{did_you_mean(name, FORMATS)}")
        missing = [library for library in ONNX_LIBRARIES if name == "onnx" and find_spec(library) is None]
        if missing:
            raise UserError(f"--format onnx: needs {' and '.join(missing)}; pip install 'ase-dist[onnx]'")


def trace(model: ExportedModel, *, tasks: Sequence[str] | None = None) -> ExportedProgram:
    """The program of ``model`` for ``tasks`` (None: all): only PyTorch's own operations, any number of images."""
    deployed = DeployedModel(model, tasks=tasks)
    images = torch.rand(2, 3, *model.image.size, device=next(model.parameters()).device)
    with torch.no_grad():
        program = torch.export.export(deployed, (images,), dynamic_shapes={"images": {0: Dim("batch", min=1)}})
    program.graph_module.graph.eliminate_dead_code()  # the statistics of the routers
    program.graph_module.recompile()
    foreign = {name for name in map(str, operations(program)) if not name.startswith("aten.")}
    assert not foreign, f"these operations would not run elsewhere: {sorted(foreign)}"
    return program


def operations(program: ExportedProgram) -> list[Any]:
    """The targets of all operations of a program that are not Python's on sizes, those of inner graphs included."""
    graphs = [module.graph for module in program.graph_module.modules() if isinstance(module, torch.fx.GraphModule)]
    calls = [node.target for graph in graphs for node in graph.nodes if node.op == "call_function"]
    return [target for target in calls if getattr(target, "__module__", "") not in ("_operator", "math")]


def facts(model: ExportedModel, program: ExportedProgram) -> str:
    """The file's description as JSON: input, outputs with how to decode them, classes and palettes, metrics."""
    names = output_names(program)
    outputs = [
        {
            "name": task.name,
            "title": task.title,
            "kind": task.kind,
            "channels": task.channels,
            "decode": "disparity" if task.inverse_depth else DECODING[task.kind],
            "class_names": task.class_names,
            "palette": task.palette,
        }
        for task in model.tasks
        if task.name in names
    ]
    tree = {
        "format": "ase_dist program",
        "input": {"name": "images", "shape": ["B", 3, *model.image.size], "values": "RGB from 0 to 1"},
        "outputs": sorted(outputs, key=lambda output: names.index(str(output["name"]))),
        "step": model.card.step,
        "metrics": model.card.metrics,
        "versions": versions_of("ase_dist", "torch"),
    }
    return json.dumps(tree)


def output_names(program: ExportedProgram) -> list[str]:
    """The tasks of a program, in the order of its outputs."""
    return list(program.call_spec.out_spec.unflatten(range(len(program.graph_signature.user_outputs))))


def difference(model: ExportedModel, run: Run | None, *, path: Path) -> float:
    """The largest relative error (L2 norm) of an output of ``run`` against the model's; NaN without ``run``.

    Raises UserError above ``TOLERANCE``.
    """
    if run is None:
        return math.nan
    worst = 0.0
    place = next(model.parameters())
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image.mean, model.image.std))
    for count in BATCHES:
        images = torch.rand(count, 3, *model.image.size, generator=torch.Generator().manual_seed(count))
        found = run(images.to(place.device))
        with torch.no_grad():
            wanted = model(((images - mean) / std).to(place), tasks=list(found)).predictions
        for task, logits in wanted.items():
            share = (found[task].to(logits) - logits).norm() / logits.norm().clamp(min=1e-6)
            worst = max(worst, float(share))
    if not worst <= TOLERANCE:
        raise UserError(f"export: what {path.name} computes is off by {worst:.1e} of the model's outputs; report this")
    return worst


# ---------------------------------------------------------------------------------------------------------------------
# The formats


def _save_pt2(program: ExportedProgram, path: Path, facts_json: str) -> None:
    whole = io.BytesIO()  # torch's writer (2.14) ends the process where a disk is full
    torch.export.save(program, whole, extra_files={FACTS: facts_json})
    path.write_bytes(whole.getbuffer())


def _load_pt2(path: Path) -> Run:
    with open_regular(path) as file:
        run: Run = torch.export.load(file).module()
    return run


def _save_onnx(program: ExportedProgram, path: Path, facts_json: str) -> None:
    """Write one file; the batch is its only free size. ``verbose=False``: the exporter prints by default."""
    size = sum(tensor.nbytes for tensor in program.state_dict.values())
    if size > MOST_ONNX_BYTES:
        raise UserError(f"--format onnx: got {size / 1e9:.1f} GB of weights, wanted 2 at most in one file; use pt2")
    levels = {logger: logger.level for logger in map(logging.getLogger, ("onnxscript", "onnx_ir"))}
    try:
        for logger in levels:  # they report every step
            logger.setLevel(logging.WARNING)
        converted = torch.onnx.export(
            program, dynamo=True, input_names=["images"], output_names=output_names(program), verbose=False
        )
    finally:
        for logger, level in levels.items():
            logger.setLevel(level)
    assert converted is not None
    converted.model.metadata_props[FACTS] = facts_json
    converted.save(path, external_data=False)


def _load_onnx(path: Path) -> Run | None:
    """The file in onnxruntime, on the CPU; None where that is not installed."""
    if find_spec("onnxruntime") is None:
        return None
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]

    def run(images: Tensor) -> dict[str, Tensor]:
        values = session.run(names, {"images": images.cpu().numpy()})
        return {name: torch.from_numpy(value) for name, value in zip(names, values, strict=True)}

    return run


FORMATS: dict[str, Callable[[ExportedProgram, Path, str], None]] = {"pt2": _save_pt2, "onnx": _save_onnx}
RUNNERS: dict[str, Callable[[Path], Run | None]] = {"pt2": _load_pt2, "onnx": _load_onnx}
