"""The portable checkpoint: safetensors files and a manifest, written whole or not at all, verified before reading."""

from ase_dist.training.state.checkpoint.reader import Checkpoint, open_checkpoint, open_whole
from ase_dist.training.state.checkpoint.store import CheckpointStore, SaveError

__all__ = ["Checkpoint", "CheckpointStore", "SaveError", "open_checkpoint", "open_whole"]
