"""What each rank of a process group measures of plain and flat steps, and the processes."""

import argparse
import gc
import hashlib
import json
import os
import re
import statistics
import tempfile
import time
from collections import Counter
from datetime import timedelta
from itertools import chain
from pathlib import Path

import torch
from torch import distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from flatopt.core.sharding import fsdp_modules, local

from ..cost.methods import METHODS, Plain, made
from ..cost.models import Case, adapted, llama
from ..cost.steps import Clock, take_turn
from ..cost.summary import over_plain, summary

PLAIN, FLAT = "plain LoRA", "ours, reversible"
SMALL = {"hidden_size": 128, "intermediate_size": 352, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512}
AHEAD = 500_000_000  # cycles, some .25 s: the host queues all of perturb meanwhile
COLLECTIVE = re.compile("gather|reduce|scatter|broadcast|to_?all|send|recv")


class Collectives(TorchDispatchMode):
    """Collectives called while it is open: ``calls`` by name, ``received`` bytes of a rank."""

    def __init__(self):
        super().__init__()
        self.calls, self.received = Counter(), 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor first: it calls the collectives
        result = function(*args, **(kwargs or {}))
        space, name = function._schema.name.split("::")
        if "c10d" in space and COLLECTIVE.search(name):
            whole = max(sum(t.nbytes for t in tree_leaves(x) if isinstance(t, torch.Tensor)) for x in (*args, result))
            world = dist.get_world_size()
            self.calls[name.strip("_")] += 1
            self.received += whole * (world - 1) // world * (2 if "reduce" in name and "all" in name else 1)
        return result

    def told(self) -> dict:
        return {"calls": dict(self.calls), "received_bytes": self.received}


def build(sharding: str, rank: int, args: argparse.Namespace) -> "tuple[Case, nn.Module]":
    """The case, its model shared out among the ranks, and the model inside."""
    from torch.distributed.fsdp import fully_shard

    torch.manual_seed(args.seed)  # the same model on all ranks
    base = llama(args.device, torch.bfloat16, **(SMALL if args.quick else {}))
    model = inner = adapted(base, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(args.seed + 1 + rank)
    tokens = torch.randint(base.config.vocab_size, (2, 32 if args.quick else 1024), device=args.device)
    if sharding == "ddp":
        model = nn.parallel.DistributedDataParallel(model, device_ids=[rank] if args.device == "cuda" else None)
    else:
        mesh = dist.device_mesh.init_device_mesh(args.device, (dist.get_world_size(),))
        for block in (*base.model.layers, model):
            fully_shard(block, mesh=mesh)
    what = f"Llama of {base.config.num_hidden_layers} layers, {base.config.hidden_size} wide, bf16, adapter fp32"
    what += f", {tokens.shape[0]} x {tokens.shape[1]} tokens a rank"
    return Case(model, lambda: model(input_ids=tokens, labels=tokens).loss, what), inner


def checksums(model: nn.Module) -> "dict[str, tuple[int, int]]":
    """Of this rank's part of each frozen parameter: its bits summed by row and by column, each with a factor of its own."""
    for module in fsdp_modules([model]):
        module.reshard()
    found = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            part = local(parameter.detach())
            bits = part.reshape(len(part), -1).view(torch.int16 if part.element_size() == 2 else torch.int32)
            sums = [bits.sum(dim, dtype=torch.int64) for dim in (0, 1)]
            found[name] = tuple((s * torch.arange(1, len(s) + 1, device=s.device)).sum().item() for s in sums)
    return found


def time_toggles(method: Plain, device: str, repeats: int) -> dict:
    """Milliseconds of the device and of the host to perturb and to restore, in steps."""
    found = {what: {"device_ms": [], "host_ms": []} for what in ("perturb", "restore")}
    for turn in range(2 * repeats):
        for what in found:
            dist.barrier()
            if device == "cuda":
                torch.cuda.synchronize()
                if turn % 2:
                    torch.cuda._sleep(AHEAD)
                    dist.all_reduce(torch.zeros(1, device=device))  # on the device: cycles do not take all GPUs equally long
            clock = Clock(device)
            clock.mark()
            began = time.perf_counter()
            getattr(method, what)()
            host = 1e3 * (time.perf_counter() - began)
            clock.mark()
            found[what]["device_ms" if turn % 2 else "host_ms"].append(clock.intervals()[0] if turn % 2 else host)
            if what == "perturb":
                method.gradients(1)
        method.optimizer.step()
        method.optimizer.zero_grad()
    return {what: {part: summary(times) for part, times in parts.items()} for what, parts in found.items()}


def measure(rank: int, sharding: str, args: argparse.Namespace) -> dict:
    """All that one rank finds."""
    began = time.perf_counter()
    case, inner = build(sharding, rank, args)

    def tell(what: str) -> None:
        if rank == 0:
            seconds = time.perf_counter() - began
            print(f"{sharding}, {dist.get_world_size()} rank(s), {seconds:.0f} s: {what}", flush=True)

    clean = checksums(inner)
    turns: dict[str, list] = {PLAIN: [], FLAT: []}
    for turn in range(2 * args.turns + 1):
        name = FLAT if turn % 2 else PLAIN
        turns[name].append(take_turn(METHODS[name], case, 1, args.device, args.steps))
        tell(f"{name}, {statistics.median(turns[name][-1][0]):.1f} ms a step")
    plain, flat = ([times for times, _ in each] for each in turns.values())
    peaks = [[peak for _, peak in each] for each in turns.values()]
    collectives = {what: Collectives() for what in ("perturb", "restore", "flat step", "plain step")}
    with made(METHODS[FLAT], case) as method:
        method.step(1)
        toggles = time_toggles(method, args.device, args.toggles)
        with collectives["perturb"]:
            method.perturb()
        amid = checksums(inner)
        method.gradients(1)
        with collectives["restore"]:
            method.restore()
        method.optimizer.step()
        method.optimizer.zero_grad()
        with collectives["flat step"]:
            method.step(1)
    with made(METHODS[PLAIN], case) as method:
        method.step(1)
        with collectives["plain step"]:
            method.step(1)
    after = checksums(inner)
    adapted = [name for name in clean if name.endswith("base_layer.weight")]
    tell("done")
    return {
        "what": case.what,
        "layers": len(adapted),
        "plain_ms": summary([*chain(*plain)]),
        "flat_ms": summary([*chain(*flat)]),
        "ratio": over_plain(flat, plain),
        **{f"{kind}_peak_gb": None if None in peak else max(peak) for kind, peak in zip(("plain", "flat"), peaks)},
        "toggles": toggles,
        "collectives": {what: found.told() for what, found in collectives.items()},
        "a_bytes": sum(p.numel() * p.element_size() for name, p in inner.named_parameters() if "lora_A" in name),
        "checksum": {when: digest(sums) for when, sums in (("before", clean), ("perturbed", amid), ("after", after))},
        "perturbed": sum(amid[name] != clean[name] for name in adapted),
        "back": after == clean,
        "seconds": time.perf_counter() - began,
    }


def digest(sums: dict) -> str:
    return hashlib.sha256(json.dumps(sums).encode()).hexdigest()[:16]


def work(rank: int, world: int, sharding: str, folder: str, args: argparse.Namespace) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    options = {}
    if args.device == "cuda":
        torch.cuda.set_device(rank)
        options = {"device_id": torch.device("cuda", rank)}
    else:
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        torch.set_num_threads(1)
    options.update(rank=rank, world_size=world, timeout=timedelta(seconds=args.limit))
    backend = "nccl" if args.device == "cuda" else "gloo"
    dist.init_process_group(backend, init_method=f"file://{folder}/store", **options)
    found = measure(rank, sharding, args)
    Path(folder, f"{rank}.json").write_text(json.dumps(found), encoding="utf-8")
    gc.collect()
    dist.destroy_process_group()


def on_ranks(world: int, sharding: str, args: argparse.Namespace) -> "list[dict]":
    """What each rank found; an error in one, or ``args.limit`` seconds, ends all."""
    end = time.monotonic() + args.limit
    with tempfile.TemporaryDirectory() as folder:
        context = torch.multiprocessing.spawn(work, (world, sharding, folder, args), nprocs=world, join=False, daemon=True)
        try:
            while not context.join(timeout=1) and time.monotonic() < end:
                pass
        finally:
            for process in context.processes:
                process.kill()
                process.join()
        files = [Path(folder, f"{rank}.json") for rank in range(world)]
        if not all(file.exists() for file in files):
            raise TimeoutError(f"{sharding} on {world} ranks still ran after {args.limit} s")
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]
