# mypy: disable-error-code="no-untyped-def, no-untyped-call, untyped-decorator, misc, import-untyped, import-not-found"
# ruff: noqa: SIM108 - a choice at compile time reads better as one
"""The kernels behind :mod:`admm_nxm.kernels.fused`; imported only where Triton is.

Values are computed in float32 and rounded once where they are stored, as torch does; what its bits tell apart (signs of
zeros, magnitudes) is handled as the integer of those bits. Rows of the pointer table are: first blocks, sizes, and then
one row of addresses for each list of tensors.
"""

import triton
import triton.language as tl


@triton.jit
def _sum(x, axis: tl.constexpr):
    # tl.sum is a compiled function of Triton's own: whether it is interpreted was decided when Triton was imported.
    return tl.reduce(x, axis, tl.standard._sum_combine)


@triton.jit
def _bits(x):
    """The bits of a float as int32, of which 16-bit floats take the lower half."""
    if x.dtype == tl.float32:
        bits = x.to(tl.int32, bitcast=True)
    else:
        bits = x.to(tl.int16, bitcast=True).to(tl.int32)
    return bits


@triton.jit
def _from_bits(bits, dtype: tl.constexpr):
    if dtype == tl.float32:
        x = bits.to(tl.float32, bitcast=True)
    else:
        x = bits.to(tl.int16).to(dtype, bitcast=True)
    return x


@triton.jit
def _sign(dtype: tl.constexpr):
    """The bits of -0.0, as :func:`_bits` gives them."""
    if dtype == tl.float32:
        bits = -2147483648
    else:
        bits = -32768
    return bits


@triton.jit
def _magnitude(x):
    """The bits without the sign; all NaNs are one, just above infinity."""
    if x.dtype == tl.float32:
        key = tl.minimum(_bits(x) & 0x7FFFFFFF, 0x7F800001)
    elif x.dtype == tl.bfloat16:
        key = tl.minimum(_bits(x) & 0x7FFF, 0x7F81)
    else:
        key = tl.minimum(_bits(x) & 0x7FFF, 0x7C01)
    return key


@triton.jit
def _widen(x):
    # Shifts instead of casts for bfloat16: the interpreter's casts flush denormals, and truncate.
    if x.dtype == tl.bfloat16:
        wide = (x.to(tl.uint16, bitcast=True).to(tl.uint32) << 16).to(tl.float32, bitcast=True)
    else:
        wide = x.to(tl.float32)
    return wide


@triton.jit
def _narrow(x, dtype: tl.constexpr):
    """Round float32 to nearest even."""
    if dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)
        nearest = tl.where(x == x, nearest, bits | 0x400000)  # a NaN must not carry over into infinity
        narrow = (nearest >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        narrow = x.to(dtype)
    return narrow


@triton.jit
def _narrow_stochastically(x, places, seed):
    """Round float32 to bfloat16 as :func:`admm_nxm.kernels.eager.round_stochastically` does."""
    h = places.to(tl.uint32) * 0x9E3779B1 + seed.to(tl.uint32)
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    noise = (h ^ (h >> 16)) & 0xFFFF
    bits = x.to(tl.uint32, bitcast=True)
    rounded = ((bits + noise) >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    return tl.where((bits & 0x7F800000) != 0x7F800000, rounded, _narrow(x, tl.bfloat16))


# ---------------------------------------------------------------- many weights in one launch


@triton.jit
def _find(table, count):
    """Return which weight this program's block belongs to, and which of its blocks it is."""
    block = tl.program_id(0)
    low = block * 0
    high = low + count
    while high - low > 1:
        middle = (low + high) // 2
        before = tl.load(table + middle) <= block
        low = tl.where(before, middle, low)
        high = tl.where(before, high, middle)
    return low, block - tl.load(table + low)


@triton.jit
def _pointer(table, count, weight, row: tl.constexpr, dtype: tl.constexpr, aligned: tl.constexpr):
    pointer = tl.load(table + (row + 2) * count + weight).to(tl.pointer_type(dtype))
    if aligned:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _size(table, count, weight, aligned: tl.constexpr):
    size = tl.load(table + count + weight)
    if aligned:
        size = tl.multiple_of(size, 16)  # so that loads up to the end are still those of whole vectors
    return size


@triton.jit
def _flat(table, count, aligned: tl.constexpr, block_size: tl.constexpr):
    """Return the weight, the places of this block in it, and which of them there are."""
    weight, block = _find(table, count)
    places = block * block_size + tl.arange(0, block_size)
    return weight, places, places < _size(table, count, weight, aligned)


@triton.jit
def _by_eight(table, count, aligned: tl.constexpr, block_size: tl.constexpr):
    """The same with places eight to a row, which is a byte of a packed mask, and the bytes."""
    weight, block = _find(table, count)
    rows = block * (block_size // 8) + tl.arange(0, block_size // 8)
    places = rows[:, None] * 8 + tl.arange(0, 8)[None, :]
    return weight, rows, places, places < _size(table, count, weight, aligned)


@triton.jit
def _kept(mask, rows, places, inside, total):
    """Load a stored mask: one of unsigned bytes is packed."""
    if mask.dtype.element_ty == tl.uint8:
        stored = tl.load(mask + rows, mask=rows * 8 < total, other=0).to(tl.int32)
        kept = ((stored[:, None] >> tl.arange(0, 8)[None, :]) & 1) != 0
    else:
        kept = tl.load(mask + places, mask=inside, other=0) != 0
    return kept


@triton.jit(do_not_specialize=["count"])
def add_penalty(
    table,
    count: tl.int32,
    rho,
    g_type: tl.constexpr,
    w_type: tl.constexpr,
    v_type: tl.constexpr,
    aligned: tl.constexpr,
    size: tl.constexpr,
):
    """``g += rho * (w - v)``."""
    weight, places, inside = _flat(table, count, aligned, size)
    g_at = _pointer(table, count, weight, 0, g_type, aligned) + places
    g = _widen(tl.load(g_at, mask=inside))
    w = _widen(tl.load(_pointer(table, count, weight, 1, w_type, aligned) + places, mask=inside))
    v = _widen(tl.load(_pointer(table, count, weight, 2, v_type, aligned) + places, mask=inside))
    tl.store(g_at, _narrow(g + (w - v) * rho, g_type), mask=inside)


@triton.jit(do_not_specialize=["count"])
def pull(
    table,
    count: tl.int32,
    fraction,
    rest,
    w_type: tl.constexpr,
    v_type: tl.constexpr,
    aligned: tl.constexpr,
    size: tl.constexpr,
):
    """``w += fraction * (v - w)``, from the nearer end."""
    weight, places, inside = _flat(table, count, aligned, size)
    w_at = _pointer(table, count, weight, 0, w_type, aligned) + places
    w = _widen(tl.load(w_at, mask=inside))
    v = _widen(tl.load(_pointer(table, count, weight, 1, v_type, aligned) + places, mask=inside))
    way = v - w
    pulled = tl.where(fraction < rest, w + way * fraction, v - way * rest)
    tl.store(w_at, _narrow(pulled, w_type), mask=inside)


@triton.jit(do_not_specialize=["count"])
def reveal(
    table, count: tl.int32, w_type: tl.constexpr, h_type: tl.constexpr, aligned: tl.constexpr, size: tl.constexpr
):
    """``w = hidden`` off the mask."""
    weight, places, inside = _flat(table, count, aligned, size)
    w_at = _pointer(table, count, weight, 0, w_type, aligned) + places
    w = tl.load(w_at, mask=inside)
    h = tl.load(_pointer(table, count, weight, 1, h_type, aligned) + places, mask=inside)
    if w_type == h_type:
        hidden = h
    else:
        hidden = _narrow(_widen(h), w_type)
    tl.store(w_at, tl.where(_bits(h) == 0, w, hidden), mask=inside)


@triton.jit
def _hide(w, kept, dtype: tl.constexpr):
    """Return w off the mask, where a zero is -0.0, and +0.0 on it."""
    if w.dtype == dtype:
        bits = _bits(w)
    else:
        bits = _bits(_narrow(_widen(w), dtype))
    bits = tl.where(bits == 0, _sign(dtype), bits)
    return _from_bits(tl.where(kept, 0, bits), dtype)


@triton.jit(do_not_specialize=["count"])
def conceal(
    table,
    count: tl.int32,
    rest,
    w_type: tl.constexpr,
    h_type: tl.constexpr,
    aligned: tl.constexpr,
    size: tl.constexpr,
):
    """``hidden = w`` off the mask, then ``w = rest * w`` there."""
    weight, places, inside = _flat(table, count, aligned, size)
    w_at = _pointer(table, count, weight, 0, w_type, aligned) + places
    h_at = _pointer(table, count, weight, 1, h_type, aligned) + places
    w = tl.load(w_at, mask=inside)
    kept = _bits(tl.load(h_at, mask=inside)) == 0
    tl.store(h_at, _hide(w, kept, h_type), mask=inside)
    tl.store(w_at, tl.where(kept, w, _narrow(_widen(w) * rest, w_type)), mask=inside)


@triton.jit(do_not_specialize=["count"])
def scale(
    table,
    count: tl.int32,
    divisor,
    w_type: tl.constexpr,
    mask_type: tl.constexpr,
    aligned: tl.constexpr,
    size: tl.constexpr,
    shrink: tl.constexpr,
):
    """``w = w / divisor`` off the mask, or ``w * divisor``."""
    weight, rows, places, inside = _by_eight(table, count, aligned, size)
    w_at = _pointer(table, count, weight, 0, w_type, aligned) + places
    mask = _pointer(table, count, weight, 1, mask_type, aligned)
    w = tl.load(w_at, mask=inside)
    kept = _kept(mask, rows, places, inside, tl.load(table + count + weight))
    wide = _widen(w)
    if shrink:
        scaled = tl.div_rn(wide, tl.full(wide.shape, divisor, tl.float32))
    else:
        scaled = wide * divisor
    tl.store(w_at, tl.where(kept, w, _narrow(scaled, w_type)), mask=inside)


@triton.jit(do_not_specialize=["count"])
def keep_only(
    table,
    count: tl.int32,
    t_type: tl.constexpr,
    mask_type: tl.constexpr,
    aligned: tl.constexpr,
    size: tl.constexpr,
):
    """+0.0 off the mask."""
    weight, rows, places, inside = _by_eight(table, count, aligned, size)
    t_at = _pointer(table, count, weight, 0, t_type, aligned) + places
    mask = _pointer(table, count, weight, 1, mask_type, aligned)
    bits = _bits(tl.load(t_at, mask=inside))
    kept = _kept(mask, rows, places, inside, tl.load(table + count + weight))
    tl.store(t_at, _from_bits(tl.where(kept, bits, 0), t_type), mask=inside)


# ---------------------------------------------------------------- one weight, its groups a row each


@triton.jit
def _groups(tile, groups, inner, group: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, step: tl.constexpr):
    """Return the places of one tile of groups, a row each, and which of them there are.

    Rows are as wide as the next power of two. In memory order a dense weight is (outer, group, inner); ``step`` is 0
    where inner is 1, and divides inner where it is not.
    """
    number = tile * rows + tl.arange(0, rows).to(tl.int64)
    index = tl.arange(0, width)[None, :]
    if step == 0:
        places = number[:, None] * group + index
    else:
        # Nothing changes, but now the compiler knows that it may load whole vectors.
        groups = groups // step * step
        inner = inner // step * step
        places = (number // inner * inner * group + number % inner)[:, None] + index * inner
    inside = (number < groups)[:, None]
    if group != width:
        inside = inside & (index < group)
    return places, inside


@triton.jit
def _largest(key, keep: tl.constexpr, group: tl.constexpr, width: tl.constexpr):
    """Mark the ``keep`` largest of each row; ties go to the lower index."""
    index = tl.arange(0, width)[None, :]
    rank = key * 0
    if keep < group:
        for j in tl.static_range(group):
            other = _sum(tl.where(index == j, key, 0), 1)[:, None]
            # With integers, "at least" is "above the number before": that is for those the other one comes before.
            rank += (other > key - (index > j).to(tl.int32)).to(tl.int32)
    return rank < keep


@triton.jit
def _note(figures, moved, squares, gained, kept):
    """Store the sums of one program."""
    figures += tl.program_id(0) * 4
    tl.store(figures, _sum(moved, 0))
    tl.store(figures + 1, _sum(squares, 0))
    tl.store(figures + 2, _sum(gained, 0).to(tl.float32))
    tl.store(figures + 3, _sum(kept, 0).to(tl.float32))


@triton.jit(do_not_specialize=["groups", "inner", "tiles", "with_dual", "seed"])
def advance(
    w_at,
    v_at,
    figures,
    groups: tl.int64,
    inner: tl.int64,
    tiles: tl.int64,
    with_dual: tl.int32,
    minus_scale,
    seed: tl.int32,
    stochastic: tl.constexpr,
    keep: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    step: tl.constexpr,
):
    """The z- and u-steps on v."""
    v_type: tl.constexpr = v_at.dtype.element_ty
    moved = tl.full((rows,), 0.0, tl.float32)
    squares = tl.full((rows,), 0.0, tl.float32)
    gained = tl.full((rows,), 0, tl.int32)
    kept = tl.full((rows,), 0, tl.int32)
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:
        places, inside = _groups(tile, groups, inner, group, width, rows, step)
        w = _widen(tl.load(w_at + places, mask=inside, other=0.0))
        v = tl.load(v_at + places, mask=inside, other=0.0)
        old = _largest(_magnitude(v), keep, group, width) & inside
        # A product flips the sign of zeros too, which not every version's minus does; and w + 0.0 is no -0.0.
        a = w + tl.where(old, 0.0, _widen(v) * -1.0)
        if stochastic:
            a_bits = _bits(_narrow_stochastically(a, places, seed))
        else:
            a_bits = _bits(_narrow(a, v_type))
        narrow = _from_bits(a_bits, v_type)
        new = _largest(_magnitude(narrow), keep, group, width) & inside
        wide = _widen(narrow)
        minus_dual = tl.where(with_dual != 0, _bits(_narrow(wide * minus_scale, v_type)), _sign(v_type))
        tl.store(v_at + places, _from_bits(tl.where(new, a_bits, minus_dual), v_type), mask=inside)
        way = tl.where(new, wide, 0.0) - tl.where(old, _widen(v), 0.0)
        moved += _sum(way * way, 1)
        squares += _sum(w * w, 1)
        gained += _sum((new & (new != old)).to(tl.int32), 1)
        kept += _sum(new.to(tl.int32), 1)
        tile += tl.num_programs(0)
    _note(figures, moved, squares, gained, kept)


@triton.jit
def _ranked(w, factor, places, inside, weighted: tl.constexpr):
    """The key of what the mask ranks."""
    if weighted:
        key = _magnitude(_widen(w) * tl.load(factor + places, mask=inside, other=0.0))
    else:
        key = _magnitude(w)
    return key


@triton.jit(do_not_specialize=["groups", "inner", "tiles"])
def advance_hidden(
    w_at,
    h_at,
    factor,
    figures,
    groups: tl.int64,
    inner: tl.int64,
    tiles: tl.int64,
    weighted: tl.constexpr,
    keep: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    step: tl.constexpr,
):
    """The z-step on a hidden state."""
    h_type: tl.constexpr = h_at.dtype.element_ty
    moved = tl.full((rows,), 0.0, tl.float32)
    squares = tl.full((rows,), 0.0, tl.float32)
    gained = tl.full((rows,), 0, tl.int32)
    kept = tl.full((rows,), 0, tl.int32)
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:
        places, inside = _groups(tile, groups, inner, group, width, rows, step)
        w = tl.load(w_at + places, mask=inside, other=0.0)
        old = (_bits(tl.load(h_at + places, mask=inside, other=0.0)) == 0) & inside
        new = _largest(_ranked(w, factor, places, inside, weighted), keep, group, width) & inside
        tl.debug_barrier()  # what is stored does not hang on what was loaded here
        tl.store(h_at + places, _hide(w, new, h_type), mask=inside)
        squared = _widen(w) * _widen(w)
        moved += _sum(tl.where(new != old, squared, 0.0), 1)
        squares += _sum(squared, 1)
        gained += _sum((new & (new != old)).to(tl.int32), 1)
        kept += _sum(new.to(tl.int32), 1)
        tile += tl.num_programs(0)
    _note(figures, moved, squares, gained, kept)


@triton.jit
def _pack_rows(
    mask_at, new, tile, groups, group: tl.constexpr, width: tl.constexpr, rows: tl.constexpr, padded: tl.constexpr
):
    """Store the bits of groups that lie one after the other: eight of them are as many bytes as a group has places."""
    words = _sum(new.to(tl.int32) << tl.arange(0, width)[None, :], 1)
    words = tl.reshape(words, (rows // 8, 8))
    byte = tl.arange(0, padded)
    shift = tl.arange(0, 8)[:, None] * group - byte[None, :] * 8
    left = tl.where(shift > 0, tl.where(shift < 8, shift, 8), 0)
    right = tl.where(shift < 0, tl.where(shift > -32, 0 - shift, 31), 0)
    part = ((words[:, :, None] << left[None, :, :]) >> right[None, :, :]) & 255
    stored = _sum(tl.where((shift > -32)[None, :, :], part, 0), 1)
    first = tile * (rows // 8 * group) + tl.arange(0, rows // 8).to(tl.int64) * group
    places = first[:, None] + byte[None, :]
    inside = (byte < group)[None, :] & (places < groups * group // 8)
    tl.store(mask_at + places, stored.to(tl.uint8), mask=inside)


@triton.jit
def _pack_columns(mask_at, new, tile, groups, inner, group: tl.constexpr, width: tl.constexpr, rows: tl.constexpr):
    """Store the bits of groups that lie side by side: eight of them have a byte for each of their places."""
    bits = tl.reshape(new.to(tl.int32), (rows // 8, 8, width)) << tl.arange(0, 8)[None, :, None]
    stored = _sum(bits, 1)
    number = tile * rows + tl.arange(0, rows // 8).to(tl.int64) * 8
    index = tl.arange(0, width)[None, :]
    places = (number // inner * inner * group + number % inner)[:, None] + index * inner
    inside = (number < groups)[:, None] & (index < group)
    tl.store(mask_at + places // 8, stored.to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["groups", "inner", "tiles"])
def advance_mask(
    w_at,
    mask_at,
    factor,
    figures,
    groups: tl.int64,
    inner: tl.int64,
    tiles: tl.int64,
    packed: tl.constexpr,
    weighted: tl.constexpr,
    keep: tl.constexpr,
    group: tl.constexpr,
    width: tl.constexpr,
    rows: tl.constexpr,
    step: tl.constexpr,
):
    """The z-step on a stored mask."""
    moved = tl.full((rows,), 0.0, tl.float32)
    squares = tl.full((rows,), 0.0, tl.float32)
    gained = tl.full((rows,), 0, tl.int32)
    kept = tl.full((rows,), 0, tl.int32)
    tile = tl.program_id(0).to(tl.int64)
    while tile < tiles:
        places, inside = _groups(tile, groups, inner, group, width, rows, step)
        w = tl.load(w_at + places, mask=inside, other=0.0)
        if packed:
            stored = tl.load(mask_at + places // 8, mask=inside, other=0).to(tl.int32)
            old = ((stored >> (places % 8).to(tl.int32)) & 1) != 0
        else:
            old = tl.load(mask_at + places, mask=inside, other=0) != 0
        new = _largest(_ranked(w, factor, places, inside, weighted), keep, group, width) & inside
        tl.debug_barrier()  # what is stored does not hang on what was loaded here
        if packed:
            if step == 0:
                _pack_rows(mask_at, new, tile, groups, group, width, rows, width)
            else:
                _pack_columns(mask_at, new, tile, groups, inner, group, width, rows)
        else:
            tl.store(mask_at + places, new.to(tl.uint8), mask=inside)
        squared = _widen(w) * _widen(w)
        moved += _sum(tl.where(new != old, squared, 0.0), 1)
        squares += _sum(squared, 1)
        gained += _sum((new & (new != old)).to(tl.int32), 1)
        kept += _sum(new.to(tl.int32), 1)
        tile += tl.num_programs(0)
    _note(figures, moved, squares, gained, kept)


INTERPRETED = not isinstance(advance, triton.runtime.JITFunction)
"""Whether TRITON_INTERPRET was set when this module was imported: the kernels then run on CPU tensors, for tests."""

BLOCK = 64 if INTERPRETED else 4096
"""Places of a block where many weights share a launch."""

TILE = 64 if INTERPRETED else 1024
"""Places of a tile of groups, at least eight of them."""

PROGRAMS = 2 if INTERPRETED else 4096
"""Most programs that share a weight. Their number is that of the partial sums."""
