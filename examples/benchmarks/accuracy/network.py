"""The model of the accuracy study: the first layers of a pretrained encoder, mean pooling and a linear head."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn
from transformers import AutoModel

from batches import Batch


class Classifier(nn.Module):
    """An encoder with its embeddings frozen, so that a step's time goes to what is pruned.

    Args:
        folder: the pretrained model.
        layers: how many of its layers to keep, from the first.
        classes: number of labels.
        amp: whether the encoder runs in bfloat16 under autocast; the loss and the weights stay in float32.
    """

    def __init__(self, folder: Path, layers: int, classes: int, *, amp: bool = True) -> None:
        super().__init__()
        self.encoder = AutoModel.from_pretrained(
            folder, num_hidden_layers=layers, add_pooling_layer=False, attn_implementation="eager"
        )
        self.encoder.embeddings.requires_grad_(False)
        self.dropout = nn.Dropout(0.1)
        self.head = nn.Linear(self.encoder.config.hidden_size, classes)
        self.amp = amp

    def forward(self, batch: Batch) -> Tensor:
        """Return the logits, float32 of shape (rows, classes)."""
        with torch.autocast(batch.ids.device.type, torch.bfloat16, enabled=self.amp):
            states = self.encoder(
                input_ids=batch.ids, attention_mask=batch.attention, token_type_ids=batch.types
            ).last_hidden_state
        weight = batch.attention.unsqueeze(-1).float()
        pooled = (states.float() * weight).sum(1) / weight.sum(1)
        return cast("Tensor", self.head(self.dropout(pooled)))


@torch.no_grad()
def logits_of(model: Classifier, batches: list[Batch]) -> Tensor:
    """Return logits on the CPU, without dropout, each at the number of its row; NaN where no batch has the row."""
    training = model.training
    model.eval()
    logits = torch.cat([model(batch).float().cpu() for batch in batches])
    model.train(training)
    order = torch.cat([batch.rows for batch in batches])
    placed = torch.full((int(order.max()) + 1, logits.shape[1]), float("nan"))
    return placed.index_copy_(0, order, logits)


def accuracy(model: Classifier, batches: list[Batch]) -> float:
    """Return the share of rows whose largest logit is the label's, in percent."""
    predicted = logits_of(model, batches).argmax(1)
    order = torch.cat([batch.rows for batch in batches])
    labels = torch.empty_like(order).index_copy_(0, order, torch.cat([batch.labels.cpu() for batch in batches]))
    return 100.0 * (predicted == labels).float().mean().item()
