"""Decode the raw logits of a head into the predictions that are scored, drawn and saved.

| kind    | decoded              | meaning                                                |
|---------|----------------------|--------------------------------------------------------|
| classes | uint8 [B, H, W]      | the class with the highest logit; 255 where one is NaN |
| mask    | float32 [B, H, W]    | probability of the foreground                          |
| edges   | float32 [B, H, W]    | probability of an edge                                 |
| normals | float32 [B, 3, H, W] | unit vectors                                           |
| depth   | float32 [B, 1, H, W] | metres, as predicted                                   |
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ase_dist.errors import UserError
from ase_dist.tasks import IGNORE, Task

SHORTEST = 1e-12  # a vector below this length is shortened, not stretched


@torch.no_grad()
def decode(task: Task, logits_BCHW: Tensor, *, size: tuple[int, int] | None = None) -> Tensor:
    """Decode ``logits_BCHW`` [B, task.channels, h, w] as the table above says, at ``size`` (height, width) if given.

    Logits are resized (bilinear) before they are decoded, so class borders and probabilities are those of the
    interpolated logits. Arithmetic is float32 for logits of any type. Raises UserError for another shape.
    """
    if logits_BCHW.ndim != 4 or logits_BCHW.shape[1] != task.channels:
        raise UserError(f"{task.name}: got logits {list(logits_BCHW.shape)}, wanted [B, {task.channels}, H, W]")
    logits = logits_BCHW.float()
    if size is not None and logits.shape[-2:] != size:
        logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
    if task.kind == "classes":
        return logits.argmax(dim=1).masked_fill(logits.amax(dim=1).isnan(), IGNORE).to(torch.uint8)
    if task.kind in ("mask", "edges"):
        return logits.sigmoid().squeeze(1)
    return unit_vectors(logits, dim=1) if task.kind == "normals" else logits


def unit_vectors(x: Tensor, *, dim: int) -> Tensor:
    """``x`` at length 1 along ``dim``; zero stays zero.

    As ``torch.nn.functional.normalize``, whose norm along any dimension but the last takes ten to a hundred times as
    long on a CPU (torch 2.14). Not for losses: the gradient at a zero vector is NaN here.
    """
    return x / x.square().sum(dim, keepdim=True).sqrt().clamp_min(SHORTEST)
