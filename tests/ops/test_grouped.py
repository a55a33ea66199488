"""Grouped products against loops over pairs, with gradients of both orders; and what a tracer sees of them."""

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from ase_dist.ops import grouped
from ase_dist.ops.grouped import combined_product, gathered_outer, gathered_product, group_pairs, per_pair, take_pairs

pytestmark = pytest.mark.single_gpu

T, D, O, R, n = 9, 5, 4, 3, 4


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


MASKS = {
    "two of four": torch.rand(T, n, generator=torch.Generator().manual_seed(1)).argsort(dim=1) < 2,
    "uneven": torch.rand(T, n, generator=torch.Generator().manual_seed(2)) < torch.tensor([0.9, 0.0, 0.2, 0.4]),
    "all to one": torch.tensor([False, False, True, False]).expand(T, n),
    "none": torch.zeros(T, n, dtype=torch.bool),
}
each_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())


def pairs_of(mask):
    """(row, group) in the order of ``Groups``, by plain Python."""
    return [(t, e) for e in range(n) for t in range(T) if mask[t, e]]


def loop_gathered(x, weight, mask):
    rows = [x[t] @ weight[e] for t, e in pairs_of(mask)]
    return torch.stack(rows) if rows else x.new_zeros(0, weight.shape[2])


def loop_combined(v, weight, mask):
    rows = [torch.zeros(weight.shape[2], dtype=v.dtype) for _ in range(T)]
    for i, (t, e) in enumerate(pairs_of(mask)):
        rows[t] = rows[t] + v[i] @ weight[e]
    return torch.stack(rows)


def loop_outer(v, x, mask):
    sums = [torch.zeros(v.shape[1], x.shape[1], dtype=v.dtype) for _ in range(n)]
    for i, (t, e) in enumerate(pairs_of(mask)):
        sums[e] = sums[e] + torch.outer(v[i], x[t])
    return torch.stack(sums)


def cases(mask):
    """Each operation, its loop, and random arguments."""
    draw, pairs = draws(), int(mask.sum())
    return [
        (gathered_product, loop_gathered, [draw(T, D), draw(n, D, O)]),
        (combined_product, loop_combined, [draw(pairs, R), draw(n, O, R).mT]),
        (gathered_outer, loop_outer, [draw(pairs, R), draw(T, D)]),
    ]


@each_mask
@pytest.mark.parametrize("number", range(3))
def test_each_operation_is_its_loop_with_gradients_of_both_orders(number, mask):
    operation, loop, arguments = cases(mask)[number]
    groups = group_pairs(mask, pairs=int(mask.sum()))
    found = []
    for function, how in ((operation, groups), (loop, mask)):
        leaves = [a.detach().clone().requires_grad_() for a in arguments]
        out = function(*leaves, how)
        loss = out.pow(3).sum() + sum(leaf.pow(3).sum() for leaf in leaves)  # the leaves: where there are no pairs
        first = torch.autograd.grad(loss, leaves, create_graph=True)
        second = torch.autograd.grad(sum(g.pow(2).sum() for g in first), leaves)
        found.append([out.detach(), *(g.detach() for g in first), *second])
    torch.testing.assert_close(*found, rtol=1e-11, atol=1e-11)


@each_mask
def test_values_of_pairs_and_biases_of_their_groups(mask):
    groups = group_pairs(mask, pairs=int(mask.sum()))
    values, bias = draws()(T, n, 2).requires_grad_(), draws(1)(n, O).requires_grad_()
    index = torch.tensor(pairs_of(mask), dtype=torch.long).reshape(-1, 2)
    torch.testing.assert_close(take_pairs(values, groups), values[index[:, 0], index[:, 1]])
    torch.testing.assert_close(per_pair(bias, groups), bias[index[:, 1]])
    take_pairs(values, groups).square().sum().backward()
    torch.testing.assert_close(values.grad, 2 * values.detach() * mask.unsqueeze(-1))
    (direction,) = torch.autograd.grad(per_pair(bias, groups).square().sum(), bias)
    torch.testing.assert_close(direction, 2 * bias.detach() * mask.sum(dim=0).unsqueeze(-1))


@each_mask
def test_groups_list_the_pairs_of_each_row_too(mask):
    groups = group_pairs(mask, pairs=int(mask.sum()))
    assert list(zip(groups.row_K.tolist(), groups.group_K.tolist(), strict=True)) == pairs_of(mask)
    ends = [*groups.offset_T.tolist()[1:], len(groups.slot_K)]
    for t, (start, end) in enumerate(zip(groups.offset_T.tolist(), ends, strict=True)):
        assert [groups.group_K[i].item() for i in groups.slot_K[start:end]] == mask[t].nonzero().flatten().tolist()


def operations(device, dtype=torch.bfloat16, *, rank=16, width=96):
    """All three operations with gradients, narrow and wide, on 40 rows of 8 groups, 3 each."""
    like = {"device": device, "dtype": dtype}
    mask = torch.ones(40, 8, device=device, dtype=torch.bool)
    groups = group_pairs(mask, pairs=120)
    x, a, b = torch.empty(40, width, **like), torch.empty(8, width, rank, **like), torch.empty(8, rank, width, **like)
    leaves = [leaf.requires_grad_() for leaf in (x, a, b)]
    y = combined_product(gathered_product(x, a, groups), b, groups)
    assert y.shape == x.shape and [g.shape for g in torch.autograd.grad(y.sum(), leaves)] == [t.shape for t in leaves]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rank", [4, 80])
def test_shapes_follow_from_the_arguments_so_that_nothing_waits_for_the_device(device, dtype, rank):
    with FakeTensorMode():  # which raises where a value must be known
        operations(device, dtype, rank=rank)


def test_torchs_counter_knows_the_flops():
    with FlopCounterMode(display=False) as counter:
        operations("meta")
    assert counter.get_total_flops() == 3 * 2 * 2 * 120 * 96 * 16  # forward and backward take 1 and 2 products a weight


@pytest.mark.parametrize("width", [96, 6])
def test_torchs_own_grouped_product_gets_what_it_takes(width, monkeypatch):
    """The path of bf16 on sm90 by torch's CPU form of that function: alignment of widths, strides and addresses."""
    monkeypatch.setattr(grouped, "_has_fast_grouped_mm", lambda x: True)
    monkeypatch.setattr(grouped, "NARROW", 0)
    draw = draws()
    mask = MASKS["uneven"]
    groups = group_pairs(mask, pairs=int(mask.sum()))
    flat = draw(1 + n * width * 3).to(torch.bfloat16)
    weight = flat[1:].view(n, width, 3)  # begins at no multiple of 16 bytes, as in a flat buffer
    x, v = draw(T, width).to(torch.bfloat16), draw(len(groups.row_K), 3).to(torch.bfloat16)
    rows = x[groups.row_K]
    for got, want in (
        (grouped._product(rows, None, weight, groups), loop_gathered(x.double(), weight.double(), mask)),
        (grouped._outer(v, rows, None, groups), loop_outer(v.double(), x.double(), mask)),
    ):
        torch.testing.assert_close(got.double(), want, rtol=2e-2, atol=2e-2)


def test_a_weight_that_fits_is_not_copied():
    weight = torch.empty(4, 16, 8, dtype=torch.bfloat16)
    assert grouped._aligned(weight, 16, 8) is weight
    assert grouped._aligned(torch.empty(4, 16, 7, dtype=torch.bfloat16), 16, 7).shape == (4, 16, 8)
    assert grouped._aligned(torch.empty(65, dtype=torch.bfloat16)[1:].view(8, 8), 8).data_ptr() % 16 == 0
