from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from kinema.doctor import NEEDED_CODECS, Finding, examine

HEAVY = ("torch", "numpy", "pyarrow", "av", "PIL", "pydantic", "transformers", "wandb")


INSIDE = """
import sys
from kinema.cli import main as entry
@entry.app.command("inside")
def inside():
    {}
sys.argv = ["kinema", "inside"]
entry.main()
"""
"""A command that does one thing."""


def run(code: str, *args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", code, *args], capture_output=True, text=True, check=False
    )


def test_help_imports_nothing_heavy() -> None:
    code = f"""
import sys
sys.argv = ["kinema", "--help"]
from kinema.cli.main import main
try:
    main()
except SystemExit as stop:
    assert not stop.code, stop.code
loaded = [m for m in {HEAVY!r} if m in sys.modules]
assert not loaded, loaded
"""
    result = run(code)
    assert result.returncode == 0, result.stderr
    for command in ("demo", "doctor", "data", "train", "generate"):
        assert f"\n  {command} " in result.stdout


def test_a_mistake_ends_in_a_message_and_not_in_a_traceback() -> None:
    code = """
import sys
from kinema.cli import main as entry
from kinema.config.errors import ConfigError
def fail(): raise ConfigError("depth is 0", where="r.yaml:3", hint="use 1")
entry.app = fail
entry.main()
"""
    result = run(code)
    assert result.returncode == 2
    assert result.stderr == "error: r.yaml:3: depth is 0\n  try: use 1\n"


def test_a_defect_of_ours_keeps_its_traceback() -> None:
    code = """
from kinema.cli import main as entry
def fail(): raise ValueError("inner")
entry.app = fail
entry.main()
"""
    result = run(code)
    assert result.returncode == 1
    assert "Traceback" in result.stderr


def test_a_full_disk_or_a_missing_file_is_one_line() -> None:
    code = """
from kinema.cli import main as entry
def fail(): open("no-such-file.bin")
entry.app = fail
entry.main()
"""
    result = run(code)
    assert result.returncode == 1
    assert result.stderr == "error: no-such-file.bin: No such file or directory\n"


@pytest.mark.parametrize("lines", [1, 100_000])
def test_a_reader_that_leaves_is_no_failure(lines: int) -> None:
    read, write = os.pipe()
    os.close(read)
    result = subprocess.run(
        [sys.executable, "-c", INSIDE.format(f"print('line\\n' * {lines})")],
        stdout=write,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(write)
    assert (result.returncode, result.stderr) == (0, "")


def test_ctrl_c_is_one_word() -> None:
    result = run(INSIDE.format("raise KeyboardInterrupt"))
    assert (result.returncode, result.stderr) == (130, "interrupted\n")


def test_doctor_examines_this_machine(tmp_path: Path) -> None:
    findings = {f.name: f for f in examine(tmp_path)}
    assert {"python", "torch", "attention", "video", "disk", "memory", "cores"} <= set(findings)
    assert findings["video"].status == "ok", findings["video"]
    assert "math" in findings["attention"].detail
    assert "libx264" in NEEDED_CODECS


def test_doctor_prints_json_and_exits_by_its_verdict(tmp_path: Path) -> None:
    from typer.testing import CliRunner

    from kinema.cli.main import app

    result = CliRunner().invoke(app, ["doctor", "--json", "--folder", str(tmp_path)])
    findings = [Finding(**f) for f in json.loads(result.stdout)]
    assert result.exit_code == int(any(f.status == "problem" for f in findings))
    missing = tmp_path / "missing" / "deeper"
    assert f"at {tmp_path}" in next(f.detail for f in examine(missing) if f.name == "disk")
    file = tmp_path / "file"
    file.touch()
    assert next(f for f in examine(file) if f.name == "disk").status == "problem"
