"""Tiny models made from their configs, data for them, and a watch over what their forwards find."""

import torch
from helpers import bits

WORDS = [f"w{i}" for i in range(40)]


def llama(**config):
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    tokens = {"vocab_size": 44, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **tokens, **config}))


def lora_config(**config):
    from peft import LoraConfig

    targets = ["q_proj", "v_proj", "down_proj"]
    return LoraConfig(**{"r": 2, "target_modules": targets, "init_lora_weights": False, "lora_dropout": 0.1, **config})


def lora_llama(**config):
    from peft import get_peft_model

    model = llama()
    torch.manual_seed(4)
    return get_peft_model(model, lora_config(task_type="CAUSAL_LM", **config))


def t5():
    from peft import get_peft_model
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(3)
    shape = {"vocab_size": 44, "d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 1, "num_heads": 2}
    model = T5ForConditionalGeneration(T5Config(**shape, pad_token_id=0, eos_token_id=2, decoder_start_token_id=0))
    return get_peft_model(model, lora_config(task_type="SEQ_2_SEQ_LM", target_modules=["q", "v"]))


def tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", padding_side="left"
    )


def rows(count=24, length=8, seed=1):
    tokens = torch.randint(4, 44, (count, length), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in tokens]


class Watch:
    """Whether each forward of the first adapted layer in ``model`` found W clean; ``trained`` has those with gradients."""

    def __init__(self, model):
        name, self.layer = next((n, m) for n, m in model.named_modules() if hasattr(m, "base_layer"))
        self.name, self.clean = name, bits(self.layer.base_layer.weight).clone()
        self.frozen = {n: bits(p).clone() for n, p in model.named_parameters() if not p.requires_grad}
        self.model, self.trained, self.read = model, [], []
        self.layer.base_layer.register_forward_pre_hook(self._look)

    def is_clean(self):
        return torch.equal(bits(self.layer.base_layer.weight), self.clean)

    def _look(self, module, args):
        in_backward = torch._C._current_graph_task_id() != -1
        trains = self.layer.training and (torch.is_grad_enabled() or in_backward)
        (self.trained if trains else self.read).append(self.is_clean())

    def changed(self):
        """Names of frozen parameters whose bits are not what they were."""
        return [n for n, p in self.model.named_parameters() if n in self.frozen and not torch.equal(bits(p), self.frozen[n])]


def adapter(model):
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def differing(first, second):
    assert first.keys() == second.keys()
    return [name for name in first if not torch.equal(first[name], second[name])]
