"""What `kinema train` asks of PyTorch's allocator before PyTorch is there."""

from __future__ import annotations

import os

import pytest
from typer.testing import CliRunner

from kinema.cli.main import app

NAME, OLD_NAME = "PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, "expandable_segments:True"),
        ({NAME: "backend:native"}, "backend:native"),
        ({OLD_NAME: "backend:native"}, None),
    ],
)
def test_segments_grow_unless_something_else_is_wanted(
    given: dict[str, str], expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in (NAME, OLD_NAME):
        monkeypatch.setenv(name, "")  # so that it is put back
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    assert CliRunner().invoke(app, ["train", "no/such-recipe"]).exit_code
    assert os.environ.get(NAME) == expected
