"""ADMMTrainerMixin in the hands of Hugging Face's Trainer: what is logged, measured, saved, resumed and refused."""

from __future__ import annotations

import dataclasses
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, ConvergenceWarning, verify
from tests.helpers import assert_same_weights, weights_of

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from admm_nxm.integrations.transformers import ADMMConfig, ADMMTrainer, ADMMTrainerMixin  # noqa: E402

STEPS = 20
PRUNE_AT = 17
"""85 % of the steps; calibration takes the four before."""

VOCABULARY = 50

pytestmark = [pytest.mark.filterwarnings("ignore:the run is short")]


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


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return transformers.GPT2LMHeadModel(config)


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
    """Notes whether the model is sparse at each step, at each evaluation batch and at the end of training."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.steps: list[bool] = []
        self.evaluated: list[bool] = []
        self.at_end: list[bool] = []

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append(verify(self.model, "2:4").ok)

    def on_prediction_step(self, *_: Any, **__: Any) -> None:
        self.evaluated.append(verify(self.model, "2:4").ok)

    def on_train_end(self, *_: Any, **__: Any) -> None:
        self.at_end.append(verify(self.model, "2:4").ok)


class At(transformers.TrainerCallback):
    """Does something after a step."""

    def __init__(self, step: int, do: Callable[[Any, Any], None]) -> None:
        self.step, self.do = step, do

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if state.global_step == self.step:
            self.do(state, control)


def interrupt(state: Any, control: Any) -> None:
    raise KeyboardInterrupt


# ---------------------------------------------------------------- the whole life of a run


def test_two_changed_lines_and_the_model_comes_out_sparse(tmp_path: Path) -> None:
    made = trainer(
        tmp_path, eval_strategy="steps", eval_steps=4, logging_steps=1, save_strategy="steps", save_steps=STEPS
    )
    look = Look(made.model)
    made.add_callback(look)
    made.train()
    assert isinstance(made.admm, ADMMNxM)
    assert (made.admm.total_steps, made.admm.prune_at, made.admm.finalized) == (STEPS, PRUNE_AT, True)
    assert made.sparsity_report.ok
    assert len(made.sparsity_report.weights) == 12
    # The dense model is measured before the solve, the sparse one after it.
    assert look.steps == [step >= PRUNE_AT for step in range(1, STEPS + 1)]
    assert look.evaluated == [False] * 8 + [True] * 2
    assert look.at_end == [True]
    made.save_model(str(tmp_path / "final"))
    for folder in (tmp_path / "final", tmp_path / f"checkpoint-{STEPS}"):
        report = verify(folder)  # by the selection that lies beside it
        assert report.ok
        assert len(report.weights) == 12
    assert made.evaluate()["eval_loss"] > 0
    assert made.predict(made.eval_dataset).predictions.shape == (16, 2)

    history = [entry for entry in made.state.log_history if "loss" in entry]
    phases = ["dense"] * 12 + ["calibration"] * 4 + ["frozen"] * 4
    assert [entry["admm/phase"] for entry in history] == phases
    assert [entry["admm/sparsity"] for entry in history] == [0.0] * 16 + [0.5] * 4
    errors = [entry.get("admm/model_error") for entry in history]
    assert errors == [None] * 16 + [made.admm.figures().model_error] * 4
    assert 0 < errors[-1] < 1
    assert not any(key.startswith("admm/") for entry in made.state.log_history if "loss" not in entry for key in entry)


def test_the_papers_form_logs_its_residuals(tmp_path: Path) -> None:
    made = trainer(tmp_path, config=ADMMConfig(paper=True, rho=0.5, update_every=3), logging_steps=2)
    with pytest.warns(ConvergenceWarning, match="has not reached its pattern"):
        made.train()
    assert made.sparsity_report.ok
    first, *_, last = [entry for entry in made.state.log_history if "loss" in entry]
    assert set(last) >= {f"admm/{name}" for name in ("primal_residual", "dual_residual", "mask_churn", "rho")}
    assert (first["admm/phase"], first["admm/rho"], last["admm/phase"]) == ("admm", 0.5, "frozen")
    assert first["admm/primal_residual"] > 0.2
    assert last["admm/primal_residual"] == 0
    assert "admm/dual_residual" not in first  # z has not moved yet


# ---------------------------------------------------------------- the best model


@pytest.mark.parametrize("greater", [True, False])
def test_the_best_model_is_a_sparse_one(tmp_path: Path, caplog: pytest.LogCaptureFixture, greater: bool) -> None:
    def quality(predictions: Any) -> dict[str, float]:
        # The first evaluation, of a dense model, is the best; among the sparse ones the first is.
        seen.append(0)
        return {"quality": -len(seen) if greater else len(seen)}

    seen: list[int] = []
    made = trainer(
        tmp_path,
        extra={"compute_metrics": quality},
        eval_strategy="steps",
        eval_steps=3,
        save_strategy="steps",
        save_steps=3,
        load_best_model_at_end=True,
        metric_for_best_model="quality",
        greater_is_better=greater,
        max_steps=30,  # pruned after step 25
    )
    # It would end the run at the second evaluation.
    made.add_callback(transformers.EarlyStoppingCallback(early_stopping_patience=1))
    made.train()
    assert made.state.global_step == 30
    assert made.state.best_global_step == 27
    best = transformers.BertForSequenceClassification.from_pretrained(tmp_path / "checkpoint-27")
    assert_same_weights(made.model, best)
    assert made.sparsity_report.ok
    assert not verify(tmp_path / "checkpoint-24", "2:4").ok
    assert "pruned after step 25: the best model is chosen among the sparse ones from here on" in caplog.text

    again = trainer(tmp_path, metric_for_best_model="quality", max_steps=30)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-30"))
    assert again.state.best_global_step == 27  # resumed behind the solve, the search goes on


# ---------------------------------------------------------------- a run that ends too early


@pytest.mark.parametrize(
    ("step", "said"), [(6, "12 weights were pruned by magnitude"), (15, "from 2 of 4 calibration")]
)
def test_a_run_that_is_stopped_before_its_solve_says_so_and_is_sparse(tmp_path: Path, step: int, said: str) -> None:
    made = trainer(tmp_path)
    made.add_callback(At(step, lambda state, control: setattr(control, "should_training_stop", True)))
    with pytest.warns(ConvergenceWarning, match=rf"finalize\(\) came after {step} optimizer steps.*{said}.*Remedy"):
        made.train()
    assert verify(made.model, "2:4").ok


def test_ctrl_c_before_the_solve_leaves_a_dense_model_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    options = {"save_strategy": "steps", "save_steps": 4}
    whole = trainer(tmp_path / "whole", **options)
    whole.train()
    made = trainer(tmp_path / "again", **options)
    made.add_callback(At(10, interrupt))
    with pytest.raises(KeyboardInterrupt):
        made.train()
    assert "cut short before its solve: the run stands at step 10, and prunes after step 17" in caplog.text
    caplog.clear()
    made.save_model(str(tmp_path / "dense"))
    assert "what is saved is dense" in caplog.text
    assert not (tmp_path / "dense" / "admm_nxm.json").exists()
    # The same trainer goes on from its last checkpoint.
    made.callback_handler.callbacks = [c for c in made.callback_handler.callbacks if not isinstance(c, At)]
    made.train(resume_from_checkpoint=True)
    assert_same_weights(made.model, whole.model)


def test_an_interrupted_run_begins_anew_in_the_same_trainer(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    once = At(18, interrupt)
    made.add_callback(once)
    with pytest.raises(KeyboardInterrupt):
        made.train()
    once.step = -1
    made.train()
    now = made.admm.figures()
    assert (now.step, now.pruned_at) == (STEPS, PRUNE_AT)
    assert made.sparsity_report.ok


def test_training_again_keeps_the_masks(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.train()
    before = weights_of(made.model)
    zeros = {name: w == 0 for name, w in before.items() if ".encoder." in name and w.ndim == 2}
    made.train()
    after = weights_of(made.model)
    assert any(not torch.equal(before[name], w) for name, w in after.items())
    assert all(bool((after[name][zero] == 0).all()) for name, zero in zeros.items())


# ---------------------------------------------------------------- resume


@pytest.mark.filterwarnings("ignore::admm_nxm.ConvergenceWarning")
@pytest.mark.parametrize("paper", [False, True], ids=["exact", "paper"])
def test_a_resumed_run_ends_with_the_same_bits(tmp_path: Path, paper: bool) -> None:
    config = ADMMConfig(paper=paper)
    options = {"save_strategy": "steps", "save_steps": 3, "eval_strategy": "steps", "eval_steps": 3}
    whole = trainer(tmp_path / "whole", config=config, **options)
    whole.train()
    for step in (9, 15, 18):  # dense, inside the calibration, frozen; the paper's form: admm, frozen, frozen
        again = trainer(tmp_path / f"from-{step}", config=config, **options)
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{step}"))
        assert_same_weights(again.model, whole.model)
        assert again.sparsity_report.ok
        assert again.admm.figures() == whole.admm.figures()


def test_resume_with_another_number_of_steps(tmp_path: Path) -> None:
    trainer(tmp_path / "whole", save_strategy="steps", save_steps=10).train()
    longer = trainer(tmp_path / "longer", max_steps=STEPS + 5)
    longer.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{STEPS}"))
    now = longer.admm.figures()
    assert (now.step, now.pruned_at) == (STEPS + 5, PRUNE_AT)
    assert longer.sparsity_report.ok
    # Ten dense steps are behind; one of two calibration steps is all that is left.
    shorter = trainer(tmp_path / "shorter", max_steps=11)
    with pytest.warns(ConvergenceWarning, match="from 1 of 2 calibration steps"):
        shorter.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-10"))
    assert verify(shorter.model, "2:4").ok


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
    assert "passing over checkpoint-16: the writing" in caplog.text
    assert json.loads((tmp_path / f"checkpoint-{STEPS}" / "trainer_state.json").read_text())["global_step"] == STEPS


def test_nothing_to_resume_from_is_an_error_that_says_why(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no complete checkpoint .* Start without"):
        trainer(tmp_path).train(resume_from_checkpoint=True)
    (tmp_path / "checkpoint-4").mkdir()
    with pytest.raises(ValueError, match="checkpoint-4: the writing was interrupted"):
        trainer(tmp_path).train(resume_from_checkpoint=True)


def test_resume_from_a_dense_checkpoint_says_what_to_do_instead(tmp_path: Path) -> None:
    dense = trainer(tmp_path, cls=transformers.Trainer, save_strategy="steps", save_steps=15)
    dense.train()
    made = trainer(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        with pytest.warns(match="no ADMM state: ADMM begins at step 15 with a plan for all 20"):
            made.train(resume_from_checkpoint=str(tmp_path / "checkpoint-15"))
    assert made.sparsity_report.ok


# ---------------------------------------------------------------- whatever optimizer Trainer makes


# Some of these packages warn of their own affairs.
@pytest.mark.filterwarnings("ignore", "error::admm_nxm.ConvergenceWarning")
@pytest.mark.parametrize("name", ["adamw_torch_fused", "adafactor", "sgd"])
def test_optim_names(tmp_path: Path, name: str) -> None:
    made = trainer(tmp_path, optim=name, lr_scheduler_type="constant")
    made.train()
    assert made.sparsity_report.ok
    assert made.admm.figures().step == STEPS


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


def test_an_admm_optimizer_of_ones_own_is_left_as_it_is(tmp_path: Path) -> None:
    transformers.set_seed(0)
    model = bert()
    mine = ADMMNxM(torch.optim.AdamW(model.parameters()), model, pattern="1:4", total_steps=STEPS - 2)
    made = ADMMTrainer(model, arguments(tmp_path), train_dataset=rows(), optimizers=(mine, None))
    made.train()
    assert made.admm is mine
    assert mine.total_steps == STEPS - 2
    assert verify(model, "1:4").ok
    beside = ADMMTrainer(
        model, arguments(tmp_path), train_dataset=rows(), optimizers=(mine, None), admm_config=ADMMConfig("1:4")
    )
    with pytest.raises(ValueError, match="an ADMMNxM of your own, and there is ADMMConfig"):
        beside.train()


class SetsItOnly:
    """A create_optimizer that returns nothing."""

    def create_optimizer(self, *args: Any, **kwargs: Any) -> None:
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.1)  # type: ignore[attr-defined]


class Below(SetsItOnly, transformers.Trainer):
    pass


class MixedIn(ADMMTrainerMixin, Below):
    pass


class Above(SetsItOnly, ADMMTrainer):
    pass


@pytest.mark.parametrize("cls", [MixedIn, Above])
def test_create_optimizer_may_set_it_and_return_nothing(tmp_path: Path, cls: type) -> None:
    made = trainer(tmp_path, cls=cls)
    assert not isinstance(made.create_optimizer(), ADMMNxM)  # asked for before the length is known
    made.train()
    assert isinstance(made.admm.inner, torch.optim.SGD)
    assert made.sparsity_report.ok


def test_what_the_config_cannot_express_goes_into_build_admm(tmp_path: Path) -> None:
    class Own(ADMMTrainer):
        def build_admm(self, optimizer: Any, total_steps: int) -> ADMMNxM:
            def only_queries(name: str, module: nn.Module) -> str | None:
                return "1:4" if "query" in name else None

            return ADMMNxM(optimizer, self.model, total_steps=total_steps, select=only_queries)

    made = trainer(tmp_path, cls=Own)
    made.train()
    assert [str(weight.pattern) for weight in made.sparsity_report] == ["1:4", "1:4"]


# ---------------------------------------------------------------- whatever else Trainer does

_NAMES = {f.name for f in dataclasses.fields(transformers.TrainingArguments)}
_CHECKPOINTING = "activation_checkpointing" if "activation_checkpointing" in _NAMES else "gradient_checkpointing"


@pytest.mark.parametrize(
    "options",
    [
        {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 4, "max_grad_norm": 0.01},
        {"bf16": True, _CHECKPOINTING: True},
        {"max_steps": -1, "num_train_epochs": 3, "label_smoothing_factor": 0.1, "neftune_noise_alpha": 0.1},
        {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "steps", "metric_for_best_model": "eval_loss"},
    ],
    ids=["accumulation", "bf16 and checkpointing", "epochs", "plateau"],
)
def test_with(tmp_path: Path, options: dict[str, Any]) -> None:
    made = trainer(tmp_path, **options)
    made.train()
    assert made.admm.total_steps == made.admm.figures().step == made.state.max_steps == made.state.global_step
    assert made.sparsity_report.ok


@pytest.mark.filterwarnings("ignore")  # torch.compile has its own
def test_with_torch_compile(tmp_path: Path) -> None:
    made = trainer(tmp_path, torch_compile=True, torch_compile_backend="eager", save_strategy="steps", save_steps=18)
    made.train()
    assert made.sparsity_report.ok
    assert made.admm.figures().model_error is not None
    verify(tmp_path / "checkpoint-18").raise_if_violated()
    assert type(made.model_wrapped).__name__ == "OptimizedModule"


def test_a_language_model(tmp_path: Path) -> None:
    made = trainer(tmp_path, gpt2, language=True)
    made.train()
    assert len(made.sparsity_report.weights) == 8
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


@pytest.mark.parametrize("fails_at", [4, 15], ids=["dense", "frozen"])
def test_a_smaller_batch_found_by_itself_begins_the_run_anew(tmp_path: Path, fails_at: int) -> None:
    def too_large(state: Any, control: Any) -> None:
        once.step = -1
        raise RuntimeError("CUDA out of memory.")

    made = trainer(tmp_path, auto_find_batch_size=True, max_steps=-1, num_train_epochs=2)  # 16 steps
    once = At(fails_at, too_large)
    made.add_callback(once)
    made.train()
    assert made._train_batch_size < 8
    now = made.admm.figures()
    assert now.total_steps == now.step == made.state.max_steps == made.state.global_step
    assert now.pruned_at == made.state.max_steps * 85 // 100
    assert made.sparsity_report.ok


def test_evaluation_between_the_backward_pass_and_the_step_changes_nothing(tmp_path: Path) -> None:
    class Evaluates(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, **__: Any) -> None:
            made.evaluate()

    def still_bert() -> nn.Module:
        return bert(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)

    plain = trainer(tmp_path / "plain", still_bert)
    plain.train()
    made = trainer(tmp_path / "evaluating", still_bert)
    made.add_callback(Evaluates())
    made.train()
    assert_same_weights(made.model, plain.model)


# ---------------------------------------------------------------- the config


def test_the_parser_reads_the_config_beside_the_training_arguments(tmp_path: Path) -> None:
    parser = transformers.HfArgumentParser((transformers.TrainingArguments, ADMMConfig))
    line = f"--output_dir {tmp_path} --use_cpu --pattern 1:4 --prune_at 0.8 --calibration_steps 3".split()
    line += ["--select", '{".*query.*": "2:4", ".*": null}', "--dims", '{".*query.*": 0}', "--ineligible", "skip"]
    training, config = parser.parse_args_into_dataclasses(line)
    assert training.output_dir == str(tmp_path)
    assert config.options(50) == {
        "pattern": "1:4",
        "total_steps": 50,
        "prune_at": 0.8,
        "calibration_steps": 3,
        "statistics_memory": None,
        "select": {".*query.*": "2:4", ".*": None},
        "dims": {".*query.*": 0},
        "ineligible": "skip",
    }
    few = ["--output_dir", str(tmp_path), "--use_cpu"]
    assert parser.parse_args_into_dataclasses(few)[1] == ADMMConfig()
    by_step = parser.parse_args_into_dataclasses([*few, "--prune_at", "40"])[1].options(50)["prune_at"]
    assert (by_step, type(by_step)) == (40, int)


def test_every_field_of_the_config_reaches_the_optimizer(tmp_path: Path) -> None:
    config = ADMMConfig(
        pattern="1:4",
        prune_at=12,
        calibration_steps=2,
        statistics_memory=6000,
        select={".*query.weight": "1:2", ".*": None},
        dims={".*": 0},
    )
    made = trainer(tmp_path, config=config)
    made.train()
    admm = made.admm
    assert (admm.prune_at, admm.calibration_steps, admm.figures().windows) == (12, 2, 1)
    assert [(str(weight.pattern), weight.dim) for weight in admm.selection] == [("1:2", 0)] * 2
    assert trainer(tmp_path, config=ADMMConfig(ineligible="maybe"))
    with pytest.raises(ValueError, match="ineligible='maybe'"):
        trainer(tmp_path, config=ADMMConfig(ineligible="maybe")).train()
    with pytest.raises(TypeError, match='for w_step="exact" alone: calibration_steps'):
        trainer(tmp_path, config=ADMMConfig(paper=True, calibration_steps=2)).train()


def test_a_pattern_that_yaml_has_read_in_base_60_is_explained(tmp_path: Path) -> None:
    parser = transformers.HfArgumentParser((ADMMConfig,))
    for written, error in (
        ("pattern: 2:4", 'pattern=124 .*quotation marks in base 60. Write "2:4"'),
        ("select: {.*: 1:4}", r"select\['\.\*'\]=64 is a number.*Write \"1:4\""),
    ):
        (tmp_path / "run.yaml").write_text(written)
        with pytest.raises(TypeError, match=error):
            parser.parse_yaml_file(tmp_path / "run.yaml")
    (tmp_path / "run.yaml").write_text('pattern: "2:4"\nprune_at: 0.9')
    assert parser.parse_yaml_file(tmp_path / "run.yaml") == (ADMMConfig(prune_at=0.9),)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"select": "{"}, "select='{' is no JSON"),
        ({"dims": "[1]"}, r"dims=\[1\] must map regular expressions to dimensions"),
        ({"pattern": "4:2"}, "2:4"),
        ({"rho": 1.0}, "rho=1.0 and update_every=None belong to the paper's form.*paper=True"),
    ],
)
def test_bad_config_is_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        ADMMConfig(**given)


def test_a_config_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="must be an ADMMConfig"):
        ADMMTrainer(bert(), arguments(tmp_path), admm_config={"pattern": "1:4"})


# ---------------------------------------------------------------- what cannot work


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore:The PEFT config")  # peft is a little behind transformers
def test_peft_models_are_refused_and_merged_ones_are_not(tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    lora = peft.LoraConfig(target_modules=["query", "value"], r=4)
    with pytest.raises(ValueError, match="merge_and_unload"):
        trainer(tmp_path, lambda: peft.get_peft_model(bert(), lora), config=ADMMConfig(ineligible="skip")).train()

    def merged() -> nn.Module:
        return peft.get_peft_model(bert(), lora).merge_and_unload().requires_grad_(True)

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

    with pytest.raises(ValueError, match=r"DeepSpeed flattens parameters.*FSDP2"):
        trainer(tmp_path, cls=Deep)
    with pytest.raises(ValueError, match=r"FSDP1 flattens parameters.*fsdp_version"):
        trainer(tmp_path, cls=Flat)


def test_an_optimizer_made_past_the_mixin_is_refused_before_training(tmp_path: Path) -> None:
    made = trainer(tmp_path)
    made.create_optimizer = lambda *_: setattr(made, "optimizer", torch.optim.SGD(made.model.parameters(), lr=0.1))
    with pytest.raises(RuntimeError, match="ADMMTrainer has made an optimizer without ADMM"):
        made.train()
