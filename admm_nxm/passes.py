"""Passes of batches through a model that is not trained: for A and G, or block by block for A."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from .selection import block_prefixes, clean_name, unwrap_model
from .statistics import Moments, Statistics
from .weights import Weight

__all__ = ["Blocks", "LossOf", "Tokens", "gather", "loss_of", "still"]

LossOf = Callable[[nn.Module, Any], Any]
"""A function of the model and a batch."""

# Of the loss: a float16 gradient of a mean over many tokens would be rounded to zero.
_SCALE = 4096.0


def _call(model: nn.Module, batch: Any) -> Any:
    """Call the model with a batch: a mapping gives keyword arguments, a tuple or list positional ones."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def loss_of(model: nn.Module, batch: Any) -> Tensor | None:
    """Call the model with a batch, and return the loss in its output; None if it has none."""
    output = _call(model, _moved(batch, model))
    loss = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    return loss if isinstance(loss, Tensor) else None


@contextmanager
def still(model: nn.Module) -> Iterator[None]:
    """Hold a model in evaluation mode, with no gradient for any parameter, and leave it as it was."""
    modes = [(module, module.training) for module in model.modules()]
    # By name: offloaded parameters are other objects after each pass.
    wanted = {name: parameter.requires_grad for name, parameter in model.named_parameters(remove_duplicate=False)}
    try:
        model.eval()
        model.requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
        for name, parameter in model.named_parameters(remove_duplicate=False):
            parameter.requires_grad_(wanted[name])


def gather(
    model: nn.Module,
    weights: Sequence[Weight],
    batches: Iterable[Any],
    loss: LossOf | None,
    tokens: Tokens,
    each: Callable[[int], None],
    *,
    inputs: bool = True,
) -> dict[str, Moments]:
    """Pass all batches through the model once.

    Args:
        model: held :func:`still`.
        weights: those of which statistics are gathered.
        batches: what the model, or the loss function, is called with.
        loss: gives A and G; None gives A alone.
        inputs: whether A is wanted.
        tokens: gets to know those that the loss depends on.
        each: called with the number of batches done.

    Returns:
        Name -> the sums, over all processes.
    """
    modules = {weight.name: weight.modules for weight in weights}
    statistics = Statistics(modules, inputs=inputs, outputs=loss is not None, max_tokens=_ALL)
    with ExitStack() as stack:
        statistics.attach()
        stack.callback(statistics.detach)
        if loss is not None:
            for module in {module for weight in weights for module in weight.modules}:
                # In front of the statistics' own hooks.
                handle = module.register_forward_hook(_ask_for_gradient, prepend=True)
                stack.callback(handle.remove)
        for number, batch in enumerate(batches):
            batch = _moved(batch, model)
            if loss is None:
                statistics.counting = tokens.that_count(number, batch)
                with torch.no_grad():
                    _call(model, batch)
            else:
                statistics.counted = tokens.learn(number)
                with torch.enable_grad():
                    value = _checked(loss(model, batch), number + 1)
                    value.backward(torch.full_like(value, _SCALE))  # type: ignore[no-untyped-call,unused-ignore]
                del value
            each(number + 1)
    for one in statistics.moments.values():
        if one.outputs is not None:
            one.outputs.div_(_SCALE**2)
    statistics.reduce()
    return statistics.moments


class Tokens:
    """The tokens of each batch that count where A is gathered without a loss.

    These are the tokens that the loss has depended on, as far as an earlier pass with a loss tells, and else those that
    are no padding by the ``attention_mask`` of the batch.
    """

    def __init__(self) -> None:
        self._alive: dict[tuple[int, str], list[Tensor]] = {}  # number of a batch, weight -> those of each call

    def learn(self, number: int) -> Callable[[str, Tensor], None]:
        """Return a function that is told which tokens of a batch the loss depends on."""
        return lambda name, tokens: self._alive.setdefault((number, name), []).append(tokens)

    def that_count(self, number: int, batch: Any) -> Callable[[str, Tensor], Tensor | None]:
        """Return a function that tells which tokens of a batch count."""
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None

        def count(name: str, x: Tensor) -> Tensor | None:
            alive = self._alive.get((number, name), ())
            if len(alive) == 1 and alive[0].numel() == x[..., 0].numel():
                return alive[0].to(x.device).view(x.shape[:-1])
            fits = isinstance(mask, Tensor) and mask.shape == x.shape[:-1]
            return (mask != 0).to(x.device) if fits and isinstance(mask, Tensor) else None

        return count


_ALL = 2**62
"""The products are formed of all tokens: how many there are is the user's choice."""


def _ask_for_gradient(_: nn.Module, args: Any, output: Tensor) -> Tensor:  # noqa: ARG001
    """Let gradients reach this output, where no parameter before it asks for one."""
    return output if output.requires_grad else output.detach().requires_grad_()


def _checked(value: Any, number: int) -> Tensor:
    if not isinstance(value, Tensor) or value.numel() != 1 or not value.is_floating_point():
        kind = f"a {value.dtype} tensor of shape {tuple(value.shape)}" if isinstance(value, Tensor) else repr(value)
        raise ValueError(
            f"the loss of batch {number} is {kind}; one floating-point number is needed: give labels in every batch or "
            "in none, or a loss function (model, batch) -> loss"
        )
    if not value.requires_grad:
        raise ValueError(
            f"the loss of batch {number} does not depend on the weights to prune: it was computed without gradients "
            "(no_grad, detach, item), or from another model"
        )
    return value.sum()


def _moved(batch: Any, model: nn.Module) -> Any:
    """Return a batch on the device of the model's first parameter."""
    device = next((p.device for p in model.parameters() if not p.is_meta), None)
    return batch if device is None else _mapped(batch, lambda t: t.to(device))


def _mapped(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Return tensors, and tuples, lists and mappings of them, with every tensor changed; other things as they are."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, Mapping):
        return {key: _mapped(entry, change) for key, entry in value.items()}
    if type(value) in (tuple, list):
        return type(value)(_mapped(entry, change) for entry in value)
    return value


# ---------------------------------------------------------------- block by block


class _Stop(BaseException):
    """Ends a pass when what is wanted of it is known."""


class Blocks:
    """Passes over the batches for A of one block after the other, from a model whose earlier blocks are finished.

    A pass stops behind its block, or the last one that shares a weight with it. The blocks before it are not computed
    again: they return what the last of them in their list has returned for the same batch when it was finished. Whether
    that is right is tried at the start, on the first batch; for a model that needs more of its blocks than that, each
    pass is a whole one.

    Args:
        model: held :func:`still`.
        first: the first batch.
    """

    def __init__(self, model: nn.Module, first: Any) -> None:
        self.model = model
        module = unwrap_model(model)
        modules = {f"{clean_name(name)}.": found for name, found in module.named_modules(remove_duplicate=False)}
        self._blocks = {name: modules[name] for name in _outermost(block_prefixes(module))}
        self._outputs: dict[str, list[Any]] = {}  # the last finished block of a list -> what it returns for each batch
        self._chained = self._try_out(_moved(first, model))

    def block_of(self, weight: Weight) -> str:
        """Return the name of the block that a weight is in; empty if it is in none."""
        return next((name for name in self._blocks if weight.name.startswith(name)), "")

    def gather(
        self,
        block: str,
        weights: Sequence[Weight],
        batches: Iterable[Any],
        tokens: Tokens,
        each: Callable[[int], None],
    ) -> dict[str, Moments]:
        """Return name -> A of weights of one block; what stands before it in the model is finished.

        A weight that other modules share has A of all of them, with what is not finished as it is.

        Args:
            block: its name.
            weights: in that block, or in none.
            batches: the same in each call.
            tokens: those that count.
            each: called with the number of batches done.
        """
        statistics = Statistics({weight.name: weight.modules for weight in weights}, outputs=False, max_tokens=_ALL)
        chained = self._chained and block != ""
        end = self._last_with(weights)
        if not chained:
            self._outputs.clear()  # a weight in no block may stand before all of them
        last = self._last_before(block) if chained else []
        fresh: dict[str, list[Any]] = {name: [] for name in last if name not in self._outputs}
        statistics.attach()
        try:
            for number, batch in enumerate(batches):
                with ExitStack() as stack:
                    for name, outputs in self._outputs.items():
                        self._replace(stack, name, outputs[number])
                    for name, outputs in fresh.items():
                        _hook(stack, self._blocks[name], partial(_keep, outputs))
                    if chained and end is not None:
                        _hook(stack, end, _stop)
                    batch = _moved(batch, self.model)
                    statistics.counting = tokens.that_count(number, batch)
                    self._pass(batch)
                each(number + 1)
        finally:
            statistics.detach()
        self._outputs = {name: fresh.get(name) or self._outputs[name] for name in last}
        statistics.reduce()
        return statistics.moments

    def _last_with(self, weights: Sequence[Weight]) -> nn.Module | None:
        """Return the last block with a module of these weights; None if one stands in no block."""
        modules = {module for weight in weights for module in weight.modules}
        found = [block for block in self._blocks.values() if not modules.isdisjoint(block.modules())]
        within = {module for block in found for module in block.modules()}
        return found[-1] if modules <= within else None

    def _last_before(self, block: str) -> list[str]:
        """Return the last block of each list among those that stand before a block in the model."""
        names = list(self._blocks)
        return list({_list_of(name): name for name in names[: names.index(block)]}.values())

    def _replace(self, stack: ExitStack, last: str, output: Any) -> None:
        """Let a block and those before it in its list return this."""
        for name, module in self._blocks.items():
            if _list_of(name) == _list_of(last):
                stack.enter_context(_returning(module, output))
            if name == last:
                return

    def _pass(self, batch: Any) -> None:
        try:
            with torch.no_grad():
                _call(self.model, batch)
        except _Stop:
            pass

    def _try_out(self, batch: Any) -> bool:
        """Return whether each block is called once, in the order of the model, and gets the same inputs where the
        finished ones are left out."""
        inputs: list[tuple[str, Any]] = []
        outputs: dict[str, Any] = {}

        def note(name: str, _: nn.Module, args: Any, kwargs: Any) -> None:
            inputs.append((name, _mapped((args, kwargs), torch.clone)))

        def note_output(name: str, _: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
            outputs[name] = _mapped(output, torch.clone)

        with ExitStack() as stack:
            for name, block in self._blocks.items():
                stack.callback(block.register_forward_pre_hook(partial(note, name), with_kwargs=True).remove)
                _hook(stack, block, partial(note_output, name))
            self._pass(batch)
        if [name for name, _ in inputs] != list(self._blocks) or not all(map(_is_plain, outputs.values())):
            return False
        return all(self._gets(name, given, batch, outputs) for name, given in inputs)

    def _gets(self, block: str, given: Any, batch: Any, outputs: dict[str, Any]) -> bool:
        """Return whether a block gets these inputs where the blocks before it are left out."""
        found: list[bool] = []

        def compare(_: nn.Module, args: Any, kwargs: Any) -> None:
            found.append(_same(given, (args, kwargs)))
            raise _Stop

        with ExitStack() as stack:
            for last in self._last_before(block):
                self._replace(stack, last, outputs[last])
            stack.callback(self._blocks[block].register_forward_pre_hook(compare, with_kwargs=True).remove)
            with suppress(Exception):  # a model that needs more of its blocks may fail in any way
                self._pass(batch)
        return found == [True]


def _outermost(prefixes: Iterable[str]) -> list[str]:
    found: list[str] = []
    for prefix in prefixes:  # in model order, a block before those within it
        if not any(prefix.startswith(outer) for outer in found):
            found.append(prefix)
    return found


def _list_of(block: str) -> str:
    return block[:-1].rpartition(".")[0]


@contextmanager
def _returning(module: nn.Module, output: Any) -> Iterator[None]:
    """Let a module return this in place of what it would compute."""
    own = module.__dict__.get("forward")
    module.forward = lambda *args, **kwargs: _mapped(output, torch.clone)  # noqa: ARG005
    try:
        yield
    finally:
        del module.forward
        if own is not None:
            module.forward = own


def _hook(stack: ExitStack, module: nn.Module, hook: Callable[..., None]) -> None:
    stack.callback(module.register_forward_hook(hook).remove)


def _keep(outputs: list[Any], _: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    outputs.append(_mapped(output, torch.clone))


def _stop(_: nn.Module, args: Any, output: Any) -> None:  # noqa: ARG001
    raise _Stop


def _is_plain(value: Any) -> bool:
    """Whether a value is made of tensors in tuples, lists and dictionaries alone, so that it can be copied."""
    if type(value) is dict:
        return all(map(_is_plain, value.values()))
    return all(map(_is_plain, value)) if type(value) in (tuple, list) else value is None or isinstance(value, Tensor)


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return isinstance(b, Tensor) and torch.equal(a, b)
    if isinstance(a, Mapping):
        return isinstance(b, Mapping) and a.keys() == b.keys() and all(_same(a[key], b[key]) for key in a)
    if type(a) in (tuple, list):
        return type(a) is type(b) and len(a) == len(b) and all(map(_same, a, b))
    return True  # settings, and caches, which have an entry a block
