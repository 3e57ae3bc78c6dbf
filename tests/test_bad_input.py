"""Bad input is refused at construction, with the value, what is allowed and a remedy that works."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import admm_nxm
from admm_nxm import ADMMNxM, Every, Pattern, Penalty
from tests.cores import adamw, exact, paper
from tests.helpers import Net, assert_same_weights, make_net, train, weights_of


def build(**options: Any) -> ADMMNxM:
    net = make_net()
    return ADMMNxM(adamw(net), net, **options)


LENGTH = {"total_steps": 40}
BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "pattern in the wrong order": ({"pattern": "4:2"}, ValueError, ["'4:2'", '"2:4"']),
    "NxM in the wrong order": ({"pattern": "2x4"}, ValueError, ["'2x4'", '"4x2"']),
    "pattern misspelt": ({"pattern": "2/4"}, ValueError, ["'2/4'", '"2:4"', '"4x2"']),
    "keep above group": ({"pattern": "5:4"}, ValueError, ["'5:4'"]),
    "keep below 1": ({"pattern": "0:4"}, ValueError, ["keep=0", "keep >= 1"]),
    "pattern of another type": ({"pattern": 24}, TypeError, ["24", "Pattern"]),
    "width not divisible": ({"pattern": "3:5"}, ValueError, ["blocks.0.up.weight", "(16, 8)", "width 8", "skip"]),
    "no length": (
        {"total_steps": None},
        ValueError,
        ["neither total_steps nor prune_at", "give total_steps=(", "prune_at=("],
    ),
    "no steps": ({"total_steps": 0}, ValueError, ["total_steps=0", "at least 1"]),
    "steps of another type": ({"total_steps": 1e3}, TypeError, ["1000.0", "int"]),
    "epochs of a schedule": ({"total_steps": True}, TypeError, ["total_steps=True", "it counts optimizer steps"]),
    "pruned before the first step": ({"prune_at": -1}, ValueError, ["prune_at=-1", "at least 0"]),
    "pruned beyond the end": ({"prune_at": 41}, ValueError, ["prune_at=41", "total_steps=40", "at most"]),
    "pruned after the whole run, as a share": (
        {"prune_at": 1.0},
        ValueError,
        ["prune_at=1.0", "between 0 and 1", "0.85"],
    ),
    "no calibration": ({"calibration_steps": 0}, ValueError, ["calibration_steps=0", "at least 1"]),
    "calibration of another type": ({"calibration_steps": 2.0}, TypeError, ["calibration_steps=2.0", "int"]),
    "calibration that does not fit": (
        {"calibration_steps": 35},
        ValueError,
        ["calibration_steps=35 for each of 1 windows", "prune_at=34", "at most 34"],
    ),
    "no memory": ({"statistics_memory": 0}, ValueError, ["statistics_memory=0", "at least 1"]),
    "memory of another type": ({"statistics_memory": "1GB"}, TypeError, ["statistics_memory='1GB'", "number"]),
    "unknown w-step": ({"w_step": "lazy"}, ValueError, ["w_step='lazy'", '"exact"', '"optimizer"', "Penalty(rho="]),
    "w-step of another type": ({"w_step": 0.1}, ValueError, ["w_step=0.1", '"exact"', "Penalty("]),
    "calibration of the paper's form": (
        {"w_step": "optimizer", "calibration_steps": 3, "statistics_memory": 10**6},
        TypeError,
        ['for w_step="exact" alone: calibration_steps and statistics_memory; leave out'],
    ),
    "unknown treatment of the ineligible": ({"ineligible": "warn"}, ValueError, ["'warn'", '"error"', '"skip"']),
    "select of another type": ({"select": "2:4"}, TypeError, ["select", "mapping"]),
    "select rule that matches nothing": ({"select": {"encoder.*": "2:4"}}, ValueError, ["'encoder.*'", "whole name"]),
    "select that prunes nothing": ({"select": {".*": None}}, ValueError, ["no prunable weight", "select="]),
    "dims out of range": ({"dims": {".*up.weight": 2}}, ValueError, ["dimension 2", "blocks.0.up.weight", "-2 to 1"]),
    "negative rho": ({"w_step": Penalty(-0.1)}, ValueError, ["-0.1", "at least 0"]),
    "rho not a number": ({"w_step": Penalty(float("nan"))}, ValueError, ["nan", "finite"]),
    "rho of another type": ({"w_step": Penalty("0.1")}, TypeError, ["'0.1'", "number or a schedule"]),  # type: ignore[arg-type]
    "schedule that turns negative": (
        {"w_step": Penalty(lambda step: 0.1 - step / 50, Every(1, dual_start=None))},
        ValueError,
        ["returns -", "at step 6", "at least 0"],
    ),
    "schedule that falls under a dual": (
        {"w_step": Penalty(lambda step: 1 / (1 + step), Every(5))},
        ValueError,
        ["falls from 1.0 to", "at step 5", "dual_start=None"],
    ),
    "update interval of zero": ({"w_step": Penalty(0.1, 0)}, ValueError, ["update_every=0", "at least 1"]),
    "update interval of another type": ({"w_step": Penalty(0.1, 2.5)}, TypeError, ["2.5", "int or a schedule"]),  # type: ignore[arg-type]
    "interval beyond the freeze": (
        {"w_step": Penalty(0.1, 30)},
        ValueError,
        ["update_every=30", "prune_at=28", "shorter interval"],
    ),
}


@pytest.mark.parametrize(("options", "error", "parts"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_option_is_refused_with_value_range_and_remedy_and_the_inner_optimizer_stays_as_it_was(
    options: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    net = make_net()
    inner = adamw(net)
    groups = [dict(group) for group in inner.param_groups]
    with pytest.raises(error) as caught:
        ADMMNxM(inner, net, **{**LENGTH, **options})
    for part in parts:
        assert part in str(caught.value)
    assert [dict(group) for group in inner.param_groups] == groups
    assert not inner.state
    assert exact(net).phase == "dense"


class Around(torch.optim.Optimizer):
    """Optimizers that hold another one, in the shapes that are out there."""

    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside
        self.param_groups = inside.param_groups

    def step(self, closure: Any = None) -> Any:
        return self.inside.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.inside.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        return {"inside": self.inside.state_dict()}


class CannotSave(Around):
    state_dict = torch.optim.Optimizer.state_dict


class WithoutGroups(Around):
    def __init__(self, inside: torch.optim.Optimizer) -> None:
        self.inside = inside


class InBackward(torch.optim.SGD):
    def fused_backward(self) -> None: ...


@pytest.mark.parametrize(
    ("cls", "said"),
    [
        (Around, "Around saves no 'state' and 'param_groups'.*wrap the optimizer inside it.*put Around around that"),
        (CannotSave, "CannotSave cannot save its state .AttributeError.*wrap the optimizer inside it"),
        (WithoutGroups, "WithoutGroups has no param_groups; use an optimizer that has them"),
        (InBackward, "InBackward updates the weights during the backward pass.*such as AdamW"),
    ],
)
def test_an_optimizer_that_cannot_be_stepped_and_resumed_from_outside_is_refused(cls: Any, said: str) -> None:
    net = make_net()
    with pytest.raises(TypeError, match=said):
        ADMMNxM(cls(net.parameters() if cls is InBackward else adamw(net)), net, **LENGTH)  # type: ignore[arg-type]
    if cls in (Around, CannotSave):
        inside = exact(net)
        train(net, cls(inside), 40)
        assert inside.finalize().ok


@pytest.mark.parametrize("gone", ["penalty", "saliency", "state_dtype", "freeze_at", "residual_tolerance", "rho"])
def test_what_is_no_option_is_refused(gone: str) -> None:
    with pytest.raises(TypeError, match=gone):
        build(**LENGTH, **{gone: None})


def test_exact_form_needs_the_module_and_says_so() -> None:
    net = make_net()
    with pytest.raises(
        TypeError, match=r'model is a generator, and w_step="exact" watches the passes of modules; pass the'
    ):
        ADMMNxM(adamw(net), net.named_parameters(), **LENGTH)  # type: ignore[arg-type]
    assert ADMMNxM(adamw(net), net, **LENGTH)  # type: ignore[arg-type]
    assert ADMMNxM.paper(adamw(net), net.named_parameters(), **LENGTH)  # type: ignore[arg-type]


def test_weights_that_are_not_finite_cannot_begin_pruned() -> None:
    net = make_net()
    with torch.no_grad():
        net.blocks[1].down.weight[0, 0] = float("nan")
    before = weights_of(net)
    plain = [dict(group) for group in adamw(net).param_groups]
    for make in (ADMMNxM, ADMMNxM.paper):
        inner = adamw(net)
        with pytest.raises(ValueError, match=r"entries after step 0: blocks\.1\.down\.weight; nothing was changed"):
            make(inner, net, total_steps=40, prune_at=0)
        assert_same_weights(net, before)
        assert [dict(group) for group in inner.param_groups] == plain


def frozen(net: Net) -> None:
    net.blocks[1].down.weight.requires_grad_(False)


def quantised(net: Net) -> None:
    net.blocks[1].down.weight = nn.Parameter(torch.zeros(8, 16, dtype=torch.int8), requires_grad=False)


def sparse(net: Net) -> None:
    net.blocks[1].down.weight = nn.Parameter(torch.eye(8, 16).to_sparse())


def eight_bits(net: Net) -> None:
    net.blocks[1].down.weight = nn.Parameter(torch.zeros(8, 16).to(torch.float8_e4m3fn))


INELIGIBLE: dict[str, tuple[Callable[[Net], None], str, str]] = {
    "frozen": (frozen, "requires_grad=False", "unfreeze it"),
    "quantised": (quantised, "torch.int8 (quantised)", "prune before quantising"),
    "8-bit float": (eight_bits, "torch.float8_e4m3fn", "bfloat16"),
    "sparse": (sparse, "torch.sparse_coo", "to_dense"),
}


@pytest.mark.parametrize(("change", "value", "remedy"), INELIGIBLE.values(), ids=INELIGIBLE.keys())
def test_ineligible_weight_is_an_error_or_is_skipped_on_request(
    change: Callable[[Net], None], value: str, remedy: str
) -> None:
    net = make_net()
    change(net)
    dense = [p for p in net.parameters() if p.is_floating_point() and p.layout == torch.strided]
    inner = torch.optim.SGD(dense, lr=0.1)
    with pytest.raises(ValueError, match=r"blocks\.1\.down\.weight") as caught:
        ADMMNxM(inner, net, total_steps=40)
    assert value in str(caught.value)
    assert remedy in str(caught.value)
    optimizer = ADMMNxM(inner, net, total_steps=40, ineligible="skip")
    assert [w.name for w in optimizer.selection] == [
        "blocks.0.up.weight",
        "blocks.0.down.weight",
        "blocks.1.up.weight",
    ]
    skipped = next(s for s in optimizer.selection.skipped if s.name == "blocks.1.down.weight")
    assert value in skipped.reason


def test_weight_that_the_inner_optimizer_does_not_hold_is_an_error_or_is_skipped() -> None:
    net = make_net()
    inner = torch.optim.SGD(net.blocks[0].parameters(), lr=0.1)
    with pytest.raises(ValueError, match=r"blocks\.1\.up\.weight.*does not hold it.*pass it to the inner optimizer"):
        ADMMNxM(inner, net, total_steps=40)
    assert len(ADMMNxM(inner, net, total_steps=40, ineligible="skip").selection) == 2


def test_tied_weights_are_constrained_once() -> None:
    net = make_net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    optimizer = exact(net)
    assert [w.name for w in optimizer.selection if "up" in w.name] == ["blocks.0.up.weight"]
    assert optimizer.selection["blocks.0.up.weight"].aliases == ("blocks.1.up.weight",)
    assert torch.equal(optimizer.auxiliary("blocks.1.up.weight"), optimizer.auxiliary("blocks.0.up.weight"))


def test_no_prunable_weight_is_an_error() -> None:
    head = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"no prunable weight.*outside the repeated blocks.*select="):
        ADMMNxM(torch.optim.SGD(head.parameters(), lr=0.1), head, total_steps=40)


def test_wrapping_twice_is_refused() -> None:
    net = make_net()
    optimizer = exact(net)
    with pytest.raises(TypeError, match="already wrapped"):
        ADMMNxM(optimizer, net, total_steps=40)


def test_wrapping_what_accelerate_has_prepared_is_refused_with_the_right_order() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = make_net()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(torch.optim.AdamW(net.parameters(), lr=1e-2))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer.*first.*Accelerator\.prepare"):
        ADMMNxM(prepared, net, total_steps=40)
    both = accelerator.prepare(exact(net))
    with pytest.raises(TypeError, match="already wrapped"):
        ADMMNxM(both, net, total_steps=40)


def test_optimizer_that_keeps_its_state_on_one_rank_is_refused() -> None:
    class ZeroRedundancyOptimizer(torch.optim.SGD):
        pass

    net = make_net()
    with pytest.raises(TypeError, match=r"one rank only.*FSDP2"):
        ADMMNxM(ZeroRedundancyOptimizer(net.parameters(), lr=0.1), net)


@pytest.mark.parametrize(
    ("inner", "message"),
    [
        (torch.optim.AdamW, "the class AdamW; pass an instance"),
        (None, "NoneType; a torch.optim.Optimizer is needed"),
        ("AdamW", "a str; a torch.optim.Optimizer is needed"),
    ],
)
def test_what_is_no_optimizer_is_refused(inner: Any, message: str) -> None:
    with pytest.raises(TypeError, match=re.escape(message)):
        ADMMNxM(inner, make_net(), total_steps=40)


def test_differentiable_inner_optimizer_is_refused() -> None:
    net = make_net()
    with pytest.raises(ValueError, match="differentiable=False"):
        ADMMNxM(torch.optim.SGD(net.parameters(), lr=0.1, differentiable=True), net, total_steps=40)


def test_model_without_names_is_refused_with_the_way_to_names() -> None:
    net = make_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"named_parameters\(\)"):
        ADMMNxM.paper(inner, net.parameters(), total_steps=40)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ADMMNxM.paper(inner, 3, total_steps=40)  # type: ignore[arg-type]


@pytest.mark.parametrize("make", [exact, paper])
@pytest.mark.parametrize("prune_at", [0, 30])
def test_sparse_gradients_of_a_prunable_weight_are_refused(make: Callable[..., ADMMNxM], prune_at: int) -> None:
    net = make_net()
    optimizer = make(net, total_steps=40, prune_at=prune_at)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net.get_parameter("blocks.1.up.weight").grad = torch.eye(16, 8).to_sparse()
    before = weights_of(net)
    with pytest.raises(ValueError, match=r"'blocks\.1\.up\.weight' has a torch\.sparse_coo gradient.*\(sparse=False\)"):
        optimizer.step()
    assert_same_weights(net, before)


def test_public_names_are_the_promised_ones() -> None:
    promised = {
        "ADMMNxM",
        "ConvergenceWarning",
        "Figures",
        "Residuals",
        "WeightResidual",
        "Pattern",
        "keep_mask",
        "project",
    }
    promised |= {
        "solve",
        "Solved",
        "Constant",
        "Every",
        "Ramp",
        "Update",
        "SelectedWeight",
        "Selection",
        "SkippedWeight",
    }
    promised |= {"SparsityReport", "SparsityViolation", "WeightReport", "verify", "ModelReport", "model_report"}
    assert promised <= set(admm_nxm.__all__)
    assert sorted(admm_nxm.__all__) == list(admm_nxm.__all__)
    assert all(hasattr(admm_nxm, name) for name in admm_nxm.__all__)


def test_parameters_that_were_joined_after_construction_are_an_error_with_the_way_out() -> None:
    net = make_net()
    optimizer = exact(net)
    joined = nn.Parameter(torch.cat([p.detach().flatten() for p in net.parameters()]))
    optimizer.inner.param_groups[0]["params"] = [joined]
    with pytest.raises(
        ValueError, match=r"no longer holds prunable weight 'blocks\.0\.up\.weight'.*build both optimizers"
    ):
        train(net, optimizer, 1)


def test_one_pattern_object_serves_as_its_spelling_does() -> None:
    assert [w.pattern for w in build(**LENGTH, pattern=Pattern(1, 8)).selection] == [Pattern(1, 8)] * 4
