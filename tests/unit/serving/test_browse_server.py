"""`kinema data browse` over HTTP, by a real server."""

from __future__ import annotations

import io
import json
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pa_parquet
import pytest
from PIL import Image

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.data.tables import write_table
from kinema.media.write import write_image
from kinema.serving.browse.guard import refusal
from kinema.serving.browse.server import PORT, TRIED, bind
from tests.unit.serving.browse_fixtures import XSS, make_clips, served


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("browse")


@pytest.fixture(scope="module")
def site(folder: Path) -> Iterator[httpx.Client]:
    manifest = make_clips(folder / "clips")
    with served(manifest, cache=folder / "cache") as address, httpx.Client(base_url=address) as c:
        yield c


def query(**values: Any) -> dict[str, str]:
    return {"q": json.dumps(values)}


def test_the_table_is_asked_for_by_json(site: httpx.Client) -> None:
    about = site.get("/api/manifest").json()
    assert (about["rows"], about["kept"], about["name"]) == (5, 5, "m.parquet")
    assert {"name": "aesthetic", "kind": "number"} in about["columns"]
    found = site.get("/api/query", params=query(search="red box")).json()
    assert found["total"] == 2
    assert found["hours"] == pytest.approx(2 * 2 / 3600)
    cards = site.get("/api/rows", params=query(sort="aesthetic", descending=True)).json()["cards"]
    assert [card["row"] for card in cards] == [3, 1, 0, 4, 2]
    assert cards[1]["text"] == XSS
    problem = site.get("/api/query", params=query(filter="asthetic > 4"))
    assert problem.status_code == 400
    assert "asthetic" in problem.json()["what"]
    assert site.get("/api/row/5").status_code == 400
    assert site.get("/api/row/-1").status_code == 400


def test_videos_are_served_in_parts_by_row_number(site: httpx.Client, folder: Path) -> None:
    content = (folder / "clips/1.mp4").read_bytes()
    whole = site.get("/media/1/file")
    assert (whole.status_code, whole.content) == (200, content)
    assert whole.headers["content-type"] == "video/mp4"
    part = site.get("/media/1/file", headers={"Range": "bytes=100-199"})
    assert (part.status_code, part.content) == (206, content[100:200])
    assert part.headers["content-range"] == f"bytes 100-199/{len(content)}"
    assert site.get("/media/1/file", headers={"Range": "bytes=9999999-"}).status_code == 416
    for path in ("/media/..%2f..%2fetc%2fpasswd/file", "/media/m.parquet/file", "/page/../app.py",
                 "/page/%2e%2e/app.py"):  # fmt: skip
        assert site.get(path).status_code in (404, 422), path


def test_posters_show_the_clip_and_say_what_is_missing(site: httpx.Client) -> None:
    answer = site.get("/media/2/poster")
    picture = np.asarray(Image.open(io.BytesIO(answer.content)))
    assert picture.shape == (72, 128, 3)
    red = (picture[..., 0] > 200) & (picture[..., 1] < 110)
    assert np.flatnonzero(red.any(0))[0] == pytest.approx(48, abs=3)  # the box in the middle frame
    assert site.get("/media/2/poster").content == answer.content
    gone = site.get("/media/4/poster")
    assert gone.status_code == 404
    assert gone.json()["reason"] == "missing"
    assert site.get("/media/4/file").json()["reason"] == "missing"


def test_other_sites_can_neither_read_nor_write(site: httpx.Client) -> None:
    assert site.get("/api/manifest", headers={"Host": "evil.example"}).status_code == 403
    assert site.get("/media/1/file", headers={"Host": "127.0.0.1.evil.example"}).status_code == 403
    change = {"rows": [3], "marked": True}
    before = site.get("/api/manifest").json()["marked"]
    for headers in (
        {"Origin": "http://evil.example"},
        {"Origin": "null"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
    ):
        kind = {"Content-Type": "application/json"}
        answer = site.post("/api/marks", content=json.dumps(change), headers=kind | headers)
        assert answer.status_code == 403, headers
    assert site.get("/media/0/file", headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert site.get("/api/manifest").json()["marked"] == before
    policy = site.get("/").headers["content-security-policy"]
    assert "script-src 'self'" in policy
    assert "unsafe" not in policy


def test_a_token_is_asked_for_beyond_loopback() -> None:
    assert refusal("GET", {"host": "10.0.0.1:80"}, "secret", "") is not None
    assert refusal("GET", {"host": "10.0.0.1:80"}, "secret", "secret2") is not None
    assert refusal("GET", {"host": "10.0.0.1:80"}, "secret", "secret") is None
    assert refusal("GET", {"host": "x", "cookie": "kinema-browse=secret"}, "secret", "") is None
    assert refusal("GET", {"host": "localhost:1"}, None, "") is None
    assert refusal("GET", {"host": "[::1]:8765"}, None, "") is None


def test_edits_marks_and_exports(folder: Path, site: httpx.Client) -> None:
    clips = folder / "clips"
    before = (clips / "m.parquet").read_bytes()
    assert site.post("/api/text", json={"row": 0, "text": "A box, edited"}).json()["edited"] == 1
    assert site.post("/api/marks", json={"rows": [3, 0], "marked": True}).json()["marked"] == 2
    row = site.get("/api/row/0").json()
    assert (row["text"], row["_original"], row["_marked"]) == (
        "A box, edited", "A red box moves right", True,
    )  # fmt: skip
    assert len((clips / "m.parquet.edits.jsonl").read_text().splitlines()) == 3

    order = {"what": "marked", "name": "chosen.parquet"}
    assert site.post("/api/export", json=order).json()["rows"] == 2
    chosen = Manifest.read(clips / "chosen.parquet")
    assert [chosen.path(k) for k in range(2)] == ["0.mp4", "3.mp4"]
    assert chosen.text(0) == "A box, edited"
    assert chosen.table.schema.field("aesthetic").type == pa.float32()

    again = site.post("/api/export", json=order)
    assert again.status_code == 400
    assert "there already" in again.json()["what"]
    order = {"what": "shown", "name": "chosen.parquet", "replace": True,
             "query": json.dumps({"filter": "aesthetic > 5"})}  # fmt: skip
    assert site.post("/api/export", json=order).json()["rows"] == 2
    assert Manifest.read(clips / "chosen.parquet").text(0) == XSS

    for name in ("../x.csv", "/tmp/x.csv", "a/b.csv", ".hidden.csv", "x.txt", "", "..", "a\\b.csv",
                 "a\x00.csv", "m.parquet"):  # fmt: skip
        refused = site.post("/api/export", json={"what": "shown", "name": name, "replace": True})
        assert refused.status_code == 400, name
    assert (clips / "m.parquet").read_bytes() == before
    assert not (folder / "x.csv").exists()

    table = site.get("/api/download", params={"what": "marked", "ending": "csv"})
    assert 'filename="m.marked.csv"' in table.headers["content-disposition"]
    assert "A box, edited" in table.text
    parquet = site.get("/api/download", params={"ending": "parquet"} | query(search="unicode"))
    assert parquet.status_code == 400
    parquet = site.get("/api/download", params={"ending": "parquet"} | query(search="ÜNÏCODE"))
    assert pa_parquet.read_table(io.BytesIO(parquet.content)).column("text").to_pylist() == [
        "Ünïcode caption"
    ]
    all_marked = site.post("/api/marks", json={"marked": True, "query": "{}"}).json()
    assert all_marked["marked"] == 5
    site.post("/api/text", json={"row": 0, "text": None})
    assert site.get("/api/manifest").json()["edited"] == 0


def test_strips_of_curation_are_used_and_other_files_are_not_served(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    (clips / "frames/ab").mkdir(parents=True)
    strip = np.concatenate([np.full((36, 64, 3), v, np.uint8) for v in (0, 200, 90)])
    Image.fromarray(strip).save(clips / "frames/ab/abcd.jpg", quality=95)
    write_image(clips / "still.png", np.full((40, 60, 3), 77, np.uint8))
    shutil.copy(secret, clips / "notes.txt")
    manifest = make_clips(
        clips,
        id=["abcd", "../../x", "", "x", "y"],
        frames=["frames/ab/abcd.jpg", None, None, str(tmp_path / "clips/still.png"), "../x.jpg"],
        path=["0.mp4", str(secret), "notes.txt", "still.png", "4.mp4"],
        num_frames=[24, 24, 24, 1, 24],
    )
    with served(manifest, cache=tmp_path / "cache") as address:
        picture = Image.open(io.BytesIO(httpx.get(f"{address}/media/0/poster").content))
        assert picture.size == (64, 36)
        assert np.asarray(picture).mean() == pytest.approx(200, abs=3)
        for row in (1, 2):
            for what in ("file", "poster"):
                answer = httpx.get(f"{address}/media/{row}/{what}")
                assert answer.json()["reason"] == "not_media"
        assert httpx.get(f"{address}/media/3/poster").status_code == 200


def test_a_hundred_thousand_rows(tmp_path: Path) -> None:
    rows = 100_000
    random = np.random.default_rng(0)
    table = {
        "path": [f"{k}.mp4" for k in range(rows)],
        "text": [f"a caption of clip {k}, {'a Zebra' if k % 1000 == 0 else 'a horse'}"
                 for k in range(rows)],
        "num_frames": np.full(rows, 48), "height": np.full(rows, 720),
        "width": np.full(rows, 1280), "fps": np.full(rows, 24.0),
        "aesthetic": random.normal(5, 1, rows),
    }  # fmt: skip
    write_table(pa.table(table), tmp_path / "m.parquet")
    with served(tmp_path / "m.parquet", cache=tmp_path / "cache") as address:
        site = httpx.Client(base_url=address)
        assert site.get("/api/query", params=query(search="zebra")).json()["total"] == 100
        asked = query(sort="aesthetic", descending=True, filter="aesthetic < 6")
        end = site.get("/api/rows", params=asked | {"start": "80000", "count": "60"}).json()
        assert len(end["cards"]) == 60
        assert end["total"] == int((table["aesthetic"] < 6).sum())
        histogram = site.get("/api/histogram", params={"column": "aesthetic"} | asked).json()
        assert sum(histogram["all"]) == rows


def test_a_port_that_is_taken() -> None:
    with socket.socket() as first:
        first.bind(("127.0.0.1", 0))
        first.listen()
        with pytest.raises(KinemaError, match="is taken"):
            bind("127.0.0.1", first.getsockname()[1])
    with bind("127.0.0.1", None) as one, bind("127.0.0.1", None) as other:
        ports = {one.getsockname()[1], other.getsockname()[1]}
        assert len(ports) == 2
        assert ports <= set(range(PORT, PORT + TRIED + 1))


def test_a_manifest_that_is_not_there_is_told(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "from kinema.cli.main import main; main()", "data", "browse"]
    run = subprocess.run(
        [*command, str(tmp_path / "none.parquet")], capture_output=True, text=True, check=False
    )
    assert run.returncode == 1
    assert "none.parquet: does not exist" in run.stderr
    assert "Traceback" not in run.stderr


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kinema.cli.data_browse import browse

    for name in [name for name in sys.modules if name.startswith("kinema.serving")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(KinemaError, match=r"package uvicorn.*\n.*kinema\[serve\]"):
        browse(str(tmp_path / "m.csv"))


def test_beyond_loopback_the_address_has_a_token(tmp_path: Path) -> None:
    manifest = make_clips(tmp_path / "clips")
    with served(manifest, "--host", "0.0.0.0", cache=tmp_path / "cache") as address:
        port, token = re.findall(r":(\d+)/\?token=(.+)", address)[0]
        site = httpx.Client(base_url=f"http://127.0.0.1:{port}")
        assert site.get("/api/manifest").status_code == 403
        assert site.get("/media/0/file").status_code == 403
        assert site.get("/api/manifest", params={"token": "x"}).status_code == 403
        assert site.get("/", params={"token": token}).status_code == 200
        assert site.get("/api/manifest").json()["rows"] == 5, "the cookie stands for the token"
        assert site.post("/api/marks", json={"rows": [1], "marked": True}).status_code == 200
