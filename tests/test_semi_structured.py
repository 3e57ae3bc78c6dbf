"""to_semi_structured: swap, report and undo on a CPU with torch's own tensor classes; the products on a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.sparse._semi_structured_conversions import sparse_semi_structured_to_dense_cutlass

from admm_nxm import project
from admm_nxm.export import semi_structured
from admm_nxm.export.semi_structured import SemiStructured, to_semi_structured
from admm_nxm.selection import is_conv1d
from tests.helpers import same_bits

BF16 = torch.bfloat16


class Block(nn.Module):
    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.up = nn.Linear(width, wide)
        self.down = nn.Linear(wide, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.down(torch.tanh(self.up(x)))


class Net(nn.Module):
    """Two blocks, and a head whose three outputs no backend takes."""

    def __init__(self, width: int = 64, wide: int = 128) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(width, wide) for _ in range(2))
        self.head = nn.Linear(width, 3)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@torch.no_grad()
def pruned(model: nn.Module, pattern: str = "2:4", dtype: torch.dtype = BF16) -> Any:
    """Project every linear weight along its inputs, cast, and put the model into evaluation mode."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.weight.copy_(project(module.weight, pattern))
        if is_conv1d(module):
            module.weight.copy_(project(module.weight, pattern, 0))
    return model.to(dtype).eval()


def conv1d(inputs: int, outputs: int) -> Any:
    return pytest.importorskip("transformers").Conv1D(outputs, inputs)


def parameters(model: nn.Module) -> dict[str, int]:
    return {name: id(p) for name, p in model.named_parameters(remove_duplicate=False)}


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def reasons(handle: SemiStructured) -> dict[str, str]:
    return {weight.name: weight.reason for weight in handle.left}


def names(handle: SemiStructured) -> set[str]:
    return {weight.name for weight in handle.converted}


WEIGHTS = {f"blocks.{i}.{layer}.weight" for i in range(2) for layer in ("up", "down")}
HEAD = "cutlass: 3 x 64 is no multiple of 32 x 64: pad the layer"


# ---------------------------------------------------------------- on a CPU


class OnCpuCutlass(torch.sparse.SparseSemiStructuredTensorCUTLASS):
    """Torch's class with its compression and dispatch; the product alone is done on the decompressed weight."""

    SPARSE_DISPATCH = None
    _PROTOTYPE_WARNING_SHOWN = False

    @classmethod
    def _validate_device_dim_dtype_shape(cls, original_tensor: Tensor) -> None:
        multiples = cls._DTYPE_SHAPE_CONSTRAINTS[original_tensor.dtype]
        assert original_tensor.is_contiguous()
        assert original_tensor.shape[0] % multiples.sparse_min_rows == 0
        assert original_tensor.shape[1] % multiples.sparse_min_cols == 0

    def _weight(self) -> Tensor:
        return sparse_semi_structured_to_dense_cutlass(self.packed, self.meta)

    # In torch 2.13 the dense operand comes as it is, to be transposed here; in 2.5 it comes transposed.
    def _mm(self, B: Tensor, *, bias: Tensor | None = None, should_transpose_dense: bool = False, **_: Any) -> Tensor:  # noqa: N803
        product = self._weight() @ (B.t() if should_transpose_dense else B)
        if bias is not None:
            product = product + bias[:, None]
        return product.t() if should_transpose_dense else product


class OnCpuCusparselt(OnCpuCutlass):
    """With the other backend's shapes, and the dense matrix in the place of the compressed one."""

    BACKEND = "cusparselt"
    SPARSE_DISPATCH = None
    _PROTOTYPE_WARNING_SHOWN = False
    _DTYPE_SHAPE_CONSTRAINTS = torch.sparse.SparseSemiStructuredTensorCUSPARSELT._DTYPE_SHAPE_CONSTRAINTS

    @classmethod
    def from_dense(cls, original_tensor: Tensor) -> Any:
        cls._validate_device_dim_dtype_shape(original_tensor)
        return cls(original_tensor.shape, original_tensor.clone(), None, None, None, None)

    def _weight(self) -> Tensor:
        assert self.packed is not None
        return self.packed


@pytest.fixture
def on_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensorCUTLASS", OnCpuCutlass)
    monkeypatch.setattr(torch.sparse, "SparseSemiStructuredTensorCUSPARSELT", OnCpuCusparselt)
    monkeypatch.setattr(semi_structured, "_require_gpu", lambda devices: None)
    monkeypatch.setattr(semi_structured, "_misplaced", lambda weight: None)
    # Each test sees torch's warning of the prototype as if it were the first to convert.
    for kind in (OnCpuCutlass, OnCpuCusparselt):
        monkeypatch.setattr(kind, "_PROTOTYPE_WARNING_SHOWN", False)


cpu = pytest.mark.usefixtures("on_cpu")


@cpu
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("shape", [(64,), (5, 64), (2, 3, 64)])
def test_outputs_stay_and_undo_brings_the_same_parameters_back(shape: tuple[int, ...], mode: Any, backend: Any) -> None:
    model = pruned(Net())
    x = torch.randn(shape).to(BF16)
    with mode():
        expected = model(x)
        before, ids = bits(model), parameters(model)
        forced = torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
        handle = to_semi_structured(model, backend=backend)
        assert names(handle) == WEIGHTS
        assert {weight.backend for weight in handle.converted} == {backend}
        assert all(isinstance(model.get_parameter(name), OnCpuCutlass) for name in WEIGHTS)
        assert not any(model.get_parameter(name).requires_grad for name in WEIGHTS)
        assert forced == torch.sparse.SparseSemiStructuredTensor._FORCE_CUTLASS
        torch.testing.assert_close(model(x), expected)
    handle.undo()
    assert parameters(model) == ids
    assert all(same_bits(p, before[name]) for name, p in model.named_parameters())
    assert all(p.requires_grad for p in model.parameters())
    handle.undo()
    assert parameters(model) == ids


@cpu
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_inputs_of_any_layout_are_taken_and_undo_takes_the_hooks_away(mode: Any) -> None:
    """Torch alone multiplies none of these: it would have to expand the weight."""
    model = pruned(Net(), "1:2", torch.float32)
    inputs = [torch.randn(3, 5, 64).transpose(0, 1), torch.randn(3, 64, 5).transpose(1, 2), torch.randn(5, 128)[:, ::2]]
    with mode():
        expected = [model(x) for x in inputs]
        handle = to_semi_structured(model)
        for x, y in zip(inputs, expected, strict=True):
            torch.testing.assert_close(model(x), y)
    handle.undo()
    assert not any(module._forward_pre_hooks for module in model.modules())


@cpu
def test_the_report_says_what_was_swapped_and_what_was_left_and_why() -> None:
    model = pruned(Net())
    with torch.no_grad():
        model.blocks[1].up.weight[:3, :4] = 1.0
    handle = to_semi_structured(model, backend="cutlass")
    assert names(handle) == WEIGHTS - {"blocks.1.up.weight"}
    assert reasons(handle) == {
        "blocks.1.up.weight": "it does not hold 2:4: 3 of 2048 groups exceed it",
        "head.weight": HEAD,
    }
    text = str(handle)
    assert text.startswith("3 of 5 linear weights are semi-structured")
    assert "blocks.0.up.weight" in text
    assert "3 of 2048 groups exceed it" in text
    converted = {weight.name: weight for weight in handle.converted}["blocks.0.up.weight"]
    assert (converted.shape, converted.dtype, converted.aliases) == ((128, 64), BF16, ())


@cpu
def test_it_is_undone_at_the_end_of_a_block_that_fails_too() -> None:
    model = pruned(Net())
    ids = parameters(model)
    with to_semi_structured(model) as handle:
        assert names(handle) == WEIGHTS
        assert parameters(model) != ids
    assert parameters(model) == ids
    with pytest.raises(KeyError), to_semi_structured(model):
        raise KeyError
    assert parameters(model) == ids


@cpu
def test_cusparselt_goes_first_and_cutlass_takes_what_it_cannot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Net(64, 80))  # no multiple of CUTLASS's
    assert {weight.backend for weight in to_semi_structured(model).converted} == {"cusparselt"}
    with pytest.raises(ValueError, match=r"cutlass: 80 x 64 is no multiple of 32 x 64: pad the layer"):
        to_semi_structured(pruned(Net(64, 80)), backend="cutlass")
    monkeypatch.setattr(OnCpuCusparselt, "from_dense", classmethod(broken))
    handle = to_semi_structured(pruned(Net()))
    assert {weight.backend for weight in handle.converted} == {"cutlass"}


def broken(cls: type, original_tensor: Tensor) -> None:
    raise RuntimeError("architecture mismatch\nand more")


@cpu
def test_a_backend_that_does_not_work_here_is_found_out_by_trying(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(OnCpuCusparselt, "from_dense", classmethod(broken))
    with pytest.raises(ValueError, match=r"cusparselt: it does not work on this machine \(architecture mismatch\)"):
        to_semi_structured(pruned(Net()), backend="cusparselt")
    monkeypatch.setattr(OnCpuCutlass, "_weight", lambda self: torch.zeros(self.shape, dtype=self.dtype))
    with pytest.raises(ValueError, match="cutlass: its products are wrong on this machine"):
        to_semi_structured(pruned(Net()), backend="cutlass")


@cpu
def test_a_backend_is_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[Any] = []
    whole = semi_structured._problem_here
    monkeypatch.setattr(semi_structured, "_problem_here", lambda *key: tried.append(key) or whole(*key))
    to_semi_structured(pruned(Net()))
    assert tried == [("cusparselt", BF16, torch.device("cpu"))]


@cpu
def test_a_failure_while_compressing_leaves_the_model_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Net())
    ids = parameters(model)
    seen: list[Tensor] = []
    whole = semi_structured._compress

    def fail_at_the_third(matrix: Tensor, backend: Any) -> Tensor:
        seen.append(matrix)
        return broken(Tensor, matrix) if len(seen) == 4 else whole(matrix, backend)  # type: ignore[func-returns-value, return-value]

    monkeypatch.setattr(semi_structured, "_compress", fail_at_the_third)
    with pytest.raises(
        RuntimeError, match=r"weight 'blocks\.1\.up\.weight' could not be compressed by cusparselt: arch"
    ):
        to_semi_structured(model)
    assert parameters(model) == ids


@cpu
@pytest.mark.parametrize(("pattern", "converted"), [("2:4", False), ("1:2", True)])
def test_float32_needs_one_of_two_and_cutlass(pattern: str, converted: bool) -> None:
    model = pruned(Net(), pattern, torch.float32)
    if not converted:
        with pytest.raises(ValueError, match="it does not hold 1:2"):
            to_semi_structured(model)
        return
    x = torch.randn(5, 64)
    expected = model(x)
    handle = to_semi_structured(model)
    assert {weight.backend for weight in handle.converted} == {"cutlass"}
    assert names(handle) == WEIGHTS
    torch.testing.assert_close(model(x), expected)


# ---------------------------------------------------------------- weights in special places


@cpu
@pytest.mark.parametrize(
    ("backend", "pattern", "dtype", "atol"),
    [("cutlass", "1:2", torch.float32, 1e-5), ("cutlass", "2:4", BF16, 5e-3), ("cusparselt", "2:4", BF16, 5e-3)],
)
def test_conv1d_multiplies_by_the_transposed_compressed_weight(
    backend: Any, pattern: str, dtype: torch.dtype, atol: float
) -> None:
    """The weight is stored as (input, output); torch's own dispatch has to find the way through addmm."""
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 64, "n_layer": 2, "n_head": 2}
    config = transformers.GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)
    model = pruned(transformers.GPT2LMHeadModel(config), pattern, dtype)
    ids = torch.arange(12).view(2, 6)
    with torch.no_grad():
        expected = model(ids).logits
        with to_semi_structured(model, backend=backend) as handle:
            assert len(handle.converted) == 8
            assert model.transformer.h[0].mlp.c_fc.weight.shape == (64, 256)
            torch.testing.assert_close(model(ids).logits, expected, rtol=1e-5, atol=atol)
            assert reasons(handle) == {
                "lm_head.weight": "it is tied to transformer.wte.weight (Embedding), which needs it dense"
            }
        assert same_bits(model(ids).logits, expected)


@cpu
def test_a_tied_weight_is_swapped_in_all_its_places() -> None:
    model = Net()
    model.blocks[1].up.weight = model.blocks[0].up.weight
    pruned(model)
    x = torch.randn(2, 64).to(BF16)
    expected, ids = model(x), parameters(model)
    handle = to_semi_structured(model)
    assert model.blocks[1].up.weight is model.blocks[0].up.weight
    tied = next(weight for weight in handle.converted if weight.aliases)
    assert (tied.name, tied.aliases) == ("blocks.0.up.weight", ("blocks.1.up.weight",))
    torch.testing.assert_close(model(x), expected)
    handle.undo()
    assert parameters(model) == ids


@cpu
def test_a_module_that_stands_in_two_places_is_swapped_and_restored_once() -> None:
    model = Net()
    model.blocks[1] = model.blocks[0]
    pruned(model)
    ids = parameters(model)
    handle = to_semi_structured(model)
    assert names(handle) == {"blocks.0.up.weight", "blocks.0.down.weight"}
    handle.undo()
    assert parameters(model) == ids


class Scaled(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Double(nn.Module):
    def forward(self, weight: Tensor) -> Tensor:
        return 2 * weight


def with_its_own_forward(model: Net) -> str:
    model.blocks[0].up = Scaled(64, 128)
    return r"its layer \(Scaled\) has a forward of its own"


def with_a_replaced_forward(model: Net) -> str:
    model.blocks[0].up.forward = lambda x: x  # type: ignore[method-assign]
    return r"its layer \(Linear\) has a forward of its own"


def with_a_parametrization(model: Net) -> str:
    parametrize.register_parametrization(model.blocks[0].up, "weight", Double())
    return "it is computed, not stored: remove the parametrization first"


def with_a_tied_conv1d(model: Net) -> str:
    model.blocks[0].up = nn.Linear(64, 64)
    model.blocks[1].up = conv1d(64, 64)
    model.blocks[1].up.weight = model.blocks[0].up.weight
    return "it is tied between an nn.Linear and a Conv1D, which hold it transposed: untie it"


@cpu
@pytest.mark.parametrize(
    "change", [with_its_own_forward, with_a_replaced_forward, with_a_parametrization, with_a_tied_conv1d]
)
def test_left_with_the_reason(change: Any) -> None:
    model = Net()
    expected = change(model)
    handle = to_semi_structured(pruned(model))
    assert "blocks.0.up.weight" not in names(handle)
    assert names(handle) >= {"blocks.0.down.weight"}
    assert pytest.approx(1) == sum(
        1 for reason in reasons(handle).values() if __import__("re").fullmatch(expected, reason)
    )


@cpu
def test_sharded_weights_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    model = pruned(Net())
    sharded = model.blocks[0].up.weight
    monkeypatch.setattr(semi_structured, "is_sharded", lambda t: t is sharded)
    assert reasons(to_semi_structured(model))["blocks.0.up.weight"] == "it is sharded: gather it first"


@cpu
def test_a_bias_in_another_dtype_leaves_the_weight() -> None:
    model = pruned(Net())
    model.blocks[0].up.bias = nn.Parameter(torch.zeros(128))
    handle = to_semi_structured(model)
    assert reasons(handle)["blocks.0.up.weight"] == (
        "its bias is torch.float32 and it is torch.bfloat16: cast both to one dtype"
    )


@pytest.fixture
def without_the_fast_path() -> Iterator[None]:
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(before)


def torch_encoder(pattern: str = "2:4", dtype: torch.dtype = BF16) -> Any:
    layer = nn.TransformerEncoderLayer(64, 2, 128, batch_first=True)
    return pruned(nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), pattern, dtype)


@cpu
def test_weights_that_torchs_fused_layer_reads_are_left() -> None:
    with pytest.raises(ValueError, match="set_fastpath_enabled") as error:
        to_semi_structured(torch_encoder())
    assert "nn.MultiheadAttention cuts it up itself (layers.0.self_attn.in_proj_weight, …)" in str(error.value)


@cpu
@pytest.mark.usefixtures("without_the_fast_path")
def test_without_the_fast_path_torchs_own_layers_work() -> None:
    model = torch_encoder("1:2", torch.float32)
    x = torch.randn(2, 5, 64)
    with torch.no_grad():
        expected = model(x)
        handle = to_semi_structured(model)
        assert len(handle.converted) == 6
        assert set(reasons(handle).values()) == {"nn.MultiheadAttention cuts it up itself"}
        torch.testing.assert_close(model(x), expected)


# ---------------------------------------------------------------- errors


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_without_a_gpu_it_says_what_is_needed() -> None:
    with pytest.raises(
        RuntimeError, match=r"no CUDA GPU is available, .*compute capability 8\.0 .* CUDA build of torch"
    ):
        to_semi_structured(pruned(Net()))


def test_a_gpu_that_is_too_old_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    with pytest.raises(RuntimeError, match=r"Tesla T4 has compute capability 7\.5, and sparse tensor cores are in"):
        to_semi_structured(pruned(Net()))


def test_weights_on_a_cpu_beside_a_gpu_are_left_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    with pytest.raises(ValueError, match="it is on cpu: move the model to a CUDA GPU first"):
        to_semi_structured(pruned(Net()))


@cpu
def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"the model is in training mode.*model\.eval\(\)"):
        to_semi_structured(pruned(Net()).train())
    model = pruned(Net())
    model.blocks[1].up.train()
    with pytest.raises(ValueError, match=r"module 'blocks\.1\.up' is in training mode"):
        to_semi_structured(model)


@cpu
def test_a_model_with_nothing_to_convert_is_refused_with_the_reasons() -> None:
    model = Net().to(BF16).eval()
    with pytest.raises(ValueError, match=r"no linear weight .* can be converted: .*it does not hold 2:4") as error:
        to_semi_structured(model, backend="cutlass")
    assert HEAD in str(error.value)
    with pytest.raises(ValueError, match="no linear weight of the model can be converted: it has none"):
        to_semi_structured(nn.ReLU().eval())


def test_wrong_arguments_are_refused() -> None:
    with pytest.raises(TypeError, match=r"model is a dict; a torch\.nn\.Module is needed"):
        to_semi_structured({})  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="backend='cublas' is unknown; choose one of 'cutlass', 'cusparselt', or None"):
        to_semi_structured(nn.Linear(4, 4).eval(), backend="cublas")  # type: ignore[arg-type]


# ---------------------------------------------------------------- on a GPU

cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def works(backend: str) -> bool:
    """CUTLASS is built for compute capability 8.x alone, and cuSPARSELt is not in every build."""
    if backend == "cutlass":
        return torch.cuda.get_device_capability()[0] == 8
    return torch.backends.cusparselt.is_available()


@cuda
@pytest.mark.parametrize("kind", ["linear", "conv1d", "tied"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["cutlass", "cusparselt"])
def test_on_a_gpu_outputs_equal_those_with_dense_zeros(backend: Any, dtype: torch.dtype, kind: str) -> None:
    if not works(backend):
        pytest.skip(f"torch has no {backend} for this GPU")
    model: Any = Net()
    x = torch.randn(3, 7, 64, device="cuda").to(dtype)
    if kind == "conv1d":
        for block in model.blocks:
            block.up = conv1d(64, 128)
    if kind == "tied":
        model.blocks[1].up.weight = model.blocks[0].up.weight
    pruned(model, dtype=dtype).cuda()
    ids = parameters(model)
    with torch.no_grad():
        expected = model(x)
        with to_semi_structured(model, backend=backend) as handle:
            assert names(handle) >= {"blocks.0.up.weight", "blocks.0.down.weight"}
            assert isinstance(model.blocks[0].up.weight, torch.sparse.SparseSemiStructuredTensor)
            torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)
        assert parameters(model) == ids
        assert same_bits(model(x), expected)


@cuda
def test_on_a_gpu_a_working_backend_is_chosen() -> None:
    model = pruned(Net()).cuda()
    x = torch.randn(9, 64, device="cuda").to(BF16)
    with torch.no_grad():
        expected = model(x)
        handle = to_semi_structured(model)
        assert names(handle) == WEIGHTS
        torch.testing.assert_close(model(x), expected, rtol=2e-2, atol=2e-2)


@cuda
def test_on_a_gpu_weights_left_on_the_cpu_are_named() -> None:
    model = pruned(Net()).cuda()
    model.blocks[1].cpu()
    handle = to_semi_structured(model)
    assert names(handle) == {"blocks.0.up.weight", "blocks.0.down.weight"}
    assert reasons(handle)["blocks.1.up.weight"] == "it is on cpu: move the model to a CUDA GPU first"
