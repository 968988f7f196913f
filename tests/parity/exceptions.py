"""Defects of the originals that we do not copy: the one list of what parity leaves out, and why."""

from __future__ import annotations

import re
from dataclasses import dataclass


@dataclass(frozen=True)
class Defect:
    official: str
    """Pattern of the case's `official` name."""
    tensor: str
    """Pattern of the expected tensor's full name, or of what the adapter calls a row of a table."""
    reason: str


@dataclass(frozen=True)
class Defects:
    entries: tuple[Defect, ...]

    def allows(self, official: str, tensor: str) -> bool:
        return any(
            re.search(d.official, official) and re.search(d.tensor, tensor) for d in self.entries
        )


DEFECTS_NOT_COPIED = Defects(
    entries=(
        Defect(
            r"rectified_flow\.timestep_transform$",
            r"out\.t below 17 frames",
            "1.2 counts frames // 17 * 5 latent frames, 0 below 17, and then sends every timestep "
            "to 0 (NaN at pure noise); ours counts at least one",
        ),
        Defect(
            r"v1\.[12] IDDPM\.sample",
            r"^out\.z kept frames$",
            "1.1 runs the last step on frames that the mask keeps (0) as well, so that they come "
            "out a little off; ours gives them back as they were",
        ),
        Defect(
            r"train_utils\.MaskGenerator",
            r"^quarter_\w+ T=[23] ",
            "a quarter of 2 or 3 frames raises ValueError in 1.2; ours keeps one frame clean",
        ),
        Defect(
            r"train_utils\.MaskGenerator",
            r" 0+$",
            "no frame left to predict makes 1.2's loss 0/0; ours noises the last frame",
        ),
        Defect(
            r"utils\.lr_scheduler",
            r" linear$",
            "the linear one-cycle schedule runs backwards; no published recipe uses it",
        ),
        Defect(
            r"datasets\.aspect$",
            r"^frames \d+x$",
            "1x, 2x, ... name the same lengths as 2s, 4s, ...; ours takes seconds or frames",
        ),
        Defect(
            r"datasets\.aspect$",
            r"^size \S+ \d\.\d+$",
            "keys of the tables passed for aspect ratios; ours takes width:height only",
        ),
        Defect(
            r"v1\.2 opensora\.datasets\.aspect$",
            r"^size (256|512|1024|2048|2880) (1:1|1:2|2:1)$",
            "1.2 refuses them because these tables spell their keys 1.0 and not 1.00; ours has "
            "those sizes (so has the speed run's fork)",
        ),
        Defect(
            r"inference_utils\.apply_mask_strategy$",
            r"^out\.z edit ratio 1$",
            "at edit ratio 1 the mask makes all of a frame anew, but 1.2 starts it from "
            "the clean reference in place of noise; ours starts from noise",
        ),
        Defect(
            r"ckpt_utils\.reparameter",
            r"^(out\.ckpt\.blocks\.|PixArt-XL-\S+ -> STDiT3)",
            "a file not named PixArt-Sigma keeps its block names and STDiT3 then ignores all of "
            "them; ours goes by what is in the file and loads the blocks of PixArt-alpha too",
        ),
    )
)
