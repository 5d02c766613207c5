"""GLUE with T5 and transformers' Seq2SeqTrainer, plain and flat side by side, by the paper's recipe.

    pip install -e '.[peft]' datasets scikit-learn rich scipy
    python examples/finetune_t5.py --task cola                 # T5-base on GLUE: needs a network and a GPU
    python examples/finetune_t5.py                             # offline: a stand-in on text that is on this machine

The recipe is Li et al.'s (ICML 2025): r 8, alpha 16, lr 5e-4 with a cosine, batch 32, 10 epochs (1 for MNLI and QNLI), sigma
0.05, accuracy on the development set by what the model writes. We have not run it. Offline, a small T5 that reads bytes
learns on the spot to tell docstrings of torch from NumPy's, and is then adapted, from 128 labels, to do the same for
transformers and scikit-learn.
"""

import argparse
import copy

import numpy as np
import torch
from datasets import Dataset, load_dataset
from docstrings import offline_data
from paired import show
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    ByT5Tokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    T5Config,
    T5ForConditionalGeneration,
    set_seed,
)

from flatopt.integrations.transformers import FlatPerturbCallback

GLUE = {"mnli": 1, "qnli": 1, "sst2": 10, "cola": 10, "mrpc": 10}  # epochs
OFFLINE = {"sigma": 0.2, "lr": 5e-3, "epochs": 20, "source_epochs": 6}


def glue_data(task: str) -> "tuple[Dataset, Dataset]":
    data = load_dataset("nyu-mll/glue", task)
    names = data["train"].features["label"].names
    fields = [name for name in data["train"].column_names if name not in ("label", "idx")]

    def row(each: dict) -> "dict[str, str]":
        return {"text": " ".join([task, *(f"{name}: {each[name]}" for name in fields)]), "target": names[each["label"]]}

    validation = data["validation_matched" if task == "mnli" else "validation"]
    return data["train"].map(row, remove_columns=fields), validation.map(row, remove_columns=fields)


def train(
    model, tokenizer, train_rows: Dataset, test_rows: Dataset, seed: int, epochs: float, lr: float, args, callbacks=()
) -> "dict[str, float]":
    """Accuracy and loss on ``test_rows`` after training what is trainable in ``model``."""

    def encode(rows: Dataset) -> Dataset:
        return rows.map(
            lambda each: {
                "input_ids": tokenizer(each["text"], truncation=True, max_length=128)["input_ids"],
                "labels": tokenizer(text_target=each["target"])["input_ids"],
            },
            remove_columns=rows.column_names,
        )

    def accuracy(prediction) -> "dict[str, float]":
        written, wanted = (
            tokenizer.batch_decode(np.where(ids == -100, tokenizer.pad_token_id, ids), skip_special_tokens=True)
            for ids in (prediction.predictions, prediction.label_ids)
        )
        return {"accuracy": 100 * float(np.mean([w.strip() == t.strip() for w, t in zip(written, wanted)]))}

    trainer = Seq2SeqTrainer(
        model,
        Seq2SeqTrainingArguments(
            output_dir=args.out,
            num_train_epochs=epochs,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            learning_rate=lr,
            lr_scheduler_type="cosine",
            predict_with_generate=True,
            generation_max_length=24,
            use_cpu=not torch.cuda.is_available(),
            save_strategy="no",
            logging_strategy="no",
            report_to="none",
            seed=seed,
        ),
        train_dataset=encode(train_rows),
        eval_dataset=encode(test_rows),
        data_collator=DataCollatorForSeq2Seq(tokenizer, model),
        compute_metrics=accuracy,
        callbacks=list(callbacks),
    )
    trainer.train()
    scores = trainer.evaluate()
    return {"accuracy, %": scores["eval_accuracy"], "loss, nats": scores["eval_loss"]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--task", choices=GLUE, help="a GLUE task; without it, the offline stand-in")
    parser.add_argument("--model", default="google-t5/t5-base", help="with --task (%(default)s)")
    parser.add_argument("--rank", type=int, default=8, help="of the adapters (%(default)s)")
    parser.add_argument("--sigma", type=float, help="strength of the noise of the flat run (.05; offline .2)")
    parser.add_argument("--lr", type=float, help="peak learning rate (5e-4; offline 5e-3)")
    parser.add_argument("--seeds", type=int, default=3, help="paired runs (%(default)s)")
    parser.add_argument("--out", default="out/finetune_t5", help="folder of the Trainer (%(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="offline, one seed, two epochs: shows that it runs, and nothing else"
    )
    args = parser.parse_args()
    offline = args.task is None
    args.sigma = args.sigma if args.sigma is not None else OFFLINE["sigma"] if offline else 0.05
    args.lr = args.lr if args.lr is not None else OFFLINE["lr"] if offline else 5e-4
    args.seeds = 1 if args.tiny else args.seeds
    epochs = 2 if args.tiny else OFFLINE["epochs"] if offline else GLUE[args.task]

    runs = []
    for seed in range(args.seeds):
        set_seed(seed)
        if offline:
            source, train_rows, test_rows = offline_data(args.tiny)
            tokenizer = ByT5Tokenizer()
            config = T5Config(
                vocab_size=384, d_model=64, d_kv=16, d_ff=128, num_layers=3, num_heads=4, decoder_start_token_id=0
            )
            base = T5ForConditionalGeneration(config)
            train(base, tokenizer, source, test_rows, seed, 1 if args.tiny else OFFLINE["source_epochs"], 2e-3, args)
        else:
            train_rows, test_rows = glue_data(args.task)
            base, tokenizer = AutoModelForSeq2SeqLM.from_pretrained(args.model), AutoTokenizer.from_pretrained(args.model)
        run = {}
        for arm, sigma in (("plain", 0.0), ("flat", args.sigma)):
            set_seed(seed)
            lora = LoraConfig(r=args.rank, lora_alpha=16, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")
            model = get_peft_model(copy.deepcopy(base), lora)
            flat = [FlatPerturbCallback(sigma=sigma, seed=seed)] if sigma > 0 else []  # <- all that differs
            run[arm] = train(model, tokenizer, train_rows, test_rows, seed, epochs, args.lr, args, flat)
        runs.append(run)
    show(f"{args.task or 'docstrings (offline stand-in)'}, r {args.rank}, sigma {args.sigma}", runs)


if __name__ == "__main__":
    main()
