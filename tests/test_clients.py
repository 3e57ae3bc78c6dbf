"""Programs that people train with, each with a tiny model through the whole life of a run.

A test runs where its program is installed. In the development environment that is TRL; docs/works-with.md has the
versions with which the others were run.
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from admm_nxm import ADMMNxM, verify
from tests.helpers import Net, assert_same_weights, batches, loss_of, make_net, weights_of
from tests.tiny import FILLER, WORDS, rows_of, tiny_bert, tiny_llama

# These programs warn of their own affairs; our warnings stay errors.
pytestmark = [
    pytest.mark.filterwarnings("ignore", "error::admm_nxm.ConvergenceWarning"),
    pytest.mark.filterwarnings("ignore:the run is short"),
]

STEPS, PRUNE_AT, CALIBRATED = 20, 17, 15
"""Length of a run, the step of the solve, and a step inside the calibration."""


def arguments(folder: Path, **options: Any) -> dict[str, Any]:
    """What every kind of TrainingArguments takes."""
    return {
        "output_dir": str(folder),
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "save_strategy": "steps",
        "save_steps": CALIBRATED,
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
        **options,
    }


def sparse(cls: type, *args: Any, **options: Any) -> Any:
    """The Trainer class of a program with the mixin, at 2:4."""
    from admm_nxm.integrations.transformers import ADMMConfig, ADMMTrainerMixin

    return type(f"Sparse{cls.__name__}", (ADMMTrainerMixin, cls), {})(*args, admm_config=ADMMConfig("2:4"), **options)


def check_run(made: Any, folder: Path, weights: int) -> None:
    """What a finished run has logged, counted and saved."""
    phases = [entry["admm/phase"] for entry in made.state.log_history if "admm/phase" in entry]
    assert phases == ["dense"] * 12 + ["calibration"] * 4 + ["frozen"] * 4
    assert made.sparsity_report.ok
    assert len(made.sparsity_report.weights) == weights
    assert made.admm.figures().model_error is not None
    made.save_model(str(folder / "final"))
    assert verify(folder / "final").ok
    made.create_model_card()
    assert "admm_nxm: sparsity" in (folder / "README.md").read_text()


# ---------------------------------------------------------------- TRL


def words(count: int, source: random.Random) -> str:
    return " ".join(source.choices([*FILLER, *WORDS["fruit"], *WORDS["metal"]], k=count)) + " "


def trl_trainer(kind: str, model: str, folder: Path) -> Any:
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    source = random.Random(0)
    columns = {"SFT": ["text"], "DPO": ["prompt", "chosen", "rejected"], "GRPO": ["prompt"]}[kind]
    rows = [{column: words(5, source) for column in columns} for _ in range(32)]
    of_config, of_trainer = {}, {}
    if kind == "GRPO":
        of_config = {"num_generations": 2, "max_completion_length": 4}
        of_trainer = {"reward_funcs": lambda completions, **_: [float(len(text)) for text in completions]}
    return sparse(
        getattr(trl, f"{kind}Trainer"),
        model,
        args=getattr(trl, f"{kind}Config")(**arguments(folder, **of_config), bf16=False),
        train_dataset=datasets.Dataset.from_list(rows),
        **of_trainer,
    )


@pytest.mark.parametrize("kind", ["SFT", "DPO", "GRPO"])
def test_trl(kind: str, tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "llama"))
    whole = trl_trainer(kind, model, tmp_path / "whole")
    whole.train()
    check_run(whole, tmp_path / "whole", 14)
    if kind == "SFT":
        again = trl_trainer(kind, model, tmp_path / "again")
        again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CALIBRATED}"))
        assert_same_weights(again.model, whole.model)


def test_trl_parser_explains_a_pattern_without_quotation_marks(tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from admm_nxm.integrations.transformers import ADMMConfig

    parser = trl.TrlParser((trl.ScriptArguments, trl.SFTConfig, trl.ModelConfig, ADMMConfig))
    file = tmp_path / "run.yaml"
    line = ["--config", str(file), "--dataset_name", "none", "--output_dir", str(tmp_path), "--use_cpu"]
    file.write_text("pattern: 2:4\nprune_at: 0.8")
    with pytest.raises(TypeError, match=r'pattern=124 .*base 60. Write "2:4"'):
        parser.parse_args_and_config(line)
    file.write_text('pattern: "2:4"\nprune_at: 0.8')
    assert parser.parse_args_and_config(line)[3] == ADMMConfig("2:4", prune_at=0.8)


# ---------------------------------------------------------------- sentence-transformers, setfit


@pytest.mark.parametrize("kind", ["SentenceTransformer", "CrossEncoder"])
def test_sentence_transformers(kind: str, tmp_path: Path) -> None:
    package = pytest.importorskip("sentence_transformers")
    import datasets

    folder = tiny_bert(tmp_path / "bert")
    rows = [text for text, _ in rows_of(64)]
    options: dict[str, Any] = {}
    if kind == "CrossEncoder":
        model = package.CrossEncoder(str(folder), num_labels=1)
        data = {"a": rows, "b": rows[::-1], "label": [float(i % 2) for i in range(64)]}
    else:
        model = package.SentenceTransformer(str(folder))
        data = {"anchor": rows[:62], "positive": rows[2:]}
        options["loss"] = package.sentence_transformer.losses.MultipleNegativesRankingLoss(model)

    def made(to: Path) -> Any:
        args = getattr(package, f"{kind}TrainingArguments")(**arguments(to))
        return sparse(
            getattr(package, f"{kind}Trainer"), model, args, train_dataset=datasets.Dataset.from_dict(data), **options
        )

    start = {name: t.clone() for name, t in model.state_dict().items()}
    whole = made(tmp_path / "whole")
    whole.train()
    check_run(whole, tmp_path / "whole", 12)
    assert verify(type(model)(str(tmp_path / "whole" / "final")), whole.admm.selection).ok
    end = weights_of(model)
    model.load_state_dict(start)
    again = made(tmp_path / "again")
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{CALIBRATED}"))
    assert_same_weights(again.model, end)


def test_setfit(tmp_path: Path) -> None:
    setfit = pytest.importorskip("setfit")
    import datasets
    from setfit.trainer import BCSentenceTransformersTrainer

    model = setfit.SetFitModel.from_pretrained(str(tiny_bert(tmp_path / "bert")))
    rows = rows_of(16)
    args = setfit.TrainingArguments(str(tmp_path), batch_size=4, max_steps=STEPS, report_to="none", logging_steps=1)
    data = datasets.Dataset.from_dict({"text": [text for text, _ in rows], "label": [name for _, name in rows]})
    trainer = setfit.Trainer(model, args, train_dataset=data)
    trainer.st_trainer = sparse(BCSentenceTransformersTrainer, setfit_model=model, setfit_args=args, callbacks=[])
    trainer.train()
    report = trainer.st_trainer.sparsity_report
    assert report.ok
    assert len(report.weights) == 12
    assert len(model.predict(["the apple"])) == 1
    model.save_pretrained(str(tmp_path / "final"))
    saved = setfit.SetFitModel.from_pretrained(str(tmp_path / "final"))
    assert verify(saved.model_body, trainer.st_trainer.admm.selection).ok


# ---------------------------------------------------------------- loops of other programs


def data(count: int = 64) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(count, 8, generator=generator)
    return list(zip(inputs, inputs.sum(1, keepdim=True).sin(), strict=True))


def wrap(net: nn.Module, steps: int = STEPS) -> ADMMNxM:
    return ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-2), net, total_steps=steps)


def test_timm(tmp_path: Path) -> None:
    """The loop of timm's train.py: its optimizers, schedulers, scaler, checkpoints and averages of weights."""
    timm = pytest.importorskip("timm")
    from timm.models.vision_transformer import VisionTransformer
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import CheckpointSaver, ModelEmaV3, NativeScaler

    def parts() -> Any:
        torch.manual_seed(0)
        net = VisionTransformer(img_size=8, patch_size=4, embed_dim=16, depth=2, num_heads=2, num_classes=3)
        optimizer = ADMMNxM(create_optimizer_v2(net, opt="adamw", lr=1e-2, weight_decay=0.05), net, total_steps=STEPS)
        scheduler, _ = create_scheduler_v2(
            optimizer, sched="cosine", num_epochs=4, warmup_epochs=1, updates_per_epoch=5, step_on_epochs=False
        )
        return net, optimizer, scheduler, ModelEmaV3(net, decay=0.9)

    def run(made: Any, first: int, last: int) -> None:
        net, optimizer, scheduler, average = made
        scaler = NativeScaler(device="cpu")
        for step in range(first, last):
            torch.manual_seed(step)
            net.train()
            loss = nn.functional.cross_entropy(net(torch.randn(4, 3, 8, 8)), torch.arange(4) % 3)
            optimizer.zero_grad()
            scaler(loss, optimizer, clip_grad=1.0, parameters=net.parameters())
            average.update(net, step=step)
            scheduler.step_update(step + 1)

    whole = parts()
    run(whole, 0, STEPS)
    net, optimizer, _, average = whole
    assert timm.__version__
    assert optimizer.finalize().ok
    assert len(optimizer.selection) == 8
    # An average over steps before the solve has no zeros of its own, and takes the masks.
    with torch.no_grad():
        for name, mask in optimizer.masks().items():
            average.module.get_parameter(name).mul_(mask)
    assert verify(average.module, optimizer.selection).ok
    first = parts()
    run(first, 0, CALIBRATED)
    saver = CheckpointSaver(first[0], first[1], model_ema=first[3], checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(epoch=3)
    again = parts()
    state = torch.load(tmp_path / "last.pth.tar", weights_only=False)
    again[0].load_state_dict(state["state_dict"])
    again[1].load_state_dict(state["optimizer"])
    again[2].step_update(CALIBRATED)
    run(again, CALIBRATED, STEPS)
    assert_same_weights(again[0], net)


@pytest.mark.parametrize("switch", [False, True])
def test_ema_pytorch(switch: bool) -> None:
    """An average beside the model, and one that the model is set to now and then."""
    package = pytest.importorskip("ema_pytorch")

    def run(wrapped: bool) -> tuple[float, Net, Any, Any]:
        net = make_net()
        optimizer: Any = torch.optim.AdamW(net.parameters(), lr=1e-2)
        if wrapped:
            optimizer = ADMMNxM(optimizer, net, total_steps=STEPS, prune_at=PRUNE_AT)
        options = {"update_model_with_ema_every": 6} if switch else {}
        average = package.EMA(net, beta=0.9, update_after_step=2, update_every=1, **options)
        largest = 0.0
        for x in batches(STEPS):
            loss_of(net, x).backward()
            optimizer.step()
            optimizer.zero_grad()
            average.update()
            largest = max(largest, *(p.abs().max().item() for p in net.parameters()))
        return largest, net, optimizer, average

    bare, *_ = run(wrapped=False)
    largest, net, optimizer, average = run(wrapped=True)
    assert optimizer.finalize().ok
    assert verify(net, optimizer.selection).ok
    assert largest <= 2 * bare
    with torch.no_grad():
        for name, mask in optimizer.masks().items():
            average.ema_model.get_parameter(name).mul_(mask)
    assert verify(average.ema_model, optimizer.selection).ok


def test_fastai(tmp_path: Path) -> None:
    pytest.importorskip("fastai")
    from fastai.basics import DataLoader, DataLoaders, Learner, OptimWrapper
    from fastai.callback import schedule  # noqa: F401 - it gives Learner its fit_one_cycle

    net = make_net()
    loaders = DataLoaders(DataLoader(data(), bs=8), DataLoader(data(16), bs=8))
    made: list[ADMMNxM] = []

    def wrapped(groups: Any, **options: Any) -> OptimWrapper:
        def build(held: Any, lr: float = 1e-2, **_: Any) -> ADMMNxM:
            made.append(ADMMNxM(torch.optim.AdamW(held, lr=lr), net, total_steps=32))
            return made[-1]

        return OptimWrapper(groups, build, **options)

    learner = Learner(loaders, net, nn.MSELoss(), opt_func=wrapped, path=tmp_path)
    with learner.no_logging():
        learner.fit_one_cycle(4, 1e-2)
    assert made[-1].figures().pruned_at == 27
    learner.save("model")
    learner.load("model")
    assert made[-1].finalize().ok
    assert verify(net, "2:4").ok


def test_ignite(tmp_path: Path) -> None:
    pytest.importorskip("ignite")
    from ignite.engine import Events, create_supervised_trainer
    from ignite.handlers import Checkpoint, DiskSaver, LinearCyclicalScheduler

    loader = torch.utils.data.DataLoader(data(40), batch_size=8)

    def parts() -> dict[str, Any]:
        net = make_net()
        optimizer = wrap(net)
        trainer = create_supervised_trainer(net, optimizer, nn.MSELoss())
        schedule = LinearCyclicalScheduler(optimizer, "lr", 1e-2, 1e-3, cycle_size=8)
        trainer.add_event_handler(Events.ITERATION_STARTED, schedule)
        return {"trainer": trainer, "model": net, "optimizer": optimizer, "schedule": schedule}

    whole = parts()
    saver = Checkpoint(whole, DiskSaver(str(tmp_path)), n_saved=None)
    whole["trainer"].add_event_handler(Events.ITERATION_COMPLETED(every=CALIBRATED), saver)
    whole["trainer"].run(loader, max_epochs=4)
    assert whole["optimizer"].figures().pruned_at == PRUNE_AT
    again = parts()
    Checkpoint.load_objects(again, torch.load(tmp_path / f"checkpoint_{CALIBRATED}.pt", weights_only=True))
    again["trainer"].run(loader, max_epochs=4)
    assert_same_weights(again["model"], whole["model"])
    assert again["optimizer"].finalize().ok


def test_skorch(tmp_path: Path) -> None:
    skorch = pytest.importorskip("skorch")

    class Sparse(skorch.NeuralNetRegressor):
        def initialize_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            super().initialize_optimizer(*args, **kwargs)
            self.optimizer_ = ADMMNxM(self.optimizer_, self.module_, total_steps=STEPS)
            return self

    def make() -> Any:
        torch.manual_seed(0)
        return Sparse(
            Net, optimizer=torch.optim.AdamW, lr=1e-2, batch_size=16, max_epochs=5, train_split=None, verbose=0
        )

    inputs, targets = (torch.stack(column).numpy() for column in zip(*data(), strict=True))
    whole = make().fit(inputs, targets)
    assert whole.optimizer_.figures().pruned_at == PRUNE_AT
    first = make().initialize()
    first.partial_fit(inputs, targets, epochs=3)
    files = {"f_params": str(tmp_path / "model.pt"), "f_optimizer": str(tmp_path / "optimizer.pt")}
    first.save_params(**files)
    again = make().initialize()
    again.load_params(**files)
    again.partial_fit(inputs, targets, epochs=2)
    assert_same_weights(again.module_, whole.module_)
    assert again.optimizer_.finalize().ok
