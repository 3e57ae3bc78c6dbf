"""What a release rests on: one version, a light import, complete packages, and workflows that do what they say.

`.ci/package` builds and installs the packages themselves; nothing is built here.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import subprocess
import sys
from email.message import Message
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

import admm_nxm

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parent.parent
WORKFLOWS = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
SHA = re.compile(r"^\s*-?\s*uses:\s*[\w.-]+/[\w./-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+$")


def project() -> dict[str, Any]:
    parsed: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    return parsed


# ------------------------------------------------------------------------------------------------------- version


def test_the_version_has_one_place() -> None:
    """Everything else reads it there."""
    assert re.fullmatch(r"\d+\.\d+\.\d+(?:\.dev\d+|rc\d+)?", admm_nxm.__version__)
    parsed = project()
    assert "version" not in parsed["project"]
    assert parsed["project"]["dynamic"] == ["version"]
    assert parsed["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "admm_nxm._version.__version__"}


def test_what_is_installed_says_the_same_version() -> None:
    installed = metadata.version("admm-nxm")
    assert installed == admm_nxm.__version__, 'the metadata is stale: pip install -c constraints.txt -e ".[dev]"'


def test_the_command_says_the_same_version(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("typer")
    main = importlib.import_module("admm_nxm.cli").main
    with pytest.raises(SystemExit) as stopped:
        sys.exit(main(["--version"]))
    assert stopped.value.code in (0, None)
    assert admm_nxm.__version__ in capsys.readouterr().out


def test_the_changelog_begins_with_this_version_or_with_what_is_unreleased() -> None:
    heading = re.search(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert heading is not None
    assert heading[1] in ("Unreleased", admm_nxm.__version__)


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", *(f"docs/{p.name}" for p in ROOT.glob("docs/*.md"))])
def test_no_page_names_another_version(page: str) -> None:
    """Generated pages are left out: they name the version that made their figures."""
    text = (ROOT / page).read_text(encoding="utf-8")
    if "<!-- Written by" in text[:400]:
        return
    named = re.findall(r"admm[-_]nxm(?:==|[- ])v?(\d+\.\d+\.\d+[\w.]*)", text)
    assert set(named) <= {admm_nxm.__version__}


# ------------------------------------------------------------------------------------------------------ metadata


def test_the_package_needs_torch_and_safetensors_and_nothing_else() -> None:
    required = [re.split(r"[<>=!~ \[;]", line)[0] for line in project()["project"]["dependencies"]]
    assert sorted(required) == ["safetensors", "torch"]


def test_every_extra_that_an_error_or_a_page_names_exists() -> None:
    extras = set(project()["project"]["optional-dependencies"])
    pages = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("admm_nxm/**/*.py"), *WORKFLOWS]
    named = {
        extra
        for page in pages
        for group in re.findall(r"(?:admm-nxm|[ \"]\.)\[([\w,-]+)\]", page.read_text(encoding="utf-8"))
        for extra in group.split(",")
    }
    assert {"dev", "hf"} <= named <= extras


def test_every_module_file_is_in_the_package() -> None:
    settings = project()["tool"]["setuptools"]
    assert settings["packages"]["find"]["include"] == ["admm_nxm*"]
    patterns = settings["package-data"]["admm_nxm"]
    for file in (ROOT / "admm_nxm").rglob("*"):
        if file.is_dir() or "__pycache__" in file.parts:
            continue
        inside = file.relative_to(ROOT / "admm_nxm").as_posix()
        assert file.suffix == ".py" or any(fnmatch(inside, pattern) for pattern in patterns), inside
        assert (file.parent / "__init__.py").is_file(), f"{file.parent} is no package"
    assert (ROOT / "admm_nxm" / "py.typed").read_bytes() == b""


def test_the_metadata_has_the_licence_the_readme_and_the_command() -> None:
    text: Message = metadata.metadata("admm-nxm")  # type: ignore[assignment]
    assert text["License-Expression"] == "Apache-2.0"
    assert text["Requires-Python"] == ">=3.10"
    entry = metadata.entry_points(group="console_scripts", name="admm-nxm")
    assert [point.value for point in entry] == ["admm_nxm.cli:main"]


def test_everything_that_the_tests_read_is_in_the_sdist() -> None:
    """Git's files, less what MANIFEST.in and setuptools' own rules take."""
    known = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=False)
    if known.returncode or not known.stdout:
        pytest.skip("not a git checkout")
    taken = {"pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"}
    patterns: list[str] = []
    for line in (ROOT / "MANIFEST.in").read_text(encoding="utf-8").splitlines():
        command, *words = line.split()
        if command == "include":
            patterns += words
        elif command == "recursive-include":
            patterns += [f"{words[0]}/{pattern}" for pattern in words[1:]]
    missing = [
        file
        for file in known.stdout.splitlines()
        if (ROOT / file).is_file()
        and file not in taken
        and not file.startswith("admm_nxm/")
        and file != ".gitignore"
        and not any(fnmatch(file, pattern) for pattern in patterns)
    ]
    assert missing == []


# -------------------------------------------------------------------------------------------------------- import


def test_importing_the_package_imports_nothing_that_is_optional_or_slow() -> None:
    code = (
        "import json, sys, torch\n"
        "before = set(sys.modules)\n"
        "import admm_nxm\n"
        "print(json.dumps(sorted(set(sys.modules) - before)))\n"
        "print('torch.distributed.tensor' in sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    new, is_there = done.stdout.splitlines()[-2:]
    extra = {name.split(".")[0] for name in json.loads(new)}
    known = {"admm_nxm", "safetensors"}
    heavy = {"accelerate", "matplotlib", "numpy", "onnx", "onnxruntime", "onnxscript", "rich", "scipy", "torchao"}
    assert known <= extra
    assert not extra & (heavy | {"transformers", "typer", "torch"})
    assert is_there == "False"


def test_the_command_without_its_extra_says_what_to_install() -> None:
    """As where typer is missing: one line on stderr, and a status that is not 0."""
    code = (
        "import sys\n"
        "class Missing:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('typer', 'rich'):\n"
        "            raise ModuleNotFoundError(f'No module named {name!r}', name=name)\n"
        "sys.meta_path.insert(0, Missing())\n"
        "sys.argv = ['admm-nxm', '--help']\n"
        "from admm_nxm.cli import main\n"
        "sys.exit(main())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.returncode != 0
    assert len(done.stderr.strip().splitlines()) == 1, done.stderr
    assert 'pip install ".[cli]"' in done.stderr


def test_import_time_is_measured_in_processes_of_their_own(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks" / "speed"))
    script: ModuleType = importlib.import_module("import_time")
    seen: list[tuple[str, ...]] = []

    def seconds_of(names: tuple[str, ...]) -> list[float]:
        seen.append(names)
        return [2.0, 0.25][: len(names)]

    monkeypatch.setattr(script, "seconds_of", seconds_of)
    assert script.main(["--rounds", "2"]) == 0
    alone, both = ("torch",), ("torch", "admm_nxm")
    assert seen == [both, alone, alone, both, both, alone]  # the first round is a warm-up
    assert "| admm_nxm, after torch | 250.0 | 250.0 to 250.0 | 250.0 to 250.0 |" in capsys.readouterr().out


def test_import_time_reads_what_the_process_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks" / "speed"))
    monkeypatch.setitem(os.environ, "PYTHONDONTWRITEBYTECODE", "1")
    seconds = importlib.import_module("import_time").seconds_of(("json", "string"))
    assert len(seconds) == 2
    assert all(value >= 0 for value in seconds)


# ----------------------------------------------------------------------------------------------------- workflows


def parsed(path: Path) -> dict[Any, Any]:
    yaml = pytest.importorskip("yaml")
    content: dict[Any, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return content


def steps(path: Path) -> list[dict[str, Any]]:
    return [step for job in parsed(path)["jobs"].values() for step in job["steps"]]


def test_there_are_the_two_workflows() -> None:
    assert [path.name for path in WORKFLOWS] == ["ci.yml", "publish.yml"]


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_a_workflow_has_no_more_rights_than_it_needs(path: Path) -> None:
    workflow = parsed(path)
    assert workflow["permissions"] == {"contents": "read"}
    assert workflow["concurrency"]["group"]
    rights = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert rights == ({"publish": {"id-token": "write"}} if path.name == "publish.yml" else {})
    assert all(job["timeout-minutes"] > 0 for job in workflow["jobs"].values())
    checkouts = [step for step in steps(path) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts
    assert all(step["with"]["persist-credentials"] is False for step in checkouts)


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_actions_are_pinned_to_a_commit_and_say_which_release_it_is(path: Path) -> None:
    lines = [line for line in path.read_text(encoding="utf-8").splitlines() if re.match(r"\s*-?\s*uses:", line)]
    assert lines
    assert [line for line in lines if not SHA.match(line)] == []


def test_an_action_has_the_same_commit_everywhere() -> None:
    used = {step["uses"] for path in WORKFLOWS for step in steps(path) if "uses" in step}
    assert len(used) == len({name.split("@")[0] for name in used})


@pytest.mark.parametrize("path", WORKFLOWS, ids=lambda path: path.name)
def test_commands_install_tested_versions_and_refer_to_files_that_exist(path: Path) -> None:
    commands = [step["run"] for step in steps(path) if "run" in step]
    for line in "\n".join(commands).splitlines():
        if "pip install" in line:
            assert re.search(r"-c (constraints|oldest)\.txt", line), line
        for file in re.findall(r"(?<![\w/$\"])((?:\.ci|tests|examples|admm_nxm|docs)/[\w./-]+|constraints\.txt)", line):
            assert (ROOT / file).exists(), line
    for script in (".ci/run", ".ci/package"):
        assert os.access(ROOT / script, os.X_OK)


def test_the_commands_of_a_developer_are_those_of_ci() -> None:
    """CONTRIBUTING has five commands; what they check is what CI checks."""
    table = re.search(r"## The five commands\n(.*?)\n## ", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.S)
    assert table is not None
    commands = re.findall(r"^\| [\w ]+ \| `(.+)` \|$", table[1], flags=re.MULTILINE)
    assert len(commands) == 5
    setup, test, lint, types, docs = commands
    ran = [line.strip() for step in steps(WORKFLOWS[0]) if "run" in step for line in step["run"].splitlines()]
    assert {setup, test, types} <= set(ran)
    assert {"ruff check .", "ruff format --check ."} <= set(ran)
    assert lint == "ruff check --fix . && ruff format ."
    assert docs == "python .ci/docs.py serve"
    assert "python .ci/docs.py" in ran


def test_publishing_waits_for_a_build_whose_tag_is_the_version(tmp_path: Path) -> None:
    workflow = parsed(ROOT / ".github" / "workflows" / "publish.yml")
    trigger = workflow[True]  # YAML reads the key `on` as true
    assert trigger == {"push": {"tags": ["v*"]}}
    assert workflow["jobs"]["publish"]["needs"] == "build"
    check = next(step["run"] for step in workflow["jobs"]["build"]["steps"] if "GITHUB_REF_NAME" in step.get("run", ""))
    changelog = f"## [{admm_nxm.__version__}] - 2026-01-01\n"
    for tag, text, fine in (
        (f"v{admm_nxm.__version__}", changelog, True),
        ("v9.9.9", changelog, False),
        (f"v{admm_nxm.__version__}", "## [Unreleased]\n", False),
    ):
        assert runs(check, tmp_path, tag, text) is fine


def runs(script: str, folder: Path, tag: str, changelog: str) -> bool:
    (folder / "admm_nxm").mkdir(exist_ok=True)
    (folder / "admm_nxm" / "_version.py").write_bytes((ROOT / "admm_nxm" / "_version.py").read_bytes())
    (folder / "CHANGELOG.md").write_text(changelog, encoding="utf-8")
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    environment = {**os.environ, "GITHUB_REF_NAME": tag, "PATH": path}
    # Actions runs a script so: it stops at the first command that fails.
    return subprocess.run(["bash", "-e", "-c", script], cwd=folder, env=environment, check=False).returncode == 0


def test_pre_commit_lints_with_the_version_that_ci_has() -> None:
    config = parsed(ROOT / ".pre-commit-config.yaml")
    repos = {repo["repo"]: repo for repo in config["repos"]}
    ruff = re.search(r"^ruff==(.+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), flags=re.MULTILINE)
    assert ruff is not None
    assert repos["https://github.com/astral-sh/ruff-pre-commit"]["rev"] == f"v{ruff[1]}"
    hooks = {hook["id"] for repo in config["repos"] for hook in repo["hooks"]}
    expected = {"ruff-check", "ruff-format", "mypy", "end-of-file-fixer", "check-yaml", "check-added-large-files"}
    assert expected <= hooks
