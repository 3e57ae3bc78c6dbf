"""The recorder: the rows of a live run, and files of them."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from admm_nxm.report.history import Recorder, load_history
from tests.helpers import admm, batches, every_form, loss_of, make_net, restless, same_bits, weights_of

KEYS = ["admm/primal_residual", "admm/dual_residual", "admm/mask_churn", "admm/rho"]


def recorded(steps=20, every=2, **options):
    net = make_net()
    optimizer = admm(net, total_steps=steps, residual_tolerance=9.0, **options)
    recorder = Recorder(optimizer)
    for step, x in enumerate(batches(steps), 1):
        optimizer.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        optimizer.step()
        if step % every == 0:
            recorder.record(loss)
    return optimizer, recorder


@restless
@every_form
def test_rows_hold_what_the_optimizer_says(penalty):
    net = make_net()
    optimizer = admm(net, total_steps=10, penalty=penalty, residual_tolerance=9.0)
    recorder = Recorder(optimizer)
    phases = []
    for step, x in enumerate(batches(10), 1):
        optimizer.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        optimizer.step()
        row = recorder.record(loss, lr=0.5)
        now = optimizer.residuals()
        expected = {"step": step, "loss": loss.item(), "lr": 0.5}
        figures = dict(zip(KEYS, (now.primal, now.dual, now.mask_churn, optimizer.rho), strict=True))
        expected |= {key: value for key, value in figures.items() if not math.isnan(value)}
        expected["admm/phase"] = optimizer.phase
        if optimizer.frozen:
            expected["admm/frozen_at"] = optimizer.param_groups[0]["admm_frozen_at"]
        assert row == expected
        assert recorder.rows[-1] is row
        phases.append(optimizer.phase)
    assert len(recorder.rows) == 10
    assert phases[-1] == "frozen"
    assert "constrained" in phases


def test_what_is_not_known_yet_is_left_out():
    optimizer = admm(make_net(), total_steps=10)
    row = Recorder(optimizer).record()
    assert row.keys() == {"step", "admm/primal_residual", "admm/rho", "admm/phase"}
    assert (row["step"], row["admm/rho"], row["admm/phase"]) == (0, 0.0, "dense")


@restless
def test_recording_changes_nothing_in_the_run():
    with_recorder, _ = recorded(every=1)
    without, _ = recorded(every=100)
    for name, mask in with_recorder.masks().items():
        assert torch.equal(mask, without.masks()[name])
    for mine, other in zip(with_recorder.param_groups[0]["params"], without.param_groups[0]["params"], strict=True):
        assert same_bits(mine.detach(), other.detach())


@restless
def test_in_evaluation_mode_the_training_weights_are_measured():
    net = make_net()
    optimizer = admm(net, total_steps=40, residual_tolerance=9.0)
    for x in batches(10):
        optimizer.zero_grad()
        loss_of(net, x).backward()
        optimizer.step()
    recorder = Recorder(optimizer)
    before = weights_of(net)
    training = recorder.record()
    optimizer.eval()
    assert any(not same_bits(p, before[name]) for name, p in weights_of(net).items())
    assert recorder.record() == training
    assert training["admm/primal_residual"] > 0


@restless
def test_save_and_load(tmp_path):
    _, recorder = recorded()
    recorder.record(eval_accuracy=0.5, note="mit Umlaut: ü", best=True, count=3)
    path = recorder.save(tmp_path / "history.jsonl")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == recorder.rows
    assert load_history(str(path)) == recorder.rows
    assert [file.name for file in tmp_path.iterdir()] == ["history.jsonl"]
    recorder.rows = recorder.rows[:2]
    recorder.save(path)
    assert load_history(path) == recorder.rows
    Recorder(admm(make_net())).save(path)
    assert load_history(path) == []


def test_a_run_that_blew_up_is_saved(tmp_path):
    recorder = Recorder(admm(make_net(), total_steps=5))
    recorder.record(math.nan)
    recorder.record(math.inf)
    first, second = load_history(recorder.save(tmp_path / "h.jsonl"))
    assert math.isnan(first["loss"])
    assert second["loss"] == math.inf


def test_saving_into_a_folder_that_is_not_there_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recorder(admm(make_net())).save(tmp_path / "absent" / "h.jsonl")
    assert list(tmp_path.iterdir()) == []


@restless
def test_a_resumed_run_goes_on_with_its_rows(tmp_path):
    optimizer, recorder = recorded(steps=20)
    resumed = Recorder(copy.deepcopy(optimizer), load_history(recorder.save(tmp_path / "h.jsonl")))
    resumed.record(0.0)
    assert resumed.rows[:-1] == recorder.rows
    assert resumed.rows[-1]["step"] == 20


def test_trainer_state(tmp_path):
    rows = [{"step": 1, "loss": 2.0, "admm/rho": 0.0}, {"step": 1, "eval_loss": 1.0}]
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": rows, "global_step": 1}))
    assert load_history(path) == rows


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("h.jsonl", b'{"step": 1}\n[1]\n', "h.jsonl, line 2 is no JSON object"),
        ("h.jsonl", b'{"step": 1}\n{"step": \n', "line 2 is no JSON object"),
        ("h.jsonl", b"[" * 100_000, "line 1 is no JSON object"),
        ("h.jsonl", b"\xff\xfe", "is not text in UTF-8"),
        ("s.json", b"{}", "s.json has no log_history"),
        ("s.json", b'{"log_history": [1]}', "has no log_history"),
        ("s.json", b"[]", "has no log_history"),
        ("s.json", b"{", "has no log_history"),
    ],
)
def test_damaged_files(tmp_path, name, content, said):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=said):
        load_history(tmp_path / name)


def test_no_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        load_history(tmp_path / "absent.jsonl")


def test_what_accelerate_wraps_is_found():
    optimizer = admm(make_net())
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert Recorder(wrapped).record() == Recorder(optimizer).record()


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"optimizer is a AdamW; an ADMMNxM, or what Accelerate has made of one"):
        Recorder(torch.optim.AdamW(make_net().parameters()))


def test_bad_figures_are_refused_and_leave_no_row():
    recorder = Recorder(admm(make_net()))
    with pytest.raises(ValueError, match=r"loss is a tensor of shape \(2,\); one entry is needed"):
        recorder.record(torch.zeros(2))
    with pytest.raises(TypeError, match="accuracy is a dict; a number"):
        recorder.record(accuracy={})
    with pytest.raises(TypeError, match="loss is a complex; a number"):
        recorder.record(torch.zeros(1, dtype=torch.complex64))
    with pytest.raises(ValueError, match="'admm/rho' is filled in by the recorder"):
        recorder.record(**{"admm/rho": 1.0})
    assert recorder.rows == []
    assert recorder.record(torch.tensor([2.5]))["loss"] == 2.5
