"""Which weights are pruned and along which dimension, on real architectures with tiny random configurations."""

from __future__ import annotations

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.utils import prune
from transformers.pytorch_utils import Conv1D

from admm_nxm import ADMMNxM, Pattern, SelectedWeight, Selection, SkippedWeight, verify
from admm_nxm.memory import plain, takes_zeros
from admm_nxm.selection import named_tensors, select_weights, with_late_weights
from tests.helpers import Block, Net, make_net

_COMMON = {
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 32,
    "vocab_size": 40,
    "max_position_embeddings": 16,
}
_GROUPED_QUERY = {**_COMMON, "num_key_value_heads": 1}
_GPT2 = {
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 2,
    "vocab_size": 40,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
ARCHITECTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert classifier": ("BertForSequenceClassification", _COMMON),
    "bert masked lm": ("BertForMaskedLM", _COMMON),
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "gpt2 cross-attention": ("GPT2LMHeadModel", {**_GPT2, "add_cross_attention": True}),
    "gpt bigcode": ("GPTBigCodeForCausalLM", _GPT2),
    "gpt neo, narrow mlp": (
        "GPTNeoForCausalLM",
        {
            "hidden_size": 16,
            "num_layers": 2,
            "num_heads": 2,
            "intermediate_size": 8,
            "vocab_size": 40,
            "max_position_embeddings": 16,
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": 0,
            "eos_token_id": 0,
        },
    ),
    "llama": ("LlamaForCausalLM", _GROUPED_QUERY),
    "t5": (
        "T5ForConditionalGeneration",
        {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 40},
    ),
    "mixtral": ("MixtralForCausalLM", {**_GROUPED_QUERY, "num_local_experts": 4}),
    "qwen2 moe": (
        "Qwen2MoeForCausalLM",
        {
            **_GROUPED_QUERY,
            "num_experts": 4,
            "moe_intermediate_size": 8,
            "shared_expert_intermediate_size": 24,
            "decoder_sparse_step": 1,
        },
    ),
    "gpt-oss": ("GptOssForCausalLM", {**_GROUPED_QUERY, "num_local_experts": 4, "head_dim": 8}),
    "llama4": (
        "Llama4ForCausalLM",
        {**_GROUPED_QUERY, "num_local_experts": 4, "head_dim": 8, "intermediate_size_mlp": 32, "pad_token_id": 0},
    ),
}


def tiny(architecture: str, **options: object) -> nn.Module:
    """A small random model of a real architecture."""
    class_name, config = ARCHITECTURES[architecture]
    cls = getattr(transformers, class_name, None)
    if cls is None:
        pytest.skip(f"transformers {transformers.__version__} has no {class_name}")
    return cls(cls.config_class(**{**config, **options}))


def dims_of(selection: Selection) -> dict[str, int]:
    return {weight.name: weight.dim for weight in selection}


def reasons_of(selection: Selection) -> dict[str, str]:
    return {skipped.name: skipped.reason for skipped in selection.skipped}


def chosen(model: Any, *args: Any, **options: Any) -> Selection:
    return select_weights(model, *args, **options)[0]


# ---------------------------------------------------------------- the default rules

PRUNED = {
    "bert classifier": (r"bert\.encoder\.layer\.\d\.(.+\.(query|key|value)|.*(output|intermediate)\.dense)\.weight", 1),
    "bert masked lm": (r"bert\.encoder\.layer\.\d\.(.+\.(query|key|value)|.*(output|intermediate)\.dense)\.weight", 1),
    "gpt2": (r"transformer\.h\.\d\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight", 0),
    "gpt2 cross-attention": (
        r"transformer\.h\.\d\.((attn|crossattention)\.(c_attn|c_proj|q_attn)|mlp\.(c_fc|c_proj))\.weight",
        0,
    ),
    "gpt bigcode": (r"transformer\.h\.\d\.(attn\.(c_attn|c_proj)|mlp\.(c_fc|c_proj))\.weight", 1),
    "gpt neo, narrow mlp": (r"transformer\.h\.\d\.(attn\..*_proj|mlp\.(c_fc|c_proj))\.weight", 1),
    "llama": (r"model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.(gate|up|down))_proj\.weight", 1),
    "t5": (r"(en|de)coder\.block\.\d\.layer\.\d\.((Self|EncDec)Attention\.[qkvo]|DenseReluDense\.w[io])\.weight", 1),
    "mixtral": (r"model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight", 1),
    "qwen2 moe": (r"model\.layers\.\d\.(self_attn\.[qkvo]|mlp\.shared_expert\.(gate|up|down))_proj\.weight", 1),
    "gpt-oss": (r"model\.layers\.\d\.self_attn\.[qkvo]_proj\.weight", 1),
    "llama4": (r"model\.layers\.\d\.(self_attn\.[qkvo]|feed_forward\.shared_expert\.(gate|up|down))_proj\.weight", 1),
}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_the_matrices_of_the_blocks_are_pruned_along_their_inputs(architecture: str) -> None:
    model = tiny(architecture)
    expression, dim = PRUNED[architecture]
    expected = {name: dim for name, _ in model.named_parameters() if re.fullmatch(expression, name)}
    assert len(expected) >= 8
    assert dims_of(chosen(model)) == expected


@pytest.mark.parametrize(
    ("architecture", "name", "reason"),
    [
        ("bert classifier", "bert.embeddings.word_embeddings.weight", "embedding"),
        ("bert classifier", "bert.embeddings.LayerNorm.weight", "not a matrix"),
        ("bert classifier", "bert.encoder.layer.0.output.dense.bias", "not a matrix"),
        ("bert classifier", "bert.pooler.dense.weight", "head or pooler"),
        ("bert classifier", "classifier.weight", "head or pooler"),
        ("bert masked lm", "bert.embeddings.word_embeddings.weight", "tied to an embedding"),
        ("bert masked lm", "bert.embeddings.position_embeddings.weight", "embedding"),
        ("bert masked lm", "cls.predictions.transform.dense.weight", "head or pooler"),
        ("gpt2", "transformer.wte.weight", "tied to an embedding"),
        ("gpt2", "transformer.wpe.weight", "embedding"),
        ("llama", "model.embed_tokens.weight", "embedding"),
        ("llama", "lm_head.weight", "head or pooler"),
        ("t5", "shared.weight", "tied to an embedding"),
        ("t5", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias.weight", "embedding"),
        ("mixtral", "model.layers.0.mlp.gate.weight", "router"),
        ("mixtral", "model.layers.0.mlp.experts.down_proj", "more than 2 dimensions: ask for it with select"),
        ("qwen2 moe", "model.layers.1.mlp.shared_expert_gate.weight", "router"),
        ("gpt-oss", "model.layers.1.mlp.router.weight", "router"),
    ],
)
def test_what_stays_dense_says_why(architecture: str, name: str, reason: str) -> None:
    assert reasons_of(chosen(tiny(architecture)))[name] == reason


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_parameter_is_listed_once_with_its_shape(architecture: str) -> None:
    model = tiny(architecture)
    selection, params = select_weights(model)
    listed = [(entry.name, entry.shape) for entry in (*selection.weights, *selection.skipped)]
    assert sorted(listed) == sorted((name, tuple(p.shape)) for name, p in model.named_parameters())
    own = dict(model.named_parameters())
    assert list(params) == [weight.name for weight in selection]
    assert all(params[name] is own[name] for name in params)


@pytest.mark.parametrize("architecture", ["bert classifier", "llama"])
def test_an_untied_head_is_an_ordinary_head(architecture: str) -> None:
    reasons = reasons_of(chosen(tiny(architecture, tie_word_embeddings=False)))
    assert "tied to an embedding" not in reasons.values()
    assert "head or pooler" in reasons.values()


@pytest.mark.parametrize("source", ["module", "pairs"])
@pytest.mark.parametrize(
    "name",
    [
        "classification_head",
        "Classifier",
        "cls",
        "head",
        "heads",
        "lm_head",
        "pooler",
        "qa_outputs",
        "score",
        "summary",
    ],
)
def test_heads_are_known_by_their_names_even_if_they_have_blocks(name: str, source: str) -> None:
    model = nn.ModuleDict({"encoder": make_net().blocks, name: nn.ModuleList([Block(8), Block(8)])})
    selection = chosen(model if source == "module" else model.named_parameters())
    assert len(selection) == 4
    dense = [f"{name}.{i}.{part}.weight" for i in (0, 1) for part in ("up", "down")]
    assert {reasons_of(selection)[weight] for weight in dense} == {"head or pooler"}


@pytest.mark.parametrize("name", ["gate", "router", "shared_expert_gate", "Router"])
def test_routers_are_known_by_their_names_within_blocks(name: str) -> None:
    model = nn.ModuleList([nn.ModuleDict({"up": nn.Linear(8, 8), name: nn.Linear(8, 4)})])
    selection = chosen(model)
    assert dims_of(selection) == {"0.up.weight": 1}
    assert reasons_of(selection)[f"0.{name}.weight"] == "router"


def test_a_part_of_a_block_may_be_called_a_head() -> None:
    model = nn.ModuleList([nn.ModuleDict({"head": nn.Linear(8, 8)})])
    assert dims_of(chosen(model)) == {"0.head.weight": 1}


def test_an_lm_head_tied_to_the_embedding_stays_dense() -> None:
    reasons = reasons_of(chosen(tiny("llama", tie_word_embeddings=True)))
    assert reasons["model.embed_tokens.weight"] == "tied to an embedding"
    assert "lm_head.weight" not in reasons


def test_the_blocks_of_torch_transformers_are_found() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    selection = chosen(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False))
    names = ["self_attn.out_proj", "linear1", "linear2"]
    assert dims_of(selection) == {f"layers.{i}.{name}.weight": 1 for i in (0, 1) for name in names}
    reason = reasons_of(selection)["layers.0.self_attn.in_proj_weight"]
    assert reason == "not a Linear weight (MultiheadAttention): ask for it with select"


def test_alike_members_of_a_sequential_are_blocks_and_lone_ones_are_not() -> None:
    model = nn.Sequential(Net(8), nn.Sequential(Block(8), nn.ReLU(), Block(8)), nn.Linear(8, 8))
    selection = chosen(model)
    inside = [f"0.blocks.{i}.{name}.weight" for i in (0, 1) for name in ("up", "down")]
    assert [weight.name for weight in selection] == [
        *inside,
        *(f"1.{i}.{name}.weight" for i in (0, 2) for name in ("up", "down")),
    ]
    assert reasons_of(selection)["2.weight"] == "outside the repeated blocks"


@pytest.mark.parametrize("container", [lambda *layers: nn.ModuleList(layers), nn.Sequential])
def test_lone_layers_in_a_row_are_no_blocks(container: Callable[..., nn.Module]) -> None:
    model = nn.ModuleDict({"layers": container(nn.Linear(8, 8), nn.Linear(8, 8)), "net": make_net()})
    expected = [
        "net.blocks.0.up.weight",
        "net.blocks.0.down.weight",
        "net.blocks.1.up.weight",
        "net.blocks.1.down.weight",
    ]
    for source in (model, model.named_parameters()):
        selection = chosen(source)
        assert [weight.name for weight in selection] == expected
        assert reasons_of(selection)["layers.1.weight"] == "outside the repeated blocks"


def test_convolutions_in_blocks_have_to_be_asked_for() -> None:
    class ConvBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(8, 8, 3)
            self.mix = nn.Linear(8, 8, bias=False)

    selection = chosen(nn.ModuleList([ConvBlock(), ConvBlock()]))
    assert list(dims_of(selection)) == ["0.mix.weight", "1.mix.weight"]
    assert reasons_of(selection)["0.conv.weight"] == "convolution: ask for it with select"


def test_other_matrices_of_a_linear_are_no_weights() -> None:
    class Scaled(nn.Linear):
        def __init__(self) -> None:
            super().__init__(8, 8)
            self.mixing = nn.Parameter(torch.eye(8))

    class ScaledBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = Scaled()

    selection = chosen(nn.ModuleList([ScaledBlock()]))
    assert dims_of(selection) == {"0.fc.weight": 1}
    assert reasons_of(selection)["0.fc.mixing"] == "not a weight"


def test_the_pattern_may_be_spelled_either_way() -> None:
    assert {weight.pattern for weight in chosen(make_net(), "8x2")} == {Pattern(2, 8)}
    assert {weight.pattern for weight in chosen(make_net())} == {Pattern(2, 4)}


# ---------------------------------------------------------------- the grouped dimension is the module's input


def only_moves(gradient: Tensor, dim: int, index: int) -> bool:
    """Whether the gradient is non-zero at ``index`` of ``dim`` alone."""
    used = gradient.abs().movedim(dim, 0).flatten(1).sum(1).nonzero().flatten().tolist()
    return used == [index]


@pytest.mark.parametrize(
    ("module", "shape", "channels"),
    [
        (nn.Linear(8, 12), (2, 8), -1),
        (Conv1D(12, 8), (2, 8), -1),
        (nn.Conv1d(8, 12, 3), (2, 8, 5), 1),
        (nn.Conv2d(8, 12, 3), (2, 8, 5, 5), 1),
        (nn.ConvTranspose1d(8, 12, 3), (2, 8, 5), 1),
        (nn.ConvTranspose2d(8, 12, 3), (2, 8, 5, 5), 1),
    ],
    ids=lambda value: type(value).__name__ if isinstance(value, nn.Module) else "",
)
def test_groups_run_along_the_inputs_of_a_module(module: nn.Module, shape: tuple[int, ...], channels: int) -> None:
    weight = chosen(module, select={"weight": "2:4"})["weight"]
    assert weight.shape[weight.dim] == 8
    one_channel = torch.zeros(shape)
    one_channel.select(channels, 5).fill_(1.0)
    module(one_channel).sum().backward()
    assert only_moves(module.weight.grad, weight.dim, 5)


@pytest.mark.parametrize("architecture", ["mixtral", "qwen2 moe", "gpt-oss", "llama4"])
def test_fused_experts_asked_for_are_grouped_along_their_inputs(architecture: str) -> None:
    model = tiny(architecture)
    rules = {r".*\.experts\.(gate_up|down)_proj": "2:4"}
    selection = chosen(model, select=rules)
    assert len(selection) == 4
    name, experts = next((name, m) for name, m in model.named_modules() if name.endswith(".experts"))
    up, down = selection[f"{name}.gate_up_proj"], selection[f"{name}.down_proj"]

    def run(x: Tensor) -> Tensor:
        model.zero_grad()
        if architecture == "llama4":
            return experts(x)  # tokens are sorted by expert already
        return experts(x, torch.arange(8).remainder(4).unsqueeze(1), torch.ones(8, 1))

    run(nn.functional.one_hot(torch.full((8,), 5), 16).float()).sum().backward()
    assert only_moves(experts.gate_up_proj.grad, up.dim, 5)
    run(torch.randn(8, 16))[:, 5].sum().backward()
    (outputs,) = {1, 2} - {down.dim}
    assert only_moves(experts.down_proj.grad, outputs, 5)
    by_names = chosen(model.state_dict(), select=rules, trainable=False)
    assert dims_of(by_names) == dims_of(selection)


@pytest.mark.parametrize("source", ["module", "pairs"])
def test_other_weights_of_three_dimensions_are_grouped_along_the_last(source: str) -> None:
    model = nn.Bilinear(4, 8, 12)
    model = model if source == "module" else model.named_parameters()
    assert dims_of(chosen(model, select={"weight": "2:4"})) == {"weight": 2}


def test_experts_that_say_they_are_transposed_are_believed() -> None:
    class Experts(nn.Module):
        def __init__(self, is_transposed: bool) -> None:
            super().__init__()
            self.up_proj = nn.Parameter(torch.ones(2, 8, 8))
            self.down_proj = nn.Parameter(torch.ones(2, 8, 8))
            self.is_transposed = is_transposed

    for is_transposed, dim in ((True, 1), (False, 2)):
        assert dims_of(chosen(Experts(is_transposed), select={".*": "2:4"})) == {"up_proj": dim, "down_proj": dim}


# ---------------------------------------------------------------- from names and tensors alone

SOURCES: dict[str, Callable[[nn.Module], Any]] = {
    "named parameters": lambda model: model.named_parameters(),
    "list of pairs": lambda model: list(model.named_parameters()),
    "mapping": lambda model: dict(model.named_parameters()),
    "state dict": lambda model: model.state_dict(keep_vars=True),
}


@pytest.mark.parametrize("source", SOURCES)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_names_alone_give_the_same_weights_and_dimensions(architecture: str, source: str) -> None:
    model = tiny(architecture)
    selection, params = select_weights(SOURCES[source](model))
    assert dims_of(selection) == dims_of(chosen(model))
    own = dict(model.named_parameters())
    assert all(params[name] is own[name] for name in params)


class Mlp(nn.Module):
    """A feed-forward part named as in GPT-2, of Linear or of Conv1D."""

    def __init__(self, conv1d: bool, inputs: int = 16, inner: int = 64) -> None:
        super().__init__()
        self.c_fc = Conv1D(inner, inputs) if conv1d else nn.Linear(inputs, inner)
        self.c_proj = Conv1D(inputs, inner) if conv1d else nn.Linear(inner, inputs)


class Attention(nn.Module):
    def __init__(self, conv1d: bool) -> None:
        super().__init__()
        self.c_attn = Conv1D(48, 16) if conv1d else nn.Linear(16, 48)
        self.c_proj = Conv1D(16, 16) if conv1d else nn.Linear(16, 16)


class GptBlock(nn.Module):
    def __init__(self, conv1d: bool, inner: int = 64) -> None:
        super().__init__()
        self.attn = Attention(conv1d)
        self.mlp = Mlp(conv1d, inner=inner)


def matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, p) for name, p in model.named_parameters() if p.ndim == 2]


@pytest.mark.parametrize("inner", [64, 16, 8])
@pytest.mark.parametrize("only_matrices", [False, True])
@pytest.mark.parametrize("conv1d", [False, True])
def test_shapes_tell_conv1d_from_linear(conv1d: bool, only_matrices: bool, inner: int) -> None:
    model = nn.ModuleList(GptBlock(conv1d, inner) for _ in range(2))
    expected = dims_of(chosen(model))
    assert set(expected.values()) == {0 if conv1d else 1}
    assert dims_of(chosen(matrices(model) if only_matrices else model.named_parameters())) == expected


@pytest.mark.parametrize("conv1d", [False, True])
def test_a_lone_feed_forward_part_tells_by_its_widening(conv1d: bool) -> None:
    blocks = nn.ModuleList([GptBlock(conv1d)])
    pairs = [(name, p) for name, p in matrices(blocks) if ".mlp." in name]
    assert set(dims_of(chosen(pairs)).values()) == {0 if conv1d else 1}


def test_two_families_in_one_model_are_told_apart() -> None:
    class Captioner(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.vision = nn.ModuleList(GptBlock(conv1d=False) for _ in range(2))
            self.text = nn.ModuleList(GptBlock(conv1d=True) for _ in range(2))

    dims = dims_of(chosen(Captioner().named_parameters()))
    assert len(dims) == 16
    assert dims == {name: 0 if name.startswith("text") else 1 for name in dims}


def test_other_linears_beside_conv1d_stay_linears() -> None:
    model = nn.ModuleList([GptBlock(conv1d=True)])
    model[0].adapter = nn.Linear(16, 32)
    assert chosen(model.named_parameters())["0.adapter.weight"].dim == 1


def test_without_evidence_a_weight_is_taken_for_a_linear() -> None:
    assert chosen({"h.0.attn.c_proj.weight": torch.ones(16, 16)}, trainable=False)["h.0.attn.c_proj.weight"].dim == 1


def test_by_name_a_convolution_is_grouped_along_its_input_channels() -> None:
    model = nn.Conv2d(8, 12, 4)
    assert chosen(model.named_parameters(), select={"weight": "2:4"})["weight"].dim == 1


def test_by_name_only_weights_are_pruned() -> None:
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True)
    model = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
    selection = chosen(model.named_parameters())
    assert dims_of(selection) == dims_of(chosen(model))
    assert reasons_of(selection)["layers.0.self_attn.in_proj_weight"] == "not a weight"


@pytest.mark.parametrize(
    ("model", "named"),
    [
        (None, "model is a NoneType"),
        (3, "model is a int"),
        ("bert-base-uncased", "model yields str, not pairs of name and tensor"),
        (list(nn.Linear(4, 4).parameters()), "model yields Parameter"),
        ([("weight", 1.0)], "model yields tuple"),
        ({"weight": [1.0]}, "model yields tuple"),
        ({0: torch.ones(4, 4)}, "model yields tuple"),
        ([("a", torch.ones(4), 1)], "model yields tuple"),
    ],
)
def test_a_model_without_names_is_refused(model: object, named: str) -> None:
    with pytest.raises(TypeError, match=named + r".*named_parameters\(\)"):
        select_weights(model)  # type: ignore[arg-type]


def test_two_tensors_of_one_name_are_refused() -> None:
    pairs = [("layers.0.fc.weight", torch.ones(4, 4)), ("layers.0.fc.weight", torch.ones(4, 4))]
    with pytest.raises(ValueError, match=r"two different tensors called 'layers.0.fc.weight'"):
        select_weights(pairs, trainable=False)


def test_a_pair_given_twice_counts_once() -> None:
    pair = ("layers.0.fc.weight", torch.ones(4, 4))
    selection = chosen([pair, pair], trainable=False)
    assert selection.weights == (SelectedWeight(pair[0], (4, 4), Pattern(2, 4), 1),)


# ---------------------------------------------------------------- select rules


def test_rules_replace_the_defaults() -> None:
    selection = chosen(make_net(), select={r"head\.weight": "2:4"})
    assert dims_of(selection) == {"head.weight": 1}
    assert reasons_of(selection)["blocks.0.up.weight"] == "no select rule matches"


def test_the_first_rule_that_matches_wins() -> None:
    rules = {r"blocks\.0\..*": None, r".*\.up\.weight": "1:4", r"blocks\..*\.weight": Pattern(2, 8)}
    selection = chosen(make_net(), select=rules)
    assert {weight.name: str(weight.pattern) for weight in selection} == {
        "blocks.1.up.weight": "1:4",
        "blocks.1.down.weight": "2:8",
    }
    assert reasons_of(selection)["blocks.0.up.weight"] == r"left dense by select rule 'blocks\\.0\\..*'"


@pytest.mark.parametrize("expression", [r"up\.weight", r"blocks\.0\.up", r"blocks\.0\.up\.weigh", "UP"])
def test_a_rule_has_to_match_the_whole_name(expression: str) -> None:
    with pytest.raises(ValueError, match=r"matches no parameter; .* the whole name, such as 'blocks.0.up.weight'") as e:
        select_weights(make_net(), select={r"blocks\..*\.weight": "2:4", expression: "2:4"})
    assert repr(expression) in str(e.value)


def test_a_rule_that_leaves_dense_may_match_nothing() -> None:
    selection = chosen(make_net(), select={"vision.*": None, r"blocks\..*": "2:4"})
    assert len(selection) == 4


def test_vectors_that_a_rule_matches_stay_dense() -> None:
    selection = chosen(make_net(), select={r"blocks\..*": "2:4"})
    assert len(selection) == 4
    assert reasons_of(selection)["blocks.0.up.bias"] == "not a matrix"


@pytest.mark.parametrize("kind", ["select", "dims"])
@pytest.mark.parametrize("expression", ["(", "*weight", 3])
def test_what_is_no_regular_expression_is_refused(kind: str, expression: object) -> None:
    with pytest.raises(ValueError, match=rf"{kind} rule {re.escape(repr(expression))} is no regular expression"):
        select_weights(make_net(), **{kind: {expression: 1 if kind == "dims" else "2:4"}})


@pytest.mark.parametrize(("rule", "error"), [("4:2", ValueError), (2, TypeError), (True, TypeError)])
def test_a_rule_that_is_no_pattern_is_refused_even_behind_another(rule: object, error: type[Exception]) -> None:
    with pytest.raises(error, match="pattern"):
        select_weights(make_net(), select={".*": "2:4", r"head\.weight": rule})  # type: ignore[dict-item]


def test_a_function_sees_each_name_and_its_module() -> None:
    net = make_net()
    seen: dict[str, nn.Module | None] = {}

    def select(name: str, module: nn.Module | None) -> Pattern | str | None:
        seen[name] = module
        if not isinstance(module, nn.Linear) or name.endswith("bias"):
            return None
        return "1:4" if name.endswith("down.weight") else Pattern(2, 4)

    selection = chosen(net, select=select)
    assert seen["blocks.1.up.weight"] is net.blocks[1].up
    assert seen.keys() == dict(net.named_parameters()).keys()
    assert {weight.name: str(weight.pattern) for weight in selection} == {
        **{f"blocks.{i}.up.weight": "2:4" for i in (0, 1)},
        **{f"blocks.{i}.down.weight": "1:4" for i in (0, 1)},
        "head.weight": "2:4",
    }
    assert reasons_of(selection)["head.bias"] == "left dense by select"


def test_a_function_sees_no_module_where_there_is_none() -> None:
    seen = []
    select_weights(make_net().named_parameters(), select=lambda name, module: seen.append(module) or "2:4")
    assert set(seen) == {None}


@pytest.mark.parametrize("select", ["2:4", 3, [r".*\.weight"], (".*", "2:4")])
def test_select_of_another_kind_is_refused(select: object) -> None:
    with pytest.raises(TypeError, match=r"select is a \w+; a mapping or a callable \(name, module\) is needed"):
        select_weights(make_net(), select=select)  # type: ignore[arg-type]


def test_a_function_that_returns_no_pattern_is_refused() -> None:
    with pytest.raises(TypeError, match="pattern is True"):
        select_weights(make_net(), select=lambda name, module: True)  # type: ignore[arg-type, return-value]


# ---------------------------------------------------------------- dims


@pytest.mark.parametrize(("dim", "counted"), [(0, 0), (-2, 0), (1, 1), (-1, 1)])
def test_dims_overrule_the_module(dim: int, counted: int) -> None:
    selection = chosen(make_net(), dims={r".*\.up\.weight": dim})
    assert [weight.dim for weight in selection] == [counted, 1, counted, 1]


@pytest.mark.parametrize("dim", [2, -3])
def test_dims_out_of_range_are_refused_by_name(dim: int) -> None:
    with pytest.raises(
        ValueError, match=rf"dimension {dim} to 'blocks.0.up.weight' of shape \(16, 8\); allowed are -2 to 1"
    ):
        select_weights(make_net(), dims={r".*\.up\.weight": dim})


def test_a_dims_rule_that_matches_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"dims rule 'up' matches no parameter; .* such as 'blocks.0.up.weight'"):
        select_weights(make_net(), dims={"up": 0})


# ---------------------------------------------------------------- what cannot be pruned


def replaced(weight: Tensor, requires_grad: bool = False) -> Net:
    net = make_net()
    net.blocks[0].up.weight = nn.Parameter(weight, requires_grad=requires_grad)
    return net


def frozen() -> Net:
    net = make_net()
    net.blocks[0].up.weight.requires_grad_(False)
    return net


CANNOT: dict[str, tuple[Callable[[], Net], str, str]] = {
    "frozen": (frozen, "it is frozen (requires_grad=False)", "unfreeze it"),
    "width": (
        lambda: replaced(torch.ones(16, 6), requires_grad=True),
        "its width 6 along dim 1 is no multiple of 4",
        "choose another pattern",
    ),
    "eight bits": (
        lambda: replaced(torch.ones(16, 8).to(torch.float8_e4m3fn), requires_grad=True),
        "its dtype is torch.float8_e4m3fn, in which nothing can be trained",
        "train in bfloat16 or wider",
    ),
    "integers": (
        lambda: replaced(torch.ones(16, 8, dtype=torch.int8)),
        "its dtype is torch.int8 (quantised)",
        "prune before quantising",
    ),
    "sparse": (
        lambda: replaced(torch.ones(16, 8).to_sparse(), requires_grad=True),
        "its layout is torch.sparse_coo",
        "convert it with .to_dense()",
    ),
}


@pytest.mark.parametrize("problem", CANNOT)
def test_a_weight_that_cannot_be_pruned_is_an_error_with_name_shape_and_remedy(problem: str) -> None:
    make, reason, remedy = CANNOT[problem]
    net = make()
    shape = tuple(net.blocks[0].up.weight.shape)
    with pytest.raises(ValueError, match=re.escape(reason)) as caught:
        select_weights(net)
    message = str(caught.value)
    assert message.startswith(
        f"weight 'blocks.0.up.weight' of shape {shape} cannot be pruned to 2:4: {reason}; {remedy}"
    )
    assert 'ineligible="skip"' in message


@pytest.mark.parametrize("problem", CANNOT)
def test_a_weight_that_cannot_be_pruned_may_be_skipped_and_is_listed(problem: str) -> None:
    make, reason, _ = CANNOT[problem]
    selection = chosen(make(), ineligible="skip")
    assert [weight.name for weight in selection] == [
        "blocks.0.down.weight",
        "blocks.1.up.weight",
        "blocks.1.down.weight",
    ]
    assert [(s.name, s.reason) for s in selection.skipped if s.wanted] == [("blocks.0.up.weight", reason)]


@pytest.mark.parametrize("problem", CANNOT)
def test_a_weight_left_dense_on_purpose_may_be_anything(problem: str) -> None:
    selection = chosen(CANNOT[problem][0](), select={r"blocks\.0\.up\..*": None, r"blocks\..*": "2:4"})
    assert len(selection) == 3
    assert not any(skipped.wanted for skipped in selection.skipped)


def test_a_weight_that_the_optimizer_does_not_hold_is_refused_or_skipped() -> None:
    net = make_net()
    held = {id(p) for name, p in net.named_parameters() if name != "blocks.1.down.weight"}
    with pytest.raises(ValueError, match=r"'blocks.1.down.weight' .*the inner optimizer does not hold it; pass it to"):
        select_weights(net, held=held)
    selection = chosen(net, held=held, ineligible="skip")
    assert [(s.name, s.reason) for s in selection.skipped if s.wanted] == [
        ("blocks.1.down.weight", "the inner optimizer does not hold it")
    ]
    assert len(chosen(net, held={id(p) for p in net.parameters()})) == 4


@pytest.mark.parametrize("problem", ["frozen", "eight bits"])
def test_what_cannot_be_trained_counts_where_nothing_is(problem: str) -> None:
    assert len(chosen(CANNOT[problem][0](), trainable=False)) == 4


def test_the_width_is_that_of_the_grouped_dimension() -> None:
    net = make_net()
    net.blocks[0].up = nn.Linear(6, 8)
    assert chosen(net, dims={r"blocks\.0\.up\.weight": 0})["blocks.0.up.weight"].dim == 0


@pytest.mark.parametrize("ineligible", ["ignore", None, True])
def test_ineligible_is_error_or_skip(ineligible: object) -> None:
    with pytest.raises(ValueError, match='must be "error" or "skip"'):
        select_weights(make_net(), ineligible=ineligible)  # type: ignore[arg-type]


def test_nothing_to_prune_is_an_error_with_the_reasons() -> None:
    model = nn.Sequential(nn.Embedding(4, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match=r"no prunable weight among 3 parameters") as caught:
        select_weights(model)
    for part in ("embedding", "not a matrix", "outside the repeated blocks", r"select={r'.*\.weight': '2:4'}"):
        assert part in str(caught.value)


def test_nothing_left_after_skipping_is_an_error() -> None:
    net = make_net().requires_grad_(False)
    with pytest.raises(ValueError, match=r"no prunable weight among 10 parameters \(.*it is frozen"):
        select_weights(net, ineligible="skip")


@pytest.mark.parametrize("model", [nn.ReLU(), [], {}])
def test_a_model_without_parameters_is_an_error(model: Any) -> None:
    with pytest.raises(ValueError, match=r"no prunable weight among 0 parameters \(the model has no parameters\)"):
        select_weights(model)
    with pytest.raises(ValueError, match="matches no parameter"):
        select_weights(model, select={".*": "2:4"})


class FlatParameter(nn.Parameter):
    """Stands in for the parameter of FSDP1, of the same name, without a process group."""


def zero_partition() -> nn.Parameter:
    p = nn.Parameter(torch.ones(0))
    p.ds_id = 7  # type: ignore[attr-defined]
    return p


@pytest.mark.parametrize(
    ("param", "kind"),
    [
        (FlatParameter(torch.ones(256)), "flattened parameter of shape (256,): its groups are torn apart"),
        (nn.Parameter(torch.ones(128)), "flattened parameter of shape (128,): its groups are torn apart"),
        (zero_partition(), "DeepSpeed ZeRO-3 partition of shape (0,)"),
    ],
    ids=["FlatParameter", "1-D weight of a Linear", "ZeRO-3"],
)
@pytest.mark.parametrize("ineligible", ["error", "skip"])
def test_parameters_that_lost_their_shape_are_refused_with_the_way_out(
    param: nn.Parameter, kind: str, ineligible: str
) -> None:
    net = make_net()
    net.blocks[0].up.weight = param
    with pytest.raises(ValueError, match=r"'blocks\.0\.up\.weight' is a .* Shard with FSDP2") as caught:
        select_weights(net, ineligible=ineligible)  # type: ignore[arg-type]
    assert kind in str(caught.value)


def test_a_packed_weight_of_integers_is_no_flattened_one() -> None:
    selection = chosen(replaced(torch.ones(64, dtype=torch.uint8)))
    assert reasons_of(selection)["blocks.0.up.weight"] == "not a matrix"


def test_flat_parameters_are_refused_by_names_too() -> None:
    pairs = [("_fsdp_wrapped_module._flat_param", FlatParameter(torch.ones(256)))]
    with pytest.raises(ValueError, match=r"'_flat_param' is a flattened parameter of shape \(256,\)"):
        select_weights(pairs)


# ---------------------------------------------------------------- tied weights


def tied_net() -> Net:
    net = make_net()
    net.blocks[1].up.weight = net.blocks[0].up.weight
    return net


@pytest.mark.parametrize("source", ["module", "pairs"])
def test_tied_weights_count_once_under_all_their_names(source: str) -> None:
    net = tied_net()
    selection, params = select_weights(net if source == "module" else net.named_parameters(remove_duplicate=False))
    assert [weight.name for weight in selection] == [
        "blocks.0.up.weight",
        "blocks.0.down.weight",
        "blocks.1.down.weight",
    ]
    assert selection["blocks.1.up.weight"] is selection["blocks.0.up.weight"]
    assert selection["blocks.0.up.weight"].aliases == ("blocks.1.up.weight",)
    assert list(params) == [weight.name for weight in selection]


def test_a_rule_may_use_any_name_of_a_tied_weight() -> None:
    selection = chosen(tied_net(), select={r"blocks\.1\.up\.weight": "1:4"}, dims={r"blocks\.1\.up\.weight": 0})
    assert selection.weights == (
        SelectedWeight("blocks.0.up.weight", (16, 8), Pattern(1, 4), 0, ("blocks.1.up.weight",)),
    )


@pytest.mark.parametrize("container", [lambda *blocks: nn.ModuleList(blocks), nn.Sequential])
def test_a_block_used_twice_counts_once(container: Callable[..., nn.Module]) -> None:
    block = Block(8)
    selection = chosen(container(block, block))
    assert [(weight.name, weight.aliases) for weight in selection] == [
        ("0.up.weight", ("1.up.weight",)),
        ("0.down.weight", ("1.down.weight",)),
    ]


def tied_across_layouts() -> nn.Module:
    blocks = nn.ModuleList([Mlp(False, 16, 16), Mlp(True, 16, 16)])
    blocks[1].c_fc.weight = blocks[0].c_fc.weight
    return blocks


def test_a_tied_weight_with_its_inputs_along_different_dimensions_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"0.c_fc.weight = 1.c_fc.weight has its inputs along different dimensions \[0, 1\]"
    ):
        select_weights(tied_across_layouts())


def test_a_tied_weight_with_different_dimensions_is_settled_by_dims() -> None:
    assert chosen(tied_across_layouts(), dims={r"1\.c_fc\.weight": 0})["0.c_fc.weight"].dim == 0


# ---------------------------------------------------------------- wrapped models


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(module: nn.Module) -> nn.Module:
    return torch.compile(module, backend="eager")  # wraps only: nothing is compiled before the first call


WRAPPED: dict[str, Callable[[nn.Module], nn.Module]] = {
    "compile": compiled,
    "DataParallel": nn.DataParallel,
    "DistributedDataParallel": nn.parallel.DistributedDataParallel,
    "compile(DistributedDataParallel)": lambda net: compiled(nn.parallel.DistributedDataParallel(net)),
    "DistributedDataParallel(compile)": lambda net: nn.parallel.DistributedDataParallel(compiled(net)),
}


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("wrapper", WRAPPED)
def test_wrappers_leave_no_trace_in_the_names(wrapper: str) -> None:
    net = make_net()
    wrapped = WRAPPED[wrapper](net)
    expected = chosen(net)
    assert chosen(wrapped) == expected
    by_names = chosen(wrapped.named_parameters())
    assert (by_names.weights, dims_of(by_names)) == (expected.weights, dims_of(expected))
    assert named_tensors(wrapped).keys() == named_tensors(wrapped.state_dict()).keys() == net.state_dict().keys()


def test_a_block_compiled_on_its_own_keeps_its_name() -> None:
    net = make_net()
    expected = dims_of(chosen(net))
    net.blocks[1] = compiled(net.blocks[1])
    assert dims_of(chosen(net)) == expected
    assert dims_of(chosen(net.named_parameters())) == expected


@pytest.mark.parametrize("part", ["_orig_mod", "_forward_module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"])
def test_parts_that_wrappers_put_into_names_are_left_out(part: str) -> None:
    pairs = [(name.replace("blocks.1", f"blocks.1.{part}"), p) for name, p in make_net().named_parameters()]
    assert dims_of(chosen(pairs)) == dims_of(chosen(make_net()))


def test_a_part_called_module_keeps_its_name_beside_others() -> None:
    net = make_net()
    net.module = nn.Linear(8, 8)
    assert "module.weight" in named_tensors(net.named_parameters())
    assert "module.weight" in named_tensors(net)


# ---------------------------------------------------------------- the selection itself


def small_selection() -> Selection:
    return Selection(
        (
            SelectedWeight("layers.0.fc.weight", (16, 8), Pattern(2, 4), 1, ("layers.1.fc.weight",)),
            SelectedWeight("layers.0.out.weight", (8, 16, 3), Pattern(1, 8), 0),
        ),
        (
            SkippedWeight("layers.0.fc.bias", (16,), "not a matrix"),
            SkippedWeight("embed.weight", (1000, 8), "embedding"),
            SkippedWeight("layers.0.out.bias", (8,), "not a matrix"),
        ),
    )


def test_a_selection_is_a_sequence_of_weights_by_name() -> None:
    selection = small_selection()
    assert len(selection) == 2
    assert list(selection) == list(selection.weights)
    assert selection["layers.0.out.weight"] is selection.weights[1]
    assert selection["layers.1.fc.weight"] is selection.weights[0]


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    with pytest.raises(
        KeyError, match=r"'embed.weight' is not a prunable weight; .*layers.0.fc.weight, layers.0.out.weight"
    ):
        small_selection()["embed.weight"]


def test_a_selection_prints_as_a_table() -> None:
    assert str(small_selection()).split("\n") == [
        "2 prunable weights, 512 of 8,536 parameters",
        "weight               shape   pattern  dim",
        "-------------------  ------  -------  ---",
        "layers.0.fc.weight   16x8    2:4      1",
        "layers.0.out.weight  8x16x3  1:8      0",
        "left dense: 3 parameters",
        "reason        tensors  parameters  such as",
        "------------  -------  ----------  -------------------",
        "not a matrix        2          24  layers.0.fc.bias, …",
        "embedding           1        8000  embed.weight",
    ]


def test_a_selection_without_dense_parameters_prints_its_weights_alone() -> None:
    assert str(Selection(small_selection().weights, ())).split("\n")[0] == "2 prunable weights, 512 of 512 parameters"
    assert "left dense" not in str(Selection(small_selection().weights, ()))


def test_a_tied_weight_is_found_by_each_name() -> None:
    net = tied_net()
    tensors = named_tensors(net)
    assert tensors["blocks.0.up.weight"] is tensors["blocks.1.up.weight"] is net.blocks[0].up.weight
    assert tensors.keys() == dict(net.named_parameters(remove_duplicate=False)).keys()


def test_notes_are_told_once_for_all_weights_that_have_them() -> None:
    selection = small_selection()
    note = "solved without statistics: no module hook reaches it"
    noted = Selection(tuple(replace(weight, note=note) for weight in selection), selection.skipped)
    assert f"{note}: 2 weights (layers.0.fc.weight, …)" in str(noted).split("\n")
    assert noted == selection, "a note is for the printout"


def test_what_stays_dense_is_added_or_replaced_by_name() -> None:
    late = SkippedWeight("embed.weight", (1000, 8), "added to the optimizer after construction", wanted=True)
    selection = small_selection().with_skipped(late)
    assert selection.weights == small_selection().weights
    assert reasons_of(selection)["embed.weight"] == late.reason
    assert len(selection.skipped) == 3


# ---------------------------------------------------------------- weights that came later


@pytest.mark.parametrize("source", ["module", "pairs"])
def test_weights_that_come_to_the_optimizer_later_are_listed_as_wanted(source: str) -> None:
    net = make_net()
    net.blocks[1].requires_grad_(False)
    selection = chosen(net, ineligible="skip")
    added = list(net.blocks[1].parameters())
    model = net if source == "module" else net.named_parameters()
    late = with_late_weights(selection, model, added)
    assert late.weights == selection.weights
    assert {s.name: s.reason for s in late.skipped if s.wanted} == {
        f"blocks.1.{part}.weight": "added to the optimizer after construction" for part in ("up", "down")
    }
    assert len(late.skipped) == len(selection.skipped)


def test_weights_that_no_rule_asks_for_may_come_later() -> None:
    net = make_net()
    selection = chosen(net, select={r"blocks\.0\..*": "2:4"})
    assert with_late_weights(selection, net, [net.head.weight]) == selection


def test_a_weight_that_is_pruned_already_is_none_that_came_later() -> None:
    net = make_net()
    assert with_late_weights(chosen(net), net, list(net.parameters())) == chosen(net)


# ---------------------------------------------------------------- weights held by a parametrization

HELD: dict[str, tuple[Callable[[nn.Module], Any], str, str]] = {
    "weight norm": (nn.utils.parametrizations.weight_norm, "parametrization WeightNorm", "remove_parametrizations"),
    "spectral norm": (
        nn.utils.parametrizations.spectral_norm,
        "parametrization SpectralNorm",
        "remove_parametrizations",
    ),
    "pruned": (
        lambda m: prune.l1_unstructured(m, "weight", 0.5),
        "torch.nn.utils.prune",
        "utils.prune.remove",
    ),
    "old weight norm": (nn.utils.weight_norm, "torch.nn.utils.weight_norm", "torch.nn.utils.remove_weight_norm"),
    "old spectral norm": (nn.utils.spectral_norm, "torch.nn.utils.spectral_norm", "remove_spectral_norm"),
}
UNDO: dict[str, Callable[[nn.Module], Any]] = {
    "weight norm": lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
    "spectral norm": lambda m: nn.utils.parametrize.remove_parametrizations(m, "weight"),
    "pruned": lambda m: prune.remove(m, "weight"),
    "old weight norm": nn.utils.remove_weight_norm,
    "old spectral norm": nn.utils.remove_spectral_norm,
}


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("source", ["module", "pairs"])
@pytest.mark.parametrize("kind", HELD)
def test_a_weight_held_by_a_parametrization_is_an_error_and_the_remedy_works(kind: str, source: str) -> None:
    hold, what, remedy = HELD[kind]
    net = make_net()
    hold(net.blocks[0].up)

    def model() -> Any:
        return net if source == "module" else net.named_parameters()

    with pytest.raises(
        ValueError, match=r"weight 'blocks\.0\.up\.weight' of shape \(16, 8\) cannot be pruned"
    ) as caught:
        select_weights(model())
    assert "computes it again in every pass" in str(caught.value)
    if source == "module":
        assert what in str(caught.value)
        assert remedy in str(caught.value)
        assert "before the inner optimizer is built" in str(caught.value)
    selection = chosen(model(), ineligible="skip")
    assert len(selection) == 3
    (wanted,) = [skipped for skipped in selection.skipped if skipped.wanted]
    assert wanted.shape == (16, 8)
    assert wanted.name in dict(net.named_parameters())
    assert wanted.name.startswith("blocks.0.up.")
    listed = [entry.name for entry in (*selection.weights, *selection.skipped)]
    assert sorted(listed) == sorted(name for name, _ in net.named_parameters())
    UNDO[kind](net.blocks[0].up)
    assert len(chosen(net)) == 4


def test_rules_find_a_held_weight_by_its_own_name() -> None:
    net = make_net()
    nn.utils.parametrizations.weight_norm(net.blocks[0].up)
    with pytest.raises(ValueError, match="parametrization WeightNorm"):
        select_weights(net, select={r"blocks\..*\.weight": "2:4"})
    with pytest.raises(ValueError, match="parametrization WeightNorm"):
        select_weights(net, select=lambda name, module: "2:4" if name == "blocks.0.up.weight" else None)
    assert len(chosen(net, select={r"blocks\.0\.up\.weight": None, r"blocks\..*\.weight": "2:4"})) == 3


def test_a_parametrization_where_nothing_is_pruned_is_no_matter() -> None:
    net = make_net()
    nn.utils.parametrizations.weight_norm(net.head)
    assert len(chosen(net)) == 4


def test_parametrized_layers_in_a_row_are_no_blocks() -> None:
    rows = nn.ModuleList(nn.utils.parametrizations.weight_norm(nn.Linear(8, 8)) for _ in range(2))
    selection = chosen(nn.ModuleDict({"rows": rows, "net": make_net()}))
    assert len(selection) == 4
    assert not any(skipped.wanted for skipped in selection.skipped)


# ---------------------------------------------------------------- weights that are no plain tensors


def wrapped_by_torchao(kind: str) -> Net:
    pytest.importorskip("torchao")
    training = pytest.importorskip("torchao.prototype.quantized_training")
    from torchao.quantization import quantize_

    net = make_net()
    if kind == "float8":
        from torchao.float8 import Float8LinearConfig, convert_to_float8_training

        config = Float8LinearConfig(enable_fsdp_float8_all_gather=True)
        for block in net.blocks:
            convert_to_float8_training(block, config=config)
    else:
        quantize_(net.blocks, getattr(training, kind)())
    return net


@pytest.mark.parametrize("kind", ["int8_mixed_precision_training", "bitnet_training", "float8"])
def test_wrappers_into_which_zeros_can_be_written_are_selected(kind: str) -> None:
    net = wrapped_by_torchao(kind)
    weight = net.blocks[0].up.weight
    assert type(weight.detach()) is not Tensor, "torchao wraps no more: this test has lost its case"
    before = weight.detach().clone()
    assert dims_of(chosen(net)) == dims_of(chosen(make_net()))
    assert torch.equal(plain(before), plain(weight)), "the trial is made on a copy"


@pytest.mark.parametrize("ineligible", ["error", "skip"])
def test_wrappers_into_which_no_zeros_can_be_written_are_refused(ineligible: str) -> None:
    net = wrapped_by_torchao("int8_weight_only_quantized_training")
    match = "Int8QuantizedTrainingLinearWeight, into which zeros cannot be written"
    with pytest.raises(ValueError, match=match):
        select_weights(net, ineligible=ineligible)  # type: ignore[arg-type]


class Rounding(Tensor):
    """A tensor class that keeps whole numbers only, so that writing zeros changes what stands beside them."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_function__(func, types, args, kwargs or {})
        if func is Tensor.mul_:
            with torch._C.DisableTorchFunctionSubclass():
                out.round_()
        return out


def test_a_trial_sees_that_other_entries_change() -> None:
    assert takes_zeros(torch.randn(4, 8))
    assert not takes_zeros(torch.full((4, 8), 0.3).as_subclass(Rounding))
    assert takes_zeros(torch.full((4, 8), float("nan")))


# ---------------------------------------------------------------- adapters


def tiny_bert() -> nn.Module:
    return tiny("bert classifier")


def with_adapters(kind: str) -> Any:
    peft = pytest.importorskip("peft")
    targets = ["query", "value"]
    config = {
        "lora": lambda: peft.LoraConfig(target_modules=targets, r=4),
        "dora": lambda: peft.LoraConfig(target_modules=targets, r=4, use_dora=True),
        "ia3": lambda: peft.IA3Config(target_modules=targets, feedforward_modules=[]),
        "injected": lambda: peft.LoraConfig(target_modules=targets, r=4),
        "prompt": lambda: peft.PromptTuningConfig(task_type="SEQ_CLS", num_virtual_tokens=4),
    }[kind]()
    if kind == "injected":
        model: Any = tiny_bert()
        model.add_adapter(config)
        return model
    return peft.get_peft_model(tiny_bert(), config)


peft_warns = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")


@peft_warns
@pytest.mark.parametrize("ineligible", ["error", "skip"])
@pytest.mark.parametrize("source", ["module", "pairs"])
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "injected", "prompt"])
def test_adapters_are_refused_wherever_they_come_from(kind: str, source: str, ineligible: Any) -> None:
    model = with_adapters(kind)
    if source == "pairs" and kind == "prompt":
        pytest.skip("a prompt leaves no trace in the names of the weights")
    given = model if source == "module" else model.named_parameters()
    with pytest.raises(ValueError, match="the model has PEFT adapters") as caught:
        select_weights(given, ineligible=ineligible)
    for part in ("requires_grad_(True)", "build the inner optimizer after that"):
        assert part in str(caught.value)


@peft_warns
@pytest.mark.parametrize("kind", ["lora", "dora", "ia3", "injected", "prompt"])
def test_the_way_out_of_adapters_works_as_written(kind: str, tmp_path: Path) -> None:
    import peft

    model = with_adapters(kind)
    with pytest.raises(ValueError, match="PEFT") as caught:
        select_weights(model)
    message = str(caught.value)
    if kind == "injected":
        assert "model.save_pretrained(folder)" in message
        model.save_pretrained(tmp_path)
        base = tiny_bert()
        model = peft.PeftModel.from_pretrained(base, tmp_path).merge_and_unload()
    elif kind == "prompt":
        assert "load the model without it" in message
        model = tiny_bert().requires_grad_(False)
    else:
        assert "model = model.merge_and_unload()" in message
        model = model.merge_and_unload()
    with pytest.raises(ValueError, match="it is frozen"):
        select_weights(model)
    for p in model.parameters():
        p.requires_grad_(True)
    assert dims_of(chosen(model)) == dims_of(chosen(tiny_bert()))


@peft_warns
def test_adapters_in_a_part_of_a_model_are_named_with_their_place() -> None:
    class Both(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder = with_adapters("lora")
            self.net = make_net()

    with pytest.raises(ValueError, match=r"model\.encoder = model\.encoder\.merge_and_unload\(\)"):
        select_weights(Both())


@peft_warns
def test_merged_weights_train_and_end_in_the_pattern() -> None:
    model = with_adapters("lora").merge_and_unload()
    for p in model.parameters():
        p.requires_grad_(True)
    optimizer = ADMMNxM(torch.optim.AdamW(model.parameters(), lr=1e-3), model, total_steps=10)
    torch.manual_seed(0)
    for _ in range(10):
        ids = torch.randint(0, 40, (2, 8))
        model(input_ids=ids, labels=torch.tensor([0, 1])).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert optimizer.finalize().ok
    assert verify(model).ok


# ---------------------------------------------------------------- by module and by name alike


class Encoder(nn.Module):
    """Blocks, an embedding without "embed" in its name, and a pooler."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tok_emb = nn.Embedding(10, width)
        self.layers = nn.ModuleList(Block(width) for _ in range(2))
        self.pooler = nn.ModuleDict({"dense": nn.Linear(width, width)})


class Detector(nn.Module):
    """Linears below "embed", as in RT-DETR's decoder and the encoders of Phi-4-multimodal."""

    def __init__(self) -> None:
        super().__init__()
        self.bbox_embed = nn.ModuleList(nn.ModuleDict({"mlp": Block(8)}) for _ in range(2))
        self.embed_tokens_extend = nn.ModuleDict({"image_embed": Encoder()})
        self.embed_tokens = nn.ModuleList([nn.Embedding(10, 8), nn.Embedding(10, 8)])


def numbered_sequential() -> nn.Module:
    return nn.Sequential(OrderedDict((f"encoder_layer_{i}", Block(8)) for i in range(2)))


LAYOUTS: dict[str, tuple[Callable[[], nn.Module], int]] = {
    "encoder and head": (lambda: nn.Sequential(Encoder(), nn.Linear(8, 2)), 4),
    "encoder and deep head": (lambda: nn.Sequential(Encoder(), nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 2))), 4),
    "encoder and named head": (lambda: nn.Sequential(Encoder(), nn.ModuleDict({"fc": nn.Linear(8, 4)})), 4),
    "encoder alone": (lambda: nn.Sequential(Encoder()), 4),
    "two encoders": (lambda: nn.Sequential(Net(8), Encoder()), 8),
    "sequential as a part": (lambda: nn.ModuleDict({"net": nn.Sequential(Encoder(), nn.Linear(8, 2))}), 4),
    "one block": (lambda: nn.ModuleDict({"layers": nn.ModuleList([Block(8)])}), 2),
    "unlike blocks": (
        lambda: nn.ModuleDict({"layers": nn.ModuleList([Block(8), nn.ModuleDict({"fc": nn.Linear(8, 8)})])}),
        3,
    ),
    "numbered names": (lambda: nn.ModuleDict({"layers": numbered_sequential(), "head": nn.Linear(8, 8)}), 4),
    "below embed": (Detector, 8),
    "head with blocks in a sequential": (
        lambda: nn.Sequential(nn.ModuleDict({"encoder": Encoder(), "classifier": nn.ModuleList([Block(8)])})),
        4,
    ),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_rules_by_name_agree_with_those_by_module(layout: str) -> None:
    make, count = LAYOUTS[layout]
    by_module = chosen(make())
    assert len(by_module) == count
    assert dims_of(chosen(make().named_parameters())) == dims_of(by_module)


def test_rt_detr_is_told_alike_by_module_and_by_name() -> None:
    for name in ("RTDetrConfig", "RTDetrResNetConfig", "RTDetrForObjectDetection"):
        if not hasattr(transformers, name):
            pytest.skip(f"transformers {transformers.__version__} has no {name}")
    backbone = transformers.RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, out_features=["stage2", "stage3", "stage4"]
    )
    config = transformers.RTDetrConfig(
        backbone_config=backbone,
        encoder_hidden_dim=16,
        encoder_in_channels=[8] * 3,
        encoder_ffn_dim=32,
        encoder_attention_heads=2,
        d_model=16,
        decoder_in_channels=[16] * 3,
        decoder_ffn_dim=32,
        decoder_layers=2,
        decoder_attention_heads=2,
    )
    model = transformers.RTDetrForObjectDetection(config)
    selection = chosen(model, ineligible="skip")
    assert any(".bbox_embed.0." in weight.name for weight in selection)
    assert dims_of(chosen(model.named_parameters(remove_duplicate=False), ineligible="skip")) == dims_of(selection)
