"""verify: the edges of what can be counted, what a report and a refusal say, and how much is held in memory."""

from __future__ import annotations

import re
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from admm_nxm import Pattern, SelectedWeight, Selection, SparsityReport, WeightReport, project, verify
from admm_nxm.io.files import open_checkpoint, stand_ins
from admm_nxm.io.packed import pack
from admm_nxm.sparsity import check_weights


def selected(*shapes: tuple[int, ...], dim: int = -1, pattern: str = "2:4") -> Selection:
    """A selection made by hand of the weights a, b, c, ..."""
    return Selection(
        tuple(
            SelectedWeight(name, shape, Pattern.parse(pattern), dim)
            for name, shape in zip("abcdef", shapes, strict=False)
        ),
        (),
    )


@pytest.mark.parametrize(("target", "kind"), [(3, "int"), ([torch.ones(4, 4)], "list"), (None, "NoneType")])
def test_target_of_another_kind_is_named(target: Any, kind: str) -> None:
    with pytest.raises(TypeError, match=f"^cannot verify a {kind}; a module, a state dict or a path is needed$"):
        verify(target)


@pytest.mark.parametrize("dim", [-2, -1, 0, 1])
def test_every_dimension_of_a_weight_may_be_the_grouped_one(dim: int) -> None:
    t = torch.zeros(8, 8)
    t.select(dim, 0)[:] = 1.0
    (weight,) = verify({"a": t}, selected((8, 8), dim=dim, pattern="1:4"))
    counts = (weight.groups, weight.bad_groups, weight.zeros)
    assert counts == (16, 0, 56)
    assert all(type(count) is int for count in counts)


def test_weight_of_one_dimension_is_counted() -> None:
    (weight,) = verify({"a": torch.tensor([1.0, 2.0, 3.0, 0.0, 0.0, 0.0, 0.0, 4.0])}, selected((8,)))
    assert (weight.groups, weight.bad_groups, weight.zeros) == (2, 1, 4)


def test_number_too_small_for_float32_is_not_taken_for_zero() -> None:
    (weight,) = verify({"a": torch.full((4, 4), 1e-300, dtype=torch.float64)}, selected((4, 4)))
    assert (weight.bad_groups, weight.zeros) == (4, 0)


@pytest.mark.parametrize("dim", [-3, 2])
def test_dimension_that_a_weight_does_not_have_is_named(dim: int) -> None:
    message = f"weight 'a' of shape (8, 8) cannot be counted: it has no dimension {dim}; leave it out of the selection"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        verify({"a": torch.zeros(8, 8)}, selected((8, 8), dim=dim))


def test_width_that_is_no_multiple_of_the_group_is_named() -> None:
    message = (
        "weight 'a' of shape (8, 6) cannot be counted: its width 6 along dim 1 is no multiple of 4; leave it out of "
        "the selection"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        verify({"a": torch.zeros(8, 6)}, selected((8, 6), dim=1))


def test_weight_without_data_is_named() -> None:
    message = (
        "weight 'a' of shape (8, 8) cannot be counted: it is torch.float16 of layout torch.strided on meta; leave it "
        "out of the selection"
    )
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        verify({"a": torch.zeros(8, 8, dtype=torch.float16, device="meta")}, selected((8, 8)))


def test_selection_without_weights_has_nothing_to_verify() -> None:
    with pytest.raises(ValueError, match=r"^the selection names no weight: there is nothing to verify$"):
        verify({"a": torch.zeros(8, 8)}, Selection((), ()))


@pytest.mark.parametrize(
    ("target", "found"), [({}, "no such weight"), ({"a": torch.zeros(4, 4)}, r"shape \(4, 4\)")], ids=["gone", "other"]
)
def test_weight_that_the_target_lacks_is_named_with_what_is_there(target: dict[str, Tensor], found: str) -> None:
    with pytest.raises(
        ValueError, match=rf"^the selection names weight 'a' of shape \(8, 8\); the target has {found}$"
    ):
        verify({**target, "z": torch.zeros(8, 8)}, selected((8, 8)))


@pytest.mark.parametrize("rules", [{".*": "2:4"}, lambda name, module: "2:4"], ids=["mapping", "function"])
def test_weight_that_the_rules_name_and_no_pattern_fits_is_listed(rules: Any) -> None:
    report = verify({"layers.0.fc.weight": torch.zeros(8, 8), "layers.1.fc.weight": torch.zeros(8, 6)}, rules)
    assert [w.name for w in report] == ["layers.0.fc.weight"]
    assert [w.name for w in report.skipped] == ["layers.1.fc.weight"]


def test_stand_ins_for_the_tensors_of_a_file_hold_no_data(tmp_path: Path) -> None:
    tensors = {"a": torch.zeros(8, 4, dtype=torch.bfloat16), "b": torch.zeros(3, dtype=torch.int8)}
    save_file(tensors, tmp_path / "model.safetensors")
    with open_checkpoint(tmp_path / "model.safetensors") as checkpoint:
        found = stand_ins(checkpoint)
    assert {name: (t.shape, t.dtype) for name, t in found.items()} == {
        name: (t.shape, t.dtype) for name, t in tensors.items()
    }
    assert all(t.is_meta for t in found.values())


def test_weights_that_are_read_one_by_one_do_not_pile_up() -> None:
    alive: list[weakref.ref] = []

    def get(name: str) -> Tensor:
        assert sum(ref() is not None for ref in alive) <= 1
        data = np.zeros((8, 8), dtype=np.float32)
        alive.append(weakref.ref(data))
        return torch.from_numpy(data)

    report = check_weights(selected(*[(8, 8)] * 6), get)
    assert len(report.weights) == len(alive) == 6
    assert report.sparsity == 1.0


def weight(name: str, groups: int, bad_groups: int, zeros: int) -> WeightReport:
    return WeightReport(name, (groups, 4), Pattern(2, 4), 1, groups, bad_groups, zeros)


def test_report_adds_up_its_weights() -> None:
    report = SparsityReport((weight("a", 2, 0, 4), weight("b", 6, 1, 11)))
    assert [w.numel for w in report] == [8, 24]
    assert [w.sparsity for w in report] == [0.5, 11 / 24]
    assert report.sparsity == 15 / 32
    assert [w.ok for w in report] == [True, False]
    assert not report.ok
    assert [w.name for w in report.violations] == ["b"]
    with pytest.raises(ValueError, match=r"^1 of 2 weights violate the pattern: b: 1 of 6 groups exceed 2:4$"):
        report.raise_if_violated()


def test_every_violation_is_listed() -> None:
    report = SparsityReport((weight("a", 2, 2, 0), weight("b", 6, 1, 11)))
    with pytest.raises(
        ValueError,
        match=r"^2 of 2 weights violate the pattern: a: 2 of 2 groups exceed 2:4; b: 1 of 6 groups exceed 2:4$",
    ):
        report.raise_if_violated()


def test_report_of_nothing_has_no_zeros() -> None:
    assert SparsityReport(()).sparsity == 0.0
    assert weight("a", 0, 0, 0).sparsity == 0.0


def test_tied_weights_of_a_packed_file_are_one_under_both_names(tmp_path: Path) -> None:
    weight = project(torch.randn(8, 16), "2:4")
    other = project(torch.randn(8, 16), "2:4")
    pack(
        {"layers.0.fc.weight": weight, "layers.1.fc.weight": weight, "layers.2.fc.weight": other},
        tmp_path / "a.safetensors",
    )
    with open_checkpoint(tmp_path / "a.safetensors") as checkpoint:
        found = stand_ins(checkpoint)
    assert found["layers.0.fc.weight"] is found["layers.1.fc.weight"]
    assert found["layers.2.fc.weight"] is not found["layers.0.fc.weight"]
    assert [w.name for w in verify(tmp_path / "a.safetensors")] == ["layers.0.fc.weight", "layers.2.fc.weight"]
