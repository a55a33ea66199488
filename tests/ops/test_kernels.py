"""The Triton kernels, by Triton's interpreter, against plain operations; that they compile for GPUs."""

import os
import subprocess
import sys

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ase_dist.ops import kernels
from ase_dist.ops.kernels import (
    ACTIVATIONS,
    activation_and_gradient_plain,
    gate_gradients_plain,
    route_jointly_plain,
)

triton = pytest.importorskip("triton")
pytestmark = pytest.mark.single_gpu

# in a process of its own, for the interpreter is chosen when a kernel is defined
INTERPRETED = """
import contextlib, itertools, torch
from ase_dist.ops import kernels as K
torch.cuda.device = lambda device: contextlib.nullcontext()
torch.manual_seed(0)
close = torch.testing.assert_close
for dtype, error in ((torch.float32, 2e-5), (torch.bfloat16, 2e-2)):
    h, grad = 3 * torch.randn(2, 7, 301).to(dtype)
    for kind in K.ACTIVATIONS:
        case = h, grad, kind
        close(K._launch_activation(*case), K.activation_and_gradient_plain(*case), rtol=error, atol=error)
    for N, r in ((6, 4), (5, 1), (16, 3)):
        case = torch.randn(9, N * r + 8).to(dtype)[:, : N * r], torch.randn(9, N * r + 3)[:, 3:], torch.rand(9, N)
        close(K._launch_gates(*case, torch.float32, dtype), K.gate_gradients_plain(*case, torch.float32, dtype),
              rtol=error, atol=error)
for N, k, S in ((16, 3, 1), (7, 0, 2), (5, 5, 0), (20, 12, 4), (1, 0, 1)):
    logits = torch.randn(2, 9, N + 4)[..., 4:]
    close(K._launch_route(logits, k, S), K.route_jointly_plain(logits, k, S), rtol=2e-6, atol=2e-6)
    odd = torch.zeros(3, N)
    odd[1], odd[2, : N // 2] = torch.nan, -torch.inf
    assert K._launch_route(odd, k, S)[1].sum(dim=-1).tolist() == [k + S] * 3
"""


@pytest.mark.filterwarnings("ignore")
def test_the_interpreted_kernels_are_the_plain_forms():
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", INTERPRETED], check=True, env=environment, timeout=300)


@pytest.mark.parametrize("capability", [80, 90])
def test_the_kernels_compile_for_gpus(capability):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from ase_dist.ops import triton_kernels

    f, i = "*bf16", "i32"
    wanted = {
        triton_kernels.activation_kernel: ((f, f, f, f, i), {"KIND": 0, "BLOCK": 1024}),
        triton_kernels.gate_kernel: (
            (f, "*fp32", "*fp32", "*fp32", f, "*fp32", i, i, i),
            {"N": 16, "RANK": 4, "ROWS": 32, "EXPERTS": 16, "WIDTH": 4},
        ),
        triton_kernels.route_kernel: (
            ("*fp32", "*fp32", "*u8", "*fp32", i, i, i),
            {"N": 20, "ROUTED": 18, "K": 3, "ROWS": 32, "WIDTH": 32},
        ),
    }
    for kernel, (types, constants) in wanted.items():
        signature = {**dict(zip(kernel.arg_names, types, strict=False)), **dict.fromkeys(constants, "constexpr")}
        source = ASTSource(kernel, signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32))
        assert f"sm_{capability}" in compiled.asm["ptx"] and compiled.asm["cubin"]


@pytest.mark.parametrize("kind", ACTIVATIONS)
def test_the_gradient_of_an_activation_is_autograds(kind):
    functions = {
        "gelu": torch.nn.GELU(),
        "gelu_tanh": torch.nn.GELU("tanh"),
        "relu": torch.relu,
        "silu": torch.nn.SiLU(),
    }
    h, grad = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    act, grad_h = activation_and_gradient_plain(h, grad, kind)
    want = functions[kind](h.requires_grad_())
    torch.testing.assert_close((act, grad_h), (want.detach(), torch.autograd.grad(want, h, grad)[0]))


def test_the_operators_are_sound():
    """Schemas, fake tensors and aliasing, by torch's own checks."""
    h, grad = torch.randn(2, 5, 12)
    gates = torch.rand(5, 6)
    checks = ("test_schema", "test_faketensor")
    operators = torch.ops.ase_dist
    torch.library.opcheck(operators.activation_and_gradient.default, (h, grad, "gelu"), test_utils=checks)
    case = (grad, h, gates, torch.bfloat16, torch.float32)
    torch.library.opcheck(operators.gate_gradients.default, case, test_utils=checks)
    torch.library.opcheck(operators.route_jointly.default, (gates, 2, 1), test_utils=checks)
    torch.testing.assert_close(kernels.gate_gradients(*case), gate_gradients_plain(*case))
    torch.testing.assert_close(kernels.route_jointly(gates, 2, 1), route_jointly_plain(gates, 2, 1))


class Seen(TorchDispatchMode):
    """The names of this package's operators that were dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "ase_dist":
            self.names.append(func._schema.name.removeprefix("ase_dist::"))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["activation_and_gradient", "gate_gradients", "route_jointly"])
def test_an_operator_is_dispatched_only_where_something_watches(name, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    h, grad = torch.randn(2, 5, 12, generator=generator)
    gates = torch.rand(5, 6, generator=generator)
    case = {
        "activation_and_gradient": (h, grad, "gelu"),
        "gate_gradients": (grad, h, gates, torch.float32, torch.float32),
        "route_jointly": (gates, 2, 1),
    }[name]
    function, wanted = getattr(kernels, name), getattr(torch.ops.ase_dist, name)(*case)
    with Seen() as seen:
        function(*case)  # autograd watches
        with torch.no_grad():
            found = function(*case)
    assert seen.names == [name, name]
    torch.testing.assert_close(found, wanted, rtol=0, atol=0)
    with torch.no_grad(), FakeTensorMode() as mode:
        fake = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in case]
        assert [each.shape for each in function(*fake)] == [each.shape for each in wanted]
    with torch.no_grad():  # a fake tensor outside of its mode
        assert all(isinstance(each, FakeTensor) for each in function(*fake))
    monkeypatch.setattr(function, "dispatched", lambda *_: pytest.fail("dispatched"))
    with torch.no_grad():
        torch.testing.assert_close(function(*case), wanted, rtol=0, atol=0)
    with pytest.raises(pytest.fail.Exception, match="dispatched"):
        function(*case)
