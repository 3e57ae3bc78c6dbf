"""Run every optimizer of the packages that are named through the whole life of a run, alone and then wrapped.

By hand: ``python -m tests.zoo pytorch_optimizer torch_optimizer heavyball timm.optim``; a colon and names after a
package choose some of its classes. docs/works-with.md has the results.

What an optimizer cannot do alone is not asked of it when it is wrapped: to step without an error or a NaN, to give the
same bits twice, to save and resume. Wrapped, it has to give the bits that it gives alone until the solve, and
afterwards those of masks that are put on by hand. (With a second set of weights both sets are masked, which is not
done by hand; there the weights must not grow.) Each step of the frozen phase has to be feasible, and a run that is
resumed in any phase has to end with the same bits.
"""

from __future__ import annotations

import collections
import contextlib
import copy
import gc
import importlib
import inspect
import pickle
import sys
import traceback
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from admm_nxm import ADMMNxM, verify
from tests.helpers import (
    CALIBRATION,
    DENSE,
    FROZEN,
    STEPS,
    admm,
    batches,
    loss_of,
    make_net,
    same_bits,
    saved,
    weights_of,
)

SOLVE = 17
"""The step of the solve."""

Weights = dict[str, Tensor]


def _matrices(net: nn.Module) -> list[dict[str, Any]]:
    held = list(net.parameters())
    return [{"params": [p for p in held if (p.ndim == 2) == wanted], "use_muon": wanted} for wanted in (True, False)]


def _admm_over(net: nn.Module, held: list[Tensor]) -> ADMMNxM:
    return admm(net, lambda _: torch.optim.AdamW(held, lr=1e-3))


def _alone(make: Callable[[], Any]) -> Any:
    """Make what wants processes, with one."""
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    return make()


SPECIAL: dict[str, Callable[[type, nn.Module], Any]] = {
    "BSAM": lambda cls, net: cls(net.parameters(), num_data=64),
    "DeMo": lambda cls, net: _alone(lambda: cls(net.parameters())),
    "DistributedMuon": lambda cls, net: _alone(lambda: cls(_matrices(net))),
    "GSAM": lambda cls, net: cls(
        net.parameters(), torch.optim.AdamW(net.parameters()), net, types.SimpleNamespace(step=lambda *_: 0.05)
    ),
    "Lars": lambda cls, net: cls(net.parameters(), lr=1e-2),  # it diverges at its default, as the next one does
    "ScheduleFreeSGD": lambda cls, net: cls(net.parameters(), lr=1e-2),
    "Ranger21": lambda cls, net: cls(net.parameters(), num_iterations=STEPS),
    "SpectralSphere": lambda cls, net: cls([p for p in net.parameters() if p.ndim == 2]),
    "SplitOpt": lambda cls, net: cls([{"params": net.parameters(), "optimizer": torch.optim.AdamW}]),
    "WSAM": lambda cls, net: cls(net, net.parameters(), torch.optim.AdamW),
}
"""What takes arguments of its own."""

AROUND: dict[str, Callable[[type, nn.Module], Any]] = {
    "SplitOpt": lambda cls, net: cls([{"params": net.parameters(), "optimizer": lambda held: _admm_over(net, held)}]),
}
"""How to put around ADMMNxM what does not just take an optimizer."""

WAYS: list[Callable[[type, nn.Module], Any]] = [
    lambda cls, net: cls(net.parameters()),
    lambda cls, net: cls(net.parameters(), lr=1e-3),
    lambda cls, net: cls(_matrices(net)),
    lambda cls, net: cls(net.parameters(), torch.optim.AdamW),
    lambda cls, net: cls(net),
    lambda cls, net: cls(torch.optim.AdamW(net.parameters(), lr=1e-3)),
]
"""The first that works is taken: defaults, as far as there are any."""


class Life:
    """A network, an optimizer, and how its loop has to look."""

    def __init__(self, make: Callable[[nn.Module], Any], graph: bool = False) -> None:
        self.net = make_net()
        self.optimizer = make(self.net)
        self.graph = graph

    def run(self, stop: int, start: int = 0, masks: Weights | None = None) -> Life:
        for step, x in enumerate(batches(stop - start, start), start):
            self.optimizer.zero_grad()
            loss_of(self.net, x).backward(create_graph=self.graph)
            torch.manual_seed(step)  # for those that draw random numbers
            with torch.no_grad():
                for name, mask in (masks or {}).items():
                    self.net.get_parameter(name).grad.masked_fill_(~mask, 0)  # type: ignore[union-attr]
            self.optimizer.step()
            with torch.no_grad():
                for name, mask in (masks or {}).items():
                    self.net.get_parameter(name).masked_fill_(~mask, 0)
        return self

    def state(self) -> Any:
        state = self.net.state_dict(), self.optimizer.state_dict()
        try:
            return saved(state)
        except pickle.UnpicklingError:  # some keep more than tensors and plain values in it
            return pickle.loads(pickle.dumps(state))

    def load(self, state: Any) -> None:
        self.net.load_state_dict(state[0])
        self.optimizer.load_state_dict(state[1])


def alike(a: Weights, b: Weights) -> bool:
    return all(same_bits(a[name], b[name]) for name in a)


def said(error: BaseException, length: int = 200) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:length]}"


def build(cls: type) -> Callable[[nn.Module], Any]:
    errors = []
    for way in [SPECIAL[cls.__name__]] if cls.__name__ in SPECIAL else WAYS:

        def make(net: nn.Module, way: Callable[[type, nn.Module], Any] = way) -> Any:
            optimizer = way(cls, net)
            with contextlib.suppress(AttributeError):  # schedule-free ones want it
                optimizer.train()
            return optimizer

        try:
            make(make_net())
        except Exception as error:
            errors.append(error)
        else:
            return make
    raise RuntimeError(" | ".join(dict.fromkeys(said(error, 60) for error in errors)))


def examine(cls: type) -> tuple[str, str]:
    """Return a verdict on an optimizer class and the reason for it."""
    try:
        make = build(cls)
        graph = False
        try:
            alone = Life(make).run(SOLVE)
        except RuntimeError as error:
            graph = "grad_fn" in str(error)
            if not graph:
                raise
            alone = Life(make, graph).run(SOLVE)
    except Exception as error:
        return without(cls, error)
    if not all(bool(p.isfinite().all()) for p in alone.net.parameters()):
        return "fails alone", "NaN or infinite weights"
    resumes = resumes_alone(make, graph)
    try:
        admm(make_net(), make)
    except (TypeError, ValueError) as error:
        return refused(cls, error)
    return wrapped(make, graph, alone, resumes)


def without(cls: type, error: Exception) -> tuple[str, str]:
    """What has failed alone: left out, unless it only wants a closure; then it has to be refused with a reason."""
    try:
        make = build(cls)
    except Exception:
        return "fails alone", said(error)
    try:
        admm(make_net(), make)
    except TypeError as refusal:
        return "refused", said(refusal)
    x = next(batches(1))
    try:
        net = make_net()
        optimizer = make(net)

        @torch.enable_grad()
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(net, x)
            loss.backward()
            return loss

        closure()
        optimizer.step(closure)
    except Exception:
        return "fails alone", said(error)
    try:
        net = make_net()
        wrapped = admm(net, make)
        loss_of(net, x).backward()
        wrapped.step()
    except TypeError as refusal:
        return "refused", said(refusal)
    return "FAULT", f"wants a closure, and is not refused: {said(error)}"


def refused(cls: type, error: Exception) -> tuple[str, str]:
    """What is refused with a way round; where the way is to put it around ADMMNxM, it has to work."""
    if f"put {cls.__name__} around that" in str(error):
        try:
            way = AROUND.get(cls.__name__, lambda cls, net: cls(admm(net)))
            life = Life(lambda net: way(cls, net))
            getattr(life.optimizer, "train", lambda: None)()
            life.run(STEPS)
            getattr(life.optimizer, "eval", lambda: None)()
            built = [x for x in gc.get_objects() if isinstance(x, ADMMNxM) and "_run" in vars(x)]
            inside = next(x for x in built if x._run.weights.model is life.net)
            if not inside.finalize().ok or inside.figures().model_error is None:
                return "FAULT", "around ADMMNxM it does not work either"
        except Exception as failed:
            return "FAULT", f"around ADMMNxM: {said(failed)}"
    return "refused", said(error)


def resumes_alone(make: Callable[[nn.Module], Any], graph: bool) -> str:
    """Return "" if a run alone resumes bit for bit, else why it does not."""
    try:
        states = {}
        whole = Life(make, graph)
        for first, last in ((0, DENSE), (DENSE, CALIBRATION), (CALIBRATION, FROZEN), (FROZEN, STEPS)):
            whole.run(last, first)
            states[last] = whole.state()
        again = Life(make, graph).run(STEPS)
        if not alike(weights_of(again.net), weights_of(whole.net)):
            return "two runs of it differ"
        for stop in (DENSE, CALIBRATION, FROZEN):
            again = Life(make, graph)
            again.load(states[stop])
            again.run(STEPS, stop)
            if not alike(weights_of(again.net), weights_of(whole.net)):
                return "alone it does not resume bit for bit"
    except Exception as error:
        return f"alone it does not resume: {said(error)}"
    return ""


def wrapped(make: Callable[[nn.Module], Any], graph: bool, alone: Life, resumes: str) -> tuple[str, str]:
    life = Life(lambda net: admm(net, make), graph)
    optimizer: ADMMNxM = life.optimizer
    states: dict[int, Any] = {}
    try:
        for stop in (DENSE, CALIBRATION, SOLVE - 1):
            life.run(stop, max(states, default=0))
            states[stop] = None if resumes else life.state()
        dense = Life(make, graph).run(SOLVE - 1)
        random = resumes == "two runs of it differ"
        if not random and not alike(weights_of(dense.net), weights_of(life.net)):
            return "FAULT", "before the solve, the bits are not those of the optimizer alone"
        life.run(SOLVE, SOLVE - 1)
        largest = max(float(p.abs().max()) for p in life.net.parameters())
        masks = {name: mask.clone() for name, mask in optimizer.masks().items()}
        by_hand = Life(make, graph).run(SOLVE)
        second_sets = [w for w in optimizer._run.weights if w.copies(optimizer.inner)]
        with torch.no_grad():
            for name, p in life.net.named_parameters():
                by_hand.net.get_parameter(name).copy_(p)
        by_hand.run(STEPS, SOLVE, masks)
        for step in range(SOLVE, STEPS):
            life.run(step + 1, step)
            if step + 1 == FROZEN and not resumes:
                states[FROZEN] = life.state()
            if not verify(life.net, "1:4").ok:
                return "FAULT", f"not feasible after step {step + 1}"
        end = weights_of(life.net)
        if not max(float(p.abs().max()) for p in end.values()) < 2 * largest:
            return "FAULT", f"weights grow to more than twice the {largest:.3g} of the solve"
        if not random and not second_sets and not alike(weights_of(by_hand.net), end):
            return "FAULT", "in the frozen phase, the bits are not those of masks put on by hand"
        if not resumes:
            for stop, state in states.items():
                again = Life(lambda net: admm(net, make), graph)
                again.load(copy.deepcopy(state))
                again.run(STEPS, stop)
                if not alike(weights_of(again.net), end):
                    return "FAULT", f"resumed at step {stop}, it ends with other bits"
        getattr(optimizer, "eval", lambda: None)()
        if not optimizer.finalize().ok or not verify(life.net, "1:4").ok:
            return "FAULT", "not feasible after finalize()"
    except Exception as error:
        if optimizer.figures().step == 0 and isinstance(error, (TypeError, ValueError)):
            return "refused", said(error)
        where = traceback.extract_tb(error.__traceback__)[-1]
        return "FAULT", f"{said(error)} ({where.filename.rsplit('/', 2)[-1]}:{where.lineno})"
    note = "with a second set of weights" if second_sets else ""
    return ("passes, but cannot be resumed alone either", resumes) if resumes else ("passes", note)


def classes_of(package: str) -> dict[str, type]:
    module = importlib.import_module(package)
    if package == "heavyball":
        module.utils.compile_mode = None  # each would be compiled for minutes
    found: dict[str, type] = {}
    for name, value in sorted(vars(module).items()):
        own = inspect.isclass(value) and value.__module__.split(".")[0] == package.split(".")[0]
        if own and issubclass(value, Optimizer) and value not in found.values():
            found[name] = value
    return found


def main(packages: list[str]) -> int:
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    faults = 0
    for package in packages:
        only = package.partition(":")[2]
        count: collections.Counter[str] = collections.Counter()
        for name, cls in classes_of(package.partition(":")[0]).items():
            if only and name not in only.split(","):
                continue
            verdict, reason = examine(cls)
            count[verdict] += 1
            if verdict != "passes" or reason:
                print(f"{name}: {verdict}: {reason}", flush=True)
        print(f"{package}: {dict(count)}", flush=True)
        faults += count["FAULT"]
    return int(faults > 0)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
