"""What a model and a run look like: figures, tables and pictures, and what sparse tensor cores can take."""

from .model import DenseWeight, ModelReport, ModelWeight, Share, model_report

__all__ = ["DenseWeight", "ModelReport", "ModelWeight", "Share", "model_report"]
