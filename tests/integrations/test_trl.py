"""FlatPerturbCallback in TRL's trainers: they train at perturbed weights; references and samplers find them clean."""

import warnings

import pytest

trl = pytest.importorskip("trl")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")

from tiny import WORDS, Watch, adapter, differing, llama, lora_config, lora_llama, tokenizer  # noqa: E402

from flatopt.integrations.transformers import FlatPerturbCallback, _check_policy_ratio  # noqa: E402

STEPS = 3
QUIET = {"use_cpu": True, "bf16": False, "report_to": [], "disable_tqdm": True, "save_strategy": "no", "logging_steps": 1}
USUAL = {"max_steps": STEPS, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "gradient_checkpointing": False}

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def text(start, length=5):
    return " ".join(WORDS[(start + i) % len(WORDS)] for i in range(length))


def reward(completions, **kwargs):
    return [float(len(set(completion.split()))) for completion in completions]


TEXTS = {
    "sft": {"text": [text(i) for i in range(24)]},
    "dpo": {name: [text(i + k) for i in range(24)] for k, name in enumerate(["prompt", "chosen", "rejected"])},
    "grpo": {"prompt": [text(i) for i in range(24)]},
    "rloo": {"prompt": [text(i) for i in range(24)]},
}
SAMPLING = {"num_generations": 4, "max_completion_length": 4, "beta": 0.1, "generation_kwargs": {"min_new_tokens": 4}}


def run(folder, kind, made_by_trl=True, callback=None, **options):
    """A short run; its watch and the adapter. The adapters are TRL's own, or were there before."""
    callback = callback or FlatPerturbCallback(sigma=0.1, schedule="constant")
    trainer_class, config = {
        "sft": (trl.SFTTrainer, trl.SFTConfig),
        "dpo": (trl.DPOTrainer, trl.DPOConfig),
        "grpo": (trl.GRPOTrainer, trl.GRPOConfig),
        "rloo": (trl.RLOOTrainer, trl.RLOOConfig),
    }[kind]
    samples = kind in ("grpo", "rloo")
    arguments = config(str(folder), **{**QUIET, **USUAL, **(SAMPLING if samples else {}), **options})
    more = {"reward_funcs": reward} if samples else {}
    trainer = trainer_class(
        model=llama() if made_by_trl else lora_llama(),
        args=arguments,
        train_dataset=datasets.Dataset.from_dict(TEXTS[kind]),
        processing_class=tokenizer(),
        peft_config=lora_config(task_type="CAUSAL_LM") if made_by_trl else None,
        callbacks=[callback],
        **more,
    )
    watch = Watch(trainer.model)
    trainer.train()
    assert watch.changed() == []
    return watch, adapter(trainer.model)


READS = {  # forwards without gradients in a step of so many micro-batches
    "sft": lambda micro_batches: 0,
    "dpo": lambda micro_batches: micro_batches,  # the reference's
    "grpo": lambda micro_batches: 4 + micro_batches,  # to sample four tokens for all of them at once; the reference's
}


@pytest.mark.parametrize("made_by_trl", [True, False], ids=["peft_config", "adapted before"])
@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("kind", ["sft", "dpo", "grpo"])
def test_training_forwards_are_perturbed_and_all_others_clean(tmp_path, kind, accumulation, made_by_trl):
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(FlatPerturb|policy ratio)")
        watch, trained = run(tmp_path, kind, made_by_trl, gradient_accumulation_steps=accumulation)
        of_plain, plain = run(
            tmp_path, kind, made_by_trl, FlatPerturbCallback(sigma=0.0), gradient_accumulation_steps=accumulation
        )
    assert watch.trained == [False] * STEPS * accumulation
    assert watch.read == of_plain.read == [True] * STEPS * READS[kind](accumulation)
    assert differing(trained, plain)


def test_generating_amid_a_window_finds_clean_weights(tmp_path):
    """Sampling anew for each micro-batch of a window, when W is perturbed already."""
    watch, _ = run(tmp_path, "grpo", gradient_accumulation_steps=4, steps_per_generation=1)
    assert watch.trained == [False] * STEPS * 4
    assert len(watch.read) >= STEPS * 4 * 4
    assert all(watch.read)


@pytest.mark.parametrize("kind", ["sft", "dpo"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(tmp_path, kind, reentrant):
    options = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": {"use_reentrant": reentrant}}
    watch, _ = run(tmp_path, kind, **options)
    assert len(watch.trained) >= STEPS
    assert not any(watch.trained)


@pytest.mark.parametrize("options", [{"num_iterations": 2}, {"steps_per_generation": 2}])
def test_grpo_says_what_to_set_where_the_policy_ratio_is_taken_across_the_noise(tmp_path, options):
    with pytest.warns(UserWarning, match="Set num_iterations=1, steps_per_generation a divisor") as told:
        watch, _ = run(tmp_path, "grpo", **options)
    assert sum("policy ratio" in str(w.message) for w in told) == 1
    assert not any(watch.trained)
    assert all(watch.read)


def test_rloo_always_says_that_its_ratio_is_taken_across_the_noise(tmp_path):
    with pytest.warns(UserWarning, match="policy ratio .* RLOO always takes it so"):
        watch, _ = run(tmp_path, "rloo")
    assert watch.trained == [False] * STEPS
    assert watch.read
    assert all(watch.read)


def test_vllms_correction_is_named_where_it_compares_across_the_noise(tmp_path):
    sampled = trl.GRPOConfig(str(tmp_path), use_vllm=True, use_cpu=True, bf16=False)
    with pytest.warns(UserWarning, match="policy ratio .*vllm_importance_sampling_correction=False"):
        _check_policy_ratio(sampled)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sampled.vllm_importance_sampling_correction = False
        _check_policy_ratio(sampled)
