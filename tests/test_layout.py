"""Imports inside of the package run one way, and the core reads and writes no file."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import admm_nxm

PACKAGE = Path(admm_nxm.__file__).parent

LAYERS = ("cli", "integrations", "export", "report", "io")
"""The folders, from the top down; below them is the core, which is the modules beside them."""

ORDER = ("optimizer", "sparsity", "selection", "projection", "pattern")
"""Modules of the core, from the top down: none imports, even through another, what stands before it."""

ENTRY = {"admm_nxm.__init__", "admm_nxm.__main__"}
"""What puts the package together may import from anywhere."""


def name_of(file: Path) -> str:
    return ".".join(("admm_nxm", *file.relative_to(PACKAGE).with_suffix("").parts))


MODULES = {name_of(file): file for file in sorted(PACKAGE.rglob("*.py"))}


def resolved(parts: list[str]) -> str:
    """The module that a dotted name means or lies in; a folder is its ``__init__``."""
    while parts:
        for name in (".".join(parts), ".".join([*parts, "__init__"])):
            if name in MODULES:
                return name
        parts = parts[:-1]
    raise AssertionError("the name is of another package")


def imports_of(module: str, source: str) -> set[str]:
    """The modules of the package that a source text imports anywhere, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {resolved(alias.name.split(".")) for alias in node.names if alias.name.split(".")[0] == "admm_nxm"}
        elif isinstance(node, ast.ImportFrom):
            base = module.split(".")[: -node.level] if node.level else []
            base += node.module.split(".") if node.module else []
            if base[0] == "admm_nxm":
                found |= {resolved([*base, alias.name]) for alias in node.names}
    return found - {module}


IMPORTS = {name: imports_of(name, file.read_text(encoding="utf-8")) for name, file in MODULES.items()}


def layer_of(module: str) -> int:
    """The place of a module's folder in ``LAYERS``; that of the core is the last."""
    folder = module.split(".")[1]
    return LAYERS.index(folder) if folder in LAYERS else len(LAYERS)


def reached_from(module: str) -> set[str]:
    found: set[str] = set()
    left = [module]
    while left:
        for name in IMPORTS[left.pop()] - found:
            found.add(name)
            left.append(name)
    return found


def test_the_folders_are_those_of_the_design() -> None:
    folders = {file.relative_to(PACKAGE).parts[0] for file in MODULES.values() if file.parent != PACKAGE}
    assert folders == set(LAYERS)


def test_imports_run_from_the_top_down() -> None:
    upward = [
        f"{module} imports {other}"
        for module, others in IMPORTS.items()
        for other in others
        if module not in ENTRY and (other in ENTRY or layer_of(other) < layer_of(module))
    ]
    assert upward == []


def test_the_core_imports_nothing_for_files() -> None:
    core = [file for name, file in MODULES.items() if name not in ENTRY and layer_of(name) == len(LAYERS)]
    assert len(core) > 10
    for file in core:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            tops = {name.split(".")[0] for name in names}
            assert tops.isdisjoint({"safetensors", "pathlib", "shutil", "tempfile", "json", "onnx"}), file.name


@pytest.mark.parametrize("place", range(len(ORDER)), ids=ORDER)
def test_the_core_has_an_order(place: int) -> None:
    above = {f"admm_nxm.{name}" for name in ORDER[:place]}
    assert reached_from(f"admm_nxm.{ORDER[place]}").isdisjoint(above)


def test_no_module_is_reached_by_itself() -> None:
    """Whole modules; a folder's ``__init__`` that gathers its modules is passed through."""
    for module in MODULES:
        assert module not in reached_from(module), module


def test_no_file_is_private() -> None:
    """An underscore marks what is private to one module; the version is read by the build."""
    private = {name for name in MODULES if name.rpartition(".")[2].startswith("_")}
    assert {name for name in private if not name.endswith("__")} == {"admm_nxm._version"}


def test_an_import_is_found_in_each_of_its_spellings() -> None:
    source = "import admm_nxm.io.files\nfrom .. import pattern\nfrom ..selection import Select\nimport torch\n"
    source += "def late():\n    from . import packing\n    from .packed import pack\n"
    assert imports_of("admm_nxm.io.verify", source) == {
        f"admm_nxm.{name}" for name in ("io.files", "pattern", "selection", "io.packing", "io.packed")
    }
