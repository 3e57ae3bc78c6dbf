"""verify: every group counted, on modules, state dicts, files and folders, and damage reported as such."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn

from admm_nxm import (
    Pattern,
    SelectedWeight,
    Selection,
    SkippedWeight,
    SparsityReport,
    SparsityViolation,
    WeightReport,
    project,
    verify,
)
from admm_nxm.io.packed import pack
from admm_nxm.selection import select_weights
from tests.helpers import make_net
from tests.test_selection import compiled, tiny

NAME = "layers.0.fc.weight"


@torch.no_grad()
def pruned(model: nn.Module, pattern: str = "2:4") -> nn.Module:
    """Project the prunable weights in place."""
    selection, params = select_weights(model, pattern, trainable=False)
    for weight in selection:
        params[weight.name].copy_(project(params[weight.name], weight.pattern, weight.dim))
    return model


@torch.no_grad()
def spoiled(model: nn.Module) -> dict[str, int]:
    """Fill groups of the second and the last prunable weight; return how many of each."""
    selection, params = select_weights(model, trainable=False)
    bad = {selection.weights[1].name: 1, selection.weights[-1].name: 3}
    for name, groups in bad.items():
        params[name].movedim(selection[name].dim, -1)[:groups, 4:8] = 1.0
    return bad


def only(report: SparsityReport) -> WeightReport:
    (weight,) = report.weights
    return weight


def dense(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.ones(shape).to(dtype)


# ---------------------------------------------------------------- every kind of target


def in_a_file(model: nn.Module, folder: Path) -> Path:
    save_file({name: t.clone() for name, t in model.state_dict().items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def in_a_folder(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return folder


def in_shards(model: Any, folder: Path) -> Path:
    model.save_pretrained(folder, max_shard_size="8KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    return folder


def in_shards_without_index(model: nn.Module, folder: Path) -> Path:
    (in_shards(model, folder) / "model.safetensors.index.json").unlink()
    return folder


def packed_folder(model: Any, folder: Path) -> Path:
    """The model packed by what it satisfies, or as it is saved if that is not the pattern."""
    (folder / "dense").mkdir(exist_ok=True)
    try:
        pack(in_shards(model, folder / "dense"), folder / "packed", overwrite=True)
    except SparsityViolation:
        return folder / "dense"
    return folder / "packed"


def by_index(model: Any, folder: Path) -> Path:
    return in_shards(model, folder) / "model.safetensors.index.json"


TARGETS: dict[str, Callable[[Any, Path], Any]] = {
    "module": lambda model, folder: model,
    "compiled module": lambda model, folder: compiled(model),
    "DataParallel": lambda model, folder: nn.DataParallel(model),
    "state dict": lambda model, folder: model.state_dict(),
    "named parameters": lambda model, folder: dict(model.named_parameters()),
    "state dict of a compiled module": lambda model, folder: compiled(model).state_dict(),
    "state dict of a DataParallel": lambda model, folder: nn.DataParallel(model).state_dict(),
    "file": in_a_file,
    "path of a file as text": lambda model, folder: str(in_a_file(model, folder)),
    "folder": in_a_folder,
    "path of a folder as text": lambda model, folder: str(in_a_folder(model, folder)),
    "sharded folder": in_shards,
    "sharded folder without its index": in_shards_without_index,
    "index of a sharded folder": by_index,
    "packed sharded folder": packed_folder,
}


@pytest.mark.parametrize("by", ["default rules", "selection"])
@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("architecture", ["bert classifier", "gpt2"])
def test_every_kind_of_target_gives_the_same_counts(architecture: str, kind: str, by: str, tmp_path: Path) -> None:
    model = pruned(tiny(architecture))
    selection = select_weights(model, trainable=False)[0]
    pattern = selection if by == "selection" else None
    target = TARGETS[kind](model, tmp_path)
    report = verify(target, pattern)
    assert report.ok
    assert {weight.name for weight in report} == {weight.name for weight in selection}
    bad = spoiled(model)
    report = verify(TARGETS[kind](model, tmp_path), pattern)
    assert {weight.name: weight.bad_groups for weight in report.violations} == bad
    assert {weight.name: weight for weight in report} == {weight.name: weight for weight in verify(model)}


def test_verifying_changes_nothing() -> None:
    net = make_net().requires_grad_(False)
    before = {name: t.clone() for name, t in net.state_dict().items()}
    verify(net)
    assert all(torch.equal(before[name], t) for name, t in net.state_dict().items())
    assert not any(p.requires_grad for p in net.parameters())


def test_what_is_no_tensor_in_a_state_dict_is_passed_over() -> None:
    report = verify({NAME: project(torch.randn(4, 8), "2:4"), "epoch": 3, "_metadata": {"version": 1}})
    assert report.ok
    assert only(report).name == NAME


@pytest.mark.parametrize("target", [None, 3, [("a", dense(4, 4))], dense(4, 4), b"model"])
def test_another_target_is_refused(target: Any) -> None:
    with pytest.raises(TypeError, match=r"cannot verify a \w+; a module, a state dict or a path is needed"):
        verify(target)


# ---------------------------------------------------------------- the counts


@st.composite
def sparse_weights(draw: st.DrawFn) -> tuple[Tensor, Pattern, int]:
    pattern = Pattern.parse(draw(st.sampled_from(["1:4", "2:4", "2:8", "3:5", "4:4", "1:1"])))
    shape = [draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 3))]
    dim = draw(st.integers(0, 2))
    shape[dim] *= pattern.group
    entries = st.sampled_from([0.0, -0.0, 1.0, -2.0, float("nan"), float("inf"), 1e-45])
    count = shape[0] * shape[1] * shape[2]
    return torch.tensor(draw(st.lists(entries, min_size=count, max_size=count))).reshape(shape), pattern, dim


@given(sparse_weights())
def test_counts_equal_a_loop_over_all_groups(case: tuple[Tensor, Pattern, int]) -> None:
    w, pattern, dim = case
    rows = w.movedim(dim, -1).reshape(-1, pattern.group).tolist()
    bad = sum(sum(value != 0 for value in row) > pattern.keep for row in rows)
    zeros = sum(value == 0 for row in rows for value in row)
    report = verify({"w": w}, Selection((SelectedWeight("w", tuple(w.shape), pattern, dim),), ()))
    assert only(report) == WeightReport("w", tuple(w.shape), pattern, dim, len(rows), bad, zeros)
    assert only(report).numel == w.numel()
    assert only(report).sparsity == report.sparsity == pytest.approx(zeros / w.numel())
    assert report.ok == only(report).ok == (bad == 0)


@pytest.mark.parametrize("pattern", ["1:4", "4x1", "2:4", "2:8", Pattern(3, 16)])
def test_a_projected_weight_is_ok_and_a_tighter_pattern_is_violated(pattern: str | Pattern) -> None:
    keep, group = Pattern.parse(pattern).keep, Pattern.parse(pattern).group
    w = {NAME: project(torch.randn(8, 48), pattern)}
    assert verify(w, pattern).ok
    assert only(verify(w, pattern)).zeros == 8 * 48 * (group - keep) // group
    if keep > 1:
        assert only(verify(w, Pattern(keep - 1, group))).bad_groups == 8 * 48 // group


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e-45])
def test_what_is_no_zero_counts_as_non_zero(value: float) -> None:
    assert only(verify({NAME: torch.tensor([[0.0, value, value, value]])})).bad_groups == 1


def test_negative_zeros_are_zeros() -> None:
    report = verify({NAME: torch.tensor([[-0.0, 1.0, -0.0, 1.0]])})
    assert (report.ok, only(report).zeros) == (True, 2)


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.float8_e5m2]
)
@pytest.mark.parametrize("where", ["state dict", "file"])
def test_every_floating_dtype_is_counted(dtype: torch.dtype, where: str, tmp_path: Path) -> None:
    w = torch.tensor([[1.0, 0.0, -2.0, 0.0, 1.0, -1.0, 2.0, 0.0]]).to(dtype)
    if where == "file":
        save_file({NAME: w}, tmp_path / "model.safetensors")
    report = verify(tmp_path if where == "file" else {NAME: w})
    assert only(report) == WeightReport(NAME, (1, 8), Pattern(2, 4), 1, groups=2, bad_groups=1, zeros=3)


def test_a_weight_without_entries_has_no_bad_group() -> None:
    report = verify({NAME: torch.empty(0, 8)})
    assert (only(report).groups, only(report).sparsity, report.sparsity, report.ok) == (0, 0.0, 0.0, True)


def test_sparsity_weighs_each_weight_by_its_size() -> None:
    report = verify({"layers.0.a.weight": torch.zeros(1, 4), "layers.0.b.weight": dense(3, 4)})
    assert [weight.sparsity for weight in report] == [1.0, 0.0]
    assert report.sparsity == 0.25


def held_to(t: Tensor, dim: int = 1, pattern: str = "2:4") -> Selection:
    return Selection((SelectedWeight("w", tuple(t.shape), Pattern.parse(pattern), dim),), ())


@pytest.mark.parametrize(
    ("t", "problem"),
    [
        (torch.tensor(1.0), "it has no dimension 1"),
        (torch.ones(8), "it has no dimension 1"),
        (torch.ones(4, 6), "its width 6 along dim 1 is no multiple of 4"),
        (torch.ones(4, 8).to_sparse(), r"it is torch\.float32 of layout torch\.sparse_coo"),
        (torch.ones(4, 8, device="meta"), "it is torch.float32 of layout torch.strided on meta"),
    ],
)
def test_a_weight_whose_groups_cannot_be_counted_is_named(t: Tensor, problem: str) -> None:
    with pytest.raises(ValueError, match=rf"weight 'w' of shape \(.*\) cannot be counted: {problem}.*; leave it out"):
        verify({"w": t}, held_to(t))


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64, torch.complex64])
def test_numbers_of_any_kind_are_counted(dtype: torch.dtype) -> None:
    t = torch.tensor([[1, 0, 1, 0, 1, 1, 1, 0]]).to(dtype)
    assert only(verify({"w": t}, held_to(t))) == WeightReport("w", (1, 8), Pattern(2, 4), 1, 2, bad_groups=1, zeros=3)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (2, 0, 4)])
def test_an_empty_weight_has_no_group(shape: tuple[int, ...]) -> None:
    t = torch.empty(shape)
    for dim in range(t.ndim):
        if t.shape[dim] % 4 == 0:
            assert only(verify({"w": t}, held_to(t, dim))).groups == 0


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_weight_counted_in_pieces_counts_the_same(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    t = torch.randint(0, 2, (12, 24, 36))
    whole = verify({"w": t}, held_to(t, dim))
    for size in (1, 50, 1000):
        monkeypatch.setattr("admm_nxm.sparsity._ENTRIES_AT_ONCE", size)
        assert verify({"w": t}, held_to(t, dim)) == whole
    assert only(whole).zeros == int((t == 0).sum())


# ---------------------------------------------------------------- what the weights are held to


def test_without_a_pattern_it_is_two_of_four() -> None:
    assert {weight.pattern for weight in verify(make_net())} == {Pattern(2, 4)}


def test_rules_name_their_own_weights() -> None:
    net = pruned(make_net(), "1:4")
    rules = {r"blocks\.0\..*": None, r".*\.up\.weight": "1:4", r"head\.weight": "2:8"}
    report = verify(net, rules)
    assert {weight.name: (str(weight.pattern), weight.bad_groups) for weight in report} == {
        "blocks.1.up.weight": ("1:4", 0),
        "head.weight": ("2:8", 1),
    }


@pytest.mark.parametrize("pattern", [None, "2:4", {r".*\.up\.weight": "2:4"}])
def test_frozen_weights_are_counted(pattern: Any) -> None:
    report = verify(make_net().requires_grad_(False), pattern)
    assert len(report.weights) == (2 if isinstance(pattern, dict) else 4)
    assert report.skipped == ()


def test_a_function_names_weights_as_well() -> None:
    report = verify(make_net(), lambda name, module: "1:4" if name == "head.weight" else None)
    assert (only(report).name, only(report).bad_groups) == ("head.weight", 2)


@pytest.mark.parametrize("pattern", ["", "4:2", "two of four"])
def test_a_bad_pattern_is_refused(pattern: str) -> None:
    with pytest.raises(ValueError, match=f"pattern '{pattern}'"):
        verify(make_net(), pattern)


@pytest.mark.parametrize("pattern", [3, ["2:4"], 0])
def test_rules_of_another_kind_are_refused(pattern: Any) -> None:
    with pytest.raises(TypeError, match=r"a mapping or a callable \(name, module\) is needed"):
        verify(make_net(), pattern)


@pytest.mark.parametrize("target", [nn.Linear(8, 8), {}, {"epoch": 3}, {"bias": dense(8)}])
def test_nothing_to_count_is_an_error(target: Any) -> None:
    with pytest.raises(ValueError, match="no prunable weight"):
        verify(target)


def test_a_width_that_no_pattern_fits_is_listed_as_not_covered() -> None:
    target = {NAME: torch.zeros(4, 8), "layers.0.odd.weight": dense(4, 6)}
    report = verify(target)
    assert [weight.name for weight in report] == [NAME]
    reason = "its width 6 along dim 1 is no multiple of 4"
    assert report.skipped == (SkippedWeight("layers.0.odd.weight", (4, 6), reason, wanted=True),)
    assert f"not covered: layers.0.odd.weight ({reason})" in str(report).split("\n")


@pytest.mark.parametrize("where", ["state dict", "file"])
def test_quantised_weights_are_listed_as_not_covered(where: str, tmp_path: Path) -> None:
    tensors = {NAME: torch.zeros(4, 8), "layers.0.q.weight": dense(4, 8, dtype=torch.int8)}
    if where == "file":
        save_file(tensors, tmp_path / "model.safetensors")
    report = verify(tmp_path if where == "file" else tensors)
    assert [(skipped.name, skipped.reason) for skipped in report.skipped] == [
        ("layers.0.q.weight", "its dtype is torch.int8 (quantised)")
    ]


def test_what_was_left_dense_on_purpose_is_not_listed() -> None:
    assert verify(make_net()).skipped == ()


# ---------------------------------------------------------------- held to a selection


def selection_of(**aliases: tuple[str, ...]) -> Selection:
    return Selection((SelectedWeight(NAME, (4, 8), Pattern(2, 4), 1, aliases.get("aliases", ())),), ())


@pytest.mark.parametrize("name", [NAME, "layers.1.fc.weight", "layers.2.fc.weight"])
@pytest.mark.parametrize("where", ["state dict", "file"])
def test_a_tied_weight_is_found_by_any_of_its_names(name: str, where: str, tmp_path: Path) -> None:
    tensors = {name: dense(4, 8)}
    if where == "file":
        save_file(tensors, tmp_path / "model.safetensors")
    selection = selection_of(aliases=("layers.1.fc.weight", "layers.2.fc.weight"))
    report = verify(tmp_path if where == "file" else tensors, selection)
    assert (only(report).name, only(report).bad_groups) == (NAME, 8)


def test_a_tied_weight_of_a_module_is_found_by_its_second_name() -> None:
    net = pruned(make_net())
    net.blocks[1].up.weight = net.blocks[0].up.weight
    selection = Selection((SelectedWeight("blocks.1.up.weight", (16, 8), Pattern(2, 4), 1),), ())
    assert verify(net, selection).ok


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ({"layers.0.other.weight": dense(4, 8)}, "no such weight"),
        ({NAME: dense(8, 4)}, r"shape \(8, 4\)"),
        ({NAME: dense(32)}, r"shape \(32,\)"),
    ],
)
def test_a_weight_missing_or_of_another_shape_is_an_error(target: dict[str, Tensor], found: str) -> None:
    with pytest.raises(ValueError, match=rf"weight 'layers.0.fc.weight' of shape \(4, 8\); the target has {found}"):
        verify(target, selection_of())


def test_a_selection_without_weights_is_an_error() -> None:
    with pytest.raises(ValueError, match="the selection names no weight"):
        verify(make_net(), Selection((), ()))


def test_a_selection_counts_dense_weights_too() -> None:
    selection = select_weights(make_net(), select={r"head\.weight": "2:4"})[0]
    assert only(verify(make_net().state_dict(), selection)).name == "head.weight"


def test_what_a_selection_had_to_skip_stays_listed() -> None:
    skipped = SkippedWeight("layers.0.odd.weight", (4, 6), "its width 6 along dim 1 is no multiple of 4", wanted=True)
    dense_on_purpose = SkippedWeight("head.weight", (4, 8), "head or pooler")
    report = verify({NAME: torch.zeros(4, 8)}, Selection(selection_of().weights, (skipped, dense_on_purpose)))
    assert report.skipped == (skipped,)


# ---------------------------------------------------------------- reports


def two_bad_of_three() -> SparsityReport:
    return SparsityReport(
        (
            WeightReport("a", (4, 8), Pattern(2, 4), 1, groups=8, bad_groups=0, zeros=16),
            WeightReport("long.name", (2, 8), Pattern(1, 4), 1, groups=4, bad_groups=3, zeros=2),
            WeightReport("c", (8, 2), Pattern(2, 4), 0, groups=4, bad_groups=1, zeros=6),
        ),
        (SkippedWeight("odd", (4, 6), "its width is odd", wanted=True),),
    )


def test_a_violation_names_each_weight_with_its_bad_groups() -> None:
    with pytest.raises(SparsityViolation) as caught:
        two_bad_of_three().raise_if_violated()
    assert str(caught.value) == (
        "2 of 3 weights violate the pattern: long.name: 3 of 4 groups exceed 1:4; c: 1 of 4 groups exceed 2:4"
    )
    assert isinstance(caught.value, ValueError)


def test_a_report_without_violation_raises_nothing() -> None:
    report = verify(pruned(make_net()))
    assert report.raise_if_violated() is None
    assert (report.ok, report.violations) == (True, ())


def test_a_report_prints_as_a_table_with_a_verdict() -> None:
    report = two_bad_of_three()
    assert [weight.name for weight in report] == ["a", "long.name", "c"]
    assert str(report).split("\n") == [
        "weights    number  shape  pattern  zeros   groups  bad groups",
        "---------  ------  -----  -------  ------  ------  ----------",
        "a               1  4x8    2:4      50.00%       8           0",
        "long.name       1  2x8    1:4      12.50%       4           3",
        "c               1  8x2    2:4      37.50%       4           1",
        "not covered: odd (its width is odd)",
        "3 weights, 37.50% zeros, pattern VIOLATED by 2 of 3 weights",
    ]


def test_weights_of_all_blocks_share_a_line_unless_each_is_wanted() -> None:
    report = verify(pruned(make_net()))
    assert [line.split()[:2] for line in str(report).splitlines()[2:-1]] == [
        ["blocks.*.up.weight", "2"],
        ["blocks.*.down.weight", "2"],
    ]
    rows = report.to_text(per_weight=True, width=60).splitlines()[2:-1]
    assert [row.split()[0].lstrip("…") for row in rows] == [
        w.name[-len(row.split()[0].lstrip("…")) :] for w, row in zip(report, rows, strict=True)
    ]
    assert all(len(row) <= 60 for row in rows)


def test_the_verdict_of_a_pruned_model_is_ok() -> None:
    assert str(verify(pruned(make_net()))).split("\n")[-1] == "4 weights, 50.00% zeros, pattern ok"


# ---------------------------------------------------------------- damaged files


def whole_file(folder: Path) -> Path:
    save_file({NAME: dense(4, 8)}, folder / "model.safetensors")
    return folder / "model.safetensors"


DAMAGE: dict[str, Callable[[bytes], bytes]] = {
    "empty": lambda data: b"",
    "cut in the header": lambda data: data[:20],
    "cut in the data": lambda data: data[:-1],
    "longer than it says": lambda data: data + b"\0" * 8,
    "not safetensors": lambda data: b"PK\x03\x04 a pickled checkpoint, perhaps",
    "a header that is no json": lambda data: data[:8] + b"?" * len(data[8:]),
}


@pytest.mark.parametrize("named", ["file", "folder"])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named(damage: str, named: str, tmp_path: Path) -> None:
    file = whole_file(tmp_path)
    file.write_bytes(DAMAGE[damage](file.read_bytes()))
    with pytest.raises(ValueError, match=r"model\.safetensors is not a readable safetensors file: ."):
        verify(file if named == "file" else tmp_path)


@pytest.mark.parametrize("kind", [str, Path])
def test_a_path_with_nothing_there_is_an_error(kind: type, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing to verify at .*absent"):
        verify(kind(tmp_path / "absent"))


def test_a_folder_without_safetensors_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(FileNotFoundError, match=r"holds no \.safetensors file; save the model with save_pretrained"):
        verify(tmp_path)


INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        "{}",
        '{"weight_map": null}',
        '{"weight_map": ["model.safetensors"]}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": null}}',
    ],
)
def test_a_damaged_index_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(text, encoding="utf-8")
    with pytest.raises(
        ValueError, match=r"model\.safetensors\.index\.json is not a readable index of safetensors files"
    ):
        verify(tmp_path)


def test_an_index_that_is_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"model\.safetensors\.index\.json is not a readable index"):
        verify(tmp_path)


def test_a_shard_that_the_index_names_and_the_folder_lacks_is_named(tmp_path: Path) -> None:
    shard = sorted(in_shards(tiny("bert classifier"), tmp_path).glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ValueError, match=rf"{shard.name} is not a readable safetensors file"):
        verify(tmp_path)


def test_an_index_of_nothing_holds_no_weight(tmp_path: Path) -> None:
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": {}}), encoding="utf-8")
    with pytest.raises(ValueError, match="no prunable weight among 0 parameters"):
        verify(tmp_path)


def test_a_whole_file_goes_before_the_index_of_an_earlier_save_as_in_from_pretrained(tmp_path: Path) -> None:
    in_shards(tiny("bert classifier"), tmp_path)
    in_a_folder(pruned(tiny("bert classifier")), tmp_path)
    assert (tmp_path / INDEX).is_file(), "save_pretrained cleans up now: this test has lost its case"
    report = verify(tmp_path)
    assert report.ok
    loaded = type(tiny("bert classifier")).from_pretrained(tmp_path)
    assert verify(loaded).ok


def test_files_beside_the_model_are_not_counted(tmp_path: Path) -> None:
    save_file({NAME: torch.zeros(4, 8)}, tmp_path / "model.safetensors")
    save_file({"layers.0.adapter.weight": dense(4, 8)}, tmp_path / "adapter_model.safetensors")
    assert [weight.name for weight in verify(tmp_path)] == [NAME]


def test_two_files_with_the_same_weight_are_refused(tmp_path: Path) -> None:
    for file in ("consolidated.safetensors", "pytorch_model.safetensors"):
        save_file({NAME: dense(4, 8)}, tmp_path / file)
    with pytest.raises(
        ValueError, match=r"consolidated.*and.*pytorch_model.*both hold 'layers.0.fc.weight'; name the file"
    ):
        verify(tmp_path)
    assert not verify(tmp_path / "consolidated.safetensors").ok
