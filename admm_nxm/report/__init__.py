"""Reports on a model and a run: figures, tables and pictures, and the weights that sparse tensor cores can take."""

from .model import DenseWeight, ModelReport, ModelWeight, Share, model_report

__all__ = ["DenseWeight", "ModelReport", "ModelWeight", "Share", "model_report"]
