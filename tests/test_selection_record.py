"""The selection of a run is recorded with what is saved, and what reads a file reads it first."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from admm_nxm import Pattern, SelectedWeight, Selection, SkippedWeight, model_report, project, verify
from admm_nxm.cli import main
from admm_nxm.io.files import open_checkpoint
from admm_nxm.io.packed import load_packed, pack, unpack
from admm_nxm.io.prune import prune_files
from admm_nxm.io.selection_record import (
    read_selection,
    record_selection,
    selection_from_json,
    selection_metadata,
    selection_to_json,
)
from admm_nxm.report.histogram import count_pairs
from admm_nxm.selection import select_weights
from tests.helpers import Net, make_net

HEAD = {r"head\.weight": "1:4", r"blocks\.0\..*": "2:8"}
"""Rules that no rule by name would guess."""


def run() -> tuple[Net, Selection]:
    """A model as a run with rules of its own leaves it."""
    net = make_net()
    selection, params = select_weights(net, select=HEAD)
    with torch.no_grad():
        for weight in selection:
            params[weight.name].copy_(project(params[weight.name], weight.pattern, weight.dim))
    return net, selection


def in_a_folder(folder: Path, *, prefix: str = "", shards: bool = False) -> Selection:
    net, selection = run()
    state = {prefix + name: t for name, t in net.state_dict().items()}
    if shards:
        files = {name: f"model-{1 + ('head' in name)}-of-2.safetensors" for name in state}
        for file in sorted(set(files.values())):
            save_file({name: t for name, t in state.items() if files[name] == file}, folder / file)
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}), encoding="utf-8")
    else:
        save_file(state, folder / "model.safetensors")
    record_selection(folder, selection)
    return selection


def in_a_file(path: Path) -> Selection:
    net, selection = run()
    save_file(net.state_dict(), path, metadata=selection_metadata(selection))
    return selection


def counted(report: Any) -> dict[str, str]:
    return {weight.name: str(weight.pattern) for weight in report}


COUNTED = {"blocks.0.up.weight": "2:8", "blocks.0.down.weight": "2:8", "head.weight": "1:4"}


# ---------------------------------------------------------------- the text

names = st.text(min_size=1, max_size=20)
patterns = st.tuples(st.integers(1, 16), st.integers(1, 16)).filter(lambda p: p[0] <= p[1]).map(lambda p: Pattern(*p))
shapes = st.lists(st.integers(0, 64), min_size=1, max_size=4).map(tuple)


@st.composite
def selections(draw: Any) -> Selection:
    known = draw(st.lists(names, unique=True, max_size=12))
    cut, aliased = sorted((draw(st.integers(0, len(known))), draw(st.integers(0, len(known)))))
    weights = []
    for name in known[:cut]:
        shape = draw(shapes)
        weights.append(SelectedWeight(name, shape, draw(patterns), draw(st.integers(0, len(shape) - 1))))
    if weights:
        first = weights[0]
        weights[0] = SelectedWeight(first.name, first.shape, first.pattern, first.dim, tuple(known[cut:aliased]))
    rest = known[aliased if weights else cut :]
    return Selection(
        tuple(weights), tuple(SkippedWeight(name, draw(shapes), draw(st.text()), draw(st.booleans())) for name in rest)
    )


@given(selections(), st.sampled_from([None, 2]))
def test_a_record_gives_the_selection_back(selection: Selection, indent: int | None) -> None:
    assert selection_from_json(selection_to_json(selection, indent=indent)) == selection


def entry(**changes: object) -> dict[str, object]:
    return {"pattern": "2:4", "shape": [4, 8], "dim": 1, **changes}


def text(**changes: object) -> str:
    return json.dumps({"format": "admm-nxm-selection", "version": 1, "weights": {"w": entry()}, **changes})


@pytest.mark.parametrize(
    ("damaged", "said"),
    [
        ("{", "it is no JSON"),
        ("[]", "does not say format 'admm-nxm-selection'"),
        ("[" * 100_000, "nested too deep"),
        ('{"a": 1, "a": 2}', "it has 'a' twice"),
        (text(format="other"), "does not say format"),
        (text(version=2), "is of version 2, and this admm_nxm reads version 1"),
        (text(version=True), "is of version True"),
        (text(weights=[]), "its weights are no object"),
        (text(weights={"w": 3}), "the shape of 'w' is None"),
        (text(weights={"w": entry(shape=[4, -8])}), "the shape of 'w' is"),
        (text(weights={"w": entry(dim=2)}), "the dim of 'w' is 2"),
        (text(weights={"w": entry(dim=True)}), "the dim of 'w' is True"),
        (text(weights={"w": entry(pattern="4:2")}), "2:4"),
        (text(weights={"w": entry(pattern=2)}), "the pattern of 'w' is 2"),
        (text(aliases={"v": "x"}), "it calls 'v' another name of 'x'"),
        (text(aliases={"v": ["w"]}), "it calls 'v' another name of"),
        (text(left_dense={"v": {"shape": [3]}}), "it gives no reason why 'v' is dense"),
        (text(left_dense={"v": {"shape": "3", "reason": ""}}), "the shape of 'v' is '3'"),
        (text(left_dense={"v": {"shape": [3], "reason": "", "wanted": 1}}), "wanted=1 of 'v'"),
    ],
)
def test_a_damaged_record_is_an_error_that_names_its_place(damaged: str, said: str, tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    (tmp_path / "admm_nxm.json").write_text(damaged, encoding="utf-8")
    with pytest.raises(ValueError, match=r"admm_nxm\.json is no readable record .*" + re.escape(said)):
        verify(tmp_path)
    assert not verify(tmp_path, "2:4").ok, "an explicit pattern does without the record"


# ---------------------------------------------------------------- read first


@pytest.mark.parametrize("shards", [False, True])
def test_a_folder_is_counted_by_its_record(shards: bool, tmp_path: Path) -> None:
    selection = in_a_folder(tmp_path, shards=shards)
    report = verify(tmp_path)
    assert report.ok
    assert counted(report) == COUNTED
    with open_checkpoint(tmp_path) as checkpoint:
        assert read_selection(checkpoint) == selection
    full = model_report(tmp_path)
    assert (full.ok, counted(full)) == (True, COUNTED)
    assert {weight.name: weight.reason for weight in full.dense}["blocks.1.up.weight"] == "no select rule matches"
    assert list(count_pairs(tmp_path, tmp_path, None, str, 8)) == list(COUNTED)


def test_a_file_is_counted_by_the_record_in_its_metadata(tmp_path: Path) -> None:
    in_a_file(tmp_path / "weights.safetensors")
    report = verify(tmp_path / "weights.safetensors")
    assert (report.ok, counted(report)) == (True, COUNTED)
    assert counted(model_report(tmp_path / "weights.safetensors")) == COUNTED
    assert counted(verify(tmp_path)) == COUNTED


def test_one_shard_is_counted_by_its_part_of_the_record(tmp_path: Path) -> None:
    in_a_folder(tmp_path, shards=True)
    assert counted(verify(tmp_path / "model-2-of-2.safetensors")) == {"head.weight": "1:4"}
    assert counted(verify(tmp_path / "model.safetensors.index.json")) == COUNTED


def test_a_file_beside_a_record_of_other_weights_goes_by_its_names(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    save_file({"layers.0.fc.weight": torch.ones(4, 8)}, tmp_path / "other.safetensors")
    assert counted(verify(tmp_path / "other.safetensors")) == {"layers.0.fc.weight": "2:4"}


def test_an_explicit_pattern_goes_before_the_record(tmp_path: Path) -> None:
    selection = in_a_folder(tmp_path)
    default = {f"blocks.{i}.{part}.weight": "2:4" for i in (0, 1) for part in ("up", "down")}
    assert counted(verify(tmp_path, "2:4")) == default
    assert counted(verify(tmp_path, {r"head\.weight": "2:4"})) == {"head.weight": "2:4"}
    assert counted(verify(tmp_path, Selection(selection.weights[:1], ()))) == {"blocks.0.up.weight": "2:8"}


def test_what_was_asked_for_and_left_dense_is_still_told(tmp_path: Path) -> None:
    selection = in_a_folder(tmp_path)
    late = SkippedWeight("blocks.1.up.weight", (16, 8), "added to the optimizer after construction", wanted=True)
    record_selection(tmp_path, selection.with_skipped(late))
    report = verify(tmp_path)
    assert report.skipped == (late,)
    assert "not covered: blocks.1.up.weight (added to the optimizer after construction)" in str(report)


def test_a_pruned_weight_that_was_filled_since_is_found(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    state = make_net().state_dict()
    save_file(state, tmp_path / "model.safetensors")
    assert [weight.name for weight in verify(tmp_path).violations] == list(COUNTED)


def test_tied_weights_are_found_by_any_of_their_names(tmp_path: Path) -> None:
    weight = project(torch.randn(8, 8), "1:4")
    selected = SelectedWeight("a.weight", (8, 8), Pattern(1, 4), 1, ("b.weight",))
    save_file({"b.weight": weight}, tmp_path / "model.safetensors")
    record_selection(tmp_path, Selection((selected,), ()))
    assert verify(tmp_path).ok


# ---------------------------------------------------------------- names that saving has changed


def test_a_renamed_part_is_found(tmp_path: Path) -> None:
    selection = in_a_folder(tmp_path, prefix="model.")
    report = verify(tmp_path)
    assert report.ok
    assert counted(report) == {f"model.{name}": pattern for name, pattern in COUNTED.items()}
    renamed = {w.name: w for w in selection}
    parts = tuple(SelectedWeight(f"language_model.{w.name}", w.shape, w.pattern, w.dim) for w in renamed.values())
    record_selection(tmp_path, Selection(parts, ()))
    assert counted(verify(tmp_path)).keys() == counted(report).keys()


def test_a_weight_that_is_gone_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    in_a_folder(tmp_path)
    state = {name: t for name, t in run()[0].state_dict().items() if name != "head.weight"}
    save_file(state, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"records that 'head\.weight' was pruned, and .* Give a pattern or rules"):
        verify(tmp_path)
    assert verify(tmp_path, {r"blocks\.0\..*": "2:8"}).ok


def test_what_two_weights_may_be_is_not_guessed(tmp_path: Path) -> None:
    weight = torch.zeros(8, 8)
    save_file({"x.a.fc.weight": weight, "y.a.fc.weight": weight.clone()}, tmp_path / "model.safetensors")
    record_selection(tmp_path, Selection((SelectedWeight("z.a.fc.weight", (8, 8), Pattern(2, 4), 1),), ()))
    with pytest.raises(ValueError, match=r"records that 'z\.a\.fc\.weight' was pruned"):
        verify(tmp_path)


# ---------------------------------------------------------------- written by prune, kept by pack and unpack


@pytest.mark.parametrize("shards", [False, True])
def test_prune_records_what_it_did(shards: bool, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    in_a_folder(tmp_path / "a", shards=shards)
    rules = {r"blocks\.1\..*": "1:8"}
    prune_files(tmp_path / "a", tmp_path / "b", select=rules)
    report = verify(tmp_path / "b")
    assert (report.ok, counted(report)) == (True, {f"blocks.1.{part}.weight": "1:8" for part in ("up", "down")})


def test_prune_records_in_the_metadata_of_a_file(tmp_path: Path) -> None:
    in_a_file(tmp_path / "a.safetensors")
    prune_files(tmp_path / "a.safetensors", tmp_path / "b.safetensors", select={r"blocks\.1\..*": "1:8"})
    assert set(counted(verify(tmp_path / "b.safetensors")).values()) == {"1:8"}
    save_file(make_net().state_dict(), tmp_path / "c.safetensors")
    prune_files(tmp_path / "c.safetensors", tmp_path / "d.safetensors", "1:4")
    assert verify(tmp_path / "d.safetensors").ok
    assert set(counted(verify(tmp_path / "d.safetensors")).values()) == {"1:4"}
    with safe_open(tmp_path / "d.safetensors", "pt") as file:
        assert file.metadata()["format"] == "pt", "transformers wants it where there is metadata"


def test_files_pruned_within_a_folder_do_not_keep_a_stale_record(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    in_a_file(tmp_path / "a" / "model.safetensors")
    prune_files(tmp_path / "a", tmp_path / "b", "1:4")
    assert set(counted(verify(tmp_path / "b")).values()) == {"1:4"}


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_packing_goes_by_the_record_and_keeps_it(kind: str, tmp_path: Path) -> None:
    if kind == "folder":
        (tmp_path / "a").mkdir()
        in_a_folder(tmp_path / "a")
        source, packed, back = tmp_path / "a", tmp_path / "b", tmp_path / "c"
    else:
        in_a_file(tmp_path / "a.safetensors")
        source, packed, back = (tmp_path / f"{name}.safetensors" for name in "abc")
    report = pack(source, packed)
    assert counted(report) == COUNTED
    assert counted(verify(packed)) == COUNTED
    unpack(packed, back)
    assert counted(verify(back)) == COUNTED
    files = [back / "model.safetensors", source / "model.safetensors"] if kind == "folder" else [back, source]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_packed_file_of_no_record_says_what_is_packed(tmp_path: Path) -> None:
    net, _ = run()
    save_file(net.state_dict(), tmp_path / "a.safetensors")
    pack(tmp_path / "a.safetensors", tmp_path / "b.safetensors", select=HEAD)
    report = verify(tmp_path / "b.safetensors")
    assert (report.ok, counted(report)) == (True, COUNTED)
    reasons = {weight.name: weight.reason for weight in model_report(tmp_path / "b.safetensors").dense}
    assert reasons["blocks.1.up.weight"] == "stored as it was"
    assert reasons["blocks.0.up.bias"] == "not a matrix"


def test_a_module_that_is_packed_is_recorded(tmp_path: Path) -> None:
    net, selection = run()
    pack(net, tmp_path / "a.safetensors", select=selection)
    unpack(tmp_path / "a.safetensors", tmp_path / "b.safetensors")
    assert counted(verify(tmp_path / "b.safetensors")) == COUNTED


def test_commands_read_the_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    in_a_folder(tmp_path)
    for arguments in (["verify"], ["report"], ["pack", "-o", str(tmp_path.with_suffix(".out"))]):
        assert main([arguments[0], str(tmp_path), *arguments[1:], "--json"]) == 0
        told = json.loads(capsys.readouterr().out)
        assert {weight["name"]: weight["pattern"] for weight in told["weights"]} == COUNTED


def test_a_record_needs_a_folder(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="save the model first"):
        record_selection(tmp_path / "none", run()[1])


# ---------------------------------------------------------------- weights without an address


class Inside(Tensor):
    """A weight that is held by another tensor and has no memory of its own, as torchao's training wrappers."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> Inside:
        made: Inside = Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)  # type: ignore[attr-defined]
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        from torch.utils._pytree import tree_map_only

        out = func(
            *tree_map_only(Inside, lambda t: t.inner, args), **tree_map_only(Inside, lambda t: t.inner, kwargs or {})
        )
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(out)
        return args[0] if func.__name__.split(".")[0].endswith("_") and isinstance(args[0], cls) else out


def wrapped(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Inside(module.weight.detach()))
    return net


def test_weights_without_an_address_are_not_taken_for_one(tmp_path: Path) -> None:
    net, selection = run()
    plain_state = {name: t.clone() for name, t in net.state_dict().items()}
    inside = wrapped(net)
    assert {t.data_ptr() for name, t in inside.state_dict().items() if name.endswith("weight")} == {0}
    assert verify(inside, selection).ok
    report = model_report(inside, selection)
    assert (report.ok, counted(report)) == (True, COUNTED)
    assert report.parameters == sum(t.numel() for t in plain_state.values())
    pack(inside, tmp_path / "a.safetensors", select=selection)
    loaded = load_packed(tmp_path / "a.safetensors")
    assert loaded.keys() == plain_state.keys()
    assert all(torch.equal(loaded[name], t) for name, t in plain_state.items())


def test_tied_weights_without_an_address_are_stored_once(tmp_path: Path) -> None:
    net, selection = run()
    inside = wrapped(net)
    inside.blocks[1].up.weight = inside.blocks[0].up.weight  # type: ignore[index, union-attr]
    pack(inside, tmp_path / "a.safetensors", select=selection)
    loaded = load_packed(tmp_path / "a.safetensors")
    assert loaded["blocks.1.up.weight"].data_ptr() == loaded["blocks.0.up.weight"].data_ptr()
    assert loaded["blocks.1.down.weight"].data_ptr() != loaded["blocks.0.down.weight"].data_ptr()
