"""Shared by the tests: a tiny network with LoRA, and weights as bits."""

import pytest
import torch
from torch import nn

CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]  # marks
on_every_device = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=CUDA)])
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def bits(tensor):
    """The tensor's bits as integers: tells -0.0 from 0.0 and one NaN from another."""
    return tensor.detach().cpu().contiguous().view(BITS[tensor.element_size()])


class Mlp(nn.Module):
    def __init__(self, width=32, classes=5):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, classes)

    def forward(self, x):
        return self.head(torch.relu(self.second(torch.relu(self.first(x)))))


def lora_mlp(dtype=torch.float32, **config):
    """:class:`Mlp` with PEFT LoRA on all three layers, the B factors not zero."""
    from peft import LoraConfig, get_peft_model

    config = {"r": 4, "target_modules": ["first", "second", "head"], "init_lora_weights": False, **config}
    return get_peft_model(Mlp(), LoraConfig(**config)).to(dtype)


def twin_on_the_same_base(model):
    """An :class:`Mlp` on the frozen tensors of ``model``, an adapted one."""
    twin, base = Mlp(), model.get_base_model()
    for name in ("first", "second", "head"):
        layer = getattr(base, name).base_layer
        getattr(twin, name).weight, getattr(twin, name).bias = layer.weight, layer.bias
    return twin


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def frozen(model):
    """Name -> clone of every frozen parameter."""
    return {name: p.detach().clone() for name, p in model.named_parameters() if not p.requires_grad}


def changed(model, before):
    """Names of the parameters in ``before`` that no longer have the same bits."""
    now = dict(model.named_parameters())
    return [name for name, w in before.items() if not torch.equal(bits(now[name]), bits(w))]


def batch(rows=8, dtype=torch.float32, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(rows, 16, generator=g).to(dtype), torch.randint(5, (rows,), generator=g)


def skip_unless_traced_whole(model):
    """torch 2.4 does not trace into the context manager in PEFT's forward."""
    try:
        torch.compile(model, backend="eager", fullgraph=True)(batch()[0])
    except torch._dynamo.exc.Unsupported as reason:
        pytest.skip(f"torch {torch.__version__} breaks the graph without flatopt too: {reason}")
    finally:
        torch._dynamo.reset()


def std_in(plan, view):
    """The std of the noise that a layer's forward puts on ``view``: ``(m, 1)`` or ``(1, 1)``; for "element", of |W|."""
    return plan._layers[plan.views.index(view)].noisy.std
