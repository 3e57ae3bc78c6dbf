"""The contract with the ecosystem: one section for each line of section 5 of the design, numbered as there.

Lines 5 (torch.distributed.checkpoint) and 11 (DTensor) have files of their own.
"""

from __future__ import annotations

import copy
import io
import pickle
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import Optimizer, lr_scheduler
from torch.optim.optimizer import (
    register_optimizer_step_post_hook,
    register_optimizer_step_pre_hook,
)
from torch.utils._python_dispatch import TorchDispatchMode

from admm_nxm import ADMMNxM, Constant, ConvergenceWarning, Every, Rise, keep_mask, project, verify
from admm_nxm.masks import PACKED
from tests.helpers import (
    A_FEW,
    CASES,
    FULL,
    PENALTIES,
    TORCH_OPTIMIZERS,
    WITH_DUAL,
    Factory,
    admm,
    assert_same_weights,
    batches,
    every,
    every_form,
    every_penalty,
    forms_and_inners,
    is_lean,
    loss_of,
    make_net,
    primal_of,
    restless,
    same_bits,
    tolerance,
    train,
    weights_of,
)

pytestmark = restless


def outside_optimizers() -> dict[str, Any]:
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


OUTSIDE = outside_optimizers()
every_inner_and_outside = pytest.mark.parametrize(
    "factory", [*TORCH_OPTIMIZERS.values(), *OUTSIDE.values()], ids=[*TORCH_OPTIMIZERS, *OUTSIDE]
)
forms_and_inners_and_outside = forms_and_inners({**TORCH_OPTIMIZERS, **OUTSIDE})


def quiet_finalize(optimizer: ADMMNxM) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        assert optimizer.finalize().ok


# ---------------------------------------------------------------- 1: a torch optimizer by isinstance


@every_inner_and_outside
def test_c01_is_a_torch_optimizer(factory: Factory) -> None:
    assert isinstance(admm(make_net(), factory), Optimizer)


SCHEDULERS = {
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (step + 1)),
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=10),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, total_iters=5),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, total_iters=2), lr_scheduler.ExponentialLR(o, 0.9)], [2]
    ),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-2, cycle_momentum=False),
}


# Older SequentialLR calls its parts in a way that torch itself deprecates.
@pytest.mark.filterwarnings("ignore:The epoch parameter in:UserWarning")
@pytest.mark.parametrize("make", SCHEDULERS.values(), ids=SCHEDULERS.keys())
def test_c01_lr_schedulers_drive_it_as_they_drive_the_inner_optimizer(make: Any) -> None:
    def rates(wrapped: bool) -> list[float]:
        net = make_net()
        inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
        optimizer = ADMMNxM(inner, net, rho=0.0) if wrapped else inner
        scheduler = make(optimizer)
        seen = []
        for step in range(6):
            train(net, optimizer, 1, step)
            scheduler.step()
            seen.append(inner.param_groups[0]["lr"])
        return seen

    assert rates(True) == rates(False)


def test_c01_plateau_scheduler_accepts_it() -> None:
    optimizer = admm(make_net())
    scheduler = lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
    for loss in (1.0, 2.0, 3.0):
        scheduler.step(loss)
    assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(2.5e-3)


def test_c01_scheduler_built_on_the_inner_optimizer_still_works() -> None:
    net = make_net()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    scheduler = lr_scheduler.StepLR(inner, 1)
    optimizer = ADMMNxM(inner, net)
    train(net, optimizer, 2)
    scheduler.step()  # warns, and so fails, if it has not seen the optimizer step
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-3)


# ---------------------------------------------------------------- 2: live views of the inner optimizer


@forms_and_inners(TORCH_OPTIMIZERS)
def test_c02_groups_state_and_defaults_are_the_inner_optimizers_own(penalty: str, factory: Factory) -> None:
    net = make_net()
    optimizer = admm(net, factory, penalty=penalty)
    inner = optimizer.inner

    def check() -> None:
        assert optimizer.param_groups is inner.param_groups
        assert optimizer.state is inner.state
        assert optimizer.defaults is inner.defaults

    check()
    train(net, optimizer, 1)
    check()
    optimizer.load_state_dict(optimizer.state_dict())  # replaces the inner optimizer's lists
    check()
    optimizer.param_groups[0]["lr"] = 0.5
    assert inner.param_groups[0]["lr"] == 0.5


def test_c02_assignment_reaches_the_inner_optimizer() -> None:
    optimizer = admm(make_net())
    groups, state, defaults = list(optimizer.param_groups), optimizer.state.copy(), dict(optimizer.defaults)
    optimizer.param_groups, optimizer.state, optimizer.defaults = groups, state, defaults
    assert optimizer.inner.param_groups is groups
    assert optimizer.inner.state is state
    assert optimizer.inner.defaults is defaults


@every_form
def test_c02_accelerate_prepare_keeps_the_lr_schedule_connected(penalty: str) -> None:
    accelerate = pytest.importorskip("accelerate")
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    scheduler = lr_scheduler.LambdaLR(optimizer, lambda step: 1 - step / 20)
    accelerator = accelerate.Accelerator(cpu=True)
    prepared_net, prepared, scheduler = accelerator.prepare(net, optimizer, scheduler)
    for step, x in enumerate(batches(20)):
        accelerator.backward(loss_of(prepared_net, x))
        accelerator.clip_grad_norm_(prepared_net.parameters(), 1.0)
        prepared.step()
        scheduler.step()
        prepared.zero_grad()
        assert optimizer.inner.param_groups[0]["lr"] == pytest.approx(1e-2 * (1 - (step + 1) / 20))
    assert optimizer.param_groups[0]["admm_step"] == 20
    assert optimizer.finalize().ok


# ---------------------------------------------------------------- 3: nothing in the state before the inner step


@forms_and_inners_and_outside
def test_c03_inner_optimizer_finds_its_state_as_it_left_it(penalty: str, factory: Factory) -> None:
    net = make_net()
    optimizer = admm(net, factory, penalty=penalty, rho=0.1)
    state_before_step: list[set[str]] = []
    original = type(optimizer.inner).step

    def spy(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        state_before_step.append({key for entry in self.state.values() for key in entry})
        return unwrapped(self, *args, **kwargs)

    unwrapped = getattr(original, "__wrapped__", original)
    own = type("Spied", (type(optimizer.inner),), {"step": spy})
    optimizer.inner.__class__ = own
    train(net, optimizer, 2)
    assert not any(key.startswith("admm") for key in state_before_step[0])
    assert "admm_consensus" in state_before_step[1]


@every_form
def test_c03_state_of_a_weight_waits_for_the_weights_own_first_step(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, penalty=penalty)
    late = net.blocks[0].down.weight
    for step, x in enumerate(batches(3)):
        loss_of(net, x).backward()
        if step < 2:
            late.grad = None
        optimizer.step()
        optimizer.zero_grad()
        assert (late in optimizer.state) == (step == 2)
    assert {"exp_avg", "exp_avg_sq", "step", "admm_consensus"} == set(optimizer.state[late])


# ---------------------------------------------------------------- 4: state at the first step, no cached identity


@every_form
def test_c04_parameter_objects_may_be_exchanged_before_the_first_step(penalty: str) -> None:
    def run(exchange: bool) -> nn.Module:
        net = make_net()
        optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=9.0)
        if exchange:  # as Accelerate does for FSDP2: new objects in the module and, at the same places, in the groups
            fresh = {}
            for module in net.modules():
                for name, p in list(module._parameters.items()):
                    if p is not None:
                        fresh[p] = nn.Parameter(p.detach().clone())
                        module._parameters[name] = fresh[p]
            for group in optimizer.param_groups:
                group["params"] = [fresh[p] for p in group["params"]]
        train(net, optimizer, 20)
        assert optimizer.finalize().ok
        return net

    assert_same_weights(run(True), run(False))


def test_c04_exchange_for_a_flattened_parameter_is_refused() -> None:
    net = make_net()
    optimizer = admm(net)
    group = optimizer.param_groups[0]["params"]
    place = next(i for i, p in enumerate(group) if p is net.blocks[0].up.weight)
    group[place] = nn.Parameter(group[place].detach().flatten())
    group[place].grad = torch.ones_like(group[place])
    with pytest.raises(ValueError, match=r"blocks\.0\.up\.weight.*flattened.*FSDP2"):
        optimizer.step()


# ---------------------------------------------------------------- 6: complete state, exact resume


def save_and_load(state: dict[str, Any]) -> dict[str, Any]:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


# Before the first step, after it, in the constrained phase (13: with the dual), and when frozen.
@pytest.mark.parametrize("stop", [0, 1, 13, 19])
@forms_and_inners_and_outside
def test_c06_interrupted_and_resumed_equals_uninterrupted(penalty: str, factory: Factory, stop: int) -> None:
    check_resume(penalty, factory, stop)


# In mid rise, before the dual; after the last step of the constrained phase; after the first of the frozen one.
@pytest.mark.parametrize("stop", [6, 17, 18])
@pytest.mark.parametrize("name", A_FEW)
@every_form
def test_c06_interrupted_elsewhere_and_resumed_equals_uninterrupted(penalty: str, name: str, stop: int) -> None:
    check_resume(penalty, TORCH_OPTIMIZERS[name], stop)


def check_resume(penalty: str, factory: Factory, stop: int) -> None:
    def fresh() -> tuple[nn.Module, ADMMNxM]:
        net = make_net()
        return net, admm(net, factory, total_steps=20, penalty=penalty, residual_tolerance=99.0)

    whole_net, whole = fresh()
    train(whole_net, whole, 20)
    first_net, first = fresh()
    train(first_net, first, stop)
    second_net, second = fresh()
    second_net.load_state_dict(save_and_load(first_net.state_dict()))
    second.load_state_dict(state_dict=save_and_load(first.state_dict()))
    train(second_net, second, 20 - stop, start=stop)
    assert_same_weights(second_net, whole_net)
    whole.finalize()
    second.finalize()
    assert_same_weights(second_net, whole_net)
    train(whole_net, whole, 3, start=20)
    train(second_net, second, 3, start=20)
    assert_same_weights(second_net, whole_net)


DTYPES_OF_STATES = [
    pytest.param(penalty, dtype, id=f"{penalty}-{str(dtype).removeprefix('torch.')}")
    for penalty in PENALTIES
    for dtype in (torch.float32, torch.bfloat16, *([torch.bool] if penalty not in WITH_DUAL else []))
]


@pytest.mark.parametrize(("penalty", "state_dtype"), DTYPES_OF_STATES)
@pytest.mark.parametrize("finalized", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_c06_resume_keeps_the_dtype_of_the_state(
    dtype: torch.dtype, state_dtype: torch.dtype, finalized: bool, penalty: str
) -> None:
    options = {"rho": 0.05, "update_every": every(3, penalty), "state_dtype": state_dtype, "penalty": penalty}
    net = make_net(dtype=dtype)
    optimizer = admm(net, **options)
    train(net, optimizer, 7)
    if finalized:
        quiet_finalize(optimizer)
    other_net = make_net(seed=1, dtype=dtype)
    other = admm(other_net, **options)
    other_net.load_state_dict(net.state_dict())
    other.load_state_dict(save_and_load(optimizer.state_dict()))
    assert other.finalized == finalized
    for name in optimizer.masks():
        mine = optimizer.state[net.get_parameter(name)]["admm_consensus"]
        loaded = other.state[other_net.get_parameter(name)]["admm_consensus"]
        if state_dtype == torch.bool:
            assert mine.dtype == PACKED
        else:
            assert mine.dtype == (torch.bool if finalized else state_dtype)
        assert same_bits(mine, loaded)
        assert mine.data_ptr() != loaded.data_ptr()
    train(net, optimizer, 5, start=7)
    train(other_net, other, 5, start=7)
    assert_same_weights(net, other_net)


@every_penalty
def test_c06_state_saved_in_another_dtype_is_converted_with_its_meaning(penalty: str) -> None:
    options = {"rho": 0.05, "update_every": every(3, penalty), "penalty": penalty}
    net, other_net = make_net(), make_net(seed=1)
    optimizer = admm(net, state_dtype=torch.float32, **options)
    train(net, optimizer, 7)
    other = admm(other_net, state_dtype=torch.bfloat16, **options)
    other_net.load_state_dict(net.state_dict())
    other.load_state_dict(optimizer.state_dict())
    for name, mask in optimizer.masks().items():
        w, other_w = (n.get_parameter(name) for n in (net, other_net))
        v, other_v = (o.state[p]["admm_consensus"] for o, p in ((optimizer, w), (other, other_w)))
        assert other_v.dtype == torch.bfloat16
        torch.testing.assert_close(other.dual(name).float(), optimizer.dual(name), rtol=1e-2, atol=0)
        torch.testing.assert_close(other.auxiliary(name).float(), optimizer.auxiliary(name), rtol=1e-2, atol=0)
        assert torch.equal(other.masks()[name], mask)
        assert v.dtype == torch.float32
        torch.testing.assert_close(primal_of(other, other_w), primal_of(optimizer, w), rtol=1e-2, atol=0)


@forms_and_inners_and_outside
def test_c06_round_trip_before_the_first_step_is_a_no_op(penalty: str, factory: Factory) -> None:
    plain_net, net = make_net(), make_net()
    plain, optimizer = (
        admm(n, factory, total_steps=20, penalty=penalty, residual_tolerance=99.0) for n in (plain_net, net)
    )
    optimizer.load_state_dict(save_and_load(optimizer.state_dict()))
    with torch.no_grad():  # loading weights after that must not leave a v of the old ones behind
        for n in (plain_net, net):
            for p in n.parameters():
                p.mul_(-0.7)
    train(plain_net, plain, 20)
    train(net, optimizer, 20)
    assert_same_weights(net, plain_net)


@every_form
def test_c06_state_dict_holds_only_tensors_and_plain_values_and_counts_in_the_groups(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    train(net, optimizer, 6)
    state = optimizer.state_dict()
    for entry in state["state"].values():
        assert all(isinstance(value, (Tensor, int, float)) for value in entry.values())
    for group in state["param_groups"]:
        assert group["admm_step"] == 6
        assert all(isinstance(value, (int, float)) for key, value in group.items() if key.startswith("admm"))


@every_form
def test_c06_loading_a_state_dict_of_the_inner_optimizer_alone_starts_admm_anew(penalty: str) -> None:
    dense_net = make_net()
    dense = torch.optim.AdamW(dense_net.parameters(), lr=1e-2)
    train(dense_net, dense, 5)
    optimizer = admm(dense_net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    train(dense_net, optimizer, 8)
    optimizer.load_state_dict(dense.state_dict())
    assert optimizer.param_groups[0]["admm_step"] == 0
    assert float(optimizer.state[dense_net.head.weight]["step"]) == 5
    train(dense_net, optimizer, 20)
    assert optimizer.finalize().ok


def test_c06_state_of_the_inner_optimizer_that_belongs_to_no_parameter_travels_along() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            self.state["all"] = {"count": self.state.get("all", {"count": 0})["count"] + 1}
            return super().step(closure)

    nets = make_net(), make_net()
    first, second = (admm(net, lambda net: Counting(net.parameters(), lr=1e-2), total_steps=20) for net in nets)
    train(nets[0], first, 6)
    second.load_state_dict(save_and_load(first.state_dict()))
    assert second.state["all"] == {"count": 6}


def test_c06_loading_does_not_change_or_share_what_was_passed() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    train(net, optimizer, 6)
    state = optimizer.state_dict()
    copied = copy.deepcopy(state)
    other_net = make_net()
    other = admm(other_net, total_steps=20)
    other.load_state_dict(state)
    assert state.keys() == copied.keys()
    for key, entry in copied["state"].items():
        assert entry.keys() == state["state"][key].keys()
    assert state["param_groups"] == copied["param_groups"]
    name, p = "blocks.0.up.weight", other_net.blocks[0].up.weight
    v = other.state[p]["admm_consensus"]
    assert v.data_ptr() != optimizer.state[net.get_parameter(name)]["admm_consensus"].data_ptr()


BROKEN_CHECKPOINTS: dict[str, tuple[dict[str, Any], int, str]] = {
    "other pattern, not frozen": ({"pattern": "2:4"}, 6, "another selection, pattern, grouped dimension or form of"),
    "other pattern": ({"pattern": "2:4"}, 19, "pattern 2:4"),
    "another selection": ({"select": {r"blocks\.0\..*weight": "1:4"}}, 6, "2 parameters that are not selected"),
    "more selected": ({"select": {r".*\.weight": "1:4"}}, 6, "no admm_consensus for weight 'head.weight'"),
}


def assert_refused(optimizer: ADMMNxM, state: dict[str, Any], message: str) -> None:
    """Nothing may have been loaded."""
    with pytest.raises(ValueError, match=message):
        optimizer.load_state_dict(state)
    assert not optimizer.state
    assert optimizer.param_groups[0]["admm_step"] == 0


@pytest.mark.parametrize(("options", "steps", "message"), BROKEN_CHECKPOINTS.values(), ids=BROKEN_CHECKPOINTS.keys())
@every_form
def test_c06_checkpoint_that_does_not_fit_is_refused_and_nothing_is_loaded(
    penalty: str, options: dict[str, Any], steps: int, message: str
) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    train(net, optimizer, steps)
    other = admm(make_net(), **{"total_steps": 20, "penalty": penalty, **options})
    assert_refused(other, optimizer.state_dict(), message)


LONGER_SCHEDULE = r"rho = .* at step 12.*total_steps=40.*freeze_at"


def resume_with_a_longer_schedule(penalty: str, **options: Any) -> tuple[nn.Module, ADMMNxM, dict[str, Any]]:
    net, other_net = make_net(), make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, **options)
    train(net, optimizer, 12)
    other_net.load_state_dict(net.state_dict())
    return other_net, admm(other_net, total_steps=40, penalty=penalty, **options), optimizer.state_dict()


def test_c06_longer_schedule_in_which_rho_falls_under_a_dual_is_refused() -> None:
    _, other, state = resume_with_a_longer_schedule("proximal")
    assert_refused(other, state, LONGER_SCHEDULE)


@pytest.mark.parametrize("penalty", [name for name in CASES if name != "proximal"])
def test_c06_longer_schedule_is_taken_up_where_there_is_no_dual(penalty: str) -> None:
    net, other, state = resume_with_a_longer_schedule(penalty, residual_tolerance=9.0)
    other.load_state_dict(state)
    train(net, other, 28, start=12)
    assert other.phase == "frozen"
    assert other.finalize().ok


WHY_ANOTHER = {
    ("lazy", FULL): r"run stored the mask, and what is stored here is w off the mask; .* with state_dtype=torch\.bool",
    (FULL, "lazy"): r"run stored w off the mask, and what is stored here is the mask; .* state_dtype=torch\.float32",
}


@pytest.mark.parametrize("other", CASES)
@every_form
def test_c06_checkpoint_of_another_form_is_refused_unless_the_state_means_the_same(penalty: str, other: str) -> None:
    net, other_net = make_net(), make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    train(net, optimizer, 6)
    resumed = admm(other_net, rho=Constant(9.0), penalty=other, residual_tolerance=9.0)
    other_net.load_state_dict(net.state_dict())
    if penalty != other and {penalty, other} != {"proximal", "gradient"}:
        why = WHY_ANOTHER.get((penalty, other), "form of the penalty.*as it was built then")
        assert_refused(resumed, save_and_load(optimizer.state_dict()), why)
        return
    resumed.load_state_dict(save_and_load(optimizer.state_dict()))
    for name, mask in optimizer.masks().items():
        assert torch.equal(resumed.masks()[name], mask)
        assert same_bits(resumed.auxiliary(name), optimizer.auxiliary(name))
        assert same_bits(resumed.dual(name), optimizer.dual(name))
    train(other_net, resumed, 14, start=6)
    assert resumed.finalize().ok


@every_form
def test_c06_more_selected_weights_are_noticed_without_inner_state(penalty: str) -> None:
    sgd = TORCH_OPTIMIZERS["SGD-single"]
    net = make_net()
    optimizer = admm(net, sgd, total_steps=20, penalty=penalty)
    train(net, optimizer, 6)
    other = admm(make_net(), sgd, total_steps=20, penalty=penalty, select={r".*\.weight": "1:4"})
    assert_refused(other, optimizer.state_dict(), "another selection")


@every_form
def test_c06_wrong_shape_and_mask_cast_by_an_in_place_loader_are_refused(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    train(net, optimizer, 6)
    # A packed mask has another shape than what a loader could cast; one that is not packed has none to be cast to.
    cast = "has shape" if is_lean(penalty) else "cast to bool"
    for change, message in ((lambda v: v[:1], "has shape"), (lambda v: v != 0, cast)):
        state = copy.deepcopy(optimizer.state_dict())
        entry = next(e for e in state["state"].values() if "admm_consensus" in e)
        entry["admm_consensus"] = change(entry["admm_consensus"])
        with pytest.raises(ValueError, match=message):
            admm(make_net(), total_steps=20, penalty=penalty).load_state_dict(state)


def test_c06_state_dict_hooks_fire_once_and_may_replace() -> None:
    net = make_net()
    optimizer = admm(net)
    fired: list[str] = []
    optimizer.register_state_dict_pre_hook(lambda o: fired.append("save-pre") if o is optimizer else None)
    optimizer.register_state_dict_post_hook(lambda o, sd: {**sd, "note": fired.append("save-post") or 1})
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: fired.append("load-pre"))
    optimizer.register_load_state_dict_post_hook(lambda o: fired.append("load-post"))
    optimizer.inner.register_state_dict_pre_hook(lambda o: fired.append("inner"))
    state = optimizer.state_dict()
    assert state.pop("note") == 1
    optimizer.load_state_dict(state)
    assert fired == ["save-pre", "inner", "save-post", "load-pre", "load-post"]
    optimizer.register_load_state_dict_pre_hook(lambda o, sd: {"param_groups": [], "state": {}})
    with pytest.raises((ValueError, IndexError)):
        optimizer.load_state_dict(state)


# ---------------------------------------------------------------- 7: hooks, copies, delegation


@pytest.fixture
def global_hooks() -> Iterator[list[tuple[str, Any]]]:
    fired: list[tuple[str, Any]] = []
    handles = [
        register_optimizer_step_pre_hook(lambda o, *_: fired.append(("global-pre", o))),
        register_optimizer_step_post_hook(lambda o, *_: fired.append(("global-post", o))),
    ]
    yield fired
    for handle in handles:
        handle.remove()


@forms_and_inners(TORCH_OPTIMIZERS)
def test_c07_step_hooks_fire_once_around_the_whole_step(penalty: str, factory: Factory, global_hooks: list) -> None:
    net = make_net()
    optimizer = admm(net, factory, rho=1.0, penalty=penalty)
    train(net, optimizer, 1)
    global_hooks.clear()
    w = net.blocks[0].up.weight
    seen: dict[str, Tensor] = {}
    inner_pre = optimizer.inner.register_step_pre_hook(lambda o, *_: global_hooks.append(("inner-pre", o)))
    optimizer.register_step_pre_hook(lambda o, *_: seen.update(grad=w.grad.clone(), w=w.detach().clone()))
    optimizer.inner.register_step_post_hook(lambda o, *_: seen.update(after=w.detach().clone()))
    loss_of(net, next(batches(1, 1))).backward()
    plain_gradient = w.grad.clone()
    optimizer.step()
    assert [kind for kind, _ in global_hooks] == ["global-pre", "inner-pre", "global-post"]
    assert all(o is optimizer for _, o in global_hooks)
    assert torch.equal(seen["grad"], plain_gradient)  # before the penalty
    assert torch.equal(seen["after"], w.detach())  # after everything
    inner_pre.remove()


@pytest.mark.parametrize("penalty", ["lazy", FULL, "proximal"])
def test_c07_step_hook_sees_the_weight_after_the_pull(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=1e9, penalty=penalty)
    train(net, optimizer, 1)
    w, seen = net.blocks[0].up.weight, []
    optimizer.inner.register_step_post_hook(lambda *_: seen.append(w.detach().clone()))
    train(net, optimizer, 1, start=1)
    # Where w is made of what is shown, a millionth of it has to stay.
    left = 2.0**-20 if is_lean(penalty) else 1e-7
    torch.testing.assert_close(seen[0], optimizer.auxiliary("blocks.0.up.weight"), rtol=1e-5, atol=left)


@pytest.mark.parametrize("stop", [0, 6, 13, 17, 19])
@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
@every_form
def test_c07_copies_train_on_alike(penalty: str, how: str, stop: int) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    train(net, optimizer, stop)
    pair = (net, optimizer)
    other_net, other = copy.deepcopy(pair) if how == "deepcopy" else pickle.loads(pickle.dumps(pair))
    assert other.saliency == optimizer.saliency
    assert other.plan == optimizer.plan
    assert other.inner is not optimizer.inner
    assert other.param_groups is other.inner.param_groups
    train(net, optimizer, 20 - stop, start=stop)
    assert not torch.equal(other_net.head.weight, net.head.weight)
    train(other_net, other, 20 - stop, start=stop)
    assert_same_weights(net, other_net)
    assert other.finalize() == optimizer.finalize()
    fired = []
    other.register_step_pre_hook(lambda *_: fired.append(1))
    train(other_net, other, 1)
    train(net, optimizer, 1)
    assert fired == [1]


def test_c07_copy_under_an_lr_scheduler_steps_itself_not_the_original() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    lr_scheduler.StepLR(optimizer, 1)  # puts its own wrapping on the instance's step
    other_net, other = copy.deepcopy((net, optimizer))
    before = weights_of(net)
    train(other_net, other, 3)
    assert_same_weights(net, before)
    assert other.param_groups[0]["admm_step"] == 3
    assert optimizer.param_groups[0]["admm_step"] == 0
    assert "step" not in other.__dict__
    assert other.saliency == optimizer.saliency


def test_c07_step_is_a_bound_method() -> None:
    optimizer = admm(make_net())
    assert optimizer.step.__self__ is optimizer
    assert optimizer.step.__func__ is ADMMNxM.step


def test_c07_zero_grad_and_add_param_group_delegate() -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20)
    loss_of(net, next(batches(1))).backward()
    optimizer.zero_grad(set_to_none=False)
    assert not net.head.weight.grad.any()
    optimizer.zero_grad()
    assert net.head.weight.grad is None
    train(net, optimizer, 3)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert optimizer.inner.param_groups[1]["params"][0] is extra
    assert optimizer.inner.param_groups[1]["admm_step"] == 3
    extra.grad = torch.ones(3)
    train(net, optimizer, 17, start=3)
    assert optimizer.finalize().ok
    assert optimizer.load_state_dict(optimizer.state_dict()) is None
    assert "admm_step: 20" in repr(optimizer)


# ---------------------------------------------------------------- 8: closures


@forms_and_inners_and_outside
def test_c08_closure_runs_once_and_first_with_gradients_enabled(penalty: str, factory: Factory) -> None:
    def run(with_closure: bool) -> tuple[nn.Module, int]:
        net = make_net()
        optimizer = admm(net, factory, total_steps=20, penalty=penalty, residual_tolerance=99.0)
        calls = 0
        for x in batches(20):

            def closure(x: Tensor = x) -> Tensor:
                nonlocal calls
                calls += 1
                assert torch.is_grad_enabled()
                optimizer.zero_grad()
                loss = loss_of(net, x)
                loss.backward()
                return loss

            if with_closure:
                with torch.no_grad():
                    loss = optimizer.step(closure)
                assert loss is not None
                assert loss.requires_grad
            else:
                closure()
                assert optimizer.step() is None
        return net, calls

    (with_net, calls), (without_net, _) = run(True), run(False)
    assert calls == 20
    assert_same_weights(with_net, without_net)


def test_c08_optimizers_that_need_the_closure_are_refused() -> None:
    net = make_net()
    with pytest.raises(TypeError, match=r"LBFGS needs to call the closure.*AdamW"):
        ADMMNxM(torch.optim.LBFGS(net.parameters()), net)

    class NeedsClosure(torch.optim.SGD):
        def step(self, closure: Any) -> Any:  # type: ignore[override]
            return super().step(closure)

    with pytest.raises(TypeError, match=r"NeedsClosure needs to call the closure"):
        ADMMNxM(NeedsClosure(net.parameters(), lr=0.1), net)


# ---------------------------------------------------------------- 9: mixed precision


@pytest.mark.parametrize("inner", ["AdamW-fused", "AdamW-single", "SGD-fused", "Adam-foreach"])
@every_form
def test_c09_grad_scaler_unscales_before_and_skips_the_whole_step(penalty: str, inner: str) -> None:
    def run(scaled: bool) -> nn.Module:
        net = make_net()
        optimizer = admm(net, TORCH_OPTIMIZERS[inner], total_steps=20, penalty=penalty, residual_tolerance=9.0)
        assert not getattr(optimizer, "_step_supports_amp_scaling", False)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        for step, x in enumerate(batches(20)):
            optimizer.zero_grad()
            scaler.scale(loss_of(net, x)).backward()
            if scaled and step == 7:
                before, count = weights_of(net), optimizer.param_groups[0]["admm_step"]
                state = copy.deepcopy(optimizer.state_dict())
                net.head.weight.grad[0, 0] = float("inf")
                scaler.step(optimizer)
                scaler.update()
                assert_same_weights(net, before)
                assert optimizer.param_groups[0]["admm_step"] == count
                for key, entry in optimizer.state_dict()["state"].items():
                    assert all(same_bits(entry[k], state["state"][key][k]) for k in entry if k.startswith("admm"))
                optimizer.zero_grad()
                scaler.scale(loss_of(net, x)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert optimizer.param_groups[0]["admm_step"] == 20
        assert optimizer.finalize().ok
        return net

    assert_same_weights(run(True), run(False))  # a scale of a power of two costs no bits


@every_form
def test_c09_autocast_trains(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    for x in batches(20):
        optimizer.zero_grad()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = loss_of(net, x)
        loss.backward()
        optimizer.step()
    assert optimizer.finalize().ok


# ---------------------------------------------------------------- 10: clipping and accumulation


def test_c10_penalty_is_not_clipped() -> None:
    net = make_net()
    lr, rho = 1e-3, 7.0
    optimizer = ADMMNxM(
        torch.optim.SGD(net.parameters(), lr=lr), net, penalty="gradient", rho=rho, update_every=Every(99)
    )
    w = net.blocks[0].up.weight
    start = w.detach().clone()
    loss_of(net, next(batches(1))).backward()
    nn.utils.clip_grad_norm_(net.parameters(), 1e-6)
    optimizer.step()
    expected = start - lr * rho * (start - project(start, "2:4"))
    torch.testing.assert_close(w.detach(), expected, rtol=0, atol=1e-7)


@every_form
def test_c10_gradient_accumulation_counts_optimizer_steps(penalty: str) -> None:
    def run(parts: int) -> nn.Module:
        net = make_net().double()
        optimizer = admm(net, TORCH_OPTIMIZERS["SGD-single"], total_steps=20, penalty=penalty, residual_tolerance=9.0)
        for x in batches(20, dtype=torch.float64):
            for part in x.chunk(parts):
                (loss_of(net, part) / parts).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert optimizer.param_groups[0]["admm_step"] == 20
        return net

    for one, two in zip(run(1).parameters(), run(2).parameters(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-6)


# ---------------------------------------------------------------- 12: evaluation measures what will ship


def shipped(optimizer: ADMMNxM, name: str, w: Tensor) -> Tensor:
    """What a prunable weight is evaluated as, given what the model holds in training."""
    if optimizer.frozen:
        return w
    if optimizer.penalty in WITH_DUAL or optimizer.param_groups[0]["admm_step"] == 0:
        return project(w + optimizer.dual(name), "1:4")
    assert optimizer.rho > 0
    return torch.where(optimizer.masks()[name], w, torch.zeros_like(w))  # the lazy form ships the mask it has shown


@pytest.mark.parametrize("steps", [0, 9, 19])
@forms_and_inners_and_outside
def test_c12_evaluation_holds_the_projected_weights_and_training_goes_on_bit_for_bit(
    penalty: str, factory: Factory, steps: int
) -> None:
    check_evaluation(penalty, factory, steps)


@pytest.mark.parametrize("steps", [1, 13, 17, 18])
@pytest.mark.parametrize("name", A_FEW)
@every_form
def test_c12_evaluation_at_other_times_holds_the_projected_weights_too(penalty: str, name: str, steps: int) -> None:
    check_evaluation(penalty, TORCH_OPTIMIZERS[name], steps)


def check_evaluation(penalty: str, factory: Factory, steps: int) -> None:
    net, plain_net = make_net(), make_net()
    optimizer, plain = (
        admm(n, factory, total_steps=20, penalty=penalty, residual_tolerance=99.0) for n in (net, plain_net)
    )
    train(net, optimizer, steps)
    train(plain_net, plain, steps)
    before = weights_of(net)
    projected = {name: shipped(optimizer, name, before[name]) for name in optimizer.masks()}
    with optimizer.projected(), optimizer.projected():
        for name, expected in projected.items():
            assert torch.equal(net.get_parameter(name), expected)
        assert verify(net, "1:4").ok
    assert_same_weights(net, before)
    if not hasattr(optimizer.inner, "eval"):  # schedulefree's own round trip rounds
        for _ in range(2):
            optimizer.eval()
            optimizer.eval()
            assert verify(net, "1:4").ok
            assert optimizer.residuals().primal == pytest.approx(plain.residuals().primal)
            optimizer.train()
            optimizer.train()
            assert_same_weights(net, before)
    train(net, optimizer, 20 - steps, start=steps)
    train(plain_net, plain, 20 - steps, start=steps)
    assert_same_weights(net, plain_net)


@every_form
def test_c12_evaluation_in_the_dense_phase_projects_what_the_model_holds(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, rho=lambda step: float(step >= 30), update_every=every(5, penalty), penalty=penalty)
    train(net, optimizer, 8)
    assert optimizer.phase == "dense"
    before = weights_of(net)
    with optimizer.projected():
        for name in optimizer.masks():
            a = before[name] + optimizer.dual(name)
            factor = 1.0
            if penalty not in WITH_DUAL:
                factor = optimizer.state[net.get_parameter(name)]["exp_avg_sq"].clamp_min(1e-20).sqrt().sqrt()
            kept = keep_mask(a * factor, "1:4")
            assert torch.equal(net.get_parameter(name), torch.where(kept, a, torch.zeros_like(a)))
    assert_same_weights(net, before)


@pytest.mark.parametrize("name", ["schedulefree.AdamW", "schedulefree.SGD", "schedulefree.RAdam"])
@every_form
def test_c12_schedulefree_ships_its_average_feasible(penalty: str, name: str) -> None:
    net = make_net()
    optimizer = admm(net, OUTSIDE[name], total_steps=60, penalty=penalty, residual_tolerance=99.0)
    train(net, optimizer, 30)
    optimizer.eval()
    assert verify(net, "1:4").ok
    optimizer.train()
    train(net, optimizer, 30, start=30)
    assert optimizer.finalize().ok
    optimizer.eval()  # the averaged weights
    assert verify(net, "1:4").ok
    optimizer.train()
    train(net, optimizer, 3, start=60)
    assert verify(net, "1:4").ok


@every_form
def test_c12_step_in_evaluation_mode_is_refused_and_an_error_inside_restores(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    train(net, optimizer, 9)
    before = weights_of(net)
    with pytest.raises(RuntimeError, match=r"optimizer\.train\(\)"), optimizer.projected():
        optimizer.step()
    assert_same_weights(net, before)
    optimizer.eval()
    with optimizer.projected():
        assert verify(net, "1:4").ok
    assert verify(net, "1:4").ok
    optimizer.train()
    assert_same_weights(net, before)


@pytest.mark.parametrize("steps", [0, 9, 17, 19])
@every_form
def test_c12_checkpoint_saved_in_evaluation_mode_resumes_from_the_training_weights(penalty: str, steps: int) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    train(net, optimizer, steps)
    optimizer.eval()
    saved_weights, saved = save_and_load(net.state_dict()), save_and_load(optimizer.state_dict())
    assert verify(saved_weights, "1:4").ok
    optimizer.train()
    other_net = make_net(seed=1)
    other = admm(other_net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
    other_net.load_state_dict(saved_weights)
    other.load_state_dict(saved)
    with pytest.raises(RuntimeError, match="train"):
        other.step()
    other.train()
    assert_same_weights(net, other_net)
    train(net, optimizer, 20 - steps, start=steps)
    train(other_net, other, 20 - steps, start=steps)
    assert_same_weights(net, other_net)


@every_form
def test_c12_evaluation_checkpoint_without_the_training_weights_is_refused(penalty: str) -> None:
    net = make_net()
    optimizer = admm(net, total_steps=20, penalty=penalty)
    train(net, optimizer, 9)
    optimizer.eval()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry.pop("admm_primal", None)
    with pytest.raises(ValueError, match=r"optimizer\.train\(\) before saving"):
        admm(make_net(), total_steps=20, penalty=penalty).load_state_dict(state)


@every_form
def test_c12_finalize_leaves_the_evaluation_mode(penalty: str) -> None:
    net, other_net = make_net(), make_net()
    optimizer, other = (admm(n, rho=0.1, penalty=penalty) for n in (net, other_net))
    for n, o in ((net, optimizer), (other_net, other)):
        train(n, o, 9)
    optimizer.eval()
    quiet_finalize(optimizer)
    quiet_finalize(other)
    assert_same_weights(net, other_net)
    train(net, optimizer, 1)


# ---------------------------------------------------------------- 13: rho = 0


@forms_and_inners_and_outside
def test_c13_zero_rho_is_the_inner_optimizer_bit_for_bit(penalty: str, factory: Factory) -> None:
    plain_net, net = make_net(), make_net()
    train(plain_net, factory(plain_net), 25)
    optimizer = admm(net, factory, rho=0.0, penalty=penalty, total_steps=20, update_every=every(2, penalty))
    train(net, optimizer, 25)
    assert_same_weights(net, plain_net)
    assert optimizer.phase == "dense"


@every_penalty
@pytest.mark.parametrize("state_dtype", [None, torch.bfloat16])
def test_c13_schedule_that_is_zero_throughout_is_the_inner_optimizer_too(
    penalty: str, state_dtype: torch.dtype | None
) -> None:
    plain_net, net = make_net(), make_net()
    train(plain_net, torch.optim.AdamW(plain_net.parameters(), lr=1e-2), 25)
    train(net, admm(net, rho=Rise(0.0), total_steps=20, penalty=penalty, state_dtype=state_dtype), 25)
    assert_same_weights(net, plain_net)


# ---------------------------------------------------------------- 14: no waiting for the device


class Reads(TorchDispatchMode):
    """Counts what brings a value from the device to the host."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.count = 0
        for name in ("tolist", "numpy", "cpu"):  # these reach no dispatcher on a CPU
            original = getattr(Tensor, name)

            def counted(*args: Any, original: Any = original, **kwargs: Any) -> Any:
                self.count += 1
                return original(*args, **kwargs)

            monkeypatch.setattr(Tensor, name, counted)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (
            torch.ops.aten._local_scalar_dense.default,
            torch.ops.aten.nonzero.default,
            torch.ops.aten.is_nonzero.default,
            torch.ops.aten.equal.default,
            torch.ops.aten.masked_select.default,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@forms_and_inners(TORCH_OPTIMIZERS)
def test_c14_step_reads_no_more_from_the_device_than_the_inner_optimizer(
    penalty: str, factory: Factory, monkeypatch: pytest.MonkeyPatch
) -> None:
    def reads(wrapped: bool) -> int:
        net = make_net()
        inner = factory(net)
        optimizer = (
            ADMMNxM(inner, net, pattern="1:4", total_steps=20, update_every=2, **CASES[penalty]) if wrapped else inner
        )
        total = 0
        for x in batches(20):  # dense start, updates with and without dual, the freeze, masked steps
            optimizer.zero_grad()
            loss_of(net, x).backward()
            with monkeypatch.context() as patch, Reads(patch) as mode:
                optimizer.step()
            total += mode.count
        return total

    assert reads(True) == reads(False)


def test_c14_the_counter_of_reads_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = admm(make_net())
    with Reads(monkeypatch) as mode:
        optimizer.residuals()
        reads = mode.count
        assert reads > 0
        float(torch.ones(()))
        assert mode.count == reads + 1
