"""The wrapped optimizer in the hands of Hugging Face's plain Trainer and of Accelerate, with nothing else changed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, verify
from tests.helpers import CASES, admm, assert_same_weights, batches, every_form, loss_of, make_net, tolerance, train

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")

STEPS = 24


def rows() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [
        {"input_ids": torch.randint(0, 50, (8,), generator=generator), "labels": torch.tensor(i % 2)} for i in range(64)
    ]


def trainer(folder: Path, **options: Any) -> tuple[Any, nn.Module, ADMMNxM]:
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
    penalty, total_steps = options.pop("penalty"), options.pop("total_steps", STEPS)
    optimizer = ADMMNxM(
        torch.optim.AdamW(model.parameters(), lr=1e-3),
        model,
        total_steps=total_steps,
        residual_tolerance=tolerance(penalty),
        **CASES[penalty],
    )
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
def test_c12_trainer_evaluates_and_saves_the_projected_model(penalty: str, tmp_path: Path) -> None:
    made, model, optimizer = trainer(tmp_path, penalty=penalty, eval_on_start=True, gradient_accumulation_steps=2)
    feasible: list[bool] = []

    class Look(transformers.TrainerCallback):
        def on_prediction_step(self, *_: Any, **__: Any) -> None:
            feasible.append(verify(model, "2:4").ok)

    made.add_callback(Look())
    made.train()
    assert len(feasible) > 8
    assert all(feasible)
    for checkpoint in tmp_path.glob("checkpoint-*"):
        verify(checkpoint, "2:4").raise_if_violated()
    assert optimizer.param_groups[0]["admm_step"] == STEPS
    assert optimizer.finalize().ok


@every_form
def test_c06_trainer_resumes_bit_for_bit(penalty: str, tmp_path: Path) -> None:
    whole, whole_model, _ = trainer(tmp_path / "whole", penalty=penalty)
    whole.train()
    for step in (3, 12, 18, 21):
        again, model, optimizer = trainer(tmp_path / f"from-{step}", penalty=penalty)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_weights(model, whole_model)
        assert optimizer.finalize().ok


@pytest.mark.parametrize("total_steps", [STEPS, None])
@every_form
def test_c12_trainers_best_model_is_the_one_that_finalize_ships(
    penalty: str, tmp_path: Path, total_steps: int | None
) -> None:
    made, model, optimizer = trainer(
        tmp_path,
        penalty=penalty,
        total_steps=total_steps,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        # The first evaluations are the best in this sense: the constrained phase, with another mask than the last.
        greater_is_better=True,
    )
    made.train()
    best = Path(made.state.best_model_checkpoint)
    verify(best, "2:4").raise_if_violated()
    optimizer.residual_tolerance = 9.0
    assert optimizer.finalize().ok
    reloaded = type(model).from_pretrained(best)
    assert_same_weights(model, reloaded)


@pytest.mark.parametrize("stop", [6, 19])
@every_form
def test_c06_accelerate_save_state_and_load_state_are_exact(penalty: str, tmp_path: Path, stop: int) -> None:
    def prepared() -> tuple[Any, nn.Module, ADMMNxM, Any]:
        accelerate.state.AcceleratorState._reset_state(True)
        net = make_net()
        optimizer = admm(net, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty))
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
    run(whole, 0, 20)
    assert whole[2].param_groups[0]["admm_step"] == 20
    first = prepared()
    run(first, 0, stop)
    first[0].save_state(str(tmp_path))
    second = prepared()
    with torch.no_grad():
        for p in second[1].parameters():
            p.zero_()
    second[0].load_state(str(tmp_path))
    run(second, stop, 20)
    assert_same_weights(second[1], whole[1])
    assert second[2].finalize().ok


@every_form
def test_c02_state_survives_the_round_trip_of_prepare_in_mid_run(penalty: str) -> None:
    accelerate.state.AcceleratorState._reset_state(True)
    net, plain_net = make_net(), make_net()
    optimizer, plain = (
        admm(n, total_steps=20, penalty=penalty, residual_tolerance=tolerance(penalty)) for n in (net, plain_net)
    )
    train(net, optimizer, 8)
    train(plain_net, plain, 8)
    accelerate.Accelerator(cpu=True).prepare(optimizer)
    train(net, optimizer, 12, start=8)
    train(plain_net, plain, 12, start=8)
    assert_same_weights(net, plain_net)
