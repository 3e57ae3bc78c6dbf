"""Checkpoints in files: what is read, what is refused and why, and that a file appears whole or not at all."""

# ruff: noqa: PT012 - what happens inside the block is what is tested

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors
import torch
from safetensors.torch import save, save_file
from torch import Tensor

from admm_nxm import project, verify
from admm_nxm.io.files import atomic_file, atomic_folder, open_checkpoint, refuse_existing, written_anew
from admm_nxm.io.packed import pack
from admm_nxm.io.prune import prune_files
from admm_nxm.io.tensor_files import CODE_OF, DTYPES, Stored, bytes_in, bytes_of, read_header, write_file
from tests.helpers import same_bits

NAME = "layers.0.fc.weight"
INDEX = "model.safetensors.index.json"


def raw(header: Any, data: bytes = b"") -> bytes:
    """A file with this header, whether it is right or not."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


def entry(shape: list[Any], start: int, end: int, dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}


def sharded(folder: Path) -> Path:
    first, second = {"a": torch.ones(2), "b": torch.zeros(3)}, {"c": torch.ones(4)}
    save_file(first, folder / "model-1.safetensors", metadata={"format": "pt"})
    save_file(second, folder / "model-2.safetensors")
    weight_map = {**dict.fromkeys(first, "model-1.safetensors"), **dict.fromkeys(second, "model-2.safetensors")}
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}), encoding="utf-8")
    return folder


# ---------------------------------------------------------------- what is read


def test_a_file_lists_what_it_holds_and_reads_it(tmp_path: Path) -> None:
    tensors = {
        "one": torch.randn(2, 3).bfloat16(),
        "none": torch.empty(0, 4),
        "number": torch.tensor(3.0),
        "counts": torch.arange(5),
    }
    save_file(tensors, tmp_path / "weights.safetensors", metadata={"format": "pt", "note": "ä"})
    with open_checkpoint(tmp_path / "weights.safetensors") as checkpoint:
        assert {name: (info.shape, info.dtype) for name, info in checkpoint.tensors.items()} == {
            name: (tuple(t.shape), t.dtype) for name, t in tensors.items()
        }
        assert all(same_bits(checkpoint.get(name), t) for name, t in tensors.items())
        assert checkpoint.headers[checkpoint.files[0]].metadata == {"format": "pt", "note": "ä"}
        assert (checkpoint.index, checkpoint.packed) == (None, {})
        with pytest.raises(KeyError):
            checkpoint.get("two")


@pytest.mark.parametrize("named", [".", INDEX])
def test_a_sharded_checkpoint_opens_by_its_folder_and_by_its_index(named: str, tmp_path: Path) -> None:
    with open_checkpoint(sharded(tmp_path) / named) as checkpoint:
        assert {name: info.file.name for name, info in checkpoint.tensors.items()} == {
            "a": "model-1.safetensors",
            "b": "model-1.safetensors",
            "c": "model-2.safetensors",
        }
        assert checkpoint.get("c").tolist() == [1, 1, 1, 1]
        assert [checkpoint.headers[file].metadata for file in checkpoint.files] == [{"format": "pt"}, {}]
        assert checkpoint.index == tmp_path / INDEX


def test_the_single_file_comes_before_the_index_of_an_earlier_save(tmp_path: Path) -> None:
    save_file({"new": torch.ones(1)}, sharded(tmp_path) / "model.safetensors")
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["new"]


def test_hidden_files_are_not_read(tmp_path: Path) -> None:
    save_file({"new": torch.ones(1)}, tmp_path / "weights.safetensors")
    (tmp_path / ".weights.0123.tmp.safetensors").write_bytes(b"")  # left behind by a run that was killed
    with open_checkpoint(tmp_path) as checkpoint:
        assert list(checkpoint.tensors) == ["new"]


def test_a_link_to_a_file_elsewhere_is_followed(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save_file({"a": torch.ones(1)}, tmp_path / "blobs" / "0123")
    (tmp_path / "snapshot" / "model.safetensors").symlink_to(tmp_path / "blobs" / "0123")
    with open_checkpoint(tmp_path / "snapshot") as checkpoint:
        assert checkpoint.get("a").item() == 1


def test_packed_weights_read_like_any_other(tmp_path: Path) -> None:
    w = project(torch.randn(8, 16), "2:4") * -1
    pack({NAME: w, "bias": torch.ones(3)}, tmp_path / "packed.safetensors")
    with open_checkpoint(tmp_path / "packed.safetensors") as checkpoint:
        assert {name: info.shape for name, info in checkpoint.tensors.items()} == {NAME: (8, 16), "bias": (3,)}
        assert same_bits(checkpoint.get(NAME), w)
    assert verify(tmp_path / "packed.safetensors").ok


def test_a_dtype_that_torch_lacks_is_listed_and_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "m.safetensors").write_bytes(raw({"a": entry([4, 4], 0, 12, "F6_E2M3")}, b"\1" * 12))
    with open_checkpoint(tmp_path / "m.safetensors") as checkpoint:
        assert checkpoint.tensors["a"].dtype == torch.uint8
        with pytest.raises(ValueError, match=r"m\.safetensors: tensor 'a' cannot be read: ."):
            checkpoint.get("a")


# ---------------------------------------------------------------- what is refused

GOOD = save({"a": torch.arange(4.0), "b": torch.arange(2.0)})

DAMAGED: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "it is empty"),
    "seven bytes": (b"\1" * 7, "its header would be .* long, and the file has 7; it was cut short"),
    "cut in the header": (GOOD[:40], "its header would be .* long, and the file has 40; it was cut short"),
    "cut in the data": (GOOD[:-1], "."),
    "too long": (GOOD + b"\0", "."),
    "header longer than the file": ((2**62).to_bytes(8, "little") + GOOD[8:], "its header would be 4,611,686,018"),
    "header longer than the library reads": ((10**9).to_bytes(8, "little") + GOOD[8:], "its header would be"),
    "zip": (b"PK\x03\x04" + bytes(60), "it is a pickled checkpoint, .*; save the model with save_pretrained"),
    "pickle": (b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.", "it is a pickled checkpoint"),
    "not utf-8": (raw(b'{"\xff": 1}'), "."),
    "no object": (raw([]), "."),
    "nested": (raw(b"[" * 50_000), "."),
    "no fields": (raw({"a": {}}), "."),
    "unknown dtype": (raw({"a": entry([1], 0, 4, "F33")}, bytes(4)), "."),
    "huge shape": (raw({"a": entry([2**40, 2**40], 0, 4)}, bytes(4)), "."),
    "huge shape, nothing in it": (raw({"a": entry([2**62, 0, 2**62], 0, 0)}), ".*a shape that no tensor can have|."),
    "shape beyond 64 bits": (raw({"a": entry([2**70], 0, 4)}, bytes(4)), "."),
    "hundred dimensions": (
        raw({"a": entry([1] * 100, 0, 4)}, bytes(4)),
        "it gives 'a' a shape that no tensor can have",
    ),
    "negative shape": (raw({"a": entry([-1], 0, 4)}, bytes(4)), "."),
    "negative offset": (raw({"a": entry([1], -4, 0)}), "."),
    "offsets reversed": (raw({"a": entry([1], 4, 0)}, bytes(4)), "."),
    "offsets beyond the file": (raw({"a": entry([1], 4, 8)}, bytes(4)), "."),
    "overlap": (raw({"a": entry([2], 0, 8), "b": entry([2], 4, 12)}, bytes(12)), "."),
    "gap": (raw({"a": entry([1], 0, 4), "b": entry([1], 8, 12)}, bytes(12)), "."),
    "shape against size": (raw({"a": entry([3], 0, 4)}, bytes(4)), "."),
    "metadata that are no texts": (raw({"__metadata__": {"a": 3}, "a": entry([1], 0, 4)}, bytes(4)), "."),
    "a name twice": (raw(b'{"a":%s,"a":%s}' % ((json.dumps(entry([1], 0, 4)).encode(),) * 2), bytes(4)), "'a' twice|."),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_file_is_named_with_the_cause(damage: str, tmp_path: Path) -> None:
    data, cause = DAMAGED[damage]
    (tmp_path / "model.safetensors").write_bytes(data)
    for path in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(ValueError, match=rf"model\.safetensors is not a readable safetensors file: ({cause})"):
            open_checkpoint(path)


def test_a_header_may_begin_like_a_pickle(tmp_path: Path) -> None:
    header = json.dumps({"a": entry([1], 0, 4)}).encode()
    header += b" " * (0x0280 - len(header))
    (tmp_path / "model.safetensors").write_bytes(raw(header, bytes(4)))
    with open_checkpoint(tmp_path) as checkpoint:
        assert checkpoint.get("a").tolist() == [0]


def test_a_folder_in_the_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.safetensors").mkdir()
    with pytest.raises(ValueError, match=r"a\.safetensors is not a readable safetensors file: it is a folder"):
        open_checkpoint(tmp_path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="it is a device or a pipe"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nothing to read at .*absent"):
        open_checkpoint(tmp_path / "absent")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "weights.pth"])
def test_pickled_weights_are_never_read(name: str, tmp_path: Path) -> None:
    class Bomb:
        def __reduce__(self) -> tuple[Callable[[str], None], tuple[str]]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save({"a": Bomb()}, tmp_path / name)
    remedy = rf"holds no \.safetensors file; save the model with save_pretrained.*{name} is pickled, and nothing here"
    with pytest.raises(FileNotFoundError, match=remedy):
        open_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=rf"{name} is not a readable safetensors file: it is a pickled checkpoint"):
        open_checkpoint(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def with_map(folder: Path, weight_map: Any) -> Path:
    (sharded(folder) / INDEX).write_text(json.dumps({"weight_map": weight_map}), encoding="utf-8")
    return folder


@pytest.mark.parametrize(
    "file", ["../model-1.safetensors", "a/../../model-1.safetensors", "/etc/passwd", "C:\\m", "\\\\host\\m", "..\\m"]
)
def test_an_index_that_points_outside_its_folder_is_refused(file: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{INDEX} is not a readable index .*'a' the file .*, outside its folder"):
        open_checkpoint(with_map(tmp_path, {"a": file}))


@pytest.mark.parametrize("file", ["", 3, None, "a\0b", ["model-1.safetensors"]])
def test_an_index_with_no_file_name_is_refused(file: Any, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"{INDEX} is not a readable index .*: it gives 'a' the file"):
        open_checkpoint(with_map(tmp_path, {"a": file}))


@pytest.mark.parametrize("text", [b"\xff\xfe", b"[" * 50_000, b"", b"3", b'{"weight_map": {"a": "m", "a": "m"}}'])
def test_a_damaged_index_is_refused(text: bytes, tmp_path: Path) -> None:
    (sharded(tmp_path) / INDEX).write_bytes(text)
    with pytest.raises(ValueError, match=rf"{INDEX} is not a readable index of safetensors files: ."):
        open_checkpoint(tmp_path)


def test_an_index_that_gives_a_tensor_to_another_file_is_refused(tmp_path: Path) -> None:
    weight_map = {"a": "model-2.safetensors", "b": "model-1.safetensors"}
    with pytest.raises(ValueError, match=r"gives 'a' to .*model-2\.safetensors, which does not hold it; copy"):
        open_checkpoint(with_map(tmp_path, weight_map))


def test_a_missing_file_of_an_index_is_named_with_the_remedy(tmp_path: Path) -> None:
    (sharded(tmp_path) / "model-2.safetensors").unlink()
    with pytest.raises(ValueError, match=rf"model-2\.safetensors is not .*: it is missing, and {INDEX} names it; copy"):
        open_checkpoint(tmp_path)


def test_a_config_is_no_index(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json is not a readable index .*: it has no weight_map"):
        open_checkpoint(tmp_path / "config.json")


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    for name in ("x.safetensors", "y.safetensors"):
        save_file({"a": torch.ones(1)}, tmp_path / name)
    with pytest.raises(ValueError, match=r"x\.safetensors and .*y\.safetensors both hold 'a'; name the file to count"):
        open_checkpoint(tmp_path, purpose="count")


# ---------------------------------------------------------------- writing safetensors


def every_dtype() -> dict[str, Tensor]:
    tensors = {f"{code.lower()}.b": torch.arange(24).reshape(2, 12).to(torch.uint8) for code in DTYPES}
    found = {}
    for (name, t), dtype in zip(tensors.items(), DTYPES.values(), strict=True):
        found[name] = (t & 1).view(dtype) if dtype == torch.bool else t.repeat(1, dtype.itemsize).view(dtype)
    return {**found, "a": torch.empty(0, 3), "z": torch.tensor(1.5), "é\n": torch.ones(2)}


def stored(tensors: dict[str, Tensor]) -> list[Stored]:
    return [Stored(name, CODE_OF[t.dtype], tuple(t.shape), t.numel() * t.element_size()) for name, t in tensors.items()]


@pytest.mark.parametrize("metadata", [{}, {"format": "pt"}, {"ä": '"\n'}])
def test_the_writer_writes_what_the_library_would(metadata: dict[str, str], tmp_path: Path) -> None:
    tensors = {name: t for name, t in every_dtype().items() if t.dtype != getattr(torch, "float8_e8m0fnu", None)}
    write_file(
        tmp_path / "ours", stored(tensors), metadata, ((name, bytes_of(tensors[name])) for name in reversed(tensors))
    )
    save_file(tensors, tmp_path / "theirs", metadata=metadata or None)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    header = read_header(tmp_path / "ours")
    assert header.metadata == metadata
    copied = ((tensor.name, bytes_in(tmp_path / "ours", tensor)) for tensor in header.tensors)
    write_file(tmp_path / "copy", header.tensors, metadata, copied)
    assert (tmp_path / "copy").read_bytes() == (tmp_path / "theirs").read_bytes()


def test_the_writer_takes_any_layout_in_memory(tmp_path: Path) -> None:
    t = torch.arange(24.0).reshape(4, 6)
    tensors = {"b": t[::2, 1::2], "a": t.t().requires_grad_()}
    write_file(tmp_path / "m", stored(tensors), {}, ((name, bytes_of(one)) for name, one in tensors.items()))
    with safetensors.safe_open(str(tmp_path / "m"), framework="pt") as file:
        assert torch.equal(file.get_tensor("a"), t.t())
        assert torch.equal(file.get_tensor("b"), t[::2, 1::2])


def test_the_writer_refuses_too_few_bytes_and_a_name_twice(tmp_path: Path) -> None:
    one = Stored("a", "F32", (2,), 8)
    with pytest.raises(ValueError, match="'a' gave 4 bytes where 8 were planned"):
        write_file(tmp_path / "m", [one], {}, [("a", [b"1234"])])
    for name in ("a", "__metadata__"):
        with pytest.raises(ValueError, match=f"two tensors are called '{name}'"):
            write_file(tmp_path / "m", [one, one._replace(name=name)], {}, [])


def test_a_header_that_nobody_could_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("admm_nxm.io.tensor_files._LONGEST_HEADER", 100)
    with pytest.raises(ValueError, match=r"would have a header of 120 bytes.*; save the model in more shards"):
        write_file(tmp_path / "m", [Stored("a", "F32", (1,), 4)], {"x": "y" * 36}, [])
    assert not (tmp_path / "m").exists()


# ---------------------------------------------------------------- files that appear whole or not at all


def listing(folder: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None for path in folder.rglob("*")}


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_file(tmp_path / "report.svg") as temporary:
        assert temporary.suffix == ".svg"
        assert temporary.parent == tmp_path
        temporary.write_text("new", encoding="utf-8")
        assert not (tmp_path / "report.svg").exists()
    assert listing(tmp_path) == {"report.svg": b"new"}


def test_a_file_has_the_permissions_of_any_other(tmp_path: Path) -> None:
    (tmp_path / "other").write_bytes(b"")
    with atomic_file(tmp_path / "new"):
        pass
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == stat.S_IMODE((tmp_path / "other").stat().st_mode)


class Stopped(BaseException):
    pass


@pytest.mark.parametrize("kind", [ValueError, Stopped])
@pytest.mark.parametrize("old", [None, b"old"])
def test_a_file_that_fails_leaves_nothing(kind: type[BaseException], old: bytes | None, tmp_path: Path) -> None:
    if old is not None:
        (tmp_path / "a").write_bytes(old)
    with pytest.raises(kind), atomic_file(tmp_path / "a", overwrite=True) as temporary:
        temporary.write_bytes(b"half")
        raise kind
    assert listing(tmp_path) == ({} if old is None else {"a": old})


def test_an_existing_file_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"old")
    with (
        pytest.raises(FileExistsError, match=r"a exists; choose another place, or allow overwriting it"),
        atomic_file(tmp_path / "a"),
    ):
        pytest.fail("the work was begun")
    with atomic_file(tmp_path / "a", overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert listing(tmp_path) == {"a": b"new"}


def test_a_file_that_came_up_meanwhile_is_kept(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"mine")
        (tmp_path / "a").write_bytes(b"theirs")
    assert listing(tmp_path) == {"a": b"theirs"}


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    (tmp_path / "kept").write_bytes(b"kept")
    (tmp_path / "a").symlink_to("kept")
    with pytest.raises(FileExistsError), atomic_file(tmp_path / "a"):
        pass
    with atomic_file(tmp_path / "a", overwrite=True) as temporary:
        temporary.write_bytes(b"new")
    assert not (tmp_path / "a").is_symlink()
    assert listing(tmp_path) == {"a": b"new", "kept": b"kept"}
    (tmp_path / "dangling").symlink_to("absent")
    with pytest.raises(FileExistsError):
        refuse_existing(tmp_path / "dangling", overwrite=False)


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127, "e." + "é" * 126, "𝄞" * 60 + ".safetensors"])
@pytest.mark.parametrize("kind", ["file", "folder"])
def test_any_name_that_a_file_system_takes_can_be_written(kind: str, name: str, tmp_path: Path) -> None:
    if kind == "file":
        with atomic_file(tmp_path / name) as temporary:
            temporary.write_bytes(b"new")
    else:
        name = name.removesuffix(".safetensors")  # that of a file, which a folder may not have
        with atomic_folder(tmp_path / name) as temporary:
            (temporary / "a").write_bytes(b"new")
    assert temporary.suffix in (".safetensors", ".tmp")
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("writer", [atomic_file, atomic_folder])
def test_a_place_without_a_folder_is_refused(writer: Any, tmp_path: Path) -> None:
    with (
        pytest.raises(FileNotFoundError, match=r"there is no folder .*absent; create it first"),
        writer(tmp_path / "absent" / "a"),
    ):
        pytest.fail("the work was begun")


def test_a_folder_in_the_place_of_the_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(IsADirectoryError, match="is a folder; name a file"), atomic_file(tmp_path, overwrite=True):
        pytest.fail("the work was begun")


def test_files_are_synced_before_they_take_their_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda fd: (events.append("sync"), fsync(fd))[1])
    monkeypatch.setattr(os, "replace", lambda a, b: (events.append("replace"), replace(a, b))[1])
    with atomic_file(tmp_path / "a") as temporary:
        temporary.write_bytes(b"new")
    assert events == ["sync", "replace", "sync"]


# ---------------------------------------------------------------- folders


def test_a_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "inner").mkdir()
        (temporary / "inner" / "a").write_bytes(b"new")
        assert not (tmp_path / "out").exists()
    assert listing(tmp_path) == {"out": None, "out/inner": None, "out/inner/a": b"new"}


def old_folder(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").write_bytes(b"old")
    return tmp_path / "out"


OLD = {"out": None, "out/old": b"old"}


@pytest.mark.parametrize("kind", [ValueError, Stopped])
@pytest.mark.parametrize("exists", [False, True])
def test_a_folder_that_fails_leaves_nothing(kind: type[BaseException], exists: bool, tmp_path: Path) -> None:
    if exists:
        old_folder(tmp_path)
    with pytest.raises(kind), atomic_folder(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "a").write_bytes(b"half")
        raise kind
    assert listing(tmp_path) == (OLD if exists else {})


def test_an_existing_folder_is_kept_unless_overwriting_is_allowed(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match=r"out exists; choose another place"), atomic_folder(old_folder(tmp_path)):
        pytest.fail("the work was begun")
    assert listing(tmp_path) == OLD
    with atomic_folder(tmp_path / "out", overwrite=True) as temporary:
        (temporary / "a").write_bytes(b"new")
        assert (tmp_path / "out" / "old").read_bytes() == b"old"
    assert listing(tmp_path) == {"out": None, "out/a": b"new"}


def test_a_folder_that_came_up_meanwhile_is_kept(tmp_path: Path) -> None:
    with (
        pytest.raises(FileExistsError, match=r"complete and could not take its place at .*out exists.* it is kept at"),
        atomic_folder(tmp_path / "out") as temporary,
    ):
        (temporary / "a").write_bytes(b"mine")
        old_folder(tmp_path)
    assert listing(tmp_path) == {**OLD, temporary.name: None, f"{temporary.name}/a": b"mine"}


def test_a_file_that_came_up_meanwhile_is_kept_beside_the_folder(tmp_path: Path) -> None:
    with (
        pytest.raises(NotADirectoryError, match=r"is kept at .*: rename it"),
        atomic_folder(tmp_path / "out", overwrite=True) as temporary,
    ):
        (temporary / "a").write_bytes(b"mine")
        (tmp_path / "out").write_bytes(b"theirs")
    assert listing(tmp_path) == {"out": b"theirs", temporary.name: None, f"{temporary.name}/a": b"mine"}


def test_the_old_folder_returns_when_the_new_one_cannot_take_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = old_folder(tmp_path), os.rename

    def fails_once(a: Any, b: Any) -> None:
        if Path(b) == target and (Path(a) / "a").exists():
            raise OSError("disk on fire")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fails_once)
    with (
        pytest.raises(OSError, match=r"could not take its place at .*: disk on fire; it is kept at .*, or delete it$"),
        atomic_folder(target, overwrite=True) as temporary,
    ):
        (temporary / "a").write_bytes(b"new")
    assert listing(tmp_path) == {**OLD, temporary.name: None, f"{temporary.name}/a": b"new"}


def test_both_folders_are_named_when_the_old_one_cannot_return(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, rename = old_folder(tmp_path), os.rename

    def fails(a: Any, b: Any) -> None:
        if Path(b) == target:
            raise OSError("busy")
        rename(a, b)

    monkeypatch.setattr(os, "rename", fails)
    with (
        pytest.raises(OSError, match=r"is kept at .*; the old folder is at (.*), and could not be moved back \(busy\)"),
        atomic_folder(target, overwrite=True) as temporary,
    ):
        (temporary / "a").write_bytes(b"new")
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == ["a", "old"]


@pytest.mark.parametrize("step", ["old", "new"])
@pytest.mark.parametrize("done", [False, True])
def test_an_interrupt_between_the_last_steps_leaves_one_whole_folder(
    step: str, done: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target, rename = old_folder(tmp_path), os.rename

    def stops(a: Any, b: Any) -> None:
        hit = Path(a) == target if step == "old" else (Path(a) / "new").exists()
        if not hit or done:
            rename(a, b)
        if hit:
            raise Stopped

    monkeypatch.setattr(os, "rename", stops)
    with pytest.raises(Stopped), atomic_folder(target, overwrite=True) as temporary:
        (temporary / "new").write_bytes(b"new")
    after = {path.name for path in target.iterdir()}
    assert after == ({"new"} if (step, done) == ("new", True) else {"old"})
    assert not temporary.exists()


def test_a_mount_point_is_refused_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = old_folder(tmp_path)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) == target)
    for overwrite in (False, True):
        with (
            pytest.raises(ValueError, match="out is a mount point, which no folder can replace; write to a folder in"),
            atomic_folder(target, overwrite=overwrite),
        ):
            pytest.fail("the work was begun")
    assert listing(tmp_path) == OLD


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_cannot_sync_folders_will_do(
    number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def no_folders(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode):
            raise OSError(number, "no folders")
        fsync(fd)

    monkeypatch.setattr(os, "fsync", no_folders)
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_bytes(b"new")
    with atomic_file(tmp_path / "b"):
        pass
    assert listing(tmp_path) == {"out": None, "out/a": b"new", "b": b""}


@pytest.mark.parametrize(("number", "folder"), [(errno.EIO, True), (errno.EINVAL, False)])
def test_other_failures_to_sync_are_errors(
    number: int, folder: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(fd: int) -> None:
        if stat.S_ISDIR(os.fstat(fd).st_mode) == folder:
            raise OSError(number, "broken disk")

    monkeypatch.setattr(os, "fsync", fails)
    with pytest.raises(OSError, match="broken disk"), atomic_folder(tmp_path / "out") as temporary:
        (temporary / "a").write_bytes(b"new")
    assert listing(tmp_path) == {}


def test_an_old_folder_that_cannot_be_deleted_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import shutil

    def fails(path: Any, **_: Any) -> None:
        raise OSError("busy")

    monkeypatch.setattr(shutil, "rmtree", fails)
    with pytest.raises(OSError, match=r"out is written, but the old folder is still at .*; delete it: busy"):  # noqa: SIM117
        with atomic_folder(old_folder(tmp_path), overwrite=True) as temporary:
            (temporary / "a").write_bytes(b"new")
    assert (tmp_path / "out" / "a").read_bytes() == b"new"


@pytest.mark.parametrize("link", [False, True])
def test_what_is_no_folder_is_not_replaced_by_one(link: bool, tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    if link:
        (tmp_path / "out").symlink_to("kept")
    else:
        (tmp_path / "out").write_bytes(b"old")
    with pytest.raises(NotADirectoryError, match="is no folder"), atomic_folder(tmp_path / "out", overwrite=True):
        pytest.fail("the work was begun")


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("a/b", "holds what is read"),
        ("a", "holds what is read"),
        ("a/b/c", "lies inside what is read"),
        ("link", "holds what is read"),
        ("x/../a/b", "holds what is read"),
        ("a/b/new", "lies inside what is read"),
    ],
)
def test_the_source_is_never_replaced(target: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "a" / "b" / "c").mkdir(parents=True)
    (tmp_path / "x").mkdir()
    (tmp_path / "link").symlink_to("a")
    with (
        pytest.raises(ValueError, match=message),
        atomic_folder(tmp_path / target, overwrite=True, source=tmp_path / "a" / "b"),
    ):
        pytest.fail("the work was begun")
    assert (tmp_path / "a" / "b" / "c").is_dir()


@pytest.mark.parametrize("protected", ["out", "out/data.csv", "out/models/m", "link/data.csv"])
def test_each_of_several_sources_is_protected(protected: str, tmp_path: Path) -> None:
    (tmp_path / "out" / "models" / "m").mkdir(parents=True)
    (tmp_path / "out" / "data.csv").write_bytes(b"rows")
    (tmp_path / "beside.csv").write_bytes(b"rows")
    (tmp_path / "link").symlink_to("out")
    sources = [tmp_path / "beside.csv", str(tmp_path / protected), "the-name-of-a/model-elsewhere"]
    with (
        pytest.raises(ValueError, match=rf"out holds what is read \(.*{protected}\); write to another folder"),
        atomic_folder(tmp_path / "out", overwrite=True, source=sources),
    ):
        pytest.fail("the work was begun")
    with atomic_folder(tmp_path / "new", source=sources):
        pass
    assert (tmp_path / "out" / "data.csv").read_bytes() == b"rows"


@pytest.mark.parametrize("target", [".", "..", "/", "~", "home/.."])
def test_the_working_directory_and_the_home_folder_are_never_replaced(
    target: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "work" / "home").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setenv("HOME", str(tmp_path / "work" / "home"))
    place = str(tmp_path / "work" / "home") if target == "~" else target
    with (
        pytest.raises(ValueError, match=r"is the (working directory|home folder) or around it"),
        atomic_folder(place, overwrite=True),
    ):
        pytest.fail("the work was begun")


# ---------------------------------------------------------------- the other files of a folder


def test_other_files_are_copied_without_leftovers_and_version_control(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    (folder / "more").mkdir(parents=True)
    save_file({"a": torch.ones(2)}, folder / "model.safetensors")
    kept = {"config.json": b"{}", "more/.hidden": b"kept", ".gitattributes": b"lfs", "a.tmp": b"kept", ".tmp": b"kept"}
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    (folder / ".git" / "objects").mkdir(parents=True)
    (folder / ".git" / "objects" / "blob").write_bytes(b"large")
    (folder / "more" / ".git").write_bytes(b"gitdir: elsewhere")
    # What a process that was killed leaves behind: its temporary files and folders stay.
    monkeypatch.setattr("pathlib.Path.unlink", lambda *_: None)
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    with pytest.raises(Stopped), atomic_file(folder / "model.safetensors", overwrite=True):
        raise Stopped
    with pytest.raises(Stopped), atomic_folder(folder / "more" / "checkpoint") as temporary:
        (temporary / "half").write_bytes(b"half")
        raise Stopped
    with open_checkpoint(folder) as checkpoint:
        others = checkpoint.others()
        with written_anew(checkpoint, tmp_path / "copy", overwrite=False):
            pass
    assert others == sorted(map(Path, kept))
    assert {name: content for name, content in listing(tmp_path / "copy").items() if content is not None} == kept


COPIES = [
    "consolidated.00.pth",
    "consolidated.safetensors",
    "flax_model.msgpack",
    "model-00001-of-00002.safetensors",
    "model.Q4_K_M.gguf",
    "model.fp16.safetensors",
    "model.onnx",
    "model.onnx_data",
    "model.safetensors.index.json",
    "onnx/model.onnx",
    "original/params.json",
    "pytorch_model-00001-of-00002.bin",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
    "tf_model.h5",
]
"""The model again, in other formats and precisions."""

KEPT = [
    "1_Pooling/config.json",
    "2_Dense/model.safetensors",  # a further module
    "adapter_model.safetensors",
    "config.json",
    "optimizer.pt",
    "rng_state.pth",
    "spiece.model",
    "tokenizer.json",
    "training_args.bin",
]


@pytest.mark.parametrize("write", [prune_files, pack])
def test_further_copies_of_the_weights_are_left_out_and_named(write: Any, tmp_path: Path) -> None:
    for name in (*COPIES, *KEPT):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_bytes(b"{}")
    save_file({NAME: project(torch.randn(4, 8), "2:4")}, tmp_path / "a" / "model.safetensors")
    report = write(tmp_path / "a", tmp_path / "b")
    assert list(report.left_out) == COPIES
    assert f": {', '.join(COPIES)}\n" in str(report)
    written = {path.relative_to(tmp_path / "b").as_posix() for path in (tmp_path / "b").rglob("*") if path.is_file()}
    assert written - {"admm_nxm.json"} == {
        *KEPT,
        "model.safetensors" if write is prune_files else "model.packed.safetensors",
    }


def test_a_folder_that_cannot_be_listed_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "closed").mkdir()
    scandir = os.scandir

    def refuses(path: Any) -> Any:
        if Path(path).name == "closed":
            raise PermissionError("closed")
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuses)
    with open_checkpoint(tmp_path) as checkpoint, pytest.raises(PermissionError, match="closed"):
        checkpoint.others()
