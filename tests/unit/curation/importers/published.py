"""Small copies of data sets in the layouts that their makers published."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from kinema.media.write import write_video

HOSTILE = 'A "red" car, seen\nfrom above; naïve — 日本 \\ it\'s'
"""Quotes, a comma, a line break, an apostrophe, a backslash and other scripts."""
TIDY = 'A "red" car, seen from above; naïve — 日本 \\ it\'s'


def render_clips(folder: Path, count: int = 3) -> list[Path]:
    """Tiny videos of different lengths and sizes: 8, 9, 10 frames, 64 x 48, 80 x 48, ..."""
    folder.mkdir(parents=True)
    clips = []
    for number in range(count):
        frames = np.full((8 + number, 48, 64 + 16 * number, 3), 40 * number, np.uint8)
        frames[:, 10:20, :20] = 255
        clips.append(folder / f"clip{number}.mp4")
        write_video(clips[-1], frames, 8.0)
    return clips


def put(clip: Path, target: Path) -> Path:
    """The clip under another name."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.suffix == clip.suffix:
        os.link(clip, target)
    else:
        shutil.copy(clip, target)
    return target


def write_csv(
    path: Path, header: Sequence[str], rows: Sequence[Sequence[Any]], encoding: str = "utf-8"
) -> Path:
    """As pandas writes it: quotes where they are needed, `\\n` at line ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)
    return path


def write_json(path: Path, data: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, ensure_ascii=False), encoding="utf-8")
    return path


OPENVID = ("video", "caption", "aesthetic score", "motion score", "temporal consistency score",
           "camera motion", "frame", "fps", "seconds")  # fmt: skip


def openvid(root: Path, clips: list[Path]) -> Path:
    """A CSV, clips in the folders of two parts; one row without a file, one twice."""
    put(clips[0], root / "video_folder" / "IIvwqskxtdE_0.mp4")
    put(clips[1], root / "video_folder" / "part2" / "-0UNhDLgp7o_14_0to149.mp4")
    put(clips[2], root / "video_folder" / "stray.mp4")
    rows = [
        ("IIvwqskxtdE_0.mp4", HOSTILE, 5.25, 7.5, 0.98, "pan_left", 9, 8.0, 1.1),
        ("-0UNhDLgp7o_14_0to149.mp4", "Waves.", 4.5, "", 0.9, "Undetermined", 9, 8.0, 1.1),
        ("gone_1.mp4", "Never downloaded.", 6, 1, 1, "static", 9, 8.0, 1.1),
        ("IIvwqskxtdE_0.mp4", "The same again.", 5, 1, 1, "static", 9, 8.0, 1.1),
    ]
    return write_csv(root / "OpenVid-1M.csv", OPENVID, rows)


MIRA = ("clip_id", "source", "video_url", "video_id", "width", "height", "fps", "seconds",
        "timestamp", "frame_number", "framestamp", "file_path", "short_caption", "dense_caption",
        "background_caption", "main_object_caption", "style_caption", "camera_caption")  # fmt: skip


def _mira_row(clip: str, video: str, times: Sequence[str], frames: int, size: int) -> list[Any]:
    link = f"https://www.youtube.com/watch?v={video}"
    path = f"clip_video/000000000000/{clip}.mp4"
    captions = [f"short {clip}", f"Dense of {clip}.", "Hills.", "A dog.", "Film.", "Still."]
    return [clip, "youtube_scenic", link, video, size, 48, 8.0, frames / 8, str(list(times)),
            frames, "[0, 9]", path, *captions]  # fmt: skip


def miradata(root: Path, clips: list[Path], *, raw: bool = False) -> Path:
    """v1: clips where its script puts them, or the raw videos only."""
    if raw:
        put(clips[0], root / "miradata" / "raw_video" / "000000000012.mp4")
    else:
        for number, clip in ((0, "12.0"), (1, "12.1")):
            put(clips[number],
                root / "miradata" / "clip_video" / "000000000000" / f"{clip}.mp4")  # fmt: skip
    rows = [
        _mira_row("12.0", "abc-DEF_123", ("00:00:00.125", "00:00:00.500"), 8, 64),
        _mira_row("12.1", "abc-DEF_123", ("00:00:00.500", "00:00:00.750"), 9, 80),
        _mira_row("13.0", "zzzzzzzzzzz", ("00:01:00.000", "00:00:30.000"), 9, 80),
    ]
    return write_csv(root / "miradata_v1_330k.csv", MIRA, rows)


PANDA = ("videoID", "url", "timestamp", "caption", "matching_score", "desirable_filtering",
         "shot_boundary_detection")  # fmt: skip


def panda(root: Path, clips: list[Path]) -> Path:
    """A row per video with Python lists; whole videos in a folder."""
    put(clips[0], root / "videos" / "-2yHu5qgTzM.mp4")
    put(clips[1], root / "videos" / "abcdefghijk.webm.mp4".replace(".webm", ""))
    rows = [
        (
            "-2yHu5qgTzM",
            "https://www.youtube.com/watch?v=-2yHu5qgTzM",
            str([["0:00:00.500", "0:00:00.880"], ["0:00:00.125", "0:00:00.375"]]),
            str(["It's a \"neuron\".", "A woman, talking."]),
            str([0.451416015625, 0.4990234375]),
            str(["1_still_foreground_image", "desirable"]),
            str([[["0:00:00.000", "0:00:03.069"]], [["0:00:00.000", "0:00:03.169"]]]),
        ),
        ("abcdefghijk", "https://www.youtube.com/watch?v=abcdefghijk",
         "[['0:00:01.000', '0:00:00.500']]", "['Backwards.']", "[0.4]", "['desirable']", "[[]]"),
        ("gone0000000", "https://www.youtube.com/watch?v=gone0000000",
         "[['0:00:01.000', '0:00:02.500']]", "['Not here.']", "[0.4]", "['desirable']", "[[]]"),
        ("broken00000", "https://www.youtube.com/watch?v=broken00000",
         "[['0:00:01.000', __import__('os')]]", "['No list.']", "[0.4]", "['desirable']", "[[]]"),
    ]  # fmt: skip
    return write_csv(root / "panda70m_training_2m.csv", PANDA, rows)


def panda_downloaded(root: Path, clips: list[Path]) -> Path:
    """What its downloader writes: shards of clips with .txt and .json beside them."""
    folder = root / "output" / "00000"
    for number in range(2):
        key = f"0000000_0000{number}"
        put(clips[number], folder / f"{key}.mp4")
        (folder / f"{key}.txt").write_text(f"Caption {number}.\n")
        write_json(
            folder / f"{key}.json",
            {
                "url": "https://www.youtube.com/watch?v=-2yHu5qgTzM",
                "key": key,
                "caption": f"Caption {number}.",
                "matching_score": 0.5 + number,
                "desirable_filtering": "desirable",
                "clips": [["0:00:00.500", "0:00:00.880"]],
                "yt_meta_dict": {"info": {"title": "t"}},
                "status": "success",
                "error_message": None,
            },
        )
    return root / "output"


def hd_vg(root: Path, clips: list[Path], *, spans: bool = True, whole_videos: bool = True) -> Path:
    """video -> HD-VILA clip -> scenes in frames of that clip."""
    name = "QMi8x8o55Ns.mp4" if whole_videos else "QMi8x8o55Ns.1.mp4"
    put(clips[2], root / "videos" / name)
    clip: dict[str, Any] = {
        "fps": 8.0,
        "scene_split": [
            {"clip_id": "QMi8x8o55Ns.1_scene1", "caption": "A harbour.", "scene_cut": [0, 4]},
            {"clip_id": "QMi8x8o55Ns.1_scene2", "caption": "A ship.", "scene_cut": [4, 8]},
        ],
    }
    if spans:
        clip["span"] = ["00:00:00.250", "00:00:01.250"]
    return write_json(
        root / "metafiles" / "hdvg_0.json",
        {"QMi8x8o55Ns": {"clip": {"QMi8x8o55Ns.1.mp4": clip}}},
    )


def internvid(root: Path, clips: list[Path], *, cut: bool = False) -> Path:
    """JSON lines; whole videos, or clips `ID_START_END.mp4`."""
    rows = [
        {"YoutubeID": "AbcDEF-_123", "Start_timestamp": "00:00:00.125",
         "End_timestamp": "00:00:00.625", "Caption": "a man is cooking",
         "Aesthetic_Score": 4.5, "UMT_Score": 0.41},
        {"YoutubeID": "AbcDEF-_123", "Start_timestamp": "00:00:00.625",
         "End_timestamp": "00:00:00.875", "Caption": "a pan", "Aesthetic_Score": 3.75,
         "UMT_Score": 0.3},
    ]  # fmt: skip
    path = root / "InternVid-10M-flt.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    if cut:
        for clip, row in zip(clips, rows, strict=False):
            name = "{YoutubeID}_{Start_timestamp}_{End_timestamp}.mp4".format(**row)
            put(clip, root / "videos" / name)
    else:
        put(clips[0], root / "videos" / "AbcDEF-_123.mp4")
    return path


def webvid(root: Path, clips: list[Path]) -> Path:
    """videoid,contentUrl,duration,page_dir,name and videos/PAGE/ID.mp4."""
    put(clips[0], root / "data" / "videos" / "006001_006050" / "1066674784.mp4")
    put(clips[1], root / "data" / "videos" / "006051_006100" / "21179416.mp4")
    rows = [
        (1066674784, "https://ak/1066674784.mp4", "PT00H00M08S", "006001_006050", HOSTILE),
        (21179416, "https://ak/21179416.mp4", "PT00H00M11S", "006051_006100", "Aerial of snow"),
        (99, "https://ak/99.mp4", "PT00H00M11S", "", "No page"),
    ]
    header = ("videoid", "contentUrl", "duration", "page_dir", "name")
    return write_csv(root / "results_10M_train.csv", header, rows)


def pexels(root: Path, clips: list[Path]) -> Path:
    """path,text,num_frames,... with paths from the makers' working folder."""
    put(clips[0], root / "pexels_45k" / "popular_3" / "853857_scene-0_cut-border.mp4")
    put(clips[1], root / "pexels_45k" / "popular_2" / "853858_scene-1.mp4")
    header = ("path", "text", "num_frames", "height", "width", "aspect_ratio", "resolution", "fps")
    rows = [
        ("./datasets/pexels_45k/popular_3/853857_scene-0_cut-border.mp4", HOSTILE, 8.0, 48.0, 64.0,
         0.75, 3072.0, 8.0),
        ("./datasets/pexels_45k/popular_2/853858_scene-1.mp4", "A hill.", 9.0, 48.0, 80.0, 0.6,
         3840.0, 8.0),
    ]  # fmt: skip
    return write_csv(root / "pexels_45k_necessary.csv", header, rows)


def mixkit(root: Path, clips: list[Path]) -> Path:
    """A folder of categories, and the captions of all three sites in one JSON."""
    put(clips[0], root / "mixkit" / "Airplane" / "mixkit-plane-over-clouds-1234_resize1080p.mp4")
    put(clips[1], root / "mixkit" / "Beach" / "mixkit-waves-at-dusk-77_resize1080p.mp4")
    before = "/remote-home1/dataset/data_split_tt"
    plane = f"{before}/mixkit/Airplane/mixkit-plane-over-clouds-1234_resize1080p.mp4"
    return write_json(
        root / "llava_path_cap_64x512x512.json",
        [
            {"path": plane, "cap": [HOSTILE]},
            {"path": f"{before}/pexels/8k/a.mp4", "cap": ["Another site's."]},
        ],
    )


def vidprom(root: Path, clips: list[Path]) -> Path:
    """Prompts, and videos of two models for the first."""
    uuid = "6a83eb92-faa0-572b-9e1f-67dec99b711d"
    put(clips[0], root / "pika_videos" / f"pika-{uuid}.mp4")
    put(clips[1], root / "t2vz_videos" / f"t2vz-{uuid}.mp4")
    header = ("uuid", "prompt", "time", "toxicity", "obscene", "identity_attack", "insult",
              "threat", "sexual_explicit")  # fmt: skip
    rows = [
        (uuid, HOSTILE, "Sun Sep  3 12:27:44 2023", 0.00129, 0.00016, 7e-05, 0.00064, 2e-05, 2e-05),
        ("3ba1adf3-5254-59fb-a13e-57e6aa161626", "A clock", "Wed Sep 13 18:15:30 2023", 0.1, 0, 0,
         0, 0, 0),
    ]  # fmt: skip
    return write_csv(root / "VidProM_unique.csv", header, rows)


def ucf_101(root: Path, clips: list[Path]) -> Path:
    """A folder per class, and the lists of the first split."""
    folder = root / "UCF-101"
    put(clips[0], folder / "ApplyEyeMakeup" / "v_ApplyEyeMakeup_g08_c01.mp4")
    put(clips[1], folder / "YoYo" / "v_YoYo_g01_c02.mp4")
    put(clips[2], folder / "YoYo" / "v_YoYo_g01_c03.mp4")
    lists = root / "ucfTrainTestlist"
    lists.mkdir(parents=True)
    (lists / "trainlist01.txt").write_text(
        "ApplyEyeMakeup/v_ApplyEyeMakeup_g08_c01.mp4 1\r\nYoYo/v_YoYo_g09_c01.mp4 101\r\n"
    )
    (lists / "testlist01.txt").write_text("YoYo/v_YoYo_g01_c02.mp4\r\n")
    return folder


def inter4k(root: Path, clips: list[Path]) -> Path:
    put(clips[0], root / "Inter4K" / "60fps" / "UHD" / "1.mp4")
    put(clips[1], root / "Inter4K" / "60fps" / "UHD" / "2.mp4")
    return root / "Inter4K"


def ego4d(root: Path, clips: list[Path]) -> tuple[Path, Path]:
    """narration.json and manifest.csv."""
    uid = "001e3e4e-2743-47fc-8564-d5efd11f9e90"
    put(clips[0], root / "v2" / "full_scale" / f"{uid}.mp4")
    narrations = [
        {"timestamp_sec": 0.25, "narration_text": "#C C picks up a cup"},
        {"timestamp_sec": 5.0, "narration_text": "#O man X waves #unsure"},
        {"timestamp_sec": 60.0, "narration_text": "#C C walks"},
    ]
    passes = {"narration_pass_1": {"narrations": narrations, "summaries": []}, "status": "complete"}
    narration = write_json(
        root / "v2" / "annotations" / "narration.json",
        {uid: passes, "deadbeef-0000-0000-0000-000000000000": passes},
    )
    manifest = write_csv(
        root / "v2" / "full_scale" / "manifest.csv",
        ("video_uid", "duration_sec", "scenarios"),
        [(uid, 63.5, "['Cooking', 'Eating']")],
    )
    return narration, manifest


def opendv(root: Path, clips: list[Path]) -> tuple[Path, Path]:
    """The sheet, and a language file."""
    put(clips[0], root / "videos" / "J_Utah" / "--I-TdCe2_g.mp4")
    header = ("ID", "VideoID", "Title", "YouTuber", "Link", "Duration", "Train / Val",
              "Nation or Area (Inferred by GPT)",
              "State, Province, or City (Inferred by GPT and refined by human)",
              "Discarded Length at the Begininning (second)",
              "Discarded Length at the Ending (second)")  # fmt: skip
    sheet = write_csv(
        root / "meta" / "OpenDV-YouTube.csv",
        header,
        [(1, "--I-TdCe2_g", "Cairo 4K", "J Utah", "https://www.youtube.com/watch?v=--I-TdCe2_g",
          "43:47", "Train", "Arab Republic of Egypt", "Cairo", 90, 30)],
    )  # fmt: skip
    language = write_json(
        root / "10hz_YouTube_val.json",
        [
            {"cmd": 2, "blip": "a street", "folder": "val_images/J_Utah/--I-TdCe2_g",
             "first_frame": "000000005.jpg", "last_frame": "000000044.jpg"},
            {"cmd": 0, "blip": "x", "folder": "val_images/Y/unknown",
             "first_frame": "000000005.jpg", "last_frame": "000000044.jpg"},
        ],
    )  # fmt: skip
    return sheet, language


def write_tar(path: Path, members: list[tuple[str, bytes | str]]) -> Path:
    """Files; a text is the target of a symbolic link."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            if isinstance(content, str):
                info.type, info.linkname = tarfile.SYMTYPE, content
                tar.addfile(info)
            else:
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def webdataset(root: Path, clips: list[Path]) -> Path:
    """Two shards; the first has members that would leave its folder."""
    video = [clip.read_bytes() for clip in clips]
    facts = {"score": 1.5, "caption": "from JSON", "meta": {"title": "x"}}
    write_tar(
        root / "wds" / "00000.tar",
        [
            ("a.mp4", video[0]),
            ("a.txt", HOSTILE.encode()),
            ("a.json", json.dumps(facts).encode()),
            ("b.json", b'{"caption": "no video"}'),
            ("../../escaped.mp4", video[1]),
            ("/tmp/absolute.mp4", video[1]),
            ("link.mp4", "/etc/hostname"),
            ("._a.mp4", b"a file manager's"),
        ],
    )
    write_tar(
        root / "wds" / "00001.tar",
        [("sub/a.mp4", video[1]), ("sub/a.json", json.dumps({"caption": "two"}).encode())],
    )
    return root / "wds"


def hugging_face(root: Path, clips: list[Path]) -> Path:
    """Metadata as CSV and as JSON lines; one name leaves its folder."""
    folder = root / "hf"
    put(clips[0], folder / "train" / "videos" / "1.mp4")
    put(clips[1], folder / "test" / "2.mp4")
    write_csv(
        folder / "train" / "metadata.csv",
        ("file_name", "text", "score"),
        [("videos/1.mp4", HOSTILE, 3), ("../test/2.mp4", "leaves", 1)],
    )
    line = json.dumps({"file_name": "2.mp4", "text": "b"})
    (folder / "test" / "metadata.jsonl").write_text(line + "\n")
    return folder


def any_table(root: Path, clips: list[Path]) -> Path:
    """Columns that nobody described; two rows without a video."""
    put(clips[0], root / "v" / "a" / "1.mp4")
    put(clips[1], root / "v" / "b" / "2.webm")
    rows = [
        ("v/a/1.mp4", HOSTILE, "3.5", "x", "A"),
        ("b/2.mp4", "other ending", "", "y", "B"),
        ("../v/a/1.mp4", "leaves", "1", "z", "C"),
        ("v/c/none.mp4", "gone", "1", "z", "D"),
    ]
    header = ("Video_Path", "Beschreibung", "my score", "my label", "my label")
    return write_csv(root / "list.csv", header, rows)
