"""admm-nxm train on a tiny model and tiny data: the whole way, every kind of file and each kind of bad input."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch

from admm_nxm import verify
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
    assert "pruned    after step 34, model error 0." in out
    assert "held-out texts right, 95 % interval" in out
    assert "verify    ok (12 weights in out, 50.00% zeros)" in out
    assert "admm-nxm pack out -o out-packed\n" in out
    assert "data    80 texts: fruit 40, metal 40" in err
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
    texts = [text for text, _ in rows_of(80)]
    assert torch.equal(logits("back", texts), logits("out", texts))


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


def test_the_same_seed_gives_the_same_weights(arguments, capsys):
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        assert call(capsys, *argv(arguments, output=name, steps=4, seed=seed))[0] == 0
    first, second, third = (Path(name, "model.safetensors").read_bytes() for name in "abc")
    assert first == second
    assert first != third


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
    fails_at_once(capsys, command, ["has no first and no second (columns: text, label)", "--text-column"])


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
    fails_at_once(capsys, argv(arguments, eval_data="test.jsonl", output="x"), ["--eval-data has no texts"])
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


def test_steps_and_length_have_defaults(arguments, here, capsys):
    write(here / "few.csv", rows_of(8))
    status, told, _ = call_json(capsys, *argv(arguments, data="few.csv", steps=None, batch_size=2, max_length=6))
    assert status == 0
    assert told["settings"]["steps"] == 200
    assert told["settings"]["max_length"] == 6


@pytest.mark.parametrize("steps", [1, 3])
def test_a_run_of_a_few_steps_says_so(arguments, capsys, steps):
    status, told, err = call_json(capsys, *argv(arguments, steps=steps))
    assert status == 0  # the weights are in the pattern all the same
    (few,) = told["notes"]
    assert few.startswith(f"{steps} steps are few: by default it would be 200")
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
    "text.csv": ("body,label\na,x\n", ["record 1 has no text (columns: body, label)", "--text-column"]),
    "label.csv": ("text,topic\na,x\n", ["record 1 has no label (columns: text, topic)", "--label-column"]),
    "blank.csv": ("text,label\napple,x\n  ,y\n", ["line 3: record 2 has no text"]),
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
    "empty.csv": ("", ["0 texts with the labels []"]),
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

    settings = types.SimpleNamespace(batch_size=8, lr=1e-4, seed=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", set_device)
    args = training._arguments(settings, 20, torch.device("cuda", 1), str(tmp_path))
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


def test_a_name_of_the_hub_without_a_network(arguments, monkeypatch, capsys):
    def absent(name, **_):
        raise OSError(f"We couldn't connect to the hub to load {name}.\nCheck your internet connection")

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", absent)
    parts = ["--model some/name: We couldn't connect to the hub", "(a folder or a hub name is needed)"]
    fails_at_once(capsys, argv(arguments, model="some/name"), parts)


def test_weights_that_blow_up(arguments, here, capsys):
    status, out, err = call(capsys, *argv(arguments, lr="1e30"))
    assert (status, out) == (2, "")
    assert "infinite" in err.splitlines()[-1]
    assert "lower the learning rate" in err.splitlines()[-1]
    assert sorted(path.name for path in here.iterdir()) == ["texts.csv"]


def test_too_little_memory(arguments, monkeypatch, capsys):
    import admm_nxm.cli.training as training

    def train(self):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.\nMore")

    monkeypatch.setattr(training.ADMMTrainer, "train", train)
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


@pytest.mark.skipif(os.name == "nt", reason="signals of POSIX")
@pytest.mark.parametrize(
    ("name", "status", "message"),
    [("SIGINT", 130, "interrupted"), ("SIGTERM", 143, "ended by SIGTERM"), ("SIGHUP", 129, "ended by SIGHUP")],
)
def test_interrupted_in_the_middle(arguments, here, name, status, message):
    """Ctrl-C and its kin in a long run: one line, the status of an interrupted program, and nothing left behind."""
    command = [sys.executable, "-m", "admm_nxm", *map(str, argv(arguments, steps=100_000))]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    number = getattr(signal, name)
    with subprocess.Popen(
        command,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=env,
        # Whoever runs the tests in the background may have them ignore these signals, and their children with them.
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),
    ) as running:
        for line in running.stderr:
            if line.startswith("step "):
                break
        running.send_signal(number)
        out, err = running.communicate(timeout=120)
    assert (running.returncode, out) == (status, "")
    assert err.splitlines()[-1] == f"admm-nxm: error: {message}"
    assert "Traceback" not in err
    assert sorted(path.name for path in here.iterdir()) == ["texts.csv"]


def test_stdout_of_a_process_is_one_object(arguments):
    done = process(*argv(arguments, "--json", steps=4))
    assert done.returncode == 0
    assert json.loads(done.stdout)["ok"] is True
    assert "\x1b" not in done.stderr
    assert "{'loss'" not in done.stderr
