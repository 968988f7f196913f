"""Caption cleaning beyond the recorded captions (those are in tests/parity)."""

from __future__ import annotations

import warnings

import pytest

from kinema.models.text_cleaning import clean_caption, prepare_caption


def test_two_passes_are_not_one() -> None:
    once = clean_caption("see http://foo.bar.org/a/b.html")
    assert prepare_caption("see http://foo.bar.org/a/b.html", clean=True) == clean_caption(once)
    assert clean_caption(once) != once


def test_without_cleaning_only_case_and_ends_change() -> None:
    assert prepare_caption("  A [Red]   circle_ ", clean=False) == "a [red]   circle_"


@pytest.mark.parametrize("caption", ["folder/file", "https://x.com/", "<a", "&#1114112;", "%ff%fe"])
def test_no_caption_makes_noise(caption: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        prepare_caption(caption, clean=True)


@pytest.mark.parametrize(
    "piece", ["a", "a.", "-", "1:00 ", "<b>", "&amp;", "x1", "\u732b", "..'\""]
)
@pytest.mark.timeout(60)  # a rule that goes back and forth over the text would take hours
def test_long_captions_come_to_an_end(piece: str) -> None:
    assert isinstance(prepare_caption(piece * 2000, clean=True), str)
