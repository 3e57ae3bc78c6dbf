"""Select the weights to prune, with pattern and dimension, and note why the others stay dense."""

from __future__ import annotations

import itertools
import math
import re
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, Union

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from .grouping import grouped, such_as
from .memory import is_plain, takes_zeros
from .pattern import Pattern
from .table import format_table

__all__ = [
    "TRAINABLE_DTYPES",
    "Ineligible",
    "Select",
    "SelectedWeight",
    "Selection",
    "SkippedWeight",
    "block_prefixes",
    "clean_name",
    "is_conv1d",
    "is_embedding",
    "named_tensors",
    "select_weights",
    "with_late_weights",
]

# Evaluated at run time, where ``|`` between a type and a Callable needs a newer Python than 3.10.
Rule = Union[Pattern, str, None]  # noqa: UP007
Select = Union[Mapping[str, Rule], Callable[[str, nn.Module | None], Rule]]  # noqa: UP007
Ineligible = Literal["error", "skip"]

# Components that wrappers put into parameter names.
_WRAPPERS = {"_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
_HEADS = re.compile(r"(classification_|lm_)?head|heads|classifier|cls|pooler|qa_outputs|score|summary")
_ROUTERS = {"gate", "router", "shared_expert_gate"}
# Names of the modules themselves: an encoder below "image_embed" is none.
_EMBEDDINGS = re.compile(r"embed|(^|_)embs?$|^codebook$|^wte$|^wpe$|^shared$|relative_attention_bias")
# A member of a list of blocks: "3", or as torchvision calls it "encoder_layer_3".
_MEMBER = re.compile(r"(?P<stem>.*_)?\d+")
# The tensors that stand for a weight which torch's utilities took apart.
_PARAMETRIZED = re.compile(r"(?P<module>.*\.)?parametrizations\.(?P<attribute>\w+)\.original\d*")
_SPLIT = re.compile(r"(?P<module>.*\.)?(?P<attribute>\w+)_(?:orig|g|v)")
_ADAPTER = re.compile(r"(^|\.)(modules_to_save|(lora|ia3)_\w+)(\.|$)")
_ADAPTED = re.compile(r"(^|\.)base_layer\.")
# Where only names are at hand, these are transformers' Conv1D in GPT-2 and its kin, stored as (input, output), or a
# Linear in other families.
_CONV1D_NAMES = {"c_attn", "c_fc", "c_proj", "q_attn"}
# By the module of torch.nn.utils that took the weight apart.
_REMEDIES = {
    "prune": 'torch.nn.utils.prune.remove(module, "{}")',
    "weight_norm": 'torch.nn.utils.remove_weight_norm(module, "{}")',
    "spectral_norm": 'torch.nn.utils.remove_spectral_norm(module, "{}")',
}

TRAINABLE_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@dataclass(frozen=True)
class SelectedWeight:
    """A prunable weight.

    Args:
        name: in the model.
        shape: global, where the weight is sharded.
        pattern: the NxM pattern.
        dim: the grouped dimension, counted from the front.
        aliases: further names of the same tensor.
        note: what is special about its pruning, for the printout.
    """

    name: str
    shape: tuple[int, ...]
    pattern: Pattern
    dim: int
    aliases: tuple[str, ...] = ()
    note: str = field(default="", compare=False)

    def name_in(self, names: Container[str]) -> str | None:
        """Return the first of its names that is among these; None if none is."""
        return next((name for name in (self.name, *self.aliases) if name in names), None)


@dataclass(frozen=True)
class SkippedWeight:
    """A parameter that stays dense.

    Args:
        name: in the model.
        shape: of the parameter.
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
            if weight.name_in((name,)):
                return weight
        raise KeyError(f"{name!r} is not a prunable weight; these are: {', '.join(w.name for w in self.weights)}")

    def with_skipped(self, *weights: SkippedWeight) -> Selection:
        """Return a selection where these stay dense besides; each replaces the entry of its name."""
        new = {weight.name for weight in weights}
        return Selection(self.weights, (*(s for s in self.skipped if s.name not in new), *weights))

    def __str__(self) -> str:
        rows = [(w.name, "x".join(map(str, w.shape)), str(w.pattern), str(w.dim)) for w in self.weights]
        total = sum(math.prod(w.shape) for w in self.weights)
        rest = sum(math.prod(w.shape) for w in self.skipped)
        lines = [
            f"{len(self.weights)} prunable weights, {total:,} of {total + rest:,} parameters",
            format_table(("weight", "shape", "pattern", "dim"), rows),
        ]
        notes = grouped((w for w in self.weights if w.note), lambda w: w.note)
        lines += [f"{noted[0].note}: {len(noted)} weights ({such_as([w.name for w in noted])})" for noted in notes]
        if self.skipped:
            lines.append(f"left dense: {len(self.skipped)} parameters")
            table = [
                (group[0].reason, len(group), sum(math.prod(w.shape) for w in group), such_as([w.name for w in group]))
                for group in grouped(self.skipped, lambda w: w.reason)
            ]
            lines.append(format_table(("reason", "tensors", "parameters", "such as"), table))
        return "\n".join(lines)


@dataclass(frozen=True)
class _Holder:
    """Describe a weight that is no parameter itself, and is computed from others in every pass."""

    weight: str
    owner: nn.Module | None
    what: str
    remedy: str


@dataclass(frozen=True)
class _Place:
    """A name of a parameter, the module that has it, and the weight that it holds for that module, if it is none."""

    name: str
    param: Tensor
    owner: nn.Module | None = None
    holder: _Holder | None = None

    @property
    def title(self) -> str:
        """The name of the weight, be it a parameter or not."""
        return self.name if self.holder is None else self.holder.weight


class _Candidate:
    """A distinct parameter with every place where it stands in the model."""

    def __init__(self, places: Sequence[_Place], blocks: Collection[str], is_part: bool) -> None:
        first = places[0]
        self.places = places
        self.blocks = sorted(blocks, key=len)  # prefixes of those that any of its names is in, the outermost first
        self.is_part = is_part  # a scale or the like of a weight, for which another parameter stands
        self.names = tuple(place.name for place in places)
        self.param, self.name, self.title, self.holder = first.param, first.name, first.title, first.holder
        self.owner = first.owner if first.holder is None else first.holder.owner

    def matches(self, expression: re.Pattern[str]) -> bool:
        """Whether a rule's expression matches one of its names."""
        return any(expression.fullmatch(name) for name in (*self.names, self.title))


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
    adapters: Ineligible = "error",
) -> tuple[Selection, dict[str, Tensor]]:
    """Choose the prunable weights of a model.

    By default these are the weights of ``nn.Linear`` and of transformers' ``Conv1D`` in the repeated blocks, without
    embeddings, weights tied to them, heads and routers. Where only names and tensors are given, 2-D tensors in
    numbered blocks count as such, and embeddings are told by their modules' names.

    Args:
        model: a module, or pairs of name and tensor.
        pattern: of the default rules.
        select: replaces the default rules: regular expression (of the whole name, first match wins) -> Pattern, its
            spelling, or None to leave dense; or a callable ``(name, module)`` that returns one of these.
        dims: regular expression -> grouped dimension, where it is not that of the module's input.
        ineligible: ``"error"``, or ``"skip"`` to leave dense what the rules ask for and cannot be pruned (frozen, not
            held by the optimizer, parametrized, of a width that is no multiple of the group, not floating point, of a
            class that takes no zeros) and say so in the selection.
        trainable: False accepts frozen weights.
        held: ids of the optimizer's parameters; None accepts all.
        adapters: ``"error"``, or ``"skip"`` to leave adapters of PEFT out of the default rules.

    Returns:
        The selection, and the tensor of each prunable weight by name.

    Raises:
        TypeError, ValueError: no names, nothing to prune, an ineligible weight, a wrong or unused rule, a flattened
            parameter, two tensors of one name, adapters of PEFT.
    """
    if ineligible not in ("error", "skip"):
        raise ValueError(f'ineligible={ineligible!r} must be "error" or "skip"')
    candidates = _candidates(model)
    if adapters == "error" and (trainable or select is None):
        _refuse_adapters(model, candidates, trainable)
    left_out = _adapters(model, candidates) if adapters == "skip" and select is None else set()
    rule_of = _rules(pattern, select, candidates)
    dim_rules = [(_compile("dims", expression, candidates), dim) for expression, dim in (dims or {}).items()]
    weights: list[SelectedWeight] = []
    skipped: list[SkippedWeight] = []
    params: dict[str, Tensor] = {}
    for candidate in candidates:
        shape = tuple(candidate.param.shape)
        _refuse_flattened(candidate)
        rule, reason = (None, "part of a parametrization") if candidate.is_part else rule_of(candidate)
        if id(candidate.param) in left_out:
            rule, reason = None, "adapter of PEFT"
        if rule is None or len(shape) < 2:
            skipped.append(SkippedWeight(candidate.name, shape, reason if rule is None else "not a matrix"))
            continue
        dim = _grouped_dim(candidate, candidates, dim_rules)
        problem = _ineligible(candidate, rule, dim, trainable, held)
        if problem is not None:
            if ineligible == "error":
                raise ValueError(
                    f"weight {candidate.title!r} of shape {shape} cannot be pruned to {rule}: {problem[0]}; "
                    f'{problem[1]}, or leave it dense by a select rule, or all such weights with ineligible="skip"'
                )
            skipped.append(SkippedWeight(candidate.name, shape, problem[0], wanted=True))
            continue
        weights.append(SelectedWeight(candidate.name, shape, rule, dim, candidate.names[1:]))
        params[candidate.name] = candidate.param
    if not weights:
        reasons = sorted({s.reason for s in skipped}) or ["the model has no parameters"]
        raise ValueError(
            f"no prunable weight among {len(skipped)} parameters ({'; '.join(reasons)}); name the weights to prune, "
            "for instance select={r'.*\\.weight': '2:4'}"
        )
    return Selection(tuple(weights), tuple(skipped)), params


def with_late_weights(selection: Selection, model: Source, added: Collection[Tensor]) -> Selection:
    """Return the selection, where added parameters that the default rules ask for are skipped, as wanted."""
    ids = {id(t) for t in added}
    chosen = {name for weight in selection for name in (weight.name, *weight.aliases)}
    late = [
        SkippedWeight(c.name, tuple(c.param.shape), "added to the optimizer after construction", wanted=True)
        for c in _candidates(model)
        if id(c.param) in ids and chosen.isdisjoint(c.names) and not c.is_part and _default_reason(c) is None
    ]
    return selection.with_skipped(*late)


def named_tensors(model: Source) -> dict[str, Tensor]:
    """Return the parameters of a model by the names that a :class:`Selection` gives them, tied ones by each name."""
    return {name: candidate.param for candidate in _candidates(model) for name in candidate.names}


def _candidates(model: Source) -> list[_Candidate]:
    if isinstance(model, nn.Module):
        model = unwrap_model(model)
        places, blocks = _places_in(model), block_prefixes(model)
    else:
        places = _places_by_name(model)
        blocks = _blocks_by_name([place.title for place in places])
    # Of all that hold one weight the largest stands for it.
    holders = grouped((place for place in places if place.holder is not None), lambda place: place.title)
    largest = {id(max(group, key=lambda place: place.param.numel()).param) for group in holders}
    found = []
    for same in grouped(places, lambda place: id(place.param)):
        within = {prefix for prefix in blocks if any(place.name.startswith(prefix) for place in same)}
        is_part = same[0].holder is not None and id(same[0].param) not in largest
        found.append(_Candidate(same, within, is_part))
    return found


def _places_by_name(model: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]]) -> list[_Place]:
    try:
        pairs = list(model.items() if isinstance(model, Mapping) else model)
    except TypeError:
        raise TypeError(
            f"model is a {type(model).__name__}; a torch.nn.Module or named_parameters() is needed"
        ) from None
    for pair in pairs:
        if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str) and torch.is_tensor(pair[1])):
            raise TypeError(
                f"model yields {type(pair).__name__}, not pairs of name and tensor; "
                "pass the module itself or model.named_parameters()"
            )
    # DistributedDataParallel puts the whole model under one name.
    wrapped = all(clean_name(name).startswith("module.") for name, _ in pairs)
    tensors: dict[str, Tensor] = {}
    for name, tensor in pairs:
        name = clean_name(name).removeprefix("module." if wrapped else "")
        if tensors.setdefault(name, tensor) is not tensor:
            raise ValueError(f"model yields two different tensors called {name!r}; give each its own name")
    return [_Place(name, tensor, None, _holder_by_name(name, tensors)) for name, tensor in tensors.items()]


def unwrap_model(model: nn.Module) -> nn.Module:
    """Return the model inside DistributedDataParallel, DataParallel, Fabric and torch.compile, in any order."""
    while True:
        if isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel)):
            model = model.module
        else:
            inside = model._modules.get("_orig_mod", model._modules.get("_forward_module"))
            if inside is None:
                return model
            model = inside


def _places_in(model: nn.Module) -> list[_Place]:
    modules = dict(model.named_modules(remove_duplicate=False))
    return [
        _Place(clean_name(_join(prefix, name)), param, module, _holder(prefix, module, name, modules))
        for prefix, module in modules.items()
        for name, param in module._parameters.items()
        if param is not None
    ]


def _join(prefix: str, name: str) -> str:
    return f"{prefix}.{name}" if prefix else name


def _holder(prefix: str, module: nn.Module, local_name: str, modules: Mapping[str, nn.Module]) -> _Holder | None:
    """Return how a module's parameter holds a weight; None if it is one itself."""
    if isinstance(module, ParametrizationList):
        above, _, attribute = prefix.rpartition(".")
        owner_name = above.removesuffix("parametrizations").removesuffix(".")
        if owner_name == above:
            return None  # not where torch puts it
        what = f"parametrization {type(module[0]).__name__.lstrip('_')}" if len(module) else "parametrization"
        remedy = f'torch.nn.utils.parametrize.remove_parametrizations(module, "{attribute}")'
        owner = modules[owner_name]
    else:
        split = _SPLIT.fullmatch(local_name)
        if split is None or not torch.is_tensor(vars(module).get(split["attribute"])):
            return None
        owner_name, owner, attribute = prefix, module, split["attribute"]
        kinds = {type(hook).__module__.rpartition(".")[2] for hook in module._forward_pre_hooks.values()}
        what, remedy = "a hook of its module", "what made it"
        for kind in kinds & _REMEDIES.keys():
            what, remedy = f"torch.nn.utils.{kind}", _REMEDIES[kind].format(attribute)
    return _Holder(clean_name(_join(owner_name, attribute)), owner, what, remedy)


def _holder_by_name(name: str, tensors: Mapping[str, Tensor]) -> _Holder | None:
    """Return how a tensor holds a weight, told by what torch's utilities call such tensors."""
    match = _PARAMETRIZED.fullmatch(name) or _SPLIT.fullmatch(name)
    weight = None if match is None else (match["module"] or "") + match["attribute"]
    if weight is None or weight in tensors or _leaf(weight) != "weight":
        return None
    return _Holder(weight, None, "parametrization", "torch's utility of that name, and save the model again")


def block_prefixes(model: nn.Module) -> tuple[str, ...]:
    """Name prefixes of the repeated blocks: composite members of a ModuleList, or alike members of a Sequential."""
    prefixes = []
    for name, module in model.named_modules():
        # named_children() would leave out a block that stands here a second time.
        members = {key: member for key, member in module._modules.items() if member is not None}
        kinds = Counter(map(type, members.values()))
        for key, member in members.items():
            alike = isinstance(module, nn.Sequential) and kinds[type(member)] > 1
            repeated = alike or isinstance(module, nn.ModuleList)
            if repeated and any(child != "parametrizations" for child, _ in member.named_children()):
                prefixes.append(clean_name(_join(name, key)) + ".")
    return tuple(prefixes)


def clean_name(name: str) -> str:
    """Return a parameter's name without what torch.compile, FSDP and activation checkpointing put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _blocks_by_name(names: Collection[str]) -> tuple[str, ...]:
    """Name prefixes of the repeated blocks: composite numbered members of a list, as a ModuleList has them.

    ``nn.Sequential(encoder, head)`` is none: its members share no name within, and one has blocks of its own.
    """
    lists: dict[tuple[str, str], dict[str, set[str]]] = {}
    for name in names:
        parts = name.split(".")
        for depth, part in enumerate(parts[:-1]):
            if member := _MEMBER.fullmatch(part):
                members = lists.setdefault((".".join(parts[:depth]), member["stem"] or ""), {})
                members.setdefault(".".join(parts[: depth + 1]) + ".", set()).add(".".join(parts[depth + 1 :]))
    prefixes: list[str] = []
    for (above, stem), members in sorted(lists.items(), key=lambda entry: -len(entry[0][0].split("."))):
        composite = {prefix: inside for prefix, names in members.items() if (inside := {n for n in names if "." in n})}
        uses = Counter(name for inside in composite.values() for name in inside)
        twins = Counter(map(frozenset, composite.values()))
        alike = {prefix for prefix, inside in composite.items() if any(uses[name] > 1 for name in inside)}
        wrappers = {prefix for prefix in composite if any(p.startswith(prefix) for p in prefixes)}
        for prefix, inside in composite.items():
            lone = prefix in alike or len(members) == 1
            if stem:
                is_block = prefix in alike
            elif above:
                is_block = lone or not wrappers - alike
            else:
                is_block = twins[frozenset(inside)] > 1 or (lone and prefix not in wrappers)
            if is_block:
                prefixes.append(prefix)
    return tuple(prefixes)


def _default_reason(candidate: _Candidate) -> str | None:
    """Return why the default rules leave a parameter dense; None if they prune it."""
    title, owner = candidate.title, candidate.owner
    if is_embedding(title, owner) or any(is_embedding(place.name, place.owner) for place in candidate.places[1:]):
        return "embedding" if len(candidate.names) == 1 else "tied to an embedding"
    parts = title.split(".")[:-1]
    # A part of a block may be called a head; what has blocks may be one.
    block = next((prefix for prefix in candidate.blocks if title.startswith(prefix)), None)
    above = parts if block is None else block.split(".")[:-2]
    linear = owner is None or isinstance(owner, nn.Linear) or is_conv1d(owner)
    reasons = {
        "not a matrix": candidate.param.ndim < 2,
        "head or pooler": any(_HEADS.fullmatch(part.lower()) for part in above),
        "router": not _ROUTERS.isdisjoint(part.lower() for part in parts),
        "convolution: ask for it with select": isinstance(owner, nn.modules.conv._ConvNd),
        "more than 2 dimensions: ask for it with select": candidate.param.ndim > 2,
        "outside the repeated blocks": not candidate.blocks,
        f"not a Linear weight ({type(owner).__name__}): ask for it with select": not linear,
        "not a weight": _leaf(title) != "weight",
    }
    return next((reason for reason, holds in reasons.items() if holds), None)


def _rules(
    pattern: Pattern | str, select: Select | None, candidates: list[_Candidate]
) -> Callable[[_Candidate], tuple[Pattern | None, str]]:
    """Return the default rules or the user's; each of the user's that asks for a pattern has to match something."""
    if not (select is None or isinstance(select, Mapping) or callable(select)):
        raise TypeError(f"select is a {type(select).__name__}; a mapping or a callable (name, module) is needed")
    default = Pattern.parse(pattern) if select is None else None
    rules = []
    for text, rule in select.items() if isinstance(select, Mapping) else ():
        expression = _compile("select", text, candidates, unused=rule is None)
        rules.append((expression, None if rule is None else Pattern.parse(rule)))

    def rule_of(candidate: _Candidate) -> tuple[Pattern | None, str]:
        if select is None:
            reason = _default_reason(candidate)
            return (default, "") if reason is None else (None, reason)
        if not isinstance(select, Mapping):
            given = select(candidate.title, candidate.owner)
            return None if given is None else Pattern.parse(given), "left dense by select"
        for expression, rule in rules:
            if candidate.matches(expression):
                return rule, f"left dense by select rule {expression.pattern!r}"
        return None, "no select rule matches"

    return rule_of


def _compile(kind: str, expression: str, candidates: list[_Candidate], *, unused: bool = False) -> re.Pattern[str]:
    """Compile the expression of a rule, which has to match one of the candidates unless it may be unused."""
    try:
        compiled = re.compile(expression)
    except (re.error, TypeError) as error:
        raise ValueError(f"{kind} rule {expression!r} is no regular expression: {error}") from None
    if not unused and not any(candidate.matches(compiled) for candidate in candidates):
        raise ValueError(
            f"{kind} rule {expression!r} matches no parameter; the expression must match the whole name, such as "
            f"{candidates[0].name if candidates else 'encoder.layer.0.weight'!r}"
        )
    return compiled


def is_embedding(name: str, owner: nn.Module | None) -> bool:
    """Whether a weight belongs to an embedding: by its module, or by that module's name where there is none at hand."""
    if owner is not None:
        return isinstance(owner, (nn.Embedding, nn.EmbeddingBag))
    # A member of a list has the name of the list.
    own = next((part for part in reversed(name.split(".")[:-1]) if not part.isdecimal()), "")
    return _EMBEDDINGS.search(own) is not None


def is_conv1d(owner: nn.Module | None) -> bool:
    """Whether a module is transformers' Conv1D, a linear layer with its weight stored as (input, output)."""
    return any(base.__name__ == "Conv1D" and base.__module__.startswith("transformers") for base in type(owner).__mro__)


def _grouped_dim(
    candidate: _Candidate, candidates: list[_Candidate], dim_rules: list[tuple[re.Pattern[str], int]]
) -> int:
    ndim = candidate.param.ndim
    for expression, dim in dim_rules:
        if candidate.matches(expression):
            if -ndim <= dim < ndim:
                return dim % ndim
            raise ValueError(
                f"dims rule {expression.pattern!r} gives dimension {dim} to {candidate.name!r} of shape "
                f"{tuple(candidate.param.shape)}; allowed are {-ndim} to {ndim - 1}"
            )
    found = {_input_dim(place, candidates) % ndim for place in candidate.places}
    if len(found) > 1:
        raise ValueError(
            f"tied weight {' = '.join(candidate.names)} has its inputs along different dimensions {sorted(found)}; "
            "choose one with dims={name: dim}, or leave it dense by a select rule"
        )
    return found.pop()


def _input_dim(place: _Place, candidates: list[_Candidate]) -> int:
    """The dimension of a weight along which the inputs run, as its module computes."""
    name, param, owner = place.name, place.param, place.owner
    if owner is None and param.ndim == 2:
        return 0 if _named_conv1d(name, candidates) else -1
    if is_conv1d(owner) or isinstance(owner, nn.modules.conv._ConvTransposeNd):
        return 0
    convolution = isinstance(owner, nn.modules.conv._ConvNd) or (owner is None and param.ndim > 3)
    return 1 if convolution or (param.ndim == 3 and _experts_transposed(name, owner, candidates)) else -1


def _experts_transposed(name: str, owner: nn.Module | None, candidates: list[_Candidate]) -> bool:
    """Whether transformers' fused experts are stored as (experts, input, output): GPT-OSS, Llama 4."""
    parent = name.rpartition(".")[0]
    shapes = {c.name: tuple(c.param.shape) for c in candidates if c.param.ndim == 3}
    up, down = shapes.get(f"{parent}.gate_up_proj"), shapes.get(f"{parent}.down_proj")
    if up and down:
        return up[1:] == (down[2], 2 * down[1])
    return getattr(owner, "is_transposed", False)


def _named_conv1d(name: str, candidates: list[_Candidate]) -> bool:
    """Whether a weight with a name of the GPT-2 family is a Conv1D's, as (input, output), and not a Linear's.

    A bias is as long as the output is wide; without biases the outputs of c_attn and mostly c_fc are wider than the
    inputs. Square weights go with the nearest other one.
    """
    parent = name.rpartition(".")[0]
    if _leaf(parent) not in _CONV1D_NAMES:
        return False
    shapes = {c.name: tuple(c.param.shape) for c in candidates}
    modules = {key.removesuffix(".weight"): shape for key, shape in shapes.items()}
    oblong = {m: s for m, s in modules.items() if _leaf(m) in _CONV1D_NAMES and len(s) == 2 and s[0] != s[1]}
    evidence = {m: shapes[f"{m}.bias"] == shape[1:] for m, shape in oblong.items() if f"{m}.bias" in shapes}
    for leaf in ("c_attn", "c_fc"):
        evidence = evidence or {m: rows < columns for m, (rows, columns) in oblong.items() if _leaf(m) == leaf}

    def common_parts(module: str) -> int:
        pairs = zip(module.split("."), parent.split("."), strict=False)
        return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))

    nearest = max(evidence, key=common_parts, default=None)
    return nearest is not None and evidence[nearest]


def _leaf(module_name: str) -> str:
    return module_name.rpartition(".")[2]


def _ineligible(
    candidate: _Candidate, pattern: Pattern, dim: int, trainable: bool, held: Collection[int] | None
) -> tuple[str, str] | None:
    """Return why a weight cannot be pruned and what to do about it; None if it can."""
    param = candidate.param
    if candidate.holder is not None:
        remedy = f"undo that first, with {candidate.holder.remedy}"
        return (
            f"it is no parameter: {candidate.holder.what} computes it again in every pass",
            f"{remedy}, before the inner optimizer is built" if trainable else remedy,
        )
    if param.layout != torch.strided:
        return f"its layout is {param.layout}", "convert it with .to_dense()"
    if not param.is_floating_point():
        return f"its dtype is {param.dtype} (quantised)", "prune before quantising"
    if trainable and param.dtype not in TRAINABLE_DTYPES:
        return f"its dtype is {param.dtype}, in which nothing can be trained", "train in bfloat16 or wider"
    if trainable and not param.requires_grad:
        return "it is frozen (requires_grad=False)", "unfreeze it"
    if trainable and not is_plain(param) and not param.is_meta and not takes_zeros(param):
        kind = type(param).__name__
        return f"it is a {kind}, into which zeros cannot be written", "keep this layer in a floating dtype"
    if held is not None and id(param) not in held:
        return "the inner optimizer does not hold it", "pass it to the inner optimizer"
    if param.shape[dim] % pattern.group:
        width = param.shape[dim]
        return f"its width {width} along dim {dim} is no multiple of {pattern.group}", "choose another pattern"
    return None


def _refuse_adapters(model: Source, candidates: list[_Candidate], trainable: bool) -> None:
    """Refuse a model with adapters of PEFT: zeros in them, or in the weights below, are gone once they are merged."""
    found, remedy = None, "Merge first: model = model.merge_and_unload()"
    if isinstance(model, nn.Module):
        for name, module in unwrap_model(model).named_modules():
            if any(base.__module__.partition(".")[0] == "peft" for base in type(module).__mro__):
                place = f"model.{name}" if name else "model"
                found = f"{place} is a {type(module).__name__}"
                if callable(getattr(module, "merge_and_unload", None)):
                    remedy = f"Merge first: {place} = {place}.merge_and_unload()"
                elif hasattr(module, "get_base_model"):
                    remedy = "This kind cannot be merged: load the model without it"
                else:
                    remedy = (
                        "Merge first: model.save_pretrained(folder), load the model without the adapter as base, then "
                        "model = peft.PeftModel.from_pretrained(base, folder).merge_and_unload()"
                    )
                break
    else:
        name = next((c.name for c in candidates if _ADAPTER.search(c.name) or _ADAPTED.search(c.name)), None)
        found = None if name is None else f"it has {name!r}"
    if found is not None:
        unfreeze = (
            "; then for p in model.parameters(): p.requires_grad_(True); and build the inner optimizer after that"
        )
        raise ValueError(
            f"the model has PEFT adapters ({found}), and zeros in an adapter or in the weight below it are gone when "
            f"the two are merged. {remedy}{unfreeze if trainable else ''}"
        )


def _adapters(model: Source, candidates: list[_Candidate]) -> set[int]:
    """Return the ids of the parameters of PEFT's adapters; the weights below them are none."""
    found = {id(candidate.param) for candidate in candidates if _ADAPTER.search(candidate.name)}
    for module in unwrap_model(model).modules() if isinstance(model, nn.Module) else ():
        if any(base.__name__ == "BaseTunerLayer" for base in type(module).__mro__):
            found |= {id(p) for name, p in module.named_parameters() if not name.startswith("base_layer.")}
    return found


def _refuse_flattened(candidate: _Candidate) -> None:
    """Refuse parameters that no longer have the weight's shape: groups cannot be found in them."""
    param, owner = candidate.param, candidate.places[0].owner
    is_flat = isinstance(owner, nn.Linear) and candidate.name.endswith("weight") and param.ndim == 1
    if hasattr(param, "ds_id"):
        kind = "a DeepSpeed ZeRO-3 partition"
    elif type(param).__name__ == "FlatParameter" or (is_flat and param.is_floating_point()):
        kind = "a flattened parameter"
    else:
        return
    raise ValueError(
        f"weight {candidate.name!r} is {kind} of shape {tuple(param.shape)}: its groups are torn apart. Shard with "
        "FSDP2 (torch.distributed.fsdp.fully_shard; in Accelerate, fsdp_version: 2), not with FSDP1 or ZeRO-3"
    )
