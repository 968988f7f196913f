"""Random numbers of a training step, without state: nothing to save, nothing to restore."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Draws:
    """Where in the run a micro-batch stands; its random numbers follow from that.

    Attributes:
        seed: of the run.
        epoch: counted from 0.
        row: the micro-batch's first row of the manifest, which comes once an epoch: numbers do
            not depend on which rank works on it, nor in which of its accumulated micro-batches.
        device: of the tensors drawn; numbers differ between kinds of devices.
    """

    seed: int
    epoch: int
    row: int
    device: torch.device

    def generator(self, purpose: str, device: str | None = None) -> torch.Generator:
        """A fresh generator for one purpose (`"noise"`); the same again for the same name.

        Args:
            device: another than that of the tensors.
        """
        key = f"{self.seed}/{purpose}/{self.epoch}/{self.row}"
        digest = hashlib.sha256(key.encode()).digest()
        generator = torch.Generator(device or self.device)
        return generator.manual_seed(int.from_bytes(digest[:8], "little") >> 1)
