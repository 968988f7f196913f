"""What the page asks the server: JSON for the table, pictures and videos by row number."""

from __future__ import annotations

import asyncio
import json
import mimetypes
import os
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Annotated, Any, Literal

from fastapi import BackgroundTasks, FastAPI, Request
from fastapi.responses import FileResponse, JSONResponse, Response
from fastapi.staticfiles import StaticFiles
from pydantic import BaseModel, Field

from kinema.config.errors import KinemaError
from kinema.data.manifest import Manifest
from kinema.media.errors import MediaError
from kinema.serving.browse.edits import MAX_TEXT, Edits
from kinema.serving.browse.export import selected, target, write_selection
from kinema.serving.browse.guard import Guard
from kinema.serving.browse.posters import Posters
from kinema.serving.browse.query import ClipTable, Query

PAGE = Path(__file__).parent / "page"
MAX_CARDS = 500
MAX_QUERY = 20_000
CARD = ("path", "text", "num_frames", "height", "width", "fps", "dropped_by")
TYPES = {".mp4": "video/mp4", ".m4v": "video/mp4", ".mov": "video/mp4", ".webm": "video/webm",
         ".mkv": "video/x-matroska"}  # fmt: skip
"""What browsers want to hear; QuickTime files mostly play when they are called mp4."""

Asked = Annotated[str, Field(max_length=MAX_QUERY)]


class TextChange(BaseModel):
    """A caption as edited; None takes the edit back."""

    row: int
    text: Annotated[str, Field(max_length=MAX_TEXT)] | None


class MarkChange(BaseModel):
    """Marks on rows, or on all that a query gives."""

    marked: bool
    rows: Annotated[list[int], Field(max_length=10_000)] = []
    query: Asked | None = None


class Export(BaseModel):
    """A selection to write beside the manifest."""

    what: Literal["shown", "marked"]
    name: str
    replace: bool = False
    query: Asked = "{}"


def make_app(
    manifest: Manifest, edits: Edits, posters: Posters, *, token: str | None = None
) -> FastAPI:
    """The application.

    Args:
        token: see `guard.Guard`.
    """

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        posters.close()

    app = FastAPI(lifespan=lifespan, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(Guard, token=token)
    clips = ClipTable(manifest, edits)
    _add_pages(app)
    _add_reading(app, clips)
    _add_media(app, clips, posters)
    _add_writing(app, clips)
    return app


def _add_pages(app: FastAPI) -> None:
    @app.exception_handler(KinemaError)
    async def told(_: Request, error: KinemaError) -> JSONResponse:
        content: dict[str, Any] = {"what": error.what, "where": error.where, "hint": error.hint}
        if isinstance(error, MediaError):
            content["reason"] = error.reason
        return JSONResponse(content, 404 if isinstance(error, MediaError) else 400)

    @app.get("/")
    def index() -> FileResponse:
        return FileResponse(PAGE / "index.html", headers={"cache-control": "no-cache"})

    app.mount("/page", StaticFiles(directory=PAGE))


def _add_reading(app: FastAPI, clips: ClipTable) -> None:
    manifest, edits = clips.manifest, clips.edits

    @app.get("/api/manifest")
    def about() -> JSONResponse:
        return JSONResponse({
            "name": os.path.basename(manifest.source), "source": manifest.source,
            "rows": len(clips), "kept": int(manifest.kept.sum()), "columns": clips.columns(),
            "marked": len(edits.marked), "edited": len(edits.texts), "lost": edits.lost,
            "edits_file": edits.file.name,
        })  # fmt: skip

    @app.get("/api/query")
    def query(q: Asked = "{}") -> JSONResponse:
        start = time.perf_counter()
        rows = clips.rows(Query.from_json(q))
        hours = clips.hours(rows)
        ms = 1000 * (time.perf_counter() - start)
        return JSONResponse({"total": len(rows), "hours": hours, "ms": ms})

    @app.get("/api/rows")
    def rows(
        q: Asked = "{}", start: int = 0, count: int = 60, columns: Asked = "[]"
    ) -> JSONResponse:
        start, count = max(0, start), min(max(0, count), MAX_CARDS)
        chosen = clips.rows(Query.from_json(q))
        more = [name for name in _names(columns) if name in manifest.table.column_names]
        names = [*CARD, *(name for name in more if name not in CARD)]
        cards = clips.cards(chosen[start : start + count], names)
        return JSONResponse({"total": len(chosen), "start": start, "cards": cards})

    @app.get("/api/histogram")
    def histogram(column: str, q: Asked = "{}") -> JSONResponse:
        return JSONResponse(clips.histogram(column, Query.from_json(q)))

    @app.get("/api/row/{row}")
    def row(row: int) -> JSONResponse:
        _check_rows(clips, [row])
        return JSONResponse(clips.row(row))

    @app.get("/api/download")
    def download(
        tasks: BackgroundTasks, what: str = "shown", ending: str = "csv", q: Asked = "{}"
    ) -> FileResponse:
        if ending not in ("csv", "parquet"):
            raise KinemaError(f"{ending!r} is neither csv nor parquet")
        chosen = selected(clips, Query.from_json(q), marked=what == "marked")
        name = f"{Path(manifest.source).stem}.{what if what == 'marked' else 'shown'}.{ending}"
        handle, path = tempfile.mkstemp(suffix=f".{ending}", prefix="kinema-browse-")
        os.close(handle)
        tasks.add_task(Path(path).unlink, missing_ok=True)
        try:
            write_selection(clips, chosen, Path(path))
        except BaseException:
            Path(path).unlink(missing_ok=True)
            raise
        return FileResponse(path, filename=name, media_type="application/octet-stream",
                            background=tasks)  # fmt: skip


def _add_media(app: FastAPI, clips: ClipTable, posters: Posters) -> None:
    # No more calls wait in the pool than it can work on: who scrolls past a card need not wait
    # for its picture.
    turns = asyncio.Semaphore(2 * (os.cpu_count() or 1))

    @app.get("/media/{row}/poster")
    async def poster(row: int, request: Request) -> Response:
        _check_rows(clips, [row])
        async with turns:
            if await request.is_disconnected():
                return Response(status_code=499)
            file, future = await asyncio.to_thread(posters.poster, row)
            await asyncio.shield(asyncio.wrap_future(future))
        return FileResponse(file, media_type="image/jpeg",
                            headers={"cache-control": "private, max-age=600"})  # fmt: skip

    @app.get("/media/{row}/file")
    def file(row: int) -> FileResponse:
        _check_rows(clips, [row])
        path = posters.local(row)
        ending = path.suffix.lower()
        kind = TYPES.get(ending) or mimetypes.types_map.get(ending, "application/octet-stream")
        return FileResponse(path, media_type=kind)


def _add_writing(app: FastAPI, clips: ClipTable) -> None:
    edits = clips.edits

    def state() -> JSONResponse:
        return JSONResponse({"marked": len(edits.marked), "edited": len(edits.texts)})

    @app.post("/api/text")
    def text(change: TextChange) -> JSONResponse:
        _check_rows(clips, [change.row])
        new = change.text
        if new == clips.manifest.text(change.row):
            new = None
        if new != edits.texts.get(change.row):
            edits.set_text(change.row, new)
        return state()

    @app.post("/api/marks")
    def marks(change: MarkChange) -> JSONResponse:
        _check_rows(clips, change.rows)
        rows = list(change.rows)
        if change.query is not None:
            rows += clips.rows(Query.from_json(change.query)).tolist()
        rows = [row for row in dict.fromkeys(rows) if (row in edits.marked) != change.marked]
        if rows:
            edits.set_marks(rows, change.marked)
        return state()

    @app.post("/api/export")
    def export(order: Export) -> JSONResponse:
        path = target(clips.manifest.source, order.name, replace=order.replace)
        rows = selected(clips, Query.from_json(order.query), marked=order.what == "marked")
        write_selection(clips, rows, path)
        return JSONResponse({"rows": len(rows), "name": path.name, "path": str(path)})


def _names(text: str) -> list[str]:
    try:
        names = json.loads(text)
    except ValueError:
        return []
    return [str(name) for name in names][:16] if isinstance(names, list) else []


def _check_rows(clips: ClipTable, rows: list[int]) -> None:
    for row in rows:
        if not 0 <= row < len(clips):
            raise KinemaError(f"there is no row {row} (0 to {len(clips) - 1})")
