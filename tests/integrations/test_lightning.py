"""FlatPerturbCallback in Lightning's Trainer."""

import pytest
import torch
from helpers import batch, changed, frozen, lora_mlp, trainable
from torch import nn

lightning = pytest.importorskip("lightning")
pytest.importorskip("peft")

from tiny import Watch, adapter, differing  # noqa: E402

from flatopt import FlatPerturbOptimizer  # noqa: E402
from flatopt.integrations.lightning import FlatPerturbCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:.*(does not have many workers|logging interval|GPU available|srun)")
BATCHES = 8


class Task(lightning.LightningModule):
    def __init__(self, manual=False, optimizer=torch.optim.AdamW, wrap=None, optimizers=1):
        super().__init__()
        torch.manual_seed(3)
        self.model = lora_mlp()
        self.automatic_optimization = not manual
        self.make, self.wrap, self.number = optimizer, wrap, optimizers

    def training_step(self, each, index):
        loss = nn.functional.cross_entropy(self.model(each[0]).float(), each[1])
        if not self.automatic_optimization:
            self.manual_backward(loss)
            if index % 2:  # two micro-batches a step
                self.optimizers().step()
                self.optimizers().zero_grad()
        return loss

    def validation_step(self, each, _):
        self.model(each[0])

    def configure_optimizers(self):
        made = [self.make(trainable(self), lr=1e-2) for _ in range(self.number)]
        if self.wrap is not None:
            return FlatPerturbOptimizer(made[0], self, **self.wrap)
        return made


def fit(folder, callback=None, epochs=1, checkpoint=None, save=None, task=None, **options):
    """A run; its adapter and its watch."""
    task = task or Task()
    before, watch = frozen(task), Watch(task)
    quiet = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(
        max_epochs=epochs,
        enable_checkpointing=False,
        default_root_dir=folder,
        callbacks=[callback] if callback else [],
        **quiet,
        **options,
    )
    data = torch.utils.data.TensorDataset(*batch(rows=8 * BATCHES))
    loader = torch.utils.data.DataLoader(data, batch_size=8)
    trainer.fit(task, loader, loader, ckpt_path=checkpoint)
    if save:
        trainer.save_checkpoint(save)
    assert changed(task, before) == []
    assert all(watch.read)
    assert watch.read
    return adapter(task), watch


@pytest.mark.parametrize("accumulation", [1, 2])
def test_it_equals_an_optimizer_wrapped_in_configure_optimizers(tmp_path, accumulation):
    steps = BATCHES // accumulation
    options = {"accumulate_grad_batches": accumulation}
    ours, watch = fit(tmp_path, FlatPerturbCallback(sigma=0.2, seed=7), **options)
    theirs, _ = fit(tmp_path, task=Task(wrap={"sigma": 0.2, "seed": 7, "total_steps": steps}), **options)
    plain, _ = fit(tmp_path, **options)
    assert differing(ours, theirs) == []
    assert differing(ours, plain)
    assert watch.trained == [True] * accumulation + [False] * (BATCHES - accumulation)  # cosine: 0 at first


@pytest.mark.parametrize("draws", ["micro-batch", "mixed"])
def test_each_micro_batch_may_have_its_own_draw(tmp_path, draws):
    task, seen = Task(), []
    layer = next(m for m in task.modules() if hasattr(m, "base_layer")).base_layer
    clean = layer.weight.detach().clone()
    layer.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().clone()) if m.training else None)
    callback = FlatPerturbCallback(sigma=0.2, schedule="constant", draws=draws)
    _, watch = fit(tmp_path, callback, task=task, accumulate_grad_batches=4)
    assert watch.trained == [draws == "mixed" and micro % 2 == 1 for micro in range(BATCHES)]
    assert len(seen) == BATCHES
    noisy = seen if draws == "micro-batch" else seen[::2]
    assert not any(torch.equal(a, b) for i, a in enumerate(noisy) for b in (clean, *noisy[:i]))
    assert draws == "micro-batch" or all(torch.equal(weight, clean) for weight in seen[1::2])


def test_sigma_0_is_plain_training(tmp_path):
    callback = FlatPerturbCallback(sigma=0.0)
    assert differing(fit(tmp_path, callback)[0], fit(tmp_path)[0]) == []
    assert callback.optimizer is None


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.LBFGS])
def test_other_optimizers(tmp_path, optimizer):
    _, watch = fit(tmp_path, FlatPerturbCallback(sigma=0.2, schedule="constant"), task=Task(optimizer=optimizer))
    assert len(watch.trained) >= BATCHES
    assert not any(watch.trained)


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_precision(tmp_path, precision):
    task = Task()
    if precision == "bf16-true":
        task = task.bfloat16()
    callback = FlatPerturbCallback(sigma=0.2, schedule="constant")
    seen = []
    task.model.base_model.model.second.base_layer.register_forward_pre_hook(lambda m, args: seen.append(m.weight.dtype))
    if precision == "bf16-true":
        fit(tmp_path, callback, task=task, precision=precision)
        assert set(seen) == {torch.bfloat16}
    else:
        _, watch = fit(tmp_path, callback, task=task, precision=precision)
        assert watch.trained == [False] * BATCHES


def test_manual_optimization(tmp_path):
    """Two micro-batches a step: both see one noise, and the schedule is told its length."""
    seen = []
    task = Task(manual=True)
    layer = task.model.base_model.model.second.base_layer
    layer.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().clone()) if task.training else None)
    fit(tmp_path, FlatPerturbCallback(sigma=0.2, schedule="linear", total_steps=BATCHES // 2), task=task)
    pairs = list(zip(seen[::2], seen[1::2]))
    assert len(pairs) == BATCHES // 2
    assert all(torch.equal(first, second) for first, second in pairs)
    noise = [(first - layer.weight).norm() for first, _ in pairs]
    assert noise[0] == 0
    assert noise[1] < noise[2] < noise[3]


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    def callback(sigma=0.2):
        return FlatPerturbCallback(sigma=sigma, total_steps=2 * BATCHES)

    whole, _ = fit(tmp_path, callback(), epochs=2)
    fit(tmp_path, callback(), epochs=1, save=tmp_path / "half.ckpt")
    resumed, watch = fit(tmp_path, callback(), epochs=2, checkpoint=tmp_path / "half.ckpt")
    assert differing(whole, resumed) == []
    assert watch.trained == [False] * BATCHES
    with pytest.warns(UserWarning, match="sigma was 0.2, is 0.3"):
        fit(tmp_path, callback(0.3), epochs=2, checkpoint=tmp_path / "half.ckpt")


def test_a_checkpoint_of_plain_training_warns(tmp_path):
    fit(tmp_path, save=tmp_path / "plain.ckpt")
    with pytest.warns(UserWarning, match=f"begins at step {BATCHES}: the checkpoint was written without it"):
        fit(tmp_path, FlatPerturbCallback(sigma=0.1), epochs=2, checkpoint=tmp_path / "plain.ckpt")


def test_an_exception_leaves_clean_weights_and_no_hooks(tmp_path):
    class Fails(Task):
        def on_after_backward(self):
            raise KeyError("in the middle of a step")

    task, callback = Fails(), FlatPerturbCallback(sigma=0.2, schedule="constant")
    before = frozen(task)
    with pytest.raises(KeyError):
        fit(tmp_path, callback, task=task)
    assert changed(task, before) == []
    assert callback.optimizer is None


def test_what_cannot_work_is_refused(tmp_path):
    with pytest.raises(ValueError, match="has 2"):
        fit(tmp_path, FlatPerturbCallback(), task=Task(manual=True, optimizers=2))
    with pytest.raises(ValueError, match="set max_steps"):
        fit(tmp_path, FlatPerturbCallback(), epochs=-1)
