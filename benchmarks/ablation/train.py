"""One run of the ablation benchmark: an adapter, an objective, a task and a seed, to a dict of metrics."""

import copy
import time

import torch
from torch import nn
from torch.nn import functional as F

import flatopt
from flatopt import flatness

DEFAULTS = {
    "adapter": "lora",
    "rank": 4,  # alpha is twice the rank, so that the scaling is the same at every rank
    "lr": 1e-3,
    "steps": 300,
    "batch": 32,
    "labels": 100,
    "dtype": "float32",  # of the frozen base; the adapter is float32
    "objective": "plain",
    "landscape": False,  # also measure the loss around the merged weights
}
OBJECTIVES = {
    "plain": {},
    "flat": {"sigma": 0.05, "schedule": "cosine", "noise": "filter", "fan_in": True, "restore": "reversible"},
    "sam": {"rho": 0.05, "space": "full"},
}
ADAPTERS = ("lora", "dora", "rslora", "pissa", "adalora", "loraplus", "custom")
LORA_PLUS_RATIO = 16  # lr of B over lr of A (Hayou et al., ICML 2024)


def canonical(config: dict) -> dict:
    """``config`` with every default filled in and without what its objective does not read, so that equal runs are equal.

    Raises:
        ValueError: a key or an objective that does not exist.
    """
    objective = config.get("objective", "plain")
    if objective not in OBJECTIVES:
        raise ValueError(f"objective must be one of {', '.join(OBJECTIVES)}, got {objective!r}")
    unknown = set(config) - set(DEFAULTS) - {key for keys in OBJECTIVES.values() for key in keys}
    if unknown:
        raise ValueError(f"a run has no setting {', '.join(sorted(unknown))}")
    known = {**DEFAULTS, **OBJECTIVES[objective]}
    return {key: config.get(key, default) for key, default in known.items()}


class GatedLowRank(nn.Module):
    """A low-rank module of one's own, as a user would write it: y = W x + 2 B diag(g) A x, with a gate g per rank."""

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, device=linear.weight.device))
        self.gate = nn.Parameter(torch.ones(rank, 1, device=linear.weight.device))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, device=linear.weight.device))
        nn.init.kaiming_uniform_(self.A, a=5**0.5)

    def forward(self, x):
        return self.linear(x) + 2 * F.linear(F.linear(x, self.gate * self.A), self.B)


flatopt.register_low_rank(GatedLowRank, base=lambda m: m.linear.weight, delta=lambda m: (m.B, m.gate * m.A, 2.0))


def adapt(model: nn.Module, task, config: dict) -> nn.Module:
    """``model`` with the adapter of ``config`` on ``task.targets``, all else frozen but ``task.trained_head``."""
    rank = config["rank"]
    if config["adapter"] == "custom":
        model.requires_grad_(False)
        for name, linear in [(n, m) for n, m in model.named_modules() if n.endswith(task.targets)]:
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, GatedLowRank(linear, rank))
        if task.trained_head:
            model.get_submodule(task.trained_head).requires_grad_(True)
        return model
    from peft import AdaLoraConfig, LoraConfig, get_peft_model

    shared = {
        "lora_alpha": 2 * rank,
        "target_modules": list(task.targets),
        "modules_to_save": [task.trained_head] if task.trained_head else None,
    }
    if config["adapter"] == "adalora":  # starts at 1.5 times the rank and prunes to it (Zhang et al., ICLR 2023)
        steps = config["steps"]
        return get_peft_model(
            model,
            AdaLoraConfig(
                init_r=rank + (rank + 1) // 2,
                target_r=rank,
                tinit=steps // 10,
                tfinal=3 * steps // 10,
                deltaT=max(1, steps // 50),
                total_step=steps,
                **shared,
            ),
        )
    kind = {
        "lora": {},
        "loraplus": {},
        "dora": {"use_dora": True},
        "rslora": {"use_rslora": True},
        "pissa": {"init_lora_weights": "pissa_niter_4"},
    }[config["adapter"]]
    return get_peft_model(model, LoraConfig(r=rank, **shared, **kind))


def make_optimizer(model: nn.Module, config: dict, seed: int) -> torch.optim.Optimizer:
    lr, parameters = config["lr"], [p for p in model.parameters() if p.requires_grad]
    if config["adapter"] == "loraplus":
        from peft.optimizers import create_loraplus_optimizer

        # lr is the geometric mean of A's and B's
        ratio = {"lr": lr / LORA_PLUS_RATIO**0.5, "loraplus_lr_ratio": LORA_PLUS_RATIO}
        optimizer = create_loraplus_optimizer(model, torch.optim.AdamW, **ratio)
    else:
        optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.0)
    if config["objective"] == "flat":
        return flatopt.FlatPerturbOptimizer(
            optimizer,
            model if config["fan_in"] else without_fan_in(model, config["sigma"]),
            total_steps=config["steps"],
            seed=seed,
            **{key: config[key] for key in ("sigma", "schedule", "noise", "restore")},
        )
    if config["objective"] == "sam":
        space = config["space"]
        return flatopt.SAM(optimizer, rho=config["rho"], space=space, targets=model if space == "full" else None)
    return optimizer


def base_weights(model: nn.Module) -> "dict[nn.Module, torch.Tensor]":
    """Every adapted layer -> its frozen weight."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = {m: m.get_base_layer().weight for m in model.modules() if isinstance(m, BaseTunerLayer)}
    return layers | {m: m.linear.weight for m in model.modules() if isinstance(m, GatedLowRank)}


def without_fan_in(model: nn.Module, sigma: float) -> "list[dict]":
    """Groups whose noise is not scaled by 1/n of Eq. 7 but by the same 1/n̄ everywhere, n̄ the mean fan-in."""
    fan_in = {layer: weight[0].numel() for layer, weight in base_weights(model).items()}
    mean = sum(fan_in.values()) / len(fan_in)
    return [{"modules": layer, "sigma": sigma * (n / mean) ** 0.5} for layer, n in fan_in.items()]


def orthogonality(model: nn.Module) -> torch.Tensor:
    """AdaLoRA's regulariser; PEFT adds it only where the model returns the loss itself."""
    factors = [(n, p) for n, p in model.named_parameters() if "lora_A" in n or "lora_B" in n]
    grams = [p @ p.T if "lora_A" in n else p.T @ p for n, p in factors]
    gaps = [torch.linalg.norm(g - torch.eye(len(g), device=g.device)) for g in grams]
    return model.peft_config["default"].orth_reg_weight * torch.stack(gaps).mean()


def batches(x, y, steps: int, size: int, seed: int):
    """``steps`` batches, reshuffled each time round; short last ones are dropped."""
    generator, size = torch.Generator().manual_seed(seed), min(size, len(y))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(y), generator=generator)
        index, order = order[:size].to(y.device), order[size:]
        yield x[index], y[index]


def trained(task, config: dict, seed: int) -> nn.Module:
    """The adapted model after training."""
    source = task.model(seed).to(getattr(torch, config["dtype"]))
    torch.manual_seed(seed)
    model = adapt(source, task, config).train()
    optimizer = make_optimizer(model, config, seed)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["steps"])
    x, y = task.train(seed, config["labels"])
    x = x.to(getattr(torch, config["dtype"])) if x.is_floating_point() else x
    adalora = config["adapter"] == "adalora"
    for step, (inputs, labels) in enumerate(batches(x, y, config["steps"], config["batch"], seed)):

        def closure(inputs=inputs, labels=labels):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(inputs).float(), labels)
            if adalora:
                loss = loss + orthogonality(model)
            loss.backward()
            return loss

        optimizer.step(closure)
        scheduler.step()
        if adalora:
            model.base_model.update_and_allocate(step)
    return model.eval()


@torch.no_grad()
def evaluate(model: nn.Module, sets: "list[tuple[torch.Tensor, torch.Tensor]]") -> "tuple[list[float], list[float]]":
    """Accuracies in per cent and mean cross-entropies in nats, one a set."""
    dtype = next(p.dtype for p in model.parameters() if not p.requires_grad)
    sizes = [len(y) for _, y in sets]
    x, y = torch.cat([x for x, _ in sets]), torch.cat([y for _, y in sets])
    logits = torch.cat([model(c.to(dtype) if c.is_floating_point() else c).float() for c in x.split(1024)])
    right, loss = (logits.argmax(1) == y).float(), F.cross_entropy(logits, y, reduction="none")
    return [100 * v.mean().item() for v in right.split(sizes)], [v.mean().item() for v in loss.split(sizes)]


def measure(model: nn.Module, task, config: dict, seed: int) -> dict:
    """Accuracies (per cent) and losses (nats) of a model in eval mode; ``corrupted`` by severity."""
    metrics = {}
    for name, sets in task.evaluation(seed, config["labels"]).items():
        accuracy, loss = evaluate(model, sets)
        per_level = max(1, len(sets) // 5)
        levels = [sum(accuracy[i : i + per_level]) / per_level for i in range(0, len(sets), per_level)]
        metrics[f"{name}_accuracy"] = [round(a, 3) for a in levels] if name == "corrupted" else round(accuracy[0], 3)
        if name != "corrupted":
            metrics[f"{name}_loss"] = round(loss[0], 5)
    metrics["train_loss"] = round(evaluate(model, [task.train(seed, config["labels"])])[1][0], 5)
    return metrics


def deployed(model: nn.Module) -> nn.Module:
    """A copy with the adapter merged, as it would be served."""
    copied = copy.deepcopy(model)
    return copied.merge_and_unload() if hasattr(copied, "merge_and_unload") else copied


def run(task, config: dict, seed: int) -> dict:
    """Train and measure. For a flat run in a short float also what restoring has done to W, and to the adapter when it is
    served on the pristine W."""
    config = canonical(config)
    start = time.perf_counter()
    model = trained(task, config, seed)
    metrics = measure(deployed(model) if config["dtype"] == "float32" else model, task, config, seed)
    if config["landscape"]:
        metrics |= landscape(model, task, config, seed)
    if config["dtype"] != "float32":
        metrics |= served_on_pristine(model, task, config, seed)
    return metrics | {"seconds": round(time.perf_counter() - start, 2)}


def landscape(model: nn.Module, task, config: dict, seed: int) -> dict:
    """The training loss around the merged weights, in eval mode: its mean rise under the noise of Eq. 7 at σ = 0.3, along a
    filter-normalised random line of each seed, and, for seed 0, over a plane."""
    around = (model, lambda m, batch: F.cross_entropy(m(batch[0]), batch[1]), [task.train(seed, config["labels"])])
    line, plane = (5, 3) if task.quick else (21, 15)
    curve = flatness.loss_curve(*around, points=line, seed=seed)
    found = {
        "expected_sharpness": round(flatness.expected_sharpness(*around, sigma=0.3, draws=16, seed=seed).value, 5),
        "curve": {"position": curve.position.round(4).tolist(), "loss": curve.loss.round(5).tolist()},
    }
    if seed == 0:
        surface = flatness.loss_surface(*around, points=plane, seed=seed)
        found["surface"] = {"position": surface.position.round(4).tolist(), "loss": surface.loss.round(4).tolist()}
    return found


@torch.no_grad()
def served_on_pristine(model: nn.Module, task, config: dict, seed: int) -> dict:
    """Share of base weights changed by training, their relative drift, and the metrics once W is put back."""
    torch.manual_seed(seed)
    fresh = adapt(task.model(seed).to(getattr(torch, config["dtype"])), task, config)
    now, was = list(base_weights(model).values()), list(base_weights(fresh).values())
    changed = sum((a != b).sum().item() for a, b in zip(now, was)) / sum(w.numel() for w in was)
    gap = sum((a.double() - b.double()).square().sum().item() for a, b in zip(now, was)) ** 0.5
    size = sum(b.double().square().sum().item() for b in was) ** 0.5
    for a, b in zip(now, was):
        a.copy_(b)
    pristine = measure(model, task, config, seed)
    return {
        "weights_changed": round(100 * changed, 3),
        "drift": round(100 * gap / size, 4),
        "pristine_accuracy": pristine["test_accuracy"],
        "pristine_loss": pristine["test_loss"],
    }
