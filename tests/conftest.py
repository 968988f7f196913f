"""Options and settings of the whole test suite."""

from __future__ import annotations

import os
import signal
from pathlib import Path

# Before torch is imported anywhere: no spinning threads, no downloads.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest

from tests.s3_fixture import s3

assert s3  # a fixture of all tests
# A shell's background job ignores Ctrl-C, and so would every process that the tests interrupt.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--golden",
        type=Path,
        default=Path(__file__).parent / "golden" / "v1",
        help="folder of golden vectors with a manifest.json (default: the project's own copy)",
    )
