"""Settings of the whole suite."""

from __future__ import annotations

import pytest
import torch

# The tensors are tiny: a second thread only waits for the first.
torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
