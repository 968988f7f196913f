"""Agreement with the original models: every case of a golden folder, read from its manifest.

`pytest tests/parity --golden DIR` runs another folder of the same format.
"""

from __future__ import annotations

import importlib
import pkgutil

import pytest

from tests.parity import adapters
from tests.parity.case import Case, GoldenError, find_adapter, load_cases, only_holds_inputs
from tests.parity.exceptions import DEFECTS_NOT_COPIED

for _module in pkgutil.iter_modules(adapters.__path__):
    importlib.import_module(f"tests.parity.adapters.{_module.name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    try:
        cases = load_cases(metafunc.config.getoption("--golden"))
    except GoldenError as error:
        raise pytest.fail.Exception(f"--golden: {error}", pytrace=False) from None
    cases = [c for c in cases if not only_holds_inputs(c)]
    metafunc.parametrize("case", cases, ids=[c.name for c in cases])


def test_parity(case: Case) -> None:
    run = find_adapter(case.entry)
    if run is None:
        pytest.fail(f"no adapter covers {case.official}", pytrace=False)
    run(case)
    missed = {t for t in case.unchecked() if not DEFECTS_NOT_COPIED.allows(case.official, t)}
    assert not missed, f"expected tensors that nothing compared: {sorted(missed)[:5]}"
