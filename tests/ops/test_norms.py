"""Eq. 7 from sums of squares: one function for every way to the noise, in as many operations for many weights as for few."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flatopt.ops.norms import stds_of

SIGMA = 0.3


class Operations(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.counted = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.counted[str(function)] += 1
        return function(*args, **(kwargs or {}))


def weights(count):
    torch.manual_seed(0)
    return [torch.randn(5 + number % 3, 8 << number % 2) for number in range(count)]


@pytest.mark.parametrize("noise", ["filter", "layer", "isotropic"])
def test_stds_are_sigma_times_the_root_mean_square(noise):
    some = weights(4)
    sums = [w.square().sum(1) if noise == "filter" else w.square().sum().view(1) for w in some]
    found = stds_of(sums, [w.shape[1] if noise == "filter" else w.numel() for w in some], noise, SIGMA)
    everything = torch.cat([w.flatten() for w in some])
    for weight, std in zip(some, found, strict=True):
        over = {"filter": weight, "layer": weight.view(1, -1), "isotropic": everything.view(1, -1)}[noise]
        torch.testing.assert_close(std, SIGMA * over.square().mean(1, keepdim=True).sqrt())


def test_as_many_operations_for_many_weights_as_for_few():
    counted = []
    for count in (2, 12):
        sums = [w.square().sum(1) for w in weights(count)]
        with Operations() as operations:
            stds_of(sums, [8 << number % 2 for number in range(count)], "filter", SIGMA)
        counted.append(operations.counted)
    assert counted[0] == counted[1]
