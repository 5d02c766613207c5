"""Which part of SciPy is this passage about? A small transformer, from the documentation that pip has already installed.

Source: a DistilBERT (transformers) pre-trained on the docstrings of the Python standard library, NumPy, scikit-learn, SymPy,
NetworkX and Matplotlib, to fill in masked tokens and to tell the module that a passage is from. Target: the SciPy subpackage
that a passage of 48 tokens from a SciPy docstring belongs to, from few labels. Training, validation and test passages come
from different files. Out of domain: the ``#`` comments of the test files. Corruption: typing errors, in 2 to 30 % of the
characters.

All text is read from the installed packages, nothing is downloaded. It is a function of their versions alone; results carry
the versions and :attr:`Text.fingerprint`, the hashes of what was read and of the source model, so that none are mixed up.
"""

import ast
import copy
import hashlib
import importlib.metadata
import importlib.util
import io
import os
import random
import re
import sys
import tokenize
from collections import defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import DistilBertConfig, DistilBertForMaskedLM

SOURCES = ("numpy", "sklearn", "sympy", "networkx", "matplotlib")  # and the standard library
CLASSES = ("stats", "optimize", "signal", "sparse", "linalg", "interpolate", "integrate", "special")
SPLIT = {"train": 0.5, "validation": 0.15, "test": 0.35}  # shares of a class's passages, in whole files
PASSAGE, LENGTH, VOCABULARY, MASK, PAD = 160, 48, 4096, 0, 1  # characters, tokens
TYPING_ERRORS = (0.02, 0.05, 0.1, 0.2, 0.3)  # severities 1 to 5: share of characters hit
SKIP = {"tests", "test", "site-packages", "idlelib", "lib2to3", "externals", "_lib", "__pycache__"}


def files(root: Path) -> "list[Path]":
    return [f for f in sorted(root.rglob("*.py")) if not SKIP & set(f.relative_to(root).parts)]


def package(name: str) -> Path:
    return Path(importlib.util.find_spec(name).origin).parent


def module(file: Path, root: Path) -> str:
    """Package and subpackage, or package and file where there is no subpackage."""
    inner = file.relative_to(root).parts
    return ".".join((root.name, *(inner[:2] if len(inner) > 2 else inner[:1])))


def prose(text: str) -> str:
    """Without doctests, reference marks and the dotted names that would give the answer away."""
    lines = [line for line in text.splitlines() if not line.strip().startswith((">>>", "...", ".. "))]
    return " ".join(re.sub(r"scipy(\.\w+)+", "scipy", " ".join(lines)).split())


def docstrings(file: Path) -> "list[str]":
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"))
    except (SyntaxError, UnicodeDecodeError, ValueError):
        return []  # lib2to3's bad input and the like
    nodes = (ast.Module, ast.ClassDef, ast.FunctionDef)
    found = [ast.get_docstring(node) for node in ast.walk(tree) if isinstance(node, nodes)]
    return [prose(text) for text in found if text]


def comments(file: Path) -> "list[str]":
    """The ``#`` comments of a file as one text."""
    with io.BytesIO(file.read_bytes()) as stream:
        words = [t.string.lstrip("#:! -=") for t in tokenize.tokenize(stream.readline) if t.type == tokenize.COMMENT]
    return [prose(" ".join(words))]


def passages(texts: "list[str]") -> "list[str]":
    """Pieces of :data:`PASSAGE` characters; what is left over at the end of a text is dropped."""
    return [text[i : i + PASSAGE] for text in texts for i in range(0, len(text) - PASSAGE + 1, PASSAGE)]


def split_files(by_file: "dict[Path, list[str]]") -> "dict[str, list[Path]]":
    """Whole files to train, validation and test, the largest first to where most is missing."""
    total, parts, filled = sum(map(len, by_file.values())), defaultdict(list), dict.fromkeys(SPLIT, 0)
    for file in sorted(by_file, key=lambda f: (-len(by_file[f]), str(f))):
        part = max(SPLIT, key=lambda p: SPLIT[p] * total - filled[p])
        parts[part].append(file)
        filled[part] += len(by_file[file])
    return parts


def misspell(text: str, share: float, rng: random.Random) -> str:
    """Each character is, with probability ``share``, dropped, doubled, exchanged with the next or replaced by a letter."""
    out, i = [], 0
    while i < len(text):
        if rng.random() < share:
            kind = rng.randrange(4)
            if kind == 1:
                out += [text[i], text[i]]
            elif kind == 2 and i + 1 < len(text):
                out += [text[i + 1], text[i]]
                i += 1
            elif kind == 3:
                out.append(rng.choice("abcdefghijklmnopqrstuvwxyz"))
        else:
            out.append(text[i])
        i += 1
    return "".join(out)


class Corpus:
    """What is read from the packages: the ``source`` passages and the indices of their modules, and in ``parts``, per split,
    ``(passages, labels)`` of the target."""

    def __init__(self, per_class: "dict[str, int]", source_share: float):
        roots = [Path(os.__file__).parent, *map(package, SOURCES)]
        every = [(f, module(f, root)) for root in roots for f in files(root)][:: round(1 / source_share)]
        names = sorted({name for _, name in every})
        found = [(p, names.index(name)) for f, name in every for p in passages(docstrings(f))]
        self.source, self.source_modules = [p for p, _ in found], [index for _, index in found]
        self.parts = {part: ([], []) for part in (*SPLIT, "comments")}
        for label, name in enumerate(CLASSES):
            by_file = {f: passages(docstrings(f)) for f in files(package("scipy") / name)}
            parts = split_files(by_file)
            pieces = {part: [p for f in parts[part] for p in by_file[f]] for part in SPLIT}
            pieces["comments"] = [p for f in sorted(parts["test"]) for p in passages(comments(f))]
            for part, found in pieces.items():
                found = random.Random(label).sample(sorted(set(found)), min(len(set(found)), per_class[part]))
                self.parts[part][0].extend(found)
                self.parts[part][1].extend([label] * len(found))
        text = "\n".join([*self.source, *(p for part in self.parts.values() for p in part[0])])
        self.fingerprint = hashlib.sha256(text.encode()).hexdigest()[:16]


def train_tokenizer(texts: "list[str]") -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=["[MASK]", "[PAD]"], initial_alphabet=alphabet, show_progress=False
        ),
    )
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=PAD, pad_token="[PAD]", length=LENGTH)
    return tokenizer


def mean_over_tokens(hidden: Tensor, tokens: Tensor) -> Tensor:
    seen = (tokens != PAD).unsqueeze(-1)
    return (hidden * seen).sum(1) / seen.sum(1)


class Classifier(nn.Module):
    """The encoder, its mean over the tokens, and a linear head."""

    def __init__(self, encoder: nn.Module, classes: int):
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(encoder.config.dim, classes)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(mean_over_tokens(self.encoder(tokens).last_hidden_state, tokens))


class Text:
    """See the module. ``quick``: a corpus, a model and a pre-training for tests."""

    name = "text"
    targets = ("q_lin", "k_lin", "v_lin", "out_lin", "lin1", "lin2")
    trained_head = "head"
    pretraining = (2000, 256)  # steps, passages a step

    def __init__(self, device: str, cache: Path, quick: bool = False):
        self.device, self.quick = device, quick
        versions = (
            sys.version_info[:3],
            *map(importlib.metadata.version, ("scipy", *(name.replace("sklearn", "scikit-learn") for name in SOURCES))),
        )
        key = hashlib.sha256(repr((versions, quick, Path(__file__).read_bytes())).encode()).hexdigest()[:16]
        file = cache / f"text-{key}.pt"
        if not file.exists():
            cache.mkdir(parents=True, exist_ok=True)
            torch.save(self.build(), file)
        built = torch.load(file, map_location=device, weights_only=True)
        self.parts, self.corrupted = built["parts"], built["corrupted"]
        # a GPU does not train the same source model twice, and a pair must have one
        weights = b"".join(w.cpu().numpy().tobytes() for w in built["encoder"].values())
        self.fingerprint = f"{built['fingerprint']}-{hashlib.sha256(weights).hexdigest()[:8]}"
        self.encoder = self.new_model().distilbert
        self.encoder.load_state_dict(built["encoder"])

    def build(self) -> dict:
        """Everything read, split, tokenised, and the source model trained."""
        per_class = {"train": 1000, "validation": 100, "test": 150, "comments": 100}
        corpus = Corpus(dict.fromkeys(per_class, 20), 0.02) if self.quick else Corpus(per_class, 1)
        tokenizer = train_tokenizer(corpus.source)

        def tokens(texts):
            return torch.tensor([encoding.ids for encoding in tokenizer.encode_batch(texts)])

        rng = random.Random(0)
        test = corpus.parts["test"][0]
        return {
            "fingerprint": corpus.fingerprint,
            "parts": {part: (tokens(texts), torch.tensor(labels)) for part, (texts, labels) in corpus.parts.items()},
            "corrupted": [tokens([misspell(text, share, rng) for text in test]) for share in TYPING_ERRORS],
            "encoder": self.pretrain(tokens(corpus.source), torch.tensor(corpus.source_modules)),
        }

    def new_model(self) -> DistilBertForMaskedLM:
        size = {"dim": 32, "n_layers": 1, "hidden_dim": 64} if self.quick else {"dim": 128, "n_layers": 3, "hidden_dim": 512}
        config = DistilBertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, n_heads=4, pad_token_id=PAD, **size)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return DistilBertForMaskedLM(config).to(self.device)

    def pretrain(self, data: Tensor, modules: Tensor) -> "dict[str, Tensor]":
        """Two losses on the same input: masked-language modelling, 15 % of the tokens masked (Devlin et al., NAACL 2019; all
        of them by the mask), and the module that a passage is from, read off the mean over its tokens."""
        steps, batch = (20, 16) if self.quick else self.pretraining
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.new_model().train()
            head = nn.Linear(model.config.dim, int(modules.max()) + 1).to(self.device)
            optimizer = torch.optim.AdamW([*model.parameters(), *head.parameters()], weight_decay=0.01)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-4, total_steps=steps, pct_start=0.1)
            generator = torch.Generator().manual_seed(0)
            for _ in range(steps):
                index = torch.randint(len(data), (batch,), generator=generator)
                x, y = data[index].to(self.device), modules[index].to(self.device)
                hit = (torch.rand(x.shape, generator=generator) < 0.15).to(self.device) & (x != PAD)
                output = model(x.masked_fill(hit, MASK), output_hidden_states=True)
                fill_in = F.cross_entropy(output.logits[hit], x[hit])
                tell = F.cross_entropy(head(mean_over_tokens(output.hidden_states[-1], x)), y)
                optimizer.zero_grad()
                (fill_in + tell).backward()
                nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 1.0)
                optimizer.step()
                schedule.step()
        done = f"{len(data)} passages of {head.out_features} modules, {steps} steps of {batch}"
        print(f"text: {done}: masked-LM loss {fill_in.item():.2f}, module loss {tell.item():.2f}", flush=True)
        return {name: w.cpu() for name, w in model.distilbert.state_dict().items()}

    def model(self, seed: int) -> nn.Module:
        """The encoder with a new head, drawn by ``seed``."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return Classifier(copy.deepcopy(self.encoder), len(CLASSES)).to(self.device)

    def train(self, seed: int, labels: int) -> "tuple[Tensor, Tensor]":
        """``labels`` passages of each class, drawn by ``seed``."""
        x, y = self.parts["train"]
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed)).to(self.device)
        index = torch.cat([order[y[order] == c][:labels] for c in range(len(CLASSES))])
        return x[index], y[index]

    def evaluation(self, seed: int, labels: int) -> "dict[str, list[tuple[Tensor, Tensor]]]":
        test = self.parts["test"]
        return {
            "validation": [self.parts["validation"]],
            "test": [test],
            "ood": [self.parts["comments"]],
            "corrupted": [(x, test[1]) for x in self.corrupted],
        }
