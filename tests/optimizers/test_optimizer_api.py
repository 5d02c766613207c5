"""It is a torch.optim.Optimizer: for schedulers, scalers, hooks, checkpoints, copies, and the trainers people use."""

import copy
import io
import pickle

import pytest
import torch
from helpers import batch, changed, frozen, lora_mlp, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer

SIGMA, STEPS = 0.3, 8
OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
    "radam": lambda p: torch.optim.RAdam(p, lr=0.01),
}
if hasattr(torch.optim, "Muon"):
    OPTIMIZERS["muon"] = lambda p: torch.optim.Muon([x for x in p if x.dim() == 2], lr=0.01)


def wrapped(optimizer):
    return getattr(optimizer, "optimizer", optimizer)


SCHEDULERS = {
    "none": lambda optimizer: None,
    "onecycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.02, total_steps=STEPS + 1, cycle_momentum=not isinstance(wrapped(optimizer), torch.optim.Adagrad)
    ),
    "cosine": lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=STEPS),
}


def make(kind="adamw", sigma=SIGMA, **options):
    """A model with LoRA, the same at each call, and its optimizer; ``sigma`` None: the plain one."""
    torch.manual_seed(3)
    model = lora_mlp()
    optimizer = OPTIMIZERS[kind](trainable(model))
    if sigma is not None:
        optimizer = FlatPerturbOptimizer(optimizer, model, sigma=sigma, total_steps=STEPS, **options)
    return model, optimizer


def train(model, optimizer, steps, scheduler=None, accumulation=1, first=0):
    """The usual loop; returns the base weight that each step's last forward saw."""
    seen = []
    weight = model.base_model.model.second.base_layer.weight
    for step in range(first, first + steps):
        for micro in range(accumulation):
            x, y = batch(seed=100 * step + micro)
            (nn.functional.cross_entropy(model(x), y) / accumulation).backward()
        seen.append(weight.detach().clone())
        optimizer.step()
        if scheduler is not None:
            scheduler.step()
        optimizer.zero_grad()
    return seen


def assert_same(first, second):
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    assert [name for name in first if not torch.equal(first[name], second[name])] == []


# --- optimizers, schedulers, scalers -------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("scheduler", SCHEDULERS)
@pytest.mark.parametrize("accumulation", [1, 3])
@pytest.mark.parametrize("reload", [False, True])
def test_without_noise_it_is_the_plain_optimizer(kind, scheduler, accumulation, reload):
    """Sigma 0 against the bare optimizer, bit for bit, with a save and load into new objects halfway."""
    runs = []
    for sigma in (None, 0.0):
        model, optimizer = make(kind, sigma)
        schedule = SCHEDULERS[scheduler](optimizer)
        train(model, optimizer, STEPS // 2, schedule, accumulation)
        if reload:
            saved = copy.deepcopy([model.state_dict(), optimizer.state_dict(), schedule and schedule.state_dict()])
            model, optimizer = make(kind, sigma)
            schedule = SCHEDULERS[scheduler](optimizer)
            model.load_state_dict(saved[0])
            optimizer.load_state_dict(saved[1])
            if schedule is not None:
                schedule.load_state_dict(saved[2])
        train(model, optimizer, STEPS // 2, schedule, accumulation, first=STEPS // 2)
        runs.append((model, [group["lr"] for group in optimizer.param_groups]))
    assert_same(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_every_optimizer_trains_at_perturbed_weights(kind):
    model, optimizer = make(kind)
    plain, plain_optimizer = make(kind, None)
    before = frozen(model)
    clean = before["base_model.model.second.base_layer.weight"]
    seen = train(model, optimizer, STEPS)
    train(plain, plain_optimizer, STEPS)
    assert torch.equal(seen[0], clean)  # cosine: 0 at first
    assert all(not torch.equal(weight, clean) for weight in seen[1:])
    assert changed(model, before) == []
    assert any(not torch.equal(x, y) for x, y in zip(trainable(model), trainable(plain)))
    assert all(group["flatopt_step"] == STEPS for group in optimizer.param_groups)


@pytest.mark.parametrize("history", [1, 4])
def test_lbfgs_sees_one_epsilon_in_all_evaluations_of_a_step(history):
    torch.manual_seed(3)
    model = lora_mlp()
    inner = torch.optim.LBFGS(trainable(model), lr=0.5, max_iter=5, history_size=history, line_search_fn="strong_wolfe")
    optimizer = FlatPerturbOptimizer(inner, model, sigma=SIGMA, schedule="constant")
    before = frozen(model)
    weight = model.base_model.model.second.base_layer.weight
    x, y = batch(rows=32)
    steps = []
    for _ in range(3):
        seen, losses = [], []

        def closure(seen=seen, losses=losses):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            seen.append(weight.detach().clone())
            losses.append(loss.item())
            return loss

        returned = optimizer.step(closure)
        assert changed(model, before) == []
        assert returned.item() == losses[0]
        assert losses[-1] < losses[0]
        assert len(seen) > 1
        assert all(torch.equal(w, seen[0]) for w in seen)
        steps.append(seen[0])
    assert not torch.equal(steps[0], steps[1])
    assert not torch.equal(steps[0], before["base_model.model.second.base_layer.weight"])


def test_closure_returns_the_loss_and_an_exception_in_it_restores():
    model, optimizer = make(schedule="constant")
    before = frozen(model)
    x, y = batch()

    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() > 0

    def fails():
        closure()
        raise KeyError("in the closure")

    with pytest.raises(KeyError):
        optimizer.step(fails)
    assert changed(model, before) == []
    assert not optimizer.is_perturbed
    assert optimizer.step(closure).item() > 0


@pytest.mark.parametrize("name", ["onecycle", "cosine"])
def test_schedulers_change_the_wrapped_groups(name):
    model, optimizer = make()
    plain, plain_optimizer = make(sigma=None)
    schedule, plain_schedule = SCHEDULERS[name](optimizer), SCHEDULERS[name](plain_optimizer)
    rates = []
    for step in range(STEPS):
        train(model, optimizer, 1, schedule, first=step)
        train(plain, plain_optimizer, 1, plain_schedule, first=step)
        assert optimizer.optimizer.param_groups[0]["lr"] == plain_optimizer.param_groups[0]["lr"]
        assert optimizer.optimizer.param_groups[0]["betas"] == plain_optimizer.param_groups[0]["betas"]
        rates.append(optimizer.optimizer.param_groups[0]["lr"])
    assert len(set(rates)) == STEPS
    assert schedule.state_dict()["_step_count"] == plain_schedule.state_dict()["_step_count"]


@pytest.mark.parametrize("kind", ["adamw", "adamw-fused", "sgd"])
def test_grad_scaler_unscales_and_skips(kind):
    """Scale 2^10 and back is exact in fp32: the scaled run equals the one without a scaler."""
    runs = []
    for scaled in (False, True):
        model, optimizer = make(kind, schedule="constant")
        before = frozen(model)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=100, enabled=scaled)
        for step in range(4):
            x, y = batch(seed=step)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            if scaled and step == 2:  # an overflow: the step is skipped, then taken again with the same ε
                seen = model.base_model.model.second.base_layer.weight.detach().clone()
                kept = [p.grad.clone() for p in trainable(model)]
                trainable(model)[0].grad.fill_(torch.inf)
                scaler.step(optimizer)
                scaler.update(2.0**10)
                assert optimizer.param_groups[0]["flatopt_step"] == 2
                optimizer.zero_grad()
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
                assert torch.equal(seen, model.base_model.model.second.base_layer.weight)
                assert all(torch.equal(p.grad, g) for p, g in zip(trainable(model), kept))
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(trainable(model), 0.5)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            assert changed(model, before) == []
        runs.append(model)
    assert_same(*runs)


# --- state -----------------------------------------------------------------------------------------------------------


def same_object(optimizer):
    inner = optimizer.optimizer
    return (
        optimizer.param_groups is inner.param_groups
        and optimizer.state is inner.state
        and optimizer.defaults is inner.defaults
    )


def test_param_groups_state_and_defaults_are_live():
    model, optimizer = make()
    assert isinstance(optimizer, torch.optim.Optimizer)
    assert same_object(optimizer)
    train(model, optimizer, 2)
    assert same_object(optimizer)
    assert optimizer.state[trainable(model)[0]]["step"].item() == 2
    optimizer.load_state_dict(optimizer.state_dict())
    assert same_object(optimizer)
    assert len(optimizer.state) == len(trainable(model))
    optimizer.param_groups[0]["lr"] = 0.123
    assert optimizer.optimizer.param_groups[0]["lr"] == 0.123
    restored = pickle.loads(pickle.dumps(optimizer))
    assert same_object(restored)
    assert same_object(copy.deepcopy(optimizer))


def test_state_dict_is_the_wrapped_one_with_seed_and_step_in_the_groups():
    model, optimizer = make(seed=17)
    plain, plain_optimizer = make(sigma=None)
    train(model, optimizer, 3)
    train(plain, plain_optimizer, 3)
    state, plain_state = optimizer.state_dict(), plain_optimizer.state_dict()
    assert state.keys() == plain_state.keys()
    extra = state["param_groups"][0].keys() - plain_state["param_groups"][0].keys()
    assert extra == {"flatopt_seed", "flatopt_step"}
    assert (state["param_groups"][0]["flatopt_seed"], state["param_groups"][0]["flatopt_step"]) == (17, 3)
    assert {type(state["param_groups"][0][key]) for key in extra} == {int}


def test_a_bare_optimizers_state_dict_loads_and_ours_loads_into_a_bare_one():
    plain, plain_optimizer = make(sigma=None)
    train(plain, plain_optimizer, 3)
    model, optimizer = make(seed=5)
    train(model, optimizer, 2)
    optimizer.load_state_dict(copy.deepcopy(plain_optimizer.state_dict()))
    assert optimizer.param_groups[0]["flatopt_step"] == 2
    assert optimizer.param_groups[0]["flatopt_seed"] == 5
    assert optimizer.state[trainable(model)[0]]["step"].item() == 3
    train(model, optimizer, 1)
    plain_optimizer.load_state_dict(optimizer.state_dict())
    train(plain, plain_optimizer, 1)


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("restore", ["reversible", "copy"])
def test_resume_is_bit_identical(kind, restore):
    """Checkpoint through a file with weights_only, new objects with another seed: same adapters, same ε at every step."""
    model, optimizer = make(kind, restore=restore, seed=9)
    schedule = SCHEDULERS["onecycle"](optimizer)
    train(model, optimizer, 3, schedule)
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict(), schedule.state_dict()], file)
    epsilon = train(model, optimizer, STEPS - 3, schedule, first=3)

    resumed, other = make(kind, restore=restore, seed=1234)
    other_schedule = SCHEDULERS["onecycle"](other)
    file.seek(0)
    weights, state, schedule_state = torch.load(file, weights_only=True)
    resumed.load_state_dict(weights)
    other.load_state_dict(state)
    other_schedule.load_state_dict(schedule_state)
    again = train(resumed, other, STEPS - 3, other_schedule, first=3)
    assert all(torch.equal(x, y) for x, y in zip(epsilon, again))
    assert_same(model, resumed)


def test_loading_amid_a_window_restores_first():
    model, optimizer = make(schedule="constant")
    before = frozen(model)
    state = copy.deepcopy(optimizer.state_dict())
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    assert optimizer.is_perturbed
    optimizer.load_state_dict(state)
    assert changed(model, before) == []
    train(model, optimizer, 1)
    assert changed(model, before) == []


def test_add_param_group():
    model, optimizer = make()
    train(model, optimizer, 2)
    extra = nn.Parameter(torch.ones(3))
    optimizer.add_param_group({"params": [extra], "lr": 0.5})
    assert optimizer.optimizer.param_groups[1]["params"] == [extra]
    assert optimizer.param_groups[1]["flatopt_step"] == 2
    extra.grad = torch.ones(3)
    train(model, optimizer, 1)
    assert (extra < 1).all()
    assert [group["flatopt_step"] for group in optimizer.param_groups] == [3, 3]
    optimizer.load_state_dict(optimizer.state_dict())
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]


def test_zero_grad_says_nothing_about_the_weights():
    model, optimizer = make(schedule="constant")
    x, y = batch()
    loss = nn.functional.cross_entropy(model(x), y)
    optimizer.zero_grad(set_to_none=False)
    assert optimizer.is_perturbed
    loss.backward()
    optimizer.zero_grad(set_to_none=False)
    assert all(p.grad is None or not p.grad.any() for p in trainable(model))
    optimizer.zero_grad()
    assert all(p.grad is None for p in trainable(model))
    assert optimizer.is_perturbed


def test_hooks_on_ours_and_on_the_wrapped_one():
    model, optimizer = make(schedule="constant")
    before, calls = frozen(model), []

    def note(name):
        def hook(*args):
            calls.append((name, changed(model, before) == []))

        return hook

    for name, each in (("ours", optimizer), ("wrapped", optimizer.optimizer)):
        each.register_step_pre_hook(note(f"{name} step pre"))
        each.register_step_post_hook(note(f"{name} step post"))
        each.register_state_dict_pre_hook(note(f"{name} save pre"))
        each.register_state_dict_post_hook(note(f"{name} save post"))
        each.register_load_state_dict_pre_hook(note(f"{name} load pre"))
        each.register_load_state_dict_post_hook(note(f"{name} load post"))
    train(model, optimizer, 1)
    assert calls == [
        ("ours step pre", False),
        ("wrapped step pre", True),
        ("wrapped step post", True),
        ("ours step post", True),
    ]
    calls.clear()
    state = optimizer.state_dict()
    assert [name for name, _ in calls] == ["ours save pre", "wrapped save pre", "wrapped save post", "ours save post"]
    calls.clear()
    optimizer.load_state_dict(state)
    assert [name for name, _ in calls] == ["ours load pre", "wrapped load pre", "wrapped load post", "ours load post"]


def test_state_dict_hooks_can_replace():
    _, optimizer = make()
    optimizer.register_state_dict_post_hook(lambda _, state: {**state, "note": 7})
    state = optimizer.state_dict()
    assert state["note"] == 7
    optimizer.register_load_state_dict_pre_hook(lambda _, state: {k: v for k, v in state.items() if k != "note"})
    optimizer.load_state_dict(state)


# --- copies ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("amid", [False, True], ids=["between steps", "amid a window"])
@pytest.mark.parametrize("how", ["deepcopy", "pickle", "deepcopy, optimizer first"])
def test_copies_are_independent_and_go_on_alike(how, amid):
    model, optimizer = make()
    before = frozen(model)
    train(model, optimizer, 3)
    if amid:
        x, y = batch()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.zero_grad()
    if how == "pickle":
        other_model, other = pickle.loads(pickle.dumps((model, optimizer)))
    elif how == "deepcopy":
        other_model, other = copy.deepcopy((model, optimizer))
    else:
        other, other_model = copy.deepcopy((optimizer, model))
    assert changed(other_model, before) == []
    kept = copy.deepcopy(other_model.state_dict())
    seen = train(model, optimizer, STEPS - 3, first=3)
    assert all(torch.equal(other_model.state_dict()[name], value) for name, value in kept.items())
    assert not other.is_perturbed
    again = train(other_model, other, STEPS - 3, first=3)
    assert all(torch.equal(x, y) for x, y in zip(seen, again))
    assert_same(model, other_model)
    assert changed(model, before) == []


def test_a_copied_model_is_not_perturbed():
    model, optimizer = make(schedule="constant")
    other = copy.deepcopy(model)
    before = frozen(other)
    x, y = batch()
    nn.functional.cross_entropy(other(x), y).backward()
    assert changed(other, before) == []
    assert not optimizer.is_perturbed


def test_targets_that_nobody_calls_are_heard_through_their_parts():
    """A ModuleList has no forward of its own; its entries are called."""
    torch.manual_seed(3)
    model = lora_mlp()
    network = model.base_model.model
    parts = nn.ModuleList([network.first, nn.ModuleDict({"second": network.second})])
    optimizer = OPTIMIZERS["adamw"](trainable(model))
    optimizer = FlatPerturbOptimizer(optimizer, [{"modules": parts}], sigma=SIGMA, schedule="constant")
    before = frozen(model)
    x, y = batch()
    nn.functional.cross_entropy(model(x), y).backward()
    assert {name.split(".")[2] for name in changed(model, before)} == {"first", "second"}
    optimizer.step()
    assert changed(model, before) == []


# --- trainers --------------------------------------------------------------------------------------------------------


@pytest.fixture
def _fresh_accelerate():
    from accelerate.state import AcceleratorState, GradientState

    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()


@pytest.mark.usefixtures("_fresh_accelerate")
def test_accelerate(tmp_path):
    """prepare, gradient accumulation (with a short last window), clipping, save_state, load_state."""
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    torch.manual_seed(3)
    model = lora_mlp()
    before = frozen(model)
    clean = before["base_model.model.second.base_layer.weight"]
    optimizer = FlatPerturbOptimizer(OPTIMIZERS["adamw"](trainable(model)), model, sigma=SIGMA, schedule="constant")
    inner = optimizer
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=20)
    loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(rows=40)), batch_size=8)
    model, optimizer, loader, schedule = accelerator.prepare(model, optimizer, loader, schedule)

    def epoch():
        seen = []
        for x, y in loader:
            with accelerator.accumulate(model):
                accelerator.backward(nn.functional.cross_entropy(model(x), y))
                seen.append(model.base_model.model.second.base_layer.weight.detach().clone())
                if accelerator.sync_gradients:
                    accelerator.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        return seen

    seen = epoch()  # 5 batches: windows of 2, 2 and 1
    assert inner.param_groups[0]["flatopt_step"] == 3
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[2], seen[3])
    assert len({tuple(w.flatten().tolist()) for w in [*seen, clean]}) == 4
    assert changed(model, before) == []
    accelerator.save_state(tmp_path / "state")
    epoch()
    final = copy.deepcopy(model.state_dict())
    accelerator.load_state(tmp_path / "state")
    assert inner.param_groups[0]["flatopt_step"] == 3
    epoch()
    assert all(torch.equal(value, final[name]) for name, value in model.state_dict().items())


def tiny_gpt2():
    from peft import LoraConfig, get_peft_model
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(3)
    config = {"vocab_size": 40, "n_positions": 8, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(**config, bos_token_id=0, eos_token_id=0))
    return get_peft_model(
        model, LoraConfig(r=2, target_modules=["c_attn", "c_fc"], init_lora_weights=False, lora_dropout=0.1)
    )


@pytest.mark.usefixtures("_fresh_accelerate")
def test_transformers_trainer(tmp_path):
    """A run with accumulation, evaluation and checkpoints, and one resumed from its checkpoint: the same weights."""
    from transformers import Trainer, TrainerCallback, TrainingArguments

    data = [
        {"input_ids": row, "labels": row} for row in torch.randint(40, (24, 8), generator=torch.Generator().manual_seed(1))
    ]

    class Watch(TrainerCallback):
        def __init__(self, model, optimizer):
            self.weight = model.base_model.model.transformer.h[0].attn.c_attn.base_layer.weight
            self.clean, self.optimizer = self.weight.detach().clone(), optimizer
            self.evaluated, self.trained = [], []

        def is_clean(self):
            return torch.equal(self.weight, self.clean)

        def on_prediction_step(self, *args, **kwargs):
            self.evaluated.append(self.is_clean())

        def on_substep_end(self, *args, **kwargs):
            self.trained.append(self.is_clean())

        def on_pre_optimizer_step(self, *args, **kwargs):
            self.trained.append(self.is_clean())

        def on_save(self, *args, **kwargs):
            assert self.is_clean()

    def run(folder, resume=None):
        model = tiny_gpt2()
        optimizer = FlatPerturbOptimizer(OPTIMIZERS["adamw"](trainable(model)), model, sigma=0.1, total_steps=6)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6)
        watch = Watch(model, optimizer)
        arguments = TrainingArguments(
            str(tmp_path / folder),
            use_cpu=True,
            max_steps=6,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            eval_strategy="steps",
            eval_steps=2,
            save_steps=3,
            logging_steps=1,
            report_to=[],
            disable_tqdm=True,
            seed=5,
        )
        trainer = Trainer(
            model, arguments, train_dataset=data, eval_dataset=data[:4], optimizers=(optimizer, schedule), callbacks=[watch]
        )
        trainer.train(resume_from_checkpoint=resume)
        assert watch.evaluated
        assert all(watch.evaluated)
        assert watch.is_clean()
        assert not optimizer.is_perturbed
        assert optimizer.param_groups[0]["flatopt_step"] == 6
        return model, watch

    model, watch = run("whole")
    assert len(watch.trained) == 12
    assert watch.trained[:2] == [True, True]  # the cosine schedule starts at 0
    assert not any(watch.trained[2:])
    resumed, watch = run("resumed", str(tmp_path / "whole" / "checkpoint-3"))
    assert len(watch.trained) == 6
    assert_same(model, resumed)


@pytest.mark.parametrize(("kind", "accumulation"), [("adamw", 1), ("adamw", 2), ("lbfgs", 1)])
@pytest.mark.filterwarnings("ignore")
def test_lightning(tmp_path, kind, accumulation):
    """Automatic optimization: Lightning runs forward and backward in the closure of ``step``."""
    lightning = pytest.importorskip("lightning")

    class Task(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            torch.manual_seed(3)
            self.model = lora_mlp()
            self.seen, self.validated = [], []

        def weight(self):
            return self.model.base_model.model.second.base_layer.weight.detach().clone()

        def training_step(self, each, _):
            loss = nn.functional.cross_entropy(self.model(each[0]), each[1])
            self.seen.append(self.weight())
            return loss

        def validation_step(self, each, _):
            self.model(each[0])
            self.validated.append(self.weight())

        def configure_optimizers(self):
            inner = torch.optim.LBFGS(trainable(self), max_iter=3) if kind == "lbfgs" else OPTIMIZERS[kind](trainable(self))
            self.ours = FlatPerturbOptimizer(inner, self, sigma=SIGMA, schedule="constant")
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.ours, T_max=20)
            return [self.ours], [{"scheduler": schedule, "interval": "step"}]

    def fit(epochs, checkpoint=None):
        task = Task()
        before = frozen(task)
        options = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
        trainer = lightning.Trainer(
            max_epochs=epochs,
            accumulate_grad_batches=accumulation,
            enable_checkpointing=False,
            default_root_dir=tmp_path,
            **options,
        )
        loader = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(*batch(rows=32)), batch_size=8)
        trainer.fit(task, loader, loader, ckpt_path=checkpoint)
        assert changed(task, before) == []
        clean = before["model.base_model.model.second.base_layer.weight"]
        assert task.validated
        assert all(torch.equal(w, clean) for w in task.validated)
        assert not any(torch.equal(w, clean) for w in task.seen)
        return task, trainer

    first, trainer = fit(1)
    windows = 4 // accumulation
    assert first.ours.param_groups[0]["flatopt_step"] == windows
    assert len({tuple(w.flatten().tolist()) for w in first.seen}) == windows
    assert first.ours.param_groups[0]["lr"] < (1 if kind == "lbfgs" else 0.01)
    trainer.save_checkpoint(tmp_path / "half.ckpt")
    whole, _ = fit(2)
    resumed, _ = fit(2, tmp_path / "half.ckpt")
    assert resumed.ours.param_groups[0]["flatopt_step"] == 2 * windows
    assert_same(whole.model, resumed.model)


# --- distributed checkpoints -----------------------------------------------------------------------------------------


@pytest.fixture
def _one_process(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store")), rank=0, world_size=1
    )
    yield
    torch.distributed.destroy_process_group()


@pytest.mark.usefixtures("_one_process")
@pytest.mark.parametrize("flatten", [False, True], ids=["nested", "flattened"])
@pytest.mark.filterwarnings("error:FlatPerturbOptimizer")
def test_distributed_checkpoint(tmp_path, flatten):
    """get/set_optimizer_state_dict and a save and load through files keep seed and step; the run goes on bit for bit."""
    import torch.distributed.checkpoint as dcp
    from torch.distributed.checkpoint import state_dict as fqn

    options = fqn.StateDictOptions(flatten_optimizer_state_dict=flatten)
    model, optimizer = make(seed=21)
    train(model, optimizer, 3)
    saved = {"model": model.state_dict(), "optimizer": fqn.get_optimizer_state_dict(model, optimizer, options=options)}
    dcp.save(saved, checkpoint_id=tmp_path / "dcp")
    seen = train(model, optimizer, STEPS - 3, first=3)

    resumed, other = make(seed=99)
    state = {"model": resumed.state_dict(), "optimizer": fqn.get_optimizer_state_dict(resumed, other, options=options)}
    assert other.param_groups[0]["flatopt_step"] == 0  # filling the state with a step at lr 0 does not count
    dcp.load(state, checkpoint_id=tmp_path / "dcp")
    resumed.load_state_dict(state["model"])
    fqn.set_optimizer_state_dict(resumed, other, optim_state_dict=state["optimizer"], options=options)
    group = other.param_groups[0]
    assert (group["flatopt_seed"], group["flatopt_step"]) == (21, 3)
    assert (type(group["flatopt_seed"]), type(group["flatopt_step"])) == (int, int)
    again = train(resumed, other, STEPS - 3, first=3)
    assert all(torch.equal(x, y) for x, y in zip(seen, again))
    assert_same(model, resumed)
