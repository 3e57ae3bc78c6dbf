"""Build the documentation site into site/, or serve it while pages are written.

    python .ci/docs.py [serve]

First the code of docs/pictures.md is run, which makes the pictures of that page (docs/pictures/, not under version
control). Then Zensical builds the site, strictly: a dead link or an unknown name is an error. ``REPOSITORY_URL`` puts a
link to the repository into the header of each page.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


def make_pictures(page: Path, output: Path) -> list[str]:
    """Run the code of a page, block by block, and save the pictures that it shows.

    Args:
        page: Markdown; each picture is the ``figure`` that the block of Python above it has made.
        output: the folder to save to.

    Returns:
        The names of the pictures.

    Raises:
        ValueError: the block above a picture makes no figure.
    """
    from admm_nxm.report.plots import save_figure

    output.mkdir(parents=True, exist_ok=True)
    text = page.read_text(encoding="utf-8")
    namespace: dict[str, Any] = {"__name__": page.stem}
    saved = []
    for code, below in re.findall(r"^```python\n(.*?)^```\n(.*?)(?=^```python\n|\Z)", text, re.MULTILINE | re.DOTALL):
        earlier = namespace.get("figure")
        exec(compile(code, str(page), "exec", dont_inherit=True), namespace)
        for name in re.findall(r"\]\(pictures/([\w.-]+)\)", below):
            if namespace.get("figure") is earlier:
                raise ValueError(f"{page.name}: the block above pictures/{name} assigns no figure")
            save_figure(namespace["figure"], output / name)
            saved.append(name)
    return saved


def environment() -> dict[str, str]:
    """Return the environment that mkdocs.yml reads."""
    version = runpy.run_path(str(ROOT / "admm_nxm" / "_version.py"))["__version__"]
    return {**os.environ, "SITE_VERSION": f"admm_nxm {version}"}


def main() -> int:
    """Make the pictures, and build or serve the site."""
    make_pictures(ROOT / "docs" / "pictures.md", ROOT / "docs" / "pictures")
    command = ["serve"] if sys.argv[1:] == ["serve"] else ["build", "--strict", "--clean"]
    return subprocess.run(
        [sys.executable, "-m", "zensical", *command], cwd=ROOT, env=environment(), check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
