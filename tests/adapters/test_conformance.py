"""What every adapter is held to: its update is what merging adds, and a move of W moves what the layer applies one to one.

Every family of the installed PEFT is asked: it is on the allow-list and passes, adds to no weight matrix, or is refused.
"""

import math

import pytest
import torch
from conftest import trainable
from torch import nn

from flatopt.adapters.peft import ADDITIVE, NO_UPDATE, family
from flatopt.adapters.registry import find_weights

peft = pytest.importorskip("peft")
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING  # noqa: E402
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer  # noqa: E402

FAMILIES = {
    kind.value.lower(): PEFT_TYPE_TO_CONFIG_MAPPING[kind]
    for kind, tuner in PEFT_TYPE_TO_TUNER_MAPPING.items()
    if isinstance(tuner, type) and issubclass(tuner, BaseTuner)
}
WHOLE_MODEL = {"xlora", "shadow"}  # no config of their own for a single layer
OPTIONS = {
    "adalora": {"total_step": 100},
    "c3a": {"block_size": 16},
    "fourierft": {"n_frequency": 50},
    "ia3": {"feedforward_modules": []},
    "miss": {"r": 4},
    "bone": {"r": 4},
    "road": {"group_size": 16},
    "shira": {"r": 2},
    "vblora": {"vector_length": 16, "num_vectors": 32},
    "waveft": {"n_frequency": 50},
}
RTOL, ATOL = 1e-4, 1e-5


class Net(nn.Module):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(x)


def conv1d():
    return pytest.importorskip("transformers.pytorch_utils").Conv1D(48, 32)


BASES = {
    "Linear": lambda: nn.Linear(32, 48),
    "square Linear": lambda: nn.Linear(32, 32),
    "Conv2d": lambda: nn.Conv2d(32, 16, 3),
    "Embedding": lambda: nn.Embedding(48, 32),
    "Conv1D": conv1d,
    "square Conv1D": lambda: type(conv1d())(32, 32),
}


def stir(model):
    """Give every trainable parameter values as if it had been trained."""
    with torch.no_grad():
        for parameter in trainable(model):
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


def adapted(base, config):
    """The adapted layer, as if trained; None where the method does not go on such a layer."""
    try:
        model = peft.get_peft_model(Net(base), config)
    except (TypeError, ValueError, NotImplementedError, KeyError, AttributeError):
        return None
    layers = [module for module in stir(model).modules() if isinstance(module, BaseTunerLayer)]
    if layers:
        layers[0].__dict__["keep"] = model  # VeRA and others share tensors that the model holds
    return layers[0] if layers else None


def applied(layer, base):
    """The matrix a layer applies, outputs x inputs, as its answers to the unit vectors."""
    with torch.no_grad():
        if isinstance(base, nn.Embedding):
            return layer(torch.arange(base.num_embeddings)).double()
        shape = (base.in_channels, *base.kernel_size) if hasattr(base, "kernel_size") else (base.weight.shape[1],)
        if type(base).__name__ == "Conv1D":
            shape = (base.weight.shape[0],)
        n = math.prod(shape)
        answers = layer(torch.eye(n).view(n, *shape)) - layer(torch.zeros(1, *shape))
    return answers.flatten(1).t().double()


def merged_by_flatopt(weight):
    """W' in rows x fan-in, from what ``updates`` tells."""
    (update,) = weight.adapter.updates([weight])
    rows = weight.rows(weight.parameter.detach()).double()
    if update.alpha is not None:
        rows = update.alpha.double().unsqueeze(1) * rows
    for B, A, scaling in update.factors:
        rows = rows + scaling * (B.double() @ A.double())
    return rows if update.dense is None else rows + update.dense.double()


def moved(layer, weight, base):
    """How a random move E of W moves what the layer applies, and E itself."""
    with torch.no_grad():
        E = 0.1 * torch.randn_like(weight.parameter)
        before, clean = applied(layer, base), weight.parameter.detach().clone()
        weight.parameter.add_(E)
        after = applied(layer, base)
        weight.parameter.copy_(clean)
    return after - before, weight.rows(E).double()


def conforms(layer, base, merge=True):
    (weight,) = find_weights([layer])
    assert weight.owner is base
    told = merged_by_flatopt(weight)
    torch.testing.assert_close(told, applied(layer, base), rtol=RTOL, atol=ATOL)
    move, E = moved(layer, weight, base)
    torch.testing.assert_close(move, E, rtol=RTOL, atol=ATOL)
    if merge:
        assert not weight.adapter.is_merged(layer)
        layer.merge()
        assert weight.adapter.is_merged(layer)
        torch.testing.assert_close(weight.rows(weight.parameter.detach()).double(), told, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("name", sorted(set(FAMILIES) - WHOLE_MODEL))
def test_every_family_of_peft_conforms_or_is_refused(name):
    tried = 0
    for make in BASES.values():
        base = make()
        layer = adapted(base, FAMILIES[name](target_modules=["layer"], **OPTIONS.get(name, {})))
        if layer is None:
            continue
        tried += 1
        kind = family(layer)
        if kind in NO_UPDATE:
            assert find_weights([layer]) == []
        elif kind in ADDITIVE:
            if kind != "pvera":  # draws its update at random in training
                conforms(layer.train(), base, merge=False)
            conforms(layer.eval(), base)
        else:
            with pytest.raises(ValueError, match=rf"a PEFT {kind} layer.*Leave it out: pass the other layers as"):
                find_weights([layer])
    assert tried, f"no layer could be made with {name}: give OPTIONS for it"
