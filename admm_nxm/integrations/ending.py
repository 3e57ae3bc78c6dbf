"""End a framework's run: sparse, or with a word on what is missing."""

from __future__ import annotations

import logging

from ..optimizer import ADMMNxM
from ..sparsity import SparsityReport

__all__ = ["finish", "what_to_do"]

logger = logging.getLogger(__name__)


def finish(admm: ADMMNxM) -> SparsityReport:
    """Finalize the weights that ship, and return the count."""
    # An inner optimizer that averages weights ships the averaged ones.
    getattr(admm, "eval", lambda: None)()
    report = admm.finalize()
    logger.info("%s", report)
    return report


def what_to_do(admm: ADMMNxM, resume: str, prune: str) -> str:
    """Say where a run stands that has not come to its solve, and by which calls to resume it or to prune."""
    now = admm.figures()
    return (
        f"the run stands at step {now.step}, and prunes after step {now.prune_at}. Train to the end (from a "
        f"checkpoint: {resume}), or prune with what there is: {prune}"
    )
