"""Damaged files and checkpoints: always a clear error, and never a crash, a half-written file or a huge tensor."""

from __future__ import annotations

import copy
import json
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from admm_nxm import ADMMNxM, verify
from admm_nxm.io.packed import load_packed, unpack
from tests.fuzz_files import KEY, cut, flip, joined, originals, parts_of, run, tensors
from tests.helpers import FROZEN, Build, admm, every_form, make_net, same_bits, train
from tests.test_files import listing

A, B = "layers.0.a.weight", "layers.0.b.weight"

# ---------------------------------------------------------------- files


@pytest.mark.parametrize("seed", range(3))
def test_damaged_files_are_read_or_refused_and_nothing_else(seed: int) -> None:
    count, outcomes = run(60, seed, most=120)
    assert count == 120
    for way in ("verify", "unpack", "load_packed", "pack"):
        assert outcomes[f"{way}: refused"] > 40
        assert outcomes[f"{way}: refused"] + outcomes[f"{way}: read"] == count
    assert outcomes["verify: read"] > 0


def with_description(data: bytes, change: Callable[[dict[str, Any]], None]) -> bytes:
    header, rest = parts_of(data)
    described = json.loads(header["__metadata__"][KEY])
    change(described)
    header["__metadata__"][KEY] = json.dumps(described)
    return joined(header, rest)


def of_weight(name: str, **fields: Any) -> Callable[[dict[str, Any]], None]:
    return lambda described: described["weights"][name].update(fields)


LIES: dict[str, tuple[Callable[[dict[str, Any]], None], str]] = {
    "another version": (lambda d: d.update(version=2), "is of version 2"),
    "another format": (lambda d: d.update(format="x"), "does not say format"),
    "a weight too many": (lambda d: d["weights"].update(new=d["weights"][A]), r"'new\.packed_values' .* is missing"),
    "a weight that is there": (lambda d: d["weights"].update(embed=d["weights"][A]), "holds 'embed' twice"),
    "an alias of nothing": (lambda d: d.update(aliases={"x": "absent"}), "has no tensor 'absent' to call 'x'"),
    "an alias that is taken": (lambda d: d.update(aliases={"embed": A}), "to call 'embed'"),
    "a larger shape": (of_weight(A, shape=[80, 16]), r"should have torch\.float32 and shape \(320, 2\), and has"),
    "a huge shape": (of_weight(A, shape=[2**40, 16]), r"should have .* shape \(4398046511104, 2\)"),
    "a shape of no tensor": (of_weight(A, shape=[2**62, 16]), "no tensor can have it"),
    "another pattern": (of_weight(A, pattern="1:4"), r"should have torch\.float32 and shape \(32, 1\)"),
    "a longer group": (of_weight(A, pattern="2:8"), r"should have .* shape \(16, 2\)"),
    "a huge group": (of_weight(A, pattern="2:1048576", shape=[32, 1048576]), "group=1048576 is too long to pack"),
    "a group as long as allowed": (of_weight(A, pattern="2:4096", shape=[32, 4096]), r"packed_places' should have"),
    "another dimension": (of_weight(A, dim=2), f"the dim of '{A}' is 2"),
    "another dtype": (of_weight(A, dtype="F16"), r"should have torch\.float16 .*, and has F32"),
    "another code of places": (of_weight(B, places="bitmask"), r"packed_places' should have"),
    "no signs": (of_weight(B, signs=True), r"packed_signs' should have .* is missing"),
}


@pytest.mark.parametrize("lie", LIES)
def test_packed_metadata_that_contradicts_the_tensors_is_refused(lie: str, tmp_path: Path) -> None:
    change, message = LIES[lie]
    file = originals(tmp_path)["packed"]
    file.write_bytes(with_description(file.read_bytes(), change))
    before = listing(tmp_path)
    for function in (verify, load_packed, lambda path: unpack(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=rf"packed is not a readable packed file: .*{message}"):
            function(file)
    assert listing(tmp_path) == before


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (A, "its places name more or fewer than 2 entries in a group of 4"),
        ("layers.1.b.weight", "its places are not 2 ascending numbers below 16 in every group"),
        (B, None),  # three is a place as good as any
    ],
)
@pytest.mark.parametrize("part", ["packed_places", "packed_values"])
def test_places_out_of_range_are_found_and_nothing_is_written(
    part: str, name: str, message: str | None, tmp_path: Path
) -> None:
    file = originals(tmp_path)["packed"]
    header, rest = parts_of(file.read_bytes())
    start, end = header[f"{name}.{part}"]["data_offsets"]
    file.write_bytes(joined(header, rest[:start] + b"\xff" * (end - start) + rest[end:]))
    before = listing(tmp_path)
    if part == "packed_values" or message is None:  # any bits are a value
        unpack(file, tmp_path / "out")
        assert torch.isnan(load_packed(file)[name].float()).any() == (part == "packed_values")
    else:
        with pytest.raises(ValueError, match=f"packed: tensor '{name}' cannot be read: {message}"):
            unpack(file, tmp_path / "out")
        assert listing(tmp_path) == before


@pytest.mark.parametrize("original", ["dense", "packed"])
def test_a_file_cut_at_any_place_is_refused(original: str, tmp_path: Path) -> None:
    file = originals(tmp_path)[original]
    data = file.read_bytes()
    selection = tensors()[1]
    for length in {*range(40), *range(0, len(data), 97), *range(len(data) - 20, len(data))}:
        file.write_bytes(data[:length])
        with pytest.raises(ValueError, match=r"is not a readable safetensors file: ."):
            verify(file, selection)


HUGE = """
import resource, sys, torch
from pathlib import Path
from admm_nxm import verify
from admm_nxm.io.packed import load_packed, unpack

used = int(next(line for line in open("/proc/self/status") if line.startswith("VmSize")).split()[1]) * 1024
resource.setrlimit(resource.RLIMIT_AS, (used + 200_000_000, resource.RLIM_INFINITY))
for file in sorted(Path(sys.argv[1]).iterdir()):
    for function in (verify, load_packed, lambda path: unpack(path, path.parent / "out")):
        try:
            function(file)
        except ValueError as error:
            print("refused")
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="memory is read from /proc")
def test_huge_claims_are_refused_before_memory_is_taken(tmp_path: Path) -> None:
    packed = originals(tmp_path)["packed"].read_bytes()
    (tmp_path / "damaged").mkdir()
    claims = {
        "a": with_description(packed, of_weight(A, shape=[2**33, 16])),
        "b": with_description(packed, of_weight(A, pattern="2:4096", shape=[32, 4096])),
        "c": with_description(packed, of_weight(A, pattern=f"2:{2**33}", shape=[32, 2**33])),
    }
    header, rest = parts_of(packed)
    header[f"{A}.packed_values"]["shape"] = [2**33, 2]
    claims["d"] = joined(header, rest)
    claims["e"] = (2**40).to_bytes(8, "little") + packed[8:]
    for name, data in claims.items():
        (tmp_path / "damaged" / name).write_bytes(data)
    done = subprocess.run(
        [sys.executable, "-c", HUGE, str(tmp_path / "damaged")],
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (0, ["refused"] * 3 * len(claims)), done.stderr
    assert sorted(listing(tmp_path / "damaged")) == sorted(claims)


# ---------------------------------------------------------------- checkpoints of a run


def trained(build: Build, steps: int) -> ADMMNxM:
    net = make_net()
    optimizer = build(net)
    train(net, optimizer, steps)
    return optimizer


def refuses(build: Build, state_dict: Any, message: str) -> None:
    """Loading raises, and what was there before still is."""
    optimizer = trained(build, 3)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state_dict)
    after = optimizer.state_dict()
    assert after["param_groups"] == before["param_groups"]
    assert after["state"].keys() == before["state"].keys()
    for key, entry in before["state"].items():
        for name, value in entry.items():
            found = after["state"][key][name]
            assert same_bits(found, value) if isinstance(value, Tensor) else found == value


@every_form
def test_a_checkpoint_file_that_is_damaged_loads_or_is_refused(build: Build, tmp_path: Path) -> None:
    """``torch.load(weights_only=True)`` refuses most damage; what it lets through, ``load_state_dict`` must stand."""
    rng = random.Random(0)
    torch.save(trained(build, FROZEN).state_dict(), tmp_path / "state.pt")
    data = (tmp_path / "state.pt").read_bytes()
    outcomes = set()
    for number in range(60):
        (tmp_path / "state.pt").write_bytes(cut(data, rng) if number % 3 == 0 else flip(data, rng))
        try:
            loaded = torch.load(tmp_path / "state.pt", weights_only=True)
        except Exception:  # of many kinds, all of them torch's own
            outcomes.add("refused by torch")
            continue
        try:
            build(make_net()).load_state_dict(loaded)
        except ValueError:
            outcomes.add("refused")
        else:
            outcomes.add("loaded")
    assert {"refused by torch", "loaded"} <= outcomes  # a flipped bit of a number is a number


ENTRIES: dict[str, tuple[Callable[[Tensor], Any], str]] = {
    "None": (lambda t: None, "is a NoneType: the checkpoint is damaged"),
    "a number": (lambda t: 3.0, "is a float: the checkpoint is damaged"),
    "text": (lambda t: "x", "is a str: the checkpoint is damaged"),
    "complex": (lambda t: t.to(torch.complex64), r"is torch\.complex64 of layout"),
    "int64": (lambda t: t.to(torch.int64), r"is torch\.int64 of layout"),
    "sparse": (lambda t: t.float().to_sparse(), r"is torch\.float32 of layout torch\.sparse_coo"),
    "not finite": (
        lambda t: torch.full(t.shape, float("nan")),
        "has NaN or infinite entries: .*; resume from an earlie",
    ),
    "flat": (lambda t: t.reshape(-1), r"has shape \(128,\), the weight has \(16, 8\)"),
    "a row less": (lambda t: t[:-1], r"has shape \(15, 8\)"),
    "one entry": (lambda t: torch.zeros((), dtype=t.dtype), r"has shape \(\)"),
}


@pytest.mark.parametrize("damage", ENTRIES)
@every_form
def test_a_damaged_state_of_a_weight_is_named(build: Build, damage: str) -> None:
    change, message = ENTRIES[damage]
    state_dict = trained(build, FROZEN).state_dict()
    names = [name for name in ("admm_mask", "admm_consensus") if name in state_dict["state"][0]]
    assert names[0] == "admm_mask"
    for name in names:
        damaged = copy.deepcopy(state_dict)
        damaged["state"][0][name] = change(damaged["state"][0][name])
        refuses(build, damaged, f"the checkpoint's {name} for weight 'blocks.0.up.weight' {message}")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *(("admm_step", value) for value in (-5, 1.5, "x", None, float("inf"), torch.ones(3))),
        *(("admm_rho", value) for value in (float("nan"), -1.0, torch.tensor(float("nan")), [1])),
        *(("admm_pruned_at", value) for value in (torch.ones(2), float("nan"), 2**70)),
        ("admm_selection", "x"),
        ("admm_residual", None),
        ("admm_worst_residual", "x"),
    ],
)
@every_form
def test_a_damaged_counter_is_named(build: Build, key: str, value: Any) -> None:
    state_dict = trained(build, 5).state_dict()
    state_dict["param_groups"][0][key] = value
    refuses(build, state_dict, f"the checkpoint's {key} is .*damaged|its weights were pruned at step .*damaged")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: None, "it has no 'state'"),
        (lambda d: [], "it has no 'state'"),
        (lambda d: {}, "it has no 'state'"),
        (lambda d: {**d, "state": None}, "it has no 'state'"),
        (lambda d: {"state": d["state"]}, "it has no 'param_groups'"),
        (lambda d: {**d, "param_groups": []}, "it has no 'param_groups'"),
        (lambda d: {**d, "param_groups": [3]}, "a parameter group has no 'params'"),
        (lambda d: {**d, "param_groups": [{}]}, "a parameter group has no 'params'"),
        (lambda d: {"state": {}, "param_groups": [{**d["param_groups"][0], "params": [0, 0]}]}, "a parameter twice"),
        (lambda d: {**d, "param_groups": [{**d["param_groups"][0], "params": [77]}]}, "which no group names"),
        (lambda d: {**d, "state": {**d["state"], 0: 3}}, "its state of parameter 0 is int"),
        (lambda d: {**d, "state": {**d["state"], 0: {"step": "x"}}}, "its step of parameter 0 is 'x'"),
        (lambda d: {**d, "state": {**d["state"], 0: {"step": torch.ones(2)}}}, "its step of parameter 0 is tensor"),
        (lambda d: {**d, "state": {**d["state"], 0: {"x": torch.ones(2, device="meta")}}}, "parameter 0 has no data"),
    ],
)
def test_what_is_no_state_dict_is_refused(change: Callable[[dict[str, Any]], Any], message: str) -> None:
    damaged = change(trained(admm, FROZEN).state_dict())
    refuses(admm, damaged, f"this is no whole state dict of an optimizer: .*{message}")
