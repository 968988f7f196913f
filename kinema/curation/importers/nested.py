"""Lists of clips as nested JSON: HD-VG-130M, EGO4D, OpenDV. One row per clip comes out."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.curation.importers.columns import as_text, seconds
from kinema.curation.importers.dataset import Request
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.source_tables import ending, read_json, read_source

NARRATION_MIN_S, NARRATION_MAX_S = 2.0, 10.0
"""EGO4D's narrations are points in time: each lasts until the next one, within these limits."""
OPENDV_RATE = 10.0
"""Pictures per second of OpenDV's image folders, which its language file counts in."""
OPENDV_PIECE_S = 10.0
"""Where no language file says which parts are clips: pieces of equal length, at most this long."""
OPENDV_COMMANDS = (
    "going straight", "passing an intersection", "turning left", "turning right",
    "changing to the left lane", "changing to the right lane", "taking the left lane branch",
    "taking the right lane branch", "passing a crosswalk", "passing a railroad", "merging",
    "making a U-turn", "stopping", "deviating",
)  # fmt: skip
"""What `cmd` 0..13 means."""


def load_hd_vg(request: Request, findings: Findings) -> pa.Table:
    """`hdvg_0.json` ...: video -> clip (of HD-VILA-100M) -> scenes, in frames of that clip.

    Columns: `video_id`, `clip_id` (`ID.7`), `scene_id`, `caption`, `start`/`end` in the video where
    the clip's own times are known, `clip_start`/`clip_end` in the clip, `whole_clip`.
    """
    columns: dict[str, list[Any]] = {
        name: []
        for name in ("video_id", "clip_id", "scene_id", "caption", "start", "end", "clip_start",
                     "clip_end", "whole_clip")
    }  # fmt: skip
    for path in request.sources:
        for video_id, video in _hd_vg_videos(path, request, findings):
            for clip_id, clip in _clips_of(video):
                for row in _hd_vg_scenes(video_id, clip_id, clip, findings):
                    for name, value in zip(columns, row, strict=True):
                        columns[name].append(value)
    return _table(columns)


def _hd_vg_videos(
    path: Path, request: Request, findings: Findings
) -> Iterator[tuple[str, dict[str, Any]]]:
    if ending(path) in (".jsonl", ".ndjson"):
        lines: Iterable[dict[str, Any]] = _json_lines(path, request, findings)
        for number, line in enumerate(lines):
            if "clip" in line:
                yield str(line.get("video_id", number)), line
            else:
                yield from _videos_in(line)
        return
    data = read_json(path, request.encoding)
    if isinstance(data, list):
        for number, item in enumerate(data):
            if isinstance(item, dict):
                yield str(item.get("video_id", number)), item
        return
    found = list(_videos_in(data)) if isinstance(data, dict) else []
    if not found:
        raise KinemaError(
            "has no videos with clips: HD-VG-130M's files have "
            '{"VIDEO": {"clip": {"VIDEO.7.mp4": {"scene_split": [...]}}}}',
            where=str(path),
        )
    yield from found


def _videos_in(data: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    for video_id, video in data.items():
        if isinstance(video, dict) and "clip" in video:
            yield str(video_id), video


def _clips_of(video: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    clips = video.get("clip")
    if isinstance(clips, dict):
        yield from ((str(name), clip) for name, clip in clips.items() if isinstance(clip, dict))
    elif isinstance(clips, list):
        for clip in clips:
            if isinstance(clip, dict):
                yield str(clip.get("clip_id", "")), clip


def _hd_vg_scenes(
    video_id: str, clip_id: str, clip: dict[str, Any], findings: Findings
) -> Iterator[tuple[Any, ...]]:
    clip_id = clip_id.removesuffix(".mp4")
    span = next((clip[key] for key in ("span", "orig_span", "timestamp") if key in clip), None)
    begin, finish = _pair_in_seconds(span)
    rate = clip.get("fps")
    scenes = clip.get("scene_split")
    for scene in scenes if isinstance(scenes, list) else []:
        name = str(scene.get("clip_id", clip_id)).removesuffix(".mp4")
        cut = scene.get("scene_cut")
        if not (isinstance(cut, list) and len(cut) == 2 and isinstance(rate, int | float) and rate):
            findings.add("bad_time", f"{video_id}/{name}", "no scene_cut, or no fps to count it in")
            continue
        first, last = float(cut[0]) / rate, float(cut[1]) / rate
        to_end = cut[1] == -1
        length = None if begin is None or finish is None else finish - begin
        clip_end = length if to_end else last
        yield (
            video_id,
            clip_id,
            name,
            str(scene.get("caption") or ""),
            None if begin is None else begin + first,
            None if begin is None or clip_end is None else begin + clip_end,
            first,
            clip_end,
            clip_id if to_end and cut[0] == 0 else "",
        )


def _pair_in_seconds(span: Any) -> tuple[float | None, float | None]:
    if not isinstance(span, list) or len(span) != 2:
        return None, None
    values, bad = seconds(pa.array([str(item) for item in span]))
    return (None, None) if bad.any() else (float(values[0]), float(values[1]))


def load_ego4d(request: Request, findings: Findings) -> pa.Table:
    """Narrations (`narration.json`) as clips, `manifest.csv` or `ego4d.json` for lengths.

    Columns: `video_uid`, `start`, `end`, `text`, `scenarios`. Without narrations, one row per
    video of the list, without times.
    """
    lengths: dict[str, float] = {}
    scenarios: dict[str, str] = {}
    narrations: dict[str, Any] = {}
    listed: list[str] = []
    for path in request.sources:
        if ending(path) in (".csv", ".parquet"):
            table = read_source(path, findings, encoding=request.encoding)
            rows = _manifest_rows(table, path)
        else:
            data = read_json(path, request.encoding)
            videos = data.get("videos", data) if isinstance(data, dict) else data
            if isinstance(videos, dict):
                narrations |= {
                    str(uid): item
                    for uid, item in videos.items()
                    if isinstance(item, dict) and any(k.startswith("narration_pass") for k in item)
                }
                if not narrations:
                    raise KinemaError(
                        "has neither narrations nor a list of videos",
                        where=str(path),
                        hint="give v2/annotations/narration.json, manifest.csv or ego4d.json",
                    )
                continue
            rows = videos if isinstance(videos, list) else []
        for row in rows:
            uid = str(row.get("video_uid") or "")
            if uid:
                listed.append(uid)
                scenarios[uid] = _scenarios(row.get("scenarios"))
                try:
                    lengths[uid] = float(row.get("duration_sec") or "nan")
                except (TypeError, ValueError):
                    continue
    columns: dict[str, list[Any]] = {
        name: [] for name in ("video_uid", "start", "end", "text", "scenarios")
    }
    for uid in dict.fromkeys(listed) if listed else narrations:
        clips: list[tuple[float | None, float | None, str]] = [(None, None, "")]
        if narrations:
            clips = list(_narrated(narrations.get(uid, {}), lengths.get(uid)))
            if not clips:
                findings.add("no_caption", uid, "no narration")
        for start, end, text in clips:
            values = (uid, start, end, text, scenarios.get(uid, ""))
            for name, value in zip(columns, values, strict=True):
                columns[name].append(value)
    return _table(columns)


def _manifest_rows(table: pa.Table, path: Path) -> list[dict[str, Any]]:
    if "video_uid" not in table.column_names:
        raise KinemaError(
            f"has no column 'video_uid' (it has {', '.join(table.column_names)})",
            where=str(path),
            hint="EGO4D's manifest.csv lies in v2/full_scale",
        )
    wanted = [n for n in ("video_uid", "duration_sec", "scenarios") if n in table.column_names]
    rows: list[dict[str, Any]] = table.select(wanted).to_pylist()
    return rows


def _scenarios(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(str(item) for item in value)
    return re.sub(r"[\[\]'\"]", "", str(value or ""))


def _narrated(video: dict[str, Any], length: float | None) -> Iterator[tuple[float, float, str]]:
    """Clips of the first pass that has narrations."""
    for key in sorted(key for key in video if key.startswith("narration_pass")):
        items = (video[key] or {}).get("narrations") or []
        points: list[tuple[float, str]] = []
        for item in items:
            text = narration_text(str(item.get("narration_text") or ""))
            time = item.get("timestamp_sec")
            if text and isinstance(time, int | float) and time >= 0:
                points.append((float(time), text))
        points.sort()
        for (time, text), after in zip(points, [*points[1:], (float("inf"), "")], strict=True):
            end = min(max(after[0], time + NARRATION_MIN_S), time + NARRATION_MAX_S)
            if length is not None and length == length:
                end = min(end, length)
            if end > time:
                yield time, end, text
        if points:
            return


def narration_text(text: str) -> str:
    """`#C C picks up a cup` -> `the camera wearer picks up a cup`; `#unsure` -> `something`."""
    text = re.sub(r"#\s*[uU]nsure", "something", text)
    text = re.sub(r"^\s*#\s*[cC]\s+C\b", "the camera wearer", text)
    text = re.sub(r"#\s*[cCoO]\b", "", text)
    text = re.sub(r"^\s*C\b", "the camera wearer", text)
    text = re.sub(r"#\w+", "", text)
    return " ".join(text.split()).strip(" .")


def load_opendv(request: Request, findings: Findings) -> pa.Table:
    """The list of videos (`OpenDV-YouTube.csv` or `.json`), and language files if given.

    Columns: `videoid`, `folder` (the channel as the downloader writes it), `start`, `end`, `text`,
    `command`, `split`, `area`. Without a language file pieces of equal length, of all but what
    the list says to discard.
    """
    videos: dict[str, dict[str, Any]] = {}
    language: list[tuple[Path, list[Any]]] = []
    for path in request.sources:
        if ending(path) == ".json":
            data = read_json(path, request.encoding)
            if isinstance(data, list) and data and isinstance(data[0], dict):
                if "folder" in data[0] and "first_frame" in data[0]:
                    language.append((path, data))
                    continue
                rows = [{str(k).lower(): v for k, v in row.items()} for row in data]
                videos |= {str(row.get("videoid")): _opendv_video(row) for row in rows}
                continue
            raise KinemaError(
                "is neither OpenDV's list of videos nor its language file", where=str(path)
            )
        table = read_source(path, findings, encoding=request.encoding)
        table = table.rename_columns([name.lower() for name in table.column_names])
        if "videoid" not in table.column_names:
            raise KinemaError(
                f"has no column 'VideoID' (it has {', '.join(table.column_names)})",
                where=str(path),
                hint="download OpenDV's sheet as CSV",
            )
        videos |= {str(row["videoid"]): _opendv_video(row) for row in table.to_pylist()}
    if not videos:
        raise KinemaError(
            "OpenDV's list of videos is missing: language files do not say what was discarded at "
            "the beginning of a video",
            where=str(request.sources[0]),
            hint="add OpenDV-YouTube.csv (or .json) as a source",
        )
    columns: dict[str, list[Any]] = {
        n: [] for n in ("videoid", "folder", "start", "end", "text", "command", "split", "area")
    }

    def add(videoid: str, start: Any, end: Any, text: str, command: str) -> None:
        video = videos[videoid]
        row = (videoid, video["folder"], start, end, text, command, video["split"], video["area"])
        for name, value in zip(columns, row, strict=True):
            columns[name].append(value)

    for path, items in language:
        for number, item in enumerate(items):
            videoid = str(item.get("folder", "")).rstrip("/").rsplit("/", 1)[-1]
            first, last = (_frame(item.get(key)) for key in ("first_frame", "last_frame"))
            if videoid not in videos or first is None or last is None or last < first:
                what = "its video is not in the list" if videoid not in videos else "no frames"
                findings.add("bad_row", f"{path.name}: item {number}", what)
                continue
            begin = videos[videoid]["start"]
            command = item.get("cmd")
            known = isinstance(command, int) and 0 <= command < len(OPENDV_COMMANDS)
            add(
                videoid,
                begin + first / OPENDV_RATE,
                begin + (last + 1) / OPENDV_RATE,
                str(item.get("blip") or ""),
                OPENDV_COMMANDS[command] if known and isinstance(command, int) else "",
            )
    if not language:
        for videoid, video in videos.items():
            if video["end"] is None or video["end"] <= video["start"]:
                findings.add("bad_time", videoid, "no duration, or all of it is discarded")
                continue
            length = video["end"] - video["start"]
            pieces = math.ceil(length / OPENDV_PIECE_S)
            for number in range(pieces):
                begin = video["start"] + length * number / pieces
                add(videoid, begin, begin + length / pieces, "", "")
    return _table(columns)


def _opendv_video(row: dict[str, Any]) -> dict[str, Any]:
    def pick(*starts: str) -> Any:
        keys = (key for start in starts for key in row if key.startswith(start))
        return next((row[key] for key in keys if row[key] not in (None, "")), None)

    length = _pair_in_seconds([pick("duration") or 0, 0])[0]
    # The sheet spells it "Begininning".
    start = _real(pick("start_discard", "discarded length at the beg"))
    end = _real(pick("end_discard", "discarded length at the end"))
    return {
        "folder": str(pick("youtuber") or "").replace(" ", "_"),
        "split": str(pick("split", "train / val") or "").lower(),
        "area": str(pick("area", "nation") or ""),
        "start": start,
        "end": None if not length else length - end,
    }


def _real(value: Any) -> float:
    try:
        return float(value or 0)
    except (TypeError, ValueError):
        return 0.0


def _frame(name: Any) -> int | None:
    """The number of a picture: `000000123.jpg`."""
    match = re.match(r"^0*(\d+)(\.\w+)?$", str(name))
    return int(match[1]) if match else None


def _json_lines(path: Path, request: Request, findings: Findings) -> Iterator[dict[str, Any]]:
    import json

    with path.open(encoding=request.encoding) as file:
        for number, line in enumerate(file):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except (ValueError, RecursionError) as error:
                findings.add("bad_row", f"{path.name}:{number + 1}", f"not JSON: {error}"[:200])
                continue
            if isinstance(value, dict):
                yield value


def _table(columns: dict[str, list[Any]]) -> pa.Table:
    reals = {"start", "end", "clip_start", "clip_end"}
    return pa.table(
        {
            name: pa.array(values, pa.float64())
            if name in reals
            else as_text(pa.array(values, pa.large_string()))
            for name, values in columns.items()
        }
    )
