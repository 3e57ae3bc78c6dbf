"""``admm-nxm prune --data``: a classifier, a language model and an encoder on texts of the user's own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import admm_nxm.oneshot
from admm_nxm import keep_mask, project, verify
from admm_nxm.cli.classifier import class_numbers
from admm_nxm.cli.errors import InputError
from admm_nxm.solver import Solved
from admm_nxm.statistics import Moments
from admm_nxm.weights import Weight

from .test_cli import call_json, fails
from .tiny import rows_of, tiny_bert, write

transformers: Any = pytest.importorskip("transformers", reason="transformers is an extra")


@pytest.fixture(scope="module")
def here(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the three kinds of model, each with its tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny_bert(folder / "encoder"))
    torch.manual_seed(0)
    names = {"id2label": {0: "fruit", 1: "metal"}, "label2id": {"fruit": 0, "metal": 1}}
    config = transformers.BertConfig.from_pretrained(folder / "encoder", **names)
    transformers.BertForSequenceClassification(config).save_pretrained(folder / "classifier")
    sizes = {"vocab_size": len(tokenizer), "hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 64}
    shape = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    tokens = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": 0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, **shape, **tokens))
    model.to(torch.bfloat16).save_pretrained(folder / "language", max_shard_size="8kB")
    for name in ("classifier", "language"):
        tokenizer.save_pretrained(folder / name)
        (folder / name / "notes.txt").write_text("by hand")
    rows = rows_of(40)
    write(folder / "texts.csv", rows)
    (folder / "texts.txt").write_text("\n".join(text for text, _ in rows))
    return folder


@pytest.fixture
def solved(monkeypatch: pytest.MonkeyPatch) -> dict[str, Moments]:
    """What was gathered; in place of the solve stands twice the projection, in float32."""
    seen: dict[str, Moments] = {}

    def solutions(weights: Sequence[Weight], moments: Mapping[str, Moments]) -> Iterator[Solved]:
        seen.update(moments)
        for weight in weights:
            yield Solved(2 * project(weight.w, "2:4"), keep_mask(weight.w, "2:4"), 0.25, 1)

    monkeypatch.setattr(admm_nxm.oneshot, "solutions", solutions)
    return seen


KINDS = {
    "classifier with labels": ("classifier", "texts.csv", True, 20, 20),
    "classifier without": ("classifier", "texts.txt", False, 20, 20),
    "language model": ("language", "texts.csv", True, 3, 3 * 32),
    "encoder": ("encoder", "texts.csv", False, 20, 20),
}


@pytest.mark.parametrize(("model", "data", "labels", "samples", "tokens"), KINDS.values(), ids=KINDS)
def test_texts_are_calibrated_on_as_the_architecture_asks(
    model: str,
    data: str,
    labels: bool,
    samples: int,
    tokens: int,
    here: Path,
    tmp_path: Path,
    solved: dict[str, Moments],
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "out"
    options = ["--data", here / data, "--samples", samples, "--max-length", 32, "-o", out]
    status, told, err = call_json(capsys, "prune", here / model, *options)
    assert (status, told["ok"]) == (0, True)
    facts = told["calibration"]
    assert (facts["labels"], facts["texts"], facts["data"]) == (labels, samples, data)
    assert facts["tokens"] == tokens if model == "language" else facts["tokens"] > tokens
    assert told["model_errors"] == dict.fromkeys(solved, 0.25)
    assert {weight["name"] for weight in told["weights"]} == solved.keys()
    for moments in solved.values():
        assert (moments.outputs is not None) == labels
        assert int(moments.passes) == samples
    assert "A and G" in err if labels else "A alone" in err
    assert ("these are few" in err) == (facts["tokens"] < 1000)
    assert verify(out).ok
    before = {name: t for file in sorted((here / model).glob("*.safetensors")) for name, t in load_file(file).items()}
    after = {name: t for file in sorted(out.glob("*.safetensors")) for name, t in load_file(file).items()}
    assert before.keys() == after.keys()
    for name, t in before.items():
        assert after[name].dtype == t.dtype
        assert torch.equal(after[name], 2 * project(t, "2:4") if name in solved else t)
    left = {file.name for file in out.iterdir()} - {"admm_nxm.json"}
    assert left == {file.name for file in (here / model).iterdir()}
    assert "weight" in err


def test_the_solve_is_that_of_the_function(here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rules = ["--select", r".*0\.self_attn\.q_proj\.weight=1:4"]
    options = ["--data", here / "texts.txt", "--samples", 2, "--max-length", 16, "-o", tmp_path / "out", *rules]
    status, told, _ = call_json(capsys, "prune", here / "language", *options)
    assert status == 0
    ((name, error),) = told["model_errors"].items()
    assert 0 < error < 1
    model = transformers.AutoModelForCausalLM.from_pretrained(here / "language", dtype=torch.float32)
    chosen = Path(tmp_path / "out").glob("*.safetensors")
    found = next(file.get_tensor(name) for path in chosen if name in (file := safe_open(path, "pt")).keys())  # noqa: SIM118
    assert verify({name: found}, {name: "1:4"}).ok
    assert not torch.equal(found, project(model.get_parameter(name).detach(), "1:4").bfloat16())


def test_labels_that_are_no_classes_are_not_read(
    here: Path, tmp_path: Path, solved: dict[str, Moments], capsys: pytest.CaptureFixture[str]
) -> None:
    config = transformers.BertConfig.from_pretrained(here / "encoder", num_labels=1)
    transformers.BertForSequenceClassification(config).save_pretrained(tmp_path / "scores")
    transformers.AutoTokenizer.from_pretrained(here / "encoder").save_pretrained(tmp_path / "scores")
    write(tmp_path / "pairs.csv", [("some iron", "0.5"), ("some gold", "1.5")])
    options = ["--data", tmp_path / "pairs.csv", "-o", tmp_path / "out"]
    _, told, err = call_json(capsys, "prune", tmp_path / "scores", *options)
    assert "labels are not read, as the model does not give one of several" in err
    assert (told["calibration"]["labels"], told["calibration"]["texts"]) == (False, 2)
    assert {moments.outputs for moments in solved.values()} == {None}


@pytest.mark.parametrize(("model", "labels"), [("classifier", True), ("encoder", False)])
def test_pairs_of_texts_and_bad_rows(
    model: str,
    labels: bool,
    here: Path,
    tmp_path: Path,
    solved: dict[str, Moments],
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [f"some {what},is that {what},{kind}" for what, kind in (("iron", "metal"), ("an apple", "fruit"))]
    data = tmp_path / "pairs.csv"
    data.write_text("\n".join(["one,two,label", *rows, ",is that gold,metal"]))
    given = [here / model, "--data", data, "--text-column", "one", "--text-column", "two", "-o", tmp_path / "out"]
    fails(capsys, "prune", *given, parts=["record 3 has no one", "--on-bad-row skip leaves such rows out"])
    _, told, err = call_json(capsys, "prune", *given, "--on-bad-row", "skip")
    tokenizer = transformers.AutoTokenizer.from_pretrained(here / model)
    pairs = [tokenizer(*row.split(",")[:2])["input_ids"] for row in rows]
    facts = told["calibration"]
    assert (facts["labels"], facts["texts"], facts["tokens"]) == (labels, 2, sum(map(len, pairs)))
    assert "1 of 3 rows skipped, the first as" in err
    assert {int(moments.passes) for moments in solved.values()} == {2}


BAD: dict[str, tuple[list[str], list[str]]] = {
    "no data": (["classifier", "--samples", "3"], ["--samples is about the texts of --data; give --data too"]),
    "no folder": (["texts.csv", "--data", "texts.csv"], ["is no model folder, which --data needs"]),
    "label unknown": (
        ["classifier", "--data", "wood.csv"],
        ["--data has the label 'wood', which the model lacks (it has fruit, metal)"],
    ),
    "labels of an encoder": (
        ["encoder", "--data", "texts.csv", "--label-column", "label"],
        ["--label-column label: labels are read from a table, for a classifier"],
    ),
    "columns of plain texts": (
        ["encoder", "--data", "texts.txt", "--text-column", "text"],
        ["--text-column text: a .txt file has no columns; leave it out"],
    ),
    "pairs for a language model": (
        ["language", "--data", "texts.csv", "--text-column", "text", "--text-column", "label"],
        ["--text-column is given 2 times; a language model takes one text, so put all into one column"],
    ),
    "bad rows of plain texts": (
        ["encoder", "--data", "texts.txt", "--on-bad-row", "skip"],
        ["--on-bad-row skip: no row of a .txt file is bad; leave it out"],
    ),
    "three texts": (
        ["classifier", "--data", "texts.csv", *(["--text-column", "text"] * 3)],
        ["--text-column is given 3 times; give one, or two for pairs"],
    ),
    "another kind of file": (
        ["encoder", "--data", "notes.pdf"],
        ["notes.pdf ends in .pdf, which is not known; give a .csv, .tsv, .jsonl or .txt file"],
    ),
    "no such file": (
        ["encoder", "--data", "none.txt"],
        ["none.txt: no such file; give a .csv, .tsv, .jsonl or .txt file"],
    ),
    "no texts": (["encoder", "--data", "empty.txt"], ["empty.txt has no texts"]),
    "too long": (["encoder", "--data", "texts.csv", "--max-length", "65"], ["--max-length 65", "give at most 64"]),
    "no such architecture": (
        ["odd", "--data", "texts.csv"],
        ["names SomethingElse, which is no classifier", "admm_nxm.prune(model, pattern, batches)"],
    ),
    "no tokenizer": (["bare", "--data", "texts.csv"], ["bare has no tokenizer of its own"]),
}


@pytest.mark.parametrize(("arguments", "parts"), BAD.values(), ids=BAD)
def test_bad_input_is_one_line(
    arguments: list[str], parts: list[str], here: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(here / "wood.csv", [("some iron", "wood")])
    (here / "empty.txt").write_text("\n")
    (here / "notes.pdf").write_text("iron")
    for name in ("odd", "bare"):
        (here / name).mkdir(exist_ok=True)
        config = (here / "encoder" / "config.json").read_text().replace('"BertModel"', '"SomethingElse"')
        (here / name / "config.json").write_text(config)
    for file in (here / "encoder").glob("tokenizer*"):
        (here / "odd" / file.name).write_bytes(file.read_bytes())
    placed = [str(here / one) if (here / one).exists() else one for one in arguments]
    fails(capsys, "prune", *placed, "-o", tmp_path / "out", parts=parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("unreadable", [False, True])
def test_a_card_says_that_its_model_was_pruned(
    unreadable: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its figures are of the dense model; a card that cannot be changed does not cost the weights."""
    model, out = tiny_bert(tmp_path / "dense"), tmp_path / "out"
    before = "---\na: [\n---\nAccuracy: 97.0%\n" if unreadable else "Accuracy: 97.0%\n"
    (model / "README.md").write_text(before)
    status, told, err = call_json(capsys, "prune", model, "-o", out, "--pattern", "1:4")
    after = (out / "README.md").read_text()
    assert (status, told["ok"]) == (0, True)
    assert (after == before) == unreadable
    assert ("README.md stays as it was" in err) == unreadable
    assert (
        unreadable or "| method | pruned once, by magnitude, without training; the rest of this card is about" in after
    )
    assert unreadable or "| pattern | 1:4 " in after


def test_numbers_are_named_in_their_order() -> None:
    """A saved config has its labels in the order of text."""
    config = transformers.BertConfig(num_labels=12)
    config.label2id = {str(i): i for i in sorted(range(12), key=str)}
    assert class_numbers(["10", "2"], config) == [10, 2]
    with pytest.raises(InputError, match=r"'x', which the model lacks \(it has 0, 1, 2, 3, .*, 11\)"):
        class_numbers(["x"], config)
