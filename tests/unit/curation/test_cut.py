"""Clips as they are written: exact, upright, cropped, at a constant rate; copies; strips."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from kinema.config.errors import KinemaError
from kinema.curation.config import CurateRecipe, CutConfig, FramesConfig, ScenesConfig
from kinema.curation.copy_packets import copy_warning, gop_of, long_gop_cost
from kinema.curation.cut import CutStage
from kinema.curation.frames import frame_places, read_strip
from kinema.curation.look.look import LookStage
from kinema.curation.look.segment import SegmentStage
from kinema.curation.stage import Bad, Places, Row, result_key, row_id
from kinema.media.frame_index import packet_index
from kinema.media.probe import probe
from kinema.media.read import read_frames
from tests.unit.curation.look.scene_footage import scene
from tests.unit.media.clips import write_clip

SHORT = ScenesConfig(min_s=0.2)


def _clips(out: Path | str, path: Path | str, cuts: list[list[float]] | None = None) -> list[Row]:
    """Rows of a source's clips, as the stages before give them."""
    places = Places.below(str(out))
    look = LookStage()
    row: Row = {"id": row_id(str(path)), "state": "1", "path": str(path),
                "todo": [part.name for part in look.parts]}  # fmt: skip
    if cuts is not None:
        row["_cuts"] = json.dumps([[*cut, ""] for cut in cuts])
    for found in look.open(places)([row])[0].values():
        assert not isinstance(found, Bad)
        row |= found
    found = SegmentStage.of(CurateRecipe(scenes=SHORT)).open(places)([row])[0]["segment"]
    assert not isinstance(found, Bad)
    of_source = {f"source_{n}": row[n] for n in ("codec", "variable_rate", "rotation", "fps")}
    return [
        {"source": str(path), "source_id": row["id"], "state": "1", "path": str(path)}
        | of_source
        | clip
        for clip in json.loads(found["_clips"])
    ]


def _cut(
    out: Path | str,
    row: Row,
    frames: FramesConfig | None = None,
    todo: tuple[str, ...] = (),
    **cut: Any,
) -> dict[str, Any]:
    stage = CutStage(CutConfig(**{"preset": "veryfast", **cut}), frames or FramesConfig())
    names = [part.name for part in stage.parts]
    result = stage.open(Places.below(str(out)))([row | {"todo": list(todo or names)}])[0]
    assert set(result) == set(todo or names)
    for part in stage.parts:
        if part.name in result and not isinstance(result[part.name], Bad):
            assert set(result[part.name]) == set(part.columns)  # type: ignore[arg-type]
    return dict(result)


def _file(out: Path, found: dict[str, Any]) -> Path:
    return out / found["cut"]["path"]


def _same_facts(columns: dict[str, Any], path: Path) -> None:
    info = probe(path)
    for name in ("num_frames", "height", "width", "file_size"):
        assert columns[name] == getattr(info, name)
    assert columns["fps"] == pytest.approx(info.fps, rel=1e-3)
    assert columns["duration"] == pytest.approx(info.duration_s, abs=0.01)
    assert columns["aspect_ratio"] == info.height / info.width
    assert columns["resolution"] == info.height * info.width
    assert columns["gop"] == gop_of(packet_index(path))


def _differ(one: np.ndarray[Any, Any], two: np.ndarray[Any, Any]) -> float:
    return float(np.abs(one.astype(int) - two).mean())


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_clips_begin_and_end_with_the_frames_they_should(tmp_path: Path, suffix: str) -> None:
    frames = np.concatenate([scene(1, 30, speed=2.0), scene(2, 33, speed=2.0)])
    path = write_clip(tmp_path / f"a film.{suffix}", frames, crf="12", bf="2", g="50")
    source = read_frames(path)
    one, two = _clips(tmp_path, path)
    assert (one["end_frame"], two["start_frame"]) == (30, 30)
    for row in (one, two):
        found = _cut(tmp_path, row, crf=12)
        file = _file(tmp_path, found)
        assert file.parent == tmp_path / "clips" / row["id"][:2]
        assert re.fullmatch(r"a_film_[0-9a-f]{16}\.mp4", file.name)
        written = read_frames(file)
        wanted = source[row["start_frame"] : row["end_frame"]]
        assert len(written) == len(wanted)
        for place in (0, 1, -1):  # each nearer to its own than to the one beside it
            assert _differ(written[place], wanted[place]) < 3
            assert _differ(written[place], wanted[place]) < _differ(
                written[place], wanted[place + (1 if place >= 0 else -1)]
            )
        _same_facts(found["cut"], file)
        assert (found["cut"]["cut_by"], found["cut"]["lost_s"]) == ("encode", 0.0)


def test_written_clips_play_anywhere_and_are_always_the_same(tmp_path: Path) -> None:
    (row,) = _clips(tmp_path, write_clip(tmp_path / "a.mp4", scene(1, 50), crf="20"))
    file = _file(tmp_path, _cut(tmp_path, row, whole="encode", gop=12))
    content = file.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert not container.streams.audio
    assert gop_of(packet_index(file)) == 12
    assert _file(tmp_path, _cut(tmp_path, row, whole="encode", gop=12)).read_bytes() == content
    smaller = _file(tmp_path, _cut(tmp_path, row, whole="encode", gop=12, crf=40))
    assert smaller.stat().st_size < len(content)
    assert file.read_bytes() == content  # what is known of it stays true
    assert len(list(file.parent.iterdir())) == 2


def test_colours_stay(tmp_path: Path) -> None:
    colours = np.array(
        [[200, 30, 30], [30, 200, 30], [30, 30, 200], [200, 200, 40], [128, 128, 128],
         [240, 240, 240], [20, 20, 20], [200, 60, 180]],
        np.uint8,
    )  # fmt: skip
    frames = np.broadcast_to(np.repeat(colours, 20, axis=0), (20, 96, 160, 3))
    path = write_clip(tmp_path / "a.mkv", frames, codec="ffv1", pix_fmt="bgr0")
    (row,) = _clips(tmp_path, path)
    found = _cut(tmp_path, row, whole="encode", crf=6)
    with av.open(str(_file(tmp_path, found))) as container:
        context = container.streams.video[0].codec_context
        assert (context.colorspace, context.color_range) == (1, 1)  # BT.709, limited
    written = read_frames(_file(tmp_path, found))
    assert np.abs(written[5, 48, 10::20].astype(int) - colours).max() <= 3
    strip = read_strip(tmp_path / found["frames"]["frames"], 3)
    assert np.abs(strip[1][48, 10::20].astype(int) - colours).max() <= 4


@pytest.mark.parametrize("matrix", [1, 2, 6])
def test_yuv_keeps_its_values_and_what_they_mean(tmp_path: Path, matrix: int) -> None:
    path = tmp_path / "a.mkv"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=25)
        stream.height, stream.width, stream.pix_fmt = 64, 96, "yuv420p"
        stream.codec_context.colorspace = matrix
        for picture in scene(1, 20, 64, 96):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format="yuv420p")
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    (row,) = _clips(tmp_path, path)
    file = _file(tmp_path, _cut(tmp_path, row, whole="encode", crf=1))
    with av.open(str(path)) as before, av.open(str(file)) as after:
        for one, two in zip(before.decode(video=0), after.decode(video=0), strict=True):
            assert int(two.colorspace) == int(one.colorspace) == matrix
            assert np.abs(one.to_ndarray().astype(int) - two.to_ndarray()).max() <= 3


@pytest.mark.parametrize("rotation", [90, 180, 270])
def test_rotated_sources_are_written_upright(tmp_path: Path, rotation: int) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(3, 20, 96, 160), rotation=rotation, crf="14")
    (row,) = _clips(tmp_path, path)
    found = _cut(tmp_path, row, whole="encode", crf=12)
    file = _file(tmp_path, found)
    assert probe(file).rotation == 0
    assert (found["cut"]["height"], found["cut"]["width"]) == (
        (160, 96) if rotation != 180 else (96, 160)
    )
    assert _differ(read_frames(file), read_frames(path)) < 3


def test_odd_sizes_lose_a_row_and_a_column(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", scene(3, 20, 91, 161), codec="ffv1", pix_fmt="bgr0")
    (row,) = _clips(tmp_path, path)
    found = _cut(tmp_path, row, whole="encode", crf=10)
    file = _file(tmp_path, found)
    assert (found["cut"]["height"], found["cut"]["width"]) == (90, 160)
    _same_facts(found["cut"], file)
    assert _differ(read_frames(file), read_frames(path)[:, :90, :160]) < 4


@pytest.mark.parametrize("rotation", [0, 90])
def test_black_borders_are_cropped(tmp_path: Path, rotation: int) -> None:
    frames = scene(4, 30, 160, 240, speed=2.0)
    frames[:, :21] = 0
    frames[:, -18:] = 0
    (row,) = _clips(tmp_path, write_clip(tmp_path / "a.mp4", frames, crf="14", rotation=rotation))
    found = _cut(tmp_path, row, crf=12)
    file = _file(tmp_path, found)
    _same_facts(found["cut"], file)
    height, width = found["cut"]["height"], found["cut"]["width"]
    assert (height, width) == ((120, 240) if rotation == 0 else (240, 120))
    assert [found["cut"][f"border_{side}"] for side in ("top", "bottom", "left", "right")] == [
        0
    ] * 4
    assert found["cut"]["border_share"] == 0.0
    picture = read_frames(file, [0])[0]
    assert _differ(picture if rotation == 0 else np.rot90(picture, -1), frames[0, 22:142]) < 4
    kept = _cut(tmp_path, row, letterbox="keep", whole="encode")["cut"]
    assert (kept["height"], kept["width"]) == (row["height"], row["width"])
    assert kept["border_top"] == row["border_top"]


def test_large_clips_are_scaled_down(tmp_path: Path) -> None:
    (row,) = _clips(tmp_path, write_clip(tmp_path / "a.mp4", scene(4, 20, 180, 320), crf="14"))
    found = _cut(tmp_path, row, max_side=90)
    assert (found["cut"]["height"], found["cut"]["width"]) == (90, 160)
    _same_facts(found["cut"], _file(tmp_path, found))
    assert _cut(tmp_path, row, max_side=180, whole="keep")["cut"]["cut_by"] == "kept"
    assert _cut(tmp_path, row, max_side=90, whole="keep")["cut"]["cut_by"] == "encode"


def test_a_variable_rate_becomes_constant_and_nothing_changes_its_speed(tmp_path: Path) -> None:
    times = [512 * t for t in [*range(20), *range(30, 40), 45, *range(46, 60)]]
    frames = scene(5, len(times), speed=3.0)
    path = write_clip(tmp_path / "a.mp4", frames, times=times, crf="14")
    (row,) = _clips(tmp_path, path)
    assert row["source_variable_rate"]
    found = _cut(tmp_path, row, whole="encode", crf=12)
    file = _file(tmp_path, found)
    _same_facts(found["cut"], file)
    assert not probe(file).variable_rate
    assert found["cut"]["fps"] == pytest.approx(25.0)
    written, source = read_frames(file), read_frames(path)
    assert len(written) == 60
    for moment in range(60):
        shown = sum(time <= 512 * moment for time in times) - 1
        assert _differ(written[moment], source[shown]) < 3


def test_a_whole_file_is_used_where_it_is(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(1, 30), crf="20")
    (row,) = _clips(tmp_path, path)
    before = path.read_bytes()
    found = _cut(tmp_path, row, whole="keep")
    assert found["cut"]["path"] == str(path)
    assert found["cut"]["cut_by"] == "kept"
    _same_facts(found["cut"], path)
    assert path.read_bytes() == before
    assert not (tmp_path / "clips").exists()
    assert (tmp_path / found["frames"]["frames"]).exists()


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_copies_begin_at_a_key_frame_and_decode_whole(tmp_path: Path, suffix: str) -> None:
    path = write_clip(
        tmp_path / f"a.{suffix}", scene(6, 60, speed=3.0), crf="20", g="12", bf="3",
        **{"x264-params": "scenecut=0:open-gop=0"},
    )  # fmt: skip
    source = read_frames(path)
    (row,) = _clips(tmp_path, path, cuts=[[0.2, 1.5]])  # frames 5 to 37 or 38
    found = _cut(tmp_path, row, mode="copy")["cut"]
    file = tmp_path / found["path"]
    assert found["start_frame"] == 12
    assert row["end_frame"] - 4 <= found["end_frame"] <= row["end_frame"]
    assert np.array_equal(read_frames(file), source[12 : found["end_frame"]])
    _same_facts(found, file)
    assert found["gop"] == 12
    assert found["start_s"] == pytest.approx(12 / 25)
    lost = (row["num_frames"] - found["num_frames"]) / 25
    assert found["lost_s"] == pytest.approx(lost)
    assert found["lost_s"] >= 7 / 25


def test_a_copy_keeps_the_rotation(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(3, 20, 96, 160), rotation=90, crf="14")
    (row,) = _clips(tmp_path, path, cuts=[[0.0, 0.6]])
    file = tmp_path / _cut(tmp_path, row, mode="copy")["cut"]["path"]
    assert np.array_equal(read_frames(file), read_frames(path)[: len(read_frames(file))])
    assert probe(file).height == 160


def test_no_key_frame_no_copy(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(6, 60), crf="20")
    (row,) = _clips(tmp_path, path, cuts=[[1.0, 2.0]])
    bad = _cut(tmp_path, row, mode="copy")["cut"]
    assert isinstance(bad, Bad)
    assert bad.reason == "no_key_frame"
    assert "1.00 s and 2.00 s" in bad.message


def test_what_long_gops_cost_is_told() -> None:
    assert long_gop_cost(1, window=24) == 1.0
    assert long_gop_cost(250, window=24) == pytest.approx((124.5 + 24) / 24)
    told = copy_warning([30, 250, 250])
    assert "250 frames apart" in told
    assert "6.2 frames for each one" in told


def test_strips_hold_the_middles_of_equal_parts(tmp_path: Path) -> None:
    frames = np.concatenate([scene(7, 30, 180, 320, speed=3.0), scene(8, 30, 180, 320)])
    path = write_clip(tmp_path / "a.mp4", frames, crf="12")
    source = read_frames(path)
    _, row = _clips(tmp_path, path)
    assert frame_places(30, 60, 3) == [35, 45, 55]
    found = _cut(tmp_path, row, FramesConfig(count=3, max_side=160, quality=95))
    columns = found["frames"]
    assert columns["frames"].startswith(f"frames/{row['id'][:2]}/{row['id']}-")
    assert columns["frames_count"] == 3
    strip = read_strip(tmp_path / columns["frames"], 3)
    assert [picture.shape for picture in strip] == [(90, 160, 3)] * 3
    for picture, place in zip(strip, (35, 45, 55), strict=True):
        small = source[place].reshape(90, 2, 160, 2, 3).mean((1, 3))
        assert _differ(picture, small) < 4
    content = (tmp_path / columns["frames"]).read_bytes()
    alone = _cut(tmp_path, row, FramesConfig(count=3, max_side=160, quality=95), ("frames",))
    assert alone["frames"] == columns
    assert (tmp_path / columns["frames"]).read_bytes() == content


def test_strips_of_clips_with_few_frames_and_bad_strips(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(7, 8), crf="20")
    (row,) = _clips(tmp_path, path, cuts=[[0.0, 0.08]])
    columns = _cut(tmp_path, row, FramesConfig(count=5))["frames"]
    assert len(read_strip(tmp_path / columns["frames"], 5)) == 5
    with pytest.raises(KinemaError, match="are not 7 pictures"):
        read_strip(tmp_path / columns["frames"], 7)
    with pytest.raises(KinemaError, match="cannot be read"):
        read_strip(tmp_path / "none.jpg", 3)


def test_settings_that_change_a_clip_change_its_key() -> None:
    def keys(**cut: Any) -> tuple[str, ...]:
        return tuple(part.key for part in CutStage(CutConfig(**cut), FramesConfig()).parts)

    assert keys()[0] != keys(crf=20)[0]
    assert keys()[1] == keys(crf=20)[1]  # strips do not depend on how it is compressed
    assert keys()[1] != keys(letterbox="keep")[1]
    assert keys()[1] != keys(max_side=480)[1]  # which `frames` has too
    assert keys()[1] != keys(mode="copy")[1]


def test_a_file_that_is_kept_where_it_is_may_be_moved() -> None:
    row = {"id": "a", "state": "1", "source": "/one/a.mp4"}
    moved = row | {"source": "/two/a.mp4"}
    kept, _ = CutStage(CutConfig(whole="keep")).parts
    written, strip = CutStage(CutConfig(whole="encode")).parts
    assert result_key(row, kept) != result_key(moved, kept)
    assert result_key(row, written) == result_key(moved, written)
    assert result_key(row, strip) == result_key(moved, strip)


def test_a_lost_source_is_told(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", scene(7, 30), crf="20")
    (row,) = _clips(tmp_path, path, cuts=[[0.0, 0.8]])
    path.unlink()
    for mode in ("encode", "copy"):
        for found in _cut(tmp_path, row, mode=mode).values():
            assert isinstance(found, Bad)
            assert found.reason == "missing"


def test_time_limits_grow_with_length_and_size() -> None:
    stage = CutStage(time_limit=60.0)
    assert stage.time_limit_s({"duration": 10.0, "resolution": 1280 * 720}) == 90.0
    assert stage.time_limit_s({"duration": 10.0, "resolution": 3840 * 2160}) == 60 + 270


@pytest.mark.parametrize("mode", ["encode", "copy"])
def test_sources_and_clips_in_a_store(tmp_path: Path, mode: str) -> None:
    fsspec = pytest.importorskip("fsspec")
    local = write_clip(tmp_path / "a.mkv", scene(9, 60, speed=3.0), crf="20", g="10")
    store = f"memory://{tmp_path.name}-{mode}"
    with fsspec.open(f"{store}/in/a.mkv", "wb") as file:
        file.write(local.read_bytes())
    (row,) = _clips(f"{store}/out", f"{store}/in/a.mkv", cuts=[[0.0, 1.6]])
    found = _cut(f"{store}/out", row, mode=mode)
    written = read_frames(f"{store}/out/{found['cut']['path']}")
    assert len(written) == found["cut"]["num_frames"] > 30
    assert _differ(written[0], read_frames(local, [0])[0]) < 3
    assert len(read_strip(f"{store}/out/{found['frames']['frames']}", 3)) == 3


def test_a_file_that_changes_its_size(tmp_path: Path) -> None:
    small = write_clip(tmp_path / "a.ts", scene(1, 25, 96, 160), bf="0")
    times = [512 * t for t in range(25, 50)]
    later = write_clip(tmp_path / "b.ts", scene(1, 25, 192, 320), times=times, bf="0")
    path = tmp_path / "both.ts"
    path.write_bytes(small.read_bytes() + later.read_bytes())
    row = _clips(tmp_path, path)[-1]
    assert row["start_frame"] == 25
    found = _cut(tmp_path, row)
    written = read_frames(_file(tmp_path, found))
    assert written.shape == (25, 96, 160, 3)
    large = read_frames(path, [25])[0]
    assert large.shape == (192, 320, 3)
    assert _differ(written[0], large.reshape(96, 2, 160, 2, 3).mean((1, 3))) < 4
