"""Write docs/oneshot.md and its plot from the raw files of the one-shot study.

    python examples/benchmarks/oneshot/oneshot_report.py

Every figure comes from docs/results/oneshot/*.jsonl and docs/results/recovery/*.jsonl. ``--check`` writes nothing and
says whether the page and the plots are what the raw files give. The exit status is 0, 1 if ``--check`` found a
difference, or 2 on bad input.
"""

from __future__ import annotations

import argparse
import math
import os
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

sys.path.append(str(Path(__file__).resolve().parents[1] / "accuracy"))
try:
    from layout import NOT_RUN, difference, plain, table
    from oneshot import KEY, PATTERNS, RESULTS, SEEDS, Line, key_of, plan
    from plots import Cloud, Curves, Picture, draw
    from pruners import METHODS
    from records import (
        AMOUNT,
        COUNT,
        OBJECT,
        SHARED,
        TEXT,
        Check,
        InputError,
        bad_line,
        checked,
        lines_of,
        or_null,
    )
    from report import differences
    from summary import Estimate, estimate
    from targets import Status, Verdict, judge
except ImportError as error:
    print(f'oneshot_report: error: cannot import {error.name}; run: pip install -e ".[study]"', file=sys.stderr)
    sys.exit(2)

DOCS = Path(__file__).resolve().parents[3] / "docs"
WRITTEN = "<!-- Written by examples/benchmarks/oneshot/oneshot_report.py; changes by hand would be lost. -->"
FIGURES = Check(
    lambda v: isinstance(v, dict) and bool(v) and all(AMOUNT.holds(x) for x in v.values()), "an object of numbers"
)
SOURCE = {"device": TEXT, "date": TEXT, "commit": TEXT, "versions": SHARED["versions"]}
RUN: dict[str, Check] = {
    "model": TEXT,
    "pattern": or_null(TEXT),
    "method": TEXT,
    "seed": or_null(COUNT),
    "scores": FIGURES,
    "seconds": Check(lambda v: v == {} or FIGURES.holds(v), "an object of numbers"),
    "wall": AMOUNT,
    "grown": or_null(AMOUNT),
    "sizes": OBJECT,
    **SOURCE,
}
RECOVERY: dict[str, Check] = {
    "start": TEXT,
    "seed": COUNT,
    "steps": COUNT,
    "perplexity": FIGURES,
    "setting": OBJECT,
    "seconds": AMOUNT,
    **SOURCE,
}
THEIRS = {f"{name}{passes}": f"llmcompressor-{name}" for name in ("sparsegpt", "wanda") for passes in ("-float32", "")}
"""Ours, with passes in float32 as theirs or in bfloat16 as in the study -> llm-compressor's, on the same texts."""
DOMAIN = "articles"
"""Whose perplexity is judged."""
RIVAL = "sparsegpt"
SHOWN = ("magnitude", "wanda", "sparsegpt", "admm-a", "admm-ag")
DENSE_INPUTS = tuple(name for name in METHODS if name.endswith("-dense"))
NAMES = {"smollm2": "SmolLM2-135M", "minilm": "MiniLM-L6"}


def read(folder: Path, checks: Mapping[str, Check], key: Iterable[str]) -> list[Line]:
    """Read and check every line of a folder; one that is not there has none.

    Raises:
        InputError: a line is malformed, or two lines are the same run.
    """
    lines: list[Line] = []
    seen: dict[tuple[Any, ...], str] = {}
    for where, value in lines_of(sorted(folder.glob("*.jsonl"))):
        line = checked(value, where, checks)
        run = tuple(line[name] for name in key)
        if run in seen:
            raise bad_line(where, f"the same run as {seen[run]}")
        seen[run] = where
        lines.append(line)
    return lines


class Study:
    """The runs as figures.

    Args:
        lines: the raw lines.
    """

    def __init__(self, lines: Sequence[Line]) -> None:
        self.lines = lines
        self._runs: dict[tuple[str, str | None, str], dict[int | None, Line]] = defaultdict(dict)
        for line in lines:
            self._runs[line["model"], line["pattern"], line["method"]][line["seed"]] = line

    def runs(self, model: str, pattern: str | None, method: str) -> dict[int | None, Line]:
        """Return seed -> line; ``dense`` stands beside every pattern."""
        return self._runs.get((model, None if method == "dense" else pattern, method), {})

    def scores(self, model: str, pattern: str, method: str, of: str, *, log: bool = False) -> dict[int | None, float]:
        """Return seed -> score, or its logarithm."""
        found = {seed: line["scores"][of] for seed, line in self.runs(model, pattern, method).items()}
        return {seed: math.log(score) for seed, score in found.items()} if log else found

    def dense(self, model: str, of: str) -> float | None:
        """Return the dense model's score."""
        return next(iter(self.scores(model, "", "dense", of).values()), None)

    def lost(self, pattern: str, method: str, of: str = DOMAIN) -> dict[int, float]:
        """Return seed -> log perplexity of SmolLM2 over that of the dense model."""
        dense = self.dense("smollm2", of)
        logs = self.scores("smollm2", pattern, method, of, log=True)
        return {} if dense is None else {seed: x - math.log(dense) for seed, x in logs.items() if seed is not None}

    def seconds(self, pattern: str, method: str, part: str | None = None) -> dict[int, float]:
        """Return seed -> processor seconds of SmolLM2, of one part or in all."""
        runs = self.runs("smollm2", pattern, method)
        return {
            seed: sum(line["seconds"].values()) if part is None else line["seconds"].get(part, 0.0)
            for seed, line in runs.items()
            if seed is not None
        }


def minus(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """Subtract by seed."""
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def over(first: Mapping[int, float], second: Mapping[int, float]) -> dict[int, float]:
    """Divide by seed."""
    return {seed: first[seed] / second[seed] for seed in sorted(first.keys() & second.keys())}


def ratio(found: Estimate | None) -> str:
    """Write a ratio with its interval."""
    if found is None:
        return NOT_RUN
    if found.interval is None:
        return f"{plain(found.mean, 2)} (one seed)" if found.n < 2 else plain(found.mean, 2)
    low, high = found.interval
    return f"{plain(found.mean, 2)} [{plain(low, 2)}, {plain(high, 2)}]"


def _mean(values: Mapping[Any, float], digits: int = 1, *, geometric: bool = False) -> str:
    """Write the mean over seeds, the spread if there is one, and the number of seeds."""
    listed = list(values.values())
    if not listed:
        return NOT_RUN
    mean = statistics.geometric_mean(listed) if geometric else statistics.fmean(listed)
    if None in values:  # no seed: the method looks at no text
        return plain(mean, digits)
    spread = f" ± {plain(statistics.stdev(listed), digits)}" if len(listed) > 1 else ""
    return f"{plain(mean, digits)}{spread} ({len(listed)})"


# Targets -------------------------------------------------------------------------------------------------------------


def verdicts(study: Study) -> list[Verdict]:
    """Judge the targets, as the protocol declares."""
    lost = {method: study.lost("2:4", method) for method in SHOWN}
    found = [_below(lost["admm-ag"], lost[other], other) for other in (RIVAL, "admm-a")]
    share = estimate(over(lost["admm-ag"], lost[RIVAL]).values())
    time = estimate(over(study.seconds("2:4", "admm-ag"), study.seconds("2:4", RIVAL)).values())
    found.append(_at_most("the loss over dense at most 0.7 of that of `sparsegpt`", share, 0.7))
    found.append(_at_most("at most 6 times the processor time of `sparsegpt`", time, 6.0))
    return found


def _below(ours: Mapping[int, float], theirs: Mapping[int, float], other: str) -> Verdict:
    gains = minus(ours, theirs)
    won = sum(gain < 0 for gain in gains.values())
    status: Status = "not measured" if len(gains) < len(SEEDS) else "passed" if won == len(gains) else "failed"
    return Verdict(f"`admm-ag` below `{other}` in every seed", status, f"in {won} of {len(gains)} seeds")


def _at_most(target: str, found: Estimate | None, limit: float) -> Verdict:
    if found is None or found.n < len(SEEDS) or found.interval is None:
        return Verdict(target, "not measured", ratio(found))
    low, high = found.interval
    return Verdict(target, judge(Estimate(-found.mean, found.sd, found.n, (-high, -low), None), -limit), ratio(found))


# The page ------------------------------------------------------------------------------------------------------------


def lead(study: Study) -> str:
    """Say in some ten lines what a practitioner wants to know."""
    dense = study.dense("smollm2", DOMAIN)
    if dense is None:
        return "No run was made yet."
    lines = [f"SmolLM2-135M, dense: perplexity {plain(dense)} on held-out news articles, 256 tokens each."]
    for pattern in PATTERNS:
        means = {m: study.scores("smollm2", pattern, m, DOMAIN) for m in SHOWN}
        parts = [f"`{m}` {_mean(found, geometric=True)}" for m, found in means.items() if found]
        if parts:
            lines.append(f"{pattern}, from 32 articles and without training: {', '.join(parts)}. In brackets: seeds.")
    share = estimate(over(study.lost("2:4", "admm-ag"), study.lost("2:4", RIVAL)).values())
    if share is not None:
        gain = estimate(minus(study.lost("2:4", "admm-ag"), study.lost("2:4", "admm-a")).values())
        time = ratio(estimate(over(study.seconds("2:4", "admm-ag"), study.seconds("2:4", RIVAL)).values()))
        lines += [
            f"2:4: of what SparseGPT loses over dense, in log perplexity, `admm-ag` loses {ratio(share)}.",
            *([f"2:4: G changes the log perplexity by {difference(gain, 3)} against A alone."] if gain else []),
            f"2:4: `admm-ag` takes {time} times the processor time of `sparsegpt`.",
        ]
    for pattern in PATTERNS:
        scores = {m: study.scores("minilm", pattern, m, "accuracy") for m in SHOWN}
        parts = [f"`{m}` {_mean(found)}" for m, found in scores.items() if found]
        base = study.dense("minilm", "accuracy")
        if parts and base is not None:
            lines.append(f"MiniLM-L6, accuracy of a linear probe, {pattern}: dense {plain(base)}, {', '.join(parts)}.")
    if share is not None and share.n < len(SEEDS):
        lines.append(f"**Only {share.n} of {len(SEEDS)} seeds have been run: these are leads, and not results.**")
    found = verdicts(study)
    lines.append("Targets: " + "; ".join(f"{v.target}: {v.status}" for v in found) + ".")
    return "\n".join(f"- {line}" for line in lines)


def perplexities(study: Study, of: str) -> str:
    """Write the perplexities of all patterns."""
    rows = [["`dense`", *[plain(study.dense("smollm2", of) or math.nan)] * len(PATTERNS)]]
    for method in _run(study, "smollm2", PATTERNS):
        found = [study.scores("smollm2", pattern, method, of) for pattern in PATTERNS]
        rows.append([f"`{method}`", *(_mean(scores, geometric=True) for scores in found)])
    return table(["method", *PATTERNS], rows)


def _run(study: Study, model: str, patterns: Sequence[str]) -> list[str]:
    return [m for m in (*SHOWN, *DENSE_INPUTS) if any(study.runs(model, pattern, m) for pattern in patterns)]


def by_seed(study: Study, pattern: str) -> str:
    """Write the perplexity on articles of every seed, and the difference to SparseGPT."""
    rows = []
    for method in _run(study, "smollm2", [pattern]):
        scores = study.scores("smollm2", pattern, method, DOMAIN)
        cells = [
            plain(scores[seed]) if seed in scores else plain(scores[None]) if None in scores else NOT_RUN
            for seed in SEEDS
        ]
        against = estimate(minus(study.lost(pattern, method), study.lost(pattern, RIVAL)).values())
        rows.append([f"`{method}`", *cells, "" if method == RIVAL or None in scores else difference(against, 3)])
    header = ["method", *(f"seed {seed}" for seed in SEEDS), "log perplexity minus that of `sparsegpt`"]
    return table(header, rows)


def sequential(study: Study) -> str:
    """Write what A from pruned blocks gains over A from the dense model."""
    rows = []
    for other in DENSE_INPUTS:
        if study.lost("2:4", other):
            method = other.removesuffix("-dense")
            gain = minus(study.lost("2:4", method), study.lost("2:4", other))
            cells = [f"seed {seed}: {value:+.3f}" for seed, value in gain.items()]
            rows.append([f"`{method}` minus `{other}`", "; ".join(cells) or NOT_RUN])
    return table(["", "log perplexity on articles"], rows) if rows else f"{NOT_RUN.capitalize()}."


def costs(study: Study) -> str:
    """Write time and memory at 2:4."""
    rows = []
    for method in _run(study, "smollm2", ["2:4"]):
        runs = study.runs("smollm2", "2:4", method)
        parts = [{s: line["seconds"].get(part, 0.0) for s, line in runs.items()} for part in ("passes", "solves")]
        grown = [line["grown"] / 1e6 for line in runs.values() if line["grown"] is not None]
        times = estimate(over(study.seconds("2:4", method), study.seconds("2:4", RIVAL)).values())
        memory = plain(max(grown), 0) if grown else "unknown"
        rows.append([f"`{method}`", *(_mean(p, 0) for p in parts), ratio(times) if times else "", memory])
    header = ["method", "passes, s", "solves, s", "of `sparsegpt`'s time", "memory beside the model, MB, at most"]
    return table(header, rows)


def accuracies(study: Study) -> str:
    """Write MiniLM's accuracies."""
    base = study.dense("minilm", "accuracy")
    if base is None:
        return f"{NOT_RUN.capitalize()}."
    rows = [["`dense`", *[plain(base)] * len(PATTERNS)]]
    for method in _run(study, "minilm", PATTERNS):
        found = [study.scores("minilm", pattern, method, "accuracy") for pattern in PATTERNS]
        rows.append([f"`{method}`", *map(_mean, found)])
    return table(["method", *PATTERNS], rows)


def checked_against(study: Study) -> str:
    """Write our rivals beside llm-compressor's."""
    rows = []
    for ours, theirs in THEIRS.items():
        mine, other = (study.scores("smollm2", "2:4", m, DOMAIN) for m in (ours, theirs))
        for seed in sorted(seed for seed in mine.keys() & other.keys() if seed is not None):
            apart = 100 * (mine[seed] / other[seed] - 1)
            rows.append([f"`{ours}`, seed {seed}", plain(mine[seed]), plain(other[seed]), f"{apart:+.1f} %"])
    if not rows:
        return "Not run: our SparseGPT and Wanda were not compared with llm-compressor's own."
    told = "llm-compressor passes the texts in float32; `-float32` does so too, and the study in bfloat16."
    return f"{told}\n\n{table(['perplexity on articles, 2:4', 'ours', 'llm-compressor', 'ours over theirs'], rows)}"


def recovery(lines: Sequence[Line]) -> str:
    """Write perplexity against steps of fine-tuning."""
    if not lines:
        return "Not run."
    told = "`admm` is `ADMMNxM`'s own run from the dense model; the other starts are pruned, and keep their mask."
    found = by_start(lines)
    steps = sorted({step for measured in found.values() for step in measured})
    rows = [
        [f"`{start}`", *(_mean(measured.get(step, {}), geometric=True) for step in steps)]
        for start, measured in found.items()
    ]
    return f"{told}\n\n{table(['start', *(f'step {step}' for step in steps)], rows)}"


def by_start(lines: Sequence[Line]) -> dict[str, dict[int, dict[Any, float]]]:
    """Return start -> step -> run -> perplexity."""
    found: dict[str, dict[int, dict[Any, float]]] = defaultdict(lambda: defaultdict(dict))
    for line in lines:
        for step, value in line["perplexity"].items():
            found[line["start"]][int(step)][line["seed"], line["steps"]] = value
    return found


def recovery_picture(lines: Sequence[Line]) -> list[Picture]:
    """Return the plot of perplexity against steps, the geometric mean over seeds."""
    if not lines:
        return []
    series = [
        (start, tuple((step, statistics.geometric_mean(measured[step].values())) for step in sorted(measured)))
        for start, measured in by_start(lines).items()
    ]
    title = "SmolLM2-135M, 2:4, held-out articles"
    panel = Curves(title, "optimizer steps", "perplexity", tuple(series))
    return [Picture("recovery.svg", "Fine-tuning afterwards", (panel,))]


def missing(study: Study) -> str:
    """Say what of the plan was not run."""
    done = {key_of(line) for line in study.lines}
    left: dict[tuple[str, str | None, str], list[str]] = defaultdict(list)
    for spec in plan():
        if tuple(getattr(spec, name) for name in KEY) not in done:
            left[spec.model, spec.pattern, spec.method].append("" if spec.seed is None else str(spec.seed))
    rows = [
        [f"{NAMES[model]}, {pattern or 'dense'}, `{method}`", ", ".join(seeds) or "the one run"]
        for (model, pattern, method), seeds in left.items()
    ]
    return table(["run", "seeds that are missing"], rows) if rows else "Everything of the plan was run."


def provenance(lines: Sequence[Line]) -> str:
    """Say where the lines come from."""
    said = {key: ", ".join(sorted({line[key] for line in lines})) for key in ("device", "date", "commit")}
    versions = sorted({f"{name} {number}" for line in lines for name, number in line["versions"].items()})
    where = f"{len(lines)} runs on {said['device']}, one thread, other work beside; {said['date']}"
    return f"{where}; commits {said['commit']}; {', '.join(versions)}."


def pictures(study: Study) -> list[Picture]:
    """Return the plot: what is lost against what it costs, one point a seed."""
    series = []
    for method in SHOWN:
        lost, seconds = study.lost("2:4", method), study.seconds("2:4", method)
        points = tuple((seconds[seed], lost[seed]) for seed in sorted(lost))
        if points:
            series.append((method, points))
    if not series:
        return []
    panel = Cloud(
        "SmolLM2-135M, 2:4, one point a seed", "processor seconds", "log perplexity over dense", tuple(series)
    )
    return [Picture("oneshot.svg", "What one-shot pruning loses and costs", (panel,))]


def build(results: Path, output: Path) -> tuple[dict[Path, str], dict[Picture, Path]]:
    """Compute the page.

    Args:
        results: the folder of the raw files of the study; those of the fine-tuning lie in ``recovery`` beside it.
        output: where the page will lie.

    Returns:
        The page's text, and each picture's file.

    Raises:
        InputError: a raw file is malformed.
    """
    study = Study(read(results, RUN, KEY))
    tuned = read(results.parent / "recovery", RECOVERY, ("start", "seed", "steps"))
    drawn, curves = pictures(study), recovery_picture(tuned)
    judged = [[v.target, v.status, v.detail] for v in verdicts(study)]
    folder = Path(os.path.relpath(results.resolve(), output.resolve().parent)).as_posix()
    how = (
        "How the runs were made is in `examples/benchmarks/oneshot/README.md`. Everything is "
        "computed from the raw files by `python examples/benchmarks/oneshot/oneshot_report.py`. Perplexities are "
        "geometric means over seeds ± the standard deviation, with the number of seeds in brackets; lower is better."
    )
    parts = [
        "# One-shot pruning: results",
        WRITTEN,
        lead(study),
        *(f"![{picture.title}]({folder}/{picture.name})" for picture in drawn),
        how,
        "## Targets",
        "SmolLM2-135M, 2:4, held-out articles; a mean has its 95 % interval in brackets.",
        table(["target", "", "figures"], judged),
        "## SmolLM2-135M: perplexity on held-out articles",
        perplexities(study, DOMAIN),
        "Every seed at 2:4:",
        by_seed(study, "2:4"),
        "## SmolLM2-135M: perplexity on glosses, which no method has seen",
        perplexities(study, "glosses"),
        "## Inputs from the pruned blocks, or from the dense model",
        "Below zero: it pays to take A block by block from the model whose earlier blocks are pruned.",
        sequential(study),
        "## Time and memory",
        "SmolLM2-135M, 2:4; processor seconds of one thread, mean over seeds.",
        costs(study),
        "## MiniLM-L6: accuracy of a linear probe",
        accuracies(study),
        "## Against llm-compressor",
        checked_against(study),
        "## Fine-tuning afterwards",
        recovery(tuned),
        *(f"![{picture.title}]({folder}/{picture.name})" for picture in curves),
        "## What was not run",
        missing(study),
        "## Where the figures come from",
        provenance([*study.lines, *tuned]) if study.lines else "No run was made yet.",
    ]
    return {output: "\n\n".join(parts) + "\n"}, {picture: results / picture.name for picture in [*drawn, *curves]}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command.

    Args:
        arguments: the command line, by default that of the process.

    Returns:
        The exit status.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the raw files and the plot")
    parser.add_argument("--output", type=Path, default=DOCS / "oneshot.md", help="the page")
    parser.add_argument("--check", action="store_true", help="write nothing; show what would change")
    options = parser.parse_args(arguments)
    try:
        pages, drawn = build(options.results, options.output)
        if options.check:
            found = differences(pages, drawn)
            print("\n".join(found) or f"{options.output.name} is what the raw files give")
            return 1 if found else 0
        for picture, path in drawn.items():
            path.write_bytes(draw(picture))
        for path, text in pages.items():
            path.write_text(text, encoding="utf-8", newline="\n")
    except (InputError, OSError) as error:
        print(f"oneshot_report: error: {error}", file=sys.stderr)
        return 2
    print(f"wrote {options.output.name} and {len(drawn)} plots")
    return 0


if __name__ == "__main__":
    sys.exit(main())
