"""ADMMTrainerMixin in the hands of Hugging Face's Trainer: what is logged, measured, saved, resumed and refused."""

from __future__ import annotations

import dataclasses
import json
import math
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, ConvergenceWarning, Every, Ramp, verify
from tests.helpers import assert_same_weights, weights_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from admm_nxm.integrations.transformers import ADMMConfig, ADMMTrainer, ADMMTrainerMixin  # noqa: E402

STEPS = 20
VOCABULARY = 50

pytestmark = [pytest.mark.filterwarnings("ignore:the mask had not settled")]


def rows(count: int = 64, *, language: bool = False) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    ids = [torch.randint(0, VOCABULARY, (8,), generator=generator) for _ in range(count)]
    return [
        {
            "input_ids": x,
            "attention_mask": torch.ones(8, dtype=torch.long),
            "labels": x if language else torch.tensor(i % 2),
        }
        for i, x in enumerate(ids)
    ]


SIZES = {"vocab_size": VOCABULARY, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert(**sizes: float) -> nn.Module:
    config = transformers.BertConfig(**{**SIZES, "intermediate_size": 32, "max_position_embeddings": 16, **sizes})
    return transformers.BertForSequenceClassification(config)


def wide_bert() -> nn.Module:
    """Its weights have 4,096 entries and more; 8-bit and 4-bit optimizers leave smaller ones in float32."""
    return bert(hidden_size=64, intermediate_size=64)


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


def llama() -> nn.Module:
    config = transformers.LlamaConfig(
        **SIZES, intermediate_size=32, max_position_embeddings=16, tie_word_embeddings=True
    )
    return transformers.LlamaForCausalLM(config)


def t5() -> nn.Module:
    config = transformers.T5Config(
        vocab_size=VOCABULARY,
        d_model=16,
        d_kv=8,
        d_ff=32,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
        dropout_rate=0.0,
    )
    return transformers.T5ForConditionalGeneration(config)


def arguments(folder: Path, **options: Any) -> Any:
    return transformers.TrainingArguments(
        **{
            "output_dir": str(folder),
            "max_steps": STEPS,
            "per_device_train_batch_size": 8,
            "learning_rate": 1e-3,
            "logging_steps": 5,
            "report_to": [],
            "disable_tqdm": True,
            "use_cpu": True,
            "dataloader_pin_memory": False,
            "save_strategy": "no",
            **options,
        }
    )


def trainer(
    folder: Path,
    make: Callable[[], nn.Module] = bert,
    *,
    config: ADMMConfig | None = None,
    cls: type = ADMMTrainer,
    extra: dict[str, Any] | None = None,
    language: bool = False,
    **options: Any,
) -> Any:
    transformers.set_seed(0)
    data = rows(language=language)
    return cls(
        make(),
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data[:16],
        **({} if config is None else {"admm_config": config}),
        **(extra or {}),
    )


class Look(transformers.TrainerCallback):
    """Notes whether the model is sparse at each evaluation batch and at the end of training."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.evaluated, self.at_end = model, [], []

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.evaluated.append(verify(self.model, "2:4").ok)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.at_end.append(verify(self.model, "2:4").ok)


# ---------------------------------------------------------------- the whole life of a run


def test_two_changed_lines_and_the_model_comes_out_sparse(tmp_path: Path) -> None:
    made = trainer(tmp_path, extra={"callbacks": []}, eval_strategy="steps", eval_steps=4)
    look = Look(made.model)
    made.add_callback(look)
    made.train()
    assert isinstance(made.admm, ADMMNxM)
    assert made.admm.total_steps == STEPS
    assert made.admm.finalized
    assert made.sparsity_report.ok
    assert len(made.sparsity_report.weights) == 12
    assert len(look.evaluated) == 5 * 2
    assert all(look.evaluated)
    assert look.at_end == [True]
    made.save_model(str(tmp_path / "final"))
    verify(tmp_path / "final", "2:4").raise_if_violated()
    assert made.evaluate()["eval_loss"] > 0
    assert made.predict(made.eval_dataset).predictions.shape == (16, 2)


def test_the_training_log_says_where_the_run_stands(tmp_path: Path) -> None:
    made = trainer(tmp_path, logging_steps=1)
    made.train()
    history = [entry for entry in made.state.log_history if "loss" in entry]
    assert len(history) == STEPS
    first, last = history[0], history[-1]
    assert set(last) >= {
        f"admm/{name}" for name in ("primal_residual", "dual_residual", "mask_churn", "rho", "sparsity")
    }
    assert first["admm/rho"] == made.admm.plan.rho(1) < 0.1
    assert first["admm/primal_residual"] > 0.2
    assert first["admm/sparsity"] == 0
    assert last["admm/primal_residual"] == 0
    assert last["admm/sparsity"] == 0.5
    assert last["admm/rho"] == made.admm.rho > 100
    assert all(math.isfinite(value) for entry in history for key, value in entry.items() if key.startswith("admm/"))
    moving = [entry["admm/mask_churn"] for entry in history if 0.0 < entry.get("admm/mask_churn", 0.0) < 1.0]
    assert moving
    assert not any("admm/rho" in entry for entry in made.state.log_history if "loss" not in entry)


def test_every_checkpoint_and_the_best_model_are_what_evaluation_measured(tmp_path: Path) -> None:
    made = trainer(
        tmp_path,
        eval_strategy="steps",
        eval_steps=4,
        save_strategy="steps",
        save_steps=4,
        load_best_model_at_end=True,
        metric_for_best_model="eval_loss",
        greater_is_better=True,  # an early one, with another mask than the last
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        made.train()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 5
    for checkpoint in checkpoints:
        verify(checkpoint, "2:4").raise_if_violated()
    assert made.state.best_global_step < STEPS
    best = transformers.BertForSequenceClassification.from_pretrained(made.state.best_model_checkpoint)
    assert_same_weights(made.model, best)
    assert made.sparsity_report.ok
    measured = {entry["step"]: entry["eval_loss"] for entry in made.state.log_history if "eval_loss" in entry}
    assert made.evaluate()["eval_loss"] == measured[made.state.best_global_step]


def test_checkpoints_without_an_evaluation_hold_the_sparse_model_too(tmp_path: Path) -> None:
    made = trainer(tmp_path, save_strategy="steps", save_steps=3)
    made.train()
    checkpoints = sorted(tmp_path.glob("checkpoint-*"))
    assert len(checkpoints) == 7
    for checkpoint in checkpoints:
        verify(checkpoint, "2:4").raise_if_violated()


def test_saving_the_model_in_the_middle_saves_the_projected_one_and_changes_nothing(tmp_path: Path) -> None:
    class SaveIt(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if state.global_step == 8:
                made.save_model(str(tmp_path / "middle"))

    plain = trainer(tmp_path / "plain")
    plain.train()
    made = trainer(tmp_path / "saving")
    made.add_callback(SaveIt())
    made.train()
    verify(tmp_path / "middle", "2:4").raise_if_violated()
    assert_same_weights(made.model, plain.model)


def test_early_stopping_leaves_a_sparse_model_and_says_that_the_run_was_short(tmp_path: Path) -> None:
    class Stop(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            control.should_training_stop = state.global_step == 6

    made = trainer(tmp_path)
    made.add_callback(Stop())
    with pytest.warns(ConvergenceWarning, match="finalize\\(\\) came after 6 steps"):
        made.train()
    assert verify(made.model, "2:4").ok


def test_training_again_keeps_the_mask(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    zeros = {name: w == 0 for name, w in weights_of(made.model).items() if ".encoder." in name and w.ndim == 2}
    before = weights_of(made.model)
    made.train()
    assert any(not torch.equal(before[name], w) for name, w in weights_of(made.model).items())
    assert all(bool((weights_of(made.model)[name][zero] == 0).all()) for name, zero in zeros.items())


# ---------------------------------------------------------------- resume


@pytest.mark.parametrize("penalty", ["lazy", "proximal", "gradient"])
@pytest.mark.parametrize("evaluates", [True, False])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, penalty: str, evaluates: bool) -> None:
    config = ADMMConfig(penalty=penalty, residual_tolerance=9.0)
    options = {"save_strategy": "steps", "save_steps": 3}
    if evaluates:
        options |= {"eval_strategy": "steps", "eval_steps": 3}
    whole = trainer(tmp_path / "whole", config=config, **options)
    whole.train()
    for step in (3, 9, 18):  # dense or constrained, constrained, frozen
        again = trainer(tmp_path / f"from-{step}", config=config, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_weights(again.model, whole.model)
        assert again.sparsity_report.ok


def test_resume_after_the_end_goes_on_under_the_mask(tmp_path: Path) -> None:
    trainer(tmp_path, save_strategy="steps", save_steps=STEPS).train()
    again = trainer(tmp_path, max_steps=STEPS + 5)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == STEPS + 5
    assert again.admm.param_groups[0]["admm_step"] == STEPS + 5
    assert again.admm.param_groups[0]["admm_frozen_at"] == 18
    assert again.sparsity_report.ok


def test_a_checkpoint_whose_writing_was_interrupted_is_passed_over(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(tmp_path, save_strategy="steps", save_steps=4)
    whole.train()
    for damage in ("missing", "half"):
        state = tmp_path / f"checkpoint-{STEPS if damage == 'missing' else STEPS - 4}" / "trainer_state.json"
        text = state.read_text()
        state.unlink() if damage == "missing" else state.write_text(text[: len(text) // 2])
    again = trainer(tmp_path, save_strategy="steps", save_steps=4)
    again.train(resume_from_checkpoint=True)
    assert_same_weights(again.model, whole.model)
    assert "passing over checkpoint-20, checkpoint-16" in caplog.text
    assert json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["global_step"] == STEPS


def test_nothing_to_resume_from_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no complete checkpoint .* Start without"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="checkpoint-4: the writing was interrupted"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


# ---------------------------------------------------------------- whatever optimizer Trainer makes


def made_by_plain_trainer() -> list[str]:
    """The optim names whose packages are installed here."""
    names = []
    for name in transformers.training_args.OptimizerNames:
        if name.value.endswith("layerwise") or "lomo" in name.value:
            continue  # these step in the backward pass, and are refused
        try:
            transformers.Trainer.get_optimizer_cls_and_kwargs(arguments(Path("unused"), optim=name.value), bert())
        except (ImportError, ValueError):
            continue
        names.append(name.value)
    return names


OPTIMIZERS = made_by_plain_trainer()


def test_some_optimizers_are_tried() -> None:
    assert {"adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "adagrad", "rmsprop"} <= set(OPTIMIZERS)


# Some of these packages warn of their own affairs.
@pytest.mark.filterwarnings("ignore", "error::admm_nxm.ConvergenceWarning", "ignore:the mask had not settled")
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optim_name_that_runs_on_a_cpu(tmp_path: Path, name: str) -> None:
    made = trainer(tmp_path, wide_bert, optim=name, lr_scheduler_type="constant", save_strategy="steps", save_steps=10)
    made.train()
    assert made.sparsity_report.ok
    assert made.admm.total_steps == STEPS
    assert made.admm.param_groups[0]["admm_step"] == STEPS
    verify(tmp_path / "checkpoint-10", "2:4").raise_if_violated()


def test_an_optimizer_of_ones_own_is_wrapped(tmp_path: Path) -> None:
    transformers.set_seed(0)
    model = bert()
    inner = torch.optim.Adamax(model.parameters(), lr=2e-3)
    scheduler = torch.optim.lr_scheduler.ConstantLR(inner, factor=0.5, total_iters=3)
    made = ADMMTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(inner, scheduler))
    made.train()
    assert made.admm.inner is inner
    assert inner.param_groups[0]["lr"] == 2e-3
    assert made.sparsity_report.ok


def test_a_class_and_keywords_are_wrapped(tmp_path: Path) -> None:
    made = trainer(tmp_path, extra={"optimizer_cls_and_kwargs": (torch.optim.NAdam, {"lr": 1e-3})})
    made.train()
    assert isinstance(made.admm.inner, torch.optim.NAdam)
    assert made.sparsity_report.ok


def test_an_admm_optimizer_of_ones_own_is_left_as_it_is(tmp_path: Path) -> None:
    transformers.set_seed(0)
    model = bert()
    mine = ADMMNxM(torch.optim.AdamW(model.parameters()), model, pattern="1:4", total_steps=STEPS - 2)
    made = ADMMTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(mine, None))
    made.train()
    assert made.admm is mine
    assert mine.total_steps == STEPS - 2
    assert verify(model, "1:4").ok


def test_the_optimizer_may_be_asked_for_before_training(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    assert not isinstance(made.create_optimizer(), ADMMNxM)
    made.train()
    assert made.admm.total_steps == STEPS
    assert made.sparsity_report.ok


def test_schedules_go_into_build_admm(tmp_path: Path) -> None:
    class Own(ADMMTrainer):
        def build_admm(self, optimizer: Any, total_steps: int) -> ADMMNxM:
            return ADMMNxM(
                optimizer,
                self.model,
                rho=Ramp(0.1, 500.0, start=2, stop=10),
                update_every=Every(2, dual_start=None),
                total_steps=total_steps,
            )

    made = trainer(tmp_path, cls=Own)
    made.train()
    assert made.admm.plan.rho == Ramp(0.1, 500.0, start=2, stop=10)
    assert made.sparsity_report.ok


# ---------------------------------------------------------------- whatever else Trainer does

_NAMES = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"

FEATURES: dict[str, dict[str, Any]] = {
    "gradient accumulation": {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4},
    "clipping": {"max_grad_norm": 0.01},
    "no clipping": {"max_grad_norm": 0.0},
    "bf16 autocast": {"bf16": True},
    "gradient checkpointing": {_CHECKPOINTING: True},
    "label smoothing": {"label_smoothing_factor": 0.1},
    "warm-up and cosine": {"lr_scheduler_type": "cosine", "warmup_steps": 4},
    "reduce on plateau": {
        "lr_scheduler_type": "reduce_lr_on_plateau",
        "eval_strategy": "steps",
        "eval_steps": 5,
        "metric_for_best_model": "eval_loss",
    },
    "epochs": {"max_steps": -1, "num_train_epochs": 3},
    "neftune": {"neftune_noise_alpha": 0.1},
}


@pytest.mark.parametrize("feature", FEATURES)
def test_with(tmp_path: Path, feature: str) -> None:
    made = trainer(tmp_path, **FEATURES[feature])
    made.train()
    assert made.admm.total_steps == made.state.max_steps == made.state.global_step
    assert made.admm.param_groups[0]["admm_step"] == made.state.max_steps
    assert made.sparsity_report.ok


@pytest.mark.filterwarnings("ignore")  # torch.compile has its own
def test_with_torch_compile(tmp_path: Path) -> None:
    made = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager", save_strategy="steps", save_steps=10)
    made.train()
    assert made.sparsity_report.ok
    verify(tmp_path / "checkpoint-10", "2:4").raise_if_violated()
    assert type(made.model_wrapped).__name__ == "OptimizedModule"


@pytest.mark.parametrize(("make", "weights"), [(gpt2, 8), (llama, 14), (t5, 32)], ids=["gpt2", "llama", "t5"])
def test_language_models(tmp_path: Path, make: Callable[[], nn.Module], weights: int) -> None:
    made = trainer(tmp_path, make, language=True, eval_strategy="steps", eval_steps=10)
    made.train()
    assert len(made.sparsity_report.weights) == weights
    assert made.sparsity_report.ok
    made.save_model(str(tmp_path / "final"))
    reloaded = type(made.model).from_pretrained(tmp_path / "final")
    assert verify(reloaded, made.admm.selection).ok


def test_the_mixin_composes_with_seq2seq_trainer(tmp_path: Path) -> None:
    class Ours(ADMMTrainerMixin, transformers.Seq2SeqTrainer):
        pass

    transformers.set_seed(0)
    options = {**arguments(tmp_path).to_dict(), "predict_with_generate": True, "generation_max_length": 6}
    fields = {f.name for f in dataclasses.fields(transformers.Seq2SeqTrainingArguments) if f.init}
    args = transformers.Seq2SeqTrainingArguments(**{k: v for k, v in options.items() if k in fields})
    data = rows(language=True)
    made = Ours(t5(), args, train_dataset=data, eval_dataset=data[:8])
    made.train()
    assert made.sparsity_report.ok
    assert made.predict(data[:8]).predictions.shape[0] == 8


@pytest.mark.parametrize("ineligible", ["error", "skip"])
def test_frozen_layers(tmp_path: Path, ineligible: str) -> None:
    def partly_frozen() -> nn.Module:
        model = bert()
        model.bert.embeddings.requires_grad_(False)
        model.bert.encoder.layer[0].requires_grad_(False)
        return model

    made = trainer(tmp_path, partly_frozen, config=ADMMConfig(ineligible=ineligible))
    if ineligible == "error":
        with pytest.raises(ValueError, match="frozen"):
            made.train()
        return
    before = weights_of(made.model)
    made.train()
    assert {weight.name.split(".")[3] for weight in made.sparsity_report.weights} == {"1"}
    assert all(torch.equal(w, before[n]) for n, w in weights_of(made.model).items() if ".layer.0." in n)


@pytest.mark.parametrize("fails_at", [6, 22], ids=["constrained", "frozen"])
@pytest.mark.parametrize(
    "length", [{"max_steps": 24}, {"max_steps": -1, "num_train_epochs": 3}], ids=["steps", "epochs"]
)
def test_a_smaller_batch_found_by_itself_begins_the_run_anew(
    tmp_path: Path, fails_at: int, length: dict[str, int]
) -> None:
    fails = [True]

    class TooLarge(transformers.TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            # Late enough that the model holds the proximal point, not w.
            if state.global_step == fails_at and fails:
                fails.clear()
                raise RuntimeError("CUDA out of memory.")

    made = trainer(tmp_path, auto_find_batch_size=True, **length)
    made.add_callback(TooLarge())
    made.train()
    assert not fails
    assert made._train_batch_size < 8
    assert made.admm.total_steps == made.state.max_steps == made.state.global_step
    assert made.admm.param_groups[0]["admm_step"] == made.state.max_steps
    assert made.admm.param_groups[0]["admm_frozen_at"] == made.state.max_steps * 9 // 10
    assert made.sparsity_report.ok


class Interrupt(transformers.TrainerCallback):
    def __init__(self, step: int) -> None:
        self.step: int | None = step

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.step = None
            raise KeyboardInterrupt


def test_a_run_that_was_interrupted_begins_anew_in_the_same_trainer(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.add_callback(Interrupt(12))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.train()
    counters = made.admm.param_groups[0]
    assert (counters["admm_step"], counters["admm_frozen_at"]) == (STEPS, 18)
    assert made.sparsity_report.ok


def test_a_run_that_was_interrupted_resumes_in_the_same_trainer_with_the_same_bits(tmp_path: Path) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    made = trainer(tmp_path / "again", **options)
    made.add_callback(Interrupt(10))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    made.train(resume_from_checkpoint=True)
    assert_same_weights(made.model, whole.model)


def test_resume_from_a_dense_checkpoint_says_what_to_do_instead(tmp_path: Path) -> None:
    dense = trainer(tmp_path, cls=transformers.Trainer, save_strategy="steps", save_steps=15)
    dense.train()
    made = trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        with pytest.warns(match="no ADMM state: ADMM begins at step 15 with a plan for all 20"):
            made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert made.sparsity_report.ok


def test_a_callback_may_evaluate_between_the_backward_pass_and_the_step(tmp_path: Path) -> None:
    class Evaluates(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            made.evaluate()

    plain = trainer(tmp_path / "plain", still_bert)
    plain.train()
    made = trainer(tmp_path / "evaluating", still_bert)
    made.add_callback(Evaluates())
    made.train()
    assert_same_weights(made.model, plain.model)


def still_bert() -> nn.Module:
    return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)


def test_what_is_saved_at_the_end_is_what_is_measured_also_with_averaged_weights(tmp_path: Path) -> None:
    pytest.importorskip("schedulefree")
    made = trainer(tmp_path, optim="schedule_free_adamw", lr_scheduler_type="constant")
    made.train()
    made.save_model(str(tmp_path / "final"))
    saved = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "final")
    measured = made.evaluate()["eval_loss"]
    assert_same_weights(made.model, saved)
    fresh = transformers.Trainer(saved, arguments(tmp_path), eval_dataset=rows()[:16])
    assert fresh.evaluate()["eval_loss"] == measured


def test_text_is_generated_by_the_sparse_model_during_training(tmp_path: Path) -> None:
    class Ours(ADMMTrainerMixin, transformers.Seq2SeqTrainer):
        pass

    transformers.set_seed(0)
    args = transformers.Seq2SeqTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=STEPS,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        eval_strategy="steps",
        eval_steps=4,
        predict_with_generate=True,
        generation_max_length=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
    )
    data = rows(language=True)
    made = Ours(t5(), args, train_dataset=data, eval_dataset=data[:8])
    look = Look(made.model)
    made.add_callback(look)
    made.train()
    assert len(look.evaluated) == 5
    assert all(look.evaluated)


# ---------------------------------------------------------------- the config


def test_the_parser_reads_the_config_beside_the_training_arguments(tmp_path: Path) -> None:
    parser = transformers.HfArgumentParser((transformers.TrainingArguments, ADMMConfig))
    line = (
        f"--output_dir {tmp_path} --use_cpu --pattern 1:4 --rho 0.5 --freeze_ratio 0.8 --state_dtype bfloat16".split()
    )
    line += ["--select", '{".*query.*": "2:4", ".*": null}', "--ineligible", "skip", "--update_every", "3"]
    training, config = parser.parse_args_into_dataclasses(line)
    assert training.output_dir == str(tmp_path)
    assert config == ADMMConfig(
        pattern="1:4",
        rho=0.5,
        freeze_ratio=0.8,
        state_dtype="bfloat16",
        select={".*query.*": "2:4", ".*": None},
        ineligible="skip",
        update_every=3,
    )
    assert config.options(50) == {
        "pattern": "1:4",
        "total_steps": 50,
        "ineligible": "skip",
        "residual_tolerance": 0.02,
        "penalty": "lazy",
        "rho": 0.5,
        "update_every": 3,
        "select": {".*query.*": "2:4", ".*": None},
        "state_dtype": torch.bfloat16,
        "state_rounding": "nearest",
        "freeze_at": 40,
    }
    assert parser.parse_args_into_dataclasses(["--output_dir", str(tmp_path), "--use_cpu"])[1] == ADMMConfig()


@pytest.mark.filterwarnings("ignore::admm_nxm.ConvergenceWarning")
def test_every_field_of_the_config_reaches_the_optimizer(tmp_path: Path) -> None:
    config = ADMMConfig(
        pattern="1:4",
        penalty="proximal",
        rho=0.25,
        saliency="magnitude",
        update_every=4,
        freeze_ratio=0.5,
        select={".*query.weight": "1:2", ".*": None},
        state_dtype="bfloat16",
        state_rounding="stochastic",
        residual_tolerance=0.5,
    )
    made = trainer(tmp_path, config=config)
    made.train()
    admm = made.admm
    assert (admm.penalty, admm.saliency, admm.state_dtype, admm.residual_tolerance) == (
        "proximal",
        None,
        torch.bfloat16,
        0.5,
    )
    assert admm.state_rounding == "stochastic"
    assert (admm.plan.rho(7), admm.plan.updates.interval, admm.plan.freeze_at) == (0.25, 4, 10)
    assert [str(weight.pattern) for weight in admm.selection] == ["1:2", "1:2"]


@pytest.mark.filterwarnings("ignore::admm_nxm.ConvergenceWarning")
def test_the_papers_form(tmp_path: Path) -> None:
    made = trainer(tmp_path, config=ADMMConfig(paper=True))
    made.train()
    assert (made.admm.penalty, made.admm.rho) == ("gradient", 0.01)
    assert made.sparsity_report.ok


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"freeze_ratio": 1.5}, "freeze_ratio=1.5 must be above 0 and at most 1"),
        ({"freeze_ratio": 0.0}, "freeze_ratio=0.0 must be above 0"),
        ({"select": "{"}, "select='{' is no JSON"),
        ({"select": "[1]"}, r"select=\[1\] must map"),
        ({"state_dtype": "int8"}, "state_dtype='int8' must be one of"),
        ({"state_rounding": "up"}, "state_rounding='up' must be one of 'nearest', 'stochastic'"),
        ({"paper": True, "penalty": "proximal"}, "paper=True fixes the form"),
        ({"pattern": "4:2"}, "2:4"),
        ({"penalty": "foo"}, "penalty='foo' must be one of 'lazy'"),
        ({"saliency": "y"}, "saliency='y' must be one of None, 'curvature'"),
        ({"ineligible": "x"}, "ineligible='x' must be one of 'error', 'skip'"),
        ({"rho": -1.0}, "rho=-1.0 must be"),
        ({"update_every": 0}, "update_every=0 must be at least 1"),
        ({"residual_tolerance": -1.0}, "residual_tolerance=-1.0 must be"),
    ],
)
def test_bad_config_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ADMMConfig(**given)


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be an ADMMConfig"):
        ADMMTrainer(bert(), arguments(tmp_path), admm_config={"pattern": "1:4"})


def test_a_config_beside_an_admm_optimizer_of_ones_own_is_refused(tmp_path: Path) -> None:
    model = bert()
    mine = ADMMNxM(torch.optim.AdamW(model.parameters()), model, total_steps=STEPS)
    options = {"train_dataset": rows(), "optimizers": (mine, None), "admm_config": ADMMConfig("1:4")}
    made = ADMMTrainer(model, arguments(tmp_path), **options)
    with pytest.raises(ValueError, match="an ADMMNxM of your own, and there is ADMMConfig"):
        made.train()


# ---------------------------------------------------------------- what cannot work


def test_optimizers_that_step_in_the_backward_pass_are_refused(tmp_path: Path) -> None:
    class InBackward(torch.optim.SGD):
        def fused_backward(self) -> None: ...

    made = trainer(tmp_path, extra={"optimizer_cls_and_kwargs": (InBackward, {"lr": 0.1})})
    with pytest.raises(ValueError, match="InBackward updates the weights during the backward pass"):
        made.train()


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The PEFT config")  # peft is a little behind transformers
def test_peft_models_are_refused_and_merged_ones_are_not(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["query", "value"], r=4)

    def adapted() -> nn.Module:
        return peft.get_peft_model(bert(), lora)

    with pytest.raises(ValueError, match=r"PEFT adapters.*merge_and_unload"):
        trainer(tmp_path, adapted, config=ADMMConfig(ineligible="skip")).train()

    def added() -> nn.Module:
        model = bert()
        model.add_adapter(lora)
        return model

    with pytest.raises(ValueError, match="PEFT adapters"):
        trainer(tmp_path, added, config=ADMMConfig(ineligible="skip")).train()

    def merged() -> nn.Module:
        model = peft.get_peft_model(bert(), lora).merge_and_unload()
        return model.requires_grad_(True)

    made = trainer(tmp_path, merged)
    made.train()
    assert verify(made.model, "2:4").ok


def test_fsdp_with_flat_parameters_and_deepspeed_are_refused(tmp_path: Path) -> None:
    class Deep(ADMMTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    class Flat(ADMMTrainer):
        def create_accelerator_and_postprocess(self) -> None:
            super().create_accelerator_and_postprocess()
            self.is_fsdp_enabled = True

    with pytest.raises(ValueError, match=r"DeepSpeed partitions flattened parameters.*FSDP2"):
        trainer(tmp_path, cls=Deep)
    with pytest.raises(ValueError, match=r"FSDP1 flattens parameters.*fsdp_version"):
        trainer(tmp_path, cls=Flat)


def test_an_optimizer_made_past_the_mixin_is_refused_before_training(tmp_path: Path) -> None:
    class Past(ADMMTrainer):
        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)
            return self.optimizer

    with pytest.raises(RuntimeError, match="Past has made an optimizer without ADMM"):
        trainer(tmp_path, cls=Past).train()
