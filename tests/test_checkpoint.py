"""A checkpoint either fits and goes on to the same bits, or is refused in words, and nothing is loaded."""

from __future__ import annotations

import copy
import io
import re
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from admm_nxm import ADMMNxM, Constant, ConvergenceWarning, Ramp
from admm_nxm.weights import CONSENSUS, MASK
from tests.cores import BYTES_A_WEIGHT, WEIGHTS, adamw, exact, is_feasible, paper
from tests.helpers import Net, assert_same_weights, make_net, same_bits, train, weights_of

Build = Callable[..., ADMMNxM]

# ---------------------------------------------------------------- what fits


def saved(net: nn.Module, optimizer: ADMMNxM) -> dict[str, Any]:
    """Both state dicts, through a file that holds tensors and plain values only."""
    file = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # the toy runs of the paper's form come nowhere
        torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def resumed(build: Build, checkpoint: dict[str, Any], **options: Any) -> tuple[Net, ADMMNxM]:
    net = make_net(seed=9)
    optimizer = build(net, **options)
    net.load_state_dict(checkpoint["model"])
    optimizer.load_state_dict(checkpoint["optimizer"])
    return net, optimizer


FORMS: dict[str, tuple[Build, dict[str, Any]]] = {
    "exact": (exact, {}),
    "exact in windows": (exact, {"statistics_memory": 2 * BYTES_A_WEIGHT}),
    "exact from the start": (exact, {"prune_at": 0}),
    "paper": (paper, {"rho": 0.3, "update_every": 3}),
    "paper with a rising rho": (paper, {"rho": Ramp(0.01, 1.0, start=2, stop=20), "update_every": 2}),
}


@pytest.mark.parametrize(("build", "options"), FORMS.values(), ids=FORMS.keys())
def test_stopped_and_resumed_is_the_same_run_bit_for_bit(build: Build, options: dict[str, Any]) -> None:
    options = {"total_steps": 40, **options}
    net = make_net()
    optimizer = build(net, **options)
    stops = {}
    for step in range(40):
        if step in (0, 1, 25, 26, 29, 30, 33, 34, 39):
            stops[step] = saved(net, optimizer), optimizer.figures()
        train(net, optimizer, 1, start=step)
    end, figures, masks = weights_of(net), optimizer.figures(), optimizer.masks()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = optimizer.finalize()
    for stop, (checkpoint, then) in stops.items():
        other_net, other = resumed(build, checkpoint, **options)
        assert other.figures() == then
        train(other_net, other, 40 - stop, start=stop)
        assert_same_weights(end, other_net)
        assert other.figures() == figures
        for name in WEIGHTS:
            assert torch.equal(other.masks()[name], masks[name])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            assert other.finalize() == report


def test_state_dict_of_the_inner_optimizer_alone_starts_anew() -> None:
    net = make_net()
    plain = adamw(net)
    train(net, plain, 5)
    optimizer = exact(net)
    train(net, optimizer, 34)
    optimizer.load_state_dict(plain.state_dict())
    assert (optimizer.figures().step, optimizer.phase, optimizer.figures().model_errors) == (0, "dense", {})
    assert same_bits(optimizer.state[net.head.weight]["exp_avg"], plain.state[net.head.weight]["exp_avg"])


def test_loading_does_not_change_what_is_loaded_nor_share_it() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 29)
    state = optimizer.state_dict()
    before = copy.deepcopy(state)
    other_net = make_net()
    other = exact(other_net)
    other.load_state_dict(state)
    train(other_net, other, 8, start=29)
    assert other.frozen
    for number, entry in state["state"].items():  # what is the inner optimizer's, it may share
        assert entry.keys() == before["state"][number].keys()
        assert torch.equal(entry.get(MASK, ALL), before["state"][number].get(MASK, ALL))
    assert_equal(state["admm"], before["admm"])


def assert_equal(a: Any, b: Any) -> None:
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_equal(a[key], b[key])
    elif isinstance(a, Tensor):
        assert same_bits(a, b)
    else:
        assert a == b


def test_weight_that_never_had_a_gradient_has_no_state_and_goes_on() -> None:
    net = make_net()
    optimizer = paper(net, rho=0.3)
    unused = net.get_parameter(WEIGHTS[0])
    unused.requires_grad_(False)
    train(net, optimizer, 30)
    unused.requires_grad_(True)
    _, other = resumed(paper, saved(net, optimizer), rho=0.3)
    assert other.frozen
    assert torch.equal(other.masks()[WEIGHTS[0]], optimizer.masks()[WEIGHTS[0]])


def test_a_longer_run_calibrates_at_its_own_time() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 30)
    net, other = resumed(exact, saved(net, optimizer), total_steps=80, calibration_steps=8)
    assert other.phase == "dense"
    train(net, other, 60 - 30, start=30)
    assert other.phase == "calibration"
    train(net, other, 7, start=60)
    assert other.phase == "calibration"
    train(net, other, 1, start=67)
    assert (other.phase, other.prune_at) == ("frozen", 68)


def test_a_checkpoint_without_statistics_begins_its_window_again_and_says_so() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 30)
    checkpoint = saved(net, optimizer)
    del checkpoint["optimizer"]["admm"]
    with pytest.warns(
        UserWarning, match="inside a calibration, after 4 of its steps, and does not carry the statistics"
    ):
        net, other = resumed(exact, checkpoint)
    train(net, other, 7, start=30)
    assert other.phase == "calibration"
    train(net, other, 1, start=37)
    assert other.phase == "frozen"


# ---------------------------------------------------------------- what does not fit

Damage = Callable[[dict[str, Any]], Any]


def set_in(*path: Any) -> Damage:
    *way, key, value = path

    def damage(state: dict[str, Any]) -> None:
        for part in way:
            state = state[part]
        state[key] = value

    return damage


def drop(*path: Any) -> Damage:
    *way, key = path

    def damage(state: dict[str, Any]) -> None:
        for part in way:
            state = state[part]
        del state[key]

    return damage


ALL = torch.ones(16, 8, dtype=torch.bool)
WHOLE = "this is no whole state dict of an optimizer: {}; save the checkpoint again"
DAMAGES: dict[str, tuple[Damage, str]] = {
    "no state": (drop("state"), WHOLE.format("it has no 'state'")),
    "no groups": (drop("param_groups"), WHOLE.format("it has no 'param_groups'")),
    "groups empty": (set_in("param_groups", []), WHOLE.format("it has no 'param_groups'")),
    "no params": (drop("param_groups", 0, "params"), WHOLE.format("a parameter group has no 'params'")),
    "twice": (set_in("param_groups", 0, "params", 1, 0), WHOLE.format("its groups name a parameter twice")),
    "unhashable": (
        set_in("param_groups", 0, "params", 1, [1]),
        WHOLE.format("a parameter in its groups is neither a number nor a name"),
    ),
    "entry": (set_in("state", 0, 3), WHOLE.format("its state of parameter 0 is int")),
    "stray entry": (
        set_in("state", 99, {MASK: ALL}),
        WHOLE.format("it has state of parameter 99, which no group names"),
    ),
    "meta": (
        set_in("state", 0, "exp_avg", torch.ones(16, 8, device="meta")),
        WHOLE.format("its state of parameter 0 has no data"),
    ),
    "step": (set_in("state", 0, "step", "3"), WHOLE.format("its step of parameter 0 is '3'")),
    "extra": (set_in("admm", 3), "the checkpoint's 'admm' is int: the checkpoint is damaged"),
    "names": (set_in("admm", "names", 3), "names of weights are no mapping to positions: the checkpoint is damaged"),
    "name": (set_in("admm", "names", WEIGHTS[0], "0"), "names of weights are no mapping to positions"),
    "counter": (set_in("param_groups", 0, "admm_step", -3), "the checkpoint's admm_step is -3, which it cannot be"),
    "mask missing": (
        drop("state", 0, MASK),
        f"the checkpoint has no {MASK} for weight '{WEIGHTS[0]}', which it has stepped; build ADMMNxM with",
    ),
    "mask shape": (
        set_in("state", 0, MASK, ALL.T),
        f"the checkpoint's {MASK} for weight '{WEIGHTS[0]}' has shape (8, 16), the weight has (16, 8)",
    ),
    "mask kind": (
        set_in("state", 0, MASK, ALL.to(torch.int32)),
        f"{MASK} for weight '{WEIGHTS[0]}' is torch.int32 of layout torch.strided on cpu: the checkpoint is damaged",
    ),
    "mask type": (set_in("state", 0, MASK, "all"), f"{MASK} for weight '{WEIGHTS[0]}' is a str: the checkpoint is"),
    "mask sparse": (set_in("state", 0, MASK, ALL.float().to_sparse()), "layout torch.sparse_coo"),
    "mask not finite": (set_in("state", 0, MASK, ALL * float("nan")), "has NaN or infinite entries"),
    "stranger": (
        set_in("state", 1, {MASK: torch.ones(16, dtype=torch.bool)}),
        "has ADMM state for 1 parameters that are not selected here (positions [1] in the optimizer)",
    ),
    "errors": (set_in("admm", "model_errors", [1]), "model errors are no mapping to numbers"),
    "error": (set_in("admm", "model_errors", {WEIGHTS[0]: "small"}), "model errors are no mapping to numbers"),
}


def assert_refused(optimizer: ADMMNxM, net: nn.Module, state: Any, said: str) -> None:
    before = optimizer.state_dict()
    figures = optimizer.figures()
    weights = copy.deepcopy(net.state_dict())
    with pytest.raises(ValueError, match=re.escape(said)):
        optimizer.load_state_dict(state)
    after = optimizer.state_dict()
    assert_equal(after["state"], before["state"])
    assert after["param_groups"] == before["param_groups"]
    assert optimizer.figures() == figures
    assert_equal(dict(net.state_dict()), dict(weights))


@pytest.mark.parametrize(("damage", "said"), DAMAGES.values(), ids=DAMAGES.keys())
def test_damage_is_refused_in_words_and_nothing_is_loaded(damage: Damage, said: str) -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 29)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    assert_refused(optimizer, net, state, said)
    train(net, optimizer, 11, start=29)
    assert optimizer.finalize().ok


STATISTICS = ("admm", "statistics", WEIGHTS[0])
STATISTICS_DAMAGES: dict[str, tuple[Damage, str]] = {
    "no mapping": (set_in("admm", "statistics", 3), "statistics of 'the weights' are no mapping to tensors"),
    "moments": (set_in(*STATISTICS, 3), f"statistics of '{WEIGHTS[0]}' are no mapping to tensors: the checkpoint is"),
    "no tensor": (set_in(*STATISTICS, "inputs", 3), f"statistics of '{WEIGHTS[0]}' are no mapping to tensors"),
    "missing": (drop(*STATISTICS, "tokens"), f"statistics of '{WEIGHTS[0]}' have the shapes {{"),
    "shape": (set_in(*STATISTICS, "inputs", torch.ones(3, 3)), "this model needs {'inputs': (8, 8)"),
    "not finite": (set_in(*STATISTICS, "inputs", torch.full((8, 8), float("nan"))), "have NaN or infinite entries"),
    "no data": (set_in(*STATISTICS, "inputs", torch.ones(8, 8, device="meta")), "have no data: the checkpoint is"),
    "stranger": (
        set_in("admm", "statistics", "head.weight", {}),
        "statistics of 'head.weight': there is no such weight",
    ),
}


@pytest.mark.parametrize(("damage", "said"), STATISTICS_DAMAGES.values(), ids=STATISTICS_DAMAGES.keys())
def test_damaged_statistics_are_refused_before_anything_is_loaded(damage: Damage, said: str) -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 29)
    state = copy.deepcopy(optimizer.state_dict())
    damage(state)
    fresh = make_net()
    assert_refused(exact(fresh), fresh, state, said)


@pytest.mark.parametrize("state", [None, 3, [], {}, {"state": {}}, {"param_groups": []}])
def test_what_is_no_state_dict_is_refused(state: Any) -> None:
    net = make_net()
    assert_refused(exact(net), net, state, "this is no whole state dict of an optimizer")


def test_what_the_inner_optimizer_cannot_load_leaves_it_as_it_was() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 3)
    state = copy.deepcopy(optimizer.state_dict())
    del state["state"][0]["step"]  # AdamW looks for it after it has taken up everything
    assert_refused(optimizer, net, state, "the inner AdamW cannot load its part of the checkpoint (KeyError('step'))")
    train(net, optimizer, 37, start=3)
    assert optimizer.finalize().ok


def test_parameters_in_another_order_are_refused_by_name() -> None:
    net = make_net()
    params = list(net.parameters())
    forward = ADMMNxM(torch.optim.AdamW(params, lr=1e-2), net, total_steps=40)
    train(net, forward, 3)
    params[0], params[4] = params[4], params[0]  # the two "up" weights, of one shape
    backward = ADMMNxM(torch.optim.AdamW(params, lr=1e-2), net, total_steps=40)
    assert_refused(
        backward,
        net,
        forward.state_dict(),
        f"weight '{WEIGHTS[0]}' is parameter 4 of the optimizer, and was parameter 0 in the checkpoint",
    )


@pytest.mark.parametrize("steps", [5, 29, 34])
@pytest.mark.parametrize(
    ("build", "options"),
    [(exact, {"pattern": "1:4"}), (exact, {"dims": {".*": 0}}), (paper, {})],
    ids=["pattern", "dimension", "w_step"],
)
def test_a_run_of_another_kind_is_refused(build: Build, options: dict[str, Any], steps: int) -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, steps)
    other_net = make_net()
    with pytest.raises(ValueError, match=r"; build ADMMNxM (as it was built then|with the (selection|pattern))"):
        build(other_net, **options).load_state_dict(optimizer.state_dict())


def test_a_checkpoint_from_before_the_first_step_fits_any_pattern() -> None:
    other = exact(make_net(), pattern="1:4")
    other.load_state_dict(exact(make_net()).state_dict())
    assert other.phase == "dense"


@pytest.mark.parametrize("steps", [27, 30])
def test_windows_cut_otherwise_are_refused_with_a_remedy_that_works(steps: int) -> None:
    """Four windows of two steps from step 26 on: inside the first, and between the second and the third."""
    net = make_net()
    optimizer = exact(net, statistics_memory=1)
    train(net, optimizer, steps)
    with pytest.raises(ValueError, match=r"with 4 windows, and here are 1; build ADMMNxM with the statistics_memory"):
        exact(make_net()).load_state_dict(optimizer.state_dict())
    net, other = resumed(exact, saved(net, optimizer), statistics_memory=1)
    train(net, other, 40 - steps, start=steps)
    assert other.finalize().ok


def test_as_many_windows_cut_at_other_places_are_refused() -> None:
    net = make_net()
    optimizer = exact(net, statistics_memory=2 * BYTES_A_WEIGHT)
    train(net, optimizer, 32)
    assert (optimizer.figures().windows, optimizer.figures().windows_solved) == (2, 1)
    state = optimizer.state_dict()
    state["state"][2][MASK] = torch.ones(8, 16, dtype=torch.bool)  # as if the first window had held one weight alone
    with pytest.raises(
        ValueError, match=rf"mask of weight '{WEIGHTS[1]}' does not have pattern 2:4.*statistics_memory"
    ):
        exact(make_net(), statistics_memory=2 * BYTES_A_WEIGHT).load_state_dict(state)


def test_a_dense_checkpoint_does_not_fit_a_run_that_begins_pruned() -> None:
    net = make_net()
    optimizer = exact(net)
    train(net, optimizer, 5)
    other_net = make_net()
    other = exact(other_net, total_steps=40, prune_at=0)
    with pytest.raises(ValueError, match="from step 5 of a run that had not pruned yet, and prune_at=0 begins with"):
        other.load_state_dict(optimizer.state_dict())


def test_a_rho_that_would_fall_under_a_dual_is_refused() -> None:
    net = make_net()
    optimizer = paper(net, rho=Constant(0.5), update_every=2)
    train(net, optimizer, 6)
    state = optimizer.state_dict()
    with pytest.raises(
        ValueError, match=r"has rho = 0\.5 at step 6 with the dual in use.*goes on from 0\.1; rho may not"
    ):
        paper(make_net(), rho=0.1, update_every=2).load_state_dict(state)
    other = paper(make_net(), rho=0.7, update_every=2)
    other.load_state_dict(state)
    assert other.figures().step == 6
    train(net, optimizer, 30, start=6)
    resumed(paper, saved(net, optimizer), rho=0.1, update_every=2)  # frozen: no rho is in force


# ---------------------------------------------------------------- any damage


def make_states() -> list[dict[str, Any]]:
    found = []
    for build, steps in ((exact, 5), (exact, 29), (exact, 36), (paper, 12), (paper, 36)):
        net = make_net()
        optimizer = build(net)
        train(net, optimizer, steps)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found.append(copy.deepcopy(optimizer.state_dict()))
    return found


STATES = make_states()

JUNK: st.SearchStrategy[Any] = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-2, 60),
    st.floats(),
    st.text(max_size=2),
    st.builds(list),
    st.builds(dict),
    st.sampled_from([torch.tensor(float("nan")), torch.ones(2, 2), ALL, ALL.float(), torch.ones(0), torch.tensor(3)]),
)


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """Every place in a nested state dict, but for the inner optimizer's options, of which it alone knows the range."""
    if (
        path[:1] == ("param_groups",)
        and len(path) == 3
        and path[2] != "params"
        and not str(path[2]).startswith("admm_")
    ):
        return []
    found = [path] if path else []
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, part in items:
        found += places(part, (*path, key))
    return found


PLACES = [places(state) for state in STATES]


@given(st.data())
@settings(max_examples=300)
def test_any_damage_is_loaded_or_refused_and_never_half(data: st.DataObject) -> None:
    number = data.draw(st.integers(0, len(STATES) - 1))
    state = copy.deepcopy(STATES[number])
    for _ in range(data.draw(st.integers(1, 2))):
        path = data.draw(st.sampled_from(PLACES[number]))
        holder: Any = state
        try:
            for part in path[:-1]:
                holder = holder[part]
            if isinstance(holder, torch.Tensor):
                continue  # the first damage, which other examples share
            if data.draw(st.booleans()):
                del holder[path[-1]]
            else:
                holder[path[-1]] = data.draw(JUNK)
        except (KeyError, IndexError, TypeError):
            continue  # the first damage has taken the place of the second away
    net = make_net()
    build = exact if number < 3 else paper
    optimizer = build(net)
    before = optimizer.state_dict()
    figures = optimizer.figures()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            optimizer.load_state_dict(state)
        except ValueError:
            after = optimizer.state_dict()
            assert_equal(after["state"], before["state"])
            assert after["param_groups"] == before["param_groups"]
            assert optimizer.figures() == figures
            train(net, optimizer, 1)
            assert optimizer.figures().step == 1
        else:
            assert repr(optimizer)
            assert optimizer.masks().keys() == set(WEIGHTS)
            if optimizer.frozen:
                assert all(is_feasible(mask) for mask in optimizer.masks().values())
    if optimizer._run.statistics is not None:
        optimizer._run.stop_gathering()


# ---------------------------------------------------------------- how it is taken apart


class Key:
    """A parameter's key that counts comparisons."""

    compared = 0

    def __init__(self, number: int) -> None:
        self.number = number

    def __hash__(self) -> int:
        return hash(self.number)

    def __eq__(self, other: object) -> bool:
        Key.compared += 1
        return isinstance(other, Key) and self.number == other.number


def test_keys_are_looked_up_and_not_searched_for() -> None:
    net = nn.ModuleList(nn.Sequential(nn.Linear(4, 4, bias=False)) for _ in range(200))
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters()), net, total_steps=100)
    state = optimizer.state_dict()
    count = len(state["param_groups"][0]["params"])
    state["param_groups"][0]["params"] = [Key(n) for n in range(count)]
    state["state"] = {
        Key(n): {"step": torch.tensor(1.0), MASK: torch.ones(4, 4, dtype=torch.bool)} for n in range(count)
    }
    Key.compared = 0
    with pytest.raises(ValueError, match="cannot load"):
        optimizer.load_state_dict({**state, "param_groups": [{**state["param_groups"][0], "lr": 1.0}, {"params": []}]})
    assert Key.compared <= 10 * count


def test_state_that_the_inner_optimizer_does_not_report_is_added() -> None:
    class Terse(torch.optim.SGD):
        def state_dict(self) -> dict[str, Any]:
            return {**super().state_dict(), "state": {}}

    net = make_net()
    optimizer = ADMMNxM.paper(Terse(net.parameters(), lr=0.1), net, total_steps=40)
    train(net, optimizer, 3)
    state = optimizer.state_dict()["state"]
    assert [sorted(entry) for entry in state.values()] == [[CONSENSUS, MASK]] * 4
