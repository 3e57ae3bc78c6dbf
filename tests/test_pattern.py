"""Pattern: both notations, and errors that name the right spelling."""

from __future__ import annotations

import copy
import pickle
import re
from dataclasses import FrozenInstanceError
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from admm_nxm import Pattern

patterns = st.integers(1, 300).flatmap(
    lambda group: st.builds(Pattern, keep=st.integers(1, group), group=st.just(group))
)


@pytest.mark.parametrize(
    ("text", "keep", "group"),
    [
        ("2:4", 2, 4),
        ("4x2", 2, 4),
        ("4X2", 2, 4),
        ("1:4", 1, 4),
        ("4x1", 1, 4),
        ("2:8", 2, 8),
        ("8x2", 2, 8),
        (" 2 : 4 ", 2, 4),
        ("4 x 2", 2, 4),
        ("1:1", 1, 1),
        ("4:4", 4, 4),
        ("4x4", 4, 4),
        ("16:64", 16, 64),
        ("64x16", 16, 64),
    ],
)
def test_both_notations_are_read(text: str, keep: int, group: int) -> None:
    assert Pattern.parse(text) == Pattern(keep=keep, group=group)


@pytest.mark.parametrize(
    ("text", "order", "right"),
    [
        ("4:2", "keep:group", "2:4"),
        ("2x4", "NxM (group, then how many are kept)", "4x2"),
        ("4:1", "keep:group", "1:4"),
        ("1X4", "NxM (group, then how many are kept)", "4x1"),
    ],
)
def test_the_wrong_order_is_refused_with_the_right_spelling(text: str, order: str, right: str) -> None:
    with pytest.raises(ValueError, match=re.escape(f'the order is {order}; write "{right}"')) as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "24", "2/4", "2-4", "two:four", "2:", ":4", "2:4:8", "-2:4", "+2:4", "2.0:4", "2:4x", "x", "4x", "4×2"]
)
def test_an_unknown_spelling_is_refused_with_both_notations(text: str) -> None:
    with pytest.raises(ValueError, match=r'"keep:group" such as "2:4", or "NxM" such as "4x2"') as caught:
        Pattern.parse(text)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize("text", [None, 2, 0.5, (2, 4), ["2:4"], b"2:4", True])
def test_what_is_no_text_is_refused(text: object) -> None:
    with pytest.raises(TypeError, match=r'a Pattern or a string such as "2:4" is needed'):
        Pattern.parse(text)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["0:4", "4x0", "0:0", "0x0"])
def test_nothing_kept_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="keep=0 is below 1"):
        Pattern.parse(text)


@pytest.mark.parametrize(("keep", "group"), [(0, 4), (-1, 4), (0, 0)])
def test_keep_below_one_is_refused(keep: int, group: int) -> None:
    with pytest.raises(ValueError, match=rf"keep={keep} is below 1.*choose keep >= 1"):
        Pattern(keep=keep, group=group)


def test_keep_above_group_is_refused_with_the_exchanged_pair() -> None:
    with pytest.raises(ValueError, match=r"keep=4 exceeds group=2.*did you mean Pattern\(keep=2, group=4\)"):
        Pattern(keep=4, group=2)


@pytest.mark.parametrize("group", [0, -4])
def test_a_group_below_one_is_refused_without_suggesting_an_impossible_pattern(group: int) -> None:
    with pytest.raises(ValueError, match=rf"group={group} is below 1") as caught:
        Pattern(keep=4, group=group)
    assert "did you mean" not in str(caught.value)


@pytest.mark.parametrize("text", ["4:0", "0x4"])
def test_an_empty_group_is_refused_without_suggesting_an_impossible_spelling(text: str) -> None:
    with pytest.raises(ValueError, match="group=0 is below 1"):
        Pattern.parse(text)


@pytest.mark.parametrize("bad", [True, 2.0, "2", None])
@pytest.mark.parametrize("name", ["keep", "group"])
def test_numbers_that_are_no_ints_are_refused_by_name(name: str, bad: object) -> None:
    with pytest.raises(TypeError, match=rf"Pattern {name}=.* is a {type(bad).__name__}; an int is needed"):
        Pattern(**{"keep": 1, "group": 4, name: bad})  # type: ignore[arg-type]


@given(patterns)
def test_text_of_a_pattern_reads_back_as_the_pattern(pattern: Pattern) -> None:
    assert str(pattern) == f"{pattern.keep}:{pattern.group}"
    assert Pattern.parse(str(pattern)) == pattern
    assert Pattern.parse(f"{pattern.group}x{pattern.keep}") == pattern


@given(patterns)
def test_parsing_a_pattern_returns_it(pattern: Pattern) -> None:
    assert Pattern.parse(pattern) is pattern


@given(patterns)
def test_sparsity_is_the_share_of_zeros(pattern: Pattern) -> None:
    assert pattern.sparsity == pytest.approx(float(1 - Fraction(pattern.keep, pattern.group)), abs=1e-15)


def test_equal_patterns_are_one_key() -> None:
    assert len({Pattern(2, 4), Pattern.parse("2:4"), Pattern.parse("4x2")}) == 1
    assert len({Pattern(2, 4), Pattern(1, 4), Pattern(2, 8)}) == 3


def test_a_pattern_cannot_be_changed() -> None:
    with pytest.raises(FrozenInstanceError):
        Pattern(2, 4).keep = 1  # type: ignore[misc]


@pytest.mark.parametrize("copied", [lambda p: pickle.loads(pickle.dumps(p)), copy.deepcopy])
def test_a_pattern_survives_copying(copied) -> None:
    assert copied(Pattern(3, 16)) == Pattern(3, 16)
