r"""ADMM fine-tuning of pretrained Transformers into NxM semi-structured sparsity.

>>> import torch
>>> from admm_nxm import ADMMNxM
>>> linear, head = torch.nn.Linear(8, 8), torch.nn.Linear(8, 1)
>>> model = torch.nn.Sequential(linear, torch.nn.ReLU(), head)
>>> inner = torch.optim.AdamW(model.parameters(), lr=1e-2)
>>> rules = {r"0\.weight": "2:4"}
>>> optimizer = ADMMNxM(inner, model, total_steps=40, select=rules)
>>> for _ in range(40):
...     loss = model(torch.ones(2, 8)).square().mean()
...     loss.backward()
...     optimizer.step()
...     optimizer.zero_grad()
>>> optimizer.finalize().ok
True
"""

from ._version import __version__
from .io.verify import verify
from .oneshot import prune
from .optimizer import ADMMNxM, ConvergenceWarning
from .pattern import Pattern
from .progress import Figures
from .projection import keep_mask, project
from .report import ModelReport, model_report
from .residuals import Residuals, WeightResidual
from .schedules import Constant, Every, Penalty, Ramp, Update
from .selection import SelectedWeight, Selection, SkippedWeight
from .solver import Solved, factorise, model_error, solve
from .sparsity import SparsityReport, SparsityViolation, WeightReport

__all__ = [
    "ADMMNxM",
    "Constant",
    "ConvergenceWarning",
    "Every",
    "Figures",
    "ModelReport",
    "Pattern",
    "Penalty",
    "Ramp",
    "Residuals",
    "SelectedWeight",
    "Selection",
    "SkippedWeight",
    "Solved",
    "SparsityReport",
    "SparsityViolation",
    "Update",
    "WeightReport",
    "WeightResidual",
    "__version__",
    "factorise",
    "keep_mask",
    "model_error",
    "model_report",
    "project",
    "prune",
    "solve",
    "verify",
]
