"""FlatPerturbCallback in transformers' own Trainer and Seq2SeqTrainer."""

import importlib.util
import json
import warnings

import numpy as np
import pytest
import torch
from helpers import bits, trainable

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")
pytest.importorskip("peft")

from peft import get_peft_model  # noqa: E402
from safetensors.torch import load_file  # noqa: E402
from tiny import Watch, adapter, differing, llama, lora_config, lora_llama, rows, t5  # noqa: E402
from transformers import Seq2SeqTrainer, Seq2SeqTrainingArguments, Trainer, TrainerCallback, TrainingArguments  # noqa: E402
from transformers.training_args import OptimizerNames  # noqa: E402

from flatopt import FlatPerturbOptimizer  # noqa: E402
from flatopt.integrations.transformers import FlatPerturbCallback  # noqa: E402

STEPS, SIGMA = 4, 0.1


def arguments(folder, kind=TrainingArguments, **options):
    usual = {"use_cpu": True, "max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "seed": 5}
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
    return kind(str(folder), **{**usual, **quiet, **options})


def train(
    folder,
    callback="flat",
    model=None,
    resume=None,
    trainer=Trainer,
    data=None,
    others=(),
    optimizers=(None, None),
    **options,
):
    """A run; its model and the watch over it. ``callback`` None: plain."""
    model = model or lora_llama()
    watch = Watch(model)
    callback = FlatPerturbCallback(sigma=SIGMA, schedule="constant") if callback == "flat" else callback
    kind = Seq2SeqTrainingArguments if trainer is Seq2SeqTrainer else TrainingArguments
    run = trainer(
        model,
        arguments(folder, kind, **options),
        train_dataset=data or rows(),
        eval_dataset=rows(4, seed=2),
        callbacks=[*([callback] if callback else []), *others],
        optimizers=optimizers,
    )
    run.train(resume_from_checkpoint=resume)
    assert watch.changed() == []
    return model, watch


def hooks(model):
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


PACKAGES = {  # part of an optimizer's name -> what it needs; the first that fits
    "xla": "torch_xla",
    "npu": "torch_npu",
    "anyprecision": "torchdistx",
    "galore": "galore_torch",
    "apollo": "apollo_torch",
    "lomo": "lomo_optim",
    "grok": "grokadamw",
    "schedule_free": "schedulefree",
    "stable": "optimi",
    "adamw_torch_4bit": "torchao",
    "adamw_torch_8bit": "torchao",
    "8bit": "bitsandbytes",
    "bnb": "bitsandbytes",
    "paged": "bitsandbytes",
    "lion": "bitsandbytes",
    "ademamix": "bitsandbytes",
}
NEED_CUDA = ("galore_adamw_8bit", "galore_adamw_8bit_layerwise", "adalomo", "stable_adamw")


@pytest.mark.parametrize("optim", [name.value for name in OptimizerNames])
@pytest.mark.filterwarnings("ignore")
def test_every_optimizer_trains_at_perturbed_weights(tmp_path, optim):
    package = next((package for part, package in PACKAGES.items() if part in optim), None)
    if package is not None and importlib.util.find_spec(package) is None:
        pytest.skip(f"{optim} needs {package}")
    if optim in NEED_CUDA:
        pytest.skip(f"{optim} needs CUDA: {package} calls it")
    if optim == "galore_adafactor_layerwise":
        pytest.skip("galore_torch refuses what transformers gives it: lr with relative_step")
    options = {"optim": optim, "lr_scheduler_type": "constant" if "schedule_free" in optim else "linear"}
    if package in ("galore_torch", "apollo_torch"):
        options["optim_target_modules"] = [r".*lora_A\.default"]
    if optim == "schedule_free_radam":
        options["max_steps"] = 2 * STEPS  # it takes no step before its fifth
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*FlatPerturb")
        flat, watch = train(tmp_path, **options)
    plain, _ = train(tmp_path, None, **options)
    assert watch.trained == [False] * options.get("max_steps", STEPS)
    assert differing(adapter(flat), adapter(plain))


@pytest.mark.parametrize("accumulation", [1, 3])
def test_it_equals_a_flat_optimizer_given_to_the_trainer(tmp_path, accumulation):
    callback = FlatPerturbCallback(sigma=SIGMA, seed=7)
    options = {"gradient_accumulation_steps": accumulation, "optim": "adamw_torch"}
    ours, watch = train(tmp_path, callback, **options)
    assert len(watch.trained) == STEPS * accumulation
    assert watch.trained[:accumulation] == [True] * accumulation  # the cosine schedule starts at 0
    assert not any(watch.trained[accumulation:])
    model = lora_llama()
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-2, weight_decay=0.0)
    optimizer = FlatPerturbOptimizer(optimizer, model, sigma=SIGMA, seed=7, total_steps=STEPS)
    theirs, _ = train(tmp_path, None, model=model, optimizers=(optimizer, None), **options)
    plain, _ = train(tmp_path, None, **options)
    assert differing(adapter(ours), adapter(theirs)) == []
    assert differing(adapter(ours), adapter(plain))


@pytest.mark.parametrize("draws", ["micro-batch", "mixed"])
def test_each_micro_batch_may_have_its_own_draw(tmp_path, draws):
    callback, options = FlatPerturbCallback(sigma=SIGMA, draws=draws), {"gradient_accumulation_steps": 3}
    seen = []

    class Weights(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if not seen:
                layer = next(m for m in model.modules() if hasattr(m, "base_layer")).base_layer
                seen.append(bits(layer.weight).clone())
                layer.register_forward_pre_hook(lambda m, args: seen.append(bits(m.weight).clone()))

    model = lora_llama()
    ours, watch = train(tmp_path, callback, model=model, others=[Weights()], **options)
    once, _ = train(tmp_path, FlatPerturbCallback(sigma=SIGMA), **options)
    assert len(watch.trained) == STEPS * 3
    last = seen[-3:]
    assert not any(torch.equal(a, b) for a, b in zip(last, last[1:] + last[:1]))
    assert [torch.equal(weight, seen[0]) for weight in last] == [False, draws == "mixed", False]
    assert differing(adapter(ours), adapter(once))


def test_half_of_each_step_may_train_through_a_format(tmp_path):
    options = {"sigma": 1.0, "schedule": "constant", "draws": "mixed", "restore": "copy"}
    model = lora_llama()
    layer = next(m for m in model.modules() if hasattr(m, "base_layer"))
    clean, seen = layer.base_layer.weight.detach().clone(), []
    layer.base_layer.register_forward_pre_hook(lambda m, args: seen.append(m.weight.detach().clone()))
    ours, _ = train(tmp_path, FlatPerturbCallback(noise="int4/32", **options), model=model, gradient_accumulation_steps=2)
    assert len(seen) == STEPS * 2
    assert [torch.equal(weight, clean) for weight in seen] == [False, True] * STEPS
    assert torch.equal(layer.base_layer.weight.detach(), clean)
    plain, _ = train(tmp_path, None, gradient_accumulation_steps=2)
    assert differing(adapter(ours), adapter(plain))


def test_sigma_0_is_plain_training_and_nothing_is_left_behind(tmp_path):
    plain, _ = train(tmp_path / "plain", None)
    model = lora_llama()
    before = hooks(model)
    callback = FlatPerturbCallback(sigma=0.0)
    flat, _ = train(tmp_path / "flat", callback, model=model)
    assert differing(adapter(plain), adapter(flat)) == []
    assert callback.optimizer is None
    assert hooks(model) == before + 1  # the watch's


CASES = {
    "bf16": {"bf16": True},
    "checkpointing": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": False}},
    "reentrant": {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": True}},
    "neftune": {"neftune_noise_alpha": 5.0},
    "short last window": {"gradient_accumulation_steps": 4, "max_steps": -1, "num_train_epochs": 2},
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.filterwarnings("ignore")
def test_the_trainers_options(tmp_path, case):
    model = lora_llama()
    if case == "reentrant":
        model.enable_input_require_grads()
    _, watch = train(tmp_path, model=model, **CASES[case])
    assert watch.trained
    assert not any(watch.trained)


class Reader(TrainerCallback):
    """Generates and saves where it is asked in mid-step."""

    def __init__(self, folder):
        self.folder = folder

    def on_substep_end(self, args, state, control, model, **kwargs):
        model.generate(input_ids=torch.tensor([[5, 6, 7]]), max_new_tokens=2, do_sample=False)
        model.save_pretrained(self.folder)
        control.should_evaluate = True


def test_evaluation_generation_and_saving_amid_training_find_clean_weights(tmp_path):
    options = {"gradient_accumulation_steps": 2, "eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps"}
    options |= {"save_steps": 2, "load_best_model_at_end": True, "save_total_limit": 1}
    _, watch = train(tmp_path / "run", others=[Reader(tmp_path / "model")], **options)
    assert len(watch.trained) == 2 * STEPS
    assert not any(watch.trained)
    assert len(watch.read) > STEPS
    assert all(watch.read)
    assert (tmp_path / "model" / "adapter_config.json").exists()


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    options = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1, "learning_rate": 3.0}
    model, _ = train(tmp_path, load_best_model_at_end=True, **options)
    losses = [
        json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"][-1]["eval_loss"]
        for step in range(1, STEPS + 1)
    ]
    best = 1 + losses.index(min(losses))
    assert best != STEPS, "the last is the best: nothing to load"
    saved = load_file(tmp_path / f"checkpoint-{best}" / "adapter_model.safetensors")
    loaded = {name.replace(".default", ""): value for name, value in adapter(model).items()}
    assert differing(saved, loaded) == []


def test_a_bf16_base_with_adapters_in_fp32(tmp_path):
    model = get_peft_model(llama().bfloat16(), lora_config(task_type="CAUSAL_LM"))
    _, watch = train(tmp_path, model=model, bf16=True)
    assert {p.dtype for p in adapter(model).values()} == {torch.float32}
    assert watch.layer.base_layer.weight.dtype == torch.bfloat16
    assert watch.trained == [False] * STEPS


def test_reading_amid_training_changes_nothing(tmp_path):
    runs = []
    for others in ([], [Reader(tmp_path / "model")]):
        model, _ = train(tmp_path, model=lora_llama(lora_dropout=0.0), others=others, gradient_accumulation_steps=2)
        runs.append(adapter(model))
    assert differing(*runs) == []


def test_a_resumed_run_goes_on_bit_for_bit(tmp_path):
    callback = FlatPerturbCallback(sigma=SIGMA, seed=3)
    whole, _ = train(tmp_path / "whole", callback, save_strategy="steps", save_steps=2)
    state = json.loads((tmp_path / "whole" / "checkpoint-2" / "trainer_state.json").read_text())
    saved = state["stateful_callbacks"]["FlatPerturbCallback"]["args"]
    assert (saved["sigma"], saved["seed"]) == (SIGMA, 3)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*FlatPerturb")
        resumed, watch = train(tmp_path / "resumed", FlatPerturbCallback(sigma=SIGMA, seed=3), resume=checkpoint)
        assert differing(adapter(whole), adapter(resumed)) == []
        assert len(watch.trained) == 2
        for given in (FlatPerturbCallback(), FlatPerturbCallback(sigma=0.5)):  # the Trainer makes it anew from the file
            resumed, _ = train(tmp_path / "made", given, resume=checkpoint, restore_callback_states_from_checkpoint=True)
            assert differing(adapter(whole), adapter(resumed)) == []
    with pytest.warns(UserWarning, match=r"goes on from step 2 .*seed was 3, is 4; sigma was 0.1, is 0.2") as told:
        train(tmp_path / "other", FlatPerturbCallback(sigma=0.2, seed=4), resume=checkpoint)
    assert not [each for each in told if "was made with seed" in str(each.message)]  # which it is not: the callback's counts


def test_what_a_checkpoint_cannot_keep_is_refused_not_lost(tmp_path):
    def callback():
        return FlatPerturbCallback(targets=lambda model: [{"modules": model.base_model.model.model.layers[0]}])

    whole, _ = train(tmp_path / "whole", callback(), save_strategy="steps", save_steps=2)
    checkpoint = str(tmp_path / "whole" / "checkpoint-2")
    resumed, _ = train(tmp_path / "resumed", callback(), resume=checkpoint)
    assert differing(adapter(whole), adapter(resumed)) == []
    with pytest.raises(ValueError, match="cannot keep its targets"):
        train(tmp_path / "made", callback(), resume=checkpoint, restore_callback_states_from_checkpoint=True)


def test_train_twice_starts_its_schedule_anew(tmp_path):
    model, seen = lora_llama(), []
    watch = Watch(model)
    trainer = Trainer(model, arguments(tmp_path), train_dataset=rows(), callbacks=[FlatPerturbCallback(sigma=SIGMA)])
    for _ in range(2):
        trainer.train()
        seen.append(watch.trained[-STEPS:])
    assert seen == [[True, False, False, False]] * 2
    assert watch.changed() == []


def test_interrupted_and_run_again_with_the_same_or_a_new_trainer(tmp_path):
    class Stop(TrainerCallback):
        at = 2

        def on_substep_end(self, args, state, control, **kwargs):
            if state.global_step == self.at:
                raise KeyboardInterrupt

    model, stop = lora_llama(), Stop()
    watch, options = Watch(model), {"gradient_accumulation_steps": 2}
    trainer = Trainer(
        model, arguments(tmp_path, **options), train_dataset=rows(), callbacks=[FlatPerturbCallback(SIGMA), stop]
    )
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    with torch.no_grad():
        model.eval()(input_ids=torch.tensor([[5, 6]]))
    assert watch.read == [True]
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    again = Trainer(model, arguments(tmp_path, **options), train_dataset=rows(), callbacks=[FlatPerturbCallback(SIGMA)])
    with pytest.warns(UserWarning, match="older FlatPerturbOptimizer"):
        again.train()
    assert watch.changed() == []
    assert watch.trained[-2 * STEPS :] == [True] * 2 + [False] * (2 * STEPS - 2)


def test_a_smaller_batch_after_running_out_of_memory(tmp_path):
    class Full(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, train_dataloader, **kwargs):
            if state.train_batch_size > 2 and state.global_step == 2:
                raise RuntimeError("CUDA out of memory.")

    _, watch = train(tmp_path, FlatPerturbCallback(SIGMA), others=[Full()], auto_find_batch_size=True)
    assert watch.trained[-STEPS:] == [True, False, False, False]  # anew, with a schedule of its own


def test_model_init_and_hyperparameter_search(tmp_path):
    pytest.importorskip("optuna")
    watches = []

    def model_init(trial=None):
        watches.append(Watch(lora_llama()))
        return watches[-1].model

    trainer = Trainer(
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=2),
        model_init=model_init,
        train_dataset=rows(),
        eval_dataset=rows(4, seed=2),
        callbacks=[FlatPerturbCallback(sigma=SIGMA, schedule="constant")],
    )
    trainer.hyperparameter_search(
        lambda trial: {"learning_rate": trial.suggest_float("learning_rate", 1e-3, 1e-2)}, n_trials=2, backend="optuna"
    )
    trained = [watch for watch in watches if watch.trained]
    assert len(trained) == 2
    for watch in trained:
        assert watch.trained == [False] * STEPS
        assert watch.read
        assert all(watch.read)
        assert watch.changed() == []


@pytest.mark.filterwarnings("error:.*FlatPerturb")
def test_sigma_may_be_searched(tmp_path):
    pytest.importorskip("optuna")
    callback, seen = FlatPerturbCallback(sigma=0.3), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(callback.optimizer.perturb_groups[0]["sigma"])

    trainer = Trainer(
        args=arguments(tmp_path, eval_strategy="steps", eval_steps=2, save_strategy="steps", save_steps=STEPS),
        model_init=lambda trial=None: lora_llama(),
        train_dataset=rows(),
        eval_dataset=rows(4, seed=2),
        callbacks=[callback, Look()],
    )
    tried = iter([0.1, 0.2])
    trainer.hyperparameter_search(
        lambda trial: {"sigma": trial.suggest_categorical("sigma", [next(tried)])}, n_trials=1, backend="optuna"
    )
    file = next(tmp_path.glob(f"run-*/checkpoint-{STEPS}/trainer_state.json"))
    assert json.loads(file.read_text())["stateful_callbacks"]["FlatPerturbCallback"]["args"]["sigma"] == 0.1
    trainer.train()
    assert seen == [0.1] * STEPS + [0.3] * STEPS


def test_seq2seq_trainer_generates_at_clean_weights(tmp_path):
    options = {"predict_with_generate": True, "generation_max_length": 4, "eval_strategy": "steps", "eval_steps": 2}
    _, watch = train(tmp_path, model=t5(), trainer=Seq2SeqTrainer, **options)
    assert watch.trained == [False] * STEPS
    assert watch.read
    assert all(watch.read)


@pytest.mark.parametrize("wrong", [{"sigma": "0.05"}, {"schedule": "cos"}, {"draws": "batch"}, {"seed": 0.5}])
def test_a_value_that_does_not_fit_is_refused_at_once(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        FlatPerturbCallback(**wrong)


def test_a_checkpoint_of_plain_training_warns_and_one_keeps_numpys_numbers(tmp_path):
    train(tmp_path / "plain", None, save_strategy="steps", save_steps=2)
    callback, checkpoint = (
        FlatPerturbCallback(sigma=np.float32(0.1), seed=np.int64(3)),
        str(tmp_path / "plain" / "checkpoint-2"),
    )
    with pytest.warns(UserWarning, match="begins at step 2: the checkpoint was written without it"):
        train(tmp_path / "flat", callback, resume=checkpoint, save_strategy="steps", save_steps=4)
    state = json.loads((tmp_path / "flat" / "checkpoint-4" / "trainer_state.json").read_text())
    assert state["stateful_callbacks"]["FlatPerturbCallback"]["args"]["seed"] == 3


def test_two_at_once_and_nothing_to_perturb_are_refused(tmp_path):
    model = lora_llama()
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.1), model, total_steps=STEPS)
    with pytest.raises(ValueError, match="leave out the callback"):
        train(tmp_path, model=model, optimizers=(optimizer, None))
    with pytest.raises(ValueError, match="no low-rank module"):
        Trainer(llama(), arguments(tmp_path), train_dataset=rows(), callbacks=[FlatPerturbCallback()]).train()
