"""ONNX: what is exported is the model, and its groups are counted along the dimension that each product sums over."""

from __future__ import annotations

import importlib
import importlib.util
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import Pattern, SparsityViolation, project
from admm_nxm.export.onnx import _as_exported, _name_ends, export_onnx, verify_onnx
from admm_nxm.selection import Selection, select_weights
from tests.helpers import make_net, weights_of

pytestmark = pytest.mark.skipif(
    any(importlib.util.find_spec(name) is None for name in ("onnx", "onnxruntime", "onnxscript")),
    reason="needs onnx, onnxruntime and onnxscript",
)
needs_transformers = pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers")

VOCABULARY = 50


@torch.no_grad()
def pruned(model: nn.Module, pattern: str = "2:4", **options: Any) -> Selection:
    """Project a model once, and return what was."""
    selection, weights = select_weights(model, pattern, **options)
    for weight in selection:
        weights[weight.name].copy_(project(weights[weight.name], weight.pattern, weight.dim))
    return selection


def texts() -> dict[str, Tensor]:
    """Two texts, the second of them padded."""
    mask = torch.ones(2, 8, dtype=torch.long)
    mask[1, 5:] = 0
    return {"input_ids": torch.randint(0, VOCABULARY, (2, 8)), "attention_mask": mask}


def bert() -> nn.Module:
    import transformers

    return transformers.BertForSequenceClassification(
        transformers.BertConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            intermediate_size=32,
            max_position_embeddings=16,
        )
    )


def gpt2() -> nn.Module:
    import transformers

    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=1, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
        )
    )


def llama() -> nn.Module:
    import transformers

    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            intermediate_size=32,
            max_position_embeddings=16,
            tie_word_embeddings=True,
        )
    )


def t5() -> nn.Module:
    import transformers

    return transformers.T5EncoderModel(
        transformers.T5Config(
            vocab_size=VOCABULARY, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
        )
    )


# ---------------------------------------------------------------- export


@needs_transformers
@pytest.mark.parametrize(
    ("make", "output"), [(bert, "logits"), (gpt2, "logits"), (llama, "logits"), (t5, "last_hidden_state")]
)
def test_transformers_models(
    make: Callable[[], nn.Module], output: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    model = make().train()
    selection = pruned(model)
    before, attention = weights_of(model), model.config._attn_implementation
    capfd.readouterr()
    report = export_onnx(model, texts(), tmp_path / "model.onnx")
    assert capfd.readouterr() == ("", "")
    assert report.outputs == (output,)
    assert report.inputs == {"input_ids": ("batch", "sequence"), "attention_mask": ("batch", "sequence")}
    assert [case["input_ids"] for case in report.compared] == [(2, 8), (3, 4)]
    assert report.max_rel_difference is not None
    assert report.max_rel_difference < 1e-5
    # Each weight under its own name, its groups along the inputs of the product.
    assert report.sparsity.ok
    assert [w.name for w in report.sparsity] == [w.name for w in selection]
    inputs = {w.name: w.shape[w.dim] for w in selection}
    assert {w.name: w.shape[w.dim] for w in report.sparsity} == inputs
    assert list(tmp_path.iterdir()) == [report.path]
    # The model is as it was.
    assert all(torch.equal(t, before[name]) for name, t in model.named_parameters())
    assert model.training
    assert all(module.training for module in model.modules())
    assert model.config._attn_implementation == attention
    assert model.config.use_cache or output != "logits" or make is bert


class Everything(nn.Module):
    """A shared weight, a convolution, one that is not used, and outputs of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.shared = nn.Linear(16, 16)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.ReLU()) for _ in range(3))
        self.conv = nn.Conv1d(16, 8, 3, padding=1)

    def forward(self, x: Tensor) -> dict[str, Any]:
        for block in list(self.blocks)[:2]:
            x = self.shared(block(self.shared(x)))
        return {"hidden": x, "nothing": None, "more": (x.mean(1), [self.conv(x.transpose(1, 2))])}


ALL = {r"shared\.weight": "2:4", r"blocks\.\d\.0\.weight": "1:4", r"conv\.weight": "2:4"}


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any]:
    torch.manual_seed(0)
    model = Everything()
    pruned(model, select=ALL)
    path = tmp_path_factory.mktemp("everything") / "model.onnx"
    return path, export_onnx(model, torch.randn(1, 5, 16), path, pattern=ALL, external_data=True)


def test_shared_unused_and_convolved_weights(exported: tuple[Path, Any]) -> None:
    _, report = exported
    assert report.outputs == ("hidden", "more.0", "more.1.0")
    assert report.inputs == {"x": ("batch", 5, 16)}
    assert [case["x"] for case in report.compared] == [(2, 5, 16), (3, 5, 16)]
    counted = {w.name: (str(w.pattern), w.groups, w.bad_groups) for w in report.sparsity}
    assert counted == {
        "shared.weight": ("2:4", 64, 0),
        "blocks.0.0.weight": ("1:4", 64, 0),
        "blocks.1.0.weight": ("1:4", 64, 0),
        "conv.weight": ("2:4", 8 * 3 * 4, 0),
    }
    assert [(s.name, s.reason) for s in report.sparsity.skipped] == [
        ("blocks.2.0.weight", "the exported graph does not use it")
    ]
    assert "not covered: blocks.2.0.weight" in str(report)
    assert json.loads(json.dumps(report.to_dict()))["ok"] is True


def test_weights_have_their_torch_names_in_the_file_and_go_straight_into_their_products(
    exported: tuple[Path, Any],
) -> None:
    import onnx

    path, report = exported
    graph = onnx.load(str(path)).graph
    names = {weight.name for weight in report.sparsity}
    readers = {name: node.op_type for node in graph.node for name in node.input if name in names}
    assert readers == {name: "Conv" if name == "conv.weight" else "MatMul" for name in names}
    assert names <= {tensor.name for tensor in graph.initializer}


def test_the_patterns_of_the_export_are_noted_in_the_file(exported: tuple[Path, Any]) -> None:
    path, report = exported
    assert verify_onnx(path) == report.sparsity
    # An explicit pattern is held against what is pruned by default, by torch's names.
    strict = verify_onnx(path, "1:4")
    assert [w.name for w in strict] == ["blocks.0.0.weight", "blocks.1.0.weight"]
    assert strict.ok
    tight = verify_onnx(path, {r"shared\.weight": "1:4"})
    assert tight.violations[0].bad_groups > 0


def test_external_data_lies_beside_the_file_and_is_read(exported: tuple[Path, Any], tmp_path: Path) -> None:
    path, report = exported
    assert sorted(file.name for file in path.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert report.bytes == sum(file.stat().st_size for file in path.parent.iterdir())
    (tmp_path / "model.onnx").write_bytes(path.read_bytes())
    with pytest.raises(FileNotFoundError, match="not beside it"):
        verify_onnx(tmp_path / "model.onnx")
    data = path.with_name("model.onnx.data").read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(data[: len(data) // 2])
    with pytest.raises(ValueError, match=r"weight .* cannot be read from 'model\.onnx\.data'"):
        verify_onnx(tmp_path / "model.onnx")


def test_data_that_no_file_needs_any_more_is_deleted(tmp_path: Path) -> None:
    net = make_net()
    pruned(net)
    path, data = tmp_path / "model.onnx", tmp_path / "model.onnx.data"
    data.write_bytes(b"of another file")
    export_onnx(net, torch.randn(2, 8), path, check=False)
    export_onnx(net, torch.randn(2, 8), path, check=False, overwrite=True)
    assert data.read_bytes() == b"of another file"
    data.unlink()
    export_onnx(net, torch.randn(2, 8), path, check=False, overwrite=True, external_data=True)
    assert data.is_file()
    export_onnx(net, torch.randn(2, 8), path, check=False, overwrite=True)
    assert list(tmp_path.iterdir()) == [path]
    assert verify_onnx(path).ok


class Returning(nn.Module):
    """Returns what it is told to make of its input and its hidden state."""

    def __init__(self, make: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.blocks = make_net().blocks
        self.scale = nn.Parameter(torch.ones(8))
        self.make = make

    def forward(self, x: Tensor) -> Any:
        return self.make(x, self.blocks[1](self.blocks[0](x)) * self.scale)


@pytest.mark.parametrize(
    ("make", "outputs", "check"),
    [
        (lambda x, h: {"x": h}, ("x_output",), False),
        (lambda x, h: {"x": h}, ("x_output",), True),
        (lambda x, h: {"x": x, "h": h}, ("x_output", "h"), False),
        (lambda x, h: {"y": x, "h": h}, ("y", "h"), True),
        (lambda x, h: {"a": h, "b": h}, ("a", "b"), False),
        (lambda x, h: {"linear": h, "b": h}, ("linear", "b"), True),  # as the exporter calls a value inside
        (lambda x, h: (h, [h, h + 1]), ("output.0", "output.1.0", "output.1.1"), False),
        (lambda x, h: {"a.0": h, "a": [h + 1]}, ("a.0", "a.0_output"), True),
        (lambda x, h: {"scale": h, "b": h}, ("scale_output", "b"), False),
        (lambda x, h: {"x": h, "x_output": h + 1, "a": [x]}, ("x_output", "x_output_output", "a.0"), True),
    ],
)
def test_outputs_have_names_of_their_own(
    make: Callable[[Tensor, Tensor], Any], outputs: tuple[str, ...], check: bool, tmp_path: Path
) -> None:
    import onnx
    import onnxruntime

    model = Returning(make)
    pruned(model)
    x = torch.randn(3, 8)
    report = export_onnx(model, x, tmp_path / "model.onnx", check=check)
    graph = onnx.load(tmp_path / "model.onnx").graph
    assert report.outputs == tuple(entry.name for entry in graph.output) == outputs
    assert list(report.inputs) == [entry.name for entry in graph.input] == ["x"]
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    want = torch.utils._pytree.tree_leaves(model(x))
    for got, expected in zip(session.run(list(outputs), {"x": x.numpy()}), want, strict=True):
        assert torch.allclose(torch.from_numpy(got), expected, atol=1e-5)


def test_a_graph_with_other_ends_than_the_model_is_refused(tmp_path: Path) -> None:
    import onnx_ir

    graph = onnx_ir.load(save(tmp_path / "model.onnx", [node("Relu", "x")], [])).graph
    with pytest.raises(RuntimeError, match=r"from x to y; the model is one from x to a, b\. .*its \.clone\(\)"):
        _name_ends(graph, ("x",), ("a", "b"))


class Holding(nn.Module):
    """Has all its parameters in an attribute that is called as in DistributedDataParallel."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


@pytest.mark.parametrize("wrap", ["compile", "module"])
def test_names_of_wrappers_are_no_part_of_a_weights_name(wrap: str, tmp_path: Path) -> None:
    net: Any = make_net()
    if wrap == "compile":
        net.blocks[0] = torch.compile(net.blocks[0], backend="eager")
    else:
        net = Holding(net)
    selection = pruned(net)
    path = tmp_path / "model.onnx"
    names = [w.name for w in selection]
    report = export_onnx(net, torch.randn(2, 8), path)
    assert [w.name for w in report.sparsity] == names
    assert [w.name for w in verify_onnx(path)] == names
    assert [w.name for w in verify_onnx(path, selection)] == names
    by_rules = verify_onnx(path, {r"blocks\.\d\.(up|down)\.weight": "2:4"})
    assert [w.name for w in by_rules] == [name.removeprefix("module.") for name in names]
    assert by_rules.ok
    assert [w.name for w in verify_onnx(path, "2:4")] == [w.name for w in by_rules]


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_files_of_other_makers_may_have_names_of_wrappers(prefix: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [node("MatMul", "x", prefix + NAME)], [constant(prefix + NAME, SPARSE)])
    for rules in (None, {NAME: "2:4"}):
        (weight,) = verify_onnx(path, rules)
        assert (weight.name, weight.groups, weight.bad_groups) == (NAME, 12, 0)


def clip() -> Any:
    import transformers

    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    special = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
    return transformers.CLIPModel(
        transformers.CLIPConfig(
            text_config={**sizes, **special, "vocab_size": VOCABULARY, "max_position_embeddings": 16},
            vision_config={**sizes, "image_size": 8, "patch_size": 4},
            projection_dim=8,
        )
    )


class Wrapped(nn.Module):
    """A model of transformers inside of a plain module, the text part first."""

    def __init__(self, inner: Any) -> None:
        super().__init__()
        self.text, self.inner = inner.text_model, inner


@needs_transformers
@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
    "settings",
    [
        {"": "sdpa", "text_config": "eager", "vision_config": "sdpa"},
        {"": "eager", "text_config": "eager", "vision_config": "sdpa"},
        {"": "eager", "text_config": "sdpa", "vision_config": "sdpa"},
    ],
)
@pytest.mark.parametrize("fails", [False, True])
def test_the_attention_of_each_config_is_switched_and_restored(
    settings: dict[str, str], wrapped: bool, fails: bool
) -> None:
    inner = clip()
    inner.config._attn_implementation = settings
    model = Wrapped(inner) if wrapped else inner
    configs = {"": inner.config, **{key: getattr(inner.config, key) for key in ("text_config", "vision_config")}}

    def attention() -> dict[str, str]:
        return {key: config._attn_implementation for key, config in configs.items()}

    assert attention() == settings
    with ExitStack() as stack:
        if fails:
            stack.enter_context(pytest.raises(RuntimeError, match="on the way"))
        with _as_exported(model):
            assert set(attention().values()) == {"eager"}
            if fails:
                raise RuntimeError("on the way")
    assert attention() == settings


def test_a_dense_model_is_refused_before_the_export(tmp_path: Path) -> None:
    net = make_net()
    with pytest.raises(SparsityViolation, match=r"blocks\.0\.up\.weight: .* Call optimizer\.finalize\(\)"):
        export_onnx(net, torch.randn(2, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_an_export_that_loses_the_pattern_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    pruned(net)
    whole = importlib.import_module("admm_nxm.export.onnx")._optimize

    def losing(program: Any, *rest: Any) -> Selection:
        selection: Selection = whole(program, *rest)
        value = program.model.graph.initializers["blocks.1.up.weight"]
        value.const_value = importlib.import_module("onnx_ir").tensor(value.const_value.numpy() + 1)
        return selection

    monkeypatch.setattr("admm_nxm.export.onnx._optimize", losing)
    with pytest.raises(SparsityViolation, match=r"blocks\.1\.up\.weight: 32 of 32 groups exceed 2:4"):
        export_onnx(net, torch.randn(2, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


def test_half_precision_fixed_sizes_and_a_file_that_is_there(tmp_path: Path) -> None:
    net = make_net(dtype=torch.float16)
    selection = pruned(net)
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(FileExistsError):
        export_onnx(net, torch.randn(2, 8).half(), path)
    assert path.read_bytes() == b"old"
    report = export_onnx(net, [torch.randn(2, 8).half()], path, pattern=selection, dynamic=False, overwrite=True)
    assert report.inputs == {"x": (2, 8)}
    assert len(report.compared) == 1
    assert report.tolerance == 2e-2
    assert [w.name for w in verify_onnx(path, selection)] == [w.name for w in selection]


def test_equal_layers_share_their_constants_and_keep_their_names(tmp_path: Path) -> None:
    """A TransformerEncoder is made of copies of one layer."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0), 2)
    selection = pruned(model)
    axes = {"src": {0: "batch", 1: "sequence"}}
    report = export_onnx(model, torch.randn(2, 6, 16), tmp_path / "model.onnx", dynamic=axes)
    assert report.inputs == {"src": ("batch", "sequence", 16)}
    assert {w.name for w in report.sparsity} == {w.name for w in selection}
    assert len(report.sparsity.weights) == len(selection) == 6
    assert report.sparsity.ok


def test_outputs_beyond_the_tolerance_leave_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = make_net()
    pruned(net)
    before = net.head.forward
    calls = []

    def drifting(x: Tensor) -> Tensor:
        calls.append(1)
        return before(x) + (1e-2 if len(calls) > 2 else 0.0)  # the export sees another model than was run

    monkeypatch.setattr(net.head, "forward", drifting)
    with pytest.raises(ValueError, match=r"output 'output' .* beyond 1e-04 of its largest value"):
        export_onnx(net, torch.randn(2, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


class Refusing(nn.Module):
    """Branches on a value, which cannot be traced."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = make_net().blocks

    def forward(self, x: Tensor) -> Tensor:
        return self.blocks[0](x) if x.sum().item() > 0 else x


def test_what_torch_cannot_export_is_said_with_its_cause(tmp_path: Path) -> None:
    model = Refusing()
    pruned(model)
    with pytest.raises(RuntimeError, match=r"cannot export Refusing: .*dynamic=False"):
        export_onnx(model, torch.ones(2, 8), tmp_path / "model.onnx")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("example", "options", "error", "said"),
    [
        ({"x": 3}, {}, TypeError, "return_tensors"),
        ({"x": None}, {}, ValueError, "no inputs"),
        ([], {}, ValueError, "no inputs"),
        (torch.empty(0, 8), {}, ValueError, "is empty"),
        ([torch.ones(2, 8)] * 2, {}, ValueError, r"Net\.forward does not take 2 inputs"),
        (torch.ones(2, 8), {"dynamic": {"y": {0: "batch"}}}, ValueError, "dynamic names y"),
        (torch.ones(2, 8), {"dynamic": {"x": {2: "batch"}}}, ValueError, "axes 0 to 1"),
        (torch.ones(2, 8), {"tolerance": 0}, ValueError, "above 0"),
        (torch.ones(2, 8), {"pattern": "4:2"}, ValueError, "2:4"),
    ],
)
def test_bad_input_is_refused(
    example: Any, options: dict[str, Any], error: type[Exception], said: str, tmp_path: Path
) -> None:
    net = make_net()
    pruned(net)
    with pytest.raises(error, match=said):
        export_onnx(net, example, tmp_path / "model.onnx", **options)
    assert not list(tmp_path.iterdir())


def test_a_missing_package_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name.startswith("onnx"):
            raise ImportError("no module")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    for call in (
        lambda: export_onnx(make_net(), torch.ones(2, 8), tmp_path / "model.onnx"),
        lambda: verify_onnx(tmp_path / "model.onnx"),
    ):
        with pytest.raises(ImportError, match=r'pip install "\.\[onnx\]"'):
            call()


# ---------------------------------------------------------------- verify, on files of other makers

# Of each four numbers down a column two are zero; along a row there are six that are not.
SPARSE = torch.tensor([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0], [1.0] * 6, [0.0] * 6, [0.0] * 6]).repeat(2, 1)
NAME = "layers.0.fc.weight"


def constant(name: str, t: Tensor) -> Any:
    from onnx import numpy_helper

    return numpy_helper.from_array(t.numpy(), name)


def node(kind: str, *inputs: str, out: str = "y", name: str = "", **attributes: Any) -> Any:
    from onnx import helper

    return helper.make_node(kind, list(inputs), [out], name=name, **attributes)


def save(
    path: Path,
    nodes: Sequence[Any],
    constants: Sequence[Any],
    metadata: Mapping[str, str] | None = None,
    opset: int = 21,
) -> Path:
    import onnx
    from onnx import TensorProto, helper

    float_ = TensorProto.FLOAT
    graph = helper.make_graph(
        list(nodes),
        "graph",
        [helper.make_tensor_value_info("x", float_, None)],
        [helper.make_tensor_value_info("y", float_, None)],
        list(constants),
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    if metadata:
        helper.set_model_props(model, dict(metadata))
    onnx.save(model, str(path))
    return path


def through(*kinds: Any, stored: Tensor) -> tuple[list[Any], list[Any]]:
    """A weight that goes through the named nodes to its product."""
    nodes, constants, value = [], [constant(NAME, stored)], NAME
    for i, (kind, extra, attributes) in enumerate(kinds):
        for j, t in enumerate(extra):
            constants.append(constant(f"extra.{i}.{j}", t))
        inputs = [f"extra.{i}.{j}" for j in range(len(extra))]
        nodes.append(node(kind, value, *inputs, out=f"step{i}", **attributes))
        value = f"step{i}"
    return [*nodes, node("MatMul", "x", value)], constants


BLOCKS = {"block_size": 3}
PATHS: dict[str, Callable[[], tuple[list[Any], list[Any]]]] = {
    "matmul": lambda: ([node("MatMul", "x", NAME)], [constant(NAME, SPARSE)]),
    "left": lambda: ([node("MatMul", NAME, "x")], [constant(NAME, SPARSE.T.contiguous())]),
    "gemm": lambda: ([node("Gemm", "x", NAME)], [constant(NAME, SPARSE)]),
    "gemm, transB": lambda: ([node("Gemm", "x", NAME, transB=1)], [constant(NAME, SPARSE.T.contiguous())]),
    "gemm, left, transA": lambda: ([node("Gemm", NAME, "x", transA=1)], [constant(NAME, SPARSE)]),
    "stack": lambda: ([node("MatMul", "x", NAME)], [constant(NAME, SPARSE.repeat(3, 1, 1))]),
    "transpose": lambda: through(("Transpose", [], {"perm": [1, 0]}), stored=SPARSE.T.contiguous()),
    "transpose, no perm": lambda: through(("Transpose", [], {}), stored=SPARSE.T.contiguous()),
    "cast": lambda: through(("Cast", [], {"to": 1}), ("Identity", [], {}), stored=SPARSE.half()),
    "reshape": lambda: through(("Reshape", [torch.tensor([-1, 6])], {}), stored=SPARSE.reshape(2, 4, 6)),
    "reshape, zero": lambda: through(("Reshape", [torch.tensor([0, 6])], {}), stored=SPARSE.reshape(8, 3, 2)),
    "squeeze": lambda: through(("Squeeze", [torch.tensor([0])], {}), stored=SPARSE[None]),
    "unsqueeze": lambda: through(("Unsqueeze", [torch.tensor([0])], {}), stored=SPARSE),
    "quantised": lambda: through(
        ("DequantizeLinear", [torch.tensor(0.5), torch.tensor(3, dtype=torch.int8)], {}),
        stored=(SPARSE + 3).to(torch.int8),
    ),
    "quantised by column": lambda: through(
        ("DequantizeLinear", [torch.ones(6), torch.arange(6, dtype=torch.int8)], {"axis": 1}),
        stored=(SPARSE + torch.arange(6)).to(torch.int8),
    ),
    "quantised by blocks of rows": lambda: through(
        ("DequantizeLinear", [torch.ones(3, 6), torch.arange(18, dtype=torch.int8).view(3, 6)], BLOCKS | {"axis": 0}),
        stored=(SPARSE + torch.arange(18).view(3, 6).repeat_interleave(3, 0)[:8]).to(torch.int8),
    ),
    "quantised by blocks of columns": lambda: through(
        ("DequantizeLinear", [torch.ones(8, 2), torch.arange(16, dtype=torch.int8).view(8, 2)], BLOCKS | {"axis": -1}),
        stored=(SPARSE + torch.arange(16).view(8, 2).repeat_interleave(3, 1)).to(torch.int8),
    ),
    "constant node": lambda: (
        [node("Constant", out=NAME, value=constant("", SPARSE)), node("MatMul", "x", NAME)],
        [],
    ),
}


@pytest.mark.parametrize("way", PATHS)
def test_a_weight_is_found_whichever_way_it_goes(way: str, tmp_path: Path) -> None:
    nodes, constants = PATHS[way]()
    path = save(tmp_path / "model.onnx", nodes, constants)
    stacked = way == "stack"  # which the default rules leave alone, as those of the optimizer do
    report = verify_onnx(path, {NAME: "2:4"} if stacked else None)
    (weight,) = report
    copies = 3 if stacked else 1
    assert (weight.name, weight.groups, weight.bad_groups) == (NAME, 12 * copies, 0)
    assert weight.zeros == 24 * copies
    assert verify_onnx(path, {NAME: "1:4"}).violations[0].bad_groups == 12 * copies


@pytest.mark.parametrize("opset", [11, 13, 17, 23])
@pytest.mark.parametrize("way", ["cast", "quantised", "quantised by column", "reshape", "squeeze", "transpose"])
def test_a_weight_is_found_in_older_files_too(way: str, opset: int, tmp_path: Path) -> None:
    nodes, constants = PATHS[way]()
    if way == "squeeze" and opset < 13:
        nodes[0] = node("Squeeze", NAME, out="step0", axes=[0])
    (weight,) = verify_onnx(save(tmp_path / "model.onnx", nodes, constants, opset=opset))
    assert (weight.name, weight.groups, weight.bad_groups) == (NAME, 12, 0)


def test_attention_scores_are_no_weights(tmp_path: Path) -> None:
    nodes = [node("MatMul", "x", NAME, out="q"), node("MatMul", "q", "x")]
    report = verify_onnx(save(tmp_path / "model.onnx", nodes, [constant(NAME, SPARSE)]))
    assert len(report.weights) == 1


def test_weights_of_branches_are_counted(tmp_path: Path) -> None:
    from onnx import TensorProto, helper

    out = [helper.make_tensor_value_info("z", TensorProto.FLOAT, None)]
    inner = constant("layers.1.fc.weight", torch.ones(8, 6))
    then = helper.make_graph([node("MatMul", "x", NAME, out="z")], "then", [], out)
    other = helper.make_graph([node("MatMul", "x", "layers.1.fc.weight", out="z")], "else", [], out, [inner])
    nodes = [node("If", "condition", then_branch=then, else_branch=other)]
    constants = [constant(NAME, SPARSE), constant("condition", torch.tensor(True))]
    report = verify_onnx(save(tmp_path / "model.onnx", nodes, constants))
    assert {w.name: w.bad_groups for w in report} == {NAME: 0, "layers.1.fc.weight": 12}


def test_made_up_names_are_read_off_the_node(tmp_path: Path) -> None:
    scoped = node("MatMul", "x", "val_1", out="a")
    entry = scoped.metadata_props.add()
    entry.key, entry.value = "pkg.torch.onnx.name_scopes", "['', 'encoder', 'encoder.layer.0.fc', 'linear_1']"
    nodes = [
        scoped,
        node("MatMul", "a", "onnx::MatMul_7", out="b", name="/blocks/blocks.3/up/MatMul"),
        node("MatMul", "b", "val_2", out="y"),
    ]
    square = SPARSE[:, :4].repeat(1, 2)
    path = save(tmp_path / "model.onnx", nodes, [constant(n, square) for n in ("val_1", "onnx::MatMul_7", "val_2")])
    report = verify_onnx(path)
    assert [w.name for w in report] == ["encoder.layer.0.fc.weight", "blocks.3.up.weight"]
    assert [(s.name, s.wanted) for s in report.skipped] == [("val_2", True)]
    assert "not covered: val_2 (nothing in the file says which weight it is)" in str(report)
    assert [w.name for w in verify_onnx(path, {"val_2": "2:4"})] == ["val_2"]


def test_only_made_up_names_is_an_error_with_the_remedy(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [node("MatMul", "x", "val_2")], [constant("val_2", SPARSE)])
    with pytest.raises(ValueError, match=r"which weights val_2 are: name them by rules"):
        verify_onnx(path)


def test_what_cannot_be_counted_is_listed(tmp_path: Path) -> None:
    names = [f"layers.{i}.fc.weight" for i in range(4)]
    nodes = [
        node("MatMul", "x", names[0], out="a"),
        node("Mul", names[1], "scale", out=f"{names[1]}"[:-6] + "scaled.weight"),
        node("MatMul", "a", f"{names[1]}"[:-6] + "scaled.weight", out="b"),
        node("MatMul", "b", names[2], out="c"),
        node("MatMul", "c", names[3]),
    ]
    constants = [
        constant(names[0], SPARSE),
        constant(names[1], SPARSE),
        constant("scale", torch.tensor(2.0)),
        constant(names[2], SPARSE.to(torch.int64)),
        constant(names[3], SPARSE[:6]),
    ]
    report = verify_onnx(save(tmp_path / "model.onnx", nodes, constants))
    assert [w.name for w in report] == [names[0]]
    reasons = {s.name: s.reason for s in report.skipped}
    assert reasons["layers.1.fc.scaled.weight"] == "the graph computes it by Mul"
    assert reasons[names[2]] == "its dtype is INT64 (quantised)"
    assert "no multiple of 4" in reasons[names[3]]


def test_a_selection_finds_its_weights_transposed_or_not(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [node("MatMul", "x", NAME)], [constant(NAME, SPARSE)])
    model = nn.Module()
    model.layers = nn.ModuleList([nn.Sequential()])
    model.layers[0].fc = nn.Linear(8, 6)
    selection, _ = select_weights(model)
    assert [w.name for w in verify_onnx(path, selection)] == [NAME]
    model.layers[0].fc = nn.Linear(8, 8)
    with pytest.raises(ValueError, match=r"of shape \(8, 8\); .* has shape \(8, 6\)"):
        verify_onnx(path, select_weights(model)[0])
    model.layers[0].up = nn.Linear(8, 6)
    del model.layers[0].fc
    with pytest.raises(ValueError, match="no matrix product that reads it"):
        verify_onnx(path, select_weights(model)[0])
    with pytest.raises(ValueError, match="names no weight"):
        verify_onnx(path, Selection((), ()))


# ---------------------------------------------------------------- damaged files


def record(name: str, pattern: object) -> dict[str, str]:
    weights = {name: {"pattern": pattern, "shape": [6, 8], "dim": 1}}
    return {"admm_nxm": json.dumps({"format": "admm-nxm-selection", "version": 1, "weights": weights})}


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({"admm_nxm": "{"}, "metadata 'admm_nxm' cannot be read"),
        ({"admm_nxm": "[]"}, "cannot be read"),
        (record(NAME, 3), "the pattern of .* is 3"),
        (record("layers.9.fc.weight", "2:4"), "a tool has rewritten the file"),
        (record(NAME, "4:2"), "2:4"),
    ],
)
def test_damaged_metadata_is_an_error(metadata: dict[str, str], said: str, tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [node("MatMul", "x", NAME)], [constant(NAME, SPARSE)], metadata)
    with pytest.raises(ValueError, match=said):
        verify_onnx(path)


def claims(**changes: Any) -> Any:
    """A constant whose description and bytes disagree."""
    tensor = constant(NAME, SPARSE)
    for key, value in changes.items():
        if key == "dims":
            del tensor.dims[:]
            tensor.dims.extend(value)
        elif key == "external":
            tensor.ClearField("raw_data")
            tensor.data_location = 1
            for name, text in value.items():
                entry = tensor.external_data.add()
                entry.key, entry.value = name, text
        else:
            setattr(tensor, key, value)
    return tensor


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dims": [1 << 40, 1 << 20]}, rf"weight '{NAME}': cannot reshape"),
        ({"dims": [1 << 40, 1 << 40]}, rf"weight '{NAME}' has shape \(1099511627776, 1099511627776\)"),
        ({"dims": [-1, 6]}, r"has shape \(-1, 6\)"),
        ({"raw_data": b"\0" * 10}, rf"weight '{NAME}': buffer size"),
        ({"external": {"location": "../secret", "length": "192"}}, r"cannot be read from '\.\./secret'"),
        ({"external": {"location": "/etc/passwd"}}, "cannot be read from '/etc/passwd'"),
        ({"external": {"location": "model.onnx", "offset": "-8"}}, "cannot be read"),
        ({"external": {"location": "model.onnx", "length": "much"}}, "cannot be read"),
        ({"external": {}}, "cannot be read"),
        ({"external": {"location": "model.onnx", "offset": "1000000", "length": "192"}}, "cannot be read"),
    ],
)
def test_a_weight_that_is_not_what_it_claims_is_an_error(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    path = save(tmp_path / "in.onnx", [node("MatMul", "x", NAME)], [claims(**changes)])
    path = path.rename(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match=said):
        verify_onnx(path)


def test_shapes_that_do_not_fit_are_an_error(tmp_path: Path) -> None:
    nodes, constants = through(("Reshape", [torch.tensor([5, 7])], {}), stored=SPARSE)
    with pytest.raises(ValueError, match="does not fit"):
        verify_onnx(save(tmp_path / "model.onnx", nodes, constants))


@pytest.mark.parametrize(
    "options",
    [{}, {"block_size": 3}, {"block_size": 2, "axis": 0}, {"block_size": 2, "axis": 5}, {"block_size": 1 << 60}],
)
@pytest.mark.parametrize("shape", [(5,), (5, 7)])
def test_zero_points_that_do_not_fit_are_an_error(
    options: dict[str, int], shape: tuple[int, ...], tmp_path: Path
) -> None:
    extra = [torch.ones(shape), torch.ones(shape, dtype=torch.int8)]
    nodes, constants = through(("DequantizeLinear", extra, options), stored=SPARSE.to(torch.int8))
    with pytest.raises(ValueError, match=r"'extra\.0\.[01]' of shape .* does not fit its weight|index out of range"):
        verify_onnx(save(tmp_path / "model.onnx", nodes, constants))


@pytest.mark.parametrize("linked", ["both", "model.onnx", "model.onnx.data"])
def test_links_apart_are_named_with_the_remedy(linked: str, exported: tuple[Path, Any], tmp_path: Path) -> None:
    """As the cache of the Hugging Face Hub has them."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    snapshot.mkdir()
    for name in ("model.onnx", "model.onnx.data"):
        content = exported[0].with_name(name).read_bytes()
        if linked in ("both", name):
            (blobs / f"blob-{name}").write_bytes(content)
            (snapshot / name).symlink_to(blobs / f"blob-{name}")
        else:
            (snapshot / name).write_bytes(content)
    with pytest.raises(FileNotFoundError, match=r"is a symbolic link to .*blob-model\.onnx.*local_dir="):
        verify_onnx(snapshot / "model.onnx")


def test_nodes_in_a_circle_are_no_weights(tmp_path: Path) -> None:
    nodes = [node("Identity", "b", out="a"), node("Identity", "a", out="b"), node("MatMul", "x", "a")]
    with pytest.raises(ValueError, match="nothing to verify"):
        verify_onnx(save(tmp_path / "model.onnx", nodes, []))


def test_no_product_with_a_constant_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="nothing to verify"):
        verify_onnx(save(tmp_path / "model.onnx", [node("Relu", "x")], []))


def test_a_truncated_file_never_passes(exported: tuple[Path, Any], tmp_path: Path) -> None:
    """Cut anywhere, it is an error, or all weights are still there."""
    whole = exported[0].read_bytes()
    (tmp_path / "model.onnx.data").write_bytes(exported[0].with_name("model.onnx.data").read_bytes())
    path = tmp_path / "model.onnx"
    refused = 0
    for share in range(0, 100, 4):
        path.write_bytes(whole[: len(whole) * share // 100])
        try:
            report = verify_onnx(path, ALL)
        except (ValueError, FileNotFoundError):
            refused += 1
        else:
            assert len(report.weights) == 4
    assert refused > 20


@pytest.mark.parametrize("content", [b"", b"no protobuf at all", b"\x08", bytes(range(256)) * 4])
def test_what_is_no_onnx_file_is_an_error(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"is not a readable ONNX file .* export it again"):
        verify_onnx(path)


def test_nothing_there_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        verify_onnx(tmp_path / "model.onnx")
    with pytest.raises(FileNotFoundError, match="no ONNX file"):
        verify_onnx(tmp_path)


def test_patterns_are_objects_too(tmp_path: Path) -> None:
    path = save(tmp_path / "model.onnx", [node("MatMul", "x", NAME)], [constant(NAME, SPARSE)])
    assert verify_onnx(str(path), Pattern(2, 8)).weights[0].groups == math.prod(SPARSE.shape) // 8
