"""examples/language_model.py on a tiny Llama: the whole way, and bad input."""

from __future__ import annotations

import importlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from admm_nxm import verify
from admm_nxm.io.packed import load_packed
from tests.tiny import rows_of, tiny_llama

transformers = pytest.importorskip("transformers")
pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(EXAMPLES))
        yield importlib.import_module("language_model")


@pytest.fixture
def arguments(tmp_path: Path) -> list[str]:
    """The command line of a run that takes a second."""
    data = tmp_path / "texts.txt"
    data.write_text("\n\n".join(text for text, _ in rows_of(400)), encoding="utf-8")
    sizes = ["--sequences", "12", "--length", "16", "--steps", "30", "--lr", "1e-2", "--float32"]
    model = str(tiny_llama(tmp_path / "model"))
    return ["--model", model, "--data", str(data), *sizes, "--device", "cpu", "--output", str(tmp_path / "out")]


def test_it_prunes_trains_packs_and_verifies(
    script: ModuleType, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*arguments, "--pattern", "1:4"]) == 0
    out = capsys.readouterr().out
    dense, pruned, trained = (float(found) for found in re.findall(r"perplexity +([\d.]+)", out))
    assert trained < min(dense, pruned)  # the model was random: it learns in 30 steps, with a quarter of its weights
    for folder in ("sparse", "packed"):
        report = verify(tmp_path / "out" / folder)
        assert report.ok
        assert len(report.weights) == 14
        assert {str(weight.pattern) for weight in report.weights} == {"1:4"}
    saved = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "sparse", dtype=torch.bfloat16)
    tensors = load_packed(tmp_path / "out" / "packed")
    assert all(torch.equal(value, tensors[name]) for name, value in saved.state_dict().items() if name in tensors)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--pattern", "4:2"], "--pattern"),
        (["--model", "/no/such/folder"], "--model /no/such/folder"),
        (["--data", "texts.pdf"], "texts.pdf"),
        (["--length", "5000"], "give more text"),
    ],
)
def test_bad_input_is_told_in_a_line(
    script: ModuleType, arguments: list[str], change: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert script.main([*arguments, *change]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


def test_texts_are_read_once_each(script: ModuleType, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in ("a b", " a b ", "", "c")), encoding="utf-8")
    assert script.read_texts(file) == ["a b", "c"]
