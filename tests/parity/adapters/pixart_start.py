"""PixArt weights into video models: every row of the original's tables, and its reshaping."""

from __future__ import annotations

import re
from collections import Counter
from typing import Any

import torch

from kinema.checkpoint.pixart_start import fresh, reshaped_names, start_layout
from kinema.config.settings import from_dict
from kinema.models.build import build_transformer
from kinema.models.config import PixArtConfig, STDiT2Config, STDiT3Config, STDiTConfig
from kinema.models.transformer import Transformer
from tests.parity.adapters.pixart import NAMED_SIZES as PIXART_SIZES
from tests.parity.case import Case, adapter
from tests.parity.exceptions import DEFECTS_NOT_COPIED

CONFIGS: dict[str, type] = {
    "STDiT": STDiTConfig,
    "STDiT2": STDiT2Config,
    "STDiT3": STDiT3Config,
    "PixArt": PixArtConfig,
}
Shapes = dict[str, list[int]]


def small(case: Case) -> Transformer:
    """The model of a case; the tensors of the file tell what its settings leave open."""
    given = case.group("in.ckpt")
    blocks = [int(found[1]) for n in given if (found := re.search(r"blocks\.(\d+)\.", n))]
    settings = {
        "hidden_size": case.config["hidden"],
        "num_heads": 1,
        "depth": max(blocks, default=0) + 1,
        "model_max_length": case.config["model_max_length"],
    }
    if "y_embedder.y_embedding" in given:
        settings["caption_channels"] = given["y_embedder.y_embedding"].shape[1]
    with torch.device("meta"):
        return build_transformer(from_dict(CONFIGS[case.config["model"]], settings))


@adapter(r"ckpt_utils\.reparameter$", kind="safetensors")
def reparameter(case: Case) -> None:
    given = case.group("in.ckpt")
    ours = {n: t.shape for n, t in small(case).state_dict().items()}
    layout = start_layout(ours, {n: t.shape for n, t in given.items()})
    produced = {
        name: stored.read(given.__getitem__, ours[name])
        for name, stored in layout.stored.items()
        if stored.names[0] in given
    }
    for name in case.group("out.ckpt"):
        defect = DEFECTS_NOT_COPIED.allows(case.official, f"out.ckpt.{name}")
        if defect and case.config["model"] == "STDiT3":
            continue
        # What the model has no place for, the original hands on, to be ignored.
        case.check(f"out.ckpt.{name}", produced.pop(name) if name in ours else given[name])
    # What is left of ours is what the original should have given as well.
    known = {n.replace("spatial_blocks.", "blocks.") for n in produced}
    assert known <= {n for n in case.group("out.ckpt")}


@adapter(r"ckpt_utils\.reparameter \+ load_state_dict", kind="json")
def table(case: Case) -> None:
    content = dict(case.table())
    summaries = content.pop("summaries of other pairs", {})
    given: Shapes = {}
    for pair, found in content.items():
        rows = [dict(zip(found["columns"], row, strict=True)) for row in found["rows"]]
        given = {row["checkpoint key"]: row["checkpoint shape"] for row in rows}
        outcome = Outcome(pair, rows, given)
        assert outcome.rows == {row["checkpoint key"]: tuple(row.values())[1:] for row in rows}
        assert sorted(outcome.missing) == sorted(found["missing_model_keys"])
    for pair, found in summaries.items():
        columns = ("checkpoint key", "model key", "checkpoint shape", "after", "result")
        rows = [dict(zip(columns, row, strict=True)) for row in found["rows_not_plain"]]
        # Only what differs from the full table is said.
        outcome = Outcome(
            pair, rows, given | {row["checkpoint key"]: row["checkpoint shape"] for row in rows}
        )
        for row in rows:
            name, *want = row.values()
            assert list(outcome.rows[name]) == want, name
        if DEFECTS_NOT_COPIED.allows(case.official, pair):
            ignored = found["counts"].pop("unexpected: ignored by strict=False")
            found["counts"]["loaded"] += ignored
            found["missing"] -= ignored
            found["missing_examples"] = [
                n for n in found["missing_examples"] if n in fresh(outcome.ours)
            ]
        assert outcome.counts == found["counts"], pair
        assert len(outcome.missing) == found["missing"], pair
        assert set(found["missing_examples"]) <= set(outcome.missing), pair


class Outcome:
    """What our code makes of a file, in the words of the original's table."""

    def __init__(self, pair: str, rows: list[dict[str, Any]], given: Shapes) -> None:
        """
        Args:
            pair: `NAME.pth -> MODEL-SIZE/PATCH`.
            rows: of the table; they say how long the model's table for no caption is.
            given: shapes of the file's tensors.
        """
        found = re.search(r"-> (\w+)-(\w+)/(\w+)$", pair)
        assert found is not None
        settings: dict[str, Any] = PIXART_SIZES[f"{found[2]}_{found[3]}"]
        for row in rows:
            if row["model key"] == "y_embedder.y_embedding":
                settings = settings | {"model_max_length": list(row.values())[3][0]}
        with torch.device("meta"):
            model = build_transformer(from_dict(CONFIGS[found[1]], settings))
        self.ours = {n: t.shape for n, t in model.state_dict().items()}
        shapes = {n: torch.Size(s) for n, s in given.items()}
        layout = start_layout(self.ours, shapes)
        loaded = {s.names[0]: n for n, s in layout.stored.items() if s.names[0] in shapes}
        reshaped = reshaped_names(self.ours, shapes, layout, list(loaded.values()))
        dropped = [n for n in given if any(re.fullmatch(p, n) for p in layout.computed)]
        self.rows = {}
        for name, shape in given.items():
            if name in loaded:
                mine = loaded[name]
                assert shapes[name] in layout.stored[mine].shapes(self.ours[mine]), name
                how = "loaded, reshaped" if mine in reshaped else "loaded"
                self.rows[name] = (mine, list(shape), list(self.ours[mine]), how)
            elif name in dropped:
                self.rows[name] = (None, list(shape), None, "dropped (recomputed)")
        self.counts = dict(Counter(how for *_, how in self.rows.values()))
        self.missing = [n for n in self.ours if n not in loaded.values()]
        assert set(self.missing) <= set(fresh(self.ours))  # none that we would refuse to lack
        self.missing += model.recomputed_tensors()
