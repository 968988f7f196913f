"""Tiny clips, rendered once for all tests of importers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.curation.importers.published import render_clips


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    return render_clips(tmp_path_factory.mktemp("published") / "clips")
