"""Files of results in a store: fetched once, put together, and several runs at them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from kinema.config.errors import KinemaError
from kinema.curation import result_files
from kinema.curation.files import new_file
from kinema.curation.stage import Found, Part
from kinema.curation.store import ResultStore
from kinema.media.stores import files_below, remove

pytest.importorskip("fsspec")
PART = Part("score", {"score": pa.float64()}, {"version": 1})


@pytest.fixture
def base(tmp_path: Path) -> str:
    return f"memory://{tmp_path.name}"


def result(number: int) -> tuple[str, str, Found]:
    return f"{number:032x}", f"id-{number}", {"score": number / 2}


def files(base: str) -> list[str]:
    return list(files_below(f"{base}/{PART.name}/{PART.key}"))


def scores(store: ResultStore, count: int) -> list[float | None]:
    known = store.known(PART)
    places = known.find(np.array([result(n)[0] for n in range(count)], "S32"))
    found: list[float | None] = known.take(places, ["score"]).column("score").to_pylist()
    return found


def test_two_runs_at_once_lose_nothing(base: str) -> None:
    one, other = ResultStore(base), ResultStore(base)
    one.keep(PART, [result(0), result(1)])
    other.keep(PART, [result(2)])
    assert scores(other, 3) == [None, None, 1.0]
    assert scores(one, 3) == [0.0, 0.5, 1.0]
    one.close()  # puts the other's file into its own
    assert len(files(base)) == 1
    other.keep(PART, [result(1), result(3)])
    assert scores(other, 4) == [0.0, 0.5, 1.0, 1.5]
    other.close()
    assert len(files(base)) == 1
    with ResultStore(base) as third:
        assert scores(third, 4) == [0.0, 0.5, 1.0, 1.5]
        assert len(third.known(PART)) == 4


def test_files_that_are_put_together_while_they_are_read(
    base: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        writer = ResultStore(base)
        writer.keep(PART, [result(number)])
        writer.__exit__(RuntimeError, RuntimeError("killed"), None)
    assert len(files(base)) == 2
    real = result_files.read_bytes

    def joined_first(url: str) -> bytes:
        monkeypatch.setattr(result_files, "read_bytes", real)
        other = ResultStore(base)
        other.keep(PART, [result(2)])
        other.close()
        return real(url)

    monkeypatch.setattr(result_files, "read_bytes", joined_first)
    with ResultStore(base) as store:
        assert scores(store, 3) == [0.0, 0.5, 1.0]
    assert len(files(base)) == 1


def test_files_that_never_stay_are_named(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ResultStore(base)
    writer.keep(PART, [result(0)])
    writer.close()

    def gone(url: str) -> bytes:
        raise FileNotFoundError(url)

    monkeypatch.setattr(result_files, "read_bytes", gone)
    with ResultStore(base) as store, pytest.raises(KinemaError, match="come and go") as caught:
        store.known(PART)
    assert caught.value.where == f"{base}/{PART.name}/{PART.key}"


def test_a_file_is_fetched_once(base: str, monkeypatch: pytest.MonkeyPatch) -> None:
    writer = ResultStore(base)
    writer.keep(PART, [result(0)])
    writer.close()
    fetched: list[str] = []
    real = result_files.read_bytes
    monkeypatch.setattr(result_files, "read_bytes", lambda url: (fetched.append(url), real(url))[1])
    with ResultStore(base) as store:
        for _ in range(3):
            assert scores(store, 1) == [0.0]
        store.keep(PART, [result(1)])
        assert scores(store, 2) == [0.0, 0.5]
    assert len(fetched) == 1  # its own file never


def test_a_damaged_file_is_named_as_it_is_in_the_store(base: str) -> None:
    writer = ResultStore(base)
    writer.keep(PART, [result(0)])
    writer.close()
    (name,) = files(base)
    url = f"{base}/{PART.name}/{PART.key}/{name}"
    with new_file(url) as file:
        file.write_bytes(b"no table")
    with pytest.raises(KinemaError, match="is damaged") as caught, ResultStore(base) as store:
        store.known(PART)
    assert caught.value.where == url
    remove(url)
    with ResultStore(base) as store:
        assert scores(store, 1) == [None]
