"""A pretrained model with a new classifier on top, its tokenizer and its device."""

from __future__ import annotations

import logging as python_logging
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from .errors import InputError, blaming

_logging: Any = logging  # not all of it has annotations

_NO_TOKENIZER = "has no tokenizer of its own; save one there: tokenizer.save_pretrained(...)"
_TOKENIZER_FILES = ("bpe", "merges", "sentencepiece", "spiece", "tokenizer", "vocab")


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from reporting what is meant here: a new classifier, and a run that is not kept."""
    ours = python_logging.getLogger("admm_nxm")
    verbosity, bars, level = _logging.get_verbosity(), _logging.is_progress_bar_enabled(), ours.level
    ours.setLevel(python_logging.ERROR)
    _logging.set_verbosity_error()
    _logging.disable_progress_bar()
    try:
        yield
    finally:
        ours.setLevel(level)
        _logging.set_verbosity(verbosity)
        if bars:
            _logging.enable_progress_bar()


def find_device(name: str) -> torch.device:
    """Return the device of that name (``auto``: a GPU if there is one), which works; a GPU with its index."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name
    # What a device raises that is not there differs from backend to backend.
    with blaming(f"--device {name}", RuntimeError, AssertionError, NotImplementedError, remedy="; try --device cpu"):
        device = torch.device(name)
        if device.type == "cuda" and device.index is None:
            device = torch.device("cuda", torch.cuda.current_device())
        torch.zeros(1, device=device).item()
    return device


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model folder or hub name."""
    needed = " (a folder or a hub name is needed)"
    if not Path(name).is_dir() and (name.startswith((".", "~", "/")) or name.count("/") > 1 or not name):
        raise InputError(f"--model {name}: no such folder{needed}")
    if Path(name).is_dir():
        _check_folder(Path(name), needed)
    # Without its files a tokenizer fails in ways of its own.
    nothing = blaming(f"--model {name} {_NO_TOKENIZER}", TypeError, AttributeError)
    with blaming(f"--model {name}", OSError, ValueError, remedy=needed), nothing, quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=Path(name).is_dir(), trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"--model {name} {_NO_TOKENIZER}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as is the custom with decoders, which have none
    if tokenizer.pad_token is None:
        raise InputError(f"--model {name}: its tokenizer can not pad; set tokenizer.pad_token and save it there")
    return tokenizer


def _check_folder(folder: Path, needed: str) -> None:
    """Refuse a folder without a model or a tokenizer: transformers may make one up, or say nothing helpful."""
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {folder}: it has no config.json, so there is no model{needed}")
    if not any(file.name.startswith(_TOKENIZER_FILES) or file.suffix == ".model" for file in folder.iterdir()):
        raise InputError(f"--model {folder} {_NO_TOKENIZER}")


def length_limit(model: Any, tokenizer: Any) -> float:
    """Return how many tokens a model takes; infinity if it does not say."""
    positions = getattr(model.config, "max_position_embeddings", None) or math.inf
    for name, module in model.named_modules():
        # RoBERTa and its kin begin to count behind the padding's position.
        if name.endswith("position_embeddings") and getattr(module, "padding_idx", None) is not None:
            positions = min(positions, module.num_embeddings - module.padding_idx - 1)
    return float(min(positions, tokenizer.model_max_length))


def load_classifier(
    name: str, labels: Sequence[str], tokenizer: Any, *, seed: int, max_length: int
) -> tuple[Any, list[str]]:
    """Load a model with a new classifier, in float32, and name what lies below it that the checkpoint lacks."""
    torch.manual_seed(seed)
    with blaming(f"--model {name}", OSError, ValueError, SafetensorError, remedy="; give another model"), quiet():
        model, info = AutoModelForSequenceClassification.from_pretrained(
            name,
            local_files_only=Path(name).is_dir(),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a classifier for other labels
            problem_type="single_label_classification",
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    limit = length_limit(model, tokenizer)
    if max_length > limit:
        raise InputError(f"--max-length {max_length} is more than {name} takes; give at most {limit:.0f}")
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    encoder = model.base_model.state_dict()  # older transformers leave the prefix out
    fresh = [key for key in new if key.removeprefix(f"{model.base_model_prefix}.") in encoder]
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.float(), fresh
