"""Checkpoints in files: read one tensor at a time, and written whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, Union

import safetensors
import torch
from torch import Tensor

from .packing import KEY, Layout, Packed, PackedTensor, unpack_tensor
from .tensor_files import DTYPES, Header, Stored, brief, read_header, unique_keys

__all__ = [
    "INDEX_SUFFIX",
    "PACKED_SUFFIX",
    "SUFFIX",
    "Checkpoint",
    "TensorInfo",
    "atomic_file",
    "atomic_folder",
    "copy_files",
    "open_checkpoint",
    "read_index",
    "refuse_existing",
    "refuse_source",
    "stand_ins",
]

SUFFIX = ".safetensors"
PACKED_SUFFIX = ".packed.safetensors"
"""Ending of files with packed weights in a folder: a loader that cannot unpack them does not find them, and says so."""

INDEX_SUFFIX = ".index.json"

_PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")

Place = Union[str, "os.PathLike[str]"]


# ---------------------------------------------------------------- reading


@dataclass(frozen=True)
class TensorInfo:
    """What is known of a tensor before it is read.

    Args:
        name: its name.
        shape: its shape; of a packed weight, that of the weight.
        dtype: its dtype; torch.uint8 stands for those that this torch does not have.
        file: the file that holds it.
        layout: how it is packed; None if it is not.
        alias_of: the name under which the file has it, if this is a further one.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    file: Path
    layout: Layout | None = None
    alias_of: str | None = None


class Checkpoint:
    """The tensors of one or more safetensors files, see :func:`open_checkpoint`.

    Attributes:
        path: what was opened.
        files: the files, in order.
        index: the index that named them, or None.
        tensors: name -> what is known of the tensor; packed weights count as the weights that they are.
        headers: file -> its header.
        packed: file -> what it says of its packed weights; files without any are missing.
    """

    def __init__(self, path: Path, files: list[Path], index: Path | None, purpose: str) -> None:
        self.path = path
        self.files = tuple(files)
        self.index = index
        self.tensors: dict[str, TensorInfo] = {}
        self.headers: dict[Path, Header] = {}
        self.packed: dict[Path, Packed] = {}
        self._handles: dict[Path, Any] = {}
        self._stack = ExitStack()
        for file in files:
            header = self.headers[file] = read_header(file)
            for info in self._contents(file, header):
                if info.name in self.tensors:
                    other = self.tensors[info.name].file
                    raise ValueError(f"{other} and {file} both hold {info.name!r}; name the file to {purpose}")
                self.tensors[info.name] = info

    def metadata(self, file: Path) -> Mapping[str, str]:
        """Return the entries of a file's ``__metadata__``, without that of packed weights.

        Args:
            file: one of ``files``.
        """
        return {key: value for key, value in (self.headers[file].metadata or {}).items() if key != KEY}

    def get(self, name: str) -> Tensor:
        """Read one tensor.

        Args:
            name: its name.

        Returns:
            The tensor on the CPU; a packed weight unpacked, with the bits that it had.

        Raises:
            KeyError: there is none of that name.
            ValueError: it cannot be read.
        """
        info = self.tensors[name]
        name = info.alias_of or name
        try:
            if info.layout is None:
                return self._read(info.file, name)
            parts = {ending: self._read(info.file, name + ending) for ending in info.layout.parts}
            return unpack_tensor(PackedTensor(info.layout, parts))
        except (safetensors.SafetensorError, OSError, ValueError, RuntimeError, AttributeError) as error:
            raise ValueError(f"{info.file}: tensor {name!r} cannot be read: {brief(error)}") from error

    def others(self) -> list[Path]:
        """Return the files of the checkpoint's folder that hold none of its weights, such as the config.

        The index is none of them. What version control keeps (``.git``) and what interrupted writes of this package
        left behind is passed over.

        Returns:
            The paths relative to the folder, in order.

        Raises:
            ValueError: the folder has a link to a folder, or what is no file.
        """
        own = {*self.files, self.index}
        found = []
        for inner, folders, files in os.walk(self.path, onerror=_raise):
            folders[:] = [name for name in folders if not _is_passed_over(name)]
            for name in folders:
                if Path(inner, name).is_symlink():
                    raise ValueError(f"{Path(inner, name)} is a link to a folder, and is not followed; move it away")
            for name in files:
                file = Path(inner, name)
                if file in own or _is_passed_over(name):
                    continue
                if not file.is_file():
                    raise ValueError(f"{file} is a dangling link or no file, and cannot be copied; move it away")
                found.append(file.relative_to(self.path))
        return sorted(found)

    def close(self) -> None:
        """Close the files."""
        self._handles.clear()
        self._stack.close()

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self, file: Path, name: str) -> Tensor:
        if file not in self._handles:
            self._handles[file] = self._stack.enter_context(safetensors.safe_open(str(file), framework="pt"))
        tensor = self._handles[file].get_tensor(name)
        assert isinstance(tensor, Tensor)
        return tensor

    def _contents(self, file: Path, header: Header) -> Iterator[TensorInfo]:
        """Yield what a file holds, with packed weights in the place of their parts."""
        stored = {tensor.name: tensor for tensor in header.tensors}
        packed = Packed()
        if KEY in (header.metadata or {}):
            try:
                packed = self.packed[file] = Packed.from_json((header.metadata or {})[KEY])
                parts = _match(packed, stored)
            except ValueError as error:
                raise ValueError(f"{file} is not a readable packed file: {brief(error)}") from None
        else:
            parts = {}
        found: dict[str, TensorInfo] = {}
        for tensor in header.tensors:
            name = parts.get(tensor.name, tensor.name)
            if name in found:
                continue
            layout = packed.weights.get(name)
            shape, dtype = (
                (tensor.shape, DTYPES.get(tensor.code, torch.uint8)) if layout is None else (layout.shape, layout.dtype)
            )
            found[name] = TensorInfo(name, shape, dtype, file, layout)
        for alias, name in packed.aliases.items():
            if alias in found or name not in found:
                raise ValueError(f"{file} is not a readable packed file: it has no tensor {name!r} to call {alias!r}")
        yield from found.values()
        for alias, name in packed.aliases.items():
            info = found[name]
            yield TensorInfo(alias, info.shape, info.dtype, file, info.layout, name)


def _match(packed: Packed, stored: Mapping[str, Stored]) -> dict[str, str]:
    """Return the weight of each part, after checking that the file has the parts that the metadata says."""
    owner: dict[str, str] = {}
    for name, layout in packed.weights.items():
        if name in stored:
            raise ValueError(f"it holds {name!r} twice, packed and as it is")
        for ending, (dtype, shape) in layout.parts.items():
            part = stored.get(name + ending)
            found = None if part is None else (DTYPES.get(part.code), part.shape)
            if found != (dtype, shape):
                raise ValueError(
                    f"the packed weight {name!r} is damaged: {name + ending!r} should have dtype {dtype} and shape "
                    f"{shape}, and {'is missing' if part is None else f'has {part.code} and {part.shape}'}"
                )
            owner[name + ending] = name
    return owner


def open_checkpoint(path: str | os.PathLike[str], *, purpose: str = "read") -> Checkpoint:
    """Open a checkpoint of safetensors files; use it in a ``with`` statement.

    No tensor is read before it is asked for. Nothing is ever unpickled.

    Args:
        path: a .safetensors file, the index (.json) of a sharded checkpoint, or a folder that holds either; packed or
            not.
        purpose: the verb for error messages.

    Returns:
        The checkpoint.

    Raises:
        FileNotFoundError: nothing there, or a folder without such a file.
        ValueError: a file or the index is damaged, or two files hold a tensor of the same name.
    """
    path = Path(path)
    files, index = _find_files(path, purpose)
    checkpoint = Checkpoint(path, files, index, purpose)
    if index is not None:
        _check_index(checkpoint, index)
    return checkpoint


def _find_files(path: Path, purpose: str) -> tuple[list[Path], Path | None]:
    """Return the files at a path, and the index that names them."""
    if not path.exists():
        raise FileNotFoundError(f"nothing to {purpose} at {path}")
    if not path.is_dir():
        if path.suffix == ".json":
            return _files_of_index(path), path
        return [path], None
    # In the order of transformers' from_pretrained, which leaves the index of an earlier save unread.
    for suffix in (SUFFIX, PACKED_SUFFIX):
        single = path / f"model{suffix}"
        index = path / f"model{suffix}{INDEX_SUFFIX}"
        if single.is_file():
            return [single], None
        if index.is_file():
            return _files_of_index(index), index
    files = sorted(file for file in path.glob(f"*{SUFFIX}") if not file.name.startswith("."))
    if not files:
        pickled = sorted(file.name for file in path.iterdir() if file.suffix in _PICKLED)
        unread = f" ({pickled[0]} is pickled, and nothing here unpickles)" if pickled else ""
        raise FileNotFoundError(
            f"{path} holds no .safetensors file; save the model with save_pretrained(..., safe_serialization=True) "
            f"or pass a state dict{unread}"
        )
    return files, None


def read_index(index: Path) -> dict[str, Any]:
    """Read the index of a sharded checkpoint.

    Args:
        index: the file.

    Returns:
        Its contents; ``weight_map`` is a dict of tensor name -> file name inside the index's folder.

    Raises:
        ValueError: it is damaged, or names a file outside its folder.
    """
    try:
        fields = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=unique_keys)
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
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{index} is not a readable index of safetensors files: {brief(error)}") from error
    return fields


def _files_of_index(index: Path) -> list[Path]:
    files = sorted({index.parent / file for file in read_index(index)["weight_map"].values()})
    for file in files:
        if not file.exists():
            raise ValueError(
                f"{file} is not a readable safetensors file: it is missing, and {index.name} names it; copy it there, "
                "or save the model again"
            )
    return files


def _check_index(checkpoint: Checkpoint, index: Path) -> None:
    """Refuse an index that gives a tensor to a file which does not hold it."""
    held = {file: {tensor.name for tensor in header.tensors} for file, header in checkpoint.headers.items()}
    for name, file in read_index(index)["weight_map"].items():
        if name not in held[index.parent / file]:
            raise ValueError(
                f"{index} gives {name!r} to {file}, which does not hold it; copy the files of one save together, or "
                "save the model again"
            )


def stand_ins(checkpoint: Checkpoint) -> dict[str, Tensor]:
    """Return a tensor without data for each tensor of a checkpoint, one for all names of a tensor.

    Args:
        checkpoint: where to look; nothing is read.

    Returns:
        Name -> meta tensor of its shape and dtype.
    """
    found: dict[str, Tensor] = {}
    for name, info in checkpoint.tensors.items():
        if info.alias_of is None:
            found[name] = torch.empty(info.shape, dtype=info.dtype, device="meta")
    for name, info in checkpoint.tensors.items():
        if info.alias_of is not None:
            found[name] = found[info.alias_of]
    return found


# ---------------------------------------------------------------- writing


@contextmanager
def atomic_file(path: str | os.PathLike[str], *, overwrite: bool = False) -> Iterator[Path]:
    """Write a file that appears whole or not at all.

    Args:
        path: where the file is to be. Its folder must exist. A link is replaced, not followed.
        overwrite: whether a file that is there may be replaced.

    Yields:
        The path of an empty temporary file beside it, with the same ending, to be written to. When the block ends it is
        brought to disk and takes its place; when the block raises it is deleted and the old file stays as it was.

    Raises:
        FileExistsError: something is there already and ``overwrite`` is False; raised before the block.
        FileNotFoundError: the folder does not exist.
        IsADirectoryError: a folder is there.
    """
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
    """Write a folder that appears whole or not at all.

    Args:
        path: where the folder is to be. The folder around it must exist.
        overwrite: whether a folder that is there may be replaced, with all it holds.
        source: files and folders that are read meanwhile, one or several; the new folder may be none of them, nor
            around one, nor in one. Those that do not exist are passed over: a name may be that of a model elsewhere.

    Yields:
        The path of an empty temporary folder beside it. When the block ends its files are brought to disk and it takes
        its place; an old folder is deleted after that. When the block raises it is deleted and the old one stays as it
        was. When the block ends and it cannot take its place, it is kept, and the error says where it is.

    Raises:
        FileExistsError: something is there already and ``overwrite`` is False; raised before the block, and after it if
            something came up meanwhile.
        FileNotFoundError: the folder around it does not exist.
        NotADirectoryError: a file is there.
        OSError: the new folder is complete and cannot take its place.
        ValueError: the folder may not be replaced: it is a source, the working directory, the home folder, or around
            one of them; or it is a mount point, or has the name of a safetensors file.
    """
    target = Path(path)
    if target.suffix == SUFFIX:
        raise ValueError(f"{target} is to be a folder, and has the name of a file; leave {SUFFIX} out")
    _refuse_to_replace(target, [source] if isinstance(source, (str, os.PathLike)) else source or ())
    refuse_existing(target, overwrite)
    _refuse_file(target)
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
        refuse_existing(target, overwrite)
        _refuse_file(target)
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


def refuse_existing(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Refuse to write where something is, and where there is no folder to write in.

    Args:
        path: the file or folder to be written.
        overwrite: whether it may be replaced.

    Raises:
        FileExistsError: it exists and may not be replaced.
        FileNotFoundError: the folder around it does not exist.
    """
    path = Path(path)
    if os.path.lexists(path) and not overwrite:
        raise FileExistsError(f"{path} exists; choose another place, or allow overwriting it (overwrite=True)")
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path} cannot be written: there is no folder {path.parent}; create it first")


def refuse_source(path: Place, source: Place) -> None:
    """Refuse to write a file in place of the one that is read.

    Args:
        path: the file to be written.
        source: the file that is read.

    Raises:
        ValueError: they are the same.
    """
    if os.path.realpath(path) == os.path.realpath(source):
        raise ValueError(f"{path} is what is read; write to another file")


def copy_files(files: Iterable[Path], source: Path, target: Path) -> None:
    """Copy files with the folders that they are in.

    Args:
        files: paths relative to ``source``, such as :meth:`Checkpoint.others` returns.
        source: the folder that has them; links are followed.
        target: the folder that gets them.
    """
    for file in files:
        (target / file).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source / file, target / file)


def _refuse_file(target: Path) -> None:
    if os.path.lexists(target) and (target.is_symlink() or not target.is_dir()):
        raise NotADirectoryError(f"{target} is no folder (a file or a link); name another one")


def _refuse_to_replace(target: Path, sources: Iterable[Place]) -> None:
    place = Path(os.path.realpath(target))
    for source in sources:
        origin = Path(os.path.realpath(source))
        if not origin.exists():
            continue
        if place == origin or place in origin.parents:
            raise ValueError(f"{target} holds what is read ({source}); write to another folder")
        if origin in place.parents:
            raise ValueError(f"{target} lies inside what is read ({source}); write to a folder beside it")
    for name, kept in (("the working directory", Path.cwd()), ("the home folder", _home())):
        kept = Path(os.path.realpath(kept))
        if place == kept or place in kept.parents:
            raise ValueError(f"{target} is {name} or around it, and is not replaced; write to a folder of its own")
    if os.path.ismount(target):
        raise ValueError(f"{target} is a mount point, which no folder can replace; write to a folder inside it")


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # none is known
        return Path.cwd()


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
