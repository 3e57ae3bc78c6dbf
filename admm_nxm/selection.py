"""Which weights are pruned, with which pattern, along which dimension, and what was left dense and why."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, Union

import torch
from torch import Tensor, nn

from .pattern import Pattern
from .table import format_table

__all__ = [
    "TRAINABLE_DTYPES",
    "Ineligible",
    "Select",
    "SelectedWeight",
    "Selection",
    "SkippedWeight",
    "clean_name",
    "is_conv1d",
    "is_embedding",
    "named_tensors",
    "select_weights",
]

# Evaluated at run time, where ``|`` between a type and a Callable needs a newer Python than 3.10.
Rule = Union[Pattern, str, None]  # noqa: UP007
Select = Union[Mapping[str, Rule], Callable[[str, nn.Module | None], Rule]]  # noqa: UP007
Ineligible = Literal["error", "skip"]

# Components that wrappers put into parameter names.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_HEADS = {
    "classification_head",
    "classifier",
    "cls",
    "head",
    "heads",
    "lm_head",
    "pooler",
    "qa_outputs",
    "score",
    "summary",
}
_ROUTERS = {"gate", "router", "shared_expert_gate"}
_EMBEDDINGS = re.compile(r"embed|^wte$|^wpe$|^shared$|relative_attention_bias")
# Where only names are at hand, these are transformers' Conv1D in GPT-2 and its kin, stored as (input, output), or a
# Linear in other families.
_CONV1D_NAMES = {"c_attn", "c_fc", "c_proj", "q_attn"}


TRAINABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class SelectedWeight:
    """A prunable weight.

    Args:
        name: its name in the model.
        shape: its (global) shape.
        pattern: the NxM pattern.
        dim: the grouped dimension, counted from the front.
        aliases: further names of the same tensor, if it is tied.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    dim: int
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class SkippedWeight:
    """A parameter that stays dense.

    Args:
        name: its name in the model.
        shape: its shape.
        reason: why it stays dense.
        wanted: whether the rules asked for it and it could not be pruned.
    """

    name: str
    shape: tuple[int, ...]
    reason: str
    wanted: bool = False


@dataclass(frozen=True)
class Selection:
    """All parameters of a model, pruned or skipped; prints as a table."""

    weights: tuple[SelectedWeight, ...]
    skipped: tuple[SkippedWeight, ...]

    def __iter__(self) -> Iterator[SelectedWeight]:
        return iter(self.weights)

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, name: str) -> SelectedWeight:
        """Return the prunable weight called ``name`` (or one of whose other names it is)."""
        for weight in self.weights:
            if name == weight.name or name in weight.aliases:
                return weight
        raise KeyError(f"{name!r} is not a prunable weight; these are: {', '.join(w.name for w in self.weights)}")

    def __str__(self) -> str:
        rows = [(w.name, "x".join(map(str, w.shape)), str(w.pattern), str(w.dim)) for w in self.weights]
        total = sum(math.prod(w.shape) for w in self.weights)
        rest = sum(math.prod(w.shape) for w in self.skipped)
        lines = [
            f"{len(self.weights)} prunable weights, {total:,} of {total + rest:,} parameters",
            format_table(("weight", "shape", "pattern", "dim"), rows),
        ]
        reasons: dict[str, list[SkippedWeight]] = {}
        for skipped in self.skipped:
            reasons.setdefault(skipped.reason, []).append(skipped)
        if reasons:
            lines.append(f"left dense: {len(self.skipped)} parameters")
            table = [
                (
                    reason,
                    len(group),
                    sum(math.prod(w.shape) for w in group),
                    group[0].name + (", …" if group[1:] else ""),
                )
                for reason, group in reasons.items()
            ]
            lines.append(format_table(("reason", "tensors", "parameters", "such as"), table))
        return "\n".join(lines)


@dataclass(frozen=True)
class _Candidate:
    """A distinct parameter with every place where it stands in the model."""

    param: Tensor
    names: tuple[str, ...]
    owners: tuple[nn.Module | None, ...]
    in_block: bool

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def places(self) -> Iterator[tuple[str, nn.Module | None]]:
        return zip(self.names, self.owners, strict=True)


Source = Union[nn.Module, Mapping[str, Tensor], Iterable[tuple[str, Tensor]]]  # noqa: UP007


def select_weights(
    model: Source,
    pattern: Pattern | str = "2:4",
    select: Select | None = None,
    *,
    dims: Mapping[str, int] | None = None,
    ineligible: Ineligible = "error",
    trainable: bool = True,
    held: Collection[int] | None = None,
) -> tuple[Selection, dict[str, Tensor]]:
    """Choose the prunable weights of a model.

    By default these are the weights of ``nn.Linear`` and of transformers' ``Conv1D`` in the repeated blocks, without
    embeddings, weights tied to them, heads and routers. Where only names and tensors are given, 2-D tensors in
    numbered blocks count as such.

    Args:
        model: a module, or pairs of name and tensor.
        pattern: pattern of the default rules.
        select: regular expression (matched against the whole parameter name, first match wins) -> Pattern, its
            spelling, or None to leave dense; or a callable ``(name, module) -> Pattern | str | None``. It replaces the
            default rules.
        dims: regular expression -> grouped dimension, where it is not that of the module's input.
        ineligible: what to do with a weight that the rules ask for and that cannot be pruned (frozen, not held by
            the optimizer, a width that is no multiple of the group, not floating point): ``"error"``, or ``"skip"``
            to leave it dense and say so in the selection.
        trainable: whether the weights are going to be trained; False accepts frozen ones.
        held: ids of the parameters that the optimizer holds; None accepts all.

    Returns:
        The selection, and the tensor of each prunable weight by name.

    Raises:
        TypeError: ``model`` has no names, or ``select`` is of the wrong kind.
        ValueError: nothing to prune, an ineligible weight, a rule that matches nothing, a flattened parameter, two
            tensors of one name.
    """
    if ineligible not in ("error", "skip"):
        raise ValueError(f'ineligible={ineligible!r} must be "error" or "skip"')
    candidates = _candidates(model)
    rule_of = _explicit_rules(select, candidates) if select is not None else _default_rules(pattern)
    dim_rules = [(_compile("dims", expression, candidates), dim) for expression, dim in (dims or {}).items()]
    weights: list[SelectedWeight] = []
    skipped: list[SkippedWeight] = []
    params: dict[str, Tensor] = {}
    for candidate in candidates:
        shape = tuple(candidate.param.shape)
        _refuse_flattened(candidate)
        rule, reason = rule_of(candidate)
        if rule is None:
            skipped.append(SkippedWeight(candidate.name, shape, reason))
            continue
        if candidate.param.ndim < 2:
            skipped.append(SkippedWeight(candidate.name, shape, "not a matrix"))
            continue
        dim = _grouped_dim(candidate, candidates, dim_rules)
        problem = _ineligible(candidate, rule, dim, trainable, held)
        if problem is not None and ineligible == "error":
            raise ValueError(
                f"weight {candidate.name!r} of shape {shape} cannot be pruned to {rule}: {problem[0]}; {problem[1]}, "
                'or leave it dense by a select rule, or all such weights with ineligible="skip"'
            )
        if problem is not None:
            skipped.append(SkippedWeight(candidate.name, shape, problem[0], wanted=True))
            continue
        weights.append(SelectedWeight(candidate.name, shape, rule, dim, candidate.names[1:]))
        params[candidate.name] = candidate.param
    selection = Selection(tuple(weights), tuple(skipped))
    if not weights:
        reasons = sorted({s.reason for s in skipped}) or ["the model has no parameters"]
        raise ValueError(
            f"no prunable weight among {len(skipped)} parameters ({'; '.join(reasons)}); name the weights to prune, "
            "for instance select={r'.*\\.weight': '2:4'}"
        )
    return selection, params


def named_tensors(model: Source) -> dict[str, Tensor]:
    """Return the parameters of a model by the names that a :class:`Selection` gives them, tied ones by each name."""
    return {name: candidate.param for candidate in _candidates(model) for name in candidate.names}


def _candidates(model: Source) -> list[_Candidate]:
    if isinstance(model, nn.Module):
        return _candidates_of_module(unwrap_model(model))
    if isinstance(model, Mapping):
        model = model.items()
    try:
        pairs = list(model)
    except TypeError:
        raise TypeError(
            f"model is a {type(model).__name__}; a torch.nn.Module or its named_parameters() is needed"
        ) from None
    places: dict[int, list[str]] = {}
    tensors: dict[int, Tensor] = {}
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and torch.is_tensor(pair[1])):
            raise TypeError(
                f"model yields {type(pair).__name__}, not pairs of name and tensor; "
                "pass the module itself or model.named_parameters()"
            )
        tensors[id(pair[1])] = pair[1]
    # DistributedDataParallel puts the whole model under one name.
    wrapped = all(clean_name(name).startswith("module.") for name, _ in pairs)
    holders: dict[str, int] = {}
    for name, tensor in pairs:
        name = clean_name(name).removeprefix("module." if wrapped else "")
        if name not in holders:
            places.setdefault(id(tensor), []).append(name)
        elif holders[name] != id(tensor):
            raise ValueError(f"model yields two different tensors called {name!r}; give each its own name")
        holders[name] = id(tensor)
    return [
        _Candidate(tensors[key], tuple(names), (None,) * len(names), any(map(_numbered, names)))
        for key, names in places.items()
    ]


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel and torch.compile, in any order."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        elif (compiled := model._modules.get("_orig_mod")) is not None:
            model = compiled
        else:
            return model


def _candidates_of_module(model: nn.Module) -> list[_Candidate]:
    blocks = _block_prefixes(model)
    places: dict[int, list[tuple[str, nn.Module]]] = {}
    tensors: dict[int, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for local_name, param in module._parameters.items():
            if param is not None:
                name = clean_name(f"{prefix}.{local_name}" if prefix else local_name)
                places.setdefault(id(param), []).append((name, module))
                tensors[id(param)] = param
    return [
        _Candidate(
            tensors[key],
            tuple(name for name, _ in found),
            tuple(module for _, module in found),
            any(name.startswith(block) for name, _ in found for block in blocks),
        )
        for key, found in places.items()
    ]


def _block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the repeated blocks: composite members of a ModuleList, or alike members of a Sequential."""
    prefixes = []
    for name, module in model.named_modules():
        # named_children() would leave out a block that stands here a second time.
        members = {key: member for key, member in module._modules.items() if member is not None}
        if isinstance(module, nn.ModuleList):
            pass
        elif isinstance(module, nn.Sequential):
            kinds = [type(member) for member in members.values()]
            members = {key: member for key, member in members.items() if kinds.count(type(member)) > 1}
        else:
            continue
        for key, member in members.items():
            if next(member.children(), None) is not None:
                prefixes.append(clean_name(f"{name}.{key}" if name else key) + ".")
    return tuple(prefixes)


def clean_name(name: str) -> str:
    """Return a parameter's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _numbered(name: str) -> bool:
    """Whether the name runs through a numbered composite block, as in ``encoder.layer.0.output.dense.weight``."""
    return re.search(r"(^|\.)\d+\.(.+)\.[^.]+$", name) is not None


RuleOf = Callable[[_Candidate], "tuple[Pattern | None, str]"]


def _default_rules(pattern: Pattern | str) -> RuleOf:
    parsed = Pattern.parse(pattern)

    def rule_of(candidate: _Candidate) -> tuple[Pattern | None, str]:
        reason = _default_reason(candidate)
        return (parsed, "") if reason is None else (None, reason)

    return rule_of


def _default_reason(candidate: _Candidate) -> str | None:
    """Why the default rules leave a parameter dense; None if they prune it."""
    for name, owner in candidate.places:
        if is_embedding(name, owner):
            return "embedding" if len(candidate.names) == 1 else "tied to an embedding"
    if candidate.param.ndim < 2:
        return "not a matrix"
    parts = candidate.name.split(".")[:-1]
    above = parts[: next((i for i, part in enumerate(parts) if part.isdecimal()), len(parts))]
    if _HEADS.intersection(part.lower() for part in above):
        return "head or pooler"
    if _ROUTERS.intersection(part.lower() for part in parts):
        return "router"
    owner = candidate.owners[0]
    if isinstance(owner, nn.modules.conv._ConvNd):
        return "convolution: ask for it with select"
    if candidate.param.ndim > 2:
        return "more than 2 dimensions: ask for it with select"
    if not candidate.in_block:
        return "outside the repeated blocks"
    if owner is not None and not isinstance(owner, nn.Linear) and not is_conv1d(owner):
        return f"not a Linear weight ({type(owner).__name__}): ask for it with select"
    if candidate.name.rsplit(".", 1)[-1] != "weight":
        return "not a weight"
    return None


def _explicit_rules(select: Select, candidates: list[_Candidate]) -> RuleOf:
    if isinstance(select, Mapping):
        rules = [
            (_compile("select", expression), None)
            if rule is None
            else (_compile("select", expression, candidates), Pattern.parse(rule))
            for expression, rule in select.items()
        ]

        def rule_by_name(candidate: _Candidate) -> tuple[Pattern | None, str]:
            for expression, rule in rules:
                if any(expression.fullmatch(name) for name in candidate.names):
                    return rule, "" if rule is not None else f"left dense by select rule {expression.pattern!r}"
            return None, "no select rule matches"

        return rule_by_name
    if not callable(select):
        raise TypeError(f"select is a {type(select).__name__}; a mapping or a callable (name, module) is needed")

    def rule_by_call(candidate: _Candidate) -> tuple[Pattern | None, str]:
        rule = select(candidate.name, candidate.owners[0])
        return (None, "left dense by select") if rule is None else (Pattern.parse(rule), "")

    return rule_by_call


def _compile(kind: str, expression: str, candidates: list[_Candidate] | None = None) -> re.Pattern[str]:
    """Compile the expression of a rule, which has to match one of the candidates, if they are given."""
    try:
        compiled = re.compile(expression)
    except (re.error, TypeError) as error:
        raise ValueError(f"{kind} rule {expression!r} is no regular expression: {error}") from None
    if candidates is not None and not any(compiled.fullmatch(name) for c in candidates for name in c.names):
        raise ValueError(
            f"{kind} rule {expression!r} matches no parameter; the expression must match the whole name, such as "
            f"{candidates[0].name if candidates else 'encoder.layer.0.weight'!r}"
        )
    return compiled


def is_embedding(name: str, owner: nn.Module | None) -> bool:
    """Whether a weight belongs to an embedding: by its module, or by its name where there is none at hand."""
    if owner is not None:
        return isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
    return any(_EMBEDDINGS.search(part) for part in name.split(".")[:-1])


def is_conv1d(owner: nn.Module | None) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer with its weight stored as (input, output)."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers") for base in type(owner).__mro__)


def _grouped_dim(
    candidate: _Candidate, candidates: list[_Candidate], dim_rules: list[tuple[re.Pattern[str], int]]
) -> int:
    ndim = candidate.param.ndim
    for expression, dim in dim_rules:
        if any(expression.fullmatch(name) for name in candidate.names):
            if not -ndim <= dim < ndim:
                raise ValueError(
                    f"dims rule {expression.pattern!r} gives dimension {dim} to {candidate.name!r} of shape "
                    f"{tuple(candidate.param.shape)}; allowed are {-ndim} to {ndim - 1}"
                )
            return dim % ndim
    found = {_input_dim(name, owner, candidate.param, candidates) % ndim for name, owner in candidate.places}
    if len(found) > 1:
        raise ValueError(
            f"tied weight {' = '.join(candidate.names)} has its inputs along different dimensions {sorted(found)}; "
            "choose one with dims={name: dim}, or leave it dense by a select rule"
        )
    return found.pop()


def _input_dim(name: str, owner: nn.Module | None, param: Tensor, candidates: list[_Candidate]) -> int:
    """The dimension of ``param`` along which the inputs run, as its module computes."""
    if owner is None and param.ndim == 2:
        return 0 if _named_conv1d(name, candidates) else -1
    if owner is None and param.ndim > 3:
        return 1  # the weight of a convolution
    if is_conv1d(owner) or isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return 0
    if isinstance(owner, nn.modules.conv._ConvNd):
        return 1
    if param.ndim == 3 and _experts_transposed(name, owner, candidates):
        return 1
    return -1


def _experts_transposed(name: str, owner: nn.Module | None, candidates: list[_Candidate]) -> bool:
    """Whether transformers' fused experts are stored as (experts, input, output): GPT-OSS, Llama 4."""
    parent = name.rpartition(".")[0]
    shapes = {c.name: tuple(c.param.shape) for c in candidates if c.param.ndim == 3}
    up, down = shapes.get(f"{parent}.gate_up_proj"), shapes.get(f"{parent}.down_proj")
    if up is not None and down is not None:
        return up[1:] == (down[2], 2 * down[1])
    return getattr(owner, "is_transposed", False)


def _named_conv1d(name: str, candidates: list[_Candidate]) -> bool:
    """Whether a weight with a name of the GPT-2 family is a Conv1D's, as (input, output), and not a Linear's.

    A bias is as long as the output is wide. Without biases the output of c_attn (query, key and value) is wider than
    its input, and so most often that of c_fc. Square weights go with the nearest other one.
    """
    parent = name.rpartition(".")[0]
    if _leaf(parent) not in _CONV1D_NAMES:
        return False
    shapes = {c.name: tuple(c.param.shape) for c in candidates}
    oblong = {
        module: shape
        for module, shape in ((key.removesuffix(".weight"), shape) for key, shape in shapes.items())
        if _leaf(module) in _CONV1D_NAMES and len(shape) == 2 and shape[0] != shape[1]
    }
    by_bias = {m: shapes[f"{m}.bias"] == shape[1:] for m, shape in oblong.items() if f"{m}.bias" in shapes}
    by_attention = {m: rows < columns for m, (rows, columns) in oblong.items() if _leaf(m) == "c_attn"}
    by_mlp = {m: rows < columns for m, (rows, columns) in oblong.items() if _leaf(m) == "c_fc"}
    evidence = by_bias or by_attention or by_mlp
    nearest = max(evidence, key=lambda module: _common_parts(module, parent), default=None)
    return nearest is not None and evidence[nearest]


def _common_parts(a: str, b: str) -> int:
    pairs = zip(a.split("."), b.split("."), strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _leaf(module_name: str) -> str:
    return module_name.rpartition(".")[2]


def _ineligible(
    candidate: _Candidate, pattern: Pattern, dim: int, trainable: bool, held: Collection[int] | None
) -> tuple[str, str] | None:
    """Why a weight cannot be pruned and what to do about it; None if it can."""
    param = candidate.param
    if param.layout != torch.strided:
        return f"its layout is {param.layout}", "convert it with .to_dense()"
    if not param.is_floating_point():
        return f"its dtype is {param.dtype} (quantised)", "prune before quantising"
    if trainable and param.dtype not in TRAINABLE_DTYPES:
        return f"its dtype is {param.dtype}, in which nothing can be trained", "train in bfloat16 or wider"
    if trainable and not param.requires_grad:
        return "it is frozen (requires_grad=False)", "unfreeze it"
    if held is not None and id(param) not in held:
        return "the inner optimizer does not hold it", "pass it to the inner optimizer"
    if param.shape[dim] % pattern.group:
        return (
            f"its width {param.shape[dim]} along dim {dim} is no multiple of {pattern.group}",
            "choose another pattern",
        )
    return None


def _refuse_flattened(candidate: _Candidate) -> None:
    """Refuse parameters that no longer have the weight's shape: groups cannot be found in them."""
    param, owner = candidate.param, candidate.owners[0]
    if hasattr(param, "ds_id"):
        raise ValueError(
            f"weight {candidate.name!r} is a DeepSpeed ZeRO-3 partition of shape {tuple(param.shape)}: its groups are "
            "torn apart. Shard with FSDP2 (torch.distributed.fsdp.fully_shard) instead"
        )
    flattened = type(param).__name__ == "FlatParameter" or (
        isinstance(owner, nn.Linear)
        and candidate.name.endswith("weight")
        and param.ndim == 1
        and param.is_floating_point()
    )
    if flattened:
        raise ValueError(
            f"weight {candidate.name!r} is a flattened parameter of shape {tuple(param.shape)}, as FSDP1 makes them: "
            "its groups are torn apart. Shard with FSDP2 (torch.distributed.fsdp.fully_shard; in Accelerate, "
            "fsdp_version: 2) instead"
        )
