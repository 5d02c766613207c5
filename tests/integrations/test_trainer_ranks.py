"""FlatPerturbCallback in transformers' Trainer on two ranks: DDP, FSDP2, DeepSpeed ZeRO; and what is refused there."""

import importlib.util
import os

import pytest
import torch
from helpers import bits
from ranks import USABLE, shared_by_all_tests

transformers = pytest.importorskip("transformers")
accelerate = pytest.importorskip("accelerate")
pytest.importorskip("peft")

from tiny import Watch, differing, llama, lora_config, lora_llama, rows  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from flatopt import FlatPerturbOptimizer  # noqa: E402
from flatopt.integrations.transformers import FlatPerturbCallback  # noqa: E402

pytestmark = [pytest.mark.skipif(not USABLE, reason="needs torch.distributed with gloo"), pytest.mark.timeout(600)]
DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
STEPS, ACCUMULATION, SIGMA = 4, 2, 0.1
KINDS = ["ddp", "fsdp2", "zero1", "zero2"]


def arguments(kind, folder, saves):
    options = {"use_cpu": True, "ddp_backend": "gloo", "ddp_find_unused_parameters": False, "max_steps": STEPS, "seed": 5}
    options |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": ACCUMULATION, "learning_rate": 1e-2}
    options |= {"eval_strategy": "steps", "eval_steps": 2, "save_strategy": "steps" if saves else "no", "save_steps": 2}
    options |= {"report_to": [], "disable_tqdm": True}
    if kind.startswith("fsdp"):
        config = {"version": int(kind[-1]), "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}
        options |= {"fsdp": True, "fsdp_config": {**config, "sync_module_states": False}}  # true asks for a GPU
    if kind.startswith("zero"):
        auto = dict.fromkeys(("train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"), "auto")
        options |= {"deepspeed": {**auto, "zero_optimization": {"stage": int(kind[-1])}}}
    return TrainingArguments(str(folder), **options)


def fresh_state():
    """Each run chooses its kind of sharding anew."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    for name in [name for name in os.environ if name.startswith(("ACCELERATE_", "FSDP_"))]:
        del os.environ[name]


def trainer(kind, model, callbacks, folder="out", saves=False):
    fresh_state()
    args = arguments(kind, folder, saves)
    if kind.startswith("fsdp"):
        # accelerate goes over to DDP on CPUs without a word; it only looks at this name of the kind of device
        state = accelerate.PartialState()
        state.distributed_type, state.device = accelerate.DistributedType.MULTI_XPU, torch.device("cpu")
    if kind.startswith("zero"):
        import deepspeed

        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # not compiled: gloo is fast enough here
    return Trainer(model, args, train_dataset=rows(), eval_dataset=rows(4, seed=2), callbacks=callbacks)


def whole(tensor):
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach().clone()


class Record(TrainerCallback):
    """W between backward and step, and the wrapper's count after each step. ``reads``: evaluates amid each step."""

    def __init__(self, flat, reads):
        self.flat, self.reads, self.perturbed, self.counts = flat, reads, [], []

    def on_substep_end(self, args, state, control, model, **kwargs):
        layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
        self.perturbed.append(whole(layer.base_layer.weight))
        if self.reads:
            with torch.no_grad():
                prompt = rows(1)[0]["input_ids"][None]
                model.eval()(input_ids=prompt)
                model.generate(input_ids=prompt, max_new_tokens=1, do_sample=False)
            model.train()

    def on_step_end(self, args, state, control, model, **kwargs):
        self.counts.append(self.flat.optimizer.step_count if self.flat else state.global_step)


def run(kind, sigma, reads=False):
    """``sigma`` None: without the callback."""
    model = lora_llama(lora_dropout=0.0)
    watch = Watch(model)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    flat = None if sigma is None else FlatPerturbCallback(sigma, schedule="constant")
    record = Record(flat, reads)
    made = trainer(kind, model, [flat, record] if flat else [record])
    made.train()
    after = {n: whole(p) for n, p in made.model.named_parameters()}
    trained = {n: after[n] for n, p in made.model.named_parameters() if p.requires_grad}
    return {
        "engine": type(made.model_wrapped).__name__,
        "changed": [n for n in before if n not in trained and not torch.equal(before[n], after[n])],
        "adapter": trained,
        "forwards": (watch.trained, watch.read),
        "perturbed": record.perturbed,
        "clean": before[f"{watch.name}.base_layer.weight"],
        "counts": record.counts,
    }


def resumed(kind):
    """The adapter after a run that saved at its middle, and after another that began there."""
    found = []
    for checkpoint in (None, f"{kind}/checkpoint-2"):
        made = trainer(kind, lora_llama(lora_dropout=0.0), [FlatPerturbCallback(SIGMA)], folder=kind, saves=True)
        made.train(resume_from_checkpoint=checkpoint)
        found.append({n: whole(p) for n, p in made.model.named_parameters() if p.requires_grad})
    return found


def prepared(wrapped):
    """accelerate's FSDP2 around a loop of one's own, the optimizer wrapped before ``prepare`` or after it."""
    fresh_state()
    state = accelerate.PartialState(cpu=True)
    state.distributed_type, state.device = accelerate.DistributedType.MULTI_XPU, torch.device("cpu")
    layers = {"auto_wrap_policy": "transformer_based_wrap", "transformer_cls_names_to_wrap": ["LlamaDecoderLayer"]}
    plugin = accelerate.FullyShardedDataParallelPlugin(fsdp_version=2, **layers)
    accelerator = accelerate.Accelerator(cpu=True, fsdp_plugin=plugin)
    model = lora_llama(lora_dropout=0.0)
    watch, options = Watch(model), {"sigma": SIGMA, "schedule": "constant"}
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    if wrapped == "before":
        optimizer = flat = FlatPerturbOptimizer(optimizer, model, **options)
    model, optimizer = accelerator.prepare(model, optimizer)
    if wrapped == "after":
        optimizer = flat = FlatPerturbOptimizer(optimizer, model, **options)
    for step in range(STEPS):
        ids = torch.stack([row["input_ids"] for row in rows(2, seed=step)])
        accelerator.backward(model.train()(input_ids=ids, labels=ids).loss)
        optimizer.step()
        optimizer.zero_grad()
    after = {n: whole(p) for n, p in model.named_parameters()}
    trained = {n: after[n] for n, p in model.named_parameters() if p.requires_grad}
    left = [n for n, w in watch.frozen.items() if not torch.equal(bits(after[n]), w)]
    return {"adapter": trained, "changed": left, "trained": watch.trained, "count": flat.step_count}


def refused(kind):
    try:
        trainer(kind, lora_llama(), [FlatPerturbCallback(SIGMA)]).train()
    except ValueError as error:
        return str(error)


def tensor_parallel(rank):
    """``tp_plan="auto"``: q, k, v, gate and up are split along their outputs, o and down along their inputs."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    if rank == 0:
        llama().save_pretrained("llama")
    torch.distributed.barrier()
    told = {}
    for targets in (["q_proj", "down_proj"], ["q_proj", "v_proj"]):
        fresh_state()
        config = DistributedConfig(tp_plan="auto", tp_size=2)
        model = AutoModelForCausalLM.from_pretrained("llama", distributed_config=config)
        model = get_peft_model(model, lora_config(task_type="CAUSAL_LM", target_modules=targets))
        try:
            told[" ".join(targets)] = train_tensor_parallel(model)
        except ValueError as error:
            told[" ".join(targets)] = str(error)
    return told


def train_tensor_parallel(model):
    weights = {n: whole(p) for n, p in model.named_parameters() if not p.requires_grad}
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    flat = FlatPerturbOptimizer(optimizer, model, sigma=SIGMA, schedule="constant")

    def moved():
        return [n for n, p in model.named_parameters() if n in weights and not torch.equal(whole(p), weights[n])]

    ids = torch.stack([row["input_ids"] for row in rows(2)])
    loss = model.train()(input_ids=ids, labels=ids).loss
    noisy = moved()
    loss.backward()
    flat.step()
    return noisy, moved()


RUNS = {"flat": (SIGMA,), "read amid a step": (SIGMA, True), "sigma 0": (0.0,), "plain": (None,)}


def work(rank):
    kinds = [kind for kind in KINDS if DEEPSPEED or not kind.startswith("zero")]
    results = {f"{kind}, {name}": run(kind, *how) for kind in kinds for name, how in RUNS.items()}
    results |= {f"{kind}, resumed": resumed(kind) for kind in kinds}
    results |= {kind: refused(kind) for kind in ("fsdp1", "zero3") if DEEPSPEED or kind != "zero3"}
    results |= {f"accelerate, wrapped {when}": prepared(when) for when in ("before", "after")}
    return {**results, "tensor parallel": tensor_parallel(rank)}


on_two_ranks = shared_by_all_tests(work, "needs deepspeed")


@pytest.mark.parametrize("kind", KINDS)
class TestEachKind:
    def test_trains_at_noise_and_evaluates_clean(self, on_two_ranks, kind):
        engine = {"ddp": "DistributedDataParallel", "fsdp2": "FSDPPeftModelForCausalLM"}.get(kind, "DeepSpeedEngine")
        first, second = on_two_ranks(f"{kind}, flat")
        for each in (first, second):
            assert each["engine"] == engine
            trained, read = each["forwards"]
            assert trained == [False] * STEPS * ACCUMULATION
            assert read
            assert all(read)
            assert not any(torch.equal(w, each["clean"]) for w in each["perturbed"])
            assert each["changed"] == []
            assert each["counts"] == list(range(1, STEPS + 1))
        # each data-parallel rank draws its own noise; the ranks of FSDP2 hold parts of one weight
        same = [torch.equal(x, y) for x, y in zip(first["perturbed"], second["perturbed"])]
        assert same == [kind == "fsdp2"] * STEPS
        assert differing(first["adapter"], second["adapter"]) == []

    def test_sigma_0_is_plain_training(self, on_two_ranks, kind):
        zero, plain, flat = (on_two_ranks(f"{kind}, {name}")[0] for name in ("sigma 0", "plain", "flat"))
        assert differing(zero["adapter"], plain["adapter"]) == []
        assert differing(flat["adapter"], plain["adapter"])

    def test_an_evaluation_between_backward_and_step_is_clean_and_changes_nothing(self, on_two_ranks, kind):
        for read, flat in zip(on_two_ranks(f"{kind}, read amid a step"), on_two_ranks(f"{kind}, flat")):
            trained, seen = read["forwards"]
            assert trained == [False] * STEPS * ACCUMULATION
            assert len(seen) == len(flat["forwards"][1]) + 2 * STEPS * (ACCUMULATION - 1)
            assert all(seen)
            assert read["changed"] == []
            assert differing(read["adapter"], flat["adapter"]) == []

    def test_a_resumed_run_goes_on_bit_for_bit(self, on_two_ranks, kind):
        for whole_run, resumed_run in on_two_ranks(f"{kind}, resumed"):
            assert differing(whole_run, resumed_run) == []


def test_accelerates_fsdp2_wrapped_before_or_after_prepare(on_two_ranks):
    for before, after in zip(*(on_two_ranks(f"accelerate, wrapped {when}") for when in ("before", "after"))):
        assert differing(before["adapter"], after["adapter"]) == []
        for each in (before, after):
            assert (each["changed"], each["trained"], each["count"]) == ([], [False] * STEPS, STEPS)


@pytest.mark.parametrize(("kind", "name", "way_out"), [("fsdp1", "FSDP1", "FSDP2"), ("zero3", "ZeRO-3", "ZeRO-2")])
def test_flat_shards_are_refused_by_name_when_training_begins(on_two_ranks, kind, name, way_out):
    for message in on_two_ranks(kind):
        assert "base_model.model.model.layers.0" in message
        assert name in message
        assert f"Use {way_out}" in message or f"or {way_out}" in message


def test_tensor_parallelism_along_the_inputs_is_refused_along_the_outputs_works(on_two_ranks):
    for told in on_two_ranks("tensor parallel"):
        message = told["q_proj down_proj"]
        assert "down_proj.weight is sharded along its inputs (tensor parallelism" in message
        assert "Shard it by its outputs" in message
        noisy, left = told["q_proj v_proj"]
        assert len(noisy) == 4
        assert left == []
