"""What it costs to move W to where a format rounds it, and back, beside noise: time until the GPU is done, and memory.

``python -m benchmarks.format_cost [model ...]`` prints a JSON line a model and kind of noise; models as in ``toggle.py``.
"""

import json
import statistics
import sys
import time
import warnings

import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flatopt import FlatPerturbOptimizer

from .toggle import SHAPES

KINDS = [("filter", "reversible", 0.05), ("filter", "copy", 0.05), *((f, "copy", 1) for f in ("int4", "int4/32", "nf4/64"))]
WARM, STEPS = 3, 5


def measure(name: str) -> None:
    block, blocks, dtype = SHAPES[name]
    with torch.device("cuda"):
        layers = {f"l{i}": nn.Linear(n, m, bias=False, dtype=dtype) for i, (m, n) in enumerate(block * blocks)}
    model = get_peft_model(nn.ModuleDict(layers), LoraConfig(r=8, target_modules=r".*l\d+", init_lora_weights=False))
    adapters, size = [p for p in model.parameters() if p.requires_grad], sum(p.nbytes for p in model.parameters())
    for noise, restore, sigma in KINDS:
        options = {"sigma": sigma, "noise": noise, "restore": restore, "schedule": "constant"}
        optimizer = FlatPerturbOptimizer(torch.optim.SGD(adapters, lr=0.0), model, **options)
        torch.cuda.reset_peak_memory_stats()
        before, times = torch.cuda.memory_allocated(), {"perturb": [], "restore": []}
        for step in range(WARM + STEPS):
            for what, call in (("perturb", optimizer.perturb), ("restore", optimizer.restore)):
                torch.cuda.synchronize()
                now = time.perf_counter()
                call()
                torch.cuda.synchronize()
                if step >= WARM:
                    times[what].append((time.perf_counter() - now) * 1e3)
            optimizer.step()
        row = {"model": name, "noise": noise, "restore": restore}
        row |= {f"{what}_ms": round(statistics.median(some), 2) for what, some in times.items()}
        row |= {f"{what}_range_ms": round(max(some) - min(some), 2) for what, some in times.items()}
        row["peak_over_model"] = round((torch.cuda.max_memory_allocated() - before) / size, 3)
        print(json.dumps(row), flush=True)
        optimizer.detach()


if __name__ == "__main__":
    warnings.simplefilter("ignore")  # of rounding in every forward: here there is none
    print(json.dumps({"device": torch.cuda.get_device_name(), "torch": torch.__version__}))
    for name in sys.argv[1:] or SHAPES:
        measure(name)
