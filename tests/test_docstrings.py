"""The examples in docstrings give what they say."""

from __future__ import annotations

import doctest

import pytest

from tests.test_layout import MODULES


def test_an_example_fits_the_column_of_the_site() -> None:
    """85 characters, as the code blocks of the pages."""
    lines = [line.strip() for file in MODULES.values() for line in file.read_text(encoding="utf-8").splitlines()]
    assert [line for line in lines if line.startswith((">>> ", "... ")) and len(line) > 85] == []


@pytest.mark.parametrize(
    "module", [name for name, file in MODULES.items() if ">>>" in file.read_text(encoding="utf-8")]
)
def test_examples_in_docstrings(module: str) -> None:
    found = pytest.importorskip(module.removesuffix(".__init__"), exc_type=ImportError)
    failed, tried = doctest.testmod(found)
    assert failed == 0
    assert tried > 0
