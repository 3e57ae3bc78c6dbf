"""The command line on small files: each command, each exit status, text and JSON. Training is in test_cli_train."""

from __future__ import annotations

import errno
import importlib.abc
import io
import json
import logging
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import safetensors.torch
import torch

import admm_nxm
from admm_nxm import project, verify
from admm_nxm.io.files import atomic_folder

pytest.importorskip("typer")
pytest.importorskip("rich")

from typer.testing import CliRunner

from admm_nxm.cli import main
from admm_nxm.cli.app import app
from admm_nxm.cli.console import Result, plain, show
from admm_nxm.io.prune import prune_files

COMMANDS = ("train", "eval", "verify", "report", "prune", "pack", "unpack")


def weights(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Two weights in blocks, a bias and an embedding."""
    return {
        "embed.weight": torch.randn(6, 8, dtype=dtype),
        "layers.0.fc.weight": torch.randn(64, 64, dtype=dtype),
        "layers.0.fc.bias": torch.randn(64, dtype=dtype),
        "layers.1.fc.weight": torch.randn(32, 64, dtype=dtype),
    }


def sparse(tensors: dict[str, torch.Tensor], pattern: str = "2:4") -> dict[str, torch.Tensor]:
    return {name: project(t, pattern) if name.endswith("fc.weight") else t for name, t in tensors.items()}


def save(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    safetensors.torch.save_file(tensors, path, metadata={"format": "pt"})
    return path


@pytest.fixture
def good(tmp_path):
    return save(tmp_path / "good.safetensors", sparse(weights()))


@pytest.fixture
def bad(tmp_path):
    return save(tmp_path / "bad.safetensors", weights())


@pytest.fixture
def sharded(tmp_path):
    """A dense model folder in two shards, with an index, a config and a folder of more."""
    folder = tmp_path / "sharded"
    tensors = weights(torch.bfloat16)
    files = {name: f"model-0000{1 + i // 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in set(files.values()):
        save(folder / file, {name: t for name, t in tensors.items() if files[name] == file})
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": files}))
    (folder / "config.json").write_text("{}")
    (folder / "more").mkdir()
    (folder / "more" / "notes.txt").write_text("kept")
    return folder


def call(capsys, *args):
    """Run the command line; return status, stdout and stderr."""
    capsys.readouterr()
    status = main([str(arg) for arg in args])
    out, err = capsys.readouterr()
    return status, out, err


def call_json(capsys, *args):
    status, out, err = call(capsys, *args, "--json")
    return status, json.loads(out), err


def fails(capsys, *args, parts=(), status=2):
    """The command ends with one line on stderr that has all the parts, and says the same as JSON."""
    found, out, err = call(capsys, *args)
    assert (found, out) == (status, "")
    assert err.startswith("admm-nxm: error: ")
    assert err.count("\n") == 1
    for part in parts:
        assert part in err
    found, told, again = call_json(capsys, *args)
    assert found == status
    assert again == err
    assert told == {"error": err.removeprefix("admm-nxm: error: ").rstrip("\n"), "status": status}


# ---------------------------------------------------------------------- verify and report


def test_verify_counts_as_the_library_does(good, capsys):
    status, out, err = call(capsys, "verify", good)
    assert (status, err) == (0, "")
    assert out == f"{verify(good)}\n"
    status, told, err = call_json(capsys, "verify", good)
    assert (status, err) == (0, "")
    assert (told["command"], told["path"], told["ok"], told["violations"]) == ("verify", str(good), True, 0)
    assert told["sparsity"] == 0.5
    assert [weight["name"] for weight in told["weights"]] == ["layers.0.fc.weight", "layers.1.fc.weight"]
    assert told["weights"][1] == {
        "name": "layers.1.fc.weight",
        "shape": [32, 64],
        "pattern": "2:4",
        "dim": 1,
        "groups": 512,
        "bad_groups": 0,
        "zeros": 1024,
    }


def test_verify_says_what_violates(bad, capsys):
    status, out, _ = call(capsys, "verify", bad)
    assert status == 1
    assert "VIOLATED by 2 of 2 weights" in out
    status, told, _ = call_json(capsys, "verify", bad)
    assert status == 1
    assert told["ok"] is False
    assert told["violations"] == 2
    assert told["weights"][0]["bad_groups"] == 1024


def test_patterns_and_rules_reach_verify(good, capsys):
    assert call(capsys, "verify", good, "--pattern", "4x2")[0] == 0
    assert call(capsys, "verify", good, "--pattern", "1:4")[0] == 1
    rules = ("--select", r".*\.1\.fc\.weight=dense", "--select", r".*fc\.weight=2:4")
    status, told, _ = call_json(capsys, "verify", good, *rules)
    assert status == 0
    assert [weight["name"] for weight in told["weights"]] == ["layers.0.fc.weight"]
    rules = ("--select", r"layers\.1\.fc\.weight=1:4")
    assert call(capsys, "verify", good, *rules)[0] == 1


def test_what_cannot_be_covered_is_told(tmp_path, capsys):
    file = save(tmp_path / "odd.safetensors", {**sparse(weights()), "layers.2.fc.weight": torch.ones(4, 6)})
    status, told, _ = call_json(capsys, "verify", file)
    assert status == 0
    assert [skipped["name"] for skipped in told["skipped"]] == ["layers.2.fc.weight"]
    assert "no multiple of 4" in told["skipped"][0]["reason"]


def test_report(good, bad, tmp_path, capsys):
    status, out, err = call(capsys, "report", good)
    assert (status, err) == (0, "")
    assert "layers.0.fc.weight" in out or "layers.*.fc.weight" in out
    status, told, _ = call_json(capsys, "report", good)
    assert status == 0
    assert (told["command"], told["path"], told["plot"], told["ok"]) == ("report", str(good), None, True)
    assert told["parameters"] == sum(t.numel() for t in weights().values())
    assert [weight["zeros"] for weight in told["weights"]] == [2048, 1024]
    assert call(capsys, "report", bad)[0] == 1
    assert call_json(capsys, "report", bad)[1]["ok"] is False


def test_report_draws(good, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    status, told, err = call_json(capsys, "report", good, "--plot", tmp_path / "map.svg")
    assert status == 0
    assert told["plot"] == str(tmp_path / "map.svg")
    assert err == f"picture {tmp_path / 'map.svg'}\n"
    assert "<svg" in (tmp_path / "map.svg").read_text()


def test_report_replaces_a_picture_only_if_told(good, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    picture = tmp_path / "map.svg"
    picture.write_text("mine")
    fails(capsys, "report", good, "--plot", picture, parts=["map.svg exists", "--overwrite"])
    assert picture.read_text() == "mine"
    assert call(capsys, "report", good, "--plot", picture, "--overwrite")[0] == 0
    assert "<svg" in picture.read_text()


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("map.bmp", ["map.bmp ends in .bmp; a picture ends in .svg, .png or .pdf"]),
        ("map", ["map ends in nothing; a picture ends in .svg"]),
        ("folder.svg", ["folder.svg is a folder; name a file"]),
        ("no/such/map.svg", ["there is no folder"]),
    ],
)
def test_report_refuses_a_picture_before_it_counts(good, tmp_path, monkeypatch, capsys, name, parts):
    pytest.importorskip("matplotlib")

    def count(*_):
        raise AssertionError("the weights were counted first")

    monkeypatch.setattr(sys.modules["admm_nxm.report"], "model_report", count)
    (tmp_path / "folder.svg").mkdir()
    fails(capsys, "report", good, "--plot", tmp_path / name, "--overwrite", parts=parts)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.svg", good.name]


# ---------------------------------------------------------------------- prune


def test_prune_projects_each_shard_and_keeps_the_rest(sharded, tmp_path, capsys):
    out = tmp_path / "pruned"
    status, told, err = call_json(capsys, "prune", sharded, "-o", out)
    assert (status, err) == (0, "")
    assert (told["command"], told["output"], told["ok"]) == ("prune", str(out), True)
    assert "expect to lose accuracy" in told["note"]
    before = {k: v for f in sorted(sharded.glob("*.safetensors")) for k, v in safetensors.torch.load_file(f).items()}
    after = {k: v for f in sorted(out.glob("*.safetensors")) for k, v in safetensors.torch.load_file(f).items()}
    assert before.keys() == after.keys()
    for name, t in before.items():
        expected = project(t, "2:4") if name.endswith("fc.weight") else t
        assert after[name].dtype == torch.bfloat16
        assert torch.equal(after[name], expected)
    names = sorted(str(path.relative_to(sharded)) for path in sharded.rglob("*"))
    assert sorted(str(path.relative_to(out)) for path in out.rglob("*")) == ["admm_nxm.json", *names]
    assert (out / "more" / "notes.txt").read_text() == "kept"
    index = "model.safetensors.index.json"
    assert json.loads((out / index).read_text()) == json.loads((sharded / index).read_text())
    for file in sharded.glob("*.safetensors"):  # the header is the same to the byte
        length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
        assert (out / file.name).read_bytes()[:length] == file.read_bytes()[:length]


def test_prune_one_file_by_rules(bad, tmp_path, capsys):
    out = tmp_path / "pruned.safetensors"
    status, text, _ = call(capsys, "prune", bad, "-o", out, "--select", r"layers\.1\.fc\.weight=1:4")
    assert status == 0
    assert "expect to lose accuracy" in text
    before, after = safetensors.torch.load_file(bad), safetensors.torch.load_file(out)
    assert torch.equal(after["layers.1.fc.weight"], project(before["layers.1.fc.weight"], "1:4"))
    assert torch.equal(after["layers.0.fc.weight"], before["layers.0.fc.weight"])


def test_prune_refuses_packed_weights(tmp_path, good, capsys):
    packed = tmp_path / "packed.safetensors"
    assert call(capsys, "pack", good, "-o", packed)[0] == 0
    fails(capsys, "prune", packed, "-o", tmp_path / "x", parts=["is packed; unpack it first"])
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_prune_refuses_weights_that_have_no_order(tmp_path, capsys, value):
    tensors = weights()
    tensors["layers.1.fc.weight"][3, 5] = value
    folder = save(tmp_path / "broken" / "model.safetensors", tensors).parent
    fails(capsys, "prune", folder, "-o", tmp_path / "x", parts=["weight 'layers.1.fc.weight'", "has NaN or infinite"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken"]


def test_prune_as_a_function(sharded, bad, tmp_path):
    assert prune_files(sharded, tmp_path / "a", "2:4").ok
    with pytest.raises(FileExistsError, match="exists"):
        prune_files(sharded, tmp_path / "a", "2:4")
    assert prune_files(sharded, tmp_path / "a", "1:4", overwrite=True).sparsity == 0.75
    with pytest.raises(ValueError, match=r"cannot be pruned to 2:7.*no multiple of 7"):
        prune_files(sharded, tmp_path / "b", "2:7")
    with pytest.raises(ValueError, match="is an index; name its folder"):
        prune_files(sharded / "model.safetensors.index.json", tmp_path / "b", "2:4")
    with pytest.raises(ValueError, match="what is read"):
        prune_files(bad, bad, "2:4", overwrite=True)
    with pytest.raises(ValueError, match="what is read"):
        prune_files(sharded, sharded, "2:4", overwrite=True)
    assert not verify(bad).ok
    assert not verify(sharded).ok
    assert not (tmp_path / "b").exists()


# ---------------------------------------------------------------------- pack and unpack


@pytest.mark.parametrize("as_folder", [True, False])
def test_pack_and_unpack_give_the_same_back(sharded, bad, tmp_path, capsys, as_folder):
    ending = "" if as_folder else ".safetensors"
    dense, packed, back = (tmp_path / f"{name}{ending}" for name in ("sparse", "packed", "back"))
    assert call(capsys, "prune", sharded if as_folder else bad, "-o", dense)[0] == 0
    status, told, err = call_json(capsys, "pack", dense, "-o", packed)
    assert (status, err) == (0, "")
    assert (told["command"], told["ok"], told["path"], told["output"]) == ("pack", True, str(dense), str(packed))
    assert len(told["weights"]) == 2
    assert told["bytes_after"] < told["bytes_before"]
    assert told["weights"][0]["bytes_after"] < 0.6 * told["weights"][0]["bytes_before"]
    assert call(capsys, "verify", packed)[0] == 0
    assert call(capsys, "report", packed)[0] == 0
    status, told, err = call_json(capsys, "unpack", packed, "-o", back)
    assert (status, err) == (0, "")
    assert told == {"command": "unpack", "ok": True, "path": str(packed), "output": str(back)}
    if not as_folder:
        assert back.read_bytes() == dense.read_bytes()
        return
    for file in dense.rglob("*"):
        other = back / file.relative_to(dense)
        if file.suffix == ".safetensors":
            assert other.read_bytes() == file.read_bytes()
        elif file.name.endswith(".index.json"):
            assert json.loads(other.read_text())["weight_map"] == json.loads(file.read_text())["weight_map"]
        elif file.is_file():
            assert other.read_bytes() == file.read_bytes()


def test_pack_refuses_what_it_would_lose(bad, tmp_path, capsys):
    status, out, _ = call(capsys, "pack", bad, "-o", tmp_path / "x")
    assert status == 1
    assert "VIOLATED: 2 of 2 weights" in out
    status, told, _ = call_json(capsys, "pack", bad, "-o", tmp_path / "x")
    assert status == 1
    assert told["ok"] is False
    assert "layers.0.fc.weight: 1024 of 1024 groups exceed 2:4" in told["violation"]
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("command", ["prune", "pack", "unpack"])
def test_nothing_is_overwritten_unasked(good, tmp_path, capsys, command):
    source, out = good, tmp_path / "out.safetensors"
    if command == "unpack":
        source = tmp_path / "packed.safetensors"
        assert call(capsys, "pack", good, "-o", source)[0] == 0
    out.write_text("mine")
    fails(capsys, command, source, "-o", out, parts=[f"{out} exists", "--overwrite"])
    assert out.read_text() == "mine"
    assert call(capsys, command, source, "-o", out, "--overwrite")[0] == 0
    assert verify(out).ok


# ---------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["verify"], ["Missing argument 'PATH'", "see admm-nxm verify --help"]),
        (["prune", "GOOD"], ["Missing option", "-o", "see admm-nxm prune --help"]),
        (["verfy", "GOOD"], ["No such command 'verfy'", "see admm-nxm --help"]),
        (["verify", "GOOD", "--patern", "2:4"], ["No such option", "--patern"]),
        (["verify", "absent.safetensors"], ["nothing to verify at absent.safetensors"]),
        (["report", "absent.safetensors"], ["absent.safetensors"]),
        (["pack", "absent", "-o", "x"], ["nothing to pack at absent"]),
        (["verify", "TEXT"], ["text.safetensors is not a readable safetensors file"]),
        (["verify", "EMPTY"], ["holds no .safetensors file"]),
        (["unpack", "GOOD", "-o", "x"], ["no packed weight"]),
        (["verify", "GOOD", "--pattern", "4:2"], ["--pattern: pattern '4:2'", 'write "2:4"']),
        (["verify", "GOOD", "--pattern", "half"], ["--pattern: pattern 'half' is not understood"]),
        (["verify", "GOOD", "--select", "fc"], ["--select fc has no pattern; write 'REGEX=K:G'"]),
        (["verify", "GOOD", "--select", "=2:4"], ["--select =2:4 has no pattern"]),
        (["verify", "GOOD", "--select", "fc=2:x"], ["--select fc=2:x: pattern '2:x'"]),
        (["verify", "GOOD", "--select", "a=2:4", "--select", "a=1:4"], ["--select names a twice"]),
        (["verify", "GOOD", "--select", "(=2:4"], ["'(' is no regular expression"]),
        (["verify", "GOOD", "--select", "fc=2:4"], ["'fc' matches no parameter", "the whole name"]),
        (["verify", "GOOD", "--select", "a=2:4", "--pattern", "1:4"], ["--pattern 1:4 and --select exclude"]),
        (["verify", "PLAIN"], ["no prunable weight", r"--select '.*\.weight=2:4'"]),
        (["prune", "ODD", "-o", "x"], ["weight 'layers.0.fc.weight' of shape (4, 6) cannot be pruned to 2:4"]),
        (["pack", "GOOD", "-o", "no/such/folder"], ["there is no folder no/such"]),
    ],
)
def test_bad_input(good, tmp_path, monkeypatch, capsys, args, parts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.safetensors").write_text("no tensors")
    (tmp_path / "empty").mkdir()
    places = {
        "GOOD": good,
        "TEXT": "text.safetensors",
        "EMPTY": "empty",
        "PLAIN": save(tmp_path / "plain.safetensors", {"weight": torch.ones(4, 4)}),
        "ODD": save(tmp_path / "odd.safetensors", {"layers.0.fc.weight": torch.ones(4, 6)}),
    }
    before = sorted(tmp_path.iterdir())
    fails(capsys, *(places.get(arg, arg) for arg in args), parts=parts)
    assert sorted(tmp_path.iterdir()) == before


def test_messages_name_options_and_not_arguments_of_functions(tmp_path, capsys):
    odd = save(tmp_path / "odd.safetensors", {"layers.0.fc.weight": torch.ones(4, 6)})
    _, _, err = call(capsys, "prune", odd, "-o", tmp_path / "x")
    assert "ineligible" not in err
    assert err.rstrip().endswith("leave it dense by a select rule")


def test_a_defect_asks_to_be_reported(good, monkeypatch, capsys):
    def broken(*_):
        raise RuntimeError("it broke\nin two lines")

    monkeypatch.setattr(sys.modules["admm_nxm.cli.commands"], "count", broken)
    parts = ["unexpected RuntimeError: it broke in two lines", "please report it", "--traceback"]
    fails(capsys, "verify", good, parts=parts, status=70)
    status, out, err = call(capsys, "verify", good, "--traceback")
    assert (status, out) == (70, "")
    assert "Traceback (most recent call last)" in err
    assert 'raise RuntimeError("it broke' in err


def test_warnings_of_others_are_kept_back_and_ours_are_notes(good, monkeypatch, capsys):
    def warned(*args):
        logging.getLogger("transformers").warning("loud")
        exec(compile("import warnings; warnings.warn('theirs')", "x", "exec"), {"__name__": "transformers.x"})
        exec(compile("import warnings; warnings.warn('ours')", "x", "exec"), {"__name__": "admm_nxm.cli.x"})
        return verify(*args)

    monkeypatch.setattr(sys.modules["admm_nxm.cli.commands"], "count", warned)
    assert call(capsys, "verify", good) == (0, f"{verify(good)}\n", "note    ours\n")


def test_traceback_of_bad_input(capsys):
    status, _, err = call(capsys, "verify", "absent", "--traceback")
    assert status == 2
    assert "Traceback" in err
    assert err.splitlines()[-1] == "admm-nxm: error: nothing to verify at absent"


def test_interrupted(good, monkeypatch, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sys.modules["admm_nxm.cli.commands"], "count", stop)
    fails(capsys, "verify", good, parts=["interrupted"], status=130)


ENDINGS = [name for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]


@pytest.mark.parametrize("name", ENDINGS)
def test_a_signal_ends_a_command_as_ctrl_c_does(good, tmp_path, monkeypatch, capsys, name):
    """What is half written goes, a second signal does not cut that short, and the usual handler is back."""
    number = getattr(signal, name)

    def half(*_, **__):
        with atomic_folder(tmp_path / "x") as folder:
            (folder / "half").write_text("done")
            try:
                signal.raise_signal(number)
            finally:
                signal.raise_signal(number)

    monkeypatch.setattr(sys.modules["admm_nxm.io.packed"], "pack", half)
    before = signal.signal(number, signal.SIG_DFL)
    try:
        parts = [f"ended by {name}"]
        fails(capsys, "pack", good, "-o", tmp_path / "x", parts=parts, status=128 + number)
        assert signal.getsignal(number) is signal.SIG_DFL
    finally:
        signal.signal(number, before)
    assert sorted(tmp_path.iterdir()) == [good]


def test_a_signal_counts_more_than_what_fails_after_it(good, monkeypatch, capsys):
    """As when the terminal is gone, and a progress bar cannot be closed any more."""

    def lost(*_):
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(sys.modules["admm_nxm.cli.commands"], "count", lost)
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        fails(capsys, "verify", good, parts=["ended by SIGTERM"], status=143)
    finally:
        signal.signal(signal.SIGTERM, before)


@pytest.mark.parametrize("name", ENDINGS)
def test_signals_that_are_ignored_or_handled_stay_so(good, monkeypatch, capsys, name):
    number = getattr(signal, name)
    count = sys.modules["admm_nxm.cli.commands"].count
    heard = []

    def disturbed(*args):
        signal.raise_signal(number)
        return count(*args)

    monkeypatch.setattr(sys.modules["admm_nxm.cli.commands"], "count", disturbed)
    before = signal.signal(number, signal.SIG_IGN)  # as under nohup
    try:
        assert call(capsys, "verify", good)[0] == 0
        signal.signal(number, lambda *args: heard.append(args[0]))
        assert call(capsys, "verify", good)[0] == 0
    finally:
        signal.signal(number, before)
    assert heard == [number]


def test_outside_the_main_thread(good, capsys):
    """Only the main thread can have handlers; elsewhere the command works without them."""
    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(main, ["verify", str(good)]).result() == 0
    assert capsys.readouterr().out == f"{verify(good)}\n"


def test_a_terminal_that_is_gone(monkeypatch, tmp_path):
    class Gone(io.StringIO):
        def write(self, text):
            raise OSError(errno.EIO, "Input/output error")

    # Both, as where a terminal goes: else the descriptor of what captures stdout would be replaced.
    monkeypatch.setattr(sys, "stderr", Gone())
    monkeypatch.setattr(sys, "stdout", Gone())
    assert main(["verify", str(tmp_path / "absent")]) == 2


def test_interrupted_while_it_is_imported(monkeypatch, capsys):
    class Stop(importlib.abc.MetaPathFinder):
        def find_spec(self, name, path=None, target=None):
            if name == "admm_nxm.cli.app":
                raise KeyboardInterrupt

    monkeypatch.delitem(sys.modules, "admm_nxm.cli.app")
    monkeypatch.setattr(sys, "meta_path", [Stop(), *sys.meta_path])
    assert main(["--help"]) == 130
    assert capsys.readouterr() == ("", "admm-nxm: error: interrupted\n")


def test_a_missing_package_is_named_with_its_extra(good, monkeypatch, capsys):
    def needs(*_):
        raise ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")

    monkeypatch.setattr(sys.modules["admm_nxm.cli.commands"], "count", needs)
    fails(capsys, "verify", good, parts=["No module named 'matplotlib'", 'pip install ".[cli]"'])


def test_without_the_extra(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "typer", None)
    for name in [name for name in sys.modules if name.startswith("admm_nxm.cli.")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["--help"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert (
        err
        == 'admm-nxm: error: the command line needs typer; run in a checkout of the repository: pip install ".[cli]"\n'
    )


def test_an_import_error_of_its_own_is_not_blamed_on_the_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "admm_nxm.cli.app", None)
    with pytest.raises(ImportError, match=r"admm_nxm\.cli\.app"):
        main(["--help"])


# ---------------------------------------------------------------------- help, output, processes


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_each_command(command):
    result = CliRunner().invoke(app, [command, "--help"])
    assert result.exit_code == 0
    assert f"Usage: admm-nxm {command}" in result.output
    assert "--json" in result.output
    assert "\x1b" not in result.output
    assert "─" not in result.output


HELP = {
    "train": ["[default: 2:4]", "OUT.run"],
    "eval": ["packed too"],
    "verify": ["packed ones too", "what is recorded with the model, or 2:4"],
    "report": ["packed ones too", "what is recorded with the model, or 2:4"],
    "prune": ["not packed", "[default: 2:4]"],
    "pack": ["not packed", "what is recorded with the model, or 2:4"],
    "unpack": ["A packed file or folder"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_true_of_its_command(monkeypatch, command):
    """Which paths it takes, and whether it reads the record of what was pruned."""
    monkeypatch.setenv("COLUMNS", "200")
    text = " ".join(CliRunner().invoke(app, [command, "--help"]).output.split())
    for part in HELP[command]:
        assert part in text
    assert ("recorded with the model" in text) == (command in ("verify", "report", "pack"))


def test_recorded_patterns_are_read(bad, tmp_path, capsys):
    out, packed = tmp_path / "o.safetensors", tmp_path / "p.safetensors"
    assert call(capsys, "prune", bad, "-o", out, "--pattern", "1:4")[0] == 0
    assert call_json(capsys, "pack", out, "-o", packed)[1]["weights"][0]["pattern"] == "1:4"
    for file in (out, packed):
        for command in ("verify", "report"):
            assert {w["pattern"] for w in call_json(capsys, command, file)[1]["weights"]} == {"1:4"}
            overridden = call_json(capsys, command, file, "--pattern", "2:4")[1]["weights"]
            assert {w["pattern"] for w in overridden} == {"2:4"}


@pytest.mark.parametrize("command", ["verify", "report"])
def test_tables_fit_the_terminal(tmp_path, monkeypatch, capsys, command):
    import admm_nxm.cli.console as console

    name = "model.encoder.layers.{}.a_long_name_for_a_block.attention.self.query.weight"
    file = save(tmp_path / "m.safetensors", {name.format(i): sparse(weights())["layers.0.fc.weight"] for i in range(3)})
    monkeypatch.setattr(console.shutil, "get_terminal_size", lambda: os.terminal_size((80, 24)))
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True, raising=False)
    for flags, rows in (((), 1), (("--per-weight",), 3)):
        capsys.readouterr()
        assert main([command, str(file), *flags]) == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "query.weight" in line and "2:4" in line]
        assert len([line for line in lines if line.startswith("…")]) == rows
        assert all(len(line) <= 80 for line in lines if line.startswith("…"))


def test_help_names_all_commands_and_statuses(capsys):
    for args in ([], ["--help"]):
        status, out, err = call(capsys, *args)
        assert (status, err) == (0, "")
        assert all(f"\n  {command} " in out for command in COMMANDS)
        assert "Exit status: 0 fine, 1 the pattern is violated, 2 bad input" in out


def test_version(capsys):
    status, out, err = call(capsys, "--version")
    assert (status, err) == (0, "")
    assert out.startswith(f"admm-nxm {admm_nxm.__version__} (torch {torch.__version__}, Python ")


class Terminal:
    """A stream that calls itself a terminal."""

    encoding = "utf-8"
    errors = "strict"

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass

    def isatty(self):
        return True


def test_verdicts_are_coloured_on_a_terminal_only(monkeypatch, capsys):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    result = Result({}, "a long line " * 30 + "pattern VIOLATED by 1 of [1] weights", 1)
    terminal = Terminal()
    show(result, terminal, as_json=False)
    assert "\x1b[1;31mVIOLATED by 1 of [1] weights" in terminal.text
    assert terminal.text.count("\n") == 1
    show(result, sys.stdout, as_json=False)
    assert capsys.readouterr().out == result.text + "\n"


@pytest.mark.parametrize("errors", ["strict", "surrogateescape"])
def test_what_the_output_cannot_encode_is_escaped(errors):
    result = Result({"path": "caf\xe9"}, "caf\xe9 \u2713 pattern ok")
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii", errors=errors, newline="\n")
    show(result, stream, as_json=False)
    assert stream.buffer.getvalue() == b"caf\\xe9 \\u2713 pattern ok\n"
    stream = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors=errors, newline="\n")
    show(result, stream, as_json=False)
    assert stream.buffer.getvalue().decode() == f"{result.text}\n"


def test_names_beyond_ascii_on_an_ascii_terminal(monkeypatch):
    terminal = Terminal()
    terminal.encoding = "ascii"
    monkeypatch.setenv("TERM", "xterm")
    show(Result({}, "caf\xe9 ok"), terminal, as_json=False)
    assert "caf\\xe9 " in terminal.text


def test_json_has_no_nan():
    value = {"a": float("nan"), "b": (1, float("inf"), True, None), "c": Path("x"), 3: "ä"}
    assert plain(value) == {"a": None, "b": [1, None, True, None], "c": "x", "3": "ä"}


def process(*args, **options):
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "admm_nxm", *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=env, check=False, **options)


def test_as_a_process(bad):
    done = process("verify", bad, "--json")
    assert (done.returncode, done.stderr) == (1, "")
    assert json.loads(done.stdout)["ok"] is False


def test_a_name_beyond_ascii_in_an_ascii_process(good, tmp_path):
    file = good.rename(tmp_path / "caf\xe9.safetensors")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-m", "admm_nxm", "prune", str(file), "-o", str(tmp_path / "\xfc.safetensors")]
    done = subprocess.run(command, capture_output=True, env=env, check=False)
    assert (done.returncode, done.stderr) == (0, b"")
    assert b"\\xfc.safetensors" in done.stdout


def test_nobody_reads_the_output(good):
    """As in ``admm-nxm verify x | head``: no traceback, and the status that other tools have then."""
    reader, writer = os.pipe()
    os.close(reader)
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "admm_nxm", "verify", str(good)]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=env, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, "")


def test_the_console_script_is_there():
    scripts = [entry for entry in entry_points(group="console_scripts") if entry.name == "admm-nxm"]
    if not scripts:
        pytest.skip("the package is not installed")
    assert scripts[0].load() is main


def test_imports_and_help_need_nothing_optional():
    optional = ["transformers", "accelerate", "matplotlib", "onnx", "onnxruntime", "huggingface_hub"]
    of_the_extra = ["typer", "rich"]
    code = (
        "import sys, admm_nxm, admm_nxm.cli, admm_nxm.cli.texts, admm_nxm.export\n"
        f"print([name for name in {optional + of_the_extra} if name in sys.modules])\n"
        "admm_nxm.cli.main(['--help'])\n"
        f"print([name for name in {optional} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert (lines[0], lines[-1]) == ("[]", "[]")
