"""What a result is kept under, where an earlier stage rewrites a column that it depends on."""

from __future__ import annotations

from pathlib import Path

import pyarrow as pa

from kinema.curation.engine import run_stages
from kinema.curation.local import LocalExecutor
from kinema.curation.stage import Places
from kinema.curation.store import ResultStore
from tests.unit.curation.engine_stages import Double, asked, rows


def test_a_column_that_is_rewritten_is_not_looked_up_as_it_was(tmp_path: Path) -> None:
    """As a caption that came with a clip, which `match` was worked out for, and its replacement."""
    table = rows(4).append_column("double", pa.array([100] * 4))
    executor = LocalExecutor(1, gpus=0)
    found = []
    for stages in ([Double("more", of="double")], [Double(), Double("more", of="double")]) * 2:
        with ResultStore(str(tmp_path / "stages")) as store:
            report = run_stages(
                stages, table, places=Places.below(str(tmp_path)), store=store,
                executor=executor, label="test",
            )  # fmt: skip
        found.append(report.table.column("more").to_pylist())
    executor.close()
    assert found == [[200] * 4, [0, 4, 8, 12]] * 2
    assert len(asked(tmp_path, "more")) == 8
