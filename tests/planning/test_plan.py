"""Plans against numbers worked out by hand, against a model that is really built, and what they refuse."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from ase_dist.models import build_model, parameter_table
from ase_dist.moe.dispatch import LayerShape
from ase_dist.planning.communication import dispatch_bytes, reduction_bytes
from ase_dist.planning.plan import default_ep_sizes, make_plans, plan
from ase_dist.planning.plan_report import as_json, draw_crossover, report
from ase_dist.planning.sizes import ModelSizes, measure
from ase_dist.read_config import build_settings
from ase_dist.tasks import select_tasks

pytestmark = pytest.mark.single_gpu

LAUNCH = Path(__file__).parents[2] / "launch" / "plan.py"
LAYER = LayerShape(routed=3, active=1, slots=3, ranks=1, values_per_token=10, expert_values=100, element_bytes=2)
SIZES = ModelSizes(frozen=1000, dense=80, layers=(LAYER, LAYER), width=2, tokens_per_image=50,
                   forward_flops=1e6, backward_flops=3e6, activations=7)  # fmt: skip
SPEED = {"bandwidth": 1e6, "flops": 1e9}


def one(**changes):
    options = {"world": 8, "ep_size": 2, "zero": 0, "batch": 2, "accumulation": 1, **SPEED, **changes}
    return plan(SIZES, **options)


def settings(**changes):
    model = {
        "backbone": "vit_tiny_patch16_224",
        "backbone_args": {"depth": 2},
        "head": "linear",
        "moe": {"num_experts": 6, "k": 2, "num_shared": 1, "rank": 2, **changes.pop("moe", {})},
    }
    return build_settings({"data": {"size": 32}, "model": {**model, **changes}, "train": {"batch_size": 2}})


def plans_of(chosen, *, world, ep, zero):
    return make_plans(chosen, world=world, ep_sizes=ep, stages=zero, **SPEED)


def test_memory_by_hand():
    # 3 experts over 2 ranks take 2 slots of 100 in each of 2 layers; 80 dense, 1000 frozen
    for zero, held, gradients, state in ((0, 1480, 480, 480), (1, 1480, 480, 110), (2, 1480, 110, 110)):
        p = one(zero=zero)  # divided: 80 / 8 dense, 400 / 4 replicas of the experts
        assert (p.parameters, p.trained) == (held, 480)
        assert (p.weights, p.gradients, p.optimizer) == (2 * held, 2 * gradients, 12 * state)
        assert p.memory == p.weights + p.gradients + p.optimizer + 2 * 7  # of two images
    whole = one(zero=3, ep_size=1)
    assert whole.parameters == 1000 // 8 + 80 // 8 + 600 // 8
    assert (whole.gradients, whole.optimizer) == (2 * 85, 12 * 85)


def test_float32_has_a_master_copy_only_where_zero_divides():
    sizes = ModelSizes(**{**vars(SIZES), "width": 4})
    for zero, state in ((0, 8 * 480), (1, 12 * 110)):
        p = plan(sizes, world=8, ep_size=2, zero=zero, batch=2, accumulation=1, **SPEED)
        assert p.optimizer == state


def test_reductions_by_hand():
    options = {"ranks": 4, "width": 2, "accumulation": 3}
    assert reduction_bytes(80, stage=0, **options) == 3 / 4 * 2 * 80 * 2
    assert reduction_bytes(80, stage=1, **options) == 3 / 4 * 2 * 80 * (2 + 1)
    assert reduction_bytes(80, stage=2, **options) == 3 / 4 * 2 * 80 * (3 * 2 + 1)
    assert reduction_bytes(80, stage=3, frozen=1000, **options) == 3 / 4 * 2 * 3 * (80 + 2 * 1080)
    assert reduction_bytes(80, stage=2, ranks=1, width=2, accumulation=3) == 0


def test_time_is_compute_plus_bytes_over_bandwidth():
    p = one(accumulation=3)
    assert p.compute_seconds == pytest.approx(3 * 2 * 4e6 / 1e9)
    for name in ("gather", "all_to_all"):
        sent = p.wire_dense + p.wire_replicas + p.wire_dispatch[name]
        assert p.step_seconds[name] == pytest.approx(p.compute_seconds + sent / 1e6)
    assert set(one(ep_size=1).step_seconds) == {"local"} and one(ep_size=1).crossover is None


def test_dispatch_bytes_are_those_of_the_layers_shape():
    shape = LayerShape(routed=3, active=1, slots=2, ranks=2, values_per_token=10, expert_values=100, element_bytes=2)
    assert SIZES.sharded(2) == (shape, shape)
    p = one(accumulation=3)
    tokens = 2 * 50
    assert p.wire_dispatch["gather"] == 3 * 2 * shape.gather_bytes()
    assert p.wire_dispatch["all_to_all"] == 3 * 2 * shape.all_to_all_bytes(shape.expected_rows(tokens))
    assert p.auto == shape.cheaper(tokens) and p.crossover == shape.crossover()


def test_a_recomputed_forward_pass_sends_again():
    shape = SIZES.sharded(2)[0]
    rows = shape.expected_rows(100)
    twice = dispatch_bytes([shape], tokens=100, forwards=2)
    assert twice["gather"] == 1.5 * shape.gather_bytes()
    counts = shape.all_to_all_bytes(0)
    assert twice["all_to_all"] == pytest.approx(1.5 * (shape.all_to_all_bytes(rows) - counts) + 2 * counts)


@pytest.mark.parametrize("experts", ["lora", "ffn"])
def test_sizes_are_those_of_the_model_that_a_run_builds(experts):
    chosen = settings(moe={"experts": experts})
    sizes = measure(chosen)
    model = build_model(chosen, select_tasks("scenes"), expert_layer="plain")
    groups = parameter_table(model).groups
    assert sizes.dense == sum(size.trained for name, size in groups.items() if name != "routed")
    assert sizes.frozen == sum(size.total - size.trained for size in groups.values())
    assert sum(layer.routed * layer.expert_values for layer in sizes.layers) == groups["routed"].total
    shapes = [block.mlp.layer_shape() for block in model.blocks]
    assert [(s.values_per_token, s.active) for s in sizes.layers] == [(s.values_per_token, s.active) for s in shapes]
    assert sizes.tokens_per_image == 5 * (1 + 4) and sizes.width == 2


def test_flops_of_a_frozen_vit_by_hand():
    chosen = settings(moe={"enabled": False}, lora_rank=0)
    sizes = measure(chosen)
    D, tokens, patches = 192, 5 * 5, 4
    blocks = 2 * 12 * D * D * tokens * 2 + 2 * 4 * 5**2 * D * 5  # two blocks: their weights, attention's products
    heads = 2 * sum(D * 16 * task.channels for task in select_tasks("scenes")) * patches
    assert sizes.forward_flops == blocks + heads + 2 * patches * (3 * 16 * 16 * D)
    assert sizes.backward_flops == 2 * heads + (2 * 12 * D * D * tokens * 2) + 2 * (2 * 4 * 5**2 * D * 5)


@pytest.mark.parametrize(
    ("world", "ep", "zero", "moe", "sentence"),
    [
        (8, [3], [0], {}, "--ep: got 3, wanted a divisor of the world, 8 ranks"),
        (8, [2], [3], {}, "set model.moe.ep_size=1, or use stage 2"),
        (8, [1], [4], {}, "--zero: got 4"),
        (0, [1], [0], {}, "--world: got 0"),
        (8, [2], [0], {"enabled": False}, "without experts"),
    ],
)
def test_what_a_run_would_refuse_is_refused(world, ep, zero, moe, sentence):
    with pytest.raises(ValueError, match=sentence.replace(".", r"\.")):
        plans_of(settings(moe=moe), world=world, ep=ep, zero=zero)


def test_4096_ranks_are_planned_reported_and_drawn():
    sizes, plans = plans_of(settings(), world=4096, ep=[1, 2, 4], zero=[0, 2])
    assert [(p.ep_size, p.zero) for p in plans] == [(1, 0), (1, 2), (2, 0), (2, 2), (4, 0), (4, 2)]
    assert plans[5].optimizer < plans[4].optimizer / 500
    text = report(sizes, plans, tokens=50, bandwidth=1e9, flops=1e12)
    assert "4096 ranks" in text and "Assumed:" in text and text.isascii()
    assert len(json.loads(json.dumps(as_json(sizes, plans, config="x")))["plans"]) == 6
    assert draw_crossover(sizes, ep_sizes=[1, 2, 4], tokens=50).startswith(b"\x89PNG")
    with pytest.raises(ValueError, match="--plot"):
        draw_crossover(sizes, ep_sizes=[1], tokens=50)


def test_default_sizes_fit_the_world():
    assert default_ep_sizes(settings(), world=12, stages=[0]) == [1, 2, 4]
    assert default_ep_sizes(settings(), world=12, stages=[0, 3]) == [1]
    assert default_ep_sizes(settings(moe={"ep_size": 3}), world=12, stages=[0]) == [3]


def test_help_and_a_wrong_option_need_no_torch():
    script = (
        "import runpy, sys; sys.argv = ['plan.py', *{arguments!r}]\n"
        "try:\n    runpy.run_path({launch!r}, run_name='__main__')\n"
        "except SystemExit as end:\n    assert 'torch' not in sys.modules\n    sys.exit(end.code)\n"
    )
    for arguments, code, text in ((["--help"], 0, "--bandwidth"), (["--ep", "two"], 2, "error: --ep: got 'two'")):
        program = script.format(arguments=arguments, launch=str(LAUNCH))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
        assert done.returncode == code, done.stderr
        assert text in done.stdout + done.stderr
