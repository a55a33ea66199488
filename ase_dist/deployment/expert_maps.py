"""Which experts an exported model used, and how much, for each patch of a picture: by task and layer, as maps.

Letters: L layers with experts, t tasks, T tokens, N experts (the shared ones last), h w a layer's grid of patches.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ase_dist.deployment.images import Pixels
from ase_dist.deployment.predictor import Prediction, Predictor
from ase_dist.moe import MoEFFN

Array = NDArray[np.float32]


@dataclass(frozen=True)
class ExpertMaps:
    """Of one task: the gates of each layer [N, h, w], 0 where an expert is inactive; the last experts are shared ones.

    ``active`` [L, N] is the share of patches for which an expert was active, ``mean_gates`` [L, N] the mean over all of
    them.
    """

    layers: tuple[Array, ...]
    num_shared: int
    active: Array
    mean_gates: Array

    def gates(self, layer: int | None) -> Array:
        """The map [N, h, w] of one layer, or the mean of all at the finest grid (None)."""
        if layer is not None:
            return self.layers[layer]
        height, width = (max(each.shape[axis] for each in self.layers) for axis in (1, 2))
        return np.mean([_resized(each, height, width) for each in self.layers], axis=0, dtype=np.float32)

    def most_used(self, layer: int | None) -> int:
        """The routed expert with the largest mean gate in one layer, or in all together; without any the first."""
        gates_LN = self.mean_gates if layer is None else self.mean_gates[layer : layer + 1]
        routed = gates_LN.shape[1] - self.num_shared
        return int(gates_LN[:, :routed].mean(axis=0).argmax()) if routed else 0


def predict_with_experts(model: Predictor, image: Pixels) -> tuple[Prediction, dict[str, ExpertMaps]]:
    """The predictions of all tasks for uint8 [H, W, 3], and the maps of each task; no maps of a model without experts.

    A layer whose tokens are no grid of patches is left out.
    """
    with _recorded_gates(model) as recorded:
        (prediction,) = model.predict_pixels([image])
    maps: dict[str, ExpertMaps] = {}
    for i, task in enumerate(model.tasks):
        layers, shares, means, shared = [], [], [], 0
        for layer, gates_tTN, active_tTN in recorded:
            grid = _grid(gates_tTN.shape[1], model)
            if grid is None:
                continue
            prefix, height, width = grid
            gates_NT = gates_tTN[i, prefix:].T.float().cpu().numpy()
            layers.append(gates_NT.reshape(-1, height, width))
            means.append(gates_NT.mean(axis=1))
            shares.append(active_tTN[i, prefix:].float().mean(dim=0).cpu().numpy())
            shared = layer.num_shared
        if layers:
            maps[task.name] = ExpertMaps(tuple(layers), shared, np.stack(shares), np.stack(means))
    return prediction, maps


@contextmanager
def _recorded_gates(model: Predictor) -> Iterator[list[tuple[MoEFFN, Tensor, Tensor]]]:
    """The layers with experts in the order in which they ran, with gates and active [t, T, N] of their tokens."""
    recorded: list[tuple[MoEFFN, Tensor, Tensor]] = []

    def keeper(layer: MoEFFN) -> Any:
        def keep(router: Any, arguments: Any, output: Any) -> None:
            recorded.append((layer, output[1].gates, output[1].active))

        return keep

    handles = [
        layer.router.register_forward_hook(keeper(layer)) for layer in model.modules() if isinstance(layer, MoEFFN)
    ]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()


def _grid(tokens: int, model: Predictor) -> tuple[int, int, int] | None:
    """How many tokens come before the patches, and the patches' height and width; None where there is no such grid."""
    size = model.image.size
    for prefix in dict.fromkeys((int(getattr(model.model, "prefix", 0)), 0)):
        patches = tokens - prefix
        height = round(math.sqrt(max(patches, 0) * size.height / size.width))
        width = patches // max(height, 1)
        is_whole = height > 0 and height * width == patches
        if is_whole and abs(width * size.height - height * size.width) < max(size.height, size.width):
            return prefix, height, width
    return None


def _resized(map_Nhw: Array, height: int, width: int) -> Array:
    """Each cell repeated, to the nearest."""
    rows = np.arange(height) * map_Nhw.shape[1] // height
    columns = np.arange(width) * map_Nhw.shape[2] // width
    return map_Nhw[:, rows][:, :, columns]


def shares(maps: Mapping[str, ExpertMaps]) -> dict[str, NDArray[np.float64]]:
    """What ``draw_experts`` draws of the maps of all tasks: [L, t, N] by name."""
    return {
        "Share of patches": np.stack([each.active for each in maps.values()], axis=1, dtype=np.float64),
        "Mean gate": np.stack([each.mean_gates for each in maps.values()], axis=1, dtype=np.float64),
    }
