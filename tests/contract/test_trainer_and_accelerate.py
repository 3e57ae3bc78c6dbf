"""The wrapped optimizer in the hands of Hugging Face's plain Trainer and of Accelerate, with nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, verify
from tests.helpers import (
    CALIBRATION,
    DENSE,
    FROZEN,
    STEPS,
    Build,
    admm,
    assert_same_weights,
    batches,
    every_form,
    loss_of,
    make_net,
    train,
)

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": torch.tensor(i % 2)} for i in range(64)
    ]


def trainer(folder: Path, build: Build, **options: Any) -> tuple[Any, nn.Module, ADMMNxM]:
    """A plain Trainer around a small BERT with dropout, evaluating and saving every third step."""
    transformers.set_seed(0)
    config = transformers.BertConfig(
        vocab_size=50,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=16,
    )
    model = transformers.BertForSequenceClassification(config)
    optimizer = build(model, lambda net: torch.optim.AdamW(net.parameters(), lr=1e-3), pattern="2:4")
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, 2, STEPS)
    arguments = transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "eval_strategy": "steps",
            "eval_steps": 3,
            "save_strategy": "steps",
            "save_steps": 3,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            **options,
        }
    )
    data = rows()
    made = transformers.Trainer(
        model, arguments, train_dataset=data, eval_dataset=data[:16], optimizers=(optimizer, scheduler)
    )
    return made, model, optimizer


@every_form
def test_c12_trainer_evaluates_and_saves_what_the_model_holds(build: Build, tmp_path: Path) -> None:
    made, model, optimizer = trainer(tmp_path, build, eval_on_start=True, gradient_accumulation_steps=2)
    seen: list[bool] = []

    class Look(transformers.TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            seen.append(verify(model, "2:4").ok == optimizer.frozen)

    made.add_callback(Look())
    made.train()
    assert len(seen) > 8
    assert all(seen)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        step = int(checkpoint.name.split("-")[1])
        assert verify(checkpoint, "2:4").ok == (step >= optimizer.prune_at)
    assert optimizer.figures().step == STEPS
    assert optimizer.finalize().ok


@every_form
def test_c06_trainer_resumes_bit_for_bit(build: Build, tmp_path: Path) -> None:
    whole, whole_model, _ = trainer(tmp_path / "whole", build, eval_strategy="no")
    whole.train()
    for step in (3, 15, 18):  # dense, inside calibration, frozen
        again, model, optimizer = trainer(tmp_path / f"from-{step}", build, eval_strategy="no")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_weights(model, whole_model)
        assert optimizer.finalize().ok


@pytest.mark.parametrize("stop", [DENSE, CALIBRATION, FROZEN])
@every_form
def test_c06_accelerate_save_state_and_load_state_are_exact(build: Build, tmp_path: Path, stop: int) -> None:
    def prepared() -> tuple[Any, nn.Module, ADMMNxM, Any]:
        net = make_net()
        optimizer = build(net)
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
        prepared_net, wrapped = accelerator.prepare(net, optimizer)
        return accelerator, prepared_net, optimizer, wrapped

    def run(parts: tuple[Any, nn.Module, ADMMNxM, Any], first: int, last: int) -> None:
        accelerator, net, _, wrapped = parts
        for x in batches(last - first, first):
            for half in x.chunk(2):
                with accelerator.accumulate(net):
                    accelerator.backward(loss_of(net, half))
                    wrapped.step()
                    wrapped.zero_grad()

    whole = prepared()
    run(whole, 0, STEPS)
    assert whole[2].figures().step == STEPS
    first = prepared()
    run(first, 0, stop)
    first[0].save_state(str(tmp_path))
    second = prepared()
    with torch.no_grad():
        for p in second[1].parameters():
            p.zero_()
    second[0].load_state(str(tmp_path))
    run(second, stop, STEPS)
    assert_same_weights(second[1], whole[1])
    assert second[2].finalize().ok


@pytest.mark.parametrize("stop", [8, CALIBRATION])
@every_form
def test_c02_state_survives_the_round_trip_of_prepare_in_mid_run(build: Build, stop: int) -> None:
    net, plain_net = make_net(), make_net()
    optimizer, plain = build(net), build(plain_net)
    train(net, optimizer, stop)
    train(plain_net, plain, stop)
    accelerate.Accelerator(cpu=True).prepare(optimizer)
    train(net, optimizer, STEPS - stop, start=stop)
    train(plain_net, plain, STEPS - stop, start=stop)
    assert_same_weights(net, plain_net)


def test_c02_what_accelerate_has_wrapped_is_refused() -> None:
    net = make_net()
    prepared = accelerate.Accelerator(cpu=True).prepare(torch.optim.AdamW(net.parameters()))
    with pytest.raises(TypeError, match=r"wrap the plain optimizer in ADMMNxM first, then pass that to Accelerator"):
        admm(net, lambda _: prepared)


@every_form
def test_c02_a_scheduler_that_asks_the_inner_optimizer_for_its_rate(build: Build) -> None:
    net = make_net()
    optimizer = build(net, lambda net: transformers.optimization.Adafactor(net.parameters(), warmup_init=True))
    schedule = transformers.optimization.AdafactorSchedule(optimizer)
    for step, x in enumerate(batches(STEPS)):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
        schedule.step()
        (group,) = optimizer.param_groups
        state = optimizer.state[group["params"][0]]
        assert schedule.get_lr() == [optimizer.inner._get_lr(group, state)]
        assert state["step"] == step + 1
    assert optimizer.finalize().ok
