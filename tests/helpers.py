"""A small model, deterministic training, and bitwise comparison."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, Every
from admm_nxm.forms import FORMS

PENALTIES = tuple(FORMS)
"""Every penalty; a new one is tested wherever this is used."""

FULL = "lazy-full"
CASES: dict[str, dict[str, Any]] = {
    **{name: {"penalty": name} for name in FORMS},
    FULL: {"penalty": "lazy", "state_dtype": torch.float32},
}
"""What every form is tested as: the lazy form with its mask alone, as it is by default, and with a state of the
weight's size."""

WITH_DUAL = tuple(name for name, form in FORMS.items() if form.takes_dual)
DEFAULT = inspect.signature(ADMMNxM).parameters["penalty"].default

every_penalty = pytest.mark.parametrize("penalty", PENALTIES)
every_form = pytest.mark.parametrize("penalty", CASES)
# The toy runs keep their learning rate until the freeze, and their few kept places may still change places then.
restless = pytest.mark.filterwarnings("ignore:the mask had not settled")
every_form_with_a_dual = pytest.mark.parametrize("penalty", WITH_DUAL)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, 2 * width)
        self.down = nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two repeated blocks (four prunable weights) and a head that stays dense."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width) for _ in range(2))
        self.head = nn.Linear(width, 1)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


def make_net(seed: int = 0, dtype: torch.dtype = torch.float32) -> Net:
    torch.manual_seed(seed)
    return Net().to(dtype)


def batches(count: int, start: int = 0, dtype: torch.dtype = torch.float32) -> Iterator[Tensor]:
    """The same inputs for the same step number, whoever asks."""
    for step in range(start, start + count):
        yield torch.randn(4, 8, generator=torch.Generator().manual_seed(1000 + step)).to(dtype)


def loss_of(net: nn.Module, x: Tensor) -> Tensor:
    return (net(x).float() - x.float().sum(-1, keepdim=True).sin()).square().mean()


def train(net: nn.Module, optimizer: Optimizer, count: int, start: int = 0) -> None:
    dtype = next(net.parameters()).dtype
    for x in batches(count, start, dtype):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()


def same_bits(a: Tensor, b: Tensor) -> bool:
    """Equal dtype, shape and bits; NaN equals NaN, and the two zeros differ."""
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype == torch.bool:
        return torch.equal(a, b)
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return torch.equal(a.contiguous().view(integer), b.contiguous().view(integer))


def weights_of(net: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in net.named_parameters()}


def assert_same_weights(a: nn.Module | dict[str, Tensor], b: nn.Module | dict[str, Tensor]) -> None:
    a = a if isinstance(a, dict) else weights_of(a)
    b = b if isinstance(b, dict) else weights_of(b)
    assert a.keys() == b.keys()
    different = [name for name in a if not same_bits(a[name], b[name])]
    assert not different, f"different bits in {different}"


Factory = Callable[[nn.Module], Optimizer]


def _params(cls: type[Optimizer], net: nn.Module) -> list[Tensor]:
    # Muon takes matrices only; what it does not hold simply is not trained here.
    return [p for p in net.parameters() if p.ndim == 2 or cls.__name__ != "Muon"]


def _factory(cls: type[Optimizer], options: dict[str, object]) -> Factory:
    return lambda net: cls(_params(cls, net), lr=1e-2, **options)  # type: ignore[call-arg]


def torch_optimizers() -> dict[str, Factory]:
    """Every torch.optim class that takes dense gradients, in each implementation it has."""
    refused = {"Optimizer", "LBFGS", "SparseAdam"}
    extra = {
        "SGD": [{}, {"momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
        "Adam": [{}, {"amsgrad": True, "weight_decay": 0.1}],
        "AdamW": [{}, {"amsgrad": True, "maximize": True}],
        "RMSprop": [{}, {"centered": True, "momentum": 0.9}],
    }
    factories: dict[str, Factory] = {}
    for name in sorted(vars(torch.optim)):
        cls = getattr(torch.optim, name)
        if not (inspect.isclass(cls) and issubclass(cls, Optimizer)) or name in refused:
            continue
        accepted = inspect.signature(cls).parameters
        variants = [("", {})]
        if "foreach" in accepted:
            variants = [("-single", {"foreach": False}), ("-foreach", {"foreach": True})]
        if "fused" in accepted:
            variants.append(("-fused", {"fused": True}))
        for number, options in enumerate(extra.get(name, [{}])):
            for suffix, variant in variants:
                key = name + suffix + ("-options" if number else "")

                factories[key] = _factory(cls, {**options, **variant})
    return factories


TORCH_OPTIMIZERS = torch_optimizers()

A_FEW = ("AdamW-single", "AdamW-fused", "SGD-foreach-options", "Adagrad-single", "Adafactor-single")


def forms_and_inners(factories: Mapping[str, Factory], few: Collection[str] = A_FEW) -> pytest.MarkDecorator:
    """The default form of the penalty over every inner optimizer, the other forms over a few."""
    cases = [
        pytest.param(penalty, factory, id=f"{penalty}-{name}")
        for penalty in CASES
        for name, factory in factories.items()
        if penalty == DEFAULT or name in few
    ]
    return pytest.mark.parametrize(("penalty", "factory"), cases)


def every(interval: int, penalty: str = DEFAULT) -> Every:
    """z moves every so many steps, and the dual with it where the form has one."""
    return Every(interval, dual_start=0 if penalty in WITH_DUAL else None)


def tolerance(penalty: str) -> float:
    """The default residual tolerance, except for the form that needs more steps than the runs here have."""
    return 9.0 if penalty == "gradient" else 0.02


def admm(net: nn.Module, factory: Factory | None = None, **options: object) -> ADMMNxM:
    """ADMMNxM around an inner optimizer (AdamW unless said otherwise), at pattern 1:4."""
    inner = (factory or TORCH_OPTIMIZERS["AdamW-single"])(net)
    return ADMMNxM(inner, net, **spelt_out({"pattern": "1:4", **options}))  # type: ignore[arg-type]


def spelt_out(options: Mapping[str, Any]) -> dict[str, Any]:
    """The options of ADMMNxM, where ``penalty`` may be the name of a case."""
    case = CASES.get(options.get("penalty", DEFAULT))
    return dict(options) if case is None else {**case, **options, "penalty": case["penalty"]}


def is_lean(penalty: str) -> bool:
    """Whether the case stores masks alone (for weights of 32 bits or more)."""
    return penalty not in WITH_DUAL and penalty != FULL


def primal_of(optimizer: ADMMNxM, p: Tensor) -> Tensor:
    """W itself, of a weight that has had a step and is not frozen."""
    return optimizer._form.primal(p.detach(), optimizer.state[p]["admm_consensus"], optimizer.rho)
