"""Each failure that docs/choosing.md shows is announced, with its own cause; the defaults are not."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

from admm_nxm import ADMMNxM, ConvergenceWarning, Every, Ramp
from tests.helpers import loss_of, make_net

STEPS = 60
PAGE = Path(__file__).parent.parent / "docs" / "choosing.md"


def noisy(net: nn.Module, optimizer: ADMMNxM, unused: str = "") -> None:
    """Train on inputs that differ from step to step, so that the ranking keeps moving a little."""
    generator = torch.Generator().manual_seed(1)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_of(net, torch.randn(4, 8, generator=generator)).backward()
        for name, p in net.named_parameters():
            if name == unused:
                p.grad = None
        optimizer.step()


def build(failure: str, net: nn.Module) -> ADMMNxM:
    inner = torch.optim.AdamW(net.parameters(), lr=1e-3)
    if failure == "The penalty is too weak":
        return ADMMNxM.paper(inner, net, pattern="1:4", total_steps=STEPS, rho=1e-3)
    options = {
        "The mask flips": {
            "penalty": "proximal",
            "rho": Ramp(1e-2, 0.3, start=3, stop=42),
            "update_every": Every(1, dual_start=0),
            "total_steps": STEPS,
        },
        "The run ended before the plan": {"total_steps": 4 * STEPS},
        "No penalty": {"total_steps": STEPS, "rho": 0.0},
        "One weight is left behind": {"total_steps": STEPS},
        "defaults": {"total_steps": STEPS},
    }[failure]
    return ADMMNxM(inner, net, pattern="1:4", **options)


ANNOUNCED = {
    "The penalty is too weak": r"penalty in the gradient \(rho = 0.001\).*Remedy: leave penalty at its default",
    "The mask flips": r"Likely cause: the last z-step still replaced \d\d% of the kept places: the dual was at "
    "work while the mask moved, and u grows by w until pruned weights out-rank kept ones. Remedy: leave the dual out "
    r"\(update_every=Every\(interval, dual_start=None\)\) or let it wait until the mask has settled, or leave penalty, "
    r"rho and update_every at their defaults\.$",
    "The run ended before the plan": rf"came after {STEPS} steps, and the penalty was to rise until step.*total_steps",
    "No penalty": r"no penalty was in force \(rho = 0\).*leave rho at its default",
    "One weight is left behind": r"most of all 'blocks.0.up.weight'.*Likely cause: this weight had no gradient for "
    r"long, or its learning rate is far from the others'. Remedy: train it, or leave it dense by a select rule\.$",
}


@pytest.mark.parametrize("failure", ANNOUNCED)
def test_documented_failure_is_announced_with_its_cause_and_remedy(failure: str) -> None:
    net = make_net()
    optimizer = build(failure, net)
    noisy(net, optimizer, unused="blocks.0.up.weight" if failure == "One weight is left behind" else "")
    with pytest.warns(ConvergenceWarning, match=f"(?s){ANNOUNCED[failure]}"):
        optimizer.finalize()


def test_defaults_are_silent_on_the_same_task() -> None:
    net = make_net()
    optimizer = build("defaults", net)
    noisy(net, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert optimizer.finalize().ok


UNSETTLED = (
    r"^the mask had not settled: the last z-step before the freeze replaced {}% of the kept places \(more than 10%\), "
    r"so the frozen mask is the one that happened to be there\. Likely cause: {}\. Remedy: leave the dual out "
    r"\(update_every=Every\(interval, dual_start=None\)\) or let it wait, let the learning rate decay before the "
    r"freeze, or leave penalty, rho and update_every at their defaults\.$"
)


def test_a_mask_that_moves_up_to_the_freeze_is_announced_although_nothing_is_left_to_project() -> None:
    net = make_net()
    inner = torch.optim.SGD(net.parameters(), lr=0.0)
    optimizer = ADMMNxM(inner, net, pattern="1:4", total_steps=20, update_every=1)
    for step in range(20):
        optimizer.zero_grad()
        loss_of(net, torch.randn(4, 8)).backward()
        with torch.no_grad():  # the ranking of w turns round at every step
            for weight in optimizer.selection:
                place = (step + torch.arange(dict(net.named_parameters())[weight.name].numel())) % 4
                state = optimizer.state[dict(net.named_parameters())[weight.name]]
                state["square_avg"] = torch.where(place == 0, 1e8, 1.0).view(weight.shape)
        optimizer.step()
    with pytest.warns(
        ConvergenceWarning, match=UNSETTLED.format("(99|100)", "the learning rate is high up to the freeze")
    ):
        optimizer.finalize()


def test_a_dual_that_unsettles_the_mask_is_announced_where_the_distance_is_tolerated() -> None:
    net = make_net()
    optimizer = build("The mask flips", net)
    optimizer.residual_tolerance = 9.0
    noisy(net, optimizer)
    why = "the dual was at work while the mask moved, and u grows by w until pruned weights out-rank kept ones"
    with pytest.warns(ConvergenceWarning, match=UNSETTLED.format(r"\d\d", why)):
        optimizer.finalize()


def test_unsettled_mask_is_announced_at_the_line_of_the_caller() -> None:
    net = make_net()
    optimizer = build("The mask flips", net)
    optimizer.residual_tolerance = 9.0
    noisy(net, optimizer)
    with pytest.warns(ConvergenceWarning, match="had not settled") as caught:
        optimizer.finalize()
    assert caught[0].filename == __file__


def test_page_has_a_heading_and_a_picture_for_each_failure() -> None:
    text = PAGE.read_text(encoding="utf-8")
    for failure in ANNOUNCED:
        section = re.search(rf"^## {re.escape(failure)}\n(.*?)(?=^## |\Z)", text, flags=re.MULTILINE | re.DOTALL)
        assert section is not None, failure
        (picture,) = re.findall(r"!\[.*?\]\((.*?)\)", section[1])
        assert (PAGE.parent / picture).is_file(), picture
