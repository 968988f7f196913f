"""Thresholds that others published, as named sets of rules, for each stage of training.

What a source measures by a model that no stage here has (DOVER, LPIPS, DINO) is not among the
rules but named in `without`. Scores of other models are other numbers: aesthetic scores are
comparable (all use LAION's predictor on CLIP L/14), OCR shares and motion only roughly.
"""

from __future__ import annotations

from dataclasses import dataclass

from kinema.config.errors import KinemaError
from kinema.data.expression import nearest
from kinema.data.filter import READY_RULES, Rule, parse_rules


@dataclass(frozen=True)
class Preset:
    """A named set of rules."""

    name: str
    title: str
    rules: tuple[str, ...]
    source: str
    """Where the thresholds are published."""
    without: str = ""
    """Thresholds of the source that need what no column has."""

    @property
    def columns(self) -> list[str]:
        """Columns that the rules look at."""
        return sorted({name for rule in self.parsed() for name in rule.columns})

    def parsed(self) -> list[Rule]:
        return parse_rules(self.rules)


_REPORT = "Open-Sora docs/report_03.md"
_GOKU = "Goku, arXiv:2502.04896, table 4"

PRESETS = {
    preset.name: preset
    for preset in (
        Preset(
            "opensora-1.2/stage1",
            "240p-360p on WebVid-10M: clips of 2 s to 16 s, no score looked at",
            ("not blank(text)", "2s <= duration <= 16s"),
            _REPORT,
        ),
        Preset(
            "opensora-1.2/stage2",
            "360p-480p on Panda-70M (30M subset; 20M stay)",
            ("not blank(text)", "aesthetic >= 4.5"),
            _REPORT,
        ),
        Preset(
            "opensora-1.2/stage3",
            "720p-1080p; scores go into captions instead of dropping clips",
            ("not blank(text)", "min(height, width) >= 720"),
            _REPORT,
        ),
        Preset(
            "opensora-1.2/pipeline",
            "what its data processing page runs, captions cleaned and empty ones removed",
            ("not blank(text)", "aesthetic >= 5"),
            "Open-Sora docs/data_processing.md",
        ),
        Preset(
            "opensora-1.2/fair",
            "what it calls fair aesthetics",
            ("aesthetic >= 5.5",),
            "Open-Sora tools/scoring/README.md",
        ),
        Preset(
            "opensora-1.2/high",
            "what it calls high aesthetics",
            ("aesthetic >= 6.5",),
            "Open-Sora tools/scoring/README.md",
        ),
        Preset(
            "open-sora-plan-1.3",
            "Panda-70M, of which about 27 % stay",
            ("not blank(text)", "aesthetic >= 4.75"),
            "Open-Sora-Plan docs/Report-v1.3.0.md",
            "LPIPS motion 0.001..0.3; DOVER technical >= 0; subtitles cropped (20 % of a side)",
        ),
        Preset(
            "nemo-curator",
            "defaults of its motion and aesthetic filters (the lowest score over frames there)",
            (
                "2s <= duration <= 10s",
                "motion_mv >= 0.00098 and motion_mv_patch >= 0.000001",
                "aesthetic >= 3.5",
            ),
            "NVIDIA NeMo Curator stages/video/filtering, docs curate-video/process-data/filtering",
        ),
        Preset(
            "goku/source",
            "before anything is scored",
            (
                "duration >= 4s",
                "min(height, width) >= 480",
                "source_bit_rate >= 500kbit",
                "fps >= 23.976",
            ),
            "Goku, arXiv:2502.04896, table 3",
        ),
        Preset(
            "goku/480p",
            "36M clips",
            (
                "min(height, width) >= 480 and max(height, width) >= 864",
                "aesthetic >= 4.3",
                "ocr_area <= 0.02",
            ),
            _GOKU,
            "DINO similarity >= 0.85; RAFT motion 0.3..20",
        ),
        Preset(
            "goku/720p",
            "24M clips",
            (
                "min(height, width) >= 720 and max(height, width) >= 1280",
                "aesthetic >= 4.5",
                "ocr_area <= 0.01",
            ),
            _GOKU,
            "DINO similarity >= 0.90; RAFT motion 0.5..15",
        ),
        Preset(
            "goku/1080p",
            "7M clips",
            (
                "min(height, width) >= 1080 and max(height, width) >= 1920",
                "aesthetic >= 4.5",
                "ocr_area <= 0.01",
            ),
            _GOKU,
            "DINO similarity >= 0.90; RAFT motion 0.5..8",
        ),
        Preset(
            "speed-run",
            "OpenVid-1M and MiraData on 192 GPUs: no file that holds a step up",
            ("not blank(text)", "file_size <= 50MB"),
            "the Lambda fork of Open-Sora, its data set page",
        ),
        Preset(
            "kinema/stage1",
            "low resolution, many clips",
            ("not blank(text)", "2s <= duration <= 16s", "static_share <= 0.5", "aesthetic >= 4.5"),
            "our own, after Open-Sora 1.2 and NeMo Curator",
        ),
        Preset(
            "kinema/stage2",
            "480p",
            (
                "not blank(text)",
                "2s <= duration <= 16s",
                "min(height, width) >= 480",
                "static_share <= 0.3",
                "aesthetic >= 5",
                "ocr_area <= 0.05",
            ),
            "our own, after Open-Sora 1.2 and Goku",
        ),
        Preset(
            "kinema/stage3",
            "720p and more, the best",
            (
                "not blank(text)",
                "2s <= duration <= 16s",
                "min(height, width) >= 720",
                "static_share <= 0.2",
                "aesthetic >= 5.5",
                "ocr_area <= 0.02",
            ),
            "our own, after Open-Sora 1.2 and Goku",
        ),
    )
}
"""Name -> preset."""


def preset(name: str) -> Preset:
    """One preset.

    Raises:
        KinemaError: there is none of that name; names the nearest one.
    """
    if name not in PRESETS:
        near = nearest(name, list(PRESETS)) or ", ".join(PRESETS)
        raise KinemaError(f"there is no preset {name!r}", hint=near)
    return PRESETS[name]


def render_presets(*, width: int = 100) -> str:
    """All presets with their rules, columns and sources, and the ready rules, as text."""
    lines = ["presets (--preset NAME)", ""]
    for found in PRESETS.values():
        lines.append(f"{found.name}: {found.title}")
        lines += [f"    {rule}" for rule in found.rules]
        lines.append(f"  needs {', '.join(found.columns)}")
        if found.without:
            lines.append(f"  not among the rules: {found.without}")
        lines += [f"  from {found.source}", ""]
    lines += ["ready rules", ""]
    broad = max(map(len, READY_RULES))
    lines += [f"    {rule:{broad}}  {meaning}" for rule, meaning in READY_RULES.items()]
    return "\n".join(line[:width].rstrip() for line in lines) + "\n"
