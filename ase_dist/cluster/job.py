"""What is to run on the nodes: the words after a launcher's own options, and the folders that they name."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass

from ase_dist.config import Settings, load_settings
from ase_dist.tasks import DATA_SETS

_PLAIN = re.compile(r"[\w@%+=:,./{}\[\] -]*", re.ASCII)
_TRAINING = re.compile(r"\S*train\.py|(-m|--module) ase_dist train")  # the first words of a training


@dataclass(frozen=True)
class Job:
    """A job's words. ``data`` must hold the same files on all nodes, ``output`` must be shared; empty: not known."""

    words: tuple[str, ...]
    data: str = ""
    output: str = ""
    timeout: float = Settings().guard.timeout

    @classmethod
    def of(cls, words: Sequence[str]) -> Job:
        """The job of ``launch/train.py ...`` or ``--module ase_dist train ...``; of others only the words.

        Raises UserError for wrong settings.
        """
        if not any(_TRAINING.fullmatch(" ".join(words[:count])) for count in (1, 3)):
            return cls(tuple(words))
        p = argparse.ArgumentParser(add_help=False)
        p.add_argument("--config")
        p.add_argument("--baseline", "--row")
        options, others = p.parse_known_args(list(words[1:]))
        overrides = [word for word in others if "=" in word and not word.startswith("-")]
        settings = load_settings(options.config, overrides, baseline=options.baseline)
        is_made = DATA_SETS[settings.data.name].layout is not None  # where it is missing, by whoever comes first
        data = "" if is_made or settings.data.root is None else str(settings.data.root)
        return cls(tuple(words), data, str(settings.output), settings.guard.timeout)

    def shell_characters(self) -> list[str]:
        """A sentence for each word that DeepSpeed's launcher would hand to a remote shell as code (0.19.8, pdsh).

        It puts quotation marks round words with spaces, and leaves all others as they are.
        """
        return [
            f"{word!r} would be read by a shell on every node; put that setting into a file for --config"
            for word in self.words
            if not _PLAIN.fullmatch(word) or ("{" in word and " " not in word)
        ]
