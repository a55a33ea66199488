"""The layer in the place of a model's FFN: the same function, each part of the batch by its task, losses collected."""

import pytest
import torch
from torch import nn

from ase_dist.moe import FFN, ASEMoE, MoEFFN, TaskFFN, router_loss, set_tasks
from tests.moe import conftest

pytestmark = pytest.mark.single_gpu


def tokens(batch=4):
    return torch.randn(batch, 5, 12, generator=torch.Generator().manual_seed(3))


def layer(kind=MoEFFN):
    found = kind(conftest.FFN(), num_experts=5, k=2, num_tasks=3, rank=2)
    conftest.randomise(found)
    return found


def test_parts_by_other_names_are_the_base():
    base = conftest.FFN()
    with torch.no_grad():
        assert torch.equal(FFN(base.fc1, base.act, base.fc2)(tokens()), base(tokens()))
    wrapped = MoEFFN(FFN(base.fc1, base.act, base.fc2), num_experts=4, k=2, num_tasks=1)
    torch.testing.assert_close(wrapped(tokens()[None]).output[0], base(tokens()))


@pytest.mark.parametrize("kind", [MoEFFN, ASEMoE])
def test_each_part_of_the_batch_is_computed_as_its_task(kind):
    inner = layer(kind)
    model = nn.Sequential(TaskFFN(inner))
    set_tasks(model, [2, 0])
    output = model(tokens())
    for task, part, x in zip((2, 0), output.chunk(2), tokens().chunk(2), strict=True):
        torch.testing.assert_close(part, inner(x, task=task)[0])
    assert not torch.allclose(inner(tokens(), task=1)[0], inner(tokens(), task=0)[0])


def test_router_losses_are_those_of_the_last_pass_summed():
    model = nn.Sequential(TaskFFN(layer()), TaskFFN(layer()))
    with pytest.raises(ValueError, match="computed nothing yet"):
        router_loss(model)
    set_tasks(model, [0, 1])
    x = tokens(8)
    first = model[0].layer(x.unflatten(0, (2, -1)), task=[0, 1])
    second = model[1].layer(first.output, task=[0, 1])
    model(x)
    torch.testing.assert_close(router_loss(model), first.aux_loss + second.aux_loss)
    torch.testing.assert_close(model[1].last.mean_gates, second.mean_gates)
    router_loss(model).backward()
    assert model[0].layer.router.weight.grad.abs().sum() > 0


def test_a_batch_that_cannot_be_cut_and_a_model_without_the_layer_are_refused():
    model = TaskFFN(layer())
    set_tasks(model, [0, 1, 2])
    with pytest.raises(ValueError, match=r"batch of 4 for the tasks \[0, 1, 2\].*set_tasks"):
        model(tokens(4))
    with pytest.raises(ValueError, match="Linear without a TaskFFN"):
        set_tasks(nn.Linear(2, 2), [0])


def test_a_forgotten_set_tasks_is_an_error_where_the_batch_happens_to_divide(one_sentence):
    model = TaskFFN(layer())
    for batch in (6, 4, 3, 1):
        with pytest.raises(ValueError, match="before set_tasks") as raised:
            model(tokens(batch))
        one_sentence(raised, f"batch of {batch}", "3 tasks", "set_tasks(model", "[0, 1, 2]")
    set_tasks(model, [0, 1, 2])
    torch.testing.assert_close(model(tokens(3)), model.layer(tokens(3).unsqueeze(1)).output.squeeze(1))
    model(tokens(6))
    single = TaskFFN(MoEFFN(conftest.FFN(), num_experts=3, k=1, num_tasks=1))
    single(tokens(6))


@pytest.mark.parametrize("tasks", [[2], [-1], [], ["0"], "0", 1, [0.0], None])
def test_tasks_that_one_layer_of_the_model_does_not_have_change_none_of_them(tasks, one_sentence):
    model = nn.Sequential(TaskFFN(layer()), TaskFFN(MoEFFN(conftest.FFN(), num_experts=3, k=1, num_tasks=2)))
    set_tasks(model, [1, 0])
    with pytest.raises(ValueError, match="set_tasks: got") as raised:
        set_tasks(model, tasks)
    one_sentence(raised, "wanted one or more numbers from 0 to 1" if tasks == [2] else "wanted one or more numbers")
    assert [ffn.tasks for ffn in model] == [(1, 0), (1, 0)]


@pytest.mark.parametrize(("set_", "kept", "then"), [([2, 0, 1], [1, 2], (1, 0)), ([0, 2], [2], (0,)), ([2], [2], (0,))])
def test_tasks_follow_those_that_the_layer_keeps(set_, kept, then):
    """Each part of a batch is still computed as the task that it was set to, under the number that this has now."""
    model, x = TaskFFN(layer()), tokens(2)
    set_tasks(model, set_)
    want = {task: model.layer(x, task=task).output for task in kept}
    model.layer.keep_tasks(kept)
    assert model.tasks == then
    parts = model(torch.cat([x] * len(then))).chunk(len(then))
    for number, part in zip(then, parts, strict=True):
        torch.testing.assert_close(part, want[kept[number]])
    set_tasks(model, [0])
    torch.testing.assert_close(model(x), want[kept[0]])
