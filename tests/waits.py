"""Counts where the host would wait for an accelerator, on a CPU: operations whose results decide what the host does.

On CUDA each of them copies from the device, or to it out of memory that is not page-locked, and synchronises the stream
(torch 2.14). A wait is counted once, with the line of this package or of DeepSpeed that asked for it.
"""

import traceback
from collections import Counter
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
READS = {aten._local_scalar_dense.default, aten.item.default, aten.equal.default, aten.is_nonzero.default}
SIZES_DEPEND_ON_VALUES = {
    aten.nonzero.default,
    aten.masked_select.default,
    aten.bincount.default,
    aten.unique_dim.default,
    aten._unique2.default,
    aten.repeat_interleave.Tensor,
}
BY_INDEX = {
    aten.index.Tensor,
    aten.index_put_.default,
    aten.index_put.default,
    aten._index_put_impl_.default,
    aten._unsafe_index.Tensor,
}
HOST_READS = {torch.Tensor.cpu, torch.Tensor.numpy, torch.Tensor.tolist}
TREES = ("/ase_dist/", "/deepspeed/")


class HostWaits:
    """While open, ``lines`` counts the waits by the line that asked for them; ``total`` is their number.

    Real CPU tensors stand for the device's, so that a copy between the two does not show; with FakeTensors of a device
    (``torch._subclasses``) it does.
    """

    def __init__(self):
        self.lines = Counter()
        self._modes = (_Dispatched(self), _Called(self))
        self._inside = 0
        self._synchronize = ()

    @property
    def total(self):
        return sum(self.lines.values())

    def note(self, what):
        frames = [f for f in traceback.extract_stack() if any(tree in f.filename for tree in TREES)]
        if any("/ase_dist/data/" in f.filename for f in frames):  # batches are made on the host
            return
        where = [f"{f.filename.rsplit('site-packages/')[-1].rsplit('/ase_dist/')[-1]}:{f.lineno}" for f in frames[-3:]]
        self.lines[f"{what} at {' < '.join(reversed(where))}"] += 1

    def __enter__(self):
        from deepspeed.accelerator import get_accelerator

        accelerator = get_accelerator()
        real = accelerator.synchronize
        patch = mock.patch.object(accelerator, "synchronize", lambda *a: (self.note("synchronize"), real(*a))[1])
        patch.start()
        self._synchronize = (patch,)
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(self, *error):
        for mode in reversed(self._modes):
            mode.__exit__(*error)
        for patch in self._synchronize:
            patch.stop()


class _Dispatched(TorchDispatchMode):
    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
        if not self.waits._inside:
            name = function.name().removeprefix("aten::")
            if function in READS or function in SIZES_DEPEND_ON_VALUES:
                self.waits.note(name)
            elif function in BY_INDEX and any(t.dtype == torch.bool for t in tree_leaves(args[1]) if t is not None):
                self.waits.note(f"{name} by a mask")
            elif function is aten.where.self and len({t.device.type for t in tensors}) > 1:
                self.waits.note("where with a number on the host")
            elif function in (aten._to_copy.default, aten.copy_.default):
                source, target = tensors[-1].device.type, torch.device(kwargs.get("device") or tensors[0].device).type
                is_async = kwargs.get("non_blocking") or (len(args) > 2 and args[2])
                if source != target and not (is_async and target != "cpu"):
                    self.waits.note(f"{name} from {source} to {target}")
        return function(*args, **kwargs)


class _Called(TorchFunctionMode):
    """What does not reach the dispatcher as such on a CPU; reads inside of it are not counted again."""

    def __init__(self, waits):
        super().__init__()
        self.waits = waits

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        what = None
        if function in HOST_READS:
            what = function.__name__
        elif function is torch.tensor and kwargs.get("device") is not None:
            what = "tensor from a number of the host"
        elif function in (torch.where, torch.Tensor.where) and any(isinstance(a, (int, float)) for a in args):
            what = "where with a number"
        if what is None or self.waits._inside:
            return function(*args, **kwargs)
        self.waits.note(what)
        self.waits._inside += 1
        try:
            return function(*args, **kwargs)
        finally:
            self.waits._inside -= 1
