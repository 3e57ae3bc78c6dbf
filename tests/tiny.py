"""A tiny BERT and a tiny Llama with tokenizers of 17 words, and texts that a single word tells apart."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import torch

WORDS = {"fruit": ["apple", "pear", "plum", "fig"], "metal": ["iron", "zinc", "gold", "tin"]}
FILLER = ["the", "of", "in", "some", "more"]


def tiny_bert(folder: Path, **changes: int) -> Path:
    """Save the model and its tokenizer; 12 weights in two blocks can be pruned."""
    import tokenizers
    import transformers

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *FILLER, *WORDS["fruit"], *WORDS["metal"]]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordPiece(vocab, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[("[CLS]", vocab["[CLS]"]), ("[SEP]", vocab["[SEP]"])],
    )
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = {
        "vocab_size": len(words),
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": 64,
    }
    transformers.BertModel(transformers.BertConfig(**{**config, **changes})).save_pretrained(folder)
    return folder


def tiny_llama(folder: Path) -> Path:
    """Save a Llama with a tokenizer of words; 14 weights in two blocks can be pruned."""
    import tokenizers
    import transformers

    words = ["<pad>", "<unk>", "<s>", "</s>", *FILLER, *WORDS["fruit"], *WORDS["metal"]]
    vocab = {word: i for i, word in enumerate(words)}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    special = {"pad_token": "<pad>", "unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        pad_token_id=0,
        bos_token_id=2,
        eos_token_id=3,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def rows_of(count: int) -> list[tuple[str, str]]:
    """Return texts with their labels, fruit and metal in turn."""
    source = random.Random(0)
    rows = []
    for i in range(count):
        label = ("fruit", "metal")[i % 2]
        words = source.choices(FILLER, k=source.randint(2, 7)) + source.choices(WORDS[label], k=3)
        source.shuffle(words)
        rows.append((" ".join(words), label))
    return rows


def write(path: Path, rows: list[tuple[str, ...]], columns: tuple[str, ...] = ("text", "label")) -> Path:
    """Write rows as the file's ending says: .csv, .tsv or .jsonl."""
    with path.open("w", encoding="utf-8", newline="") as file:
        if path.suffix in (".csv", ".tsv"):
            csv.writer(file, delimiter="," if path.suffix == ".csv" else "\t").writerows([columns, *rows])
        else:
            file.writelines(json.dumps(dict(zip(columns, row, strict=True)), ensure_ascii=False) + "\n" for row in rows)
    return path
