"""The distillation mixin against a loop by hand: every head, accumulation, the teacher's inputs, bad input."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, kl_div, log_softmax

from admm_nxm.distillation import distillation_loss, hidden_state_loss

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from admm_nxm import verify  # noqa: E402
from admm_nxm.integrations.distillation import (  # noqa: E402
    DistillationConfig,
    DistillationTrainer,
    DistillationTrainerMixin,
)
from admm_nxm.integrations.transformers import ADMMTrainer  # noqa: E402
from tests.test_trainer import SIZES, STEPS, arguments, bert, gpt2, rows, t5  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:the run is short")


def without_dropout(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "dropout_prob"):  # attention of older transformers
            module.dropout_prob = 0.0
    return model


def other(make: Any, seed: int = 7) -> nn.Module:
    torch.manual_seed(seed)
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(3.0)
    return without_dropout(model)


def distiller(
    folder: Path, make: Any = bert, teacher: Any = None, config: DistillationConfig | None = None, **options: Any
) -> Any:
    data, cls = options.pop("data", None) or rows(), options.pop("cls", DistillationTrainer)
    torch.manual_seed(0)
    return cls(
        without_dropout(make()),
        arguments(folder, **options),
        train_dataset=data,
        eval_dataset=data[:16],
        teacher=other(make) if teacher is None else teacher,
        distillation_config=config,
    )


def batch_of(data: list[dict[str, Tensor]], count: int) -> dict[str, Tensor]:
    return {key: torch.stack([row[key] for row in data[:count]]) for key in data[0]}


def test_the_training_loss_is_the_mixture(tmp_path: Path) -> None:
    made = distiller(tmp_path, config=DistillationConfig(distillation_weight=0.3, temperature=4.0))
    batch = batch_of(rows(), 8)
    student = made.model.train()(**batch)
    with torch.no_grad():
        taught = made.teacher(**batch).logits
    soft = 16 * kl_div(
        log_softmax(student.logits / 4, -1), log_softmax(taught / 4, -1), reduction="batchmean", log_target=True
    )
    expected = 0.7 * cross_entropy(student.logits, batch["labels"]) + 0.3 * soft
    assert torch.allclose(made.compute_loss(made.model, dict(batch)), expected)
    assert torch.allclose(made.compute_loss(made.model, dict(batch), num_items_in_batch=torch.tensor(8)), expected)
    made.model.eval()
    assert torch.allclose(made.compute_loss(made.model, dict(batch)), student.loss)


def test_the_weight_goes_from_the_own_loss_to_the_teachers(tmp_path: Path) -> None:
    batch = batch_of(rows(), 8)
    losses = []
    for weight in (0.0, 0.5, 1.0):
        made = distiller(tmp_path, config=DistillationConfig(distillation_weight=weight))
        made.model.train()
        losses.append(float(made.compute_loss(made.model, dict(batch)).detach()))
    own = float(made.model(**batch).loss.detach())
    assert losses[0] == pytest.approx(own)
    assert losses[1] == pytest.approx((losses[0] + losses[2]) / 2)
    assert abs(losses[0] - losses[2]) > 1e-3


def test_the_student_comes_closer_to_its_teacher(tmp_path: Path) -> None:
    def distance(made: Any) -> float:
        made.model.eval()
        with torch.no_grad():
            batch = batch_of(rows(), 64)
            return float(distillation_loss(made.model(**batch).logits, made.teacher(**batch).logits))

    made = distiller(tmp_path, config=DistillationConfig(distillation_weight=1.0), max_steps=60, learning_rate=1e-2)
    before = distance(made)
    teacher = copy.deepcopy(made.teacher.state_dict())
    made.train()
    assert distance(made) < 0.5 * before
    assert all(torch.equal(teacher[name], t) for name, t in made.teacher.state_dict().items())
    assert not made.teacher.training
    assert all(p.grad is None for p in made.teacher.parameters())


def gradients(made: Any, batches: list[dict[str, Tensor]], weight: float) -> Tensor:
    """The gradient that Trainer gathers over accumulated batches, with that share of the teacher."""
    made.distillation_config = DistillationConfig(
        distillation_weight=weight, hidden_weight=made.distillation_config.hidden_weight if weight else 0.0
    )
    made.current_gradient_accumulation_steps = len(batches)
    made.model.zero_grad()
    shifted = batches[0]["labels"].ndim == 2 and type(made.model).__name__.endswith("LMHeadModel")
    labels = [batch["labels"][:, 1:] if shifted else batch["labels"] for batch in batches]
    items = torch.stack([(x != -100).sum() for x in labels]).sum()
    for batch in batches:
        made.training_step(made.model, dict(batch), items)
    return torch.cat([p.grad.flatten() for p in made.model.parameters() if p.grad is not None])


@pytest.mark.parametrize("hidden", [0.0, 0.5])
@pytest.mark.parametrize("make", [bert, gpt2, t5])
def test_accumulation_leaves_the_shares_of_own_and_soft_loss(tmp_path: Path, make: Any, hidden: float) -> None:
    data = rows(16, language=make is not bert)
    made = distiller(tmp_path, make, config=DistillationConfig(hidden_weight=hidden), data=data)
    whole = batch_of(data, 16)
    parts = [{key: value[i : i + 4] for key, value in whole.items()} for i in range(0, 16, 4)]
    own = [gradients(made, batches, 0.0) for batches in ([whole], parts)]
    soft = [gradients(made, batches, 1.0) for batches in ([whole], parts)]
    # Whatever Trainer and the model make of the own loss (not every model heeds the number of items), the teacher's
    # part is made the same of.
    inflation = float(own[1].norm() / own[0].norm())
    torch.testing.assert_close(soft[1], inflation * soft[0], rtol=2e-3, atol=1e-5)


def test_uneven_accumulated_batches_of_a_model_that_heeds_are_one_large_batch(tmp_path: Path) -> None:
    data = rows(16, language=True)
    data = [
        {**row, "labels": torch.where(torch.arange(8) < 3 + i % 5, row["labels"], -100)} for i, row in enumerate(data)
    ]
    made = distiller(tmp_path, gpt2, data=data)
    whole = batch_of(data, 16)
    parts = [{key: value[i : i + 4] for key, value in whole.items()} for i in range(0, 16, 4)]
    one, four = (gradients(made, batches, 0.5) for batches in ([whole], parts))
    torch.testing.assert_close(four, one, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("average", [True, False])
def test_the_soft_loss_on_several_devices(tmp_path: Path, average: bool) -> None:
    """The arithmetic alone: what DataParallel and many ranks do to the own loss is done to the soft loss."""
    made = distiller(tmp_path, gpt2, data=rows(language=True), average_tokens_across_devices=average)
    made._heeds = True
    logits = torch.zeros(4, 8, 3)
    made.args._n_gpu = 2
    items, factor, _ = made._scale({}, logits, torch.full((2, 1), 12))
    assert (int(items), factor) == (12 if average else 24, 1.0)
    made._heeds = False
    assert made._scale({}, logits, torch.full((2, 1), 12))[1] == (2.0 if average else 1.0)
    made.args._n_gpu = 0


def test_language_models_are_scored_on_the_next_token(tmp_path: Path) -> None:
    made = distiller(tmp_path, gpt2, config=DistillationConfig(distillation_weight=1.0), data=rows(language=True))
    batch = batch_of(rows(language=True), 4)
    batch["labels"] = batch["labels"].clone()
    batch["labels"][:, :3] = -100
    student = made.model.train()(**batch).logits
    with torch.no_grad():
        taught = made.teacher(**batch).logits
    expected = distillation_loss(student[:, 2:-1].flatten(0, 1), taught[:, 2:-1].flatten(0, 1))
    assert torch.allclose(made.compute_loss(made.model, dict(batch)), expected, rtol=1e-4)


def small(cls: str, **options: Any) -> Any:
    def make() -> nn.Module:
        config = transformers.BertConfig(**SIZES, intermediate_size=32, max_position_embeddings=16, **options)
        return getattr(transformers, cls)(config)

    return make


def labelled(labels: Any) -> list[dict[str, Tensor]]:
    return [{**row, "labels": labels(i)} for i, row in enumerate(rows())]


HEADS: dict[str, tuple[Any, list[dict[str, Tensor]]]] = {
    "tokens": (
        small("BertForTokenClassification", num_labels=3),
        labelled(lambda i: torch.tensor([-100, 0, 1, 2, i % 3, 0, 1, -100])),
    ),
    "regression": (small("BertForSequenceClassification", num_labels=1), labelled(lambda i: torch.tensor(i / 64))),
    "multi-label": (
        small("BertForSequenceClassification", num_labels=3, problem_type="multi_label_classification"),
        labelled(lambda i: torch.tensor([i % 2, 1, 0]).float()),
    ),
    "masked tokens": (
        small("BertForMaskedLM"),
        labelled(lambda i: torch.where(torch.arange(8) == i % 8, torch.tensor(i % 5), torch.tensor(-100))),
    ),
    "answers": (
        small("BertForQuestionAnswering"),
        [
            {
                **{k: v for k, v in row.items() if k != "labels"},
                "start_positions": torch.tensor(1),
                "end_positions": torch.tensor(3),
            }
            for row in rows()
        ],
    ),
}


def test_a_number_of_items_does_not_change_a_single_batch(tmp_path: Path) -> None:
    for head, (make, data) in HEADS.items():
        made = distiller(tmp_path, make, config=DistillationConfig(distillation_weight=1.0), data=data)
        batch = batch_of(data, 8)
        labels = batch.get("labels")
        items = torch.tensor(8) if labels is None else (labels != -100).sum()
        losses = [
            float(made.compute_loss(made.model.train(), dict(batch), num_items_in_batch=n).detach())
            for n in (None, items)
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-4), head


def test_the_teacher_gets_every_input_it_takes(tmp_path: Path) -> None:
    class Anything(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner, self.seen = inner, set()

        def forward(self, input_ids: Tensor, **kwargs: Tensor) -> Any:
            self.seen = {"input_ids", *kwargs}
            return self.inner(input_ids=input_ids, **kwargs)

    batch = batch_of(rows(), 4)
    teacher = other(bert)
    expected: list[float] = []
    for wrapped in (teacher, Anything(teacher), nn.DataParallel(teacher), torch.compile(teacher, backend="eager")):
        made = distiller(tmp_path, teacher=wrapped)
        expected.append(float(made.compute_loss(made.model.train(), dict(batch)).detach()))
        if isinstance(wrapped, Anything):
            assert wrapped.seen == {"input_ids", "attention_mask"}
    assert expected == pytest.approx([expected[0]] * 4)


@pytest.mark.parametrize("device", [None, "cpu"])
def test_the_teacher_runs_where_it_is_told(tmp_path: Path, device: str | None) -> None:
    made = distiller(tmp_path, config=DistillationConfig(teacher_device=device))
    assert {p.device.type for p in made.teacher.parameters()} == {"cpu"}
    assert torch.isfinite(made.compute_loss(made.model.train(), batch_of(rows(), 4)))


def test_a_head_of_ones_own_is_named(tmp_path: Path) -> None:
    make, data = HEADS["multi-label"]

    def unnamed() -> nn.Module:
        model = make()
        model.config.problem_type = None
        return model

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(outputs["logits"], labels)

    made = distiller(
        tmp_path, unnamed, config=DistillationConfig(distillation_weight=1.0, head="multi_label"), data=data
    )
    made.compute_loss_func = loss
    batch = batch_of(data, 8)
    student = made.model.train()(**{k: v for k, v in batch.items() if k != "labels"}).logits
    with torch.no_grad():
        taught = made.teacher(**{k: v for k, v in batch.items() if k != "labels"}).logits
    expected = distillation_loss(student, taught, head="multi_label")
    assert torch.allclose(made.compute_loss(made.model, dict(batch)), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="head='ranking' must be one of 'classification'"):
        DistillationConfig(head="ranking")


def test_images_are_refused(tmp_path: Path) -> None:
    class Pixels(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 3, 1)

        def forward(self, x: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
            logits = self.conv(x)
            return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}

    data = [{"x": torch.zeros(1, 2, 2), "labels": torch.zeros(2, 2, dtype=torch.long)}] * 4
    made = distiller(tmp_path, Pixels, teacher=Pixels(), data=data)
    with pytest.raises(ValueError, match=r"logits of shape \(4, 3, 2, 2\) are not"):
        made.compute_loss(made.model.train(), batch_of(data, 4))


@pytest.mark.parametrize("head", HEADS)
def test_every_head_is_distilled_into_its_own_kind_of_loss(tmp_path: Path, head: str) -> None:
    make, data = HEADS[head]
    made = distiller(tmp_path, make, config=DistillationConfig(distillation_weight=1.0), data=data, max_steps=3)
    batch = batch_of(data, 8)
    student = made.model.train()(**batch)
    with torch.no_grad():
        taught = made.teacher(**batch)
    if head == "answers":
        pairs = [(student[key], taught[key]) for key in ("start_logits", "end_logits")]
        expected = sum(distillation_loss(*pair) for pair in pairs) / 2
    elif head in ("tokens", "masked tokens"):
        counted = batch["labels"] != -100
        expected = distillation_loss(student.logits[counted], taught.logits[counted])
    else:
        kind: Any = {"regression": "regression", "multi-label": "multi_label"}[head]
        expected = distillation_loss(student.logits, taught.logits, head=kind)
    assert torch.allclose(made.compute_loss(made.model, dict(batch)), expected, rtol=1e-4)
    made.train()
    assert "eval_loss" in made.evaluate()


def test_hidden_states_join_the_loss(tmp_path: Path) -> None:
    batch = batch_of(rows(), 8)
    batch["attention_mask"] = batch["attention_mask"].clone()
    batch["attention_mask"][:, 6:] = 0
    losses = []
    for weight in (0.0, 2.0):
        made = distiller(tmp_path, config=DistillationConfig(hidden_weight=weight))
        losses.append(made.compute_loss(made.model.train(), dict(batch)))
    with torch.no_grad():
        states = [model(**batch, output_hidden_states=True).hidden_states for model in (made.model, made.teacher)]
    expected = hidden_state_loss(*states, mask=batch["attention_mask"].bool())
    assert torch.allclose(losses[1] - losses[0], 2 * expected, rtol=1e-4)


def test_with_admm_the_model_comes_out_sparse(tmp_path: Path) -> None:
    class Both(DistillationTrainerMixin, ADMMTrainer):
        pass

    made = distiller(tmp_path, cls=Both, eval_strategy="steps", eval_steps=10)
    made.train()
    assert made.admm.figures().step == STEPS
    assert made.sparsity_report.ok
    assert not verify(made.teacher, "2:4").ok


def test_a_teacher_that_does_not_fit_is_explained(tmp_path: Path) -> None:
    batch = batch_of(rows(), 4)
    three = distiller(tmp_path, teacher=other(small("BertForSequenceClassification", num_labels=3)))
    with pytest.raises(ValueError, match="trained for the same labels"):
        three.compute_loss(three.model.train(), dict(batch))
    bare = distiller(tmp_path, teacher=other(small("BertModel")))
    with pytest.raises(ValueError, match=r"nothing to distil: .* the teacher last_hidden_state"):
        bare.compute_loss(bare.model.train(), dict(batch))
    with pytest.raises(TypeError, match="teacher=None must be a model"):
        DistillationTrainer(bert(), arguments(tmp_path))
    model = bert()
    with pytest.raises(ValueError, match="the teacher is the model that is trained"):
        DistillationTrainer(model, arguments(tmp_path), teacher=model)


@pytest.mark.parametrize(
    ("given_", "said"),
    [
        ({"distillation_weight": 1.5}, "distillation_weight=1.5 must be at most 1"),
        ({"distillation_weight": -0.1}, "distillation_weight=-0.1 must be"),
        ({"temperature": 0.0}, "temperature=0 must be above 0"),
        ({"hidden_weight": math.nan}, "hidden_weight=nan must be"),
    ],
)
def test_bad_config(given_: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DistillationConfig(**given_)


def test_the_parser_reads_both_configs() -> None:
    from admm_nxm.integrations.transformers import ADMMConfig

    parser = transformers.HfArgumentParser((ADMMConfig, DistillationConfig))
    admm, distillation = parser.parse_args_into_dataclasses(
        ["--pattern", "1:4", "--temperature", "3", "--hidden_weight", "1"]
    )
    assert admm.pattern == "1:4"
    assert distillation == DistillationConfig(temperature=3.0, hidden_weight=1.0)
