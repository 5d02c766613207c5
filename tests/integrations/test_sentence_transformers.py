"""sentence-transformers' cached losses read a batch twice, first without gradients: refused, and right with the way out."""

import pytest

sentence_transformers = pytest.importorskip("sentence_transformers")
datasets = pytest.importorskip("datasets")
pytest.importorskip("peft")

from peft import inject_adapter_in_model  # noqa: E402
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer  # noqa: E402
from sentence_transformers import SentenceTransformerTrainingArguments as Arguments  # noqa: E402
from sentence_transformers.losses import CachedMultipleNegativesRankingLoss, MultipleNegativesRankingLoss  # noqa: E402
from sentence_transformers.models import Pooling, Transformer  # noqa: E402
from tiny import WORDS, Watch, adapter, llama, lora_config, tokenizer  # noqa: E402

from flatopt.integrations.transformers import FlatPerturbCallback  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


class Perturbed(SentenceTransformerTrainer):
    """As docs/troubleshooting.md says."""

    def training_step(self, *args, **kwargs):
        with self.noise.optimizer.perturbed():
            return super().training_step(*args, **kwargs)


def run(folder, loss, trainer_class):
    llama().model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    model = SentenceTransformer(modules=[Transformer(str(folder)), Pooling(16)], device="cpu")
    inject_adapter_in_model(lora_config(lora_dropout=0.0), model)
    watch, noise = Watch(model), FlatPerturbCallback(sigma=0.1, schedule="constant")
    trainer = trainer_class(
        model=model,
        args=Arguments(
            str(folder), use_cpu=True, max_steps=2, per_device_train_batch_size=8, report_to=[], save_strategy="no"
        ),
        train_dataset=datasets.Dataset.from_dict({"anchor": WORDS[:16], "positive": WORDS[16:32]}),
        loss=loss(model),
        callbacks=[noise],
    )
    trainer.noise = noise
    try:
        trainer.train()
    finally:
        assert noise.optimizer is None or not noise.optimizer.restore()
        assert watch.changed() == []
    return watch, adapter(model)


def cached(model):
    return CachedMultipleNegativesRankingLoss(model, mini_batch_size=2)


def test_a_cached_loss_is_refused_with_the_way_out(tmp_path):
    with pytest.raises(RuntimeError, match=r"put both passes inside `with optimizer\.perturbed\(\):`"):
        run(tmp_path, cached, SentenceTransformerTrainer)


def test_the_way_out_trains_as_the_plain_loss_does(tmp_path):
    watch, weights = run(tmp_path / "cached", cached, Perturbed)
    assert not any(watch.trained)
    assert not any(watch.read)
    watch, want = run(tmp_path / "plain", MultipleNegativesRankingLoss, SentenceTransformerTrainer)
    assert not any(watch.trained)
    for name in want:
        assert (weights[name] - want[name]).abs().max() < 1e-4
