"""Videos, images and manifests in stores: a real S3 server on loopback, and fsspec's memory."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from kinema.data.manifest import Manifest
from kinema.media import stores
from kinema.media.clip import load_clip
from kinema.media.errors import MediaError
from kinema.media.pool import DecodePool
from kinema.media.probe import probe
from kinema.media.read import read_frames
from kinema.media.stores import StoreError, is_url, join, open_place, parent, read_bytes, upload
from kinema.media.write import write_image, write_video
from tests.s3_fixture import S3Store

FRAMES = np.repeat(np.arange(0, 240, 24, dtype=np.uint8)[:, None, None, None], 3, 3)
FRAMES = np.ascontiguousarray(np.broadcast_to(FRAMES, (10, 48, 64, 3)))


@pytest.fixture(scope="module")
def bucket(s3: S3Store) -> str:
    """URL of a folder in an S3 store on this machine."""
    return f"{s3.bucket('videos')}/set"


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("local")
    write_video(folder / "clip.mp4", FRAMES, 8.0)
    write_image(folder / "still.png", FRAMES[3])
    (folder / "cut.mp4").write_bytes((folder / "clip.mp4").read_bytes()[:300])
    return folder


@pytest.fixture(scope="module")
def filled(bucket: str, local: Path) -> str:
    for file in local.iterdir():
        upload(file, f"{bucket}/{file.name}")
    return bucket


def test_names_of_places() -> None:
    assert is_url("s3://a/b.mp4")
    assert not is_url("a/b.mp4")
    assert not is_url(Path("s3://a/b.mp4"))
    assert not is_url("c:/b.mp4")
    assert join("s3://a/b/", "c.mp4") == "s3://a/b/c.mp4"
    assert join("s3://a", "s3://x/c.mp4") == "s3://x/c.mp4"
    assert join("s3://a", "/x/c.mp4") == Path("/x/c.mp4")
    assert join(Path("a"), "c.mp4") == Path("a/c.mp4")
    assert parent("s3://a/b/c.mp4") == "s3://a/b"
    assert stores.suffix("s3://a/B.MP4") == ".mp4"


def test_a_video_in_a_store_reads_as_here(filled: str, local: Path) -> None:
    assert probe(f"{filled}/clip.mp4") == probe(local / "clip.mp4")
    assert probe(f"{filled}/still.png") == probe(local / "still.png")
    there = read_frames(f"{filled}/clip.mp4", [7, 2])
    assert np.array_equal(there, read_frames(local / "clip.mp4", [7, 2]))


def test_a_large_file_is_read_in_blocks(
    filled: str, local: Path, s3: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "WHOLE_BYTES", 100)
    stores._fetched.clear()
    there = read_frames(f"{filled}/clip.mp4", [9, 0])
    assert np.array_equal(there, read_frames(local / "clip.mp4", [9, 0]))
    assert not stores._fetched


def test_a_file_that_changes_in_the_store_is_fetched_again(filled: str, local: Path) -> None:
    upload(local / "clip.mp4", f"{filled}/changing.mp4")
    first = read_bytes(f"{filled}/changing.mp4")
    upload(local / "still.png", f"{filled}/changing.mp4")
    assert first == (local / "clip.mp4").read_bytes()
    assert read_bytes(f"{filled}/changing.mp4") == (local / "still.png").read_bytes()


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("s3://videos/set/gone.mp4", "missing"),
        ("s3://no-such-bucket/clip.mp4", "missing"),
        ("s3://videos/set/cut.mp4", "truncated"),
    ],
)
def test_what_is_wrong_with_a_file_in_a_store(filled: str, url: str, reason: str) -> None:
    with pytest.raises(MediaError) as caught:
        probe(url)
    assert caught.value.reason == reason
    assert url in str(caught.value)


def test_unknown_protocols_and_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StoreError, match="nosuch"):
        open_place("nosuch://a/b.mp4")
    monkeypatch.setitem(__import__("sys").modules, "fsspec", None)
    with pytest.raises(StoreError, match=r"kinema\[stores\]"):
        open_place("s3://a/b.mp4")


def test_decode_workers_read_from_stores(filled: str, local: Path) -> None:
    call = (range(8), (24, 32))
    with DecodePool(1, 60.0) as pool:
        there = pool.submit(load_clip, f"{filled}/clip.mp4", *call).result()
    assert np.array_equal(there, load_clip(local / "clip.mp4", *call))


@pytest.mark.parametrize("ending", [".csv", ".parquet"])
def test_a_manifest_in_a_store(
    filled: str, local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    columns = {"path": ["clip.mp4"], "text": ["grey"], "num_frames": [10], "height": [48]}
    manifest = Manifest.from_columns(columns | {"width": [64], "fps": [8.0]}, filled)
    url = f"{filled}/manifest{ending}"
    manifest.write(url)
    again = Manifest.read(url)
    assert again.fingerprint == manifest.fingerprint
    assert again.absolute_path(0) == f"{filled}/clip.mp4"
    assert read_frames(again.absolute_path(0), [0]).shape == (1, 48, 64, 3)

    # Written elsewhere, its paths still mean the same files; it is read anew when it changes.
    again.write(tmp_path / f"here{ending}")
    here = Manifest.read(tmp_path / f"here{ending}")
    assert here.absolute_path(0) == f"{filled}/clip.mp4"
    columns |= {"text": ["another caption"], "width": [64], "fps": [8.0]}
    Manifest.from_columns(columns, filled).write(url)
    assert Manifest.read(url).text(0) == "another caption"
    assert not [name for name in os.listdir(tmp_path / "kinema/tables") if name.endswith(".tmp")]


def test_a_manifest_that_is_not_in_the_store(filled: str) -> None:
    from kinema.config.errors import KinemaError

    with pytest.raises(KinemaError, match="does not exist"):
        Manifest.read(f"{filled}/none.parquet")


@pytest.mark.parametrize("name", ["a b#1?[x]*%41é.mp4", "a::b.mp4", "x=1/y.mp4"])
def test_any_name_is_a_name(bucket: str, local: Path, s3: S3Store, name: str) -> None:
    upload(local / "clip.mp4", f"{bucket}/odd/{name}")
    assert read_bytes(f"{bucket}/odd/{name}") == (local / "clip.mp4").read_bytes()
    assert name in stores.files_below(f"{bucket}/odd")
    assert name in s3.names(f"{bucket}/odd")


def test_a_bucket_is_not_made_by_writing_to_it(s3: S3Store, local: Path) -> None:
    with pytest.raises(FileNotFoundError, match="bucket"):
        upload(local / "clip.mp4", "s3://a-slip/clip.mp4")
    with pytest.raises(FileNotFoundError):
        stores.files_below("s3://a-slip")


def test_what_a_store_answers_names_the_file(
    filled: str, local: Path, s3: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "refuse", lambda method, path: 403)
    stores._fetched.clear()
    with pytest.raises(PermissionError) as caught:
        read_bytes(f"{filled}/clip.mp4")
    assert caught.value.filename == f"{filled}/clip.mp4"
    with pytest.raises(PermissionError, match="AccessDenied"):
        upload(local / "clip.mp4", f"{filled}/new.mp4")
    with pytest.raises(MediaError) as bad:
        probe(f"{filled}/clip.mp4")
    assert bad.value.reason == "unreadable"


def test_what_passes_is_tried_again(
    filled: str, local: Path, s3: S3Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    refused: set[tuple[str, str]] = set()

    def once(method: str, path: str) -> int:
        again = (method, path) in refused
        refused.add((method, path))
        return 0 if again else 503

    monkeypatch.setattr(s3, "refuse", once)
    stores._fetched.clear()
    upload(local / "clip.mp4", f"{filled}/slow.mp4")
    assert read_bytes(f"{filled}/slow.mp4") == (local / "clip.mp4").read_bytes()
    assert len(refused) == 3  # PUT, HEAD, GET


def test_the_package_of_a_store_is_named() -> None:
    with pytest.raises(StoreError, match="pip install gcsfs"):
        open_place("gs://bucket/clip.mp4")
