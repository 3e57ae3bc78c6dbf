"""A training step of a BERT while A and G are gathered, against the same step without.

    python examples/benchmarks/speed/calibration.py > calibration.json

One model with random weights takes ordinary steps and calibration steps (forward, backward, AdamW, ``zero_grad``) in
random order, so that whatever else the machine does meets both alike. Printed as JSON: the ratio of the two times, by
round; the bytes of A and G; and the bytes that autograd keeps from forward to backward in a step of each kind.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from admm_nxm.statistics import MAX_TOKENS, Statistics, bytes_needed, can_be_observed
from common import Spread, Variant, commit, count, describe, device_of, interleave, threads_of, versions
from train import MODELS


def measure(options: argparse.Namespace, device: torch.device) -> dict[str, Any]:
    """Time both kinds of step, and count what they need."""
    from transformers import BertConfig, BertForSequenceClassification

    torch.manual_seed(options.seed)
    build: Any = BertConfig  # its arguments are a dataclass's, of which type checkers know one half
    config = build(**MODELS[options.model], vocab_size=1000 if options.tiny else 30522, num_labels=2)
    model: nn.Module = BertForSequenceClassification(config)
    model = model.to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-5, fused=True)
    ids = torch.randint(config.vocab_size, (options.batch, options.length), device=device)
    labels = torch.randint(2, (options.batch,), device=device)
    layers = {
        name: module
        for name, module in model.named_modules()
        if name.startswith("bert.encoder") and can_be_observed(module)
    }
    statistics = Statistics(layers, max_tokens=options.max_tokens)

    def forward() -> Tensor:
        with torch.autocast(device.type, torch.bfloat16, enabled=options.autocast):
            loss: Tensor = model(input_ids=ids, labels=labels).loss
        return loss

    def ordinary() -> None:
        forward().backward()  # type: ignore[no-untyped-call,unused-ignore]
        optimizer.step()
        optimizer.zero_grad()

    def calibration() -> None:
        statistics.attach()
        ordinary()
        statistics.detach()

    kept = {"ordinary": kept_by(forward)}
    statistics.attach()
    kept["calibration"] = kept_by(forward)
    statistics.detach()
    variants = [Variant("ordinary", ordinary), Variant("calibration", calibration)]
    timings = interleave(variants, rounds=options.rounds, device=device, seed=options.seed, patience=60.0)
    return {
        "ratio": _spread(timings.ratio("calibration", "ordinary")),
        "seconds": {variant.name: _spread(timings.spread(variant.name)) for variant in variants},
        "layers": len(layers),
        "bytes": {
            "statistics": sum(sum(bytes_needed(module)) for module in layers.values()),
            "weights": sum(p.nbytes for p in model.parameters()),
            "kept for the backward pass": kept,
        },
        "device": describe(device),
        "versions": versions(),
        "commit": commit(),
        "options": vars(options),
    }


def _spread(found: Spread) -> dict[str, float]:
    return {"median": found.median, "lower quartile": found.low, "upper quartile": found.high}


def kept_by(forward: Callable[[], Tensor]) -> int:
    """Return the bytes of the storages that autograd keeps for the backward pass, weights included."""
    storages: dict[int, int] = {}

    def pack(t: Tensor) -> Tensor:
        storages[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        loss = forward()
    del loss  # until here, so that no storage has taken the place of another
    return sum(storages.values())


def run(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="calibration.py", description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("--device", help="cpu, cuda or cuda:N; by default cuda where there is one")
    parser.add_argument("--threads", type=count, help="torch's threads on a CPU; by default what torch chooses")
    parser.add_argument("--model", choices=list(MODELS), default="bert-base", help="its shape")
    parser.add_argument("--batch", type=count, default=8, help="sequences of a step")
    parser.add_argument("--length", type=count, default=128, help="tokens of a sequence")
    parser.add_argument("--autocast", action="store_true", help="to bfloat16")
    parser.add_argument("--max-tokens", type=count, default=MAX_TOKENS, help="of a pass that count")
    parser.add_argument("--rounds", type=count, default=9, help="how many steps of each kind are timed")
    parser.add_argument("--seed", type=int, default=0, help="of weights, data and order")
    parser.add_argument("--tiny", action="store_true", help="a tiny model and two rounds; its times mean nothing")
    options = parser.parse_args(arguments)
    if options.tiny:
        options.model, options.batch, options.length, options.rounds = "tiny", 2, 16, 2
    with threads_of(options.threads):
        print(json.dumps(measure(options, device_of(options.device)), indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(run())
