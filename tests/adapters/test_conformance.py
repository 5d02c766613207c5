"""What every adapter is held to: its update is what merging adds, and a move of W moves what the layer applies one to one.

Every family of the installed PEFT is asked: it is on the allow-list and passes, adds to no weight matrix, or is refused.
"""

import math

import pytest
import torch
from helpers import trainable
from torch import nn

from flatopt.adapters.custom import CUSTOM
from flatopt.adapters.peft import ADDITIVE, NO_UPDATE, PEFT, UNTRANSPOSED, family
from flatopt.adapters.registry import find_weights
from flatopt.core.weight import AdaptedWeight

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
    except (TypeError, ValueError, NotImplementedError, KeyError, AttributeError, NameError):
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
        elif kind in ADDITIVE and hasattr(layer, "get_delta_weight"):
            if kind != "pvera":  # draws its update at random in training
                conforms(layer.train(), base, merge=False)
            # older PEFT merges FourierFT's and WaveFT's update of a Conv1D untransposed
            conforms(layer.eval(), base, merge=not (kind in UNTRANSPOSED and type(base).__name__ == "Conv1D"))
        else:
            with pytest.raises(ValueError, match=rf"a PEFT {kind} layer.*Leave it out: pass the other layers as"):
                find_weights([layer])
    assert tried, f"no layer could be made with {name}: give OPTIONS for it"


@pytest.mark.parametrize("name", sorted(set(FAMILIES) & {"hira", "deft", "peanut", "glora", "oft", "boft", "hra", "frod"}))
def test_what_is_refused_does_not_move_one_to_one(name):
    base = nn.Linear(32, 32)
    layer = adapted(base, FAMILIES[name](target_modules=["layer"], **OPTIONS.get(name, {}))).eval()
    weight = AdaptedWeight(base, "weight", "weight", layer, PEFT)
    move, E = moved(layer, weight, base)
    assert (move - E).abs().max() > 0.1 * E.abs().max()


def test_an_unknown_family_is_refused_by_name():
    class Newcomer(nn.Module, BaseTunerLayer):
        adapter_layer_names = ("newcomer_A",)

        def __init__(self):
            super().__init__()
            self.base_layer = nn.Linear(4, 4)

    Newcomer.__module__ = "peft.tuners.newcomer.layer"
    with pytest.raises(ValueError, match=r"^0 is a PEFT newcomer layer, which is not among those"):
        find_weights([nn.Sequential(Newcomer())])


def lora_variants():
    variants = {
        "rslora": {"use_rslora": True},
        "pissa": {"init_lora_weights": "pissa"},
        "olora": {"init_lora_weights": "olora"},
        "mica": {"init_lora_weights": "mica"},
        "bias": {"lora_bias": True},
    }
    if hasattr(peft, "KasaConfig"):
        variants["kasa"] = {"kasa_config": peft.KasaConfig()}
    if hasattr(peft, "VeloraConfig"):
        variants["velora"] = {"velora_config": peft.VeloraConfig()}
    if hasattr(peft, "BdLoraConfig"):
        for side in ("a", "b"):
            variants[f"bdlora {side}"] = {
                "use_bdlora": peft.BdLoraConfig(**{f"target_modules_bd_{side}": ["layer"]}, nblocks=2)
            }
    return variants


@pytest.mark.parametrize("name", lora_variants())
def test_ways_to_apply_lora(name):
    tried = 0
    for kind, make in BASES.items():
        if (name, kind) == ("olora", "Conv1D"):  # PEFT makes factors of the transposed shape
            continue
        layer = adapted(base := make(), peft.LoraConfig(r=4, target_modules=["layer"], **lora_variants()[name]))
        if layer is not None:
            tried += 1
            conforms(layer.train(), base, merge=False)
            conforms(layer.eval(), base)
    if not tried:
        pytest.skip(f"this PEFT has no {name}")


@pytest.mark.skipif(not hasattr(peft, "MontecloraConfig"), reason="this PEFT has no MonteCLoRA")
def test_a_way_to_apply_lora_that_is_not_known_is_refused_by_name():
    layer = adapted(nn.Linear(32, 32), peft.LoraConfig(target_modules=["layer"], monteclora_config=peft.MontecloraConfig()))
    with pytest.raises(ValueError, match=r"^Linear is a PEFT lora layer of the variant Monteclora.*Leave it out"):
        find_weights([layer])


@pytest.mark.skipif("alora_invocation_tokens" not in peft.LoraConfig.__dataclass_fields__, reason="this PEFT has no aLoRA")
def test_alora_is_lora_after_the_invocation():
    layer = adapted(base := nn.Linear(32, 48), peft.LoraConfig(target_modules=["layer"], alora_invocation_tokens=[1]))
    (weight,) = find_weights([layer])
    merged = base.weight.detach() + layer.get_delta_weight("default").detach()
    torch.testing.assert_close(merged_by_flatopt(weight), merged.double(), rtol=RTOL, atol=ATOL)
    move, E = moved(layer, weight, base)
    torch.testing.assert_close(move, E, rtol=RTOL, atol=ATOL)


@pytest.mark.parametrize("kind", ["Linear", "Conv2d", "Conv1D"])
def test_dora_tells_the_norm_of_the_rows_that_it_applies(kind):
    # a move of W is no move of what DoRA applies: it scales the rows to its magnitudes. What it is told is their norm
    layer = adapted(base := BASES[kind](), peft.LoraConfig(r=4, target_modules=["layer"], use_dora=True))
    (weight,) = find_weights([layer])
    (update,) = PEFT.updates([weight])
    for _ in range(2):
        norm = applied(layer, base).norm(dim=1)
        torch.testing.assert_close(update.row_norm.double().abs(), norm, rtol=RTOL, atol=ATOL)
        with torch.no_grad():
            base.weight.add_(0.1 * torch.randn_like(base.weight))


def test_dora_on_an_embedding():
    layer = adapted(base := nn.Embedding(48, 32), peft.LoraConfig(r=4, target_modules=["layer"], use_dora=True))
    (weight,) = find_weights([layer])
    torch.testing.assert_close(merged_by_flatopt(weight), applied(layer, base), rtol=RTOL, atol=ATOL)


def test_two_methods_on_one_weight():
    lora, loha = peft.LoraConfig(r=4, target_modules=["layer"]), peft.LoHaConfig(r=4, target_modules=["layer"])
    model = peft.PeftMixedModel(Net(base := nn.Linear(32, 48)), lora)
    model.add_adapter("other", loha)
    model.set_adapter(["default", "other"])
    layer = stir(model).base_model.model.layer
    assert isinstance(layer.base_layer, BaseTunerLayer)
    (weight,) = find_weights([model])
    torch.testing.assert_close(merged_by_flatopt(weight), applied(layer, base), rtol=RTOL, atol=ATOL)
    move, E = moved(layer, weight, base)
    torch.testing.assert_close(move, E, rtol=RTOL, atol=ATOL)
    layer.base_layer.merge()
    assert PEFT.is_merged(layer)


def test_a_layer_of_ia3_around_one_of_lora_is_refused():
    model = peft.PeftMixedModel(Net(nn.Linear(32, 48)), peft.LoraConfig(r=4, target_modules=["layer"]))
    try:
        model.add_adapter("other", peft.IA3Config(target_modules=["layer"], feedforward_modules=[]))
    except (ValueError, TypeError):
        pytest.skip("this PEFT does not mix them")
    with pytest.raises(ValueError, match="is a PEFT ia3 layer"):
        find_weights([model])


def test_attention_whose_weights_are_made_anew():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.MultiheadAttention(16, 2)

        def forward(self, x):
            return self.layer(x, x, x)[0]

    model = stir(peft.get_peft_model(Attention(), peft.LoraConfig(r=4, target_modules=["layer"])))
    weights = find_weights([model])
    assert [(w.name, w.rebuilt) for w in weights] == [("in_proj_weight", True), ("weight", True)]
    layer = model.base_model.model.layer
    told = [merged_by_flatopt(w) for w in weights]
    delta = layer.base_layer.out_proj.get_delta_weight("default").detach().double()
    torch.testing.assert_close(told[1], weights[1].parameter.detach().double() + delta, rtol=RTOL, atol=ATOL)
    layer.merge()  # of out_proj it adds the update twice, which is told once
    torch.testing.assert_close(weights[0].parameter.detach().double(), told[0], rtol=RTOL, atol=ATOL)


# --- layers of others ---------------------------------------------------------------------------------------------------


def loralib_layers():
    lora = pytest.importorskip("loralib")
    return {
        "Linear": lora.Linear(16, 24, r=4),
        "Linear (in, out)": lora.Linear(16, 24, r=4, fan_in_fan_out=True),
        "MergedLinear": lora.MergedLinear(16, 24, r=4, enable_lora=[True, False, True]),
        "MergedLinear (in, out)": lora.MergedLinear(16, 24, r=4, enable_lora=[True, False, True], fan_in_fan_out=True),
        "Embedding": lora.Embedding(12, 16, r=4),
        "Conv2d": lora.Conv2d(4, 6, kernel_size=3, r=2),
    }


@pytest.mark.parametrize(
    "kind", ["Linear", "Linear (in, out)", "MergedLinear", "MergedLinear (in, out)", "Embedding", "Conv2d"]
)
def test_loralib(kind):
    layer = loralib_layers()[kind]
    stir(layer)
    base = layer.conv if kind == "Conv2d" else layer
    answers = nn.Linear(16, 24) if "(in, out)" in kind else base  # tells applied() the inputs
    (weight,) = find_weights([layer])
    told = merged_by_flatopt(weight)
    torch.testing.assert_close(told, applied(layer, answers), rtol=RTOL, atol=ATOL)
    move, E = moved(layer, weight, answers)
    torch.testing.assert_close(move, E, rtol=RTOL, atol=ATOL)
    layer.eval()
    assert CUSTOM.is_merged(layer)
    torch.testing.assert_close(weight.rows(weight.parameter.detach()).double(), told, rtol=RTOL, atol=ATOL)


def test_a_loralib_layer_of_rank_0_is_a_plain_layer():
    lora = pytest.importorskip("loralib")
    assert find_weights([lora.Linear(4, 4, r=0)]) == []


@pytest.mark.parametrize("algorithm", ["lora", "loha", "lokr"])
@pytest.mark.parametrize("options", [{}, {"bypass_mode": True}, {"use_tucker": True}, {"dora_wd": True}], ids=str)
@pytest.mark.parametrize("make", [lambda: nn.Linear(16, 24), lambda: nn.Conv2d(8, 12, 3)], ids=["Linear", "Conv2d"])
def test_lycoris(algorithm, options, make):
    lycoris = pytest.importorskip("lycoris")
    lycoris.LycorisNetwork.apply_preset({"target_module": ["Linear", "Conv2d"], "enable_conv": True})
    model = nn.Sequential(base := make()).requires_grad_(False)
    sizes = {"linear_dim": 4, "conv_dim": 4, "linear_alpha": 2.0, "conv_alpha": 2.0}
    network = lycoris.create_lycoris(model, 0.7, algo=algorithm, **sizes, **options)
    network.apply_to()
    stir(network)
    (weight,) = find_weights([network])
    assert weight.owner is base
    torch.testing.assert_close(merged_by_flatopt(weight), applied(base, base), rtol=RTOL, atol=ATOL)
    if not options.get("dora_wd"):
        move, E = moved(base, weight, base)
        torch.testing.assert_close(move, E, rtol=RTOL, atol=ATOL)


def test_torchtune():
    peft_of = pytest.importorskip(
        "torchtune.modules.peft", reason="torchtune 0.6.1 needs torchao 0.17 or older, docs/extending.md"
    )
    layer = peft_of.LoRALinear(16, 24, rank=4, alpha=8.0)
    layer.weight.requires_grad_(False)
    stir(layer)
    conforms(layer, layer, merge=False)
    layer.disabled = True
    conforms(layer, layer, merge=False)
    dora = peft_of.DoRALinear(16, 24, rank=4, alpha=8.0)
    dora.initialize_dora_magnitude()
    dora.weight.requires_grad_(False)
    stir(dora)
    (update,) = CUSTOM.updates(find_weights([dora]))
    torch.testing.assert_close(update.row_norm.double().abs(), applied(dora, dora).norm(dim=1), rtol=RTOL, atol=ATOL)


def test_xlora_which_mixes_adapters_by_token_is_refused(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = {"hidden_size": 24, "ffn_dim": 24, "num_hidden_layers": 1, "num_attention_heads": 2, "word_embed_proj_dim": 24}

    def opt():
        config = transformers.OPTConfig(**shape, vocab_size=50, max_position_embeddings=16, use_cache=False)
        return transformers.OPTForCausalLM(config)

    lora = peft.LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(opt(), lora).save_pretrained(tmp_path)
    base = opt().requires_grad_(False)
    config = peft.XLoraConfig(task_type="CAUSAL_LM", hidden_size=24, adapters={"one": str(tmp_path), "two": str(tmp_path)})
    model = peft.get_peft_model(base, config)
    with pytest.raises(ValueError, match=r"a PEFT xlora layer, which cannot tell the update.*Leave it out"):
        find_weights([model])
