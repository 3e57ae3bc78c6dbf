"""The model card: what the section says, and that it goes into README.md without touching anything else there."""

from __future__ import annotations

import importlib
import importlib.util
import re
from pathlib import Path
from typing import Any

import pytest
import torch

from admm_nxm import ADMMNxM, Pattern, SparsityReport, WeightReport, project, verify
from admm_nxm.export.card import model_card, write_model_card
from admm_nxm.report import sparsity_report
from admm_nxm.selection import select_weights
from tests.helpers import make_net, train

STEPS = 20
BEGIN, END = "<!-- admm_nxm: sparsity -->", "<!-- /admm_nxm: sparsity -->"

pytestmark = pytest.mark.filterwarnings("ignore:the mask had not settled")


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
    state = optimizer.param_groups[0]
    assert section.startswith("## Sparsity\n")
    assert rows["pattern"] == "2:4 (at most 2 of every 4 weights are not zero)"
    everything = sum(p.numel() for p in net.parameters())
    assert (
        rows["pruned"]
        == f"4 weights, 512 of {everything:,} parameters ({512 / everything:.1%}); 50.00% of them are zero"
    )
    assert "arxiv.org/abs/2110.15766" in rows["method"]
    assert rows["form"].startswith('`penalty="lazy"` around AdamW: ')
    assert rows["schedule"].startswith("20 optimizer steps, mask frozen after step 18; rho ")
    assert rows["primal residual"] == (
        f"{state['admm_freeze_residual']:.1e} of the weights' norm, at the freeze (tolerance 2.0%)"
    )
    assert rows["mask churn"].startswith(f"{state['admm_freeze_churn']:.2%} ")
    assert rows["verification"] == "**ok**: 128 groups counted, 0 violate the pattern"


@pytest.mark.parametrize(("pattern", "skipped"), [("2:4", True), ("1:4", True), ("2:8", True), ("4:8", False)])
def test_only_what_hardware_can_skip_is_said_to_be_skipped(pattern: str, skipped: bool) -> None:
    assert ("sparse tensor cores can skip" in model_card(report(a="2:4", b=pattern))) is skipped


def test_the_command_for_the_default_choice_is_short(run: tuple[ADMMNxM, SparsityReport, torch.nn.Module]) -> None:
    optimizer, counted, _ = run
    assert command_of(model_card(counted, optimizer=optimizer)) == "admm-nxm verify PATH --pattern 2:4"


@pytest.mark.parametrize("kind", ["default", "part", "own"])
@pytest.mark.parametrize("told_by", ["nothing", "report", "optimizer"])
def test_the_command_counts_the_weights_of_the_card_and_no_others(kind: str, told_by: str) -> None:
    net = make_net()
    select = {"default": None, "part": {r".*\.up\.weight": "2:4"}, "own": {r"blocks\.0\.up\.weight": "1:4"}}[kind]
    selection, weights = select_weights(net, select=select)
    with torch.no_grad():
        for weight in selection:
            weights[weight.name].copy_(project(weights[weight.name], weight.pattern, weight.dim))
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters()), net, total_steps=STEPS, select=select)
    counted = (sparsity_report if told_by == "report" else verify)(net, select)
    command = command_of(model_card(counted, optimizer=optimizer if told_by == "optimizer" else None))
    rules = dict(re.findall(r"--select '(.+)=(\d:\d)'", command))
    again = verify(net.state_dict(), rules or command.removeprefix("admm-nxm verify PATH --pattern "))
    assert again.ok
    assert {w.name for w in again} == {w.name for w in counted}
    assert bool(rules) == (kind != "default" or told_by == "nothing")


def test_rules_of_ones_own_become_rules_of_the_command() -> None:
    """One rule for all blocks where it matches these names and no other."""
    net = make_net()
    select = {r"blocks\.\d\.up\.weight": "1:4", r"blocks\.0\.down\.weight": "2:4", r"head\.weight": "2:4"}
    optimizer = ADMMNxM(torch.optim.AdamW(net.parameters()), net, total_steps=STEPS, select=select)
    weights = dict(net.named_parameters())
    with torch.no_grad():
        for weight in optimizer.selection:
            weights[weight.name].copy_(project(weights[weight.name], weight.pattern, weight.dim))
    counted = verify(net, optimizer.selection)
    section = model_card(counted, optimizer=optimizer)
    assert rows_of(section)["pattern"] == "1:4 (2 weights), 2:4 (2 weights)"
    rules = dict(re.findall(r"--select '(.+)=(\d:\d)'", command_of(section)))
    assert r"blocks\.(0|1)\.up\.weight" in rules
    again = verify(net.state_dict(), rules)
    assert [(w.name, w.pattern, w.groups) for w in again] == [(w.name, w.pattern, w.groups) for w in counted]


def test_names_that_no_rule_for_all_blocks_fits_are_each_named() -> None:
    section = model_card(report(a_0_x_0_w="2:4", a_1_x_1_w="2:4"))
    rules = re.findall(r"--select '(.+)=2:4'", command_of(section))
    assert rules == [r"a\.0\.x\.0\.w", r"a\.1\.x\.1\.w"]


def command_of(section: str) -> str:
    found = re.search(r"```bash\n.*?\n(admm-nxm .*?)\n```", section, re.DOTALL)
    assert found is not None
    return found[1]


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
            history=[{"admm/primal_residual": 0.5}],
            residual=0.01,
            method="magnitude | once",
            parameters=128,
        )
    )
    assert rows["primal residual"] == "1.0e-02 of the weights' norm, at the freeze"
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
        (report(a_weight="2:4"), {"residual": -1.0}, ValueError, "at least 0"),
        (report(a_weight="2:4"), {"residual": float("nan")}, ValueError, "at least 0"),
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
    real = importlib.import_module

    def missing(name: str, *args: Any) -> Any:
        if name == "huggingface_hub":
            raise ImportError("no module")
        return real(name, *args)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ImportError, match=r"pip install \"admm-nxm\[hf\]\""):
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
    assert rows["schedule"].startswith(f"{made.admm.total_steps} optimizer steps, mask frozen after step 18")
    data = front_matter(path)
    assert {"mine", "generated_from_trainer", "sparsity", "admm_nxm", "2:4"} <= set(data["tags"])
    assert data["base_model"] == "a/b"
    made.create_model_card()
    assert path.read_text().count(BEGIN) == 1
