"""The model card: what the section says, and that it goes into README.md without touching anything else there."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from admm_nxm import ADMMNxM, Pattern, SparsityReport, WeightReport, project, prune, verify
from admm_nxm.export.card import model_card, write_model_card
from admm_nxm.io.selection_record import record_selection
from tests.helpers import make_net, train

STEPS = 20
BEGIN, END = "<!-- admm_nxm: sparsity -->", "<!-- /admm_nxm: sparsity -->"

pytestmark = pytest.mark.filterwarnings("ignore:the run is short")


@pytest.fixture(scope="module")
def run() -> tuple[ADMMNxM, SparsityReport, torch.nn.Module]:
    net = make_net()
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters(), lr=1e-3), net, total_steps=STEPS)
    train(net, optimizer, STEPS)
    return optimizer, optimizer.finalize(), net


def rows_of(section: str) -> dict[str, str]:
    """The first table of the section."""
    return dict(re.findall(r"^\| ([a-z ]+) \| (.*) \|$", section.split("<details>")[0], re.MULTILINE))


def report(**patterns: str) -> SparsityReport:
    weights = []
    for name, spelling in patterns.items():
        pattern = Pattern.parse(spelling)
        weights.append(WeightReport(name.replace("_", "."), (8, 8), pattern, 1, 64 // pattern.group, 0, 32))
    return SparsityReport(tuple(weights))


# ---------------------------------------------------------------- what it says


def test_a_run_is_told_from_its_optimizer(run: tuple[ADMMNxM, SparsityReport, torch.nn.Module]) -> None:
    optimizer, counted, net = run
    section = model_card(counted, optimizer=optimizer)
    rows = rows_of(section)
    assert section.startswith("## Sparsity\n")
    assert rows["pattern"] == "2:4 (at most 2 of every 4 weights are not zero)"
    everything = sum(p.numel() for p in net.parameters())
    assert (
        rows["pruned"]
        == f"4 weights, 512 of {everything:,} parameters ({512 / everything:.1%}); 50.00% of them are zero"
    )
    assert "arxiv.org/abs/2110.15766" in rows["method"]
    assert rows["optimizer"] == "AdamW; w-step in closed form"
    assert rows["schedule"] == "20 optimizer steps, pruned after step 17"
    assert rows["model error"].startswith(f"{optimizer.figures().model_error:.2g}: ")
    assert rows["verification"] == "**ok**: 128 groups counted, 0 violate the pattern"


@pytest.mark.parametrize(("pattern", "skipped"), [("2:4", True), ("1:4", True), ("2:8", True), ("4:8", False)])
def test_only_what_hardware_can_skip_is_said_to_be_skipped(pattern: str, skipped: bool) -> None:
    assert ("sparse tensor cores can skip" in model_card(report(a="2:4", b=pattern))) is skipped


def test_the_papers_form_is_told_apart() -> None:
    net = make_net()
    optimizer = ADMMNxM.paper(torch.optim.AdamW(net.parameters()), net, total_steps=STEPS, rho=0.5)
    rows = rows_of(model_card(report(layers_0_fc_weight="2:4"), optimizer=optimizer))
    assert rows["optimizer"] == "AdamW; w-step by the optimizer, rho 0.5 at the end"
    assert rows["schedule"] == "0 of 20 optimizer steps, not pruned yet"
    assert "model error" not in rows


def test_the_command_counts_the_weights_of_the_card_and_no_others(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    net = make_net()
    select = {r"blocks\.\d\.up\.weight": "1:4", r"head\.weight": "2:4"}
    prune(net, select=select)
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters()), net, prune_at=0, select=select)
    save_file(net.state_dict(), tmp_path / "model.safetensors")
    record_selection(tmp_path, optimizer.selection)
    counted = optimizer.finalize()
    section = model_card(counted, optimizer=optimizer)
    assert rows_of(section)["pattern"] == "1:4 (2 weights), 2:4 (1 weights)"
    assert "\nadmm-nxm verify PATH\n" in section
    again = verify(tmp_path)
    assert [(w.name, w.pattern, w.groups) for w in again] == [(w.name, w.pattern, w.groups) for w in counted]


def test_without_a_run_nothing_is_said_of_one() -> None:
    rows = rows_of(model_card(report(layers_0_fc_weight="2:4")))
    assert list(rows) == ["pattern", "pruned", "verification"]
    assert rows["pruned"] == "1 weights, 64 parameters; 50.00% of them are zero"


def test_a_history_gives_the_residual_before_the_freeze() -> None:
    history: list[dict[str, float]] = [
        {"loss": 1.0, "admm/primal_residual": 0.5, "admm/mask_churn": 0.2},
        {"loss": 0.9, "admm/primal_residual": 0.003, "admm/mask_churn": 0.01},
        {"loss": 0.8, "admm/primal_residual": 0.0, "admm/mask_churn": 0.0},
        {"eval_loss": 0.8},
    ]
    rows = rows_of(model_card(report(layers_0_fc_weight="2:4"), history=history))
    assert rows["primal residual"] == "3.0e-03 of the weights' norm, last logged before the freeze"
    assert rows["mask churn"].startswith("1.00% ")
    assert "ADMM" in rows["method"]


def test_figures_given_by_hand_come_first() -> None:
    rows = rows_of(
        model_card(
            report(layers_0_fc_weight="2:4"),
            history=[{"admm/model_error": 0.0123}],
            method="magnitude | once",
            parameters=128,
        )
    )
    assert rows["model error"].startswith("0.012: ")
    assert rows["method"] == "magnitude \\| once"
    assert rows["pruned"].startswith("1 weights, 64 of 128 parameters (50.0%)")


def test_violations_are_not_passed_over() -> None:
    good, bad = (
        report(layers_0_fc_weight="2:4"),
        WeightReport("layers.1.fc.weight", (8, 8), Pattern(2, 4), 1, 16, 3, 20),
    )
    rows = rows_of(model_card([*good, bad]))
    assert rows["verification"] == "**VIOLATED**: 3 of 32 groups, in 1 of 2 weights (`layers.1.fc.weight`)"


def test_what_was_asked_for_and_left_dense_is_said() -> None:
    net = torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.Linear(8, 8))
    with torch.no_grad():
        net[1].weight.copy_(project(net[1].weight, "2:4"))
    section = model_card(verify(net, {r"\d\.weight": "2:4"}))
    assert rows_of(section)["asked for and left dense"] == "`0.weight` (its width 6 along dim 1 is no multiple of 4)"


@pytest.mark.parametrize(
    ("given", "options", "error", "said"),
    [
        (7, {}, TypeError, "a SparsityReport is needed"),
        ([7], {}, TypeError, "WeightReports are needed"),
        ([], {}, ValueError, "no weight"),
        (report(a_weight="2:4"), {"optimizer": 7}, TypeError, "ADMMNxM is needed"),
    ],
)
def test_bad_input_is_refused(given: Any, options: dict[str, Any], error: type[Exception], said: str) -> None:
    with pytest.raises(error, match=said):
        model_card(given, **options)


# ---------------------------------------------------------------- where it goes

hub = pytest.mark.skipif(importlib.util.find_spec("huggingface_hub") is None, reason="needs huggingface_hub")
SECTION = model_card(report(layers_0_fc_weight="2:4", layers_1_fc_weight="1:4"))


def front_matter(path: Path) -> dict[str, Any]:
    from huggingface_hub import RepoCard

    return dict(RepoCard.load(path).data.to_dict())


@hub
def test_a_folder_without_a_card_gets_one(tmp_path: Path) -> None:
    path = write_model_card(tmp_path, SECTION, base_model="prajjwal1/bert-tiny", tags=["mine"])
    assert path == tmp_path / "README.md"
    assert front_matter(path) == {
        "tags": ["sparsity", "admm_nxm", "2:4", "1:4", "mine"],
        "base_model": "prajjwal1/bert-tiny",
        "library_name": "transformers",
    }
    assert path.read_text().endswith(f"\n{BEGIN}\n{SECTION.strip()}\n{END}\n")


@hub
def test_doing_it_again_changes_nothing(tmp_path: Path) -> None:
    path = write_model_card(tmp_path, SECTION)
    once = path.read_bytes()
    write_model_card(tmp_path, SECTION)
    assert path.read_bytes() == once


@hub
def test_an_older_section_is_replaced_where_it_stands(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text(f"# Mine\n\nabove\n\n{BEGIN}\nold\n{END}\n\nbelow\n\n{BEGIN}\nolder\n{END}\n")
    write_model_card(tmp_path, SECTION)
    body = path.read_text().split("---\n", 2)[2]
    assert body == f"# Mine\n\nabove\n\n{BEGIN}\n{SECTION.strip()}\n{END}\n\nbelow\n\n"


@hub
def test_the_users_text_and_metadata_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    body = "\n# Title\n\ntext with --- in it\n\n---\n\nmore\n"
    path.write_text(
        "---\nlicense: mit\nlibrary_name: peft\nbase_model: a/b\ntags: [x, sparsity]\n"
        f"model-index:\n- name: m\n  results: [{{metrics: [{{type: acc, value: 1}}]}}]\n---\n{body}"
    )
    write_model_card(tmp_path, SECTION, base_model="c/d")
    data = front_matter(path)
    assert data["license"] == "mit"
    assert data["library_name"] == "peft"
    assert data["base_model"] == "a/b"
    assert data["tags"] == ["x", "sparsity", "admm_nxm", "2:4", "1:4"]
    assert data["model-index"] == [{"name": "m", "results": [{"metrics": [{"type": "acc", "value": 1}]}]}]
    assert body in path.read_text()


@hub
def test_null_entries_of_the_metadata_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    path.write_text("---\nlicense:\nbase_model:\ntags: null\n---\n# Title\n")
    write_model_card(tmp_path, SECTION, base_model="c/d")
    head = path.read_text().split("---\n")[1]
    assert head.splitlines()[:3] == ["license: null", "base_model: c/d", "tags:"]


@hub
def test_metadata_that_lacks_nothing_stays_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    head = "---\n# a comment\ntags: [sparsity, admm_nxm, '2:4', '1:4']\nlibrary_name: transformers\n---\r\n"
    path.write_bytes(f"{head}\r\n# Title\r\n".encode())
    write_model_card(tmp_path, SECTION)
    assert path.read_bytes().startswith(f"{head}\r\n# Title\n\n{BEGIN}\n".encode())


@hub
@pytest.mark.parametrize(
    ("text", "said"),
    [
        (f"# Mine\n{BEGIN}\nno end\n", "without"),
        (f"# Mine\n{END}\n", "without"),
        ("---\na: [\n---\n# Mine\n", "cannot be read"),
        ("---\n- a\n---\n# Mine\n", "cannot be read"),
        (b"\xff\xfe\x00", "no UTF-8"),
    ],
)
def test_a_damaged_card_is_refused_and_left_alone(text: str | bytes, said: str, tmp_path: Path) -> None:
    path = tmp_path / "README.md"
    before = text if isinstance(text, bytes) else text.encode()
    path.write_bytes(before)
    with pytest.raises(ValueError, match=said):
        write_model_card(tmp_path, SECTION)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_section_with_marks_of_its_own_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave them out"):
        write_model_card(tmp_path, f"{BEGIN}{SECTION}")
    assert not list(tmp_path.iterdir())


def test_no_folder_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(NotADirectoryError, match="save_pretrained"):
        write_model_card(tmp_path / "nothing", SECTION)


def test_without_huggingface_hub_the_remedy_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(ImportError, match=r"pip install \"\.\[hf\]\""):
        write_model_card(tmp_path, SECTION)
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------- Trainer


@hub
def test_trainers_card_has_the_section_once_the_run_is_final(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    from tests.test_trainer import trainer

    made = trainer(tmp_path)
    made.create_model_card()
    path = tmp_path / "README.md"
    assert BEGIN not in path.read_text()
    made.train()
    made.create_model_card(tags=["mine"], finetuned_from="a/b")
    text = path.read_text()
    assert text.count(BEGIN) == 1
    rows = rows_of(text[text.index(BEGIN) :])
    assert rows["verification"].startswith("**ok**")
    assert rows["schedule"].startswith(f"{made.admm.total_steps} optimizer steps, pruned after step 17")
    data = front_matter(path)
    assert {"mine", "generated_from_trainer", "sparsity", "admm_nxm", "2:4"} <= set(data["tags"])
    assert data["base_model"] == "a/b"
    made.create_model_card()
    assert path.read_text().count(BEGIN) == 1
