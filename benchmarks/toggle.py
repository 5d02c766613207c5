"""Perturb and restore by themselves, on the shapes of three models: time of GPU and host, memory.

``python -m benchmarks.toggle [label] [model ...]`` prints a JSON line a model. To compare two states of the code in one run,
call it in turns with PYTHONPATH on each.
"""

import json
import statistics
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile

from flatopt import FlatPerturbOptimizer

SHAPES = {  # (rows, columns) of a block's adapted weights, blocks, dtype
    "llama-7b": ([(4096, 4096)] * 4 + [(11008, 4096)] * 2 + [(4096, 11008)], 32, torch.bfloat16),
    "t5-base": ([(768, 768)] * 8, 24, torch.float32),
    "vit-b32": ([(2304, 768), (768, 768), (3072, 768), (768, 3072)], 12, torch.float32),
}
WARM, STEPS = 4, 12


def measure(label: str, name: str) -> dict:
    block, blocks, dtype = SHAPES[name]
    with torch.device("cuda"):
        layers = {f"l{i}": nn.Linear(n, m, bias=False, dtype=dtype) for i, (m, n) in enumerate(block * blocks)}
    model = get_peft_model(nn.ModuleDict(layers), LoraConfig(r=8, target_modules=r".*l\d+", init_lora_weights=False))
    sums = [p.detach().double().sum().item() for p in model.parameters() if not p.requires_grad]
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(adapters, lr=0.0), model, sigma=0.05, schedule="constant")
    bare = torch.optim.SGD(adapters, lr=0.0)  # the part of "restore" that is its own step
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gpu: dict[str, list[float]] = {"perturb": [], "restore": [], "bare": []}
    host: dict[str, list[float]] = {"perturb": [], "restore": [], "bare": []}
    for step in range(WARM + STEPS):
        for what, call in (("perturb", optimizer.perturb), ("restore", optimizer.step), ("bare", bare.step)):
            [object() for _ in range(200_000)]  # what a training step does to the host's caches
            torch.cuda.synchronize()
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            now = time.perf_counter()
            call()
            spent = (time.perf_counter() - now) * 1e3
            end.record()
            torch.cuda.synchronize()
            if step >= WARM:
                gpu[what].append(start.elapsed_time(end))
                host[what].append(spent)
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        for _ in range(4):
            optimizer.perturb()
            optimizer.restore()
        torch.cuda.synchronize()
    kernels = sum(event.self_device_time_total for event in profiled.key_averages()) / 4e3
    return {
        "code": label,
        "model": name,
        "kernels_ms": round(kernels, 3),
        "gpu_ms": {what: round(statistics.median(times), 3) for what, times in gpu.items()},
        "host_ms": {what: round(statistics.median(times), 3) for what, times in host.items()},
        "host_min": {what: round(min(times), 3) for what, times in host.items()},
        "memory_mb": round((torch.cuda.max_memory_allocated() - before) / 1e6, 2),
        "back": sums == [p.detach().double().sum().item() for p in model.parameters() if not p.requires_grad],
    }


if __name__ == "__main__":
    label, *names = sys.argv[1:] or ["now"]
    for name in names or SHAPES:
        print(json.dumps(measure(label, name)), flush=True)
