"""Plain-text tables."""

from __future__ import annotations

import pytest

from admm_nxm.table import format_table


def test_text_goes_to_the_left_and_numbers_to_the_right() -> None:
    assert format_table(("weight", "groups", "zeros"), [("a", 5, 0.5), ("longer", 12345, 10.25)]).split("\n") == [
        "weight  groups  zeros",
        "------  ------  -----",
        "a            5    0.5",
        "longer   12345  10.25",
    ]


def test_a_column_with_any_text_goes_to_the_left() -> None:
    assert format_table(("n", "x"), [(1, "a"), ("many", "b")]).split("\n") == [
        "n     x",
        "----  -",
        "1     a",
        "many  b",
    ]


def test_a_heading_wider_than_its_cells_sets_the_width() -> None:
    assert format_table(("bad groups",), [(3,)]).split("\n") == ["bad groups", "----------", "         3"]


def test_without_rows_the_headings_remain() -> None:
    assert format_table(("a", "bc"), []) == "a  bc\n-  --"


def test_lines_have_no_trailing_blanks_but_the_rule_is_whole() -> None:
    lines = format_table(("name", "why"), [("a", ""), ("b", "because")]).split("\n")
    assert lines[1] == "----  -------"
    assert all(line == line.rstrip() for line in lines)


def test_a_row_with_more_cells_than_headings_is_refused() -> None:
    with pytest.raises(ValueError, match="zip"):
        format_table(("a",), [("one", "too many")])


def test_a_table_too_wide_drops_the_beginning_of_names() -> None:
    rows = [("encoder.0.query.weight", 12), ("key.weight", 7)]
    assert format_table(("weights", "groups"), rows, 21).split("\n") == [
        "weights        groups",
        "-------------  ------",
        "…query.weight      12",
        "key.weight          7",
    ]
    assert format_table(("weights", "groups"), rows, 200) == format_table(("weights", "groups"), rows)
