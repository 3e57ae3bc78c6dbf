"""Export of a finished model: ONNX files, sparse tensor cores, and model cards."""

from .card import model_card, write_model_card
from .onnx import OnnxReport, export_onnx, verify_onnx
from .semi_structured import ConvertedWeight, SemiStructured, to_semi_structured

__all__ = [
    "ConvertedWeight",
    "OnnxReport",
    "SemiStructured",
    "export_onnx",
    "model_card",
    "to_semi_structured",
    "verify_onnx",
    "write_model_card",
]
