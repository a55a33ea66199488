"""ASEMoE under DeepSpeed's engine against plain torch in one process: ZeRO stage, group size, dispatch, clipping."""

import os
import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

from ase_dist.errors import UserError
from ase_dist.moe import ASEMoE, MoEFFN, deepspeed_compat, global_state, load_global_state
from tests.moe.conftest import FFN, randomise
from tests.training.conftest import start_world

pytestmark = pytest.mark.multi_gpu

TASKS, DIM, STEPS = 3, 12, 5
OPTIONS = {"num_experts": 8, "k": 2, "num_shared": 1, "rank": 2, "num_tasks": TASKS,
           "aux_losses": {"mutual_information": 0.1}}  # fmt: skip
CLIP = 0.05  # far below the norms here: every step is clipped


class Model(nn.Module):
    """Two layers with experts and a head."""

    def __init__(self, make):
        super().__init__()
        self.layers = nn.ModuleList(make(FFN(seed=i), seed=i) for i in range(2))
        self.head = nn.Linear(DIM, 4)
        with torch.no_grad():
            self.head.weight.copy_(torch.linspace(-1, 1, 4 * DIM).view(4, DIM))
            self.head.bias.zero_()

    def forward(self, x):
        aux = 0.0
        for layer in self.layers:
            output, layer_aux, *_ = layer(x)
            x, aux = x + output, aux + layer_aux
        return self.head(x).square().mean() + aux


def batches(ranks):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(TASKS, 6 * ranks, DIM, generator=generator) for _ in range(STEPS)]


def reference(ranks, accumulation):
    """Losses, gradient norms and final tensors of plain torch with the whole batch in one process."""
    model = Model(lambda base, seed: MoEFFN(base, seed=seed, **OPTIONS))
    for i, layer in enumerate(model.layers):
        randomise(layer, seed=i)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01, weight_decay=0.1)
    norms = []
    for x in batches(ranks):
        for part in x.chunk(accumulation, dim=1):
            (model(part) / accumulation).backward()
        norms.append(torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], CLIP).item())
        optimizer.step()
        optimizer.zero_grad()
    return norms, [global_state(layer) for layer in model.layers], model.head.weight.detach()


def engine_of(stage, ep_size, dispatch, accumulation, *, groups=deepspeed_compat.optimizer_groups):
    import deepspeed

    model = Model(lambda base, seed: ASEMoE(base, ep_size=ep_size, dispatch=dispatch, seed=seed, **OPTIONS))
    for i, layer in enumerate(model.layers):
        randomise(layer, seed=i) if ep_size == 1 else load_random(layer, seed=i)
    group = {"name": "all", "params": [p for p in model.parameters() if p.requires_grad]}
    optimizer = torch.optim.AdamW(groups([group]), lr=0.01, weight_decay=0.1)
    config = {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": accumulation, "steps_per_print": 2**31,
        "gradient_clipping": CLIP, "zero_optimization": {"stage": stage, "contiguous_gradients": True},
    }  # fmt: skip
    engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config, dist_init_required=False)
    deepspeed_compat.use_true_gradient_norm(engine)
    return engine


def load_random(layer, *, seed):
    """The values of ``randomise``, before the engine has made the layer's group."""
    whole = MoEFFN(FFN(), **OPTIONS)
    randomise(whole, seed=seed)
    load_global_state(layer, global_state(whole))


def check(stage, ep_size, dispatch, accumulation, *, wanted):
    label = f"ZeRO {stage}, ep {ep_size}, {dispatch}, accumulation {accumulation}"
    engine = engine_of(stage, ep_size, dispatch, accumulation)
    rank, size = dist.get_rank(), dist.get_world_size()
    norms, states, head = wanted
    found = []
    for step, x in enumerate(batches(size)):
        for part in x.chunk(accumulation, dim=1):
            loss = engine(part.chunk(size, dim=1)[rank])
            engine.backward(loss)
            engine.step()
        norm = float(engine.get_global_grad_norm())
        if abs(norm - norms[step]) > 1e-4 * norms[step]:
            found.append(f"{label}: gradient norm of step {step} is {norm}, wanted {norms[step]}")
    for i, layer in enumerate(engine.module.layers):
        for name, tensor in layer.global_state().items():
            error = (tensor - states[i][name]).norm() / states[i][name].norm()
            if error > 1e-5:
                found.append(f"{label}: layer {i} {name} differs by {error:.1e}")
    if (engine.module.head.weight - head).norm() > 1e-5 * head.norm():
        found.append(f"{label}: head differs")
    found += replicas_differ(engine, label)
    return found


def replicas_differ(engine, label):
    """Routed experts must be bit-equal on the ranks that replicate them, everything else on all ranks."""
    found = []
    for name, p in engine.module.named_parameters():
        gathered = [torch.empty_like(p) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, p.detach())
        step = engine.module.layers[0].ep_size if deepspeed_compat.is_routed(p) else 1
        if any(not torch.equal(gathered[i], gathered[i % step]) for i in range(dist.get_world_size())):
            found.append(f"{label}: replicas of {name} differ")
    return found


def grid(rank, folder):
    import deepspeed

    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed_compat.skip_cpu_communication_build()
    deepspeed.init_distributed("gloo", verbose=False)
    size = dist.get_world_size()
    wanted = {accumulation: reference(size, accumulation) for accumulation in (1, 2)}
    cases = [
        (0, 1, "auto", 1),
        (0, 2, "all_to_all", 1),
        (1, 2, "gather", 1),
        (2, 2, "all_to_all", 2),
        (2, 4, "auto", 1),
    ]
    found = []
    for case in cases:
        found += check(*case, wanted=wanted[case[-1]])
    return found


def auto_dispatch(rank, folder):
    """What ``auto`` chose, by what came first: an evaluation, a training batch, or the number of tokens."""
    import deepspeed

    os.environ["LOCAL_RANK"] = str(rank)
    deepspeed_compat.skip_cpu_communication_build()
    deepspeed.init_distributed("gloo", verbose=False)
    layer = ASEMoE(FFN(), ep_size=2, **OPTIONS)
    layer.set_deepspeed_parallelism()
    few, many = torch.randn(TASKS, 1 + rank, DIM), torch.randn(TASKS, 200, DIM)
    cheaper = [layer.layer_shape().cheaper(tokens) for tokens in (1.5 * TASKS, 200 * TASKS)]
    seen = [layer.dispatch]
    with torch.no_grad():
        layer.eval()(few)
    seen.append(layer.dispatch)
    layer.train()(many)
    seen.append(layer.dispatch)
    with torch.no_grad():
        layer.eval()(few)
    seen.append(layer.dispatch)
    told = ASEMoE(FFN(), ep_size=2, **OPTIONS)
    told.set_deepspeed_parallelism()
    told.decide_dispatch(4.0)
    fixed = ASEMoE(FFN(), ep_size=2, dispatch="gather", **OPTIONS)
    fixed.set_deepspeed_parallelism()
    fixed.decide_dispatch(4.0)
    chosen = {"cheaper": cheaper, "seen": seen, "told": told.dispatch, "fixed": fixed.dispatch}
    return chosen | {"plain": [plain_optimizer(stage, ep_size) for stage, ep_size in ((0, 1), (0, 2), (1, 1), (2, 2))]}


def plain_optimizer(stage, ep_size):
    """What is said of an optimiser whose one group holds experts and the rest: an error's or a warning's words."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            engine_of(stage, ep_size, "auto", 1, groups=list)
        except UserError as error:
            return ["error", str(error)]
    return next((["warning", str(w.message)] for w in caught if "optimizer:" in str(w.message)), [])


def test_auto_is_decided_by_the_training_batch(tmp_path):
    world = start_world(auto_dispatch, tmp_path, size=2)()
    assert world.codes == [0] * 2, world.codes
    for result in world.results:
        assert result["cheaper"] == ["all_to_all", "gather"]
        assert result["seen"] == [None, None, "gather", "gather"]
        assert (result["told"], result["fixed"]) == ("all_to_all", "gather")
        works, warned, *refused = result["plain"]
        assert works == []  # every rank has all experts
        assert warned[0] == "warning" and "routed experts of 2 ranks" in warned[1]
        assert [kind for kind, _ in refused] == ["error"] * 2
        for (_, sentence), stage in zip(refused, (1, 2), strict=True):
            assert f"at ZeRO {stage} experts need groups of their own; give AdamW the groups of " in sentence
            assert "ase_dist.moe.optimizer_groups([{'name': 'all', 'params': " in sentence and "\n" not in sentence


def test_the_engine_trains_like_one_process(tmp_path):
    world = start_world(grid, tmp_path, size=4, seconds=240)()
    assert world.codes == [0] * 4, world.codes
    found = [f"rank {rank}: {text}" for rank, texts in enumerate(world.results) for text in texts]
    assert not found, "\n".join(found[:40])
