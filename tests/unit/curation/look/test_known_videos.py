"""Real footage whose cuts were looked up by eye: found within 0.2 s at the default settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from kinema.curation.config import ScenesConfig
from kinema.curation.look.cuts import cuts_of
from tests.unit.curation.look.scene_footage import seen

GOLDEN = Path(__file__).parents[3] / "golden" / "videos"
SAMPLES = Path(__file__).parents[5] / "shared" / "videos"
WITHIN_S = 0.2

# What separates scenes: (from, to) in seconds; the same twice for a hard cut. Dark parts count
# from where less than a twentieth of the light is left.
TRUTH: dict[str, list[tuple[float, float]]] = {
    "golden/autumn_fades.mp4": [
        (0.0, 1.0), (6.0, 7.2), (11.85, 13.25), (17.6, 18.75), (23.0, 24.02),
    ],
    "golden/bbb_wakes.mp4": [(4.4, 4.4)],
    "golden/sintel_cuts.mp4": [
        (0.0, 0.55), (3.25, 4.3), (5.79, 5.79), (7.88, 7.88), (9.42, 9.42), (10.0, 10.38),
        (14.05, 14.25),
    ],
    "golden/phone.mp4": [],
    "autumn_fades.mp4": [(0.0, 1.0), (6.0, 7.2), (11.85, 13.25), (17.6, 18.75), (23.0, 24.02)],
    "bbb_opening.webm": [(0.0, 0.58), (11.79, 11.79), (15.67, 15.67), (22.96, 22.96)],
    "bbb_wakes_vertical.mp4": [(8.4, 8.4)],
    # Not found, and not asked for: the cut at 16.83 s (in the middle of one second of fighting),
    # and two pictures that turn into others while they move (fog at 5.2 s, clouds at 35.4 s).
    "sintel_trailer.mp4": [
        (0.0, 1.2), (9.17, 12.4), (13.92, 13.92), (14.85, 16.5), (17.5, 18.5), (21.25, 22.3),
        (23.79, 23.79), (25.88, 25.88), (27.42, 27.42), (28.0, 28.38), (32.05, 32.25),
        (41.96, 52.21),
    ],
}  # fmt: skip
ONE_SHOT = (
    "bbb_jump_rope.webm", "bear_in_cage.webm", "bottles_on_table.mp4", "cars_from_above.mp4",
    "chaplin_policeman.mp4", "classroom.mp4", "cyclist_selfie.mp4", "flower_timelapse.mp4",
    "highway_dashcam.mp4", "lander_game.mp4", "people_at_table_vfr.mp4",
    "phone_upside_down.mp4", "puppy_on_grass.mp4", "sign_again.mkv", "sign_night.mkv",
    "sign_walk.mkv", "space_shuttle.webm", "tractor_field.webm", "warehouse_worker.avi",
    "woman_standing_vertical.mp4",
)  # fmt: skip
TRUTH |= {name: [] for name in ONE_SHOT}


@pytest.mark.parametrize("name", TRUTH)
def test_cuts_stand_where_they_were_seen(name: str) -> None:
    path = GOLDEN / name.removeprefix("golden/") if name.startswith("golden/") else SAMPLES / name
    if not path.exists() and not name.startswith("golden/"):
        pytest.skip("the sample videos are not here")
    found = seen(path)
    signals = found.signals["scenes"] | {"damaged": found.damaged}
    times = [*signals["times"].tolist(), found.info.duration]
    gaps = [
        (times[gap.start], times[gap.end])
        for gap in cuts_of(signals, ScenesConfig(), found.info.fps)
    ]
    assert len(gaps) == len(TRUTH[name]), gaps
    for got, wanted in zip(gaps, TRUTH[name], strict=True):
        assert got == pytest.approx(wanted, abs=WITHIN_S)
