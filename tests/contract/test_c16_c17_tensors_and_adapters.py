"""Lines 16 and 17 of the contract: weights that are not plain tensors, and adapters."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, verify
from tests.helpers import (
    CALIBRATION,
    FROZEN,
    STEPS,
    TORCH_OPTIMIZERS,
    Build,
    Net,
    admm,
    assert_same_weights,
    every_form,
    loss_of,
    make_net,
    saved,
    train,
)

# ---------------------------------------------------------------- 16: wrappers of tensors


@pytest.fixture
def torchao() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its kernels that are not there
        package = pytest.importorskip("torchao")
        pytest.importorskip("torchao.quantization")
        pytest.importorskip("torchao.prototype.quantized_training")
        pytest.importorskip("torchao.float8")
    return package


def int8_mixed(net: nn.Module, torchao: Any) -> nn.Module:
    training = torchao.prototype.quantized_training
    torchao.quantization.quantize_(net.blocks, training.int8_mixed_precision_training())
    assert net.blocks[0].up.weight.data_ptr() == 0
    return net


def plain_values(net: nn.Module) -> dict[str, Tensor]:
    return {name: torch.empty(p.shape).copy_(p.detach()) for name, p in net.named_parameters()}


@pytest.mark.parametrize("name", ["AdamW-single", "AdamW-foreach", "SGD-single-options"])
@every_form
def test_c16_int8_mixed_precision_trains_and_is_pruned(build: Build, name: str, torchao: Any) -> None:
    net = int8_mixed(make_net(), torchao)
    optimizer = build(net, TORCH_OPTIMIZERS[name])
    assert len(optimizer.selection) == 4
    for step in range(STEPS):
        train(net, optimizer, 1, start=step)
        assert optimizer.frozen == verify(net, "1:4").ok
    assert optimizer.finalize().ok
    assert type(net.blocks[0].up.weight).__name__ == "Int8MixedPrecisionTrainingLinearWeight"
    assert build is not admm or len(optimizer.figures().model_errors) == 4


@pytest.mark.parametrize("stop", [CALIBRATION, FROZEN])
@every_form
def test_c16_int8_mixed_precision_resumes(build: Build, stop: int, torchao: Any) -> None:
    net, other_net = int8_mixed(make_net(), torchao), int8_mixed(make_net(seed=1), torchao)
    optimizer, other = build(net), build(other_net)
    train(net, optimizer, stop)
    with torch.no_grad():
        for p, q in zip(net.parameters(), other_net.parameters(), strict=True):
            q.copy_(p)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(net, optimizer, STEPS - stop, start=stop)
    train(other_net, other, STEPS - stop, start=stop)
    assert_same_weights(plain_values(net), plain_values(other_net))


@every_form
def test_c16_float8_training(build: Build, torchao: Any) -> None:
    torch.manual_seed(0)
    net = Net(width=16)
    config = torchao.float8.Float8LinearConfig(emulate=True)
    torchao.float8.convert_to_float8_training(net.blocks, config=config)
    assert type(net.blocks[0].up).__name__ == "Float8Linear"
    optimizer = build(net)
    for step in range(STEPS):
        x = torch.randn(16, 16, generator=torch.Generator().manual_seed(step))
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
    assert optimizer.frozen
    assert optimizer.finalize().ok
    assert verify(net, "1:4").ok
    assert build is not admm or len(optimizer.figures().model_errors) == 4


def test_c16_weights_that_take_no_zeros_are_refused_at_construction(torchao: Any) -> None:
    net = make_net()
    training = torchao.prototype.quantized_training
    torchao.quantization.quantize_(net.blocks, training.int8_weight_only_quantized_training())
    with pytest.raises(ValueError, match=r"Int8QuantizedTrainingLinearWeight, into which zeros cannot be written"):
        admm(net)


class Wrapper(Tensor):
    """A tensor around another, with no memory of its own."""

    inside: Tensor

    @staticmethod
    def __new__(cls, inside: Tensor) -> Wrapper:
        made = Tensor._make_wrapper_subclass(cls, inside.shape, dtype=inside.dtype, device=inside.device)
        made.inside = inside
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        def unwrap(t: Any) -> Any:
            if isinstance(t, (list, tuple)):
                return type(t)(unwrap(one) for one in t)
            return t.inside if isinstance(t, Wrapper) else t

        out = func(*unwrap(args), **{key: unwrap(value) for key, value in (kwargs or {}).items()})
        if func in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return Wrapper(out)
        # In-place operations return what they were called on.
        return args[0] if func._schema.name.endswith("_") or "out" in (kwargs or {}) else out


@every_form
def test_c16_a_wrapper_without_memory_of_its_own(build: Build) -> None:
    net, plain_net = make_net(), make_net()
    for module in net.blocks.modules():
        if isinstance(module, nn.Linear):
            module.weight = nn.Parameter(Wrapper(module.weight.detach()))
    with pytest.raises(RuntimeError):
        net.blocks[0].up.weight.untyped_storage().data_ptr()
    factory = TORCH_OPTIMIZERS["SGD-single"]
    optimizer, plain = build(net, factory), build(plain_net, factory)
    train(net, optimizer, STEPS)
    train(plain_net, plain, STEPS)
    assert optimizer.finalize().ok
    for p, q in zip(net.parameters(), plain_net.parameters(), strict=True):
        assert torch.equal(torch.empty(p.shape).copy_(p.detach()), q.detach())


# ---------------------------------------------------------------- 17: adapters


@pytest.fixture
def peft() -> Any:
    return pytest.importorskip("peft")


def adapted(peft: Any) -> tuple[Net, Any]:
    net = make_net()
    return net, peft.get_peft_model(net, peft.LoraConfig(target_modules=["up", "down"], r=2, init_lora_weights=False))


@pytest.mark.parametrize("ineligible", ["error", "skip"])
@every_form
def test_c17_adapters_are_refused_with_the_way_out(build: Build, ineligible: str, peft: Any) -> None:
    net, model = adapted(peft)
    inner = lambda _: torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])  # noqa: E731
    for seen in (model, net):
        with pytest.raises(ValueError, match=r"PEFT adapters.*[Mm]erge first.*requires_grad_\(True\)"):
            build(seen, inner, ineligible=ineligible)


@every_form
def test_c17_the_way_out_works_as_it_is_written(build: Build, peft: Any) -> None:
    _, model = adapted(peft)
    with pytest.raises(ValueError, match="PEFT adapters") as refusal:
        build(model)
    text = str(refusal.value)
    merge = "model = model.merge_and_unload()"
    unfreeze = "for p in model.parameters(): p.requires_grad_(True)"
    assert merge in text
    assert unfreeze in text
    scope = {"model": model}
    exec(f"{merge}\n{unfreeze}", scope)
    merged = scope["model"]
    assert isinstance(merged, nn.Module)
    optimizer = build(merged)
    assert isinstance(optimizer, ADMMNxM)
    assert len(optimizer.selection) == 4
    train(merged, optimizer, STEPS)
    assert optimizer.finalize().ok
    assert verify(merged, "1:4").ok
    assert saved(merged.state_dict()).keys() == make_net().state_dict().keys()


def test_c17_counting_leaves_adapters_out(peft: Any) -> None:
    net = make_net()
    optimizer = admm(net)
    train(net, optimizer, STEPS)
    expected = optimizer.finalize()
    model = peft.get_peft_model(net, peft.LoraConfig(target_modules=["up", "down"], r=4, init_lora_weights=False))
    for target in (model, net, model.state_dict()):
        report = verify(target, "1:4")
        assert report.ok
        assert [weight.shape for weight in report.weights] == [weight.shape for weight in expected.weights]
