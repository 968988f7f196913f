"""Sources of all kinds through `look`, `segment` and `cut`: what is written is what is stated, and
readers of training see it the right way round and in the right shape."""

from __future__ import annotations

import json
import os
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from kinema.curation.clips import clip_table
from kinema.curation.config import CurateRecipe, CutConfig, FramesConfig
from kinema.curation.copy_packets import copy_packets
from kinema.curation.cut import CutStage, with_planned_sizes
from kinema.curation.encode import resampled_timing
from kinema.curation.frames import read_strip
from kinema.curation.look.look import LookStage
from kinema.curation.look.probe import pixel_aspect
from kinema.curation.look.segment import SegmentStage
from kinema.curation.picture import Crop, Shape
from kinema.curation.stage import Bad, Places, Row, row_id
from kinema.media.frame_index import FrameIndex, packet_index
from kinema.media.probe import probe
from kinema.media.read import read_frames
from tests.unit.media.clips import pictures, write_clip


def curated(
    out: Path, path: Path, cuts: list[Any] | None = None, **cut: Any
) -> list[dict[str, Any]]:
    """The clips of a source, as rows with what `cut` found; with `scenes` off, or by `cuts`."""
    import pyarrow as pa

    places = Places.below(str(out))
    recipe = CurateRecipe(scenes=None)
    look = LookStage(scenes=None)
    row: Row = {"id": row_id(path.name), "state": "1", "path": str(path), "name": path.name}
    row["_cuts"] = None if cuts is None else json.dumps(cuts)
    for found in look.open(places)([row | {"todo": [p.name for p in look.parts]}])[0].values():
        assert not isinstance(found, Bad), found
        row |= found
    found = SegmentStage.of(recipe).open(places)([row])[0]["segment"]
    assert not isinstance(found, Bad), found
    clips = clip_table(pa.Table.from_pylist([row | found]))
    config = CutConfig(**{"preset": "ultrafast", "letterbox": "keep", **cut})
    work = CutStage(config, FramesConfig()).open(places)
    planned = with_planned_sizes(config, clips).to_pylist()
    rows = []
    for clip, plan in zip(clips.to_pylist(), planned, strict=True):
        result = work([clip | {"todo": ["cut", "frames"]}])[0]
        for found in result.values():
            assert not isinstance(found, Bad), found
            clip |= found
        for name in ("height", "width", "aspect_ratio", "resolution"):
            assert clip[name] == plan[name]
        rows.append(clip)
    return rows


def check(out: Path, clip: dict[str, Any]) -> np.ndarray[Any, Any]:
    """The clip's pictures, when it is what its row says."""
    path = out / clip["path"]
    info = probe(path)
    for name in ("num_frames", "height", "width", "file_size"):
        assert clip[name] == getattr(info, name), name
    assert clip["fps"] == pytest.approx(info.fps, rel=2e-3)
    assert clip["duration"] == pytest.approx(info.duration_s, abs=2e-3)
    strip = read_strip(out / clip["frames"], clip["frames_count"])
    written = read_frames(path)
    assert strip[0].shape == written.shape[1:]
    middle = written[len(written) // 2]
    assert np.abs(strip[1].astype(int) - middle).mean() < 12
    return written


KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "tiny": ("a.mp4", {"size": (16, 16)}),
    "two": ("a.mp4", {"size": (2, 2)}),
    "odd": ("a.mkv", {"size": (33, 35), "codec": "ffv1", "pix_fmt": "yuv444p"}),
    "one frame": ("a.mp4", {"count": 1}),
    "240 a second": ("a.mp4", {"step": 53, "count": 30}),
    "10 bit hevc": ("a.mp4", {"codec": "libx265", "pix_fmt": "yuv420p10le", "x265-params":
                              "log-level=none:pools=none"}),
    "av1": ("a.webm", {"codec": "libsvtav1", "preset": "12", "size": (64, 64)}),
    "vp9 with alpha": ("a.webm", {"codec": "libvpx-vp9", "pix_fmt": "yuva420p", "cpu-used": "8"}),
    "mpeg-ts": ("a.ts", {"bf": "2"}),
    "444": ("a.mp4", {"pix_fmt": "yuv444p"}),
    "422 10 bit": ("a.mov", {"codec": "prores_ks", "pix_fmt": "yuv422p10le"}),
    "gray": ("a.mkv", {"codec": "ffv1", "pix_fmt": "gray"}),
    "gray 16 bit": ("a.mkv", {"codec": "ffv1", "pix_fmt": "gray16le"}),
    "rgb with alpha": ("a.mov", {"codec": "qtrle", "pix_fmt": "argb"}),
    "interlaced": ("a.mp4", {"flags": "+ilme+ildct", "x264-params": "tff=1"}),
    "late": ("a.mkv", {"first": 90_000}),
    "motion jpeg": ("a.avi", {"codec": "mjpeg", "pix_fmt": "yuvj422p"}),
    "gif": ("a.gif", {"codec": "gif", "pix_fmt": "rgb8", "step": 1280}),
    "a name: 'ü' = \"100%\" #1": ("ü = \"1 'é' 100%\" #1 日本.mp4", {}),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_clips_are_what_their_rows_say(tmp_path: Path, kind: str) -> None:
    name, options = KINDS[kind]
    count, step, first = (
        options.pop(n, d) for n, d in (("count", 12), ("step", 512), ("first", 0))
    )
    frames = pictures(count, *options.pop("size", (64, 96)))
    if options.get("codec") not in (None, *av.codecs_available):
        pytest.skip(f"no {options['codec']} here")
    times = [first + step * i for i in range(count)]
    path = write_clip(tmp_path / name, frames, times=times, **options)
    (clip,) = curated(tmp_path, path)
    written = check(tmp_path, clip)
    even = frames[:, : clip["height"], : clip["width"]]
    assert written.shape == even.shape
    if kind not in ("gray", "gray 16 bit", "gif", "two"):
        assert np.abs(written.astype(int) - even).mean() < 25
    assert clip["source_pixel_aspect"] == 1.0


def anamorphic(path: Path, aspect: Fraction, rotation: int = 0) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=25, options={"crf": "12"})
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        stream.codec_context.sample_aspect_ratio = aspect
        for number, picture in enumerate(pictures(12, 64, 64)):
            frame = av.VideoFrame.from_ndarray(picture, "rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize(
    ("aspect", "size"), [(Fraction(16, 11), (64, 94)), (Fraction(8, 9), (72, 64))]
)
def test_clips_have_square_pixels(tmp_path: Path, aspect: Fraction, size: tuple[int, int]) -> None:
    path = anamorphic(tmp_path / "a.mp4", aspect)
    (clip,) = curated(tmp_path, path, whole="keep")
    assert clip["cut_by"] == "encode"
    written = check(tmp_path, clip)
    assert written.shape[1:3] == size
    with av.open(str(tmp_path / clip["path"])) as container:
        assert container.streams.video[0].sample_aspect_ratio in (None, 0, 1)
    wide = Shape.of(64, 64, Crop(8, 8, 0, 0), 24, float(aspect))
    assert (wide.height, wide.width) == {94: (24, 46), 64: (24, 28)}[size[1]]
    # A copy keeps what it has, and its row says what a reader of training sees.
    (copy,) = curated(tmp_path, path, mode="copy")
    check(tmp_path, copy)
    assert (copy["height"], copy["width"]) == (64, 64)


def test_which_pixels_are_square() -> None:
    assert pixel_aspect(0.0, 0) == 1.0
    assert pixel_aspect(1.009, 0) == 1.0
    assert pixel_aspect(40.0, 0) == 1.0
    assert pixel_aspect(4 / 3, 180) == pytest.approx(4 / 3)
    assert pixel_aspect(4 / 3, 90) == pytest.approx(3 / 4)


def test_a_picture_that_is_shown_for_no_time(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mkv", pictures(1), codec="ffv1", pix_fmt="yuv420p")
    index = packet_index(path)
    clips = curated(tmp_path, path)
    for clip in clips:
        check(tmp_path, clip)
    assert index.duration_s > 0 or clips[0]["fps"] == 25.0


def test_a_variable_rate_is_bounded() -> None:
    """Pairs of frames a millisecond apart, one pair a second."""
    times = np.cumsum([0, *([1, 999] * 20)])
    index = FrameIndex(times, 20_001, Fraction(1, 1000), np.array([0]), timed=True)
    timing = resampled_timing(index, 0, len(times))
    assert timing.rate <= 240
    assert len(timing.places) <= 240 * 21
    assert set(timing.places) <= set(range(len(times)))
    still = FrameIndex(np.array([5]), 5, Fraction(1, 1000), np.array([0]), timed=True)
    assert resampled_timing(still, 0, 1).rate == 25


def test_a_copys_strip_shows_the_copy_only(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "a.mp4", pictures(75), bf="0", g="40", keyint_min="40", sc_threshold="0"
    )
    (clip,) = curated(tmp_path, path, [[0.4, 2.4, ""]], mode="copy")
    assert (clip["start_frame"], clip["num_frames"]) == (40, 20)
    check(tmp_path, clip)


def test_a_full_disk_is_no_damage_of_the_source(tmp_path: Path) -> None:
    path = write_clip(
        tmp_path / "a.mkv", np.random.default_rng(0).integers(0, 255, (12, 64, 64, 3), np.uint8),
        codec="ffv1",
    )  # fmt: skip
    if not os.path.exists("/dev/full"):
        pytest.skip("no /dev/full here")
    full = tmp_path / "full.mkv"
    full.symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left") as caught:
        copy_packets(path, full, packet_index(path), 0, 12)
    assert caught.value.filename == str(full)


def test_another_runs_columns_are_not_this_ones(tmp_path: Path) -> None:
    """A manifest that curation wrote is a table of sources like any other."""
    import pyarrow as pa

    source: Row = {
        "id": "1" * 32, "state": "1", "path": "/b/clip.mp4", "name": "clip.mp4", "text": "A cat.",
        "source": "/raw/film.mp4", "source_name": "film.mp4", "source_codec": "vp9",
        "frames": "frames/ab/x.jpg", "frames_count": 3, "whole": False, "start_s": 12.5, "gop": 30,
        "border_top": 9, "cut_by": "encode", "aesthetic": 5.5, "flow": 0.5, "codec": "h264",
        "num_frames": 48,
        "_clips": json.dumps([
            {"id": "2" * 32, "start_frame": 0, "end_frame": 48, "start_s": 0.0, "whole": True,
             "flow": None, "border_top": None, "path": "/etc/x", "dropped_by": "me",
             "mood": "calm"},
            {"id": "3" * 32, "start_frame": 0, "end_frame": 24, "start_s": 0.0, "whole": False,
             "mood": 1},
        ]),
    }  # fmt: skip
    part, whole = clip_table(pa.Table.from_pylist([source])).to_pylist()
    assert whole["source"] == whole["path"] == "/b/clip.mp4"
    assert (whole["source_name"], whole["source_codec"]) == ("clip.mp4", "h264")
    assert (whole["aesthetic"], whole["flow"], whole["text"]) == (5.5, 0.5, "A cat.")
    assert (part["aesthetic"], part["text"]) == (None, "")
    assert (whole["start_s"], whole["whole"], whole["border_top"]) == (0.0, True, None)
    assert not {"frames", "frames_count", "gop", "cut_by", "dropped_by"} & whole.keys()
    assert (part["mood"], whole["mood"]) == ("1", "calm")


def trimmed(path: Path, frames: int) -> Path:
    """A copy without its first frames, but for packets that the others need: they are in the file
    and not shown, as the edit list of `ffmpeg -ss 0.2 -c copy` says."""
    target = path.with_name("trimmed.mp4")
    options = {"avoid_negative_ts": "disabled"}
    with av.open(str(path)) as source, av.open(str(target), "w", options=options) as container:
        stream = source.streams.video[0]
        copy = container.add_stream_from_template(stream)
        for packet in source.demux(stream):
            if packet.pts is not None and packet.dts is not None:
                packet.pts -= 512 * frames
                packet.dts -= 512 * frames
                packet.stream = copy
                container.mux(packet)
    return target


def test_a_video_that_was_trimmed_without_encoding(tmp_path: Path) -> None:
    frames = pictures(24, 64, 96)
    path = trimmed(write_clip(tmp_path / "a.mp4", frames, bf="2", g="8", crf="12"), 5)
    whole = read_frames(path)
    assert len(whole) == 19
    assert np.abs(whole.astype(int) - frames[5:]).mean() < 6
    (clip,) = curated(tmp_path, path)
    assert np.abs(check(tmp_path, clip).astype(int) - whole).mean() < 3
    (clip,) = curated(tmp_path, path, [[0.08, 0.6, ""]])
    part = whole[clip["start_frame"] : clip["end_frame"]]
    assert np.abs(check(tmp_path, clip).astype(int) - part).mean() < 3
    (copy,) = curated(tmp_path, path, mode="copy")
    assert (copy["start_frame"], copy["num_frames"]) == (3, 16)  # from the next key frame on
    assert np.array_equal(check(tmp_path, copy), whole[3:])
