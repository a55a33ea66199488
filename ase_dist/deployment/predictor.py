"""An exported model that takes images of any kind and size and gives predictions at their size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from os import PathLike
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from ase_dist.data.batch import Record
from ase_dist.data.transforms import Transform
from ase_dist.deployment import exported
from ase_dist.deployment.images import Pixels, read_rgb, to_rgb
from ase_dist.errors import UserError
from ase_dist.evaluation.decode import decode
from ase_dist.tasks import Task

Prediction = dict[str, NDArray[Any]]
Picture = Image.Image | NDArray[Any] | str | PathLike[str]

MOST_LOGITS = 1 << 26  # full-size logits of one task in memory at once; larger images are decoded in strips of rows


class Predictor(exported.ExportedModel):
    """An ``ExportedModel`` with ``predict``; ``ase_dist.load`` makes one."""

    def predict(
        self, images: Sequence[Picture], *, tasks: Sequence[str] | None = None, batch_size: int = 8
    ) -> list[Prediction]:
        """The predictions for each of ``images``, by task, at the image's own height and width.

        Images are Pillow's pictures, arrays or paths of files, see ``to_rgb``. ``tasks`` None: all; streams of other
        tasks are not computed. Arrays: classes uint8 [H, W] of ids; mask and edges float32 [H, W] of probabilities;
        normals float32 [3, H, W], unit vectors; depth float32 [1, H, W] in metres. Raises UserError for an image that
        cannot be read, with its index in the list, and for a task that the model does not have.
        """
        if isinstance(images, (str, PathLike, Image.Image, np.ndarray)):
            raise UserError("predict: got one image, wanted a list of images; write [image]")
        if batch_size < 1:
            raise UserError(f"predict: batch_size: got {batch_size}, wanted at least 1")
        found: list[Prediction] = []
        for start in range(0, len(images), batch_size):
            batch = []
            for i, image in enumerate(images[start : start + batch_size], start):
                try:
                    batch.append(read_rgb(Path(image)) if isinstance(image, (str, PathLike)) else to_rgb(image))
                except UserError as error:
                    raise UserError(f"predict: image {i}: {error}") from None
            found += self.predict_pixels(batch, tasks=tasks)
        return found

    def predict_pixels(self, images: Sequence[Pixels], *, tasks: Sequence[str] | None = None) -> Iterator[Prediction]:
        """``predict`` for one batch of uint8 [H, W, 3]; a prediction is decoded when the iterator reaches it."""
        transform = Transform(self.image.size, tasks=(), augmentation="none")
        inputs = torch.stack([transform.eval_sample(Record(i, "", image, {})).image for i, image in enumerate(images)])
        with torch.no_grad():
            logits = self(inputs.to(self.device), tasks=tasks).predictions
        chosen = [task for task in self.tasks if task.name in logits]
        for i, image in enumerate(images):
            size = image.shape[0], image.shape[1]
            yield {task.name: decode_strips(task, logits[task.name][i : i + 1], size) for task in chosen}

    @property
    def device(self) -> torch.device:
        """The device of the model's weights."""
        return next(self.parameters()).device


def load(path: str | PathLike[str], *, device: torch.device | str = "cpu") -> Predictor:
    """The model in the folder of an export; UserError as ``exported.load``."""
    loaded = exported.load(path, device=device)
    return Predictor(loaded.model, loaded.card).eval()


def decode_strips(task: Task, logits_1Chw: Tensor, size: tuple[int, int]) -> NDArray[Any]:
    """``decode`` of one image at ``size``, a strip of rows at a time where all of its logits would be too large."""
    height, width = size
    rows = max(1, MOST_LOGITS // (task.channels * width))
    if rows >= height:
        return np.asarray(decode(task, logits_1Chw, size=size)[0].cpu())
    # a strip gets its final rows here, by the bilinear weights of the whole image; ``decode`` then resizes the columns
    logits, strips = logits_1Chw.float(), []
    source = ((torch.arange(height, dtype=torch.float64) + 0.5) * logits.shape[-2] / height - 0.5).clamp(min=0)
    for start in range(0, height, rows):
        part = source[start : start + rows].to(logits.device)
        above = part.floor().long()
        below = (above + 1).clamp(max=logits.shape[-2] - 1)
        strip = torch.lerp(logits[..., above, :], logits[..., below, :], (part - above).float()[:, None])
        strips.append(decode(task, strip, size=(strip.shape[-2], width))[0].cpu())
    return np.asarray(torch.cat(strips, dim=-2))
