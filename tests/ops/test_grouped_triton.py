"""The Triton kernels: what they compute, by Triton's interpreter, and that they compile for cards with bf16."""

import os
import subprocess
import sys

import pytest
import torch

from ase_dist.ops import grouped

pytest.importorskip("triton")
pytestmark = pytest.mark.single_gpu


def arguments(dtype, *, D, O, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(90, 5, generator=generator) < torch.tensor([0.9, 0.0, 0.2, 0.4, 0.7])
    groups = grouped.group_pairs(mask, pairs=int(mask.sum()))
    x, weight = torch.randn(90, D, generator=generator), torch.randn(5, O, D, generator=generator).mT
    v = torch.randn(len(groups.row_K), O, generator=generator)
    return grouped.Groups(*(t.to(device) for t in groups)), *(t.to(device, dtype) for t in (x, weight, v))


def check(kernels, dtype, tolerance, **options):
    groups, x, weight, v = arguments(dtype, **options)
    y, exact_y = v.new_zeros(90, v.shape[1]) + 1, torch.ones(90, v.shape[1], dtype=torch.float64)
    kernels.add_rows(y, v, groups.slot_K, groups.offset_T)
    exact_groups = grouped.Groups(*(t.cpu() for t in groups))
    exact_x, exact_weight, exact_v = (t.cpu().double() for t in (x, weight, v))
    rows = x[groups.row_K]
    grouped.add_rows(exact_y, exact_v, exact_groups)
    pairs = [
        (kernels.product(x, groups.row_K, weight, groups.ends_n), grouped.product(exact_x, exact_weight, exact_groups)),
        (kernels.product(rows, None, weight, groups.ends_n), grouped.product(exact_x, exact_weight, exact_groups)),
        (kernels.outer(v, x, groups.row_K, groups.ends_n), grouped.outer(exact_v, exact_x, exact_groups)),
        (kernels.outer(v, rows, None, groups.ends_n), grouped.outer(exact_v, exact_x, exact_groups)),
        (y, exact_y),
    ]
    for got, want in pairs:
        assert (got.cpu().double() - want).norm() <= tolerance * want.norm()


def check_interpreted():
    """Not bf16, whose products the interpreter (3.8) takes from the wrong bits."""
    from ase_dist.ops import grouped_triton

    for dtype, tolerance in ((torch.float32, 1e-6), (torch.float16, 1e-3)):
        for D, O in ((20, 4), (70, 130)):
            check(grouped_triton, dtype, tolerance, D=D, O=O)


def test_the_kernels_compute_the_grouped_products():
    """In a process of its own: Triton's language is another one where it is interpreted."""
    program = "from tests.ops.test_grouped_triton import check_interpreted; check_interpreted()"
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, stderr=subprocess.PIPE, check=False)
    if b"only 0-dimensional arrays can be converted to Python scalars" in done.stderr:
        pytest.skip("Triton's interpreter (3.6) takes a bound of a loop from an array, which NumPy 2.5 refuses")
    assert done.returncode == 0, done.stderr.decode()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("D", "O"), [(20, 4), (70, 130), (384, 16), (16, 1536)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 1e-3), (torch.bfloat16, 1e-2)])
def test_the_kernels_compute_the_grouped_products_on_a_gpu(dtype, tolerance, D, O):
    from ase_dist.ops import grouped_triton

    check(grouped_triton, dtype, tolerance, D=D, O=O, device="cuda")


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_for_cards_that_are_not_here(architecture):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ase_dist.ops import grouped_triton

    constants = {"HAS_ROW": True, "GROUPS": 256, "PAIRS": 64, "PRECISION": "ieee"}
    narrow = {"BLOCK_D": 64, "BLOCK_O": 16, "BLOCK_R": 16}
    pointers = {"row_ptr": "*i64", "slot_ptr": "*i64", "offset_ptr": "*i64", "ends_ptr": "*i32"}
    for kernel in (grouped_triton._product_kernel, grouped_triton._outer_kernel, grouped_triton._add_rows_kernel):
        given = {name: value for name, value in {**constants, **narrow}.items() if name in kernel.arg_names}
        kinds = {name: pointers.get(name, "*bf16" if name.endswith("_ptr") else "i32") for name in kernel.arg_names}
        signature = kinds | dict.fromkeys(given, "constexpr")
        compiled = triton.compile(
            ASTSource(kernel, signature, constexprs=given), target=GPUTarget("cuda", architecture, 32)
        )
        assert compiled.asm["cubin"] and compiled.metadata.shared <= 96 * 1024
