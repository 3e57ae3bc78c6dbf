"""Settings of the whole suite."""

from __future__ import annotations

import signal
import sys

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


@pytest.fixture(autouse=True)
def _no_accelerator_of_an_earlier_test() -> None:
    """Forget what Accelerate holds once for the whole Python process: device, processes, gradient accumulation."""
    if (state := sys.modules.get("accelerate.state")) is not None:
        state.AcceleratorState._reset_state(True)
        state.GradientState._reset_state()
