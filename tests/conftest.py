"""Settings of the whole suite."""

from __future__ import annotations

import signal

import pytest
import torch
from hypothesis import HealthCheck, settings

# The tensors are tiny: a second thread only waits for the first.
torch.set_num_threads(1)

# A shell starts what is to run in the background deaf to Ctrl-C, and tests send it to themselves.
signal.signal(signal.SIGINT, signal.default_int_handler)

# A busy machine fails no test.
settings.register_profile("untimed", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("untimed")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
