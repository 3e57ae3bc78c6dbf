"""Section 6 of the design: bad input is refused at construction, with the value, the allowed range and the remedy."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import admm_nxm
from admm_nxm import ADMMNxM, Every, Pattern, Ramp
from tests.helpers import (
    PENALTIES,
    WITH_DUAL,
    Net,
    admm,
    assert_same_weights,
    every_form,
    make_net,
    weights_of,
)


def build(**options: Any) -> ADMMNxM:
    net = make_net()
    return ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-2), net, **options)


BAD_OPTIONS: dict[str, tuple[dict[str, Any], type[Exception], list[str]]] = {
    "pattern in the wrong order": ({"pattern": "4:2"}, ValueError, ["'4:2'", '"2:4"']),
    "NxM in the wrong order": ({"pattern": "2x4"}, ValueError, ["'2x4'", '"4x2"']),
    "pattern misspelt": ({"pattern": "2/4"}, ValueError, ["'2/4'", '"2:4"', '"4x2"']),
    "keep above group": ({"pattern": "5:4"}, ValueError, ["'5:4'"]),
    "keep below 1": ({"pattern": "0:4"}, ValueError, ["keep=0", "keep >= 1"]),
    "pattern of another type": ({"pattern": 24}, TypeError, ["24", "Pattern"]),
    "width not divisible": ({"pattern": "3:5"}, ValueError, ["blocks.0.up.weight", "(16, 8)", "width 8", "skip"]),
    "unknown penalty": ({"penalty": "l2"}, ValueError, ["'l2'", *(f'"{penalty}"' for penalty in PENALTIES)]),
    "unknown saliency": ({"saliency": "fisher"}, ValueError, ["'fisher'", '"curvature"', '"magnitude"', "callable"]),
    "saliency of another type": ({"saliency": 0.5}, ValueError, ["saliency=0.5", "Curvature(exponent)", "callable"]),
    "negative rho": ({"rho": -0.1}, ValueError, ["-0.1", "at least 0"]),
    "rho not a number": ({"rho": float("nan")}, ValueError, ["nan", "finite"]),
    "infinite rho": ({"rho": float("inf")}, ValueError, ["inf", "finite"]),
    "rho of another type": ({"rho": "0.1"}, TypeError, ["'0.1'", "number or a schedule"]),
    "schedule that turns negative": (
        {"rho": lambda step: 0.1 - step / 50, "total_steps": 20, "update_every": Every(1, dual_start=None)},
        ValueError,
        ["rho is -", "at step 6", "at least 0"],
    ),
    "schedule that falls under a dual": (
        {"penalty": "proximal", "rho": lambda step: 1 / (1 + step), "total_steps": 20, "update_every": Every(5)},
        ValueError,
        ["falls from 1.0 to", "at step 5", "dual_start=None"],
    ),
    "update interval of zero": ({"update_every": 0}, ValueError, ["update_every=0", "at least 1"]),
    "update interval of another type": ({"update_every": 2.5}, TypeError, ["2.5", "int or a schedule"]),
    "no steps": ({"total_steps": 0}, ValueError, ["total_steps=0", "at least 1"]),
    "steps of another type": ({"total_steps": 1e3}, TypeError, ["1000.0", "int"]),
    "freeze before the first step": ({"freeze_at": 0}, ValueError, ["freeze_at=0", "at least 1"]),
    "freeze beyond the end": ({"total_steps": 20, "freeze_at": 21}, ValueError, ["freeze_at=21", "total_steps=20"]),
    "dual in the form that has none": (
        {"total_steps": 20, "update_every": Every(5)},
        ValueError,
        ["at step 5", 'penalty="lazy" has no dual', "Every(interval, dual_start=None)", 'penalty="proximal"'],
    ),
    "interval beyond the freeze": (
        {"total_steps": 100, "freeze_at": 70, "update_every": 80},
        ValueError,
        ["update_every=80", "steps from step", "after step 70", "shorter interval"],
    ),
    "state dtype not floating": (
        {"state_dtype": torch.int8},
        ValueError,
        ["torch.int8", "torch.bfloat16", "torch.bool for the mask alone", "32 bits or more"],
    ),
    "state dtype of another type": ({"state_dtype": "bfloat16"}, ValueError, ["'bfloat16'", "torch.bfloat16", "None"]),
    "layout of a mask as state dtype": ({"state_dtype": torch.uint8}, ValueError, ["torch.uint8", "torch.bool for"]),
    **{
        f"mask alone in the {penalty} form": (
            {"penalty": penalty, "state_dtype": torch.bool},
            ValueError,
            ["state_dtype=torch.bool must be one of", "torch.float32", "torch.bfloat16", "None for the weights' own"],
        )
        for penalty in WITH_DUAL
    },
    "unknown rounding": ({"state_rounding": "up"}, ValueError, ["state_rounding='up'", '"nearest"', '"stochastic"']),
    "rounding of another type": ({"state_rounding": None}, ValueError, ["state_rounding=None", '"stochastic"']),
    "stochastic rounding of a mask": (
        {"state_rounding": "stochastic"},
        ValueError,
        ["state_dtype=torch.bfloat16", '"proximal" or "gradient"', "state_dtype=None", 'penalty="lazy"'],
    ),
    "stochastic rounding of the lazy form's copy": (
        {"state_rounding": "stochastic", "state_dtype": torch.bfloat16},
        ValueError,
        ["adds up changes", '"proximal" or "gradient"', 'penalty="lazy"'],
    ),
    "stochastic rounding where nothing is rounded": (
        {"state_rounding": "stochastic", "penalty": "proximal"},
        ValueError,
        ["needs state_dtype=torch.bfloat16", "here are state_dtype=None"],
    ),
    "stochastic rounding to another dtype": (
        {"state_rounding": "stochastic", "penalty": "gradient", "state_dtype": torch.float16},
        ValueError,
        ["needs state_dtype=torch.bfloat16", "torch.float16"],
    ),
    "tolerance of another type": ({"residual_tolerance": "a"}, ValueError, ["'a'", "above 0"]),
    "tolerance of zero": ({"residual_tolerance": 0.0}, ValueError, ["residual_tolerance=0.0", "above 0"]),
    "unknown treatment of the ineligible": ({"ineligible": "warn"}, ValueError, ["'warn'", '"error"', '"skip"']),
    "select of another type": ({"select": "2:4"}, TypeError, ["select", "mapping"]),
    "select rule that matches nothing": ({"select": {"encoder.*": "2:4"}}, ValueError, ["'encoder.*'", "whole name"]),
    "select that prunes nothing": ({"select": {".*": None}}, ValueError, ["no prunable weight", "select="]),
    "dims out of range": ({"dims": {".*up.weight": 2}}, ValueError, ["dimension 2", "blocks.0.up.weight", "-2 to 1"]),
}


@pytest.mark.parametrize(("options", "error", "parts"), BAD_OPTIONS.values(), ids=BAD_OPTIONS.keys())
def test_bad_option_is_refused_with_value_range_and_remedy(
    options: dict[str, Any], error: type[Exception], parts: list[str]
) -> None:
    with pytest.raises(error) as caught:
        build(**options)
    for part in parts:
        assert part in str(caught.value)


DTYPES = "torch.float16, torch.bfloat16, torch.float32, torch.float64"
REFUSALS: dict[str, tuple[dict[str, Any], str]] = {
    "penalty": ({"penalty": "l2"}, 'penalty=\'l2\' must be one of "lazy", "proximal", "gradient"'),
    "tolerance": (
        {"residual_tolerance": -1},
        "residual_tolerance=-1 must be above 0: a share of the weights' norm",
    ),
    "state dtype of the lazy form": (
        {"state_dtype": torch.int8},
        (
            f"state_dtype=torch.int8 must be one of {DTYPES}, torch.bool for the mask alone, or None for that where "
            "the weights have 32 bits or more"
        ),
    ),
    "state dtype of another form": (
        {"state_dtype": torch.bool, "penalty": "gradient"},
        f"state_dtype=torch.bool must be one of {DTYPES}, or None for the weights' own",
    ),
    "rounding": ({"state_rounding": "up"}, 'state_rounding=\'up\' must be "nearest" or "stochastic"'),
    "rounding of a mask": (
        {"state_rounding": "stochastic"},
        (
            'state_rounding="stochastic" needs state_dtype=torch.bfloat16 and a form whose state adds up changes, '
            'penalty="proximal" or "gradient"; here are state_dtype=None and penalty="lazy"'
        ),
    ),
    "saliency": (
        {"saliency": "fisher"},
        (
            'saliency=\'fisher\' must be "curvature", "magnitude", Curvature(exponent) or a callable (state of the '
            "inner optimizer, shape) -> factor"
        ),
    ),
    "saliency of a form that knows magnitude": (
        {"saliency": "curvature", "penalty": "proximal"},
        (
            'saliency=\'curvature\' needs penalty="lazy": with penalty="proximal" the mask is read off the consensus '
            'by magnitude; use saliency="magnitude" or leave it out'
        ),
    ),
}


@pytest.mark.parametrize(("options", "message"), REFUSALS.values(), ids=REFUSALS.keys())
def test_refusal_reads_as_one_sentence_that_ends_in_the_remedy(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - compared as a whole
        build(**options)
    assert str(caught.value) == message


def test_stochastic_rounding_of_weights_that_are_as_narrow_as_the_state_is_refused() -> None:
    net = make_net(dtype=torch.bfloat16)
    options = {"penalty": "proximal", "state_dtype": torch.bfloat16, "state_rounding": "stochastic"}
    with pytest.raises(ValueError, match=r'rounds what is float32, .* are torch\.bfloat16; use .*"nearest"'):
        admm(net, **options)
    net.blocks[0].up.half()
    with pytest.raises(ValueError, match=r"prunable weights are torch\.bfloat16, torch\.float16; use"):
        admm(net, **options)
    net.blocks[0].up.float()
    assert admm(net, **options).state_rounding == "stochastic"


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
        ADMMNxM(inner, net)
    assert value in str(caught.value)
    assert remedy in str(caught.value)
    optimizer = ADMMNxM(inner, net, ineligible="skip")
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
        ADMMNxM(inner, net)
    assert len(ADMMNxM(inner, net, ineligible="skip").selection) == 2


def test_tied_weights_are_constrained_once() -> None:
    net = make_net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    optimizer = admm(net, total_steps=20)
    assert [w.name for w in optimizer.selection if "up" in w.name] == ["blocks.0.up.weight"]
    assert optimizer.selection["blocks.0.up.weight"].aliases == ("blocks.1.up.weight",)
    assert torch.equal(optimizer.auxiliary("blocks.1.up.weight"), optimizer.auxiliary("blocks.0.up.weight"))


def test_no_prunable_weight_is_an_error() -> None:
    head = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"no prunable weight.*outside the repeated blocks.*select="):
        ADMMNxM(torch.optim.SGD(head.parameters(), lr=0.1), head)


def test_wrapping_twice_is_refused() -> None:
    net = make_net()
    optimizer = admm(net)
    with pytest.raises(TypeError, match="already wrapped"):
        ADMMNxM(optimizer, net)


def test_wrapping_what_accelerate_has_prepared_is_refused_with_the_right_order() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = make_net()
    accelerator = accelerate.Accelerator(cpu=True)
    prepared = accelerator.prepare(torch.optim.AdamW(net.parameters(), lr=1e-2))
    with pytest.raises(TypeError, match=r"AcceleratedOptimizer.*first.*Accelerator\.prepare"):
        ADMMNxM(prepared, net)
    both = accelerator.prepare(admm(net))
    with pytest.raises(TypeError, match="already wrapped"):
        ADMMNxM(both, net)


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
        ADMMNxM(inner, make_net())


def test_differentiable_inner_optimizer_is_refused() -> None:
    net = make_net()
    with pytest.raises(ValueError, match="differentiable=False"):
        ADMMNxM(torch.optim.SGD(net.parameters(), lr=0.1, differentiable=True), net)


def test_model_without_names_is_refused_with_the_way_to_names() -> None:
    net = make_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(TypeError, match=r"named_parameters\(\)"):
        ADMMNxM(inner, net.parameters())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"torch\.nn\.Module"):
        ADMMNxM(inner, 3)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["blocks.0.up.weight", "blocks.1.up.weight"])
@every_form
def test_sparse_gradient_of_a_prunable_weight_is_refused(penalty: str, name: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=1.0, penalty=penalty)
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    net.get_parameter(name).grad = torch.eye(16, 8).to_sparse()
    before = weights_of(net)
    with pytest.raises(ValueError, match=rf"{re.escape(name)}.*sparse_coo gradient"):
        optimizer.step()
    assert_same_weights(net, before)


@pytest.mark.parametrize(
    ("options", "message"), [({"pattern": Pattern(3, 5)}, "no multiple"), ({"ineligible": "warn"}, "'warn'")]
)
def test_refused_construction_leaves_the_inner_optimizer_untouched(options: dict[str, Any], message: str) -> None:
    net = make_net()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    groups = [dict(group) for group in inner.param_groups]
    with pytest.raises((ValueError, RuntimeError), match=message):
        ADMMNxM(inner, net, **options)
    assert [dict(group) for group in inner.param_groups] == groups
    assert not inner.state


def test_public_names_are_the_promised_ones() -> None:
    promised = {"ADMMNxM", "Curvature", "Pattern", "Saliency", "SparsityReport", "keep_mask", "project", "verify"}
    assert promised <= set(admm_nxm.__all__)
    assert sorted(admm_nxm.__all__) == list(admm_nxm.__all__)
    assert all(hasattr(admm_nxm, name) for name in admm_nxm.__all__)
    assert Ramp(1.0, 1.0, start=0, stop=0)(5) == 1.0


def test_parameters_that_were_joined_after_construction_are_an_error_with_the_way_out() -> None:
    net = make_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = ADMMNxM(inner, net, total_steps=10)
    inner.param_groups[0]["params"] = [torch.nn.Parameter(torch.cat([p.detach().flatten() for p in net.parameters()]))]
    with pytest.raises(ValueError, match=r"was parameter \d of group 0 at construction.*fully_shard"):
        optimizer.step()
