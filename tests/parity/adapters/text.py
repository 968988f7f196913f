"""Caption cleaning of the originals, on our code."""

from __future__ import annotations

from kinema.models.text_cleaning import clean_caption, prepare_caption
from tests.parity.case import Case, adapter

COLUMNS = {
    "clean_caption once": clean_caption,
    "text_preprocessing (clean_caption twice)": lambda text: prepare_caption(text, clean=True),
    "text_preprocessing(use_text_preprocessing=False)": lambda text: prepare_caption(
        text, clean=False
    ),
}


@adapter(r"text_encoder\.t5\.clean_caption", kind="json")
def caption_cleaning(case: Case) -> None:
    table = case.table()
    source, *results = table["columns"]
    assert source == "input"
    assert results
    assert table["rows"]
    differing = [
        f"{column}: {row[0]!r} gives {got!r}, not {want!r}"
        for row in table["rows"]
        for column, want in zip(results, row[1:], strict=True)
        if (got := COLUMNS[column](row[0])) != want
    ]
    assert not differing, "\n".join(differing)
