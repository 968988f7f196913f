"""The loader gives every rank its clips, in order, and survives bad files."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from kinema.config.errors import KinemaError
from kinema.data import loader as loader_module
from kinema.data.buckets import Bucket, BucketTable
from kinema.data.config import DataConfig
from kinema.data.latent_cache import Latents
from kinema.data.loader import IMAGE_FPS, Batch, ClipKey, Loader
from kinema.data.manifest import Manifest
from kinema.data.order import SampleOrder
from kinema.media.image import read_image
from kinema.media.read import read_frames
from kinema.media.transform import image_resize_crop, resize_crop
from kinema.media.write import write_image, write_video

HEIGHT, WIDTH, FRAMES = 32, 32, 4
VIDEOS, IMAGES = 10, 4


@pytest.fixture(scope="module")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Manifest:
    """Ten videos of 40x48 (12 frames, 16 fps) and four images, all different."""
    root = tmp_path_factory.mktemp("clips")
    generator = np.random.default_rng(0)
    paths = []
    for i in range(VIDEOS):
        coarse = generator.integers(0, 255, (12, 5, 6, 3), np.uint8)
        write_video(root / f"v{i}.mp4", coarse.repeat(8, 1).repeat(8, 2), fps=16)
        paths.append(f"v{i}.mp4")
    for i in range(IMAGES):
        write_image(root / f"i{i}.png", generator.integers(0, 255, (40, 48, 3), np.uint8))
        paths.append(f"i{i}.png")
    count = len(paths)
    columns: dict[str, Any] = {
        "path": paths,
        "text": [f"clip {p}" for p in paths],
        "num_frames": [12] * VIDEOS + [1] * IMAGES,
        "height": [40] * count,
        "width": [48] * count,
        "fps": [16.0] * VIDEOS + [float("nan")] * IMAGES,
    }
    return Manifest.from_columns(columns, root)


def config(**changes: Any) -> DataConfig:
    buckets = {f"{WIDTH}x{HEIGHT}": {1: (1.0, 3), FRAMES: (1.0, 4)}}
    return replace(DataConfig(buckets=buckets, num_workers=2), **changes)


def make_loader(clips: Manifest, settings: DataConfig, *, world_size: int = 1, **kw: Any) -> Loader:
    order = SampleOrder(
        clips,
        BucketTable.from_config(settings),
        lambda bucket: float(bucket.frames),
        seed=kw.pop("seed", 5),
        world_size=world_size,
        accumulation=kw.pop("accumulation", 1),
    )
    return Loader(clips, settings, order, **kw)


def batches(clips: Manifest, settings: DataConfig, epoch: int = 0, **kw: Any) -> list[Batch]:
    with make_loader(clips, settings, **kw) as loader:
        return list(loader.epoch(epoch))


def same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x.video, y.video) and x.rows.tolist() == y.rows.tolist() and x.text == y.text
        for x, y in zip(a, b, strict=True)
    )


@pytest.fixture(scope="module")
def whole(clips: Manifest) -> list[Batch]:
    return batches(clips, config())


def test_every_row_once_in_the_shape_of_its_bucket(clips: Manifest, whole: list[Batch]) -> None:
    rows = np.concatenate([b.rows for b in whole])
    assert sorted(rows.tolist()) == list(range(VIDEOS + IMAGES))
    for batch in whole:
        count = len(batch.rows)
        shape = (count, 3, batch.num_frames, HEIGHT, WIDTH)
        assert batch.video.shape == shape
        assert batch.video.dtype == torch.float32
        assert -1 <= float(batch.video.min()) < float(batch.video.max()) <= 1
        assert batch.text == [clips.text(int(r)) for r in batch.rows]
        assert (batch.height, batch.width, batch.weight) == (HEIGHT, WIDTH, 1.0)
        assert not batch.empty
        assert batch.skipped == []
        want = 16.0 if batch.num_frames > 1 else IMAGE_FPS
        assert batch.fps.tolist() == [want] * count


def test_the_rate_told_is_that_of_the_frames_or_of_the_file(clips: Manifest) -> None:
    for told, want in ((False, 8.0), (True, 16.0)):
        settings = config(frame_interval=2, tell_source_fps=told)
        rates = {
            float(fps)
            for batch in batches(clips, settings)
            for fps in batch.fps
            if batch.num_frames > 1
        }
        assert rates == {want}
    with pytest.raises(ValueError, match="tell_source_fps"):
        config(tell_source_fps=True)


def test_pixels_are_those_of_the_file(clips: Manifest, whole: list[Batch]) -> None:
    for batch in whole:
        for row, video in zip(batch.rows.tolist(), batch.video, strict=True):
            path = clips.absolute_path(row)
            if path.suffix == ".png":
                want = image_resize_crop(read_image(path), (HEIGHT, WIDTH))
                assert np.array_equal(video.numpy(), want)
                continue
            everything = resize_crop(read_frames(path), (HEIGHT, WIDTH))
            starts = [
                s for s in range(9) if np.array_equal(everything[:, s : s + FRAMES], video.numpy())
            ]
            assert len(starts) == 1, "four consecutive frames"


def test_known_clips_are_not_decoded_and_everything_else_stays(
    clips: Manifest, whole: list[Batch]
) -> None:
    known = {key for batch in whole for key in batch.keys if key.row % 3}
    found = batches(clips, config(), known=known)
    assert len(found) == len(whole)
    for batch, full in zip(found, whole, strict=True):
        assert (batch.keys, batch.text, batch.skipped) == (full.keys, full.text, [])
        assert batch.rows.tolist() == [key.row for key in batch.keys] == full.rows.tolist()
        assert torch.equal(batch.fps, full.fps)
        assert batch.decoded == tuple(row % 3 == 0 for row in batch.rows)
        assert all(full.decoded)
        assert torch.equal(batch.video, full.video[list(batch.decoded)])


def test_the_same_key_is_the_same_video(clips: Manifest, whole: list[Batch]) -> None:
    seen: dict[ClipKey, torch.Tensor] = {}
    again = 0
    for batch in whole + [b for epoch in (1, 2) for b in batches(clips, config(), epoch=epoch)]:
        for key, video in zip(batch.keys, batch.video, strict=True):
            again += key in seen
            assert torch.equal(seen.setdefault(key, video), video)
    assert again > IMAGES, "pictures come again each epoch, crops of clips now and then"
    assert len(seen) > VIDEOS + IMAGES


def test_crops_differ_between_epochs_and_seeds_and_nothing_else(
    clips: Manifest, whole: list[Batch]
) -> None:
    assert same(batches(clips, config(num_workers=1)), whole)

    def by_row(found: list[Batch]) -> dict[int, torch.Tensor]:
        return {int(r): v for b in found for r, v in zip(b.rows, b.video, strict=True)}

    first = by_row(whole)
    for other in (batches(clips, config(), epoch=1), batches(clips, config(), seed=6)):
        found = by_row(other)
        assert found.keys() == first.keys()
        moved = [r for r in range(VIDEOS) if not torch.equal(found[r], first[r])]
        assert len(moved) >= 3, "starts are drawn anew"
    # On two ranks the same rows get the same crops.
    parts = [batches(clips, config(), world_size=2, rank=r) for r in (0, 1)]
    together = by_row(parts[0]) | by_row(parts[1])
    assert all(torch.equal(together[r], first[r]) for r in first)


def test_starting_in_the_middle_gives_the_rest(clips: Manifest, whole: list[Batch]) -> None:
    with make_loader(clips, config()) as loader:
        assert same(list(loader.epoch(0, start_step=2)), whole[2:])
        assert same(list(loader.epoch(0)), whole), "a loader serves several epochs"


def test_frame_interval_spreads_the_frames_and_divides_the_rate(clips: Manifest) -> None:
    for batch in batches(clips, config(frame_interval=2)):
        if batch.num_frames > 1:
            assert batch.fps.tolist() == [8.0] * len(batch.rows)
            path = clips.absolute_path(int(batch.rows[0]))
            everything = resize_crop(read_frames(path), (HEIGHT, WIDTH))
            video = batch.video[0].numpy()
            # As in 1.2, the last of the evenly spread frames falls on the window's last frame.
            starts = [
                s
                for s in range(5)
                if np.array_equal(everything[:, [s, s + 2, s + 4, s + 7]], video)
            ]
            assert len(starts) == 1


@pytest.fixture
def damaged(clips: Manifest, tmp_path: Path) -> Manifest:
    """The clips, with two of the files gone bad."""
    for i in range(len(clips)):
        target = tmp_path / clips.path(i)
        target.write_bytes(clips.absolute_path(i).read_bytes())
    (tmp_path / "v3.mp4").write_text("no video any more")
    (tmp_path / "i1.png").unlink()
    return Manifest(clips.table, tmp_path)


def test_bad_files_are_left_out_and_named(damaged: Manifest, whole: list[Batch]) -> None:
    with make_loader(damaged, config()) as loader:
        found = list(loader.epoch(0))
        assert len(loader.skipped) == 2
    bad = {damaged.path(s.row): s.reason for b in found for s in b.skipped}
    assert bad == {"v3.mp4": "not_media", "i1.png": "missing"}
    for good, batch in zip(whole, found, strict=True):
        lost = [s.row for s in batch.skipped]
        keep = [i for i, r in enumerate(good.rows.tolist()) if r not in lost]
        assert batch.rows.tolist() == good.rows[keep].tolist()
        assert torch.equal(batch.video, good.video[keep])
        assert len(batch.text) == len(batch.fps) == len(keep)


def test_a_micro_batch_without_any_good_row_is_empty(damaged: Manifest) -> None:
    one_by_one = config(buckets={f"{WIDTH}x{HEIGHT}": {1: (1.0, 1), FRAMES: (1.0, 1)}})
    found = batches(damaged, one_by_one)
    empty = [b for b in found if b.empty]
    assert len(empty) == 2
    assert all(len(b.skipped) == 1 and len(b.video) == 0 and b.text == [] for b in empty)
    assert len(found) == VIDEOS + IMAGES, "the step is still taken"


def test_too_many_bad_files_stop_the_run_by_name(damaged: Manifest) -> None:
    with (
        make_loader(damaged, config(max_bad_fraction=0.01), rank=0) as loader,
        pytest.raises(KinemaError, match="max_bad_fraction") as caught,
    ):
        list(loader.epoch(0))
    assert "v3.mp4" in str(caught.value)
    assert "i1.png" in str(caught.value)
    with make_loader(damaged, config(max_bad_fraction=0.02)) as loader:
        list(loader.epoch(0))  # 2 of what counts as 100


def test_a_file_that_hangs_is_skipped(clips: Manifest, monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.unit.media.worker_calls import spin

    def submit(self: Any, function: Any, path: Path, *args: Any) -> Any:
        if path.name == "v2.mp4":
            function, args = spin, ()
        return original(self, function, path, *args)

    original = loader_module.DecodePool.submit
    monkeypatch.setattr(loader_module.DecodePool, "submit", submit)
    found = batches(clips, config(decode_timeout_s=4.0))
    assert [(s.path, s.reason) for b in found for s in b.skipped] == [("v2.mp4", "timeout")]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """Rows of each micro-batch as it is started."""
    sizes: list[int] = []
    original = Loader._start

    def start(self: Loader, micro: Any, epoch: int) -> Any:
        sizes.append(len(micro.rows))
        return original(self, micro, epoch)

    monkeypatch.setattr(Loader, "_start", start)
    return sizes


def test_only_so_much_is_decoded_ahead(
    clips: Manifest, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    one_by_one = config(buckets={f"{WIDTH}x{HEIGHT}": {1: (1.0, 1), FRAMES: (1.0, 1)}})
    monkeypatch.setattr(loader_module, "AHEAD", 3)
    with make_loader(clips, one_by_one) as loader:
        coming = loader.epoch(0)
        for taken in range(1, 6):
            next(coming)
            assert len(started) == taken + 2
        monkeypatch.setattr(loader_module, "AHEAD_BYTES", 1)
        before = len(started)
        next(coming)
        assert len(started) == before, "no room for more bytes"
        assert len(list(coming)) == VIDEOS + IMAGES - 6, "one at a time always goes"


def test_pixels_do_not_limit_how_many_latents_are_read_ahead(
    clips: Manifest, started: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Zeros:
        def start(self, row: int, bucket: Bucket, unit: float) -> int:
            return 0

        def read(self, row: int, bucket: Bucket, start: int) -> Latents:
            return np.zeros((4, 1, 2, 2), np.float32), np.ones((4, 1, 2, 2), np.float32)

    monkeypatch.setattr(loader_module, "AHEAD_BYTES", 1)
    one_by_one = config(buckets={f"{WIDTH}x{HEIGHT}": {1: (1.0, 1), FRAMES: (1.0, 1)}})
    with make_loader(clips, one_by_one, latents=Zeros()) as loader:
        next(loader.epoch(0))
        assert len(started) == loader_module.AHEAD


def test_micro_batches_of_a_step_come_one_after_the_other(clips: Manifest) -> None:
    with make_loader(clips, config(), accumulation=2) as loader:
        epoch = loader._order.epoch(0)
        found = list(loader.epoch(0, start_step=1))
        want = [epoch.micro_batch(s, 0, m).rows for s in range(1, epoch.num_steps) for m in (0, 1)]
    assert [b.rows.tolist() for b in found] == [w.tolist() for w in want]


def test_moving_a_batch_keeps_what_it_says(whole: list[Batch]) -> None:
    moved = whole[0].to("meta")
    assert moved.video.device.type == moved.fps.device.type == "meta"
    assert moved.text == whole[0].text


def test_what_is_kept_of_a_batch_holds_no_pixels(whole: list[Batch]) -> None:
    batch = replace(whole[0], latents=(whole[0].video, whole[0].video))
    kept = batch.without_pixels()
    assert kept.video.untyped_storage().nbytes() == 0
    assert kept.latents is None
    assert kept.rows is batch.rows
    assert kept.text == batch.text
