"""The codec of packed weights: lossless bit for bit, of the size that the format promises, and damage refused."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from admm_nxm import Pattern, project
from admm_nxm.io.packing import (
    LONGEST_GROUP,
    Layout,
    Packed,
    PackedTensor,
    examine,
    pack_tensor,
    packed_layout,
    unpack_tensor,
)
from admm_nxm.io.tensor_files import CODE_OF, DTYPES
from admm_nxm.projection import INTEGER_OF_SIZE
from tests.helpers import same_bits

VALUES, PLACES, SIGNS = ".packed_values", ".packed_places", ".packed_signs"
PACKABLE = [dtype for dtype in CODE_OF if not dtype.is_complex]
SIGNED_ZERO = [
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
]
PATTERNS = ["2:4", "1:4", "2:8", "1:2", "3:5", "4:4", "1:1", "7:16", "1:33", "30:64", "1:200"]


def bits_of(t: Tensor) -> Tensor:
    return t.contiguous().view(INTEGER_OF_SIZE[t.element_size()])


def tensor_of_bits(bits: Tensor, dtype: torch.dtype) -> Tensor:
    return bits.to(INTEGER_OF_SIZE[dtype.itemsize]).view(dtype)


def zeros_of(dtype: torch.dtype) -> list[int]:
    """The bit patterns of a dtype that are zero."""
    lowest = torch.iinfo(INTEGER_OF_SIZE[dtype.itemsize]).min
    if dtype == getattr(torch, "float8_e8m0fnu", None):
        return []
    return [0, lowest] if dtype in SIGNED_ZERO else [0]


def in_loops(w: Tensor, pattern: Pattern, dim: int, places: str) -> dict[str, tuple[list[Any], int]]:
    """The format's text, word by word, in plain Python: the bits of the values, and the two strings of bits."""
    rows = bits_of(w.movedim(dim, -1)).reshape(-1, pattern.group).tolist()
    zero = zeros_of(w.dtype)
    values, bits, signs = [], [], []
    for row in rows:
        kept = [place for place, value in enumerate(row) if value not in zero]
        kept += [place for place, value in enumerate(row) if value in zero][: pattern.keep - len(kept)]
        kept = sorted(kept)
        values += [row[place] for place in kept]
        signs += [int(row[place] != 0) for place in range(pattern.group) if place not in kept]
        if places == "bitmask":
            bits += [int(place in kept) for place in range(pattern.group)]
        else:
            width = (pattern.group - 1).bit_length()
            bits += [place >> bit & 1 for place in kept for bit in range(width)]
    return (
        {VALUES: values, PLACES: as_bytes(bits), SIGNS: as_bytes(signs)}
        if any(signs)
        else {
            VALUES: values,
            PLACES: as_bytes(bits),
        }
    )


def as_bytes(bits: list[int]) -> list[int]:
    return [sum(bit << k for k, bit in enumerate(bits[at : at + 8])) for at in range(0, len(bits), 8)]


@st.composite
def sparse_tensors(draw: st.DrawFn, patterns: list[str] = PATTERNS) -> tuple[Tensor, Pattern, int]:
    """A tensor of any bits, with at most ``keep`` non-zeros in every group; often with negative zeros."""
    pattern = Pattern.parse(draw(st.sampled_from(patterns)))
    dtype = draw(st.sampled_from(PACKABLE))
    shape = draw(st.lists(st.integers(0, 3), min_size=1, max_size=4))
    dim = draw(st.integers(-len(shape), len(shape) - 1))
    shape[dim] *= pattern.group
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    size = dtype.itemsize
    # Any bit pattern at all: NaNs with payloads, infinities, subnormal numbers, both zeros.
    raw = torch.randint(0, 256, (*shape, size), dtype=torch.uint8, generator=generator)
    if dtype == torch.bool:
        raw = raw & 1
    w = raw.view(INTEGER_OF_SIZE[size]).squeeze(-1)
    if draw(st.booleans()):
        special = torch.tensor([0, 1, -1, torch.iinfo(w.dtype).min, torch.iinfo(w.dtype).max], dtype=w.dtype)
        special = special & 1 if dtype == torch.bool else special
        w = special[torch.randint(0, len(special), w.shape, generator=generator)]
    zero = zeros_of(dtype)
    if pattern.keep < pattern.group and not zero:
        w = w.narrow(dim, 0, 0)  # every entry counts
    elif pattern.keep < pattern.group:
        negative = draw(st.booleans())
        order = torch.rand(w.shape, generator=generator).movedim(dim, -1).unflatten(-1, (-1, pattern.group))
        dropped = order.argsort(-1).argsort(-1) >= draw(st.integers(0, pattern.keep)) if w.numel() else order > 2
        dropped = dropped.flatten(-2).movedim(-1, dim)
        fill = torch.tensor(zero if negative else zero[:1], dtype=w.dtype)
        w = torch.where(dropped, fill[torch.randint(0, len(fill), w.shape, generator=generator)], w)
    return w.view(dtype), pattern, dim


# ---------------------------------------------------------------- lossless, and as the format says


@given(sparse_tensors())
@settings(max_examples=300)
def test_a_round_trip_keeps_every_bit(case: tuple[Tensor, Pattern, int]) -> None:
    w, pattern, dim = case
    before = bits_of(w).clone()
    packed = pack_tensor(w, pattern, dim)
    back = unpack_tensor(packed)
    assert same_bits(w, back)
    assert back.is_contiguous()
    assert torch.equal(bits_of(w), before)


@given(sparse_tensors())
@settings(max_examples=150)
def test_what_is_stored_is_what_the_format_says(case: tuple[Tensor, Pattern, int]) -> None:
    w, pattern, dim = case
    packed = pack_tensor(w, pattern, dim)
    expected = in_loops(w, pattern, dim, packed.layout.places)
    found = {ending: bits_of(part).flatten().tolist() for ending, part in packed.parts.items()}
    found = {ending: [b & 255 for b in bits] if ending != VALUES else bits for ending, bits in found.items()}
    assert found == expected
    assert packed.parts[VALUES].dtype == w.dtype
    assert {part.dtype for ending, part in packed.parts.items() if ending != VALUES} == {torch.uint8}


@given(sparse_tensors())
@settings(max_examples=150)
def test_the_size_is_that_of_the_formula(case: tuple[Tensor, Pattern, int]) -> None:
    w, pattern, dim = case
    packed = pack_tensor(w, pattern, dim)
    groups = w.numel() // pattern.group
    width = math.ceil(math.log2(pattern.group))
    size = groups * pattern.keep * w.element_size() + math.ceil(groups * min(pattern.group, pattern.keep * width) / 8)
    if packed.layout.signs:
        size += math.ceil(groups * (pattern.group - pattern.keep) / 8)
    assert packed.layout.nbytes == sum(part.numel() * part.element_size() for part in packed.parts.values()) == size
    assert packed.layout.dense_nbytes == w.numel() * w.element_size()


@pytest.mark.parametrize(
    ("pattern", "dtype", "share"),
    [
        ("2:4", torch.bfloat16, 0.5625),
        ("2:4", torch.float16, 0.5625),
        ("2:4", torch.float32, 0.53125),
        ("2:4", torch.float8_e4m3fn, 0.625),
        ("1:4", torch.bfloat16, 0.28125),
        ("2:8", torch.bfloat16, 0.296875),
    ],
)
def test_the_share_of_the_dense_size(pattern: str, dtype: torch.dtype, share: float) -> None:
    w = project(torch.randn(64, 128), pattern).to(dtype)
    layout = pack_tensor(w, pattern).layout
    assert layout.nbytes / layout.dense_nbytes == share


def test_more_than_one_piece_is_packed_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    w = project(torch.randn(3, 50, 40), "3:5", 1) * -1.0
    whole = pack_tensor(w, "3:5", 1)
    monkeypatch.setattr("admm_nxm.io.packing._ENTRIES_AT_ONCE", 100)
    pieces = pack_tensor(w, "3:5", 1)
    assert whole.layout == pieces.layout
    assert whole.layout.signs
    assert all(same_bits(whole.parts[ending], pieces.parts[ending]) for ending in whole.parts)
    assert same_bits(unpack_tensor(pieces), w)


def test_a_strided_view_is_packed_by_its_entries() -> None:
    w = project(torch.randn(16, 24), "2:4", 0)
    assert same_bits(unpack_tensor(pack_tensor(w.t(), "2:4", 1)), w.t().contiguous())
    assert same_bits(unpack_tensor(pack_tensor(w[:, 3:20:2], "2:4", 0)), w[:, 3:20:2].contiguous())


def test_subnormal_numbers_count_even_where_the_processor_takes_them_for_zero() -> None:
    fits, full = torch.tensor([[0.0, 1e-45, 0.0, -1e-45]]), torch.tensor([[1e-45, 1e-45, 1e-45, 0.0]])
    torch.set_flush_denormal(True)
    try:
        back = unpack_tensor(pack_tensor(fits, "2:4"))
        bad, _ = examine(full, "2:4")
    finally:
        torch.set_flush_denormal(False)
    assert same_bits(back, fits)
    assert bad == 1


def test_zeros_that_are_kept_need_no_sign() -> None:
    packed = pack_tensor(torch.tensor([[-0.0, -0.0, 0.0, 0.0]]), "2:4")
    assert (packed.layout.signs, packed.parts[PLACES].tolist()) == (False, [0b0011])
    packed = pack_tensor(torch.tensor([[0.0, 0.0, -0.0, 0.0]]), "2:4")
    assert packed.parts[SIGNS].tolist() == [0b01]


# ---------------------------------------------------------------- what cannot be packed


def test_a_violation_is_named_with_its_groups() -> None:
    w = torch.tensor([[1.0, 1.0, 1.0, 0.0, 1.0, 1.0, 0.0, 0.0, float("nan"), 1.0, -1.0, 1.0]])
    assert examine(w, "2:4") == (2, False)
    with pytest.raises(ValueError, match=r"^fc\.weight violates 2:4: 2 of 3 groups have more than 2 entries"):
        pack_tensor(w, "2:4", name="fc.weight")


@pytest.mark.parametrize(
    ("w", "pattern", "dim", "message"),
    [
        (torch.zeros(4, 6), "2:4", 1, r"width 6 \(dim 1 of shape \(4, 6\)\) is no multiple of group=4"),
        (torch.zeros(4, 8), "2:4", 2, r"dim=2 is out of range for shape \(4, 8\)"),
        (torch.zeros(4, 8), "2:4", -3, r"dim=-1 is out of range for shape \(4, 8\)"),
        (torch.tensor(0.0), "2:4", 0, r"dim=0 is out of range for shape \(\)"),
        (torch.zeros(4, 8, dtype=torch.complex64), "2:4", 1, "dtype torch.complex64 cannot be packed"),
        (torch.zeros(1, LONGEST_GROUP + 1), f"1:{LONGEST_GROUP + 1}", 1, f"{LONGEST_GROUP} is the longest"),
    ],
)
def test_what_cannot_be_packed_is_refused(w: Tensor, pattern: str, dim: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pack_tensor(w, pattern, dim)
    with pytest.raises(ValueError, match=message):
        examine(w, pattern, dim)


def test_the_longest_group_is_packed() -> None:
    w = torch.zeros(2, LONGEST_GROUP)
    w[1, LONGEST_GROUP - 1] = 5.0
    packed = pack_tensor(w, f"1:{LONGEST_GROUP}")
    assert packed.layout.nbytes == 2 * 4 + 3
    assert same_bits(unpack_tensor(packed), w)


# ---------------------------------------------------------------- damage


def one(pattern: str = "2:4") -> PackedTensor:
    return pack_tensor(project(torch.randn(3, 20 * Pattern.parse(pattern).group), pattern) * -1, pattern)


def with_part(packed: PackedTensor, ending: str, part: Tensor) -> PackedTensor:
    return PackedTensor(packed.layout, {**packed.parts, ending: part})


@pytest.mark.parametrize("bit", range(8))
def test_every_flipped_bit_of_a_bitmask_is_found(bit: int) -> None:
    packed = one()
    for at in (0, 7, len(packed.parts[PLACES]) - 1):
        places = packed.parts[PLACES].clone()
        places[at] ^= 1 << bit
        with pytest.raises(ValueError, match="its places name more or fewer than 2 entries in a group of 4"):
            unpack_tensor(with_part(packed, PLACES, places))


def test_places_that_do_not_ascend_or_lie_outside_are_refused() -> None:
    packed = pack_tensor(project(torch.randn(8, 12), "2:6"), "2:6")
    assert packed.layout.places == "bitmask"
    layout = replace(packed.layout, places="indices")
    good = [0, 3]

    def unpacked(pair: list[int]) -> Tensor:
        bits = [place >> k & 1 for group in range(16) for place in (pair if group == 9 else good) for k in range(3)]
        parts = {VALUES: packed.parts[VALUES], PLACES: torch.tensor(as_bytes(bits), dtype=torch.uint8)}
        return unpack_tensor(PackedTensor(layout, parts))

    assert unpacked(good).movedim(1, -1).reshape(16, 6)[:, good].shape == (16, 2)
    for bad in ([3, 0], [2, 2], [0, 6], [0, 7]):
        with pytest.raises(ValueError, match="its places are not 2 ascending numbers below 6 in every group"):
            unpacked(bad)


@pytest.mark.parametrize("pattern", ["2:4", "1:4"])
def test_bits_beyond_the_last_group_are_refused(pattern: str) -> None:
    packed = pack_tensor(project(torch.randn(1, 12), pattern), pattern)
    places = packed.parts[PLACES].clone()
    places[-1] |= 128
    with pytest.raises(ValueError, match="bits are set beyond its last group"):
        unpack_tensor(with_part(packed, PLACES, places))


@pytest.mark.parametrize(
    ("ending", "change"),
    [
        (VALUES, lambda part: part[:-1]),
        (VALUES, lambda part: part.half()),
        (VALUES, lambda part: part.flatten()),
        (PLACES, lambda part: part[1:]),
        (PLACES, lambda part: part.to(torch.int8)),
        (SIGNS, lambda part: part[:0]),
    ],
)
def test_parts_that_do_not_fit_are_refused(ending: str, change: Any) -> None:
    packed = one()
    assert packed.layout.signs
    with pytest.raises(ValueError, match=r"its parts are .*and by its pattern and shape they should be"):
        unpack_tensor(with_part(packed, ending, change(packed.parts[ending])))


# ---------------------------------------------------------------- metadata

ENTRY = {"pattern": "2:4", "shape": [4, 8], "dim": 1, "dtype": "BF16", "places": "bitmask", "signs": False}


@given(sparse_tensors(), st.text(max_size=8), st.text(max_size=8))
@settings(max_examples=100)
def test_metadata_survives_its_text(case: tuple[Tensor, Pattern, int], name: str, alias: str) -> None:
    w, pattern, dim = case
    packed = Packed({name: pack_tensor(w, pattern, dim).layout}, {alias: name})
    assert Packed.from_json(packed.to_json()) == packed


def test_metadata_is_the_documented_json() -> None:
    layout = packed_layout((4, 8), Pattern(2, 4), -1, torch.bfloat16, signs=False)
    assert json.loads(Packed({"fc.weight": layout}).to_json()) == {
        "format": "admm-nxm-packed",
        "version": 1,
        "weights": {"fc.weight": ENTRY},
    }
    assert Layout.from_json("fc.weight", ENTRY) == layout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": None}, "the pattern of .* is None"),
        ({"pattern": "2:0"}, "keep=2 exceeds group=0|group=0 is below 1"),
        ({"pattern": "0:4"}, "keep=0 is below 1"),
        ({"pattern": "2:3"}, "width 8"),
        ({"pattern": "1:" + "9" * 5000}, "."),
        ({"pattern": f"1:{2**62}", "shape": [1, 2**62]}, "the shape of"),
        ({"pattern": "1:8192", "shape": [1, 8192]}, "group=8192 is too long to pack"),
        ({"shape": None}, "the shape of .* is None"),
        ({"shape": [4, 8.0]}, r"the shape of .* is \[4, 8.0\]"),
        ({"shape": [True, 8]}, "the shape of"),
        ({"shape": [-4, 8]}, "no tensor can have it"),
        ({"shape": [0, 2**62, 8], "dim": 2}, "no tensor can have it"),
        ({"shape": [1] * 100 + [8], "dim": 100}, "no tensor can have it"),
        ({"shape": []}, "the dim of .* is 1"),
        ({"dim": 2}, "the dim of .* is 2"),
        ({"dim": -1}, "the dim of .* is -1"),
        ({"dim": True}, "the dim of .* is True"),
        ({"dtype": "F7"}, "its dtype is 'F7'"),
        ({"dtype": ["F32"]}, "its dtype is"),
        ({"dtype": "C64"}, "dtype torch.complex64 cannot be packed"),
        ({"places": "rank"}, "places='rank' must be"),
        ({"places": None}, "places=None must be"),
        ({"signs": 1}, "its signs is 1"),
        ({"signs": True, "dtype": "I32"}, "torch.int32 has no negative zero"),
    ],
)
def test_a_damaged_description_is_refused(change: dict[str, Any], message: str) -> None:
    text = json.dumps({"format": "admm-nxm-packed", "version": 1, "weights": {"fc.weight": {**ENTRY, **change}}})
    with pytest.raises(ValueError, match=f"^the packed weight 'fc.weight' is damaged: .*({message})"):
        Packed.from_json(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is no JSON"),
        ("{", "is no JSON"),
        ("[" * 100_000, "is nested too deep|is no JSON"),
        ("[]", "does not say format"),
        ('{"format": "other"}', "does not say format"),
        (
            '{"format": "admm-nxm-packed", "version": 2, "weights": {}}',
            "is of version 2, and this admm_nxm reads version 1",
        ),
        ('{"format": "admm-nxm-packed", "version": true, "weights": {}}', "is of version True"),
        ('{"format": "admm-nxm-packed", "version": 1}', "names no weights"),
        ('{"format": "admm-nxm-packed", "version": 1, "weights": []}', "its weights are no object"),
        (
            '{"format": "admm-nxm-packed", "version": 1, "weights": {"a": 3}}',
            "the packed weight 'a' is damaged: the shape of 'a' is None",
        ),
        ('{"format": "admm-nxm-packed", "version": 1, "weights": {}, "weights": {}}', "it has 'weights' twice"),
        ('{"format": "admm-nxm-packed", "version": 1, "weights": {}, "aliases": {"a": 3}}', "its aliases are no names"),
        ('{"format": "admm-nxm-packed", "version": 1, "weights": {}, "aliases": 3}', "its aliases are no object"),
    ],
)
def test_a_damaged_entry_is_refused(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Packed.from_json(text)


def test_every_dtype_of_the_library_is_known() -> None:
    from safetensors.torch import _TYPES

    assert set(_TYPES.items()) <= set(DTYPES.items())
