"""Starting a video model from an image model: PixArt-alpha or -Sigma into STDiT, STDiT2, STDiT3.

| PixArt, as its authors publish it | STDiT3 | STDiT, STDiT2, PixArt |
|---|---|---|
| `x_embedder.proj.weight` `[O, I, 2, 2]` | an axis of one for time behind I | the same |
| `pos_embed` | left out: computed | the same |
| `y_embedder.y_embedding`, 120 or 300 rows | last row repeated, or cut | the same |
| `blocks.N.` | `spatial_blocks.N.` | `blocks.N.` |
| the rest | same name, same shape | the same |

What only the video model has keeps its fresh initialisation, in which whatever looks along time
adds nothing at first. PixArt-alpha for 1024 pixels also has `csize_embedder` and `ar_embedder`
(loaded into STDiT2, which has them too; else left out), and variants of Sigma have `attn.sr` and
`attn.norm` in some blocks (left out). The authors' files keep their tensors below `state_dict`.

Whether a file is PixArt is told from its tensors. The original goes by its name, and so leaves the
blocks of PixArt-alpha out of STDiT3 without a word; here they are loaded.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from kinema.checkpoint.layout import Layout, Stored, wrapper_prefix
from kinema.checkpoint.released_names import PATCHES, TABLES
from kinema.checkpoint.source import TensorSource
from kinema.checkpoint.weights import LoadReport, check_fit, fill
from kinema.models.config import PixArtConfig, STDiT2Config, STDiT3Config, STDiTConfig

NULL_TEXT = "y_embedder.y_embedding"
ALPHA_TOKENS = 120
ALWAYS = re.compile(
    r"x_embedder\.proj\.(weight|bias)"
    r"|t_embedder\.mlp\.[02]\.(weight|bias)"
    r"|t_block\.1\.(weight|bias)"
    r"|y_embedder\.(y_embedding|y_proj\.fc[12]\.(weight|bias))"
    r"|blocks\.\d+\.(scale_shift_table"
    r"|(attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj)|mlp\.fc[12])\.(weight|bias))"
    r"|final_layer\.(scale_shift_table|linear\.(weight|bias))"
)
"""Tensors that every PixArt has."""
SOMETIMES = (
    r"blocks\.\d+\.attn\.(sr|norm)\.(weight|bias)",
    r"blocks\.\d+\.attn\.[qk]_norm\.weight",
    r"(csize|ar)_embedder\.mlp\.[02]\.(weight|bias)",
)
"""Tensors that some have; left out where a video model has no place for them."""


@dataclass(frozen=True)
class FittedRows(Stored):
    """A table whose rows are cut, or the last one repeated, to the number that the model has."""

    rows: int = 0
    """In the file."""

    def shapes(self, shape: torch.Size) -> tuple[torch.Size, ...]:
        return (torch.Size([self.rows, *shape[1:]]),)

    def read(self, read: Callable[[str], Tensor], shape: torch.Size) -> Tensor:
        value = read(self.names[0])
        more = value[-1:].expand(max(0, shape[0] - len(value)), *shape[1:])
        return torch.cat([value[: shape[0]], more])


@dataclass(frozen=True)
class StartReport:
    """What became of every tensor; `str()` is for the log, the names are here."""

    source: str
    loaded: tuple[str, ...]
    """As they were."""
    reshaped: tuple[str, ...]
    """Loaded in another shape."""
    new: tuple[str, ...]
    """In the model alone: keep their initial values."""
    left: tuple[str, ...]
    """In the file alone."""
    numbers: Mapping[str, int]
    """How many parameters each of the four lists stands for."""
    remarks: tuple[str, ...] = ()
    """What a person should know of how this start was made."""

    def names(self) -> dict[str, tuple[str, ...]]:
        """The four lists by what became of their tensors."""
        return {
            "loaded": self.loaded,
            "reshaped": self.reshaped,
            "new": self.new,
            "left": self.left,
        }

    def __str__(self) -> str:
        counts = [self._count(what, names) for what, names in self.names().items()]
        start = f"{self.source}: started from PixArt: {', '.join(counts)}"
        return "; ".join([start, *self.remarks])

    def _count(self, what: str, names: tuple[str, ...]) -> str:
        if not names:
            return f"{what} 0"
        # Which parts of a network they belong to; of the loaded ones that would be all.
        parts = Counter(n.partition(".")[0] for n in names if what != "loaded")
        listed = "".join(f", {part} {count}" for part, count in parts.items())
        return f"{what} {len(names)} tensors ({self.numbers[what]:,} numbers{listed})"


def can_start(module: nn.Module, path: str | Path) -> bool:
    """Whether the module is one that starts from PixArt, and the file is one of PixArt's.

    Raises:
        WeightsError: a missing or unreadable file.
    """
    if not takes_pixart(module):
        return False
    with TensorSource(Path(path)) as tensors:
        return is_pixart(tensors.shapes)


def is_pixart(shapes: Mapping[str, torch.Size]) -> bool:
    """Whether these tensors of a file are an image model of PixArt's, whatever its name."""
    prefix = wrapper_prefix(shapes)
    names = {n.removeprefix(prefix) for n in shapes}
    required = ("blocks.0.cross_attn.q_linear.weight", "t_block.1.weight", NULL_TEXT, PATCHES)
    # STDiT and STDiT2 have all that as well, and attention along time.
    return all(n in names for n in required) and not any(".attn_temp." in n for n in names)


def takes_pixart(module: nn.Module) -> bool:
    """Whether the module is one of those that can start from PixArt."""
    config = getattr(module, "config", None)
    return isinstance(config, (STDiTConfig, STDiT2Config, STDiT3Config, PixArtConfig))


def start_layout(ours: Mapping[str, torch.Size], given: Mapping[str, torch.Size]) -> Layout:
    """Where each tensor of the model lies in a file of PixArt's, if it is there.

    Args:
        ours: shapes of the model's tensors.
        given: shapes of the file's.
    """
    prefix = wrapper_prefix(given)
    stored: dict[str, Stored] = {}
    for name, shape in ours.items():
        theirs = prefix + re.sub(r"^spatial_blocks\.", "blocks.", name)
        stored[name] = Stored((theirs,))
        if name == PATCHES and shape[2] == 1:
            stored[name] = Stored((theirs,), without=2, either=True)
        if name == NULL_TEXT and theirs in given and given[theirs][0] != shape[0]:
            stored[name] = FittedRows((theirs,), rows=given[theirs][0])
    return Layout("PixArt", stored, tuple(re.escape(prefix) + n for n in TABLES))


def fresh(ours: Mapping[str, torch.Size]) -> list[str]:
    """Tensors that the model has and no image model of PixArt's has to have."""
    return [n for n in ours if not ALWAYS.fullmatch(re.sub(r"^spatial_blocks\.", "blocks.", n))]


def start_from_pixart(
    module: nn.Module,
    path: str | Path,
    *,
    allow_new: Sequence[str] = (),
    allow_unexpected: Sequence[str] = (),
    device: torch.device | str | None = None,
) -> StartReport:
    """Fill a video model (or a PixArt) from weights of a PixArt.

    Args:
        module: freshly initialised, on a real device; STDiT, STDiT2, STDiT3 or PixArt.
        path, allow_new, allow_unexpected, device: as for `load_weights`.

    Raises:
        WeightsError: a tensor that every PixArt has is missing, one that none has is there, or a
            shape does not fit (another size of model).
    """
    return _start(partial(fill, device=device), module, path, allow_new, allow_unexpected)


def preview_start(module: nn.Module, path: str | Path) -> StartReport:
    """What `start_from_pixart` would do, without reading a tensor.

    Args:
        module: may be on the meta device.

    Raises:
        WeightsError: as `start_from_pixart`.
    """
    return _start(check_fit, module, path, (), ())


def _start(
    act: Callable[..., LoadReport],
    module: nn.Module,
    path: str | Path,
    allow_new: Sequence[str],
    allow_unexpected: Sequence[str],
) -> StartReport:
    assert takes_pixart(module)
    ours = {n: t.shape for n, t in module.state_dict().items()}
    video = not isinstance(module.config, PixArtConfig)
    with TensorSource(Path(path)) as tensors:
        given = tensors.shapes
        layout = start_layout(ours, given)
        sometimes = [re.escape(wrapper_prefix(given)) + n for n in SOMETIMES] if video else []
        report = act(
            module,
            tensors,
            layout,
            # An image model either has what is in the file, or it is another one.
            allow_new=[*map(re.escape, fresh(ours) if video else ()), *allow_new],
            allow_unexpected=[*layout.computed, *sometimes, *allow_unexpected],
        )
    reshaped = reshaped_names(ours, given, layout, report.loaded)
    rest = tuple(n for n in report.loaded if n not in reshaped)
    return StartReport(
        report.source,
        rest,
        reshaped,
        report.new,
        report.unexpected,
        {
            "loaded": sum(ours[n].numel() for n in rest),
            "reshaped": sum(ours[n].numel() for n in reshaped),
            "new": report.new_parameters,
            "left": report.unexpected_parameters,
        },
        tuple(_remarks(ours, given, layout, video)),
    )


def reshaped_names(
    ours: Mapping[str, torch.Size],
    given: Mapping[str, torch.Size],
    layout: Layout,
    loaded: Sequence[str],
) -> tuple[str, ...]:
    """Those of the loaded tensors that have another shape in the file."""
    return tuple(n for n in loaded if given[layout.stored[n].names[0]] != ours[n])


def _remarks(
    ours: Mapping[str, torch.Size], given: Mapping[str, torch.Size], layout: Layout, video: bool
) -> list[str]:
    remarks = []
    rows, wanted = given[layout.stored[NULL_TEXT].names[0]][0], ours[NULL_TEXT][0]
    if rows != wanted:
        how = "its last is repeated" if rows < wanted else "the rest is cut"
        remarks.append(
            f"the stand-in for no caption has {rows} tokens there and {wanted} here: {how}"
        )
    if video and rows == ALPHA_TOKENS:
        remarks.append(
            f"{rows} text tokens: PixArt-alpha, whose blocks are all loaded (the original's STDiT3 "
            "takes blocks from files named PixArt-Sigma only, and starts without these)"
        )
    return remarks
