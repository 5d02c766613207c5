"""QLoRA as transformers and PEFT do it, against a dense model whose weights are dequant(W) + ε."""

import copy

import pytest
import torch
from helpers import bits, on_every_device, std_in, trainable
from torch import nn

from flatopt import FlatPerturbOptimizer
from flatopt.adapters.quantized import format_of
from flatopt.core.weight import AdaptedWeight, WeightUpdate, WeightView
from flatopt.ops.noise import normals, step_key, weight_key
from flatopt.perturbation import forward
from flatopt.perturbation.forward import ForwardPlan, own_forwards

transformers = pytest.importorskip("transformers")
peft = pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")
pytest.importorskip("accelerate")

KEY = step_key(0, 0, 0)


@pytest.fixture
def folder(tmp_path):
    config = transformers.LlamaConfig(
        vocab_size=64, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    return tmp_path


def quantised_base(folder, device="cpu", **quantization):
    config = transformers.BitsAndBytesConfig(**quantization)
    model = transformers.LlamaForCausalLM.from_pretrained(folder, quantization_config=config, device_map=device)
    for module in model.modules():
        module.support_avx512bf16_for_cpu = False  # there bitsandbytes repacks W in eval mode, to be trained no more
    return model


def qlora(folder, device="cpu", **quantization):
    model = quantised_base(folder, device, **quantization)
    model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=True)
    config = peft.LoraConfig(r=4, target_modules="all-linear", lora_dropout=0.0, init_lora_weights=False)
    return peft.get_peft_model(model, config).train()


def lora_layers(model):
    return [m for m in model.modules() if hasattr(m, "lora_A") and hasattr(m, "base_layer")]


def views_of(model):
    views = []
    for number, layer in enumerate(lora_layers(model), 1):
        factors = layer.lora_B["default"].weight.detach(), layer.lora_A["default"].weight.detach(), layer.scaling["default"]
        weight = AdaptedWeight(layer.base_layer, "weight", f"layer {number}", layer, None)
        views.append(WeightView(weight, number, update=WeightUpdate((factors,))))
    return views


def dense_at_noise(model, plan, key=KEY):
    """A copy of ``model`` with plain layers of dequant(W) + ε."""
    dense = copy.deepcopy(model)
    for view, twin in zip(plan.views, lora_layers(dense)):
        owner = view.weight.owner
        weight = format_of(owner, "weight").dequantize(owner, owner.weight).float()
        linear = nn.Linear(weight.shape[1], len(weight), bias=False)
        noise = normals(weight_key(key, view.index), *weight.shape).to(weight.device)
        linear.weight = nn.Parameter(weight + std_in(plan, view) * noise, requires_grad=False)
        twin.base_layer = linear
    return dense


def loss_and_gradients(model, tokens):
    model.zero_grad()
    loss = model(input_ids=tokens, labels=tokens).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


ON_CUDA = 10  # times less exact: the kernels approximate log, sine and cosine
QUANTIZATIONS = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "nf4, double quantised": {
        **{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
        "bnb_4bit_use_double_quant": True,
    },
}


@pytest.mark.parametrize("quantization", QUANTIZATIONS.values(), ids=QUANTIZATIONS)
@pytest.mark.parametrize("batched_on", [set(), {"cuda", "cpu"}], ids=["one by one", "together"])
@on_every_device
def test_loss_and_adapter_gradients_are_the_dense_models(folder, quantization, batched_on, device, monkeypatch):
    monkeypatch.setattr(forward, "BATCHED_ON", batched_on)
    model, tokens = qlora(folder, device, **quantization), torch.randint(64, (2, 16)).to(device)
    plan = ForwardPlan(views_of(model), "filter")
    plan.fill_std(0.2)
    plan.perturb(KEY)
    loss, gradients = loss_and_gradients(model, tokens)
    expected_loss, expected = loss_and_gradients(dense_at_noise(model, plan), tokens)
    slack = ON_CUDA if device == "cuda" else 1
    torch.testing.assert_close(loss, expected_loss, rtol=1e-6 * slack, atol=0)
    assert gradients.keys() == expected.keys()
    for name in gradients:
        torch.testing.assert_close(gradients[name], expected[name], rtol=1e-4 * slack, atol=1e-6 * slack)

    plan.restore()
    clean, _ = loss_and_gradients(model, tokens)
    assert (clean - loss).abs() > 1e-4
    own_forwards(view.weight for view in plan.views)
    assert torch.equal(loss_and_gradients(model, tokens)[0], clean)


@on_every_device
def test_the_optimizer_puts_noise_into_the_forward_of_quantised_layers_by_itself(folder, device):
    model, tokens = qlora(folder, device, **QUANTIZATIONS["nf4"]), torch.randint(64, (2, 16)).to(device)
    packed = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    bare = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    optimizer = FlatPerturbOptimizer(bare, model, sigma=0.2, schedule="constant", seed=3)
    with torch.no_grad():
        clean = model.eval()(input_ids=tokens, labels=tokens).loss
    model.train()
    for step in range(3):
        loss, gradients = loss_and_gradients(model, tokens)
        assert optimizer.is_perturbed
        twin = copy.deepcopy(model)
        plan = ForwardPlan(views_of(twin), "filter")
        plan.fill_std(0.2)
        dense = dense_at_noise(twin, plan, step_key(3, step, 0))
        expected_loss, expected = loss_and_gradients(dense, tokens)
        slack = ON_CUDA if device == "cuda" else 1
        torch.testing.assert_close(loss, expected_loss, rtol=1e-5 * slack, atol=0)
        for name in gradients:
            torch.testing.assert_close(gradients[name], expected[name], rtol=1e-3 * slack, atol=1e-6 * slack)
        again, _ = loss_and_gradients(model, tokens)  # the next micro-batch
        assert torch.equal(again, loss)
        with torch.no_grad():  # an evaluation amid the step
            model.eval()(input_ids=tokens)
            model.train()
        again, _ = loss_and_gradients(model, tokens)
        assert torch.equal(again, loss)
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad():
        assert not torch.equal(model.eval()(input_ids=tokens, labels=tokens).loss, clean)  # trained, that is
    assert all(torch.equal(p, packed[n]) for n, p in model.named_parameters() if n in packed)
    optimizer.detach()
    assert not any("forward" in layer.base_layer.__dict__ for layer in lora_layers(model))


def test_quantised_and_plain_layers_in_one_model(folder):
    model, tokens = (
        qlora(folder, llm_int8_skip_modules=["gate_proj", "up_proj", "down_proj"], **QUANTIZATIONS["nf4"]),
        torch.randint(64, (2, 16)),
    )
    kinds = {type(layer.base_layer.weight).__name__ for layer in lora_layers(model)}
    assert kinds == {"Params4bit", "Parameter"}
    before = {n: p.detach().clone() for n, p in model.named_parameters() if not p.requires_grad}
    bare = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with FlatPerturbOptimizer(bare, model, sigma=0.2, schedule="constant") as optimizer:
        loss_and_gradients(model, tokens)
        moved = {n for n, p in model.named_parameters() if n in before and not torch.equal(p, before[n])}
        assert moved == {n for n in before if ".mlp." in n}
        optimizer.step()
        assert all(torch.equal(p, before[n]) for n, p in model.named_parameters() if n in before)
        optimizer.perturb_groups[0]["noise"] = "isotropic"
        with pytest.raises(ValueError, match="groups of their own"):
            loss_and_gradients(model, tokens)
        assert not optimizer.is_perturbed


@on_every_device
def test_int8_trains_with_the_noise_added(folder, device):
    model, tokens = qlora(folder, device, load_in_8bit=True), torch.randint(64, (2, 16)).to(device)
    plan = ForwardPlan(views_of(model), "filter")
    _, clean_gradients = loss_and_gradients(model, tokens)
    plan.fill_std(0.2)
    plan.perturb(KEY)
    loss, gradients = loss_and_gradients(model, tokens)
    expected, expected_gradients = loss_and_gradients(dense_at_noise(model, plan), tokens)
    # the dense layers do not round their inputs to 8 bits
    torch.testing.assert_close(loss, expected, rtol=5e-3, atol=0)
    for name, gradient in gradients.items():
        off = (gradient - expected_gradients[name]).norm() / expected_gradients[name].norm()
        assert off < 0.5 * (clean_gradients[name] - expected_gradients[name]).norm() / expected_gradients[name].norm()


def test_merging_into_four_bits_merges_no_noise(folder):
    model = qlora(folder, **QUANTIZATIONS["nf4"])
    expected = copy.deepcopy(model).merge_and_unload().state_dict()
    plan = ForwardPlan(views_of(model), "filter")
    plan.fill_std(0.2)
    plan.perturb(KEY)
    plan.restore()
    merged = model.merge_and_unload()
    own_forwards(view.weight for view in plan.views)
    state = merged.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@on_every_device
@pytest.mark.parametrize("kind", ["nf4, double quantised", "int8"])
def test_transformers_trainer_trains_it(folder, kind, device, tmp_path):
    from flatopt.integrations.transformers import FlatPerturbCallback

    tokens = torch.randint(64, (16, 12))
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    kept, adapters, losses = [], [], {0.0: [], 0.2: []}
    for sigma, seen in losses.items():
        torch.manual_seed(0)
        model = qlora(folder, device, **QUANTIZATIONS.get(kind, {"load_in_8bit": True}))
        packed = {n: bits(p).clone() for n, p in model.named_parameters() if not p.requires_grad}
        model.register_forward_hook(lambda module, args, output, seen=seen: seen.append(output.loss.item()))
        options = {"max_steps": 4, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "report_to": []}
        options |= {"learning_rate": 1e-2, "seed": 1, "save_strategy": "no", "use_cpu": device == "cpu"}
        trainer = transformers.Trainer(
            model,
            transformers.TrainingArguments(str(tmp_path / str(sigma)), **options),
            train_dataset=rows,
            callbacks=[FlatPerturbCallback(sigma=sigma, schedule="constant")],
        )
        trainer.train()
        kept.append(all(torch.equal(bits(p), packed[n]) for n, p in model.named_parameters() if n in packed))
        adapters.append(torch.cat([p.detach().flatten().float().cpu() for p in trainable(model)]))
    assert kept == [True, True]
    plain, noisy = losses.values()
    assert len(plain) == len(noisy) == 8
    assert abs(noisy[0] - plain[0]) > 1e-4 * plain[0]
    assert not torch.equal(*adapters)
    assert all(torch.isfinite(some).all() for some in adapters)


def test_adalora_on_a_4_bit_base_tells_its_update_in_factors(folder):
    model = quantised_base(folder, load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32)
    config = peft.AdaLoraConfig(init_r=4, target_r=2, total_step=10, target_modules=["q_proj"], init_lora_weights=False)
    model = peft.get_peft_model(model, config).train()
    tokens = torch.randint(64, (2, 8))
    with torch.no_grad():
        clean = model(input_ids=tokens).logits
    optimizer = FlatPerturbOptimizer(torch.optim.SGD(trainable(model), lr=0.0), model, sigma=0.3, schedule="constant")
    noisy = model(input_ids=tokens).logits
    assert (noisy - clean).norm() > 0.01 * clean.norm()
    weight = optimizer.perturb_groups[0]["targets"][0]
    layer = weight.layer
    W = format_of(weight.owner, "weight").dequantize(weight.owner, weight.parameter).float()
    merged = W + layer.lora_B.default @ (layer.lora_A.default * layer.lora_E.default) * (
        layer.scaling["default"] / (layer.ranknum.default + 1e-5)
    )
    (plan,) = optimizer._weights._plans
    view = next(view for view in plan.views if view.weight is weight)
    expected = 0.3 * merged.norm(dim=1, keepdim=True) / W.shape[1] ** 0.5
    torch.testing.assert_close(std_in(plan, view), expected.detach(), rtol=1e-3, atol=0)
    noisy.sum().backward()
    optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=tokens).logits, clean)
