"""Checkpoints in files: read one tensor at a time, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, NamedTuple, Union

import safetensors
import torch
from torch import Tensor

from .packing import KEY, Layout, Packed, PackedTensor, unpack_tensor
from .tensor_files import DTYPES, Header, read_header, read_json, refusing

SUFFIX = ".safetensors"
PACKED_SUFFIX = ".packed.safetensors"
"""Ending of files with packed weights in a folder: a loader that cannot unpack them does not find them, and says so."""

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

# The same model a second time: another precision, format or save, as the folders of the Hub hold them.
_COPY = re.compile(
    r"(onnx|openvino|coreml|original)/.*"  # exports, and what was converted
    r"|(?!adapter_)[^/]*\.(safetensors|gguf|h5|msgpack|ot|onnx|onnx[_.]data)"
    r"|(pytorch_model|model|consolidated)[^/]*\.(bin|pt|pth|ckpt)"  # not training_args.bin, not optimizer.pt
    r"|[^/]*\.(safetensors|bin|h5|msgpack)\.index\.json"
)

Place = Union[str, "os.PathLike[str]"]


class TensorInfo(NamedTuple):
    """Describe a tensor before it is read."""

    name: str
    shape: tuple[int, ...]
    """Of a packed weight, that of the weight."""
    dtype: torch.dtype
    """torch.uint8 stands for those that this torch does not have."""
    file: Path
    layout: Layout | None = None
    """Layout of the packed tensor; None if it is not packed."""
    alias_of: str | None = None
    """The name under which the file has it, if this is a further one."""


class Checkpoint:
    """The tensors of one or more safetensors files; packed weights count as the weights that they are."""

    def __init__(self, path: Path, purpose: str) -> None:
        self.path = path
        self.files, self.index = _find_files(path, purpose)
        self.index_fields: dict[str, Any] = {} if self.index is None else _read_index(self.index)
        named: dict[str, Path] = {}
        if self.index is not None:
            named = {name: self.index.parent / file for name, file in self.index_fields["weight_map"].items()}
            self.files = sorted(set(named.values()))
        self.tensors: dict[str, TensorInfo] = {}
        self.headers: dict[Path, Header] = {}
        self.packed: dict[Path, Packed] = {}  # of the files that have packed weights
        self._handles: dict[Path, Any] = {}
        for file in self.files:
            if self.index is not None and not file.exists():
                raise ValueError(
                    f"{file} is not a readable safetensors file: it is missing, and {self.index.name} names it; copy "
                    "it there, or save the model again"
                )
            self.headers[file] = read_header(file)
            for info in self._contents(file):
                if info.name in self.tensors:
                    other = self.tensors[info.name].file
                    raise ValueError(f"{other} and {file} both hold {info.name!r}; name the file to {purpose}")
                self.tensors[info.name] = info
        held = {file: {tensor.name for tensor in header.tensors} for file, header in self.headers.items()}
        for name, file in named.items():
            if name not in held[file]:
                raise ValueError(
                    f"{self.index} gives {name!r} to {file}, which does not hold it; copy the files of one save "
                    "together, or save the model again"
                )

    def get(self, name: str) -> Tensor:
        """Read one tensor to the CPU; a packed weight is unpacked, with the bits that it had."""
        info = self.tensors[name]
        name = info.alias_of or name
        with refusing(f"{info.file}: tensor {name!r} cannot be read"):
            if info.file not in self._handles:
                self._handles[info.file] = safetensors.safe_open(str(info.file), framework="pt")
            read: Callable[[str], Tensor] = self._handles[info.file].get_tensor
            if info.layout is None:
                return read(name)
            return unpack_tensor(PackedTensor(info.layout, {part: read(name + part) for part in info.layout.parts}))

    def others(self) -> list[Path]:
        """Return the paths in the folder of all other files, such as the config, without ``.git`` and leftovers."""
        own = {*self.files, self.index}
        found = []
        for inner, folders, files in os.walk(self.path, onerror=_raise):
            folders[:] = [name for name in folders if not _is_passed_over(name)]
            for name in folders:
                if Path(inner, name).is_symlink():
                    raise ValueError(f"{Path(inner, name)} is a link to a folder, and is not followed; move it away")
            for file in (Path(inner, name) for name in files if not _is_passed_over(name)):
                if file in own:
                    continue
                if not file.is_file():
                    raise ValueError(f"{file} is a dangling link or no file, and cannot be copied; move it away")
                found.append(file.relative_to(self.path))
        return sorted(found)

    def copies(self) -> list[Path]:
        """Return those of the others that hold the model a second time, such as ``pytorch_model.bin``."""
        return [file for file in self.others() if _COPY.fullmatch(file.as_posix())]

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()  # which closes the files

    def _contents(self, file: Path) -> Iterator[TensorInfo]:
        """Yield what a file holds: packed weights in the place of their parts, then the others, then further names."""
        stored = {tensor.name: tensor for tensor in self.headers[file].tensors}
        metadata = self.headers[file].metadata
        found: dict[str, TensorInfo] = {}
        with refusing(f"{file} is not a readable packed file"):
            packed = Packed()
            if KEY in metadata:
                packed = self.packed[file] = Packed.from_json(metadata[KEY])
            for name, layout in packed.weights.items():
                if name in stored:
                    raise ValueError(f"it holds {name!r} twice, packed and as it is")
                for ending, (dtype, shape) in layout.parts.items():
                    part = stored.pop(name + ending, None)
                    if part is None or (DTYPES.get(part.code), part.shape) != (dtype, shape):
                        raise ValueError(
                            f"the packed weight {name!r} is damaged: {name + ending!r} should have {dtype} and shape "
                            f"{shape}, and {'is missing' if part is None else f'has {part.code} and {part.shape}'}"
                        )
                found[name] = TensorInfo(name, layout.shape, layout.dtype, file, layout)
            for name, one in stored.items():
                found[name] = TensorInfo(name, one.shape, DTYPES.get(one.code, torch.uint8), file)
            yield from found.values()
            for alias, name in packed.aliases.items():
                if alias in found or name not in found:
                    raise ValueError(f"it has no tensor {name!r} to call {alias!r}")
                yield found[name]._replace(name=alias, alias_of=name)


def open_checkpoint(path: str | os.PathLike[str], *, purpose: str = "read") -> Checkpoint:
    """Open a checkpoint in a ``with`` statement: tensors are read when they are asked for, and nothing is unpickled."""
    return Checkpoint(Path(path), purpose)


def _find_files(path: Path, purpose: str) -> tuple[list[Path], Path | None]:
    """Return the files at a path, or the index that names them."""
    if not path.exists():
        raise FileNotFoundError(f"nothing to {purpose} at {path}")
    if not path.is_dir():
        return ([], path) if path.suffix == ".json" else ([path], None)
    # In the order of transformers' from_pretrained, which leaves the index of an earlier save unread.
    for suffix in (SUFFIX, PACKED_SUFFIX):
        single = path / f"model{suffix}"
        index = path / f"model{suffix}.index.json"
        if single.is_file():
            return [single], None
        if index.is_file():
            return [], index
    files = sorted(file for file in path.glob(f"*{SUFFIX}") if not file.name.startswith("."))
    if not files:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
        unread = f" ({pickled[0]} is pickled, and nothing here unpickles)" if pickled else ""
        raise FileNotFoundError(
            f"{path} holds no .safetensors file; save the model with save_pretrained(..., safe_serialization=True) "
            f"or pass a state dict{unread}"
        )
    return files, None


def _read_index(index: Path) -> dict[str, Any]:
    """Read the index of a sharded checkpoint, and see that it names files inside of its folder only."""
    with refusing(f"{index} is not a readable index of safetensors files"):
        fields = read_json(index.read_text(encoding="utf-8"))
        if not isinstance(fields, dict) or not isinstance(fields.get("weight_map"), dict):
            raise ValueError("it has no weight_map, an object of tensor name and file name")
        for name, file in fields["weight_map"].items():
            if not isinstance(file, str) or not file or "\0" in file:
                raise ValueError(f"it gives {name!r} the file {file!r}")
            windows, posix = PureWindowsPath(file), PurePosixPath(file)
            if windows.drive or windows.root or posix.root or ".." in (*windows.parts, *posix.parts):
                raise ValueError(
                    f"it gives {name!r} the file {file!r}, outside its folder; files are read from that folder alone"
                )
    return fields


def stand_ins(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return name -> a tensor without data for each tensor of a checkpoint, one for all names of a tensor."""
    found: dict[str, Tensor] = {}
    for name, info in checkpoint.tensors.items():
        if info.alias_of is None:
            found[name] = torch.empty(info.shape, dtype=info.dtype, device="meta")
        else:
            found[name] = found[info.alias_of]  # aliases come after their tensors
    return found


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary path; when the block ends, what was written there becomes ``path``, whole or not at all."""
    target = Path(path)
    if target.is_dir() and not target.is_symlink():
        raise IsADirectoryError(f"{target} is a folder; name a file")
    refuse_existing(target, overwrite)
    temporary = _beside(target)
    os.close(os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666))
    try:
        yield temporary
        _sync(temporary)
        refuse_existing(target, overwrite)  # it may have come up meanwhile
        os.replace(temporary, target)
    except BaseException:
        with suppress(FileNotFoundError):
            temporary.unlink()
        raise
    _sync(target.parent)


@contextmanager
def atomic_folder(
    path: Place, *, overwrite: bool = False, source: Place | Sequence[Place] | None = None
) -> Iterator[Path]:
    """Write a folder that appears whole or not at all."""
    target = Path(path)
    if target.suffix == SUFFIX:
        raise ValueError(f"{target} is to be a folder, and has the name of a file; leave {SUFFIX} out")
    _refuse_to_replace(target, [source] if isinstance(source, (str, os.PathLike)) else source or ())
    _refuse_existing_folder(target, overwrite)
    temporary, old = _beside(target), _beside(target)
    temporary.mkdir()
    try:
        yield temporary
        for inner, _, files in os.walk(temporary):
            for file in files:
                _sync(Path(inner, file))
            _sync(Path(inner))
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    try:
        _refuse_existing_folder(target, overwrite)
        if os.path.lexists(target):
            os.rename(target, old)
        os.rename(temporary, target)
    except BaseException as error:
        _give_up(error, temporary, target, old)
        raise
    _sync(target.parent)
    if os.path.lexists(old):
        try:
            shutil.rmtree(old)
        except OSError as error:
            raise OSError(f"{target} is written, but the old folder is still at {old}; delete it: {error}") from error


def _give_up(error: BaseException, temporary: Path, target: Path, old: Path) -> None:
    """Put the old folder back, where it was moved away, and say where the new one is; after an interrupt, delete it."""
    still = ""
    # By what is on disk: an interrupt may come between any two steps.
    if os.path.lexists(old) and not os.path.lexists(target):
        try:
            os.rename(old, target)
        except OSError as second:
            still = f"; the old folder is at {old}, and could not be moved back ({second})"
    if not os.path.lexists(temporary):
        return
    if not isinstance(error, Exception):
        shutil.rmtree(temporary, ignore_errors=True)
        return
    kind = next((k for k in (FileExistsError, NotADirectoryError) if isinstance(error, k)), OSError)
    raise kind(
        f"the new folder is complete and could not take its place at {target}: {error}; it is kept at {temporary}: "
        f"rename it to what you like, or delete it{still}"
    ) from error


def refuse_existing(path: Place, overwrite: bool) -> None:
    """Refuse to write where something is that may not be replaced, and where there is no folder to write in."""
    path = Path(path)
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists; choose another place, or allow overwriting it (overwrite=True)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}; create it first")


@contextmanager
def written_anew(
    checkpoint: Checkpoint,
    output: Place,
    *,
    overwrite: bool,
    ending: tuple[str, str] = (SUFFIX, SUFFIX),
    without: Collection[Path] = (),
) -> Iterator[tuple[Path, dict[Path, Path]]]:
    """Write a checkpoint again, whole or not at all: a folder with all its files but a few, or a file."""
    path, index = checkpoint.path, checkpoint.index
    if path == index:
        raise ValueError(f"{path} is an index; name its folder, {path.parent}")
    if not path.is_dir():
        if os.path.realpath(output) == os.path.realpath(path):
            raise ValueError(f"{output} is what is read; write to another file")
        with atomic_file(output, overwrite=overwrite) as file:
            yield file, {path: file}
        return
    with atomic_folder(output, overwrite=overwrite, source=path) as folder:
        others = [file for file in checkpoint.others() if file not in without]
        own = [*checkpoint.files, *([] if index is None else [index])]
        places = {file: ending[1].join(str(file.relative_to(path)).rsplit(ending[0], 1)) for file in own}
        taken = Counter([*map(str, others), *places.values()])
        twice = sorted(place for place, count in taken.items() if count > 1)
        if twice:
            raise ValueError(f"{path} holds both {twice[0]} and a file that would be called so; move one away")
        for file in others:
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(path / file, folder / file)
        for place in places.values():
            (folder / place).parent.mkdir(parents=True, exist_ok=True)
        yield folder, {file: folder / places[file] for file in checkpoint.files}
        if index is not None:
            weight_map: dict[str, str] = {}
            for file in checkpoint.files:
                for tensor in read_header(folder / places[file]).tensors:
                    if weight_map.setdefault(tensor.name, places[file]) != places[file]:
                        raise ValueError(
                            f"two tensors would be called {tensor.name!r}, one in {places[file]}; rename one"
                        )
            if weight_map == checkpoint.index_fields["weight_map"]:
                shutil.copy(index, folder / places[index])
            else:
                fields = {**checkpoint.index_fields, "weight_map": dict(sorted(weight_map.items()))}
                text = json.dumps(fields, indent=2, ensure_ascii=False) + "\n"
                (folder / places[index]).write_text(text, encoding="utf-8")


def _refuse_existing_folder(target: Path, overwrite: bool) -> None:
    refuse_existing(target, overwrite)
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        raise NotADirectoryError(f"{target} is no folder (a file or a link); name another one")


def _refuse_to_replace(target: Path, sources: Iterable[Place]) -> None:
    place = Path(os.path.realpath(target))
    for source in sources:
        source = Path(source)
        origin = Path(os.path.realpath(source))
        if not origin.exists():
            continue
        link = Path(os.path.realpath(source.absolute().parent), source.name)  # which may lie there and lead elsewhere
        if any(place == way or place in way.parents for way in (origin, link)):
            raise ValueError(f"{target} holds what is read ({source}); write to another folder")
        if origin in place.parents:
            raise ValueError(f"{target} lies inside what is read ({source}); write to a folder beside it")
    for name, kept in (("the working directory", Path.cwd()), ("the home folder", os.path.expanduser("~"))):
        kept = Path(os.path.realpath(kept))
        if place == kept or place in kept.parents:
            raise ValueError(f"{target} is {name} or around it, and is not replaced; write to a folder of its own")
    if os.path.ismount(target):
        raise ValueError(f"{target} is a mount point, which no folder can replace; write to a folder inside it")


def _beside(target: Path) -> Path:
    """Return the name of a temporary neighbour that nobody has; writers go by the ending, so it stays."""
    stem, ending = target.stem, target.suffix
    if len(os.fsencode(ending)) > 32:
        stem, ending = target.name, ""  # a name with a point in it, and no ending
    # File systems limit a name to 255 bytes, some to 143; a character has up to 4.
    stem = stem.encode("utf-8", "replace")[:80].decode("utf-8", "ignore")
    return target.parent / f".{stem}.{secrets.token_hex(6)}.tmp{ending}"


_LEFT_BEHIND = re.compile(r"\..*\.[0-9a-f]{12}\.tmp(\.[^.]*)?", re.DOTALL)


def _is_passed_over(name: str) -> bool:
    """Whether a file or folder is no part of a model: what ``_beside`` calls so, and version control."""
    return name == ".git" or _LEFT_BEHIND.fullmatch(name) is not None


def _raise(error: OSError) -> None:
    raise error


_NO_SYNC = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF}


def _sync(path: Path) -> None:
    """Bring a file or folder to disk."""
    folder = path.is_dir()
    if os.name == "nt" and folder:
        return  # folders cannot be opened there
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not folder or error.errno not in _NO_SYNC:  # network file systems know no fsync of a folder
            raise
    finally:
        os.close(descriptor)
