"""Lightning's Trainer and Fabric, as they are installed."""

from __future__ import annotations

import contextlib
import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from admm_nxm import ConvergenceWarning, verify
from tests.helpers import (
    CALIBRATION,
    DENSE,
    FORMS,
    FROZEN,
    LIGHTNING_ADVICE,
    STEPS,
    Build,
    assert_same_weights,
    batches,
    every_form,
    loss_of,
    make_net,
)

lightning = pytest.importorskip("lightning")

from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, WeightAveraging  # noqa: E402
from lightning.pytorch.loggers import CSVLogger  # noqa: E402
from lightning.pytorch.plugins.precision import MixedPrecision  # noqa: E402

from admm_nxm.integrations.lightning import ADMMCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings(*(f"ignore:{message}" for message in LIGHTNING_ADVICE))


class Module(lightning.LightningModule):
    """The small net, with AdamW in ADMMNxM."""

    def __init__(self, build: Build = FORMS["exact"], manual: bool = False, **options: Any) -> None:
        super().__init__()
        self.net, self.build, self.options = make_net(), build, options
        self.automatic_optimization = not manual
        self.measured = iter(range(1000))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        steps = self.trainer.estimated_stepping_batches
        self.optimizer = self.build(self.net, **{"total_steps": steps, **self.options})
        return self.optimizer

    def training_step(self, x: Tensor, index: int) -> Tensor:
        loss = loss_of(self.net, x)
        if not self.automatic_optimization:
            wrapped = self.optimizers()
            wrapped.zero_grad()
            self.manual_backward(loss)
            wrapped.step()
        return loss

    def validation_step(self, x: Tensor, index: int) -> None:
        self.log("worse", float(next(self.measured)))  # dense models are the best by it
        self.log("better", -float(next(self.measured)))


def fit(module: Module, folder: Path, *callbacks: Any, resume: str | None = None, **options: Any) -> Any:
    """Train, three batches an epoch, on the same ones in each; validate after each epoch."""
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=list(callbacks),
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        **{"max_steps": STEPS, "logger": False, "log_every_n_steps": 1, "enable_checkpointing": bool(callbacks)}
        | options,
    )
    data, held_out = (DataLoader(list(batches(*part)), batch_size=None) for part in ((3,), (1, 50)))
    trainer.fit(module, data, held_out, ckpt_path=resume, weights_only=None if resume is None else True)
    return trainer


def by_hand(build: Build, accumulate: int = 1, clip: float = 0.0, dtype: torch.dtype | None = None) -> nn.Module:
    net = make_net()
    optimizer = build(net)
    data = list(batches(3))
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            with torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None):
                loss = loss_of(net, data[(step * accumulate + part) % 3])
            (loss / accumulate).backward()
        if clip:
            nn.utils.clip_grad_norm_(net.parameters(), clip)
        optimizer.step()
    optimizer.finalize()
    return net


@pytest.mark.parametrize(
    ("trainer_options", "loop_options"),
    [
        ({"gradient_clip_val": 0.1}, {"clip": 0.1}),
        ({"precision": "bf16-mixed"}, {"dtype": torch.bfloat16}),
        ({}, {}),
    ],
    ids=["clipped", "bf16", "manual"],
)
@every_form
def test_a_run_is_that_of_the_loop_by_hand(
    build: Build, trainer_options: dict[str, Any], loop_options: dict[str, Any], tmp_path: Path
) -> None:
    module, callback = Module(build, manual=not trainer_options), ADMMCallback()
    fit(module, tmp_path, callback, **trainer_options, enable_checkpointing=False)
    assert_same_weights(module.net, by_hand(build, **loop_options))
    assert callback.sparsity_report is not None
    assert callback.sparsity_report.ok
    assert module.optimizer.figures().pruned_at == module.optimizer.prune_at


def test_accumulation_is_that_of_the_loop_by_hand(tmp_path: Path) -> None:
    module = Module()
    fit(module, tmp_path, ADMMCallback(), accumulate_grad_batches=3, enable_checkpointing=False)
    assert module.optimizer.figures().step == STEPS
    assert_same_weights(module.net, by_hand(FORMS["exact"], accumulate=3))


@every_form
def test_it_resumes_with_the_same_bits_in_every_phase(build: Build, tmp_path: Path) -> None:
    whole = Module(build)
    fit(whole, tmp_path, ADMMCallback(), ModelCheckpoint(tmp_path, "{step}", save_top_k=-1))
    for step in (DENSE, CALIBRATION, FROZEN):
        again, callback = Module(build), ADMMCallback()
        saver = ModelCheckpoint(tmp_path, "{step}", save_top_k=-1, enable_version_counter=False)
        fit(again, tmp_path, callback, saver, resume=str(tmp_path / f"step={step}.ckpt"))
        assert_same_weights(whole.net, again.net)
        assert callback.sparsity_report is not None


@pytest.mark.parametrize(("mode", "monitor"), [("min", "worse"), ("max", "better")])
def test_a_dense_model_is_never_the_best(
    mode: Any, monitor: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    module = Module()
    best = ModelCheckpoint(tmp_path, "{step}", monitor=monitor, mode=mode, save_top_k=2, save_last=True)
    stopping = EarlyStopping(monitor, mode=mode, patience=1)
    trainer = fit(module, tmp_path, ADMMCallback(), best, stopping, max_steps=24)
    # Solved after step 20: of the validations after the steps 21 and 24, the second is worse, and ends the run.
    assert module.optimizer.figures().pruned_at == 20
    assert trainer.global_step == 24
    assert trainer.should_stop
    assert Path(best.best_model_path).name == "step=21.ckpt"
    verify(torch.load(best.best_model_path)["state_dict"], "1:4").raise_if_violated()
    assert "chosen among sparse models" in caplog.text
    assert sorted(file.stem for file in tmp_path.glob("step*.ckpt")) == ["step=21", "step=24"]
    assert "on_validation_end" not in vars(stopping)


def test_a_run_that_ends_before_its_solve_is_pruned_and_says_so(tmp_path: Path) -> None:
    callback = ADMMCallback()
    with pytest.warns(ConvergenceWarning, match="finalize.. came after 6 optimizer steps"):
        fit(Module(total_steps=STEPS), tmp_path, callback, max_steps=6, enable_checkpointing=False)
    assert callback.sparsity_report is not None
    assert callback.sparsity_report.ok


def test_a_run_that_is_cut_short_stays_dense_and_says_what_to_do(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    class Fails(Module):
        def on_train_batch_end(self, *_: Any) -> None:
            if self.trainer.global_step == 6:
                raise RuntimeError("power cut")

    callback, stopping = ADMMCallback(), EarlyStopping("worse")
    with pytest.raises(RuntimeError, match="power cut"):
        fit(Fails(), tmp_path, callback, stopping, enable_checkpointing=False)
    assert "cut short before its solve: the run stands at step 6, and prunes after step 17" in caplog.text
    assert "on_validation_end" not in vars(stopping)
    assert callback.admm is not None
    with pytest.warns(ConvergenceWarning):
        assert callback.admm.finalize().ok  # as the message says


def test_what_a_run_measures_is_logged(tmp_path: Path) -> None:
    logger = CSVLogger(tmp_path)
    fit(Module(), tmp_path, ADMMCallback(), logger=logger, log_every_n_steps=2, enable_checkpointing=False)
    with Path(logger.log_dir, "metrics.csv").open() as stream:
        rows = [row for row in csv.DictReader(stream) if row["admm/phase"]]
    assert [float(row["admm/phase"]) for row in rows] == [0.0] * 6 + [1.0] * 2 + [2.0] * 2
    assert [float(row["admm/sparsity"]) for row in rows] == [0.0] * 8 + [0.75] * 2
    assert 0 < float(rows[-1]["admm/model_error"]) < 1
    assert float(rows[-1]["admm/pruned_at"]) == 17


def test_steps_that_the_scaler_skips_do_not_lose_the_solve(tmp_path: Path) -> None:
    """Trainer counts them, and ADMM does not."""

    class Overflows(Module):
        def on_after_backward(self) -> None:
            if self.trainer.global_step in (0, 7):
                self.net.head.weight.grad[0, 0] = torch.inf

    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**4)
    plugin = MixedPrecision("16-mixed", "cpu", scaler)
    for prune_at, late in ((17, False), (19, True)):
        module, callback = Overflows(prune_at=prune_at), ADMMCallback()
        with pytest.warns(ConvergenceWarning, match="from 2 of 3 calib") if late else contextlib.nullcontext():
            trainer = fit(module, tmp_path, callback, plugins=[plugin], enable_checkpointing=False)
        figures = module.optimizer.figures()
        assert (trainer.global_step, figures.step) == (STEPS, STEPS - 2)
        assert figures.model_error is not None
        assert 0 < figures.model_error < 1
        assert callback.sparsity_report is not None
        assert callback.sparsity_report.ok


def test_averaged_weights_come_out_sparse(tmp_path: Path) -> None:
    """Whatever stands before or behind it in the list: what ships is what is counted."""
    bare = Module()
    fit(bare, tmp_path, ADMMCallback(), enable_checkpointing=False)
    module = Module()
    averaging = WeightAveraging(avg_fn=lambda old, new, _: 0.5 * (old + new))
    with pytest.warns(ConvergenceWarning, match="Likely cause: an average over the dense part"):
        fit(module, tmp_path, ADMMCallback(), averaging, enable_checkpointing=False)
    verify(module.net, "1:4").raise_if_violated()
    for p, q in zip(module.net.parameters(), bare.net.parameters(), strict=True):
        assert p.abs().max() < 2 * q.abs().max()


# ---------------------------------------------------------------- bad input


def plain(module: Module) -> None:
    module.configure_optimizers = lambda: torch.optim.AdamW(module.parameters())  # type: ignore[method-assign]


def two(module: Module) -> None:
    module.automatic_optimization = False
    make = module.configure_optimizers
    module.configure_optimizers = lambda: [make(), make()]  # type: ignore[method-assign, assignment, return-value]


@pytest.mark.parametrize(("change", "found"), [(plain, "0 of the 1"), (two, "2 of the 2")])
def test_optimizers_without_one_admm_are_refused(change: Callable[[Module], None], found: str, tmp_path: Path) -> None:
    module = Module()
    change(module)
    with pytest.raises(ValueError, match=rf"{found} optimizers .*estimated_stepping_batches"):
        fit(module, tmp_path, ADMMCallback())


@pytest.mark.parametrize("name", ["FSDPStrategy", "DeepSpeedStrategy"])
def test_strategies_that_flatten_parameters_are_refused(name: str, tmp_path: Path) -> None:
    strategy = type(name, (lightning.pytorch.strategies.SingleDeviceStrategy,), {})("cpu")
    with pytest.raises(ValueError, match=rf"{name}, which flattens .*fully_shard"):
        fit(Module(), tmp_path, ADMMCallback(), strategy=strategy)


def test_a_checkpoint_without_admm_state_begins_anew_and_says_so(tmp_path: Path) -> None:
    bare = Module()
    plain(bare)
    trainer = fit(bare, tmp_path, max_steps=6)
    trainer.save_checkpoint(tmp_path / "bare.ckpt")
    module = Module()
    anew = pytest.warns(UserWarning, match="no ADMM state: ADMM begins at step 6 .*start without ckpt_path")
    with anew, pytest.warns(ConvergenceWarning):
        fit(module, tmp_path, ADMMCallback(), resume=str(tmp_path / "bare.ckpt"), enable_checkpointing=False)
    assert module.optimizer.figures().step == STEPS - 6


# ---------------------------------------------------------------- Fabric


@every_form
def test_fabric_is_the_loop_by_hand_and_resumes_with_the_same_bits(build: Build, tmp_path: Path) -> None:
    def run(first: int, last: int, load: Path | None = None, wrap_late: bool = False) -> nn.Module:
        fabric = lightning.Fabric(accelerator="cpu", devices=1)
        net = make_net()
        if wrap_late:  # around the model as Fabric has set it up
            model = fabric.setup_module(net)
            optimizer = fabric.setup_optimizers(build(model))
        else:
            model, optimizer = fabric.setup(net, build(net))
        if load is not None:
            fabric.load(load, {"model": model, "optimizer": optimizer})
        data = list(batches(3))
        for step in range(first, last):
            fabric.backward(loss_of(model, data[step % 3]))
            fabric.clip_gradients(model, optimizer, max_norm=0.1)
            optimizer.step()
            optimizer.zero_grad()
        if last == STEPS:
            assert optimizer.finalize().ok
        else:
            fabric.save(tmp_path / f"{last}.ckpt", {"model": model, "optimizer": optimizer})
        return net

    expected = by_hand(build, clip=0.1)
    assert_same_weights(run(0, STEPS, wrap_late=True), expected)
    for stop in (DENSE, CALIBRATION, FROZEN):
        run(0, stop)
        assert_same_weights(run(stop, STEPS, tmp_path / f"{stop}.ckpt"), expected)
