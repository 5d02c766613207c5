"""Ways of sharding that are refused, each by its own name."""

import pytest
import torch
from torch import nn

from flatopt import FlatPerturbOptimizer
from flatopt.core.flat_shards import sharding_reason


@pytest.fixture
def one_rank(tmp_path):
    distributed = pytest.importorskip("torch.distributed")
    if not distributed.is_available() or not distributed.is_gloo_available():
        pytest.skip("no gloo")
    distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield
    distributed.destroy_process_group()


@pytest.mark.parametrize("keeps_parameters", [True, False])
def test_fsdp1_is_named(one_rank, keeps_parameters):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = nn.Sequential(nn.Linear(8, 8)).requires_grad_(False)
    linear = net[0]
    FullyShardedDataParallel(net, use_orig_params=keeps_parameters, device_id=torch.device("cpu"))
    reason = sharding_reason(linear.weight, linear)
    assert "FSDP1" in reason
    assert "FSDP2" in reason


def test_what_fsdp1_ignores_is_left_alone(one_rank):
    from torch.distributed.fsdp import FullyShardedDataParallel

    net = nn.Sequential(nn.Linear(8, 8).requires_grad_(False), nn.Linear(8, 8))
    FullyShardedDataParallel(net, use_orig_params=True, ignored_states=[net[0].weight], device_id=torch.device("cpu"))
    assert sharding_reason(net[0].weight, net[0]) is None


def test_fsdp2_is_no_reason(one_rank):
    from torch.distributed import fsdp
    from torch.distributed.device_mesh import init_device_mesh

    if not hasattr(fsdp, "fully_shard"):
        pytest.skip("FSDP2's fully_shard is public from torch 2.6 on")
    linear = nn.Linear(8, 8)
    fsdp.fully_shard(linear, mesh=init_device_mesh("cpu", (1,)))
    assert sharding_reason(linear.weight, linear) is None


def test_zero_3_is_named():
    linear = nn.Linear(8, 8)
    linear.weight.ds_id, linear.weight.ds_tensor = 0, torch.empty(4)  # what deepspeed.zero.Init puts there
    reason = sharding_reason(linear.weight, linear)
    assert "ZeRO-3" in reason
    assert "ZeRO-2" in reason


def test_a_whole_weight_is_no_reason():
    linear = nn.Linear(8, 8)
    assert sharding_reason(linear.weight, linear) is None


@pytest.mark.parametrize(("dim", "named"), [(0, "in strides"), (1, "along its inputs")])
def test_dtensors_are_refused_by_how_they_are_placed(one_rank, dim, named):
    from torch.distributed.device_mesh import init_device_mesh

    tensor = pytest.importorskip("torch.distributed.tensor.placement_types", reason="public from torch 2.5 on")
    from torch.distributed.tensor import Shard, distribute_tensor

    placement = Shard(1)
    if dim == 0:
        placement = tensor._StridedShard(0, split_factor=2)
    weight = distribute_tensor(torch.randn(8, 4), init_device_mesh("cpu", (1,)), [placement])
    weight = nn.Parameter(weight, requires_grad=False)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
    with pytest.raises(ValueError, match=f"is sharded {named}"):
        FlatPerturbOptimizer(optimizer, [{"params": [weight]}], schedule="constant")
