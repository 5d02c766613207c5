"""Models by shape, with random weights: each with LoRA r 8 on all its linear layers, a batch, and the loss on it."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from peft import LoraConfig, get_peft_model
from torch import nn


@dataclass
class Case:
    model: nn.Module
    loss: Callable[[], torch.Tensor]
    what: str


def adapted(model: nn.Module, **targets) -> nn.Module:
    return get_peft_model(model, LoraConfig(r=8, lora_alpha=16, **targets)).train()


def llama(device: str, dtype: torch.dtype, **shape: int):
    """A ``LlamaForCausalLM`` without an adapter, of Llama-2-7B's shape but for ``shape``."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(use_cache=False, **shape), dtype=dtype)


def _language_model(base, batch: int, length: int, what: str) -> Case:
    tokens = torch.randint(base.config.vocab_size, (batch, length), device=base.device)
    model = adapted(base, target_modules="all-linear", task_type="CAUSAL_LM")
    return Case(model, lambda: model(input_ids=tokens, labels=tokens).loss, f"{what}, {batch} x {length} tokens")


def llama_7b(device: str) -> Case:
    return _language_model(llama(device, torch.bfloat16), 2, 1024, "Llama-2-7B shape, bf16, adapter fp32")


def t5_base(device: str) -> Case:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=768, d_kv=64, d_ff=3072, num_layers=12, num_heads=12, use_cache=False, decoder_start_token_id=0
    )
    with torch.device(device):
        base = T5ForConditionalGeneration(config)
        source, labels = torch.randint(config.vocab_size, (32, 128)), torch.randint(config.vocab_size, (32, 8))
    model = adapted(base, target_modules="all-linear", task_type="SEQ_2_SEQ_LM")

    def loss() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return model(input_ids=source, labels=labels).loss

    return Case(model, loss, "T5-base shape, fp32 under bf16 autocast, 32 x 128 tokens")


def vit_b32(device: str) -> Case:
    import timm

    with torch.device(device):
        base = timm.create_model("vit_base_patch32_224", num_classes=100)
        images, labels = torch.randn(32, 3, 224, 224), torch.randint(100, (32,))
    model = adapted(base, target_modules=["qkv", "attn.proj", "fc1", "fc2"])

    def loss() -> torch.Tensor:
        with torch.autocast(device, dtype=torch.bfloat16):
            return nn.functional.cross_entropy(model(images).float(), labels)

    return Case(model, loss, "ViT-B/32, fp32 under bf16 autocast, 32 images")


def tiny(device: str) -> Case:
    shape = {"hidden_size": 512, "intermediate_size": 1376, "num_hidden_layers": 4, "num_attention_heads": 8}
    base = llama(device, torch.float32, vocab_size=1000, **shape)
    return _language_model(base, 8, 64, "Llama of 4 layers, 512 wide, fp32")


MODELS = {"llama-7b": llama_7b, "t5-base": t5_base, "vit-b32": vit_b32, "tiny": tiny}
ON_GPU = ["llama-7b", "t5-base", "vit-b32"]  # unless others are asked for
