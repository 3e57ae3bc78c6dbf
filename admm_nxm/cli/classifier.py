"""A pretrained model with a new classifier on top, its tokenizer and its device."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import HfApi, try_to_load_from_cache
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from safetensors import SafetensorError
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.utils import logging

from ..io.files import open_checkpoint
from ..io.packed import load_packed_model
from .console import note, silence
from .errors import InputError, blaming, reason_of

_logging: Any = logging  # not all of it has annotations

_NO_TOKENIZER = "has no tokenizer of its own; save one there: tokenizer.save_pretrained(...)"
_TOKENIZER_FILES = ("bpe", "merges", "sentencepiece", "spiece", "tokenizer", "vocab")
_NEEDED = " (a folder or a hub name is needed)"
_PATIENCE = 5.0  # seconds


@contextmanager
def quiet() -> Iterator[None]:
    """Keep libraries from reporting what is meant here: a new classifier, and a run that is not kept."""
    bars = _logging.is_progress_bar_enabled()
    _logging.disable_progress_bar()
    try:
        with silence():
            yield
    finally:
        if bars:
            _logging.enable_progress_bar()


@contextmanager
def of_an_argument() -> Iterator[None]:
    """Leave ``--model`` out of messages, for the commands that have no such option."""
    try:
        yield
    except InputError as error:
        raise InputError(str(error).removeprefix("--model ")) from None


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


def _is_here(name: str) -> bool:
    """Return whether a model's files are on this disk; False if the hub has them. Neither is an error, at once."""
    if Path(name).is_dir():
        return True
    of_a_path = name.startswith((".", "~", "/")) or name.endswith("/") or name.count("/") > 1 or "\\" in name
    if not name or of_a_path or ("/" in name and Path(name).parent.is_dir()):
        raise InputError(f"--model {name}: no such folder{_NEEDED}")
    return _is_cached(name)


@cache
def _is_cached(name: str) -> bool:
    # The loaders would ask again and again for a minute.
    try:
        HfApi().model_info(name, timeout=_PATIENCE)
        return False
    except (HfHubHTTPError, HFValidationError) as error:
        problem, remedy = f"the hub has no such model for you: {reason_of(error)}", _NEEDED
    except Exception as error:  # whatever the HTTP client makes of a missing network; it differs between versions
        problem, remedy = f"the hub cannot be reached: {reason_of(error)}", "; give a model folder"
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            note(f"note    {problem}; the model comes from the cache")
            return True
    raise InputError(f"--model {name}: no such folder, and {problem}{remedy}")


def load_tokenizer(name: str) -> Any:
    """Load the tokenizer of a model folder or hub name."""
    here = _is_here(name)
    if Path(name).is_dir():
        _check_folder(Path(name))
    # Without its files a tokenizer fails in ways of its own.
    nothing = blaming(f"--model {name} {_NO_TOKENIZER}", TypeError, AttributeError)
    with blaming(f"--model {name}", OSError, ValueError, remedy=_NEEDED), nothing, quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, local_files_only=here, trust_remote_code=False)
    if len(tokenizer) <= len(tokenizer.all_special_ids):
        raise InputError(f"--model {name} {_NO_TOKENIZER}")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as is the custom with decoders, which have none
    if tokenizer.pad_token is None:
        raise InputError(f"--model {name}: its tokenizer can not pad; set tokenizer.pad_token and save it there")
    return tokenizer


def _check_folder(folder: Path) -> None:
    """Refuse a folder without a model or a tokenizer: transformers may make one up, or say nothing helpful."""
    if not (folder / "config.json").is_file():
        raise InputError(f"--model {folder}: it has no config.json, so there is no model{_NEEDED}")
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
            local_files_only=_is_here(name),
            trust_remote_code=False,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # a classifier for other labels
            problem_type="single_label_classification",
            id2label=dict(enumerate(labels)),
            label2id={label: i for i, label in enumerate(labels)},
        )
    check_length(name, max_length, length_limit(model, tokenizer))
    new = [*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])]
    encoder = model.base_model.state_dict()  # older transformers leave the prefix out
    fresh = [key for key in new if key.removeprefix(f"{model.base_model_prefix}.") in encoder]
    model.config.pad_token_id = tokenizer.pad_token_id
    return model.float(), fresh


def class_numbers(names: Sequence[str], config: Any) -> list[int]:
    """Return the classes of labels, which are given by name or by number."""
    known = {str(number): number for number in range(config.num_labels)}
    known |= {name: int(number) for name, number in config.label2id.items()}
    if unknown := sorted(set(names) - known.keys()):
        has = ", ".join(sorted(config.label2id, key=config.label2id.get))
        raise InputError(f"--data has the label {unknown[0]!r}, which the model lacks (it has {has})")
    return [known[name] for name in names]


def check_length(name: str, max_length: int, limit: float) -> None:
    """Refuse texts of more tokens than a model takes."""
    if max_length > limit:
        raise InputError(f"--max-length {max_length} is more than {name} takes; give at most {limit:.0f}")


def load_trained(folder: Path) -> Any:
    """Load a saved classifier, packed or not, with the dtype that it was saved in."""
    name, kind = str(folder), AutoModelForSequenceClassification
    with blaming(name, OSError, ValueError, SafetensorError, remedy="; give another model"), quiet():
        with open_checkpoint(folder, purpose="test") as checkpoint:
            load = (
                partial(load_packed_model, folder, kind) if checkpoint.packed else partial(kind.from_pretrained, folder)
            )
        model, info = load(trust_remote_code=False, output_loading_info=True, dtype="auto")
    if info["missing_keys"]:
        raise InputError(
            f"{name} is no trained classifier: {len(info['missing_keys'])} weights would start at random "
            f"({min(info['missing_keys'])}, ...); make one of it with admm-nxm train"
        )
    return model
