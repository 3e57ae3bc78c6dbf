"""admm-nxm train on a tiny model and tiny data: the whole way, every kind of file and each kind of bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import sys
import types
from pathlib import Path

import pytest
import torch

from admm_nxm import verify
from admm_nxm.cli import main
from tests.test_cli import Terminal, call, call_json, fails, process
from tests.tiny import rows_of, tiny_bert, write

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("matplotlib")
pytest.importorskip("tokenizers")

SAVED = {
    "README.md",
    "admm_nxm.json",
    "config.json",
    "history.jsonl",
    "history.svg",
    "model.safetensors",
    "model_error.svg",
    "sparsity.svg",
    "tokenizer.json",
    "tokenizer_config.json",
    "training.json",
    "weights.svg",
}


def names_in(folder):
    """The files of a folder, without one that older transformers write beside the tokenizer."""
    return {path.name for path in Path(folder).iterdir()} - {"special_tokens_map.json"}


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory):
    return tiny_bert(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture
def pictures():
    """Ask for the pictures of a run."""


@pytest.fixture(autouse=True)
def few_pictures(request, monkeypatch):
    """Leave the drawing, which takes most of the time, to the tests that look at the pictures."""
    import admm_nxm.cli.saving as saving

    if "pictures" not in request.fixturenames:
        monkeypatch.setattr(saving, "save_figure", lambda _, path: path.write_text("<svg"))
        for name in ("plot_history", "plot_model_error", "plot_sparsity", "plot_weights"):
            monkeypatch.setattr(saving, name, lambda *_, **__: None)


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def arguments(model_folder, here):
    """The options of a run that takes a second."""
    write(here / "texts.csv", rows_of(80))
    return {
        "--model": model_folder,
        "--data": "texts.csv",
        "-o": "out",
        "--steps": 40,
        "--batch-size": 8,
        "--lr": "5e-3",
        "--device": "cpu",
    }


def argv(arguments, *flags, **changes):
    options = {("-o" if key == "output" else f"--{key.replace('_', '-')}"): value for key, value in changes.items()}
    merged = {**arguments, **options}
    return ["train", *(part for pair in merged.items() if pair[1] is not None for part in pair), *flags]


def load(folder):
    model = transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()
    return model, transformers.AutoTokenizer.from_pretrained(folder)


def logits(folder, texts):
    model, tokenizer = load(folder)
    with torch.no_grad():
        return model(**tokenizer(texts, padding=True, return_tensors="pt")).logits


def test_from_texts_to_a_packed_model_and_back(arguments, here, monkeypatch, capsys):
    """Train, verify, report, pack, verify the packed one, unpack, verify again; all without the network."""

    def refuse(*args, **kwargs):
        raise AssertionError("local files need no network")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    status, out, err = call(capsys, *argv(arguments))
    assert status == 0
    assert "pruned    after step 34, model error " in out
    assert "use       sparse tensor cores could take 12 of 12 weights in 16 bits: --dtype bfloat16" in out
    assert "held-out texts right, 95 % interval" in out
    assert "verify    ok (12 weights in out, 50.00% zeros)" in out
    assert "admm-nxm pack out -o out-packed\n" in out
    assert err.startswith("model   ")
    assert "data    80 texts: fruit 40, metal 40\nlabels  0 = fruit, 1 = metal\n" in err
    assert "60 to train, 20 to test" in err
    assert "prune   12 weights, 16,384 of" in err
    assert "step 40/40  loss" in err
    assert names_in("out") == SAVED
    assert sorted(path.name for path in here.iterdir()) == ["out", "texts.csv"]

    for command in (
        ["verify", "out"],
        ["report", "out"],
        ["pack", "out", "-o", "out-packed"],
        ["verify", "out-packed"],
    ):
        assert call(capsys, *command)[0] == 0
    assert call(capsys, "unpack", "out-packed", "-o", "back")[0] == 0
    assert call(capsys, "verify", "back")[0] == 0
    assert names_in("back") == SAVED
    for name in SAVED:
        assert Path("back", name).read_bytes() == Path("out", name).read_bytes()
    packed = Path("out-packed", "README.md").read_text()
    assert "load_packed_model" in packed
    assert packed.index("cannot read them") < packed.index("# out")
    texts = [text for text, _ in rows_of(80)]
    assert torch.equal(logits("back", texts), logits("out", texts))


@pytest.mark.usefixtures("pictures")
def test_json_records_and_model_agree(arguments, capsys):
    status, told, err = call_json(capsys, *argv(arguments, seed=3))
    assert status == 0
    assert "step 40/40" in err
    assert (told["command"], told["ok"], told["output"]) == ("train", True, "out")
    assert told["settings"]["steps"] == 40
    assert told["settings"]["pattern"] == "2:4"
    assert told["settings"]["max_length"] == 64
    assert told["data"] == {"labels": ["fruit", "metal"], "train": 60, "test": 20}
    assert told["pruning"]["pruned_at"] == 34
    assert len(told["pruning"]["model_errors"]) == 12
    assert 0 < told["pruning"]["model_error"] < 1
    assert told["versions"]["torch"] == torch.__version__
    accuracy = told["accuracy"]
    # One word tells the classes apart: whoever trains at all gets nearly all of them right.
    assert accuracy["total"] == 20
    assert accuracy["correct"] >= 16
    assert accuracy["interval"][0] < accuracy["share"] <= accuracy["interval"][1]
    assert accuracy["most_frequent_share"] == 0.5
    report = verify("out")
    assert report.ok
    assert told["verify"]["weights"][3]["zeros"] == report.weights[3].zeros

    training = json.loads(Path("out/training.json").read_text())
    # The record that goes with the model has the names of folders, and not where they were.
    settings = {**told["settings"], "model": Path(told["settings"]["model"]).name}
    assert Path(told["settings"]["model"]).is_absolute()
    assert training == {**{key: told[key] for key in training}, "settings": settings}
    rows = [json.loads(line) for line in Path("out/history.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert all({"loss", "admm/sparsity", "admm/phase"} <= row.keys() for row in rows)
    assert [row["admm/phase"] for row in rows] == ["dense"] * 25 + ["calibration"] * 8 + ["frozen"] * 7
    card = Path("out/README.md").read_text()
    assert f"{accuracy['correct']} of 20 held-out texts" in card
    assert "0 violate the pattern" in card
    assert all(
        "<svg" in Path(f"out/{name}.svg").read_text() for name in ("history", "model_error", "sparsity", "weights")
    )

    model, tokenizer = load("out")
    assert model.config.id2label == {0: "fruit", 1: "metal"}
    right = sum(logits("out", [text]).argmax().item() == ("fruit", "metal").index(label) for text, label in rows_of(80))
    assert right >= 64
    assert tokenizer("apple")["input_ids"]


def test_another_seed_gives_other_weights(arguments, capsys):  # the same seed: see the runs that are resumed
    for name, seed in (("a", 0), ("c", 1)):
        assert call(capsys, *argv(arguments, output=name, steps=4, seed=seed))[0] == 0
    first, second = (Path(name, "model.safetensors").read_bytes() for name in "ac")
    assert first != second


@pytest.mark.parametrize("kind", ["tsv", "jsonl"])
def test_kinds_of_files_columns_and_patterns(arguments, here, capsys, kind):
    rows = [(text, f"{label}s") for text, label in rows_of(60)]
    write(here / f"own.{kind}", rows, ("body", "topic"))
    options = {"data": f"own.{kind}", "text_column": "body", "label_column": "topic", "pattern": "1:4", "steps": 4}
    status, told, _ = call_json(capsys, *argv(arguments, **options))
    assert status == 0
    assert told["data"]["labels"] == ["fruits", "metals"]
    assert verify("out").sparsity == 0.75  # by the recorded selection


def test_pairs_of_texts(arguments, here, capsys):
    """Whether both texts are of one kind; the two columns reach the model as one pair."""
    words = [text for text, _ in rows_of(80)]
    rows = [(words[i], words[(i + 1 + i // 2 % 2) % 80], "same" if i // 2 % 2 else "other") for i in range(80)]
    write(here / "pairs.csv", rows, ("first", "second", "label"))
    pair = ("--text-column", "first", "--text-column", "second")
    status, told, _ = call_json(capsys, *argv(arguments, *pair, data="pairs.csv", steps=4))
    assert status == 0
    assert told["settings"]["text_columns"] == ["first", "second"]
    command = argv(arguments, *pair, "--text-column", "third", data="pairs.csv", output="x")
    fails_at_once(capsys, command, ["--text-column is given 3 times"])
    command = argv(arguments, *pair, output="x")
    fails_at_once(capsys, command, ["has no column 'first' and no column 'second'", "'text', 'label'", "--text-column"])


def test_rules_choose_weights(arguments, capsys):
    rules = (r".*layer\.1.*dense\.weight=1:4", r".*attention.*=dense")
    command = argv(arguments, *(part for rule in rules for part in ("--select", rule)), steps=4)
    assert call(capsys, *command)[0] == 0
    report = verify("out")
    assert report.ok
    assert len(report.weights) == 3
    assert report.sparsity == 0.75
    assert not verify("out", "2:4").ok  # the rest stayed dense


def test_texts_to_test_on_of_their_own(arguments, here, capsys):
    rows = rows_of(80)
    write(here / "test.jsonl", [*rows[:6], *rows[:2], ("more of the zinc", "metal")])
    status, told, err = call_json(capsys, *argv(arguments, eval_data="test.jsonl", steps=4))
    assert status == 0
    # What is in both is for the test alone, and what is twice in the test counts once.
    distinct = len({text for text, _ in rows})
    assert told["data"] == {"labels": ["fruit", "metal"], "train": distinct - 6, "test": 7}
    assert "test    9 texts: " in err

    write(here / "test.jsonl", [("the fig", "plant")])
    fails_at_once(capsys, argv(arguments, eval_data="test.jsonl", output="x"), ["label 'plant'", "--data lacks"])
    write(here / "test.jsonl", [])
    fails_at_once(capsys, argv(arguments, eval_data="test.jsonl", output="x"), ["--eval-data test.jsonl is empty"])
    write(here / "test.jsonl", rows)
    fails_at_once(capsys, argv(arguments, eval_data="test.jsonl", output="x"), ["none is left to train on"])
    fails_at_once(capsys, argv(arguments, eval_data="no.csv", output="x"), ["--eval-data no.csv: no such file"])


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_long_texts(tmp_path, kind):
    """The csv module stops at 128 KiB by itself; its limit is as before afterwards."""
    from admm_nxm.cli.texts import read_file

    rows = [("word " * 100_000, "long"), ("word", "short")]
    before = csv.field_size_limit()
    assert read_file(write(tmp_path / f"long.{kind}", rows)) == rows
    assert csv.field_size_limit() == before


def test_steps_and_length_have_defaults(arguments, here, monkeypatch, capsys):
    write(here / "few.csv", rows_of(8))
    command = argv(arguments, data="few.csv", steps=None, batch_size=2, max_length=6)
    stop_at(monkeypatch, 2, signal.SIGINT)
    status, _, err = call(capsys, *command)
    assert status == 130
    assert "budget  200 steps of 2 texts" in err
    assert "distinct in their first 6 tokens" in err


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_of_a_few_steps_says_so(arguments, capsys, steps):
    status, told, err = call_json(capsys, *argv(arguments, steps=steps))
    assert status == 0  # the weights are in the pattern all the same
    (few,) = told["notes"]
    assert few.startswith(f"{steps} steps are few: by default it would be 200")
    assert few.endswith("give more --steps, or leave the option out")
    assert f"note    {few}\n" in err
    assert "Warning" not in err
    assert json.loads(Path("out/training.json").read_text())["notes"] == told["notes"]


def test_random_encoder_weights_are_told(arguments, model_folder, here, capsys):
    model = transformers.BertModel.from_pretrained(model_folder)
    state = {key: value for key, value in model.state_dict().items() if "layer.1" not in key}
    model.save_pretrained(here / "partial", state_dict=state)
    transformers.AutoTokenizer.from_pretrained(model_folder).save_pretrained(here / "partial")
    status, _, err = call(capsys, *argv(arguments, model="partial", steps=2))
    assert status == 0
    assert "16 weights start at random, as the checkpoint does not have them: " in err


def test_saved_weights_that_violate_the_pattern(arguments, monkeypatch, capsys):
    import admm_nxm.cli.training as training

    dense = {"layer.0.fc.weight": torch.ones(4, 8)}
    monkeypatch.setattr(training, "verify", lambda folder: verify(dense, "2:4"))
    status, out, _ = call(capsys, *argv(arguments, steps=4))
    assert status == 1
    assert "verify    FAILED for out" in out
    assert "pattern VIOLATED by 1 of 1 weights" in out
    assert "next" not in out


def gpt2(folder, model_folder, **tokens):
    """A tiny decoder, with Conv1D layers, whose tokenizer has no padding token."""
    words = json.loads((model_folder / "tokenizer.json").read_text())["model"]["vocab"]
    core = {"tokenizer_file": str(model_folder / "tokenizer.json"), "unk_token": "[UNK]"}
    transformers.PreTrainedTokenizerFast(**core, **tokens).save_pretrained(folder)
    config = {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
    transformers.GPT2Model(transformers.GPT2Config(vocab_size=len(words), **config)).save_pretrained(folder)


def test_a_decoder(arguments, model_folder, here, capsys):
    gpt2(here / "decoder", model_folder, eos_token="[SEP]")
    status, told, _ = call_json(capsys, *argv(arguments, model="decoder", steps=4))
    assert status == 0
    assert [weight["dim"] for weight in told["verify"]["weights"]] == [0] * 8
    assert call(capsys, "verify", "out")[0] == 0
    gpt2(here / "never", model_folder)
    fails_at_once(capsys, argv(arguments, model="never", output="x"), ["--model never: its tokenizer can not pad"])


def test_a_model_that_cannot_read_the_texts_is_told_before_the_training(arguments, here, capsys):
    tiny_bert(here / "small", vocab_size=6)  # its tokenizer knows 17 words
    fails_at_once(
        capsys,
        argv(arguments, model="small", output="x"),
        ["--model small fails on the first texts: index out of range", "give a model that transformers can fine-tune"],
    )


def test_a_label_that_is_not_a_number_is_missing(arguments, here, capsys):
    (here / "nan.jsonl").write_text('{"text": "fig", "label": 1.0}\n{"text": "tin", "label": NaN}\n')
    fails_at_once(capsys, argv(arguments, data="nan.jsonl", output="x"), ["record 2 has no label"])


def test_positions_behind_the_padding_are_counted_out():
    from admm_nxm.cli.classifier import length_limit

    small = {"vocab_size": 9, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    tokenizer = types.SimpleNamespace(model_max_length=1000)
    for kind, limit in (("Roberta", 64), ("Bert", 66)):
        config = getattr(transformers, f"{kind}Config")(**small, intermediate_size=8, max_position_embeddings=66)
        assert length_limit(getattr(transformers, f"{kind}Model")(config), tokenizer) == limit


def test_overwrite(arguments, capsys):
    Path("out").mkdir()
    Path("out", "mine.txt").write_text("mine")
    fails(capsys, *argv(arguments, steps=4), parts=["--output out: out exists", "--overwrite"])
    assert Path("out", "mine.txt").read_text() == "mine"
    fails_at_once(capsys, argv(arguments, "--overwrite", data="absent.csv"), ["absent.csv: no such file"])
    assert Path("out", "mine.txt").read_text() == "mine"
    assert call(capsys, *argv(arguments, "--overwrite", steps=4))[0] == 0
    assert names_in("out") == SAVED


@pytest.mark.parametrize("option", ["--data", "--eval-data", "--model"])
def test_what_is_read_is_not_deleted(arguments, model_folder, here, capsys, option):
    """A folder that is replaced goes with all it holds: no texts and no model may lie in it."""
    kept = here / "project" / "deep"
    kept.mkdir(parents=True)
    write(kept / "texts.csv", rows_of(8))
    shutil.copytree(model_folder, kept / "model")
    files = sorted(path for path in (here / "project").rglob("*"))
    inside = "project/deep/model" if option == "--model" else "project/deep/texts.csv"
    parts = [f"--output project: project holds what is read ({inside})", "write to another folder"]
    for flags in ((), ("--overwrite",)):
        fails_at_once(capsys, [*argv(arguments, *flags, output="project"), option, inside], parts)
    assert sorted(path for path in (here / "project").rglob("*")) == files


@pytest.mark.parametrize("way", ["to", "from"])
def test_texts_behind_a_link_are_not_deleted(arguments, here, capsys, way):
    (here / "project").mkdir()
    inside, outside = here / "project" / "texts.csv", here / "linked.csv"
    inside, outside = (inside, outside) if way == "to" else (outside, inside)
    write(inside, rows_of(8))
    outside.symlink_to(inside)
    given = outside if way == "to" else outside.relative_to(here)
    command = argv(arguments, "--overwrite", data=given, output=here / "project" / ".." / "project")
    fails_at_once(capsys, command, ["holds what is read", "write to another folder"])
    assert outside.is_symlink()


# ---------------------------------------------------------------------- bad input

BAD_FILES = {
    "text.csv": ("body,label\na,x\n", ["has no column 'text'; ", "are 'body', 'label'", "--text-column"]),
    "label.csv": ("text,topic\na,x\n", ["has no column 'label'; ", "are 'text', 'topic'", "--label-column"]),
    "headless.csv": ("apple,x\npear,y\n", ["are 'apple', 'x'", "put a header above it: text,label"]),
    "semicolons.csv": ("body;label\na;x\n", ["has no column 'text'; ", "are 'body', 'label'"]),
    "keys.jsonl": ('{"body": "a", "label": 1}\n', ["record 1 has no text (columns: body, label)", "--text-column"]),
    "floats.csv": ("text,label\na,0.5\nb,1.25\n", ["numbers such as 0.5, and regression is not supported"]),
    "header.csv": ("text,label\n", ["no usable row below its header; add rows with text and label"]),
    "spaces.jsonl": (" \n\n", ["spaces.jsonl is empty"]),
    "blank.csv": ("text,label\napple,x\n  ,y\n", ["line 3: record 2 has no text", "--on-bad-row skip"]),
    "unnamed.tsv": ("text\tlabel\napple\t\n", ["line 2: record 1 has no label"]),
    "object.jsonl": ('{"text": {"a": 1}, "label": 1}\n', ["record 1 has an object as text"]),
    "list.jsonl": ('{"text": "a", "label": ["x"]}\n', ["record 1 has a list as label"]),
    "not.jsonl": ('{"text": "a", "label": 1}\n\n{"text": \n', ["not.jsonl, line 3 is not JSON"]),
    "deep.jsonl": ("[" * 100_000, ["deep.jsonl, line 1 is not JSON"]),
    "file.txt": ("a", ["ends in .txt", "give a .csv, .tsv or .jsonl file"]),
    "binary.csv": (b"text,label\n\xff,x\n", ["UTF-8"]),
    "commas.csv": ("text,label\na,b,x\n", ["line 2 has 3 fields, and the header has 2", "quotation marks"]),
    "quotes.csv": ('text,label\nfine,x\n"a"b,x\n', ["quotes.csv, line 3: ", "quotation marks"]),
    "open.csv": ('text,label\n"a,x\nb,y\n', ["open.csv, line 2: ", "quotation marks"]),
    "twice.csv": ("text,text,label\na,b,x\n", ["has the column 'text' twice"]),
    "empty.csv": ("", ["empty.csv is empty; give a file with text and label in each row"]),
    "one.csv": ("text,label\na,x\nb,x\n", ["2 texts with the labels ['x']; at least 2 different"]),
    "single.csv": (
        "text,label\napple,x\npear,x\ntin,y\ntin,y\n",
        ["label 'y' has 1 distinct text; 2 are needed, to train and to test"],
    ),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_data_file(arguments, here, capsys, name):
    content, parts = BAD_FILES[name]
    (here / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    fails_at_once(capsys, argv(arguments, data=name), parts)


def fails_at_once(capsys, command, parts):
    """The command ends before any training, with one error after the notes, and leaves nothing behind."""
    before = sorted(Path().iterdir())
    status, out, err = call(capsys, *command)
    assert (status, out) == (2, "")
    assert "step" not in [line.split(maxsplit=1)[0] for line in err.splitlines()]
    *notes, error = err.splitlines()
    assert error.startswith("admm-nxm: error: ")
    assert not any("error" in line for line in notes)
    for part in parts:
        assert part in error
    assert sorted(Path().iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "parts"),
    [
        ({"model": None}, ["Missing option '--model'", "see admm-nxm train --help"]),
        ({"data": None}, ["Missing option '--data'", "see admm-nxm train --help"]),
        ({"data": "absent.csv"}, ["--data absent.csv: no such file", "give a .csv, .tsv or .jsonl file"]),
        ({"pattern": "4:2"}, ["--pattern: ", "'4:2'", 'write "2:4"']),
        ({"pattern": "2:7"}, ["layer.0.attention.self.query.weight' of shape (32, 32) cannot be pruned to 2:7"]),
        ({"model": "./nope/x"}, ["--model ./nope/x: no such folder (a folder or a hub name is needed)"]),
        ({"model": "empty/tiny"}, ["--model empty/tiny: no such folder (a folder or a hub name is needed)"]),
        ({"dtype": "int8"}, ["'--dtype': int8 is none of float32, bfloat16, float16"]),
        ({"on_bad_row": "ask"}, ["'--on-bad-row': ask is none of error, skip"]),
        ({"model": "empty"}, ["--model empty", "a folder or a hub name is needed"]),
        ({"model": "untold"}, ["--model untold has no tokenizer"]),
        ({"model": "cut"}, ["--model cut: ", "; give another model"]),
        ({"device": "warp"}, ["--device warp", "try --device cpu"]),
        ({"device": "meta"}, ["--device meta", "try --device cpu"]),
        ({"lr": "nan"}, ["'--lr': nan is no finite number above 0"]),
        ({"lr": "-1"}, ["'--lr': -1 is no finite number above 0"]),
        ({"lr": "fast"}, ["'--lr': fast is no finite number above 0"]),
        ({"steps": 0}, ["'--steps': 0 is no whole number of at least 1"]),
        ({"batch_size": 1.5}, ["'--batch-size': 1.5 is no whole number of at least 1"]),
        ({"seed": -1}, ["'--seed': -1 is no whole number from 0"]),
        ({"max_length": 65}, ["--max-length 65 is more than", "give at most 64"]),
        ({"max_length": 2}, ["--max-length 2 leaves no room beside 2 special tokens"]),
        ({"output": "texts.csv"}, ["--output texts.csv: texts.csv holds what is read"]),
        ({"output": "no/such"}, ["there is no folder no"]),
    ],
)
def test_bad_option(arguments, model_folder, here, capsys, changes, parts):
    (here / "empty").mkdir()
    shutil.copytree(model_folder, here / "untold", ignore=shutil.ignore_patterns("tokenizer*"))
    shutil.copytree(model_folder, here / "cut")
    with (here / "cut" / "model.safetensors").open("r+b") as file:
        file.truncate(20_000)
    fails_at_once(capsys, argv(arguments, **changes), parts)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_absent_gpu(arguments, capsys):
    fails_at_once(capsys, argv(arguments, device="cuda"), ["--device cuda", "try --device cpu"])


@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:1"])
def test_a_gpu_has_an_index(monkeypatch, name):
    """torch.cuda.set_device takes no other."""
    from admm_nxm.cli.classifier import find_device

    real = torch.zeros
    tried = []

    def zeros(count, device):
        tried.append(device)
        return real(count)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch, "zeros", zeros)
    assert find_device(name) == torch.device("cuda", 1)
    assert tried == [torch.device("cuda", 1)]


def test_the_run_is_on_that_gpu_and_no_other(arguments, tmp_path, monkeypatch):
    """Trainer sets the process up for the first GPU; the run takes the one that was asked for."""
    import admm_nxm.cli.training as training

    taken = []

    def set_device(device):
        taken.append(torch.cuda._utils._get_device_index(device))  # refuses what the real one refuses

    settings = types.SimpleNamespace(batch_size=8, lr=1e-4, seed=0, dtype="float32", checkpoint_every=None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    args = training._arguments(settings, 20, torch.device("cuda", 1), tmp_path)
    assert taken[-1] == 1
    assert args.device == torch.device("cuda", 1)
    assert args.distributed_state.device == torch.device("cuda", 1)
    assert args.n_gpu == 1
    assert not args.use_cpu
    assert training._DEVICE_OF_ACCELERATE not in os.environ


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("name", ["auto", "cuda", "cuda:0"])
def test_on_a_gpu(arguments, capsys, name):
    status, told, _ = call_json(capsys, *argv(arguments, device=name, steps=4))
    assert (status, told["settings"]["device"]) == (0, "cuda:0")
    assert call(capsys, "verify", "out")[0] == 0


def test_the_model_is_not_overwritten(arguments, model_folder, here, capsys):
    shutil.copytree(model_folder, here / "mine")
    fails_at_once(capsys, argv(arguments, "--overwrite", model="mine", output="mine"), ["holds what is read"])
    assert (here / "mine" / "config.json").is_file()


@pytest.mark.parametrize("cached", [True, False])
def test_a_name_of_the_hub_without_a_network(arguments, model_folder, monkeypatch, capsys, cached):
    """One question with a limit, and not the minute of retries that the loaders take."""
    import admm_nxm.cli.classifier as classifier

    asked = []

    def absent(self, name, timeout):
        asked.append((name, timeout))
        raise ConnectionError("Name or service not known")

    monkeypatch.setattr(classifier.HfApi, "model_info", absent)
    found = str(model_folder / "config.json") if cached else None
    monkeypatch.setattr(classifier, "try_to_load_from_cache", lambda *_: found)
    name = f"bert-{cached}"
    if cached:  # what the cache has is loaded from there alone
        loaded = []
        monkeypatch.setattr(
            transformers.AutoTokenizer, "from_pretrained", lambda *_, **options: loaded.append(options) or 1 / 0
        )
        assert call(capsys, *argv(arguments, model=name))[0] == 70
        assert loaded[0]["local_files_only"] is True
    else:
        parts = [f"--model {name}: no such folder, and the hub cannot be reached: Name or service", "give a model"]
        fails_at_once(capsys, argv(arguments, model=name), parts)
    assert asked == [(name, 5.0)]


def test_a_name_that_the_hub_does_not_know(arguments, monkeypatch, capsys):
    import admm_nxm.cli.classifier as classifier

    def unknown(self, name, timeout):
        raise classifier.HFValidationError("no such name\nat all")

    monkeypatch.setattr(classifier.HfApi, "model_info", unknown)
    fails_at_once(
        capsys, argv(arguments, model="bert-bse"), ["no such folder, and the hub has no such model", "no such name"]
    )


def test_weights_that_blow_up(arguments, here, capsys):
    status, out, err = call(capsys, *argv(arguments, lr="1e30"))
    assert (status, out) == (2, "")
    assert "infinite" in err.splitlines()[-1]
    assert "lower the learning rate" in err.splitlines()[-1]
    assert sorted(path.name for path in here.iterdir()) == ["texts.csv"]


def test_too_little_memory(arguments, monkeypatch, capsys):
    import admm_nxm.cli.training as training

    def train(self, **_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore")

    monkeypatch.setattr(training.SparseTrainer, "train", train)
    fails_at_once(capsys, argv(arguments), ["CUDA out of memory", "give a smaller --batch-size or --max-length"])


# ---------------------------------------------------------------------- progress


def follow(steps):
    """Show a run of so many steps; the loss is the step's number."""
    from admm_nxm.cli.progress import StepProgress

    progress = StepProgress()
    state = transformers.TrainerState(max_steps=steps)
    with progress.bar:
        for step in range(1, steps + 1):
            state.global_step = step
            progress.on_step_end(None, state, None)
            state.log_history.append({"loss": float(step), "admm/phase": "frozen"})
            progress.on_log(None, state, None)
        state.log_history.append({"train_runtime": 1.0})
        progress.on_log(None, state, None)


def test_progress_on_a_terminal_is_a_bar(monkeypatch):
    terminal = Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    monkeypatch.setattr(sys, "stderr", terminal)
    follow(40)
    assert "40/40" in terminal.text
    assert "loss 40.000  frozen" in terminal.text
    assert "step" not in terminal.text


def test_progress_elsewhere_is_a_line_now_and_then(capsys):
    follow(200)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [f"step {step:>3}/200  loss {step:.3f}  frozen" for step in (1, *range(20, 201, 20))]


# ---------------------------------------------------------------------- as a process


def stop_at(monkeypatch, step, number):
    """Have a signal come in that step of each run, once."""
    from admm_nxm.cli.progress import StepProgress

    def on_step_begin(self, args, state, control, **_):
        if state.global_step + 1 == step and stopped == []:
            stopped.append(step)
            signal.raise_signal(number)

    stopped = []
    monkeypatch.setattr(StepProgress, "on_step_begin", on_step_begin)


@pytest.fixture(scope="module")
def whole(model_folder, tmp_path_factory):
    """The output of a run that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    write(folder / "texts.csv", rows_of(80))
    options = {"--model": model_folder, "--data": folder / "texts.csv", "-o": folder / "out", "--device": "cpu"}
    assert main([str(part) for part in argv({**options, "--steps": 20, "--batch-size": 8, "--lr": "5e-3"})]) == 0
    return folder / "out"


STOPPED = [(signal.SIGINT, 130, "interrupted", 3), (signal.SIGTERM, 143, "ended by SIGTERM", 16)]
if hasattr(signal, "SIGHUP"):
    STOPPED.append((signal.SIGHUP, 129, "ended by SIGHUP", 20))


@pytest.mark.parametrize(("number", "status", "message", "step"), STOPPED)
def test_a_run_that_is_stopped_keeps_a_checkpoint(
    arguments, whole, here, monkeypatch, capsys, number, status, message, step
):
    """In the dense phase, in calibration and in the last step: what comes of it is the same to the bit."""
    usual = signal.signal(number, signal.SIG_DFL if number != signal.SIGINT else signal.default_int_handler)
    try:
        stop_at(monkeypatch, step, number)
        found, out, err = call(capsys, *argv(arguments, steps=20))
    finally:
        signal.signal(number, usual)
    assert (found, out) == (status, "")
    assert err.splitlines()[-1] == f"admm-nxm: error: {message}"
    assert f"kept    step {step} of 20 in out.run; --resume goes on from there\n" in err
    assert sorted(path.name for path in here.iterdir()) == ["out.run", "texts.csv"]
    fails(capsys, *argv(arguments, steps=20), parts=["out.run is there", "--resume", "--overwrite"])
    found, _, err = call(capsys, *argv(arguments, "--resume", steps=20, lr=1e-3))
    assert found == 2
    assert "the run at out.run was begun with another --lr (0.005, and now 0.001)" in err
    found, _, err = call(capsys, *argv(arguments, "--resume", steps=20))
    assert found == 0
    assert f"resume  from out.run/sparse/checkpoint-{step}\n" in err
    assert (here / "out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    first, second = (Path(folder, "history.jsonl").read_text().splitlines() for folder in ("out", whole))
    assert list(map(json.loads, first)) == list(map(json.loads, second))
    assert sorted(path.name for path in here.iterdir()) == ["out", "texts.csv"]


def test_a_second_signal_stops_at_once(arguments, here, monkeypatch, capsys):
    from admm_nxm.cli.progress import StepProgress

    def on_step_begin(self, args, state, control, **_):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(StepProgress, "on_step_begin", on_step_begin)
    monkeypatch.setattr(StepProgress, "on_step_end", on_step_begin)
    assert call(capsys, *argv(arguments))[0] == 130
    assert sorted(path.name for path in here.iterdir()) == ["texts.csv"]


def test_stopped_after_the_training(arguments, whole, monkeypatch, capsys):
    import admm_nxm.cli.training as training

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(training, "accuracy_of", interrupted)
        assert call(capsys, *argv(arguments, steps=20))[0] == 130
    assert call(capsys, *argv(arguments, "--resume", steps=20))[0] == 0
    assert Path("out/model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()


def test_checkpoints_now_and_then(arguments, here, monkeypatch, capsys):
    """What a power cut would leave; --overwrite begins anew."""
    import admm_nxm.cli.training as training

    def cut(*_):
        raise RuntimeError("power cut")

    with monkeypatch.context() as patch:
        patch.setattr(training, "accuracy_of", cut)
        assert call(capsys, *argv(arguments, steps=6, checkpoint_every=2))[0] == 70
    assert [path.name for path in (here / "out.run/sparse").iterdir()] == ["checkpoint-6"]
    assert call(capsys, *argv(arguments, "--overwrite", steps=2))[0] == 0
    assert sorted(path.name for path in here.iterdir()) == ["out", "texts.csv"]
    fails_at_once(capsys, argv(arguments, "--resume", output="x"), ["--resume: no run was stopped at x.run"])


def test_a_full_disk_is_told_before_the_training(arguments, monkeypatch, capsys):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=8_900_000))
    parts = ["--output out: the model and its checkpoints take 9 MB, and 9 MB are free there", "make room"]
    fails_at_once(capsys, argv(arguments, checkpoint_every=2), parts)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: types.SimpleNamespace(free=1_000_000))
    fails_at_once(capsys, argv(arguments), ["the model takes 8 MB, and 1 MB are free there"])


@pytest.mark.skipif(os.name == "nt", reason="limits of POSIX")
def test_a_disk_that_fills_up_meanwhile(arguments, here, tmp_path_factory, monkeypatch, capsys):
    """A failed save, by a real limit on the size of files: the trained weights are kept elsewhere."""
    import resource

    import admm_nxm.cli.saving as saving

    real, limit = saving._write_model, resource.getrlimit(resource.RLIMIT_FSIZE)
    spare = tmp_path_factory.mktemp("spare")

    def full(folder, trained):
        if folder.resolve().is_relative_to(here):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limit[1]))
        try:
            real(folder, trained)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limit)

    monkeypatch.setattr(saving, "_write_model", full)
    monkeypatch.setattr(saving.tempfile, "gettempdir", lambda: str(spare))
    status, out, err = call(capsys, *argv(arguments, steps=4))
    assert (status, out) == (2, "")
    error = err.splitlines()[-1]
    assert error.startswith("admm-nxm: error: --output out could not be written: ")
    assert "File too large" in error
    kept = Path(error.rpartition("the trained model is kept in ")[2])
    assert kept.parent == spare
    assert verify(kept).ok
    assert sorted(path.name for path in here.iterdir()) == ["texts.csv"]


def test_a_checkpoint_that_cannot_be_written_does_not_end_the_run(arguments, monkeypatch, capsys):
    def full(*_, **__):
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(transformers.Trainer, "_save_checkpoint", full)
    status, _, err = call(capsys, *argv(arguments, steps=4, checkpoint_every=3))
    assert status == 0
    assert "note    no checkpoint of step 3 could be written: PytorchStreamWriter failed" in err


# ---------------------------------------------------------------------- dense, dtype, eval


def test_a_dense_run_beside_the_sparse_one(arguments, monkeypatch, capsys):
    """Both from the same start, on the same texts; stopped between the two, the first is not done again."""
    stop_at(monkeypatch, 4, signal.SIGINT)
    status, _, err = call(capsys, *argv(arguments, "--compare-dense"))
    assert (status, "kept    step 4 of 40" in err) == (130, True)
    status, told, err = call_json(capsys, *argv(arguments, "--compare-dense", "--resume"))
    assert (status, told["ok"]) == (0, True)
    assert "resume  from out.run/dense/checkpoint-4" in err
    assert told["dense_accuracy"]["total"] == told["accuracy"]["total"] == 20
    assert told["dense_accuracy"]["correct"] >= 16
    assert "A dense run with the same settings: " in Path("out/README.md").read_text()
    assert verify("out").sparsity == 0.5

    status, out, _ = call(capsys, *argv(arguments, "--dense", output="dense"))
    assert status == 0
    assert "pruned" not in out
    assert "verify" not in out
    share = told["dense_accuracy"]["share"]
    assert f"accuracy  {share:.1%}: " in out
    assert names_in("dense") == {name for name in SAVED if not name.endswith(".svg")} - {"admm_nxm.json"}
    assert not verify("dense").ok
    for flags in (("--compare-dense",), ("--pattern", "2:4")):
        fails(
            capsys,
            *argv(arguments, "--dense", *flags, output="x"),
            parts=[f"--dense prunes nothing, and excludes {flags[0]}"],
        )


def test_sixteen_bits_for_sparse_tensor_cores(arguments, here, capsys):
    status, out, _ = call(capsys, *argv(arguments, dtype="bfloat16", steps=4))
    assert status == 0
    assert "use       sparse tensor cores can take 12 of 12 weights, by admm_nxm.export.to_semi_structured" in out
    assert call_json(capsys, "report", "out")[1]["totals"]["tensor_cores"]["weights"] == 12
    assert load("out")[0].dtype == torch.bfloat16
    # The accuracy is that of what is saved: eval finds it again on the same texts.
    write(here / "test.csv", rows_of(80))
    status, told, _ = call_json(capsys, *argv(arguments, eval_data="test.csv", dtype="bfloat16", steps=4, output="b"))
    assert status == 2  # all texts are in both files
    rows = rows_of(80)
    write(here / "test.csv", rows[:20])
    status, told, _ = call_json(capsys, *argv(arguments, eval_data="test.csv", dtype="bfloat16", steps=4, output="b"))
    assert status == 0
    assert call(capsys, "pack", "b", "-o", "packed")[0] == 0
    for folder in ("b", "packed"):
        status, tested, _ = call_json(capsys, "eval", folder, "--data", "test.csv", "--device", "cpu")
        assert (status, tested["max_length"]) == (0, 64)
        texts = len({text for text, _ in rows[:20]})
        if texts == 20:
            assert tested["accuracy"]["correct"] == told["accuracy"]["correct"]
    assert sorted(path.name for path in here.iterdir()) == ["b", "out", "packed", "test.csv", "texts.csv"]

    write(here / "test.csv", [("the fig", "plant")])
    fails_at_once(
        capsys, ["eval", "b", "--data", "test.csv"], ["label 'plant'", "the model lacks (it has fruit, metal)"]
    )
    fails(capsys, "eval", "nowhere", "--data", "test.csv", parts=["nowhere: no such folder"])


def test_eval_needs_a_classifier(arguments, model_folder, here, capsys):
    parts = ["is no trained classifier: ", "weights would start at random", "make one of it with admm-nxm train"]
    fails(capsys, "eval", model_folder, "--data", "texts.csv", parts=[f"error: {model_folder} {parts[0]}", *parts[1:]])
    (here / "bare").mkdir()
    fails(capsys, "eval", "bare", "--data", "texts.csv", parts=["error: bare: it has no config.json"])


def test_whole_numbers_are_labels_in_their_order(arguments, here, capsys):
    """As text they would be 0, 1, 10, 11, 2; 1.0 is what a table makes of 1."""
    rows = [(f"{text} {'pear ' * (i % 12)}", i % 12) for i, (text, _) in enumerate(rows_of(80))]
    write(here / "many.csv", [(text, float(label)) for text, label in rows])
    status, told, err = call_json(capsys, *argv(arguments, data="many.csv", steps=2))
    assert status == 0
    assert told["data"]["labels"] == [str(i) for i in range(12)]
    assert "labels  0 = 0, 1 = 1, 2 = 2, 3 = 3" in err
    assert load("out")[0].config.id2label == {i: str(i) for i in range(12)}


def test_bad_rows_are_skipped_and_counted(tmp_path):
    from admm_nxm.cli.texts import Columns, read_file

    said = []
    columns = Columns(on_bad_row="skip")
    table = 'text;label\nfig;x\n;y\na;b;c\n"a"b;x\npear;y\n'
    (tmp_path / "rows.csv").write_text(table)
    assert read_file(tmp_path / "rows.csv", columns, tell=said.append) == [("fig", "x"), ("pear", "y")]
    assert said[0] == "the columns are separated by semicolons"
    assert said[1].startswith("3 of 5 rows skipped, the first as: ")
    assert "line 3: record 2 has no text" in said[1]
    (tmp_path / "rows.jsonl").write_text('{"text": "fig", "label": 1}\n{"text": \n[]\n')
    assert read_file(tmp_path / "rows.jsonl", columns, tell=said.append) == [("fig", "1")]
    assert said[2].startswith("2 of 3 rows skipped")


def test_a_process_says_nothing_but_its_own(arguments):
    """One object on stdout, and on stderr no line of another package before ours, or after."""
    done = process(*argv(arguments, "--json", steps=4))
    assert done.returncode == 0
    assert json.loads(done.stdout)["ok"] is True
    words = ("model", "data", "labels", "prune", "budget", "step", "note", "")
    assert {line.partition(" ")[0] for line in done.stderr.splitlines()} == set(words)
    assert done.stderr.startswith("model ")
