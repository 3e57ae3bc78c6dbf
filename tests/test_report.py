"""model_report: the counts of verify, what tensor cores take, and FLOPs worked out by hand."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from torch import Tensor, nn

from admm_nxm import SelectedWeight, Selection, SparsityViolation, project, verify
from admm_nxm.report import ModelReport, model_report
from admm_nxm.report.tensor_cores import obstacles
from admm_nxm.selection import select_weights
from tests.helpers import Net, make_net

BF16 = torch.bfloat16


@torch.no_grad()
def pruned(model: nn.Module, pattern: str = "2:4") -> Any:
    selection, params = select_weights(model, pattern, trainable=False)
    for weight in selection:
        params[weight.name].copy_(project(params[weight.name], weight.pattern, weight.dim))
    return model


def tiny(architecture: str) -> Any:
    pytest.importorskip("transformers")
    from tests.test_selection import tiny as model

    return model(architecture)


def flops(report: ModelReport) -> dict[str, int | None]:
    return {**{w.name: w.flops for w in report.weights}, **{w.name: w.flops for w in report.dense if w.flops}}


# ---------------------------------------------------------------- counts and shares


def as_file(model: nn.Module, folder: Path) -> Path:
    save_file(dict(model.state_dict()), folder / "weights.safetensors")
    return folder / "weights.safetensors"


@pytest.mark.parametrize("kind", ["module", "state dict", "file", "folder", "parallel"])
@pytest.mark.parametrize("good", [True, False])
def test_counts_are_those_of_verify(good: bool, kind: str, tmp_path: Path) -> None:
    model = pruned(make_net()).to(BF16)
    if not good:
        with torch.no_grad():
            model.blocks[1].up.weight[:2, :4] = 1.0
    targets = {
        "module": lambda: model,
        "parallel": lambda: nn.DataParallel(model),
        "state dict": lambda: model.state_dict(),
        "file": lambda: as_file(model, tmp_path),
        "folder": lambda: as_file(model, tmp_path).parent,
    }
    target = targets[kind]()
    report, counts = model_report(target), verify(target)
    assert report.ok == good
    shared = ("name", "shape", "pattern", "dim", "groups", "bad_groups", "zeros")
    assert [[getattr(w, field) for field in shared] for w in report] == [
        [getattr(w, field) for field in shared] for w in counts
    ]
    assert [w.name for w in report.violations] == ([] if good else ["blocks.1.up.weight"])
    assert {w.dtype for w in report.weights} == {BF16}
    assert report.sparsity == counts.sparsity
    # 4 weights of 128 entries in blocks with 24 biases each; the head has 9.
    assert report.parameters == 4 * 128 + 2 * 24 + 9
    assert report.covered.parameters == 512
    assert report.covered.parameter_share == 512 / 569
    assert report.holding.weights == (4 if good else 3)
    assert {w.name for w in report.dense} == {
        *(f"blocks.{i}.{layer}.bias" for i in range(2) for layer in ("up", "down")),
        "head.weight",
        "head.bias",
    }
    assert report.flops is report.covered.flops is report.covered.flop_share is report.weights[0].flops is None
    assert "FLOPs" not in str(report)
    if not good:
        with pytest.raises(SparsityViolation, match=r"blocks\.1\.up\.weight"):
            report.raise_if_violated()


@pytest.mark.parametrize("architecture", ["bert classifier", "gpt2", "bert masked lm", "llama", "t5"])
def test_module_state_dict_and_folder_agree_on_real_architectures(architecture: str, tmp_path: Path) -> None:
    model = pruned(tiny(architecture))
    by_module, by_state = model_report(model), model_report(model.state_dict())
    assert by_module.parameters == by_state.parameters == sum(p.numel() for p in model.parameters())
    assert {w.name: w for w in by_module.weights} == {w.name: w for w in by_state.weights}
    model.save_pretrained(tmp_path)
    by_file = model_report(tmp_path, select_weights(model, trainable=False)[0])
    assert {w.name: w.tensor_cores for w in by_file.weights} == {w.name: w.tensor_cores for w in by_module.weights}
    assert by_file.parameters == by_module.parameters


def test_positions_and_counters_in_a_state_dict_are_no_parameters() -> None:
    weight = project(torch.randn(8, 8), "2:4")
    state = {"layers.0.fc.weight": weight, "position_ids": torch.arange(512)[None], "mask": torch.ones(4, 4) > 0}
    report = model_report(state)
    assert report.parameters == 64
    assert report.dense == ()


def test_packed_files_are_read_as_the_weights_that_they_hold(tmp_path: Path) -> None:
    from admm_nxm.io.packed import pack

    model = pruned(make_net()).to(BF16)
    plain = as_file(model, tmp_path)
    pack(plain, tmp_path / "weights.packed.safetensors")
    assert model_report(tmp_path / "weights.packed.safetensors").to_dict() == model_report(plain).to_dict()


# ---------------------------------------------------------------- tensor cores


class Layers(nn.Module):
    def __init__(self, *shapes: tuple[int, int]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(inputs, outputs)) for outputs, inputs in shapes)


def test_what_tensor_cores_take_and_why_not() -> None:
    model = pruned(Layers((32, 64), (16, 16), (8, 16))).to(BF16)
    report = model_report(model)
    assert [w.backends for w in report.weights] == [("cutlass", "cusparselt"), ("cusparselt",), ()]
    assert [w.tensor_cores for w in report.weights] == [obstacles(w.shape, BF16, "2:4") for w in report.weights]
    assert (report.tensor_cores().weights, report.tensor_cores("cutlass").weights) == (2, 1)
    assert report.tensor_cores("cusparselt").parameters == 32 * 64 + 16 * 16
    assert report.tensor_cores("cutlass").parameters == 32 * 64
    text = str(report)
    assert "cutlass cannot take 1: 16 x 16 is no multiple of 32 x 64: pad the layer (layers.1.0.weight)" in text
    assert "sparse tensor cores take 2 weights" in text


def test_a_weight_that_violates_its_pattern_is_taken_by_none() -> None:
    model = pruned(Layers((32, 64), (32, 64))).to(BF16)
    with torch.no_grad():
        model.layers[0][0].weight[:5, :4] = 1.0
    report = model_report(model)
    assert set(report.weights[0].tensor_cores.values()) == {"5 of 512 groups exceed 2:4: finalize or project it first"}
    assert report.weights[1].backends == ("cutlass", "cusparselt")


def test_a_weight_grouped_along_the_wrong_dimension_is_taken_by_none(tmp_path: Path) -> None:
    model = Layers((64, 64), (64, 64)).to(BF16)
    with torch.no_grad():
        model.layers[0][0].weight.copy_(project(model.layers[0][0].weight, "2:4", 0))
        model.layers[1][0].weight.copy_(project(model.layers[1][0].weight, "2:4", 1))
    selection = select_weights(model, dims={r"layers\.0\..*": 0}, trainable=False)[0]
    for target in (model, model.state_dict(), as_file(model, tmp_path)):
        report = model_report(target, selection)
        assert report.ok
        assert set(report.weights[0].tensor_cores.values()) == {
            "grouped along dim 0, but the layer sums over dim 1: prune along that one"
        }
        assert report.weights[1].backends == ("cutlass", "cusparselt")


def test_a_weight_that_layers_sum_over_in_two_ways_goes_as_the_selection_says() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(nn.Linear(64, 64)), nn.Sequential(Conv1D(64, 64))])
    model.layers[1][0].weight = model.layers[0][0].weight
    selection = select_weights(model, dims={r".*": 1}, trainable=False)[0]
    with torch.no_grad():
        model.layers[0][0].weight.copy_(project(model.layers[0][0].weight, "2:4", 1))
    report = model_report(model.to(BF16), selection)
    assert report.weights[0].backends == ("cutlass", "cusparselt")


def test_the_weight_of_a_conv1d_is_judged_by_its_transpose() -> None:
    pytest.importorskip("transformers")
    from transformers.pytorch_utils import Conv1D

    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential(Conv1D(32, 64)), nn.Sequential(Conv1D(64, 32))])
    report = model_report(pruned(model).to(BF16))
    assert [(w.shape, w.dim) for w in report.weights] == [((64, 32), 0), ((32, 64), 0)]
    assert [w.backends for w in report.weights] == [("cutlass", "cusparselt"), ("cusparselt",)]


# ---------------------------------------------------------------- FLOPs of a forward pass


def by_hand(model: nn.Module, rows: int) -> dict[str, int]:
    """Two for each entry of each matrix of a layer, and each row that passes through."""
    layers = {name: m for name, m in model.named_modules() if hasattr(m, "weight") and not isinstance(m, nn.Embedding)}
    return {f"{name}.weight": rows * 2 * m.weight.numel() for name, m in layers.items() if m.weight.ndim == 2}


@pytest.mark.parametrize("kind", ["tensor", "tuple", "list", "dict"])
def test_an_example_counts_a_forward_pass_and_restores_the_model(kind: str) -> None:
    model = make_net()
    model.blocks[1].eval()
    modes = {name: module.training for name, module in model.named_modules()}
    fast = torch.backends.mha.get_fastpath_enabled()
    x = torch.randn(3, 5, 8)
    example = {"tensor": x, "tuple": (x,), "list": [x], "dict": {"x": x}}[kind]
    report = model_report(model, example=example)
    assert flops(report) == by_hand(model, 15)
    assert report.flops == 15 * 2 * 520
    assert "15,600 FLOPs a forward pass" in str(report)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert torch.backends.mha.get_fastpath_enabled() == fast
    assert all(p.grad is None for p in model.parameters())
    assert report.notes == ("0.00% of the FLOPs belong to no parameter: products of activations, as in attention",)


class Twice(Net):
    """Its first block runs three times, its second never; the head is tied to it and works on views and sums."""

    def __init__(self) -> None:
        super().__init__()
        self.head.weight = nn.Parameter(torch.randn(8, 8))
        self.head.bias = None

    def forward(self, x: Tensor) -> Tensor:
        for _ in range(3):
            x = self.blocks[0](x)
        return x @ self.head.weight[:4].t()


def test_a_forward_pass_is_counted_as_it_ran() -> None:
    report = model_report(Twice(), example=torch.randn(2, 8))
    assert {w.name: w.flops for w in report.weights} == {
        "blocks.0.up.weight": 3 * 2 * 256,
        "blocks.0.down.weight": 3 * 2 * 256,
        "blocks.1.up.weight": 0,
        "blocks.1.down.weight": 0,
    }
    assert next(w.flops for w in report.dense if w.name == "head.weight") == 2 * 2 * 8 * 4


class Learned(nn.Module):
    """A layer that is given a parameter of its model: as it is, a part of it, or many times over."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 8))])
        self.query = nn.Parameter(torch.randn(1, 100, 8))

    def forward(self, x: Tensor) -> Tensor:
        query = {
            "whole": lambda: self.query,
            "part": lambda: self.query[:, : x.shape[1]],
            "many": lambda: self.query.expand(x.shape[0], -1, -1),
            "input": lambda: x[:, :4],
        }[self.kind]()
        return self.layers[0](query)


@pytest.mark.parametrize(("kind", "rows"), [("whole", 100), ("part", 5), ("many", 200), ("input", 8)])
def test_a_parameter_as_a_layers_input_leaves_the_layers_weight_its_flops(kind: str, rows: int) -> None:
    model = Learned(kind)
    model.layers[0][0].bias.requires_grad_(False)
    report = model_report(model, example=torch.randn(2, 5, 8, requires_grad=True))
    assert flops(report) == {"layers.0.0.weight": rows * 2 * 8 * 8}
    assert report.covered.flop_share == 1.0


def test_requires_grad_is_restored_with_its_hooks_and_after_errors_too() -> None:
    model = Learned("part")
    model.layers[0][0].bias.requires_grad_(False)
    weight, fired = model.layers[0][0].weight, []
    weight.register_hook(lambda grad: fired.append("gradient"))
    weight.register_post_accumulate_grad_hook(lambda _: fired.append("accumulated"))
    model_report(model, example=torch.randn(2, 5, 8))
    with pytest.raises(ValueError, match="the forward pass on example= failed"):
        model_report(model, example={"y": torch.randn(2, 5, 8)})
    assert {name: p.requires_grad for name, p in model.named_parameters()} == {
        "query": True,
        "layers.0.0.weight": True,
        "layers.0.0.bias": False,
    }
    model(torch.randn(2, 5, 8)).sum().backward()
    assert fired == ["gradient", "accumulated"]


class Attention(nn.Module):
    """One weight for query, key and value, read by one module and cut up by another."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(8, 24))])

    def forward(self, x: Tensor) -> Tensor:
        weight = self.layers[0][0].weight
        query, key, value = (nn.functional.linear(x, part)[:, None] for part in weight.chunk(3))
        return nn.functional.scaled_dot_product_attention(query, key, value)


def test_products_of_activations_belong_to_no_weight() -> None:
    model = Attention()
    report = model_report(model, example=torch.randn(2, 5, 8))
    projections, attention = 2 * 10 * 24 * 8, 2 * 2 * 5 * 5 * 8 * 2
    assert report.weights[0].flops == projections
    assert report.flops == projections + attention
    assert report.covered.flop_share == projections / (projections + attention)
    assert f"{attention / report.flops:.2%} of the FLOPs belong to no parameter" in report.notes[0]


def test_casts_of_a_weight_are_the_weight() -> None:
    model = make_net()
    x = torch.randn(3, 8)
    with torch.autocast("cpu", dtype=BF16):
        report = model_report(model, example=x)
    assert flops(report) == by_hand(model, 3)


def test_torchs_own_layers_are_counted_although_they_have_a_fused_kernel() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.Module()
    model.layers = nn.ModuleList([layer])
    model.forward = lambda x: layer(x)  # type: ignore[method-assign]
    report = model_report(model, {r".*\.(linear\d|in_proj_|out_proj\.)?weight": "2:4"}, example=torch.randn(2, 5, 8))
    attention = 2 * 2 * 5 * 5 * 8 * 2
    assert report.flops == 10 * 2 * (24 * 8 + 8 * 8 + 16 * 8 + 8 * 16) + attention
    assert flops(report)["layers.0.self_attn.in_proj_weight"] == 10 * 2 * 24 * 8
    assert flops(report)["layers.0.self_attn.out_proj.weight"] == 10 * 2 * 8 * 8


@pytest.mark.parametrize("architecture", ["bert classifier", "gpt2", "llama", "bert masked lm"])
def test_real_architectures_spend_their_flops_in_their_matrices(architecture: str) -> None:
    model = tiny(architecture)
    ids = torch.arange(10).view(2, 5)
    report = model_report(model, example={"input_ids": ids})
    expected = by_hand(model, 10)
    assert {w.name: w.flops for w in report.weights} == {w.name: expected[w.name] for w in report.weights}
    attention = 2 * 2 * (2 * 5 * 5 * 16) * 2  # two layers, scores and sums, two texts, width 16
    assert report.flops == attention + sum(cost or 0 for cost in flops(report).values())


def test_parameters_without_an_address_are_counted_too() -> None:
    model = make_net()
    model.table = nn.Parameter(torch.eye(4).to_sparse())
    report = model_report(model, example=torch.ones(1, 8))
    assert report.flops == 2 * 520
    assert next(w for w in report.dense if w.name == "table").numel == 16


def test_a_failed_forward_pass_says_so_and_restores_the_model() -> None:
    model = make_net()
    fast = torch.backends.mha.get_fastpath_enabled()
    with pytest.raises(
        ValueError, match=r"the forward pass on example= failed with TypeError: .*'y'.*give the arguments"
    ):
        model_report(model, example={"y": torch.ones(1, 8)})
    with pytest.raises(ValueError, match="the forward pass on example= failed with RuntimeError"):
        model_report(model, example=torch.ones(1, 9))
    assert all(module.training for module in model.modules())
    assert torch.backends.mha.get_fastpath_enabled() == fast


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match="example is a str; a dict of keyword arguments, a tuple"):
        model_report(make_net(), example="text")
    with pytest.raises(ValueError, match="an example needs a module to run"):
        model_report(make_net().state_dict(), example=torch.ones(1, 8))
    with pytest.raises(TypeError, match="cannot report on a int; a module, a state dict or a path is needed"):
        model_report(7)  # type: ignore[arg-type]
    with pytest.raises(FileNotFoundError, match="nothing to report on at"):
        model_report("no-such-file.safetensors")
    with pytest.raises(ValueError, match="no prunable weight"):
        model_report({"bias": torch.ones(3)})


# ---------------------------------------------------------------- skipped weights, selections


def test_what_no_pattern_fits_is_in_skipped_and_in_dense() -> None:
    report = model_report({"layers.0.a.weight": torch.zeros(4, 6), "layers.0.b.weight": torch.zeros(4, 8)})
    assert [w.name for w in report.skipped] == ["layers.0.a.weight"]
    (dense,) = report.dense
    assert (dense.name, dense.wanted, dense.numel) == ("layers.0.a.weight", True, 24)
    assert "no multiple of 4" in dense.reason
    assert "no multiple of 4" in str(report)


def test_a_selection_that_says_nothing_of_the_rest_leaves_it_dense_all_the_same() -> None:
    model = pruned(make_net())
    whole = model_report(model)
    selection = Selection((SelectedWeight("blocks.0.up.weight", (16, 8), whole.weights[0].pattern, 1),), ())
    report = model_report(model, selection)
    assert report.covered.weights == 1
    assert (report.parameters, report.flops) == (whole.parameters, whole.flops)
    assert {w.reason for w in report.dense} == {"not named by the selection"}


# ---------------------------------------------------------------- text, JSON, Markdown

KEYS = {"ok", "sparsity", "parameters", "flops", "totals", "weights", "dense", "notes"}


def test_the_dictionary_is_plain_json_with_the_documented_keys() -> None:
    report = model_report(pruned(make_net()), example=torch.ones(1, 8))
    found = report.to_dict()
    assert found.keys() == KEYS
    assert json.loads(report.to_json()) == found
    assert json.loads(report.to_json(indent=None)) == found
    assert found["totals"].keys() == {"covered", "holding", "tensor_cores", "cutlass", "cusparselt"}
    assert found["totals"]["covered"] == {
        "weights": 4,
        "parameters": 512,
        "parameter_share": 512 / 569,
        "flops": 1024,
        "flop_share": 1024 / 1040,
    }
    assert found["weights"][0] == {
        "name": "blocks.0.up.weight",
        "shape": [16, 8],
        "dtype": "float32",
        "pattern": "2:4",
        "dim": 1,
        "groups": 32,
        "bad_groups": 0,
        "zeros": 64,
        "sparsity": 0.5,
        "parameters": 128,
        "flops": 256,
        "tensor_cores": obstacles((16, 8), torch.float32, "2:4"),
    }
    assert {key for weight in found["dense"] for key in weight} == {
        "name",
        "shape",
        "reason",
        "wanted",
        "parameters",
        "flops",
    }
    for key in KEYS | found["weights"][0].keys() | found["dense"][0].keys() | found["totals"].keys():
        assert f"``{key}``" in (ModelReport.to_dict.__doc__ or "")


def test_alike_weights_share_a_line() -> None:
    model = pruned(make_net())
    lines = str(model_report(model)).splitlines()
    row = next(line for line in lines if line.startswith("blocks.*.up.weight"))
    assert row.split() == [
        "blocks.*.up.weight",
        "2",
        "16x8",
        "float32",
        "2:4",
        "50.00%",
        "0",
        "no",
    ]
    with torch.no_grad():
        model.blocks[1].up.weight.fill_(1.0)
    report = model_report(model)
    rows = [line.split() for line in str(report).splitlines() if ".up.weight" in line and " 16x8 " in line]
    assert [(row[0], row[1], row[6]) for row in rows] == [
        ("blocks.0.up.weight", "1", "0"),
        ("blocks.1.up.weight", "1", "32"),
    ]
    assert "pattern VIOLATED by 1 of 4 weights" in str(report)


def test_shares_of_nothing_are_zero() -> None:
    report = ModelReport(weights=())
    assert report.covered.parameter_share == 0.0
    assert report.ok
    assert math.isfinite(report.sparsity)


# ---------------------------------------------------------------- sharded weights


@pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support:UserWarning")
def test_sharded_weights_are_counted_whole_and_refuse_an_example() -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    model = pruned(make_net())
    plain = model_report(model)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        for block in model.blocks:
            block.up.weight = nn.Parameter(distribute_tensor(block.up.weight.detach(), mesh, [Shard(0)]))
        assert model_report(model).to_dict() == plain.to_dict()
        with pytest.raises(ValueError, match=r"weight 'blocks\.0\.up\.weight' is sharded"):
            model_report(model, example=torch.ones(1, 8))
    finally:
        dist.destroy_process_group()
