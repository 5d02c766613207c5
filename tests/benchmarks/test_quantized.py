"""benchmarks.quantized on a model of its own that trains in a moment."""

import json

import pytest
import torch
from helpers import Mlp, batch
from torch.nn.functional import cross_entropy

pytest.importorskip("peft")
from benchmarks.quantized import methods, report, study
from benchmarks.quantized.methods import METHOD, Trainer, group_noise
from benchmarks.quantized.rivals import RIVALS, noise_of
from flatopt.flatness import rounding


class Toy:
    name, targets, rank, lr, batch, steps, dtype = "toy", ("first", "second"), 2, 1e-2, 4, 6, torch.float32
    grid, lr_times, block = (1, 2), (0.5, 1.0), None

    def model(self):
        torch.manual_seed(0)
        return Mlp().eval()

    def train(self, seed):
        return batch(seed=seed)

    def evaluation(self, part):
        return batch(seed={"validation": 7, "test": 8, "ood": 9}[part])

    @staticmethod
    def loss_and_accuracy(model, batch):
        logits = model(batch[0])
        return cross_entropy(logits, batch[1]), (logits.argmax(1) == batch[1]).float().mean()


@pytest.fixture(scope="module")
def trainer():
    return Trainer(Toy())


@pytest.mark.parametrize("method", [*METHOD, *RIVALS])
def test_every_method_trains_the_adapter_and_leaves_w(trainer, method):
    clean = [layer.rows.clone() for layer in trainer.layers]
    config = study.make_config(trainer.task, method, study.MIDDLE.get(method, 1.0), 1e-2, form="int4")
    trainer.run(config, 3)
    first = [p.detach().clone() for p in trainer.parameters]
    assert all(torch.equal(w, layer.rows) for w, layer in zip(clean, trainer.layers))
    assert all(layer.B.abs().sum() > 0 for layer in trainer.layers)
    trainer.run(config, 3)
    assert all(torch.equal(a, p) for a, p in zip(first, trainer.parameters))


def test_methods_at_strength_0_are_plain(trainer):
    trainer.run(study.make_config(trainer.task, "plain", 0.0, 1e-2), 3)
    plain = [p.detach().clone() for p in trainer.parameters]
    for method in {*METHOD, *RIVALS} - {"qat"}:  # which rounds whole weights
        trainer.run(study.make_config(trainer.task, method, 0.0, 1e-2), 3)
        assert all(torch.allclose(a, p, atol=1e-6) for a, p in zip(plain, trainer.parameters)), method


@pytest.mark.parametrize("form", ["int4", "int4/32"])
@pytest.mark.parametrize("share", [1.0, 0.5, 0.25])
def test_qat_is_trained_at_the_rounded_and_at_the_clean_weights(trainer, monkeypatch, share, form):
    monkeypatch.setattr(methods, "indices", lambda size, steps, batch, seed: [torch.arange(4)] * steps)
    config = study.make_config(trainer.task, "qat", share, 1e-2, form=form)
    trainer.run(config, 3)
    found = [p.detach().clone() for p in trainer.parameters]

    trainer.reset(3)
    optimizer = torch.optim.AdamW(trainer.parameters, lr=1e-2, weight_decay=0.0)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, config["steps"])
    batch = tuple(t[:4] for t in trainer.task.train(3))
    for _ in range(config["steps"]):
        optimizer.zero_grad()
        rounded = [rounding(form)(layer.merged()) - layer.merged() for layer in trainer.layers]
        split = round(4 * share)
        for offsets, part in ((rounded, slice(split)), ([torch.zeros_like(each) for each in rounded], slice(split, 4))):
            if part != slice(4, 4):
                with trainer.moved(offsets), torch.enable_grad():
                    loss, _ = trainer.task.loss_and_accuracy(trainer.model, tuple(t[part] for t in batch))
                    (loss * len(batch[0][part]) / 4).backward()
        optimizer.step()
        scheduler.step()
    for theirs, ours in zip(trainer.parameters, found):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("shape", ["uniform", "gaussian"])
def test_group_noise_has_the_std_of_rounding(shape):
    w = torch.randn(64, 256)
    noise = group_noise(w, 64, 4, torch.Generator().manual_seed(0), shape)
    step = w.view(64, 4, 64).abs().amax(-1, keepdim=True) / 7
    assert (noise.view(64, 4, 64) / step).std().item() == pytest.approx(12**-0.5, rel=0.02)
    assert bool(((noise.view(64, 4, 64) / step).abs() <= 0.5).all()) is (shape == "uniform")


def test_measured_runs_are_stored_and_reported(trainer, tmp_path, monkeypatch):
    monkeypatch.setattr(study, "_task", trainer.task)
    monkeypatch.setattr(study, "_trainers", {})
    monkeypatch.setattr(report, "LEAST_SEEDS", 2)
    monkeypatch.setitem(report.TITLES, "toy", "toy")
    monkeypatch.setattr(report, "steps_of", lambda name: Toy.steps)
    store = study.Store(tmp_path / "quantized_toy.json")
    store.environment, lr = {"device": "here"}, dict.fromkeys(study.STRENGTHS, 1e-2)
    store.chosen = {"seeds": [], "lr": lr, "strength": study.MIDDLE}
    shown = ("flat σ 0.1, lr 0.02", "flat σ 0.1, lr 0.01", "flat σ 0.2, lr 0.01", "group × 1, lr 0.01")
    shown += ("flat σ 0.1, rank 32, lr 0.01", "flat σ 0.1, base in int4, lr 0.01", "plain, weight decay 1, lr 0.01")
    wanted = [config for config in study.rows(Toy(), store.chosen) if study.label(config, Toy.steps) in shown]
    assert len(wanted) == len(shown)
    for config in [*wanted, *(study.plain_of(config, Toy.steps) for config in wanted)]:
        for seed in range(2):
            store.runs[store.key(config, seed)] = {"config": config, "seed": seed, "metrics": study._run(config, seed)}
    store.save()
    report.write(tmp_path, ["toy"])
    text = (tmp_path / "quantized.md").read_text()
    for row in shown:
        assert f"| {row} | 2 |" in text
    for picture in ("quantized_toy.png", "quantized_toy_lr.png"):
        assert (tmp_path / picture).exists()
    again = study.Store(tmp_path / "quantized_toy.json")
    assert again.runs == json.loads(json.dumps(store.runs))


def test_filter_noise_has_the_std_of_eq_7(trainer):
    trainer.run(study.make_config(trainer.task, "plain", 0.0, 1e-2), 3)
    generator, config = torch.Generator().manual_seed(0), {"strength": 0.1, "steps": 1}
    for layer, *draws in zip(trainer.layers, *(noise_of(trainer, config, 1, generator) for _ in range(400))):
        std = 0.1 * layer.merged().norm(dim=1) / layer.rows.shape[1] ** 0.5
        torch.testing.assert_close(torch.stack(draws).std((0, 2)), std, rtol=0.1, atol=0)


def test_the_base_is_rounded_while_the_adapter_is_trained(trainer):
    clean = [layer.rows.clone() for layer in trainer.layers]
    with trainer.rounded_base("int4"):
        for layer in trainer.layers:
            assert all(len(row.unique()) <= 15 for row in layer.rows)
    assert all(torch.equal(w, layer.rows) for w, layer in zip(clean, trainer.layers))
