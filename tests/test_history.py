"""The recorder: the rows of a live run, and files of them."""

from __future__ import annotations

import copy
import json
import math
from types import SimpleNamespace

import pytest
import torch

from admm_nxm import ADMMNxM
from admm_nxm.report.history import Recorder, load_history
from tests.helpers import assert_same_weights, batches, loss_of, make_net

pytestmark = pytest.mark.filterwarnings("ignore:the run has not reached its pattern", "ignore:the mask had not settled")


def build(paper=False, total_steps=20):
    net = make_net()
    inner = torch.optim.AdamW(net.parameters(), lr=1e-2)
    if paper:
        return net, ADMMNxM.paper(inner, net, total_steps=total_steps, rho=0.5, update_every=4)
    return net, ADMMNxM(inner, net, total_steps=total_steps, calibration_steps=3)


def recorded(steps=20, every=2, paper=False):
    net, optimizer = build(paper, steps)
    recorder = Recorder(optimizer)
    for step, x in enumerate(batches(steps), 1):
        optimizer.zero_grad()
        loss = loss_of(net, x)
        loss.backward()
        optimizer.step()
        if step % every == 0:
            recorder.record(loss, lr=0.5)
    return net, optimizer, recorder


def test_rows_hold_what_the_optimizer_says():
    _, optimizer, recorder = recorded(every=1)
    assert [row["step"] for row in recorder.rows] == list(range(1, 21))
    assert [row["admm/phase"] for row in recorder.rows] == ["dense"] * 13 + ["calibration"] * 3 + ["frozen"] * 4
    assert recorder.rows[0].keys() == {"step", "loss", "lr", "admm/phase", "admm/sparsity"}
    now = optimizer.figures()
    assert recorder.rows[-1] == {
        "step": 20,
        "loss": recorder.rows[-1]["loss"],
        "lr": 0.5,
        "admm/phase": "frozen",
        "admm/sparsity": 0.5,
        "admm/model_error": now.model_error,
        "admm/pruned_at": 17,
    }


def test_the_papers_form_has_its_residuals_and_what_is_not_known_yet_is_left_out():
    _, optimizer, recorder = recorded(every=3, paper=True)
    first, last = recorder.rows[0], recorder.rows[-1]
    assert first.keys() == {"step", "loss", "lr", "admm/phase", "admm/sparsity", "admm/primal_residual", "admm/rho"}
    assert first["admm/primal_residual"] > 0.1
    now = optimizer.residuals()
    figures = (now.primal, now.dual, now.mask_churn, optimizer.rho)
    names = ("primal_residual", "dual_residual", "mask_churn", "rho")
    assert {name: last[f"admm/{name}"] for name in names} == dict(zip(names, figures, strict=True))
    assert (last["admm/phase"], last["admm/pruned_at"]) == ("frozen", 14)


@pytest.mark.parametrize("paper", [False, True])
def test_recording_changes_nothing_in_the_run(paper):
    assert_same_weights(recorded(every=1, paper=paper)[0], recorded(every=100, paper=paper)[0])


def test_save_and_load(tmp_path):
    _, _, recorder = recorded()
    recorder.record(eval_accuracy=0.5, note="mit Umlaut: ü", best=True, count=3)
    path = recorder.save(tmp_path / "history.jsonl")
    assert [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] == recorder.rows
    assert load_history(str(path)) == recorder.rows
    assert [file.name for file in tmp_path.iterdir()] == ["history.jsonl"]
    recorder.rows = recorder.rows[:2]
    recorder.save(path)
    assert load_history(path) == recorder.rows
    Recorder(build()[1]).save(path)
    assert load_history(path) == []


def test_a_run_that_blew_up_is_saved(tmp_path):
    recorder = Recorder(build()[1])
    recorder.record(math.nan)
    recorder.record(math.inf)
    first, second = load_history(recorder.save(tmp_path / "h.jsonl"))
    assert math.isnan(first["loss"])
    assert second["loss"] == math.inf


def test_saving_into_a_folder_that_is_not_there_leaves_nothing(tmp_path):
    with pytest.raises(FileNotFoundError):
        Recorder(build()[1]).save(tmp_path / "absent" / "h.jsonl")
    assert list(tmp_path.iterdir()) == []


def test_a_resumed_run_goes_on_with_its_rows(tmp_path):
    _, optimizer, recorder = recorded()
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
        ("h.jsonl", b'{"step": 1}\n[1]\n', "h.jsonl, line 2 is no history"),
        ("h.jsonl", b'{"step": 1}\n{"step": \n', "line 2 is no history"),
        ("h.jsonl", b"[" * 100_000, "line 1 is no history"),
        ("h.jsonl", b"\xff\xfe", "h.jsonl is no history .*utf-8"),
        ("s.json", b"{}", "s.json is no history .*log_history"),
        ("s.json", b'{"log_history": [1]}', "s.json is no history"),
        ("s.json", b"[]", "s.json is no history"),
        ("s.json", b"{", "s.json is no history"),
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
    optimizer = build()[1]
    wrapped = SimpleNamespace(optimizer=SimpleNamespace(optimizer=optimizer))
    assert Recorder(wrapped).record() == Recorder(optimizer).record()


def test_another_optimizer_is_refused():
    with pytest.raises(TypeError, match=r"optimizer is a AdamW; an ADMMNxM, or what Accelerate has made of one"):
        Recorder(torch.optim.AdamW(make_net().parameters()))


def test_bad_figures_are_refused_and_leave_no_row():
    recorder = Recorder(build()[1])
    with pytest.raises(TypeError, match=r"loss is a Tensor; a number, a tensor with one entry"):
        recorder.record(torch.zeros(2))
    with pytest.raises(TypeError, match="accuracy is a dict; a number"):
        recorder.record(accuracy={})
    with pytest.raises(TypeError, match="loss is a complex; a number"):
        recorder.record(torch.zeros(1, dtype=torch.complex64))
    for name in ("step", "admm/sparsity"):
        with pytest.raises(ValueError, match=f"'{name}' is filled in by the recorder"):
            recorder.record(**{name: 1.0})
    assert recorder.rows == []
    assert recorder.record(torch.tensor([2.5]))["loss"] == 2.5
