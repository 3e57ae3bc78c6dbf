"""A small model, deterministic training, and bitwise comparison."""

from __future__ import annotations

import inspect
import io
import warnings
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, prune, verify

STEPS = 20
"""Length of a run here. With the exact w-step it is dense up to step 14, calibrates for 3 steps and is frozen after
step 17; the paper's form is frozen after step 14."""

DENSE, CALIBRATION, FROZEN = 6, 15, 18
"""A number of finished steps within each phase of the exact form."""

TWO_WINDOWS = 4 * (8**2 + 16**2) * 2
"""Bytes of statistics that let the four weights of :class:`Net` be calibrated in two windows: steps 11 to 14, and 14 to
17."""


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


def saved(state: Any) -> Any:
    """What comes back from disk, read as untrusted."""
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# ---------------------------------------------------------------- inner optimizers

Factory = Callable[[nn.Module], Optimizer]


def _params(cls: type[Optimizer], net: nn.Module) -> list[Tensor]:
    # Muon takes matrices only; what it does not hold simply is not trained here.
    return [p for p in net.parameters() if p.ndim == 2 or cls.__name__ != "Muon"]


def _factory(cls: type[Optimizer], options: dict[str, object]) -> Factory:
    return lambda net: cls(_params(cls, net), lr=1e-2, **options)  # type: ignore[call-arg]


def torch_optimizers() -> dict[str, Factory]:
    """Every torch.optim class that takes dense gradients, plain and fused.

    The implementation by foreach keeps the same state, and does the same to the same tensors: two stand for it.
    """
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
            variants = [("-single", {"foreach": False})]
        if name in ("AdamW", "SGD"):
            variants.append(("-foreach", {"foreach": True}))
        if "fused" in accepted:
            variants.append(("-fused", {"fused": True}))
        for number, options in enumerate(extra.get(name, [{}])):
            for suffix, variant in variants:
                key = name + suffix + ("-options" if number else "")

                factories[key] = _factory(cls, {**options, **variant})
    return factories


def outside_optimizers() -> dict[str, Factory]:
    """Optimizers of other packages; a missing package, or one that needs a GPU, skips with its reason."""

    def schedulefree(name: str) -> Factory:
        def make(net: nn.Module) -> Optimizer:
            package = pytest.importorskip("schedulefree", reason="schedulefree is not installed")
            optimizer = getattr(package, name)(net.parameters(), lr=1e-2)
            optimizer.train()
            return optimizer

        return make

    def bitsandbytes(name: str) -> Factory:
        def make(net: nn.Module) -> Optimizer:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # it speaks of the missing GPU on import
                package = pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
            optimizer = getattr(package.optim, name)(net.parameters(), lr=1e-2)
            probe = nn.Linear(4, 4)
            trial = getattr(package.optim, name)(probe.parameters(), lr=1e-2)
            probe(torch.ones(1, 4)).sum().backward()
            try:
                trial.step()
            except Exception as error:
                pytest.skip(f"bitsandbytes' {name} does not run on this device: {type(error).__name__}: {error}")
            return optimizer

        return make

    return {
        "schedulefree.AdamW": schedulefree("AdamWScheduleFree"),
        "schedulefree.SGD": schedulefree("SGDScheduleFree"),
        "schedulefree.RAdam": schedulefree("RAdamScheduleFree"),
        "bitsandbytes.AdamW": bitsandbytes("AdamW"),
        "bitsandbytes.AdamW8bit": bitsandbytes("AdamW8bit"),
        "bitsandbytes.Lion": bitsandbytes("Lion"),
    }


TORCH_OPTIMIZERS = torch_optimizers()
OUTSIDE_OPTIMIZERS = outside_optimizers()
ALL_OPTIMIZERS = {**TORCH_OPTIMIZERS, **OUTSIDE_OPTIMIZERS}

A_FEW = ("AdamW-single", "AdamW-fused", "SGD-foreach-options", "Adagrad-single", "Adafactor-single")

FEW_OF_EACH_KIND = {**{name: TORCH_OPTIMIZERS[name] for name in A_FEW}, **OUTSIDE_OPTIMIZERS}
"""For what does not depend on the update: state before the first step, factored state, second sets of weights."""


# ---------------------------------------------------------------- the two w-steps

Build = Callable[..., ADMMNxM]


def begun(net: nn.Module, options: Mapping[str, Any]) -> nn.Module:
    """The network, pruned by magnitude if the run is to begin with pruned weights."""
    if options.get("prune_at") == 0 and not verify(net, options["pattern"]).ok:
        prune(net, options["pattern"], select=options.get("select"))
    return net


def admm(net: nn.Module, factory: Factory | None = None, **options: Any) -> ADMMNxM:
    """The exact form around an inner optimizer (AdamW unless said otherwise), at pattern 1:4, over a run of STEPS."""
    inner = (factory or TORCH_OPTIMIZERS["AdamW-single"])(net)
    options = {"pattern": "1:4", "total_steps": STEPS, "calibration_steps": 3, **options}
    return ADMMNxM(inner, begun(net, options), **options)


def paper(net: nn.Module, factory: Factory | None = None, **options: Any) -> ADMMNxM:
    """The paper's form likewise."""
    inner = (factory or TORCH_OPTIMIZERS["AdamW-single"])(net)
    options = {"pattern": "1:4", "total_steps": STEPS, "rho": 0.5, **options}
    return ADMMNxM.paper(inner, begun(net, options), **options)


FORMS: dict[str, Build] = {"exact": admm, "paper": paper}

# A toy run of the paper's form is too short to come near its pattern, and says so.
UNSETTLED = (
    "ignore:the run has not reached its pattern:admm_nxm.ConvergenceWarning",
    "ignore:the mask had not settled:admm_nxm.ConvergenceWarning",
)
unsettled = pytest.mark.filterwarnings(*UNSETTLED)


def _form(name: str) -> Any:
    return pytest.param(FORMS[name], id=name, marks=[unsettled] if name == "paper" else [])


every_form = pytest.mark.parametrize("build", [_form(name) for name in FORMS])


def forms_and_inners(factories: Mapping[str, Factory], few: Collection[str] = A_FEW) -> pytest.MarkDecorator:
    """The exact form over every inner optimizer, the paper's form over a few."""
    cases = [
        pytest.param(build, factory, id=f"{form}-{name}", marks=[unsettled] if form == "paper" else [])
        for form, build in FORMS.items()
        for name, factory in factories.items()
        if form == "exact" or name in few
    ]
    return pytest.mark.parametrize(("build", "factory"), cases)


LIGHTNING_ADVICE = (
    "Starting from v1.9.0, `tensorboardX` has been removed",  # so it logs to csv files
    "The '.*_dataloader' does not have many workers",
    "Checkpoint directory .* exists and is not empty",
    "The number of training batches .* is smaller than the logging interval",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",  # Lightning asks torch in the old way
)
"""Beginnings of what Lightning warns of in toy runs."""
