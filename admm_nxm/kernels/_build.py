"""Compiling a C source once, and finding it again."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["NO_COMPILER", "CompileError", "cache_folder", "compiler", "load"]

NO_COMPILER = "there is no C compiler (looked for $CC, cc, gcc, clang)"

_log = logging.getLogger("admm_nxm")

# Contraction to fused multiply-adds would give other bits than torch; errno and traps nobody looks at.
_FLAGS = ("-std=gnu11", "-O3", "-fPIC", "-shared", "-pthread", "-ffp-contract=off", "-fno-math-errno")


class CompileError(RuntimeError):
    """The compiler did not make a library of the source."""


@functools.cache
def compiler() -> tuple[str, ...] | None:
    """Return the command of the C compiler: ``CC`` if set, else the first of cc, gcc and clang; None without one."""
    chosen = os.environ.get("CC")
    for command in [shlex.split(chosen)] if chosen else [["cc"], ["gcc"], ["clang"]]:
        if command and shutil.which(command[0]):
            return tuple(command)
    return None


def cache_folder() -> Path:
    """Return where libraries are kept: ``ADMM_NXM_CACHE``, else admm_nxm in the user's cache folder."""
    if chosen := os.environ.get("ADMM_NXM_CACHE"):
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "admm_nxm"


@functools.cache
def _processor() -> str:
    """What ``-march=native`` depends on: homes are shared between machines, and a library for another one crashes."""
    facts = [platform.machine(), platform.system()]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        facts.append(platform.processor())
    else:
        facts += sorted({line for line in lines if line.startswith(("flags", "Features", "model name", "CPU part"))})
    return "\n".join(facts)


@functools.cache
def _version(command: tuple[str, ...]) -> str:
    done = subprocess.run([*command, "--version"], capture_output=True, text=True, timeout=60, check=False)
    return done.stdout


def load(source: Path, definitions: Sequence[str]) -> ctypes.CDLL:
    """Compile a C source, unless it has been compiled already, and load it.

    Args:
        source: the C file.
        definitions: macros, such as ``"GROUP=4"``.

    Returns:
        The library.

    Raises:
        CompileError: there is no compiler, or it failed; the message has its words.
    """
    command = compiler()
    if command is None:
        raise CompileError(NO_COMPILER)
    try:
        return _load(command, source, definitions)
    except (OSError, subprocess.SubprocessError) as error:
        raise CompileError(f"{shlex.join(command)} cannot be run ({error})") from error


def _load(command: tuple[str, ...], source: Path, definitions: Sequence[str]) -> ctypes.CDLL:
    text = source.read_bytes()
    facts = "\0".join([*_FLAGS, *definitions, *command, _version(command), _processor()])
    key = hashlib.sha256(text + facts.encode()).hexdigest()[:32]
    try:
        folder = cache_folder()
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        library = folder / f"{source.stem}-{key}.so"
        if not library.exists():
            _compile(command, source, definitions, library)
    except (OSError, RuntimeError) as error:  # no home, or one that cannot be written to
        if isinstance(error, CompileError):
            raise
        _log.info("the cache folder cannot be used (%s); compiling into a temporary one", error)
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as temporary:
            library = Path(temporary) / f"{source.stem}.so"
            _compile(command, source, definitions, library)
            return _open(library)
    return _open(library)


def _open(library: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(library))
    except OSError as error:
        raise CompileError(f"{library} cannot be loaded ({error}); delete it and try again") from error


def _compile(command: Sequence[str], source: Path, definitions: Sequence[str], library: Path) -> None:
    started = time.perf_counter()
    # Another process may be doing the same: each writes a file of its own, and the last one in place is as good.
    handle, temporary = tempfile.mkstemp(suffix=".so", dir=library.parent)
    os.close(handle)
    try:
        macros = [f"-D{definition}" for definition in definitions]
        for tuned in (["-march=native"], ["-mcpu=native"], []):
            line = [*command, *_FLAGS, *tuned, *macros, str(source), "-o", temporary]
            done = subprocess.run(line, capture_output=True, text=True, timeout=600, check=False)
            if done.returncode == 0:
                os.replace(temporary, library)
                _log.info("compiled %s in %.1f s", library.name, time.perf_counter() - started)
                return
        words = (done.stderr or done.stdout).strip().splitlines()
        raise CompileError(f"{shlex.join(line)} failed: {' '.join(words[:3]) or f'exit status {done.returncode}'}")
    except subprocess.TimeoutExpired as error:
        raise CompileError(f"{command[0]} took more than {error.timeout:.0f} s") from error
    finally:
        Path(temporary).unlink(missing_ok=True)
