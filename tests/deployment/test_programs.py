"""Programs of an export: what the model computes, at any batch, in a file that runs without this package."""

import json
import logging
import math
import subprocess
import sys
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from ase_dist.commands.export import main as command
from ase_dist.deployment import programs
from ase_dist.deployment.predictor import load
from ase_dist.deployment.programs import FACTS, deploy, facts, operations, output_names, trace
from ase_dist.errors import UserError
from ase_dist.models.export_file import CARD
from tests.deployment.conftest import SETTINGS, make_export

pytestmark = pytest.mark.single_gpu
TASKS = ["normals", "semseg"]


def images(count):
    return torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))


def expected(model, count, tasks):
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in (model.image.mean, model.image.std))
    return {name: value.numpy() for name, value in model((images(count) - mean) / std, tasks=tasks).predictions.items()}


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    """Programs of two of the five tasks in every format whose library is here."""
    out = tmp_path_factory.mktemp("deployed")
    deploy(model, out, formats=["pt2"], tasks=TASKS)
    return out


# ---------------------------------------------------------------------------------------------------------------------
# torch.export

SCRIPT = """
import sys
from importlib.util import find_spec
for name in ("ase_dist", "timm", "deepspeed"):
    sys.modules[name] = None
import json, numpy, torch
extra = {"ase_dist.json": ""}
program = torch.export.load(sys.argv[1], extra_files=extra).module()
for count in (1, 2, 5):
    images = torch.rand(count, 3, 32, 32, generator=torch.Generator().manual_seed(count))
    numpy.savez(f"{sys.argv[2]}_{count}.npz", **{name: value.numpy() for name, value in program(images).items()})
print(json.loads(extra["ase_dist.json"])["outputs"][0]["name"])
"""


def test_a_program_runs_without_this_package_at_any_batch(folder, model, tmp_path):
    script = [sys.executable, "-c", SCRIPT, str(folder / "model.pt2"), str(tmp_path / "found")]
    done = subprocess.run(script, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == TASKS[0]
    for count in (1, 2, 5):
        found = np.load(tmp_path / f"found_{count}.npz")
        wanted = expected(model, count, TASKS)
        assert list(found) == list(wanted) == TASKS
        for name, logits in wanted.items():
            np.testing.assert_allclose(found[name], logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())


@pytest.fixture(scope="module")
def program(model):
    return trace(model, tasks=TASKS)


def test_it_holds_torch_s_own_operations_and_the_chosen_tasks_alone(program, model):
    names = {str(target) for target in operations(program)}
    assert all(name.startswith("aten.") for name in names)
    assert {"aten.topk.default", "aten.conv2d.default", "aten.scaled_dot_product_attention.default"} <= names
    assert "aten.logsumexp.default" not in names  # of the routers' losses
    state = program.state_dict
    assert output_names(program) == TASKS
    assert {name.split(".")[2] for name in state if name.startswith("model.heads.")} == set(TASKS)
    routers = [tensor for name, tensor in state.items() if name.endswith("router.weight")]
    assert len(routers) == 2 and all(tensor.shape[0] == len(TASKS) for tensor in routers)
    assert not [name for name in state if "lora" in name]
    assert model.model.blocks[0].mlp.router.weight.shape[0] == 5  # the model itself is as it was


def test_only_the_streams_of_its_tasks_are_computed(program):
    attention = [node for node in program.graph.nodes if "scaled_dot_product" in str(node.target)]
    batch = attention[0].meta["val"].shape[0]
    assert len(attention) == 2 and str(batch).startswith("2*")  # tasks times images


def test_the_facts_say_how_to_read_the_outputs(program, model):
    told = json.loads(facts(model, program))
    normals, semseg = told["outputs"]
    assert (normals["name"], normals["kind"], normals["channels"]) == ("normals", "normals", 3)
    assert len(semseg["class_names"]) == len(semseg["palette"]) == semseg["channels"] == 21
    assert told["input"]["shape"] == ["B", 3, 32, 32] and "largest" in semseg["decode"]


VARIANTS = {
    "ffn": {"moe": {"num_experts": 4, "k": 2, "experts": "ffn"}},
    "bypass": {"moe": {"num_experts": 4, "k": 2, "rank": 2, "adapt": ["fc1", "bypass"], "alpha": 4.0}},
    "wide convolutions": {"head": "pup_linear", "head_width": 64},
    "a ResNet": {"backbone": "resnet18", "backbone_args": {}, "sharing": "cross_stitch", "lora_rank": 0, "tune": "full",
                 "moe": {"enabled": False}},
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_kind_of_model_has_a_program(variant, tmp_path, monkeypatch):
    monkeypatch.setitem(SETTINGS, "model", {**SETTINGS["model"], **VARIANTS[variant]})
    model = load(make_export(tmp_path / "out", tasks=["edge", "semseg"]))
    run = trace(model, tasks=["edge"]).module()
    for count in (1, 3):
        wanted = expected(model, count, ["edge"])["edge"]
        np.testing.assert_allclose(run(images(count))["edge"], wanted, rtol=1e-3, atol=1e-4 * np.abs(wanted).max())


# ---------------------------------------------------------------------------------------------------------------------
# ONNX


def test_onnx_computes_the_same_at_any_batch(model, tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    errors = deploy(model, tmp_path, formats=["onnx"], tasks=TASKS)
    assert errors["onnx"] < 1e-4
    session = runtime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == TASKS
    assert json.loads(session.get_modelmeta().custom_metadata_map[FACTS])["outputs"][0]["name"] == TASKS[0]
    for count in (1, 4):
        found = session.run(TASKS, {"images": images(count).numpy()})
        for value, logits in zip(found, expected(model, count, TASKS).values(), strict=True):
            np.testing.assert_allclose(value, logits, rtol=1e-3, atol=1e-4 * np.abs(logits).max())
    assert [path.name for path in tmp_path.iterdir()] == ["model.onnx"]


@pytest.mark.parametrize("head", ["dpt", "hrnet", "multi_level"])
def test_a_head_on_several_levels_is_a_program_too(head, tmp_path):
    args = {"readout": "project"} if head == "dpt" else {}
    options = {"head": head, "head_args": args, "head_width": 8, "levels": [1, 1, 2, 2], "moe": {"enabled": False}}
    other = load(make_export(tmp_path / "export", tasks=["edge", "normals"], **options))
    formats = [*["onnx"] * (head == "dpt" and find_spec("onnxruntime") is not None), "pt2"]
    errors = deploy(other, tmp_path / "out", formats=formats, tasks=["edge"])
    assert set(errors) == set(formats) and max(errors.values()) < 1e-4


def test_without_its_libraries_onnx_is_refused_and_without_a_runtime_not_checked(model, tmp_path, monkeypatch, caplog):
    missing = {"onnxscript"}
    monkeypatch.setattr(programs, "find_spec", lambda name: None if name in missing else object())
    with pytest.raises(ValueError, match=r"needs onnxscript; pip install 'ase-dist\[onnx\]'"):
        deploy(model, tmp_path, formats=["onnx"])
    missing.add("onnxruntime")
    assert programs.RUNNERS["onnx"](tmp_path / "none") is None
    assert math.isnan(programs.difference(model, None, path=tmp_path))


# ---------------------------------------------------------------------------------------------------------------------
# Mistakes


def test_a_program_that_computes_something_else_is_not_left_there(model, tmp_path, monkeypatch):
    read = programs.RUNNERS["pt2"]

    def wrong(path):
        run = read(path)
        return lambda x: {name: value * 1.01 for name, value in run(x).items()}

    monkeypatch.setitem(programs.RUNNERS, "pt2", wrong)
    with pytest.raises(ValueError, match=r"model\.pt2 computes is off by 1\.0e-02"):
        deploy(model, tmp_path, formats=["pt2"], tasks=["edge"])
    assert not [*tmp_path.iterdir()]


def test_mistakes_are_one_sentence(model, tmp_path):
    with pytest.raises(ValueError, match=r"--format: got 'onx', .*did you mean 'onnx'\?"):
        deploy(model, tmp_path, formats=["onx"])
    with pytest.raises(ValueError, match="no task 'depth'"):
        deploy(model, tmp_path, formats=["pt2"], tasks=["depth"])
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match="cannot write"):
        deploy(model, tmp_path / "file", formats=["pt2"], tasks=["edge"])


def test_the_command_makes_programs_of_an_export(export, tmp_path, caplog, capsys):
    caplog.set_level(logging.INFO)
    assert command([str(export), str(tmp_path / "out"), "--format", "pt2", "--tasks", "edge"]) == 0
    assert "model.pt2" in caplog.text and [path.name for path in (tmp_path / "out").iterdir()] == ["model.pt2"]
    for wrong, sentence in (([], "is an export already"), (["--tasks", "edge"], "add --format"),
                            (["--format", "exe"], "got 'exe'")):  # fmt: skip
        assert command([str(export), str(tmp_path / "other"), *wrong]) == 2
        assert sentence in capsys.readouterr().err
    assert not (tmp_path / "other").exists() and (export / CARD).is_file()


@pytest.mark.parametrize("name", ["pt2", "onnx"])
def test_a_file_that_is_no_such_program_is_not_replaced(name, model, tmp_path):
    mine = tmp_path / f"model.{name}"
    mine.write_bytes(b"the user's own")
    with pytest.raises(UserError, match=rf"^export: '\S*model.{name}' would be replaced"):
        programs.deploy(model, tmp_path, formats=[name])
    assert mine.read_bytes() == b"the user's own"
