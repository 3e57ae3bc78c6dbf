"""DTensor on one rank: the plain run, and what stands at the edge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

from admm_nxm import project, verify
from admm_nxm.sharding import check_sharding, local, part_of, reduce_sums, wrap_like
from tests.distributed.sharded import Stack, assert_equal, make, steps
from tests.helpers import FORMS, STEPS, every_form

# Older torch warns of random numbers on a CPU mesh, which nothing here draws.
pytestmark = pytest.mark.filterwarnings("ignore:DTensor random operators may not have complete support:UserWarning")


@pytest.fixture
def lone_mesh(tmp_path: Path) -> Any:
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield init_device_mesh("cpu", (1,))
    dist.destroy_process_group()


@pytest.mark.parametrize("placement", [Shard(0), Shard(1), Replicate()])
@every_form
def test_c11_one_rank_is_the_plain_run(build: Any, lone_mesh: Any, placement: Placement) -> None:
    form = next(name for name, function in FORMS.items() if function is build)
    plain, sharded = Stack(), Stack().shard(lambda weight: [placement], lone_mesh)
    one, two = make(plain, form), make(sharded, form)
    steps(plain, one, 0, STEPS)
    steps(sharded, two, 0, STEPS)
    assert_equal(plain, sharded)
    assert one.finalize() == two.finalize()


def test_c11_parts_are_wrapped_like_the_whole(lone_mesh: Any) -> None:
    whole = distribute_tensor(torch.randn(5, 8), lone_mesh, [Shard(0)])
    wrapped = wrap_like(local(whole).clone(), whole)
    assert isinstance(wrapped, DTensor)
    assert wrapped.shape == whole.shape
    assert torch.equal(part_of(torch.ones(5, 8), whole), torch.ones(5, 8))
    assert torch.equal(reduce_sums([torch.ones(2)], [whole]), torch.ones(1, 2))
    check_sharding("w", whole, 1, 3)
    with pytest.raises(ValueError, match="parts of 8"):
        check_sharding("w", distribute_tensor(torch.randn(5, 8), lone_mesh, [Shard(1)]), 1, 3)
    assert verify(
        {"layers.0.fc.weight": distribute_tensor(project(torch.randn(8, 8), "2:4"), lone_mesh, [Shard(0)])}
    ).ok
