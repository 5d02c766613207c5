"""fp16 with a GradScaler under FlatPerturbCallback: a skipped step leaves W clean and counts as the Trainer counts it."""

import pytest
import torch

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from tiny import Watch, adapter, differing, lora_llama, rows  # noqa: E402
from transformers import Trainer, TrainerCallback, TrainingArguments  # noqa: E402

from flatopt.integrations.transformers import FlatPerturbCallback  # noqa: E402
from flatopt.integrations.unwrap import bare_optimizer  # noqa: E402

STEPS, ACCUMULATION, SIGMA = 4, 2, 0.1


class OnCpu(Trainer):
    """What accelerate does for ``fp16=True`` on a GPU: autocast to float16, loss and gradients scaled."""

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.state._mixed_precision, self.accelerator.native_amp = "fp16", True
        self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)


class Record(TrainerCallback):
    def __init__(self, watch, flat):
        self.watch, self.flat = watch, flat
        self.step, self.stepped, self.counts, self.clean, self.adapters = 0, 0, [], [], []

    def on_train_begin(self, args, state, control, optimizer, **kwargs):
        def count(*args):
            self.stepped += 1

        self.bare = bare_optimizer(optimizer)
        self.bare.register_step_post_hook(count)

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step

    def on_step_end(self, args, state, control, model, **kwargs):
        self.counts.append((state.global_step, self.flat.optimizer.step_count))
        self.clean.append(self.watch.changed() == [])
        self.adapters.append(adapter(model))


def train(folder, trainer, overflows=None, **options):
    """``overflows``: the number of the step in which a gradient is infinite."""
    model = lora_llama()
    watch, flat = Watch(model), FlatPerturbCallback(SIGMA, schedule="constant")
    record, dtypes = Record(watch, flat), []
    first = next(p for p in model.parameters() if p.requires_grad)
    first.register_hook(lambda grad: grad * torch.inf if record.step == overflows else grad)
    layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
    layer.base_layer.register_forward_hook(lambda module, args, output: dtypes.append(output.dtype))
    usual = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": ACCUMULATION, "seed": 5}
    usual |= {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "learning_rate": 1e-2, "logging_steps": 1}
    usual |= {"eval_strategy": "steps", "eval_steps": 1}
    made = trainer(
        model,
        TrainingArguments(str(folder), **usual, **options),
        train_dataset=rows(),
        eval_dataset=rows(2, seed=2),
        callbacks=[flat, record],
    )
    made.train()
    assert set(dtypes) == {torch.float16}
    assert watch.changed() == []
    assert watch.trained == [False] * STEPS * ACCUMULATION
    assert watch.read
    assert all(watch.read)
    assert record.counts == [(n, n) for n in range(1, STEPS + 1)]
    assert record.clean == [True] * STEPS
    assert record.bare.state_dict()["param_groups"][0]["flatopt_step"] == STEPS
    return record, made


OPTIONS = [
    {"optim": "adamw_torch", "max_grad_norm": 1.0},  # gradients unscaled before the step
    {"optim": "adamw_torch", "max_grad_norm": 0.0},  # in it
    {"optim": "adamw_torch_fused"},  # steps, and itself leaves the parameters alone where a gradient is infinite
]


def check(tmp_path, trainer, options):
    whole, _ = train(tmp_path / "whole", trainer, **options)
    assert whole.stepped == STEPS
    record, made = train(tmp_path / "skipping", trainer, overflows=1, **options)
    assert record.stepped == STEPS - (options["optim"] != "adamw_torch_fused")
    first, second, third, _ = record.adapters
    assert differing(first, second) == []
    assert differing(second, third)
    assert differing(first, whole.adapters[0]) == []
    assert made.accelerator.scaler.get_scale() < made.accelerator.scaler._init_scale


@pytest.mark.parametrize("options", OPTIONS)
def test_a_step_that_the_scaler_skips(tmp_path, options):
    check(tmp_path, OnCpu, {**options, "use_cpu": True})


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("options", OPTIONS)
def test_fp16_on_a_gpu(tmp_path, options):
    check(tmp_path, Trainer, {**options, "fp16": True})
