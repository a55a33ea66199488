"""An export comes back as the same model, without DeepSpeed; damage is refused; a new run may start from it."""

import hashlib
import json
import logging
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import ase_dist
from ase_dist.data.transforms import normalise
from ase_dist.deployment.export import write_export
from ase_dist.errors import UserError
from ase_dist.evaluation.decode import decode
from ase_dist.files import sha256_of
from ase_dist.models import build_model
from ase_dist.models.export_file import CARD, WEIGHTS, card_digest
from ase_dist.models.names import named_tensors
from ase_dist.moe import MoEFFN
from ase_dist.moe.sharding import Shard
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

FACTS = {"step": 7, "metrics": {"edge": {"bce": 0.5, "odd": None}}, "backbone": {"name": "x", "sha256": "y"}}
TASKS = ["semseg", "edge"]
VARIANTS = {
    "ase": {},
    "adapt one place": {"moe": {"adapt": ["fc1"]}, "lora_alpha": 8.0},
    "ffn experts": {"moe": {"experts": "ffn", "num_experts": 12}},
    "no experts": {"moe": {"enabled": False}, "tune": "full", "lora_rank": 0, "task_embedding": False},
}


@pytest.fixture
def exported(settings_for, stirred, tmp_path):
    """``exported(name, dtype=..., **as settings_for)``: the folder of an export, and the model that is in it."""

    def export(name="out", *, dtype="fp32", tasks=TASKS, **options):
        settings = settings_for(tasks=tasks, **options)
        chosen = select_tasks(settings.data.name, settings.tasks)
        model = stirred(build_model(settings, chosen, expert_layer="plain")).eval()
        write_export(tmp_path / name, model, settings, chosen, dtype=dtype, facts=FACTS)
        return tmp_path / name, model

    return export


def predictions(model, images, **options):
    with torch.no_grad():
        return model(images, **options).predictions


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_model_comes_back_bit_for_bit(variant, exported, images):
    folder, model = exported(**VARIANTS[variant])
    loaded = ase_dist.load(folder)
    expected, got = predictions(model, images()), predictions(loaded, images())
    assert [*got] == TASKS and all(torch.equal(got[task], expected[task]) for task in TASKS)
    assert [*predictions(loaded, images(), tasks=["edge"])] == ["edge"]
    assert not loaded.training and not any(p.requires_grad for p in loaded.parameters())
    assert loaded.tasks == select_tasks("scenes", TASKS) and loaded.image.size == (32, 32) and loaded.card.step == 7
    assert loaded.metrics["edge"]["bce"] == 0.5 and math.isnan(loaded.metrics["edge"]["odd"])


def test_a_shard_has_the_names_of_its_own_experts_and_no_padding(model_for):
    model = model_for(tasks=TASKS)
    whole = model.blocks[0].mlp
    model.blocks[0].mlp = MoEFFN(whole.base, num_experts=4, k=2, rank=2, num_tasks=2, shard=Shard(3, index=1, count=2))
    named = named_tensors(model)
    assert [n for n in named if n.startswith("blocks.0.mlp.fc1.A")] == ["blocks.0.mlp.fc1.A.2", "blocks.0.mlp.fc1.A.3"]
    assert torch.equal(named["blocks.0.mlp.fc1.A.2"], model.blocks[0].mlp.routed.fc1_A[0])


@pytest.mark.parametrize(("dtype", "error"), [("fp16", 1e-3), ("bf16", 1e-2)])
def test_half_precision_is_half_the_bytes_and_rounds(dtype, error, exported, images):
    folder, model = exported(dtype=dtype)
    whole, _ = exported("whole")
    assert 0.4 < (folder / WEIGHTS).stat().st_size / (whole / WEIGHTS).stat().st_size < 0.7
    loaded = ase_dist.load(folder)
    for name, tensor in named_tensors(loaded.model).items():
        reference = named_tensors(model)[name]
        assert tensor.dtype == torch.float32
        assert (tensor - reference).norm() <= error * reference.norm() + 1e-6  # fp16 ends at 6e-8


def test_a_number_that_half_precision_has_no_place_for_is_refused(settings_for, model_for, tmp_path):
    model = model_for(tasks=TASKS)
    with torch.no_grad():
        model.heads["edge"].last.bias.fill_(1e6)
    with pytest.raises(ValueError, match=r"heads\.edge\.last\.bias.*--dtype fp32"):
        write_export(tmp_path / "out", model, settings_for(tasks=TASKS), select_tasks("scenes", TASKS), dtype="fp16",
                     facts=FACTS)  # fmt: skip
    assert not [*tmp_path.iterdir()]


SCRIPT = """
import sys
sys.modules["deepspeed"] = sys.modules["fairscale"] = None
import ase_dist
assert "torch" not in sys.modules
import torch
loaded = ase_dist.load(sys.argv[1])
with torch.no_grad():
    torch.save(loaded(torch.load(sys.argv[2])).predictions, sys.argv[3])
"""


def test_deepspeed_need_not_be_installed(exported, images, tmp_path):
    folder, model = exported(checkpoint_activations="recompute")
    torch.save(images(), tmp_path / "images.pt")
    arguments = [folder, tmp_path / "images.pt", tmp_path / "found.pt"]
    done = subprocess.run([sys.executable, "-c", SCRIPT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = torch.load(tmp_path / "found.pt")
    assert all(torch.allclose(found[t], logits, atol=1e-5) for t, logits in predictions(model, images()).items())


def test_a_photograph_goes_in_and_classes_come_out_at_its_size(exported):
    """The lines that ``load`` tells users to write."""
    model = ase_dist.load(exported()[0])
    photograph = Image.effect_noise((50, 40), 60).convert("RGB")
    resized = photograph.resize((model.image.size.width, model.image.size.height))
    logits = predictions(model, normalise(np.asarray(resized))[None])
    task = model.tasks[0]
    classes = decode(task, logits[task.name], size=(40, 50))[0]
    assert classes.shape == (40, 50) and classes.max() < len(task.class_names)


# ---------------------------------------------------------------------------------------------------------------------
# Damage


def edit(folder, *, own_hash=True, **changes):
    """Change the card, and its own hash with it or not."""
    tree = {**json.loads((folder / CARD).read_text()), **changes}
    if own_hash:
        del tree["card_sha256"]
        tree["card_sha256"] = card_digest(tree)
    (folder / CARD).write_text(json.dumps(tree))


def flip(path):
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def fake(path, data=b"no tensors"):
    path.write_bytes(data)
    edit(path.parent, sha256=hashlib.sha256(data).hexdigest())


def card_of(folder):
    return json.loads((folder / CARD).read_text())


def rewrite(folder, change):
    """Change the first tensor and the hashes with it."""
    tensors = load_file(folder / WEIGHTS)
    first = min(tensors)
    save_file({**tensors, first: change(tensors[first])}, folder / WEIGHTS)
    edit(folder, sha256=sha256_of(folder / WEIGHTS))


DAMAGE = {
    "no export": (lambda f: [p.unlink() for p in f.iterdir()], r"no export.*launch/export\.py"),
    "no weights": (lambda f: (f / WEIGHTS).unlink(), r"there is no model\.safetensors"),
    "one bit": (lambda f: flip(f / WEIGHTS), r"model\.safetensors: damaged"),
    "another file": (lambda f: fake(f / WEIGHTS), r"not a safetensors file"),
    "cut card": (lambda f: (f / CARD).write_text((f / CARD).read_text()[:200]), r"export\.json: not JSON"),
    "list": (lambda f: (f / CARD).write_text("[]"), r"export\.json: holds a list"),
    "newer": (lambda f: edit(f, version=4), r"version 4.*reads up to 3"),
    "a setting": (lambda f: edit(f, own_hash=False, step=8), r"export\.json: was changed or damaged"),
    "hash gone": (lambda f: edit(f, own_hash=False, card_sha256=None), r"export\.json: was changed or damaged"),
    "size": (lambda f: edit(f, image={"size": 0, "mean": [0, 0, 0], "std": [1, 1, 1]}), r"export\.json: image\.size"),
    "no spread": (lambda f: edit(f, image={"size": 32, "mean": [0, 0, 0], "std": [1, 0, 1]}), r"image\.std\.1"),
    "wide head": (lambda f: edit(f, tasks=[{**task, "channels": 10**9} for task in card_of(f)["tasks"]]), "channels"),
    "path as task": (lambda f: edit(f, tasks=[{**task, "name": "../x"} for task in card_of(f)["tasks"]]), r"'\.\./x'"),
    "NaN": (lambda f: rewrite(f, lambda tensor: tensor.fill_(float("nan"))), r"safetensors: 'blocks.*' is not finite"),
    "infinity": (lambda f: rewrite(f, lambda tensor: tensor.fill_(float("inf"))), r"'blocks.*' is not finite"),
    "other type": (lambda f: rewrite(f, lambda tensor: tensor.double()), r"'blocks.*' is of torch\.float64, wanted"),
    "key gone": (lambda f: edit(f, tasks=None), r"export\.json: tasks"),
    "another model": (lambda f: edit(f, model={**json.loads((f / CARD).read_text())["model"], "lora_rank": 2}),
                      r"\d+ tensors are not those of the model"),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_one_sentence(damage, exported):
    folder, _ = exported()
    act, sentence = DAMAGE[damage]
    act(folder)
    with pytest.raises(ValueError, match=sentence) as caught:
        ase_dist.load(folder)
    assert str(folder) in str(caught.value) and "\n" not in str(caught.value)


def test_a_card_of_before_has_no_hash_and_is_read(exported):
    folder, _ = exported()
    tree = card_of(folder)
    del tree["card_sha256"]
    (folder / CARD).write_text(json.dumps({**tree, "version": 1}))
    assert ase_dist.load(folder).card.version == 1
    (folder / CARD).write_text(json.dumps({**tree, "version": 1, "model": {**tree["model"], "backbone": "no_such"}}))
    with pytest.raises(UserError, match=r"export\.json.*no_such"):
        ase_dist.load(folder)


# ---------------------------------------------------------------------------------------------------------------------
# model.init_from


@pytest.fixture
def started(exported, model_for):
    """``started(old, new)``: tensors of an export of ``old``, of a model of ``new`` from it, and of one alone."""

    def start(old, new, *, layer="plain", tasks=TASKS):
        folder, source = exported(**old)
        model = model_for(layer=layer, tasks=tasks, seed=5, init_from=str(folder), **new)
        fresh = model_for(layer=layer, tasks=tasks, seed=5, **new)
        return named_tensors(source), named_tensors(model), named_tensors(fresh)

    return start


@pytest.mark.parametrize("layer", ["plain", "deepspeed"])
def test_the_same_settings_take_everything(layer, started):
    source, model, _ = started({}, {}, layer=layer)
    assert all(torch.equal(model[name], source[name]) for name in source.keys() | model.keys())


def test_other_tasks_keep_their_start_and_known_ones_move_to_their_row(started):
    source, model, fresh = started({}, {}, tasks=["normals", "edge", "saliency"])
    router, embedding = "blocks.1.mlp.router.weight", "task_embedding.weight"
    for name in (router, embedding):
        assert torch.equal(model[name][1], source[name][1])
        assert torch.equal(model[name][[0, 2]], fresh[name][[0, 2]])
    heads = {name for name in model if name.startswith("heads.")}
    assert all(torch.equal(model[name], (source if ".edge." in name else fresh)[name]) for name in heads)
    rest = model.keys() - heads - {name for name in model if name.endswith((router[9:], embedding))}
    assert all(torch.equal(model[name], source[name]) for name in rest)


@pytest.mark.parametrize(
    "moe", [{"num_experts": 5}, {"num_shared": 2}, {"rank": 3}, {"alpha": 8.0}, {"adapt": ["fc1"]}]
)
def test_other_experts_start_afresh_with_their_routers(moe, started):
    source, model, fresh = started({}, {"moe": moe})
    experts = {name for name in model if ".mlp." in name and ("router" in name or name[-1].isdigit())}
    assert experts and all(torch.equal(model[name], fresh[name]) for name in experts)
    assert all(torch.equal(model[name], source[name]) for name in model if ".attn." in name)


def test_lora_of_another_scale_starts_afresh(started):
    source, model, fresh = started({}, {"lora_alpha": 8.0})
    assert all(torch.equal(t, (fresh if "lora" in name else source)[name]) for name, t in model.items())


def test_the_backbone_is_found_under_other_adapters(started):
    """LoRA and experts put a ``base`` into the names of what they adapt."""
    new = {"moe": {"enabled": False}, "lora_rank": 0}
    source, model, _ = started({}, new)
    assert torch.equal(model["blocks.0.mlp.fc1.weight"], source["blocks.0.mlp.base.fc1.weight"])
    assert torch.equal(model["blocks.1.attn.qkv.weight"], source["blocks.1.attn.qkv.base.weight"])


def test_feed_forward_experts_start_as_parts_of_the_export_s_ffn(started):
    source, model, _ = started({}, {"moe": {"experts": "ffn", "hidden": 128}})
    assert torch.equal(model["blocks.0.mlp.fc1.weight.2"], source["blocks.0.mlp.base.fc1.weight"])


def test_feed_forward_experts_are_taken_where_they_fit(started):
    ffn = {"moe": {"experts": "ffn"}}
    source, model, _ = started(ffn, ffn)
    assert torch.equal(model["blocks.0.mlp.fc1.weight.2"], source["blocks.0.mlp.fc1.weight.2"])


def test_another_size_resamples_the_position_embedding(exported, model_for, images):
    folder, source = exported()
    model = model_for(size=48, tasks=TASKS, init_from=str(folder)).eval()
    assert model.stem.pos_embed.shape[1] == 1 + 9 and source.stem.pos_embed.shape[1] == 1 + 4
    assert torch.equal(model.stem.pos_embed[:, 0], source.stem.pos_embed[:, 0])
    assert predictions(model, images(size=48))["edge"].isfinite().all()


def test_the_log_says_what_was_taken(exported, model_for, caplog):
    folder, _ = exported()
    caplog.set_level(logging.INFO, logger="ase_dist")
    model_for(tasks=["edge", "normals"], init_from=str(folder))
    (line,) = [record.message for record in caplog.records if "init_from" in record.message]
    assert "took the backbone, " in line and "edge head" in line and "routers and embeddings of the tasks edge;" in line
    assert line.endswith("starting afresh: normals head") and "experts of 2 layers" in line


REFUSED = {
    "nothing there": ({}, {"init_from": "nowhere"}, r"model\.init_from: nowhere: no export"),
    "another backbone": ({}, {"backbone_args": {"embed_dim": 48, "depth": 2, "num_heads": 2}}, r"another backbone"),
    "deeper": ({}, {"backbone_args": {"embed_dim": 32, "depth": 3, "num_heads": 2}}, r"another backbone.*missing"),
    "no ffn left": ({"moe": {"experts": "ffn"}}, {}, r"replaced the FFN of blocks\.0.*use its model\.moe"),
    "a frozen backbone alone": ({"moe": {"enabled": False}, "lora_rank": 0, "task_embedding": False},
                                {"head_width": 4}, r"nothing of .* fits but its backbone"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_a_start_is_one_sentence(case, exported, model_for):
    old, new, sentence = REFUSED[case]
    folder, _ = exported(**old)
    with pytest.raises(ValueError, match=sentence):
        model_for(tasks=TASKS, **{"init_from": str(folder), **new})


def test_a_backbone_that_was_trained_is_worth_taking_alone(exported, model_for):
    folder, source = exported(tune="full", moe={"enabled": False}, lora_rank=0, task_embedding=False)
    model = model_for(tasks=TASKS, init_from=str(folder), head_width=4)
    assert torch.equal(model.norm.weight, source.norm.weight)
