"""The data sets that can be imported, as their makers published them.

What was confirmed and what is not certain is on each one's page, docs/datasets/NAME.md.
"""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

import pyarrow as pa

from kinema.config.errors import KinemaError
from kinema.curation.importers.columns import as_text, text_array
from kinema.curation.importers.dataset import DataSet, Form, Ranges, Request
from kinema.curation.importers.findings import Findings
from kinema.curation.importers.folders import (
    load_inter4k,
    load_mixkit,
    load_path_cap,
    load_sidecars,
    load_ucf_101,
    load_vidprom,
)
from kinema.curation.importers.generic import load_hugging_face, load_webdataset
from kinema.curation.importers.list_columns import explode, parse_list
from kinema.curation.importers.nested import load_ego4d, load_hd_vg, load_opendv
from kinema.curation.importers.source_tables import read_source


def load_tables(request: Request, findings: Findings) -> pa.Table:
    """All sources as tables, one below the other."""
    tables = [read_source(path, findings, encoding=request.encoding) for path in request.sources]
    return pa.concat_tables(tables, promote_options="permissive")


def load_miradata(request: Request, findings: Findings) -> pa.Table:
    """Version 1's `timestamp` is a list of two times; `download` is the raw video's name."""
    table = load_tables(request, findings)
    if "timestamp" not in table.column_names or "clip_id" not in table.column_names:
        return table
    starts, ends = [], []
    for text in as_text(table.column("timestamp")).to_pylist():
        try:
            start, end = parse_list(text)
        except ValueError:
            start = end = ""
        starts.append(str(start))
        ends.append(str(end))
    downloads = [
        clip.split(".")[0].zfill(12) for clip in as_text(table.column("clip_id")).to_pylist()
    ]
    table = table.append_column("start", text_array(starts)).append_column("end", text_array(ends))
    return table.append_column("download", text_array(downloads))


def load_panda(request: Request, findings: Findings) -> pa.Table:
    """The CSV's lists as one row per clip, or the downloader's folder of clips."""
    if len(request.sources) == 1 and request.sources[0].is_dir():
        table = load_sidecars(request.sources[0], findings)
        if "url" in table.column_names:
            urls = as_text(table.column("url")).to_pylist()
            ids = [url.split("v=")[-1].split("&")[0] for url in urls]
            table = table.append_column("videoID", text_array(ids))
        return table
    table = load_tables(request, findings)
    if not {"videoID", "timestamp", "caption"} <= set(table.column_names):
        return table  # another data set's: refused by its columns
    return explode(
        table,
        ("caption", "matching_score", "desirable_filtering"),
        times="timestamp",
        label="videoID",
        findings=findings,
    )


_MIRA_LABELS = {
    "short_caption": "text_short",
    "dense_caption": "text_dense",
    "main_object_caption": "text_main_object",
    "background_caption": "text_background",
    "style_caption": "text_style",
    "camera_caption": "text_camera",
    "source": "origin",
}
_PANDA = {"matching_score": "panda_matching"}
_VIDPROM = {
    name: f"vidprom_{name}"
    for name in ("toxicity", "obscene", "identity_attack", "insult", "threat", "sexual_explicit")
}

DATA_SETS: tuple[DataSet, ...] = (
    DataSet(
        "openvid-1m",
        "OpenVid-1M and OpenVidHD",
        "OpenVid-1M.csv (and/or OpenVidHD.csv); --videos: the folder the parts were unzipped to",
        (
            Form(
                needed=("video", "caption", "aesthetic score", "motion score"),
                text=("caption",),
                clips=("{video}",),
                numbers={
                    "aesthetic score": "aesthetic",
                    "motion score": "openvid_motion",
                    "temporal consistency score": "openvid_consistency",
                },
                labels={"camera motion": "camera_motion"},
                sizes={"num_frames": "frame", "fps": "fps"},
                source_end=r"(_\d+)?_\d+(to\d+)?$",
                source_min=11,
            ),
        ),
        aliases=("openvid", "openvidhd"),
        unique_names=True,
    ),
    DataSet(
        "miradata",
        "MiraData",
        "miradata_v1_330k.csv (or v0); --videos: clips as its script cuts them, or the raw videos",
        (
            Form(
                needed=("clip_id", "file_path", "timestamp", "dense_caption"),
                text=("dense_caption",),
                clips=("{file_path}", "{clip_id}"),
                ranges=(Ranges(("{video_id}", "{download}"), "start", "end"),),
                labels=_MIRA_LABELS,
                sizes={
                    "num_frames": "frame_number",
                    "height": "height",
                    "width": "width",
                    "fps": "fps",
                },
                source="{video_id}",
            ),
            Form(
                needed=("index", "video_id", "start_frame", "end_frame", "dense_caption"),
                text=("dense_caption",),
                clips=("{index}",),
                ranges=(Ranges(("{video_id}",), "start_timestep", "end_timestep"),),
                labels=_MIRA_LABELS,
                source="{video_id}",
            ),
        ),
        aliases=("mira", "miradata-v1"),
        unique_names=True,
        load=load_miradata,
    ),
    DataSet(
        "pexels-45k",
        "Pexels-45k (Open-Sora 2)",
        "pexels_45k.csv or pexels_45k_necessary.csv, or JSON with path and cap; --videos",
        (
            Form(
                needed=("path", "text"),
                text=("text",),
                clips=("{path}",),
                sizes={
                    "num_frames": "num_frames",
                    "height": "height",
                    "width": "width",
                    "fps": "fps",
                },
                source_end=r"_scene-?\d+.*$",
                all_columns=True,
            ),
            Form(
                needed=("path", "cap"),
                text=("cap",),
                clips=("{path}",),
                source_end=r"_scene-?\d+.*$",
            ),
        ),
        aliases=("pexels",),
        unique_names=True,
        load=load_path_cap,
    ),
    DataSet(
        "panda-70m",
        "Panda-70M",
        "panda70m_training_2m.csv and the like with --videos: the whole videos; or the folder that "
        "its downloader wrote",
        (
            Form(
                needed=("videoID", "clip_number", "start", "end", "caption"),
                text=("caption",),
                clips=("{videoID}_{clip_number}",),
                ranges=(Ranges(("{videoID}",), "start", "end"),),
                numbers=_PANDA,
                labels={"desirable_filtering": "panda_filtering"},
                source="{videoID}",
            ),
            Form(
                needed=("file", "caption", "matching_score", "url"),
                text=("caption",),
                clips=("{file}",),
                numbers=_PANDA,
                labels={"desirable_filtering": "panda_filtering"},
                source="{videoID}",
            ),
        ),
        published=(("videoID", "timestamp", "caption", "matching_score"),),
        aliases=("panda", "panda70m"),
        unique_names=True,
        load=load_panda,
        numbered=False,
        folders=True,
    ),
    DataSet(
        "hd-vg-130m",
        "HD-VG-130M",
        "hdvg_0.json ... (or JSON lines); --videos: whole videos, HD-VILA clips, or the scenes",
        (
            Form(
                needed=("video_id", "scene_id", "caption", "clip_start"),
                text=("caption",),
                clips=("{video_id}/{scene_id}", "{scene_id}", "{whole_clip}"),
                ranges=(
                    Ranges(("{video_id}",), "start", "end"),
                    Ranges(("{clip_id}",), "clip_start", "clip_end"),
                ),
                source="{video_id}",
            ),
        ),
        published=(("clip", "video_id"),),
        aliases=("hdvg", "hd-vg"),
        unique_names=True,
        load=load_hd_vg,
        numbered=False,
    ),
    DataSet(
        "internvid",
        "InternVid (10M-FLT, 18M-Aesthetics)",
        "InternVid-10M-flt.jsonl (or Parquet, CSV); --videos: whole videos, or clips ID_START_END",
        (
            Form(
                needed=("YoutubeID", "Start_timestamp", "End_timestamp", "Caption"),
                text=("Caption",),
                clips=("{YoutubeID}_{Start_timestamp}_{End_timestamp}",),
                ranges=(Ranges(("{YoutubeID}",), "Start_timestamp", "End_timestamp"),),
                numbers={"Aesthetic_Score": "aesthetic", "UMT_Score": "umt_score"},
                source="{YoutubeID}",
            ),
        ),
        unique_names=True,
    ),
    DataSet(
        "webvid-10m",
        "WebVid (2M, 10M)",
        "results_10M_train.csv; --videos: the downloader's folder (page_dir/videoid.mp4)",
        (
            Form(
                needed=("videoid", "contentUrl", "page_dir", "name"),
                text=("name",),
                clips=("{page_dir}/{videoid}", "{videoid}"),
                source="{videoid}",
            ),
        ),
        aliases=("webvid", "webvid-2m"),
        unique_names=True,
    ),
    DataSet(
        "inter4k",
        "Inter4K",
        "the folder of Inter4K.zip (60fps/UHD/1.mp4 ...), and lists of names if only some",
        (
            Form(
                needed=("file", "variant", "number"),
                clips=("{file}",),
                labels={"variant": "variant"},
                source="{number}",
            ),
        ),
        published=((),),
        load=load_inter4k,
        numbered=False,
        folders=True,
    ),
    DataSet(
        "mixkit",
        "MixKit (Open-Sora-Plan 1.0)",
        "the folder of categories, or llava_path_cap_64x512x512.json with --videos",
        (
            Form(
                needed=("path", "cap", "category"),
                text=("cap",),
                clips=("{path}",),
                labels={"category": "category"},
                source_end=r"_resize\w*$|_scene\w*$",
            ),
        ),
        published=(("path", "cap"),),
        load=load_mixkit,
        numbered=False,
        folders=True,
    ),
    DataSet(
        "vidprom",
        "VidProM",
        "VidProM_unique.csv; --videos: folder of the extracted MODEL-UUID.mp4",
        (
            Form(
                needed=("uuid", "prompt", "file", "model"),
                text=("prompt",),
                clips=("{file}",),
                numbers=_VIDPROM,
                labels={"model": "model"},
                source="{uuid}",
            ),
        ),
        published=(("uuid", "prompt"),),
        load=load_vidprom,
        numbered=False,
    ),
    DataSet(
        "ucf-101",
        "UCF-101",
        "the folder UCF-101 (one folder per class), and trainlist01.txt/testlist01.txt if wanted",
        (
            Form(
                needed=("file", "class", "group"),
                text=("text",),
                clips=("{file}",),
                labels={"class": "class", "split": "split"},
                source="{group}",
            ),
        ),
        aliases=("ucf101",),
        published=((),),
        load=load_ucf_101,
        numbered=False,
        folders=True,
    ),
    DataSet(
        "ego4d",
        "EGO4D",
        "narration.json and/or manifest.csv, ego4d.json; --videos: v2/full_scale",
        (
            Form(
                needed=("video_uid", "start", "end", "text"),
                text=("text",),
                ranges=(Ranges(("{video_uid}",), "start", "end", whole=True),),
                labels={"scenarios": "scenarios"},
                source="{video_uid}",
            ),
        ),
        unique_names=True,
        published=(("video_uid",),),
        load=load_ego4d,
        numbered=False,
    ),
    DataSet(
        "opendv",
        "OpenDV-YouTube",
        "OpenDV-YouTube.csv or .json, and its language files; --videos: CHANNEL/ID.webm",
        (
            Form(
                needed=("videoid", "folder", "start", "end", "text"),
                text=("text",),
                ranges=(Ranges(("{folder}/{videoid}", "{videoid}"), "start", "end", whole=True),),
                labels={"command": "command", "split": "split", "area": "area"},
                source="{videoid}",
            ),
        ),
        unique_names=True,
        published=(("VideoID", "YouTuber", "Duration"), ("videoid", "youtuber", "duration")),
        load=load_opendv,
        numbered=False,
    ),
    DataSet(
        "webdataset",
        "WebDataset tars",
        "tars (KEY.mp4, KEY.txt, KEY.json) with --extract FOLDER, or a folder of extracted samples",
        (),
        aliases=("wds", "tar"),
        load=load_webdataset,
        numbered=False,
        folders=True,
    ),
    DataSet(
        "hugging-face",
        "A Hugging Face data set folder",
        "a folder with metadata.csv or .jsonl, or Parquet files that hold videos (--extract)",
        (),
        aliases=("huggingface", "hf"),
        load=load_hugging_face,
        numbered=False,
        folders=True,
    ),
    DataSet(
        "csv",
        "Any table",
        "CSV, JSON or Parquet with any columns (--path-column, --text-column)",
        (),
        aliases=("table", "parquet", "json"),
    ),
)
GUESSED = ("webdataset", "hugging-face", "csv")
"""Layouts whose columns are not fixed."""


def data_set(name: str) -> DataSet:
    """The data set of that name.

    Raises:
        KinemaError: there is none; names the nearest, and all.
    """
    wanted = name.lower().replace("_", "-")
    names = {alias: entry for entry in DATA_SETS for alias in (entry.name, *entry.aliases)}
    if wanted in names:
        return names[wanted]
    near = get_close_matches(wanted, list(names), n=1, cutoff=0.5)
    meant = f"; did you mean {names[near[0]].name!r}?" if near else ""
    raise KinemaError(
        f"no data set is called {name!r}{meant}",
        where="kinema data import",
        hint=f"one of {', '.join(entry.name for entry in DATA_SETS)}",
    )


def looks_like(columns: Iterable[str]) -> list[DataSet]:
    """The data sets whose signs these columns have, the surest first."""
    there = set(columns)
    found = [
        (len(signs), entry)
        for entry in DATA_SETS
        for signs in entry.signs()
        if signs and set(signs) <= there
    ]
    found.sort(key=lambda item: -item[0])
    return list(dict.fromkeys(entry for _, entry in found))
