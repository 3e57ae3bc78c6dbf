"""The two models of the one-shot study: what they are calibrated with, and how they are judged."""

from __future__ import annotations

import functools
import random
import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from corpus import GGUF, Corpus, assets, load_corpus
from pruners import Batch, Task

sys.path.append(str(Path(__file__).resolve().parents[1] / "accuracy"))
from tasks import Split, load_task, model_folder

BATCH = 4


def autocast(device: str, *, enabled: bool = True) -> AbstractContextManager[Any]:
    """Return the context that passes run in."""
    return torch.autocast(device, torch.bfloat16, enabled=enabled)


class Subject(ABC):
    """A model of the study.

    Args:
        model: the dense model, on the device.
        device: cpu or cuda.
    """

    sizes: ClassVar[dict[str, int]]
    """How much of what is calibrated on."""

    def __init__(self, model: nn.Module, device: str) -> None:
        self.model, self.device = model.eval().requires_grad_(False).to(device), device
        self.dense = {name: weight.detach().clone() for name, weight in model.named_parameters()}

    def restore(self) -> None:
        """Make the model dense again."""
        with torch.no_grad():
            for name, weight in self.model.named_parameters():
                weight.copy_(self.dense[name])

    @abstractmethod
    def task(self, seed: int) -> Task:
        """Return what the methods get."""

    @abstractmethod
    def score(self) -> dict[str, float]:
        """Return the figures of the model as it is now."""

    def tensor(self, rows: Any) -> Tensor:
        """Put numbers on the device."""
        return torch.as_tensor(rows, device=self.device)


class LanguageModel(Subject):
    """A causal language model; the score is its perplexity by domain.

    Args:
        model: the model.
        corpus: the sequences.
        device: cpu or cuda.
        amp: whether passes run in bfloat16.
    """

    sizes: ClassVar = {"sequences": 32, "tokens": 256}

    def __init__(self, model: Any, corpus: Corpus, device: str, *, amp: bool = True) -> None:
        super().__init__(model, device)
        model.config.use_cache = False
        self.corpus, self.amp = corpus, amp
        self.blocks: Sequence[nn.Module] = list(model.model.layers)

    def task(self, seed: int) -> Task:
        batches = list(self._batches(self.corpus.calibration(seed, self.sizes["sequences"])))
        return Task(self.model, self.blocks, batches, self.loss, self.autocast)

    @torch.no_grad()
    def score(self) -> dict[str, float]:
        scores = {}
        for domain, sequences in self.corpus.measured.items():
            losses = []
            for batch in self._batches(sequences):
                with self.autocast():
                    losses.append(self.loss(batch).double() * len(batch["input_ids"]))
            scores[domain] = float((torch.stack(losses).sum() / len(sequences)).exp())
        return scores

    def _batches(self, sequences: list[list[int]]) -> Iterator[Batch]:
        for start in range(0, len(sequences), BATCH):
            yield {"input_ids": self.tensor(sequences[start : start + BATCH])}

    def loss(self, batch: Batch) -> Tensor:
        """Return the mean loss of the next token."""
        loss: Tensor = self.model(**batch, labels=batch["input_ids"]).loss
        return loss

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that passes run in."""
        return autocast(self.device, enabled=self.amp)


def smollm2(cache: Path, device: str, *, amp: bool = True) -> LanguageModel:
    """Return SmolLM2-135M-Instruct with its corpus."""
    return LanguageModel(load_smollm2(), load_corpus(cache), device, amp=amp)


def load_smollm2() -> Any:
    """Load the model out of its package, in float32, as a model without quantization."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(assets(), gguf_file=GGUF, dtype=torch.float32)
    del model.config.quantization_config  # the weights are plain float32 by now
    model.hf_quantizer = None
    return model


class Encoder(Subject):
    """An encoder with mean pooling; the score is the accuracy of a linear probe, in percent.

    Args:
        model: the encoder.
        rows: split -> the tokens of each text and its label.
        classes: how many labels there are.
        device: cpu or cuda.
    """

    sizes: ClassVar = {"texts": 128, "tokens": 48}
    fitted = 4000
    """Training texts that the probe is fitted to."""

    def __init__(self, model: Any, rows: dict[str, list[tuple[list[int], int]]], classes: int, device: str) -> None:
        super().__init__(model, device)
        self.rows, self.classes, self.width = rows, classes, model.config.hidden_size
        self.blocks: Sequence[nn.Module] = list(model.encoder.layer)

    @functools.cached_property
    def head(self) -> nn.Linear:
        """The probe of the dense model."""
        self.restore()
        return self._probe()

    def task(self, seed: int) -> Task:
        head = self.head
        chosen = random.Random(seed).sample(self.rows["train"], self.sizes["texts"])
        batches = [{"input_ids": self.tensor([ids])} for ids, _ in chosen]
        labels = {id(batch): self.tensor([label]) for batch, (_, label) in zip(batches, chosen, strict=True)}

        def loss(batch: Batch) -> Tensor:
            states = self.model(**batch).last_hidden_state
            return cross_entropy(head(states.float().mean(1)), labels[id(batch)])

        return Task(self.model, self.blocks, batches, loss, lambda: autocast(self.device))

    def score(self) -> dict[str, float]:
        head = self._probe()
        features, labels = self._features(self.rows["test"])
        return {"accuracy": 100.0 * (head(features).argmax(1) == labels).double().mean().item()}

    @torch.no_grad()
    def _features(self, rows: list[tuple[list[int], int]]) -> tuple[Tensor, Tensor]:
        """Return the mean state of each text, (texts, width), and the labels."""
        features = torch.empty(len(rows), self.width, device=self.device)
        order = sorted(range(len(rows)), key=lambda row: len(rows[row][0]))
        start = 0
        while start < len(order):  # texts of one length, so that there is no padding
            length = len(rows[order[start]][0])
            some = [row for row in order[start : start + 64] if len(rows[row][0]) == length]
            with autocast(self.device):
                states = self.model(input_ids=self.tensor([rows[row][0] for row in some])).last_hidden_state
            features[some] = states.float().mean(1)
            start += len(some)
        return features, self.tensor([label for _, label in rows])

    def _probe(self) -> nn.Linear:
        """Fit multinomial logistic regression with a little weight decay to its end."""
        features, labels = self._features(self.rows["train"][: self.fitted])
        mean, scale = features.mean(0), features.std(0) + 1e-6
        head = nn.Linear(features.shape[1], self.classes, device=self.device)
        nn.init.zeros_(head.weight)
        nn.init.zeros_(head.bias)
        optimizer = torch.optim.LBFGS(head.parameters(), max_iter=200, line_search_fn="strong_wolfe")

        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = cross_entropy(head((features - mean) / scale), labels) + 1e-3 * head.weight.square().sum()
            loss.backward()  # type: ignore[no-untyped-call]
            return loss

        optimizer.step(closure)  # type: ignore[no-untyped-call,arg-type,unused-ignore]
        with torch.no_grad():
            head.weight.div_(scale)
            head.bias.sub_(head.weight @ mean)
        return head.requires_grad_(False)


def minilm(cache: Path, device: str) -> Encoder:
    """Return MiniLM-L6 with WordNet's supersenses."""
    from transformers import AutoModel, AutoTokenizer

    folder, task = model_folder(cache), load_task("supersense", cache)
    tokenizer = AutoTokenizer.from_pretrained(folder)  # type: ignore[no-untyped-call,unused-ignore]

    def encoded(split: Split) -> list[tuple[list[int], int]]:
        ids = tokenizer(split.text, truncation=True, max_length=Encoder.sizes["tokens"])["input_ids"]
        return list(zip(ids, split.label, strict=True))

    model = AutoModel.from_pretrained(folder, add_pooling_layer=False)
    return Encoder(model, {"train": encoded(task.train), "test": encoded(task.test)}, len(task.labels), device)


SUBJECTS: dict[str, Callable[[Path, str], Subject]] = {"smollm2": smollm2, "minilm": minilm}
