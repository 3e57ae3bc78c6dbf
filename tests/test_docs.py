"""No block in README and docs goes unchecked, and what the pages promise about themselves holds.

What a block's language says decides how: python is run, the commands of `admm-nxm` are run, other commands must be on a
list and refer to what exists, diffs must leave valid Python whose imports work, and data must parse.
"""

from __future__ import annotations

import ast
import builtins
import dataclasses
import importlib
import importlib.util
import inspect
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import admm_nxm
from tests.helpers import LIGHTNING_ADVICE
from tests.tiny import tiny_llama

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
PICTURES = ROOT / "docs" / "pictures.md"


def by_name(page: Path) -> str:
    return page.name


# ---------------------------------------------------------------------------------------------------------- blocks


@dataclass(frozen=True)
class Block:
    """A fenced block: what the fence says, the line it stands on, and the text."""

    language: str
    line: int
    text: str


def blocks(page: Path) -> list[Block]:
    found: list[Block] = []
    lines = page.read_text(encoding="utf-8").splitlines()
    opened: tuple[str, str, int] | None = None
    inside: list[str] = []
    for number, line in enumerate(lines, 1):
        fence = re.match(r"^(\s*)(`{3,}|~{3,})\s*([\w-]*)\s*$", line)
        if opened is None:
            if fence:
                opened, inside = (fence[2], fence[3], number), []
        elif fence and not fence[3] and fence[2][0] == opened[0][0] and len(fence[2]) >= len(opened[0]):
            found.append(Block(opened[1], opened[2], "\n".join(inside) + "\n"))
            opened = None
        else:
            inside.append(line)
    assert opened is None, f"{page}: the block at line {opened[2] if opened else 0} has no end"
    return found


def of_language(page: Path, *languages: str) -> list[Block]:
    return [block for block in blocks(page) if block.language in languages]


def pages_with(*languages: str) -> list[Path]:
    return [page for page in PAGES if of_language(page, *languages)]


def needs(text: str) -> set[str]:
    """Return the packages that a block imports, by their top names."""
    return set(re.findall(r"^\s*(?:from|import)\s+(\w+)", text, flags=re.MULTILINE))


def skip_without(names: set[str]) -> None:
    """The oldest environment that is tested has torch and nothing of Hugging Face; the packages that an extra has."""
    optional = {
        "accelerate",
        "lightning",
        "matplotlib",
        "onnx",
        "onnxruntime",
        "onnxscript",
        "transformers",
        "trl",
        "typer",
    }
    if "onnx" in names:
        names = names | {"onnxruntime", "onnxscript"}
    for name in sorted(names & optional):
        pytest.importorskip(name)


INTEGRATIONS = {"accelerate", "lightning", "transformers"}

CHECKED = {
    "python": "run, one after the other",
    "bash": "run if it is a command of this package, else on the list of known commands",
    "diff": "the new side is compiled and its imports are made",
    "json": "parsed",
    "yaml": "parsed",
    "toml": "parsed",
    "text": "output of the commands above it, or listed below",
    "": "listed below",
}

LISTED: dict[str, int] = {}
"""Page -> how many of its blocks are neither code, nor data, nor output of a command, so that a new one is noticed."""


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_every_block_is_of_a_kind_that_is_checked(page: Path) -> None:
    found = blocks(page)
    assert [f"line {block.line}: {block.language!r}" for block in found if block.language not in CHECKED] == []
    after_a_command = [before.language == "bash" for before in found]
    plain = [
        block
        for block, is_output in zip(found, [False, *after_a_command], strict=False)
        if block.language == "" or (block.language == "text" and not is_output)
    ]
    assert len(plain) <= LISTED.get(page.name, 0), [block.line for block in plain]


def test_a_block_is_found_with_its_language_and_an_open_one_is_noticed(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("a\n```python\nx = 1\n```\n````text\n```\nno end\n```\n````\n", encoding="utf-8")
    assert blocks(page) == [Block("python", 2, "x = 1\n"), Block("text", 5, "```\nno end\n```\n")]
    page.write_text("```bash\nls\n", encoding="utf-8")
    with pytest.raises(AssertionError, match="line 1 has no end"):
        blocks(page)


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_a_block_fits_the_column_of_the_site(page: Path) -> None:
    """At 1,280 pixels the column beside both lists takes 85 characters."""
    lines = {line for block in blocks(page) for line in block.text.splitlines()}
    assert [line for line in sorted(lines) if len(line) > 85 and not line.startswith("pip install ")] == []


# ---------------------------------------------------------------------------------------------------------- python


@pytest.mark.parametrize("page", [page for page in pages_with("python") if page != PICTURES], ids=by_name)
def test_code_blocks_of_a_page_run_one_after_the_other(
    page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = of_language(page, "python")
    imported = {name for block in found for name in needs(block.text)}
    if any("export.onnx" in block.text for block in found):
        imported.add("onnx")
    if any("admm_nxm.report.plots" in block.text for block in found):
        imported.add("matplotlib")
    if any("integrations" in block.text for block in found):
        imported |= INTEGRATIONS
    skip_without(imported)
    monkeypatch.chdir(tmp_path)
    if "trl" in imported:
        tiny_llama(tmp_path / "tiny-llama")
    module = types.ModuleType(f"page_{page.stem}")
    monkeypatch.setitem(sys.modules, module.__name__, module)  # what a block defines can be pickled and inspected
    for block in found:
        code = compile("\n" * block.line + block.text, str(page), "exec", dont_inherit=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for message in LIGHTNING_ADVICE:
                warnings.filterwarnings("ignore", message=message)
            # TRL sets options by the names that transformers had before.
            warnings.filterwarnings("ignore", r"`\w*gradient_checkpointing\w*` is deprecated", FutureWarning)
            exec(code, module.__dict__)


def test_no_mask_is_better_than_that_of_the_worked_example() -> None:
    """Least squares on each of its masks, with the explicit Kronecker matrix."""
    page: dict[str, Any] = {}
    exec(of_language(ROOT / "docs" / "algorithm.md", "python")[0].text, page)
    dense = page["dense"].double().flatten()
    metric = torch.kron(page["G"].double(), page["A"].double())
    least = 1.0
    for rows in itertools.product(itertools.combinations(range(4), 2), repeat=4):
        kept = [4 * row + column for row, columns in enumerate(rows) for column in columns]
        change = -dense
        change[kept] += torch.linalg.solve(metric[kept][:, kept], (metric @ dense)[kept])
        least = min(least, float(change @ metric @ change / (dense @ metric @ dense)))
    assert page["errors"]["A and G"] == pytest.approx(least, rel=0.01)


def test_pages_with_code_are_found() -> None:
    expected = {
        "algorithm.md",
        "choosing.md",
        "deploy.md",
        "extending.md",
        "faq.md",
        "howto.md",
        "index.md",
    }
    assert expected <= {page.name for page in pages_with("python")}


def test_the_cells_of_the_tour_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    skip_without({"matplotlib", "transformers"})
    notebook = json.loads((ROOT / "examples" / "tour.ipynb").read_text(encoding="utf-8"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    monkeypatch.setenv("TOUR_STEPS", "40")
    module: dict[str, Any] = {"__name__": "tour"}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            code = "".join(line for line in cell["source"] if not line.startswith("%"))  # those are the notebook's own
            exec(compile(code, f"tour.ipynb, {cell['id']}", "exec", dont_inherit=True), module)
    assert set(module["results"]) == {"dense", "dense, then cut to 2:4", "2:4 with ADMMNxM"}
    assert (tmp_path / "packed" / "model.packed.safetensors").is_file()


# ------------------------------------------------------------------------------------------------------------ bash


def commands(text: str) -> list[str]:
    """Return the commands of a block: continued lines joined, comments and blank lines left out."""
    joined = re.sub(r"\\\n\s*", " ", text)
    return [line.strip() for line in joined.splitlines() if line.strip() and not line.strip().startswith("#")]


def own_commands(page: Path) -> list[str]:
    return [
        line for block in of_language(page, "bash") for line in commands(block.text) if line.startswith("admm-nxm ")
    ]


LISTED_COMMANDS = (
    "pip install ",
    "python examples/",
    "accelerate launch ",
    "pytest",
    "trtexec ",
    "mutmut ",
)
"""Commands that are not run here: installations, long examples, and programs that are not installed."""


def options_of(line: str) -> list[str]:
    return [word for part in line.split("&&") for word in shlex.split(part, comments=True)]


@pytest.mark.parametrize("page", pages_with("bash"), ids=by_name)
def test_commands_are_this_packages_or_listed_and_refer_to_what_exists(page: Path) -> None:
    extras = set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(encoding="utf-8"), flags=re.MULTILINE))
    for block in of_language(page, "bash"):
        for line in commands(block.text):
            if line.startswith("admm-nxm "):
                continue
            assert all(part.strip().startswith(LISTED_COMMANDS) for part in line.split("&&")), (block.line, line)
            for word in options_of(line):
                for extra in re.findall(r"\[([\w,]+)\]$", word) if word.startswith((".[", "admm-nxm[")) else ():
                    assert set(extra.split(",")) <= extras, line
                file = word.split("::")[0]
                if re.match(r"^(examples|tests|docs|admm_nxm|\.ci)/", file) or file == "constraints.txt":
                    assert (ROOT / file).exists(), line


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the commands name: a model with its tokenizer, and a table of texts."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    pytest.importorskip("typer")
    folder = tmp_path_factory.mktemp("material")
    words = ["good", "bad", "fine", "awful", "film", "book", "a", "the", "very", "not", "was", "it"]
    vocabulary = {word: i for i, word in enumerate(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words])}
    core = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.post_processor = tokenizers.processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    special = {f"{kind}_token": f"[{kind.upper()}]" for kind in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=core, model_max_length=32, **special)
    config = transformers.BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=32,
    )
    transformers.BertModel(config).save_pretrained(folder / "bert-base-uncased")
    tokenizer.save_pretrained(folder / "bert-base-uncased")
    rows = ["text,label"]
    for i in range(40):
        kind = ("good", "bad")[i % 2]
        rows.append(f"it was {words[i % 12]} {'very ' * (i % 3)}{kind} {words[(3 * i) % 12]},{kind}")
    (folder / "texts.csv").write_text("\n".join(dict.fromkeys(rows)) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("page", [page for page in PAGES if own_commands(page)], ids=by_name)
def test_the_packages_own_commands_run_one_after_the_other(
    page: Path, material: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    main: Callable[[list[str]], int] = importlib.import_module("admm_nxm.cli").main
    for item in material.iterdir():
        (tmp_path / item.name).symlink_to(item)
    monkeypatch.chdir(tmp_path)
    lines = own_commands(page)
    if not any("-o sparse" in line for line in lines):  # the page speaks of a model that another page made
        assert main(["prune", "bert-base-uncased", "-o", "sparse", "--pattern", "2:4"]) == 0
    for line in lines:
        status = main(shlex.split(line, comments=True)[1:])
        printed = capsys.readouterr()
        assert status == 0, f"{line}\n{printed.out}\n{printed.err}"


def test_the_way_from_a_table_to_a_packed_model_is_on_the_first_page() -> None:
    lines = own_commands(ROOT / "docs" / "index.md")
    assert [line.split()[1] for line in lines] == ["train", "verify", "report", "pack", "verify", "unpack", "prune"]


# ------------------------------------------------------------------------------------------------------------ diff


def new_side(text: str) -> str:
    """Return what a diff leaves, as Python: `...` in a list of arguments stands for those that one has."""
    kept = [line[1:] for line in text.splitlines() if line[:1] in ("+", " ", "")]
    source = "\n".join(kept)
    for pattern, replacement in ((r",\s*\.\.\.\s*,", ", **rest, "), (r",\s*\.\.\.\s*\)", ", **rest)")):
        source = re.sub(pattern, replacement, source)
    # What follows **rest must be a keyword, which is legal; a positional one is not, and would be a wrong diff.
    return source


def tree_of(block: Block, page: Path) -> ast.Module:
    return ast.parse(new_side(block.text), f"{page.name}, line {block.line}")


def known_names() -> Iterator[str]:
    """Names that a diff may use unexplained: what its package has by that name, and what a script has anyway."""
    yield from dir(builtins)
    yield from admm_nxm.__all__
    yield from ("rest", "torch", "model", "args", "train", "test", "loader", "num_steps", "dense_model", "accelerator")
    yield from ("Trainer", "TrainingArguments", "optimizer")


@pytest.mark.parametrize("page", pages_with("diff"), ids=by_name)
def test_a_diff_leaves_valid_python_whose_names_exist(page: Path) -> None:
    integrations: dict[str, Any] = {}
    if importlib.util.find_spec("transformers") is None:
        pytest.skip("transformers is not installed")
    for name in ("transformers", "distillation"):
        integrations |= vars(importlib.import_module(f"admm_nxm.integrations.{name}"))
    for block in of_language(page, "diff"):
        tree = tree_of(block, page)
        assert any(line.startswith("+") for line in block.text.splitlines()), (page, block.line)
        made = set(known_names())
        for node in ast.walk(tree):
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                exec(compile(ast.Module([node], []), str(page), "exec"), {})
                made |= {(alias.asname or alias.name).split(".")[0] for alias in node.names}
            if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
                made.add(node.name)
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                made.add(node.id)
        used = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
        assert used <= made | set(integrations), (page.name, block.line, used - made - set(integrations))
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            check_keywords(call, {**vars(admm_nxm), **integrations})


def check_keywords(call: ast.Call, names: dict[str, Any]) -> None:
    """The keywords of a call to something of this package are keywords that it takes."""
    target = names.get(call.func.id) if isinstance(call.func, ast.Name) else None
    if target is None or not getattr(target, "__module__", "").startswith("admm_nxm"):
        return
    taken: set[str] = set()
    classes = target.__mro__ if isinstance(target, type) else (target,)
    for one in classes:
        function = vars(one).get("__init__") if isinstance(one, type) else one
        if function is not None and callable(function) and function is not object.__init__:
            taken |= set(inspect.signature(function).parameters)
    given = {keyword.arg for keyword in call.keywords if keyword.arg is not None}
    assert given <= taken, f"{ast.unparse(call)}: {sorted(given - taken)} is not among its arguments"


def test_a_wrong_diff_is_noticed(tmp_path: Path) -> None:
    text = "-trainer = Trainer(model)\n+trainer = ADMMNxM(optimizer, model, patern='2:4')\n"
    call = next(node for node in ast.walk(ast.parse(new_side(text))) if isinstance(node, ast.Call))
    with pytest.raises(AssertionError, match="patern"):
        check_keywords(call, vars(admm_nxm))
    with pytest.raises(SyntaxError):
        tree_of(Block("diff", 1, "+trainer = Trainer(model\n"), tmp_path / "page.md")


# ------------------------------------------------------------------------------------------------------------ data


@pytest.mark.parametrize(
    "page", pages_with("json", "yaml", "toml") or [None], ids=lambda page: getattr(page, "name", "")
)
def test_data_parses(page: Path | None) -> None:
    for block in [] if page is None else of_language(page, "json", "yaml", "toml"):
        if block.language == "json":
            json.loads(block.text)
        elif block.language == "yaml":
            pytest.importorskip("yaml").safe_load(block.text)
        elif sys.version_info >= (3, 11):
            import tomllib

            tomllib.loads(block.text)


# ----------------------------------------------------------------------------------------------------------- links


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as the site and GitHub make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
    anchors = set()
    for heading in re.findall(r"^#+\s+(.*)$", text, flags=re.MULTILINE):
        plain = re.sub(r"[`*]", "", heading).strip().lower()
        anchors.add(re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", plain)))
    return anchors


def made_by_the_build(target: str) -> bool:
    """The pictures of a run are drawn when the site is built."""
    return re.fullmatch(r"pictures/[\w-]+\.svg", target) is not None


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_links_inside_the_repository_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^):\s]+)\)", page.read_text(encoding="utf-8")):
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        if not file.exists():
            assert page.parent == ROOT / "docs", target
            assert made_by_the_build(path), target
        elif anchor and file.suffix == ".md":
            assert anchor in headings(file), target


@pytest.mark.parametrize("page", PAGES, ids=by_name)
def test_no_page_names_a_place_of_one_machine(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert re.findall(r"(?<![\w.])/(?:tmp|root|home|work|opt)/", text) == []
    assert "localhost" not in text


def test_every_question_of_the_faq_links_a_thread() -> None:
    text = (ROOT / "docs" / "faq.md").read_text(encoding="utf-8")
    answers = re.split(r"^## ", text, flags=re.MULTILINE)[1:]
    assert len(answers) >= 12
    without = [
        answer.splitlines()[0]
        for answer in answers
        if not re.search(r"github\.com/[\w.-]+/[\w.-]+/(?:issues|pull)/\d+", answer)
    ]
    assert without == []


def test_every_source_of_the_comparison_is_used_and_every_number_has_one() -> None:
    text = (ROOT / "docs" / "comparison.md").read_text(encoding="utf-8")
    before, _, after = text.partition("## Sources")
    used = {int(number) for group in re.findall(r"\[(\d+(?:, \d+)*)\](?!\()", before) for number in group.split(", ")}
    listed = {int(number) for number in re.findall(r"^(\d+)\. ", after, flags=re.MULTILINE)}
    assert used == listed == set(range(1, len(listed) + 1))


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_readme_names_two_commands_that_use_the_tested_versions() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for marker in ("demo-command", "test-command"):
        command = re.search(rf"<!-- {marker} -->\n```bash\n(.*)\n```", text)
        assert command is not None
        assert "-c constraints.txt" in command[1]


def test_every_page_is_in_the_navigation() -> None:
    listed = re.findall(r"([\w-]+\.md)", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"))
    assert sorted(listed) == sorted(path.name for path in (ROOT / "docs").glob("*.md"))


# ------------------------------------------------------------------------------------------------------- reference

INTERNAL = {
    "admm_nxm.checkpoint": "what a state dict holds, for the optimizer",
    "admm_nxm.checks": "range checks",
    "admm_nxm.cli": "its interface is the command line, which has a page of its own",
    "admm_nxm.consensus": "the arithmetic of one state buffer; algorithm.md has it",
    "admm_nxm.diagnosis": "what a warning says of a run that went wrong",
    "admm_nxm.exact": "the exact w-step within a run, for the optimizer",
    "admm_nxm.export": "its names are on the page by the modules that define them",
    "admm_nxm.export.onnx_graph": "what an ONNX graph multiplies with its weights",
    "admm_nxm.grouping": "names for weights that are alike",
    "admm_nxm.inner": "what the optimizer asks of the one that it wraps",
    "admm_nxm.integrations": "an empty package; its modules are on the page",
    "admm_nxm.integrations.ending": "how a framework's run ends, for its integration",
    "admm_nxm.io": "an empty package; its modules are on the page",
    "admm_nxm.io.files": "checkpoints read one tensor at a time, and files written whole or not at all",
    "admm_nxm.io.tensor_files": "the bytes of a safetensors file",
    "admm_nxm.memory": "where a tensor lies",
    "admm_nxm.passes": "passes of batches through a model that is pruned without training",
    "admm_nxm.paper": "the paper's w-step within a run, for the optimizer",
    "admm_nxm.progress": "the counters of a run; figures() gives them to users",
    "admm_nxm.reference": "the algorithm in plain loops, which the tests compare with",
    "admm_nxm.report.flops": "what a report counts of a forward pass",
    "admm_nxm.report.histogram": "what the pictures of weights count",
    "admm_nxm.run": "the state of a run, shared by the optimizer and its copies",
    "admm_nxm.sharding": "the edge to DTensor",
    "admm_nxm.solving": "the layer problems of several weights, shared by processes",
    "admm_nxm.table": "tables of plain text",
    "admm_nxm.weights": "a prunable weight with its parameter, module and state, for the optimizer",
}
"""Modules that are not on the API page, and why."""

INTERNAL_NAMES = {
    # What reads a record, and the JSON that it is made of.
    "admm_nxm.io.selection_record": {"read_selection", "selection_from_json", "selection_to_json"},
    "admm_nxm.io.packing": {"NO_ZERO"},  # what pruning asks
    "admm_nxm.io.verify": {"OpenTarget", "Target", "open_target"},  # what reports read
    "admm_nxm.projection": {"INTEGER_OF_SIZE", "by_group", "zero_outside"},  # helpers of what counts, packs and masks
    "admm_nxm.report.history": {"find_admm"},  # for the Trainer
    "admm_nxm.residuals": {"measure", "ratio"},  # of sums of squares
    # What the optimizer asks.
    "admm_nxm.schedules": {"Plan", "Timeline", "check_update", "make_plan", "make_timeline", "next_rho"},
    # For reports and for the optimizer.
    "admm_nxm.selection": {
        "block_prefixes",
        "TRAINABLE_DTYPES",
        "clean_name",
        "is_conv1d",
        "is_embedding",
        "named_tensors",
        "with_late_weights",
    },
    "admm_nxm.sparsity": {"cover"},  # what reports and packing ask
    "admm_nxm.statistics": {"MAX_TOKENS", "refuse_compiled"},  # a default, and what the optimizer asks
}
"""Module -> names in its `__all__` that other modules of the package share and users have no use for."""


def modules() -> list[str]:
    """Return the public modules: no part of the name has a leading underscore."""
    found = []
    for path in sorted((ROOT / "admm_nxm").rglob("*.py")):
        parts = list(path.relative_to(ROOT).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        name = ".".join(parts)
        if not any(part.startswith("_") for part in parts) and not name.startswith("admm_nxm.cli."):
            found.append(name)
    return found


def directives() -> list[str]:
    text = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    return re.findall(r"^::: ([\w.]+)$", text, flags=re.MULTILINE)


def resolve(dotted: str) -> Any:
    """Return what a dotted name stands for, importing the modules on the way."""
    parts = dotted.split(".")
    found: Any = importlib.import_module(parts[0])
    for end in range(2, len(parts) + 1):
        is_module = _is_module(parts[:end])
        found = importlib.import_module(".".join(parts[:end])) if is_module else getattr(found, parts[end - 1])
    return found


def _is_module(parts: list[str]) -> bool:
    path = ROOT.joinpath(*parts)
    return path.is_dir() or path.with_suffix(".py").is_file()


def test_the_list_of_internal_modules_is_up_to_date() -> None:
    assert set(INTERNAL) <= set(modules())
    assert all(reason for reason in INTERNAL.values())
    assert set(INTERNAL_NAMES) <= set(modules()) - set(INTERNAL)


def test_every_name_on_the_page_exists_once() -> None:
    skip_without(INTEGRATIONS)
    listed = directives()
    assert len(listed) == len(set(listed))
    for dotted in listed:
        found = resolve(dotted)
        assert isinstance(found, types.ModuleType) is False, f"{dotted}: list its names, not the module"


@pytest.mark.parametrize("module", [name for name in modules() if name not in INTERNAL])
def test_every_public_name_is_on_the_api_page(module: str) -> None:
    if module.startswith("admm_nxm.integrations."):
        skip_without(INTEGRATIONS)
    loaded = importlib.import_module(module)
    assert hasattr(loaded, "__all__"), f"{module} has no __all__: name what is public in it"
    listed = set(directives())
    skip_without(INTEGRATIONS)
    objects = [resolve(dotted) for dotted in listed]
    missing = []
    for name in loaded.__all__:
        if name.startswith("__") or name in INTERNAL_NAMES.get(module, set()) or f"{module}.{name}" in listed:
            continue
        value = getattr(loaded, name)
        # The same class or function under another public path, such as the package's own.
        shared = callable(value) and any(value is other for other in objects)
        if not shared:
            missing.append(name)
    assert missing == [], f"add to docs/api.md: {', '.join(f'::: {module}.{name}' for name in missing)}"


def test_the_config_of_a_trainer_has_the_names_of_the_optimizer() -> None:
    skip_without({"transformers", "accelerate"})
    config = importlib.import_module("admm_nxm.integrations.transformers").ADMMConfig
    functions = (admm_nxm.ADMMNxM.__init__, admm_nxm.ADMMNxM.paper)
    names = {name for function in functions for name in inspect.signature(function).parameters} | {"paper"}
    assert {field.name for field in dataclasses.fields(config)} <= names


def test_no_docstring_opens_with_a_question_word() -> None:
    """It opens with a verb, or with the name of the thing: a second-language reader has to read "What ..." twice."""
    opened = []
    for file in sorted((ROOT / "admm_nxm").rglob("*.py")):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            text = node.value.value if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) else None
            if isinstance(text, str) and re.match(r"(What|Who|Whose|Where|When|How|Which|Why)\b", text.strip()):
                opened.append(f"{file.relative_to(ROOT)}, line {node.lineno}")
    assert opened == []


# ------------------------------------------------------------------------------------------------------------ site


def docstring_of_the_site(text: str) -> str:
    pytest.importorskip("griffe")
    from griffe import Docstring, Function

    spec = importlib.util.spec_from_file_location("griffe_docstrings", ROOT / ".ci" / "griffe_docstrings.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    described = Function("f", docstring=Docstring(text))
    module.Docstrings().on_object(obj=described)
    assert described.docstring is not None
    return described.docstring.value


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Plain.", "Plain."),
        ("See :meth:`~a.b` and :class:`C`.", "See `a.b` and `C`."),
        ("Text.\n>>> f()\n1", "Text.\n\n```pycon\n>>> f()\n1\n```"),
        ("Text.\n\n>>> f()\n1\n\nMore.", "Text.\n\n```pycon\n>>> f()\n1\n```\n\nMore."),
        ("S.\n\nReturns:\n    Two: a and b.", "S.\n\nReturns:\n    Two&#58; a and b."),
        ("S.\n\nReturns:\n    A ``{1: 2}``: that.", "S.\n\nReturns:\n    A ``{1: 2}``&#58; that."),
        ("S.\n\nArgs:\n    a: one.", "S.\n\nArgs:\n    a: one."),
    ],
)
def test_docstrings_become_markdown(text: str, expected: str) -> None:
    assert docstring_of_the_site(text) == expected


def docs_script() -> dict[str, Any]:
    return runpy.run_path(str(ROOT / ".ci" / "docs.py"))


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pictures of docs/pictures.md, made by its code."""
    skip_without({"matplotlib", "transformers"})
    folder = tmp_path_factory.mktemp("pictures")
    docs_script()["make_pictures"](PICTURES, folder)
    return folder


@pytest.mark.xdist_group("pictures")
def test_every_picture_is_made_by_the_code_above_it(pictures: Path) -> None:
    shown = re.findall(r"!\[[^]]*\]\(pictures/([\w.-]+)\)", PICTURES.read_text(encoding="utf-8"))
    assert sorted(path.name for path in pictures.iterdir()) == sorted(shown)
    assert len({path.read_bytes() for path in pictures.iterdir()}) == len(shown)


def test_a_picture_without_code_is_refused(tmp_path: Path) -> None:
    skip_without({"matplotlib"})
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n![none](pictures/none.svg)\n", encoding="utf-8")
    with pytest.raises(ValueError, match=r"the block above pictures/none\.svg assigns no figure"):
        docs_script()["make_pictures"](page, tmp_path)


@pytest.mark.xdist_group("pictures")
def test_the_site_builds_and_has_every_public_name(pictures: Path, tmp_path: Path) -> None:
    """Strictly: a dead link fails the build, and griffe names arguments of a docstring that the function lacks."""
    for package in ("zensical", "mkdocstrings", "l2m4m"):
        pytest.importorskip(package)
    for name in ("docs", ".ci"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("pictures"))
    shutil.copytree(pictures, tmp_path / "docs" / "pictures")
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    (tmp_path / "admm_nxm").symlink_to(ROOT / "admm_nxm")
    done = subprocess.run(
        [sys.executable, "-m", "zensical", "build", "--strict"],
        cwd=tmp_path,
        env={**docs_script()["environment"](), "REPOSITORY_URL": "https://example.org/repository"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "griffe:" not in done.stdout + done.stderr, done.stdout + done.stderr
    site = tmp_path / "site"
    anchors = set(re.findall(r'id="(admm_nxm[\w.]*)"', (site / "api.html").read_text(encoding="utf-8")))
    assert [dotted for dotted in directives() if dotted not in anchors] == []
    assert "<math" in (site / "algorithm.html").read_text(encoding="utf-8")
    assert (site / "search.js").is_file()  # the index as a script, which pages on the disk can load
    for page in PAGES:
        if page.parent == ROOT / "docs":
            text = (site / f"{page.stem}.html").read_text(encoding="utf-8")
            assert f"admm_nxm {admm_nxm.__version__}" in text, f"{page} does not say the version"
            assert 'href="https://example.org/repository"' in text, f"{page} does not link the repository"
            assert re.findall(r"<(?:script|link|img)\b[^>]*\b(?:src|href)=\"https?:[^>]*>", text) == [], page
