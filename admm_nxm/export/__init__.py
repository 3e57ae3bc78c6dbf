"""What leaves the training run: packed files, sparse tensor cores, ONNX, model cards, and the one-shot baseline."""

from .card import model_card, write_model_card
from .onnx import OnnxReport, export_onnx, verify_onnx
from .packed import PackedWeight, PackReport, load_packed, load_packed_model, pack, unpack
from .prune import prune
from .semi_structured import ConvertedWeight, SemiStructured, to_semi_structured

__all__ = [
    "ConvertedWeight",
    "OnnxReport",
    "PackReport",
    "PackedWeight",
    "SemiStructured",
    "export_onnx",
    "load_packed",
    "load_packed_model",
    "model_card",
    "pack",
    "prune",
    "to_semi_structured",
    "unpack",
    "verify_onnx",
    "write_model_card",
]
