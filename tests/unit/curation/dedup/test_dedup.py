"""Duplicates and concepts of clips with known truth; nothing depends on the order of rows."""

from __future__ import annotations

import io
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from kinema.config.errors import KinemaError
from kinema.curation.config import DedupConfig
from kinema.curation.dedup import dedup, dedup_rules, semantic
from kinema.curation.dedup.near import POPULAR, Frames, distances, equal_clips, near_pairs
from kinema.curation.dedup.semantic import cluster, concepts, similar_pairs, vectors_of
from kinema.curation.dedup.stars import Pairs, stars
from kinema.curation.look.hashes import phash
from kinema.data.filter import apply_rules, parse_rules

CONFIG = DedupConfig()
Words = NDArray[np.uint64]


def text(words: Words) -> str:
    return " ".join(f"{int(word):016x}" for word in words)


def flipped(words: Words, bits: int, random: np.random.Generator) -> Words:
    """Each hash with that many different bits turned round."""
    found = words.copy()
    for i in range(len(found)):
        for bit in random.choice(64, bits, replace=False):
            found[i] ^= np.uint64(1) << np.uint64(bit)
    return found


def clip(frames: int, random: np.random.Generator) -> Words:
    """Hashes of a shot: each frame differs from the first by a few bits."""
    first = random.integers(0, 2**64, 1, np.uint64)
    return flipped(np.repeat(first, frames), 5, random)


def table(clips: list[Words | None], **columns: list[object]) -> pa.Table:
    count = len(clips)
    base: dict[str, object] = {
        "id": [f"{i:032x}" for i in range(count)],
        "phash": [None if words is None else text(words) for words in clips],
        "resolution": [1000] * count,
        "duration": [4.0] * count,
    }
    return pa.table(base | columns)


def kept_of(result: pa.Table, column: str = "duplicate_of") -> list[int | None]:
    return [int(value, 16) if value else None for value in result[column].to_pylist()]


@pytest.fixture
def random() -> np.random.Generator:
    return np.random.default_rng(5)


def test_near_copies_are_found_and_others_are_not(random: np.random.Generator) -> None:
    a, b = clip(16, random), clip(16, random)
    clips = [
        a,
        flipped(a, 4, random),  # another encoding
        flipped(a[1:], 2, random),  # cut half a second later
        flipped(np.concatenate([clip(2, random), a[:-2]]), 1, random),  # and one second earlier
        flipped(a, 9, random),  # too far
        a[:8],  # half of it only
        b,
        b,  # the same file again
    ]
    result = dedup(table(clips), None, CONFIG)
    assert kept_of(result) == [None, 0, 0, 0, None, None, None, 6]
    distance = result["hash_distance"].to_pylist()
    assert distance[1] == 4
    assert distance[2] == 2
    assert distance[3] == 1
    assert distance[7] == 0
    assert distance[0] is None


def test_the_threshold_is_only_a_setting(random: np.random.Generator) -> None:
    a = clip(12, random)
    clips = table([a, flipped(a, 4, random), flipped(a, 2, random)])
    for most, kept in ((6, [None, 0, 0]), (3, [None, None, 0]), (1, [None, None, None])):
        assert kept_of(dedup(clips, None, replace(CONFIG, hash_distance=most))) == kept


def test_the_best_one_is_kept(random: np.random.Generator) -> None:
    a = clip(8, random)
    clips = table([a] * 5, resolution=[10, 30, 30, 30, 20], duration=[5.5, 4.0, 5.0, 5.0, 5.5])
    assert kept_of(dedup(clips, None, CONFIG)) == [2, 2, None, 2, 2]
    clips = table(
        [a] * 3, resolution=[None] * 3, height=[10, 20, 10], width=[20, 10, 21],
        duration=[1.0, None, 1.0],
    )  # fmt: skip
    assert kept_of(dedup(clips, None, CONFIG)) == [2, 2, None]


def test_clips_of_other_lengths_are_no_duplicates(random: np.random.Generator) -> None:
    a = clip(5, random)
    near = flipped(a, 2, random)
    seconds = [4.0, 8.0, 4.2, 8.0, 3.0, None, 8.0]
    clips = table([a, a, near, near, a, a, near], duration=seconds)
    # Best first: 1, 3, 6 (8 s), 2, 0, 4, then 5, whose length is not known.
    assert kept_of(dedup(clips, None, CONFIG)) == [2, None, None, 1, 2, 1, 1]


def test_a_chain_of_small_steps_is_not_one_cluster(random: np.random.Generator) -> None:
    steps = [clip(8, random)]
    for _ in range(3):  # each 5 bits further from the first
        steps.append(steps[-1] ^ (np.uint64(0b11111) << np.uint64(5 * len(steps))))
    result = dedup(table(steps), None, CONFIG)
    assert kept_of(result) == [None, 0, None, 2]


def test_clips_without_hashes_have_no_duplicates() -> None:
    clips = table([None, None, np.zeros(0, np.uint64)])
    assert kept_of(dedup(clips, None, CONFIG)) == [None] * 3
    without = dedup(clips.drop_columns(["phash"]), None, CONFIG)
    assert kept_of(without) == [None] * 3


def test_rows_may_come_in_any_order(random: np.random.Generator) -> None:
    shots = [clip(int(random.integers(3, 20)), random) for _ in range(60)]
    copies = [flipped(shots[i], 3, random) for i in random.integers(0, 60, 40)]
    vectors = random.normal(size=(100, 16)).astype(np.float32)
    vectors[60:] = vectors[random.integers(0, 60, 40)] + 0.05 * random.normal(size=(40, 16))
    clips = table(
        [*shots, *copies], aesthetic=random.normal(5, 1, 100).round(1).tolist(),
        resolution=random.integers(1, 4, 100).tolist(),
    )  # fmt: skip
    embeddings = pa.array(list(vectors))
    config = replace(CONFIG, concepts=5, concept_cap=3)
    result = dedup(clips, embeddings, config)
    assert sum(kept is not None for kept in kept_of(result)) >= 38
    for _ in range(3):
        order = pa.array(random.permutation(100))
        again = dedup(clips.take(order), embeddings.take(order), config)
        assert again.equals(result.take(order))


def test_every_duplicate_names_a_kept_clip_that_is_near(random: np.random.Generator) -> None:
    seeds = [clip(6, random) for _ in range(8)]
    clips = [flipped(seeds[i % 8], int(random.integers(0, 5)), random) for i in range(200)]
    result = dedup(table(clips), None, CONFIG)
    kept = kept_of(result)
    frames = Frames.parse(result["phash"])
    for row, centre in enumerate(kept):
        if centre is not None:
            assert kept[centre] is None
            assert distances(frames, np.array([centre]), np.array([row]))[0] <= 6
    originals = [row for row, centre in enumerate(kept) if centre is None]
    one, other = np.triu_indices(len(originals), 1)
    apart = distances(frames, np.array(originals)[one], np.array(originals)[other])
    assert (apart > 5).all()  # nothing but pairs at the very threshold was missed


def test_as_all_pairs_compared(random: np.random.Generator) -> None:
    """Of pairs within the threshold nearly all are found (99 % here), and no others."""
    shots = [clip(int(random.integers(4, 25)), random) for _ in range(700)]
    copies = [flipped(shots[i], int(random.integers(0, 8)), random) for i in range(300)]
    frames = Frames.parse(table([*shots, *copies])["phash"])
    one, other = np.triu_indices(1000, 1)
    truth = distances(frames, one, other) <= 6
    expected = set(zip(one[truth].tolist(), other[truth].tolist(), strict=True))
    found = near_pairs(frames, 6)
    pairs = set(zip(found.first.tolist(), found.second.tolist(), strict=True))
    assert pairs <= expected
    assert len(expected) > 230
    assert len(pairs) >= 0.99 * len(expected)


def test_a_black_frame_in_every_clip_costs_nothing_and_hides_nothing(
    random: np.random.Generator,
) -> None:
    count = 3 * POPULAR
    clips: list[Words | None] = []
    for _ in range(count):
        words = clip(10, random)
        words[[0, 9]] = 0
        clips.append(words)
    clips += [np.where(words == 0, words, flipped(words, 3, random)) for words in clips[:50]]
    kept = kept_of(dedup(table(clips), None, CONFIG))
    assert kept[:count] == [None] * count
    assert kept[count:] == list(range(50))


def test_thousands_of_equal_clips_are_one(random: np.random.Generator) -> None:
    clips = [np.zeros(8, np.uint64)] * 5000
    kept = kept_of(dedup(table(clips), None, CONFIG))
    assert kept[0] is None
    assert set(kept[1:]) == {0}


def test_what_takes_no_part(random: np.random.Generator) -> None:
    a = clip(8, random)
    clips = table([a, a, a])
    among = np.array([False, True, True])
    embeddings = pa.array([[1.0, 0.0]] * 3)
    result = dedup(clips, embeddings, replace(CONFIG, concepts=1), among=among)
    assert kept_of(result) == [None, None, 1]
    assert result["concept"].to_pylist() == [None, 0, 0]


def test_few_clips_or_none(random: np.random.Generator) -> None:
    clips = table([clip(5, random)] * 2)
    embeddings = pa.array([[1.0, 0.0]] * 2)
    config = replace(CONFIG, concepts=3)
    for count in (0, 1):
        result = dedup(clips.slice(0, count), embeddings.slice(0, count), config)
        assert result.num_rows == count
        assert set(result.column_names) >= {"duplicate_of", "similar_to", "concept_rank"}
    nobody = dedup(clips, embeddings, config, among=np.zeros(2, bool))
    assert kept_of(nobody) == [None, None]
    assert nobody["concept_rank"].null_count == 2
    without = dedup(clips, pa.nulls(2, pa.list_(pa.float32())), config)
    assert kept_of(without) == [None, 0]


def test_wrong_input_is_named() -> None:
    clips = table([np.zeros(2, np.uint64)] * 3)
    phash = pa.array(["0" * 16, "0" * 16 + " 12g4", "0" * 16])
    with pytest.raises(KinemaError, match=r"row 1: .*'12g4', not 16 hex digits"):
        dedup(clips.set_column(1, "phash", phash), None, CONFIG)
    phash = pa.array(["0" * 16, "0" * 16, "0" * 15 + "x"])
    with pytest.raises(KinemaError, match=r"row 2"):
        dedup(clips.set_column(1, "phash", phash), None, CONFIG)
    with pytest.raises(KinemaError, match="there twice"):
        dedup(clips.set_column(0, "id", pa.array(["a", "b", "a"])), None, CONFIG)
    with pytest.raises(KinemaError, match="different lengths"):
        dedup(clips, pa.array([[1.0], [1.0, 2.0], None]), CONFIG)
    with pytest.raises(KinemaError, match="zero or not finite"):
        dedup(clips, pa.array([[1.0], [0.0], None]), CONFIG)


def test_hex_is_read_in_chunks_and_slices(random: np.random.Generator) -> None:
    clips = [clip(int(n), random) for n in random.integers(0, 5, 30)]
    column = table([*clips])["phash"]
    chunked = pa.chunked_array([column.chunk(0).slice(0, 7), column.chunk(0).slice(7)])
    for frames in (Frames.parse(column), Frames.parse(chunked)):
        assert frames.words.tolist() == np.concatenate(clips).tolist()
        assert frames.lengths.tolist() == [len(words) for words in clips]
    same = equal_clips(Frames.parse(table([clips[1], None, None, clips[1]])["phash"]))
    assert same.tolist() == [0, 1, 2, 0 if len(clips[1]) else 3]


def test_stars() -> None:
    pairs = Pairs(np.array([0, 1, 2, 0]), np.array([1, 2, 3, 3]), np.array([1.0, 1.0, 1.0, 3.0]))
    centre, distance = stars(4, pairs)
    assert centre.tolist() == [-1, 0, -1, 2]  # 2 is near a duplicate only; 3 goes to the nearer
    assert distance[1:].tolist()[0::2] == [1.0, 1.0]
    assert stars(2, Pairs(np.zeros(0, int), np.zeros(0, int), np.zeros(0)))[0].tolist() == [-1, -1]


# Pictures.


def scene(random: np.random.Generator, size: int = 96) -> NDArray[np.float64]:
    """A grey picture larger than the frame, of smooth shapes: 0..255."""
    coarse = Image.fromarray(random.uniform(0, 255, (9, 9)).astype(np.uint8))
    fine = Image.fromarray(random.uniform(0, 255, (40, 40)).astype(np.uint8))
    pictures = [
        np.asarray(part.resize((2 * size, 2 * size), Image.Resampling.BICUBIC), np.float64)
        for part in (coarse, fine)
    ]
    return 0.75 * pictures[0] + 0.25 * pictures[1]


def shots(picture: NDArray[np.float64], speed: float, start: float = 0.0) -> list[Image.Image]:
    """Five frames of a camera that pans over it, `speed` pixels a second for 5 s."""
    found = []
    for second in np.arange(5) + 0.5 + start:
        x = int(speed * second)
        found.append(Image.fromarray(picture[:96, x : x + 96].clip(0, 255).astype(np.uint8)))
    return found


def hashed(frames: list[Image.Image]) -> Words:
    return np.array([phash(np.asarray(frame)) for frame in frames], np.uint64)


def recoded(frame: Image.Image) -> Image.Image:
    """Smaller, paler, and through a poor JPEG."""
    file = io.BytesIO()
    small = frame.resize((64, 64)).point(lambda value: int(20 + 0.8 * value))
    small.save(file, "JPEG", quality=25)
    return Image.open(file).resize((80, 80))


def test_copies_of_pictures_are_told_from_other_pictures(random: np.random.Generator) -> None:
    clips: list[Words | None] = []
    for _ in range(40):
        picture, speed = scene(random), float(random.uniform(3, 15))
        clips.append(hashed(shots(picture, speed)))
        clips.append(hashed([recoded(frame) for frame in shots(picture, speed)]))
        clips.append(hashed(shots(picture, speed, start=0.2)))  # cut a little later
        clips.append(hashed([frame.rotate(180) for frame in shots(picture, speed)]))
    kept = kept_of(dedup(table(clips), None, CONFIG))
    for first in range(0, 160, 4):
        assert kept[first] is None
        assert kept[first + 1] == first
        assert kept[first + 3] is None
    # A fast pan is another picture 0.2 s later: the distance says which clips are near.
    first = np.arange(0, 160, 4)
    near = distances(Frames.parse(table(clips)["phash"]), first, first + 2) <= 6
    assert near.sum() >= 25
    shifted = [kept[row + 2] for row in first]
    assert all(shifted[i] == 4 * i for i in np.flatnonzero(near))
    assert all(shifted[i] in (None, 4 * i) for i in np.flatnonzero(~near))


# Embeddings.


def groups(
    count: int, of: int, random: np.random.Generator, channels: int = 24
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Rows around `of` directions, and which one each is around."""
    centres = random.normal(size=(of, channels))
    owner = np.arange(count) % of
    rows = centres[owner] + 0.25 * random.normal(size=(count, channels))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32), owner


def test_concepts_are_the_groups_that_there_are(random: np.random.Generator) -> None:
    vectors, owner = groups(600, 6, random)
    found, cosine = concepts(vectors, 6, seed=1)
    assert len({(int(a), int(b)) for a, b in zip(owner, found, strict=True)}) == 6
    assert cosine.min() > 0.5
    sizes = np.bincount(concepts(vectors[owner != 3][:400], 9, seed=1)[0])
    assert (np.diff(sizes) <= 0).all()  # the largest first
    assert len(cluster(vectors[:3], 10)) == 3
    assert len(cluster(np.repeat(vectors[:1], 5, 0), 3)) == 3
    assert len(concepts(vectors[:0], 3)[0]) == 0


def test_concepts_do_not_depend_on_threads(random: np.random.Generator) -> None:
    vectors, _ = groups(9000, 40, random)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(concepts(vectors, 30, seed=2)[0])
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert (results[0] == results[1]).all()


def test_semantic_duplicates_by_clusters_as_by_all_pairs(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    vectors, _ = groups(3000, 30, random)
    vectors[2700:] = vectors[:300] + 0.01 * random.normal(size=(300, 24))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    exact = similar_pairs(vectors, 0.97)
    monkeypatch.setattr(semantic, "EXACT", 100)
    monkeypatch.setattr(semantic, "CLUSTER_SIZE", 100)
    near = similar_pairs(vectors, 0.97)
    truth = set(zip(exact.first.tolist(), exact.second.tolist(), strict=True))
    found = set(zip(near.first.tolist(), near.second.tolist(), strict=True))
    assert {(i, 2700 + i) for i in range(300)} <= truth
    assert found <= truth
    assert len(found) >= 0.98 * len(truth)
    cosine = vectors @ vectors.T
    assert np.allclose(1 - exact.distance, cosine[exact.first, exact.second], atol=1e-6)
    assert len(truth) == int((np.triu(cosine, 1) >= 0.97).sum())


def test_thousands_that_look_alike_make_no_square(
    random: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(semantic, "NEIGHBOURS", 10)
    vectors = np.ones((500, 8), np.float32) / np.sqrt(8).astype(np.float32)
    pairs = similar_pairs(vectors, 0.9)
    assert len(pairs.first) <= 5000
    assert (stars(500, pairs)[0][1:] == 0).all()


def test_columns_and_rules_together(random: np.random.Generator) -> None:
    vectors = np.eye(4, dtype=np.float32)[[0, 0, 1, 1, 2, 3, 3]]
    vectors[3] += [0.5, 0, 0, 0]
    clips = table(
        [clip(8, random) for _ in range(7)],
        aesthetic=[4.0, 6.0, 5.0, 5.5, None, 5.0, 5.0],
        resolution=[2, 1, 1, 1, 1, 1, 1],
    )
    embeddings = pa.array([*list(vectors[:6]), None])
    config = DedupConfig(similarity=0.95, concepts=2, concept_cap=1)
    result = dedup(clips, embeddings, config)
    assert kept_of(result, "similar_to") == [None, 0, None, None, None, None, None]
    assert result["similarity"].to_pylist() == [None, 1.0, None, None, None, None, None]
    assert result["concept"].to_pylist()[6] is None
    ranks = [r for r in result["concept_rank"].to_pylist() if r is not None]
    assert len(ranks) == 5
    assert ranks.count(1) == 2
    rules = dedup_rules(config, embeddings=True)
    filtered = apply_rules(result, parse_rules(rules))
    assert filtered.dropped_by[1].as_py() == 'filter: similar_to == ""'
    assert filtered.kept == 3  # one of each concept, and the clip without an embedding
    assert dedup_rules(CONFIG, embeddings=False) == ['duplicate_of == ""']
    with pytest.raises(KinemaError, match="concepts need embeddings"):
        dedup_rules(config, embeddings=False)
    with pytest.raises(KinemaError, match="a cap needs concepts"):
        dedup_rules(DedupConfig(concept_cap=3), embeddings=True)
    again = dedup(result, embeddings, config)
    assert again.equals(result)  # columns are replaced


def test_embeddings_of_any_list_type() -> None:
    rows = [[3.0, 4.0], None, [0.0, 2.0]]
    for kind in (
        pa.list_(pa.float32()), pa.large_list(pa.float32()), pa.list_(pa.float16(), 2),
        pa.list_(pa.float64(), 2),
    ):  # fmt: skip
        vectors, has = vectors_of(pa.chunked_array([pa.array(rows, kind), pa.array(rows, kind)]))
        assert has.tolist() == [True, False, True] * 2
        assert np.allclose(vectors, [[0.6, 0.8], [0, 1]] * 2, atol=1e-3)


def test_ranks_in_a_concept(random: np.random.Generator) -> None:
    """The best aesthetic ones first, clips without a score last, duplicates not at all."""
    clips = table([clip(4, random) for _ in range(5)])
    scores = pa.array([5.0, None, 7.0, 6.0, 9.0], pa.float32())
    embeddings = pa.array([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [-1.0, 0.0, 0.0],
                           [1.0, 0.0, 0.0]])  # fmt: skip
    config = replace(CONFIG, concepts=1, concept_cap=2)
    result = dedup(clips.append_column("aesthetic", scores), embeddings, config)
    ids = result["id"].to_pylist()
    assert result["similar_to"].to_pylist() == ["", "", "", "", ids[0]]
    assert result["concept"].to_pylist() == [0] * 5
    assert result["concept_rank"].to_pylist() == [3, 4, 1, 2, None]
    verdict = apply_rules(result, parse_rules(dedup_rules(config, embeddings=True)))
    assert verdict.kept_mask.tolist() == [False, False, True, True, False]


def test_three_quarters_must_lie_beside_each_other() -> None:
    for longer, near in ((4, True), (5, False)):
        frames = Frames.parse(pa.array([text(np.zeros(n, np.uint64)) for n in (longer, 3)]))
        apart = distances(frames, np.array([0]), np.array([1]))[0]
        assert apart == (0 if near else np.inf)
