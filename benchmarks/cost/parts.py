"""What a method adds to the device's part of a step and to the host's, which whole steps cannot tell apart.

Where the host is the slower of the two and its speed wanders, ratios of whole steps say little. Two numbers do. The
device's: how long it works on a step, the sum over the kernels and copies that torch.profiler saw, as a ratio to the plain
steps before and after. The host's: how long it takes to queue perturb and restore, as a share of the rest of the very same
step. A whole step costs what the slower part costs.
"""

import time
from itertools import pairwise

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from .methods import METHODS, made
from .models import Case
from .summary import over_plain, summary

HOST_TURNS, HOST_SECONDS = 15, 10  # steps at most; no more of them after so long


def device_ms(name: str, case: Case, accumulation: int) -> float:
    """Milliseconds the device works on one step, however long it waits for the host in between."""
    with made(METHODS[name], case) as method:
        method.step(1)
        torch.cuda.synchronize()
        with profile(activities=[ProfilerActivity.CUDA]) as trace:
            method.step(accumulation)
            torch.cuda.synchronize()
    work = (e for e in trace.events() if e.device_type == DeviceType.CUDA and not e.is_user_annotation)
    return sum(event.device_time for event in work) / 1e3


def on_device(name: str, case: Case, accumulation: int, turns: int) -> dict:
    plain, own = [device_ms("plain LoRA", case, accumulation)], []
    for _ in range(turns):  # in turns, as the clock of a busy GPU drifts
        own.append(device_ms(name, case, accumulation))
        plain.append(device_ms("plain LoRA", case, accumulation))
    ratio = over_plain([[turn] for turn in own], [[turn] for turn in plain])
    return {"device_ms": summary(own), "device_plain_ms": summary(plain), "device_ratio": ratio}


def on_host(name: str, case: Case, accumulation: int) -> dict:
    added, shares, began = [], [], time.perf_counter()
    with made(METHODS[name], case) as method:
        if not hasattr(method, "perturb"):
            return {}
        method.step(1)
        while len(added) < HOST_TURNS and time.perf_counter() - began < HOST_SECONDS:
            torch.cuda.synchronize()
            points = [time.perf_counter()]
            for part in (method.perturb, lambda: method.gradients(accumulation), method.restore, method.optimizer.step):
                part()
                points.append(time.perf_counter())
            method.optimizer.zero_grad()
            perturb, gradients, restore, update = (1e3 * (b - a) for a, b in pairwise(points))
            added.append(perturb + restore)
            shares.append((perturb + restore) / (gradients + update))
    return {"host_ms": summary(added), "host_share": summary(shares)}
