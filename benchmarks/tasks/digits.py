"""A small image task that needs no download: adapt a vision transformer to shifted handwritten digits from few labels.

scikit-learn's handwritten digits (1797 images of 8x8 pixels, in the package itself) are the source domain. The target
domain is the same digits rotated, bent, and drawn on a textured background with the contrast at times inverted. A small
timm ``VisionTransformer`` is trained on the source on the spot; an adapter then has to reach the target from a handful of
labels. Everything is random by ``seed`` alone and the same on every device.

600 test images are set aside once, by a fixed split. The seed splits the rest into source, labelled target and validation
images: settings are chosen on ``validation`` and reported on ``test``, which no choice has seen.
"""

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

SIZE = 16  # pixels a side: the 8x8 originals doubled, so that turning and bending leave them legible
TEST, SOURCE = 600, 700
CORRUPTIONS = ("noise", "impulse", "blur", "contrast", "brightness", "occlusion")
SEVERITIES = (1, 2, 3, 4, 5)


class Images(NamedTuple):
    """``images`` float ``(N, 1, 16, 16)`` in [0, 1]; ``labels`` int64 ``(N,)``, 0 to 9."""

    images: Tensor
    labels: Tensor


class Digits(NamedTuple):
    """``source``: for the source model. ``train`` (few), ``validation`` and ``test``: of the target domain."""

    source: Images
    train: Images
    validation: Images
    test: Images


def load(seed: int, labels: int = 100, device: "str | torch.device" = "cpu") -> Digits:
    """The split and the shifted images of ``seed``, with ``labels`` labelled target images (as many of each digit).

    Raises:
        ValueError: ``labels`` is not between 10 and 400.
    """
    if not 10 <= labels <= 400:
        raise ValueError(f"labels must be between 10 (one a digit) and 400 (what is left for it), got {labels}")
    raw = load_digits()
    images = torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 16
    images = F.interpolate(images, size=(SIZE, SIZE), mode="bilinear", align_corners=False)
    digits = torch.tensor(raw.target, dtype=torch.int64)

    def split(indices, size, random_state):
        return train_test_split(indices, train_size=size, random_state=random_state, stratify=digits[indices])

    test, rest = split(torch.arange(len(digits)), TEST, 0)
    source, rest = split(rest, SOURCE, seed)
    train, validation = split(rest, labels, seed)
    generator = torch.Generator().manual_seed(seed)

    def target(indices):
        return Images(shift(images[indices], generator).to(device), digits[indices].to(device))

    return Digits(Images(images[source].to(device), digits[source].to(device)), *map(target, (train, validation, test)))


def _smooth_noise(n: int, channels: int, radius: float, generator: torch.Generator) -> Tensor:
    """Gaussian noise blurred by ``radius`` pixels, back at unit variance."""
    noise = _blur(torch.randn(n, channels, SIZE, SIZE, generator=generator), radius)
    return noise / noise.std()


def _blur(images: Tensor, radius: float) -> Tensor:
    reach = max(1, math.ceil(2 * radius))
    taps = torch.exp(-0.5 * (torch.arange(-reach, reach + 1) / radius) ** 2)
    taps = (taps / taps.sum()).to(images)
    n, c, h, w = images.shape
    flat = F.pad(images.reshape(n * c, 1, h, w), (reach,) * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, taps.view(1, 1, 1, -1)), taps.view(1, 1, -1, 1)).view(n, c, h, w)


def shift(images: Tensor, generator: torch.Generator) -> Tensor:
    """The target domain: turned by 20 to 50 degrees, bent (elastic distortion: Simard et al., ICDAR 2003), and paler, in
    [0.15, 0.85] instead of [0, 1]."""
    n = len(images)
    angle = math.radians(20) + torch.rand(n, generator=generator) * math.radians(30)
    cos, sin, zero = angle.cos(), angle.sin(), torch.zeros(n)
    turn = torch.stack([torch.stack([cos, -sin, zero], 1), torch.stack([sin, cos, zero], 1)], 1)
    grid = F.affine_grid(turn, list(images.shape), align_corners=False)
    grid = grid + 0.06 * _smooth_noise(n, 2, 3.0, generator).permute(0, 2, 3, 1)
    return 0.15 + 0.7 * F.grid_sample(images, grid, align_corners=False)


def corrupt(images: Tensor, kind: str, severity: int, generator: torch.Generator) -> Tensor:
    """Images with one of :data:`CORRUPTIONS` at a severity from 1 to 5, in the manner of Hendrycks and Dietterich (ICLR
    2019), for images of any size. A ``generator`` on the CPU gives every device the same images.

    Raises:
        ValueError: an unknown ``kind`` or ``severity``.
    """
    if kind not in CORRUPTIONS or severity not in SEVERITIES:
        raise ValueError(f"kind is one of {', '.join(CORRUPTIONS)} and severity 1 to 5, got {kind!r} at {severity!r}")
    level, pixel = severity - 1, images.shape[-1] / SIZE
    where = {"generator": generator, "device": generator.device}
    if kind == "blur":
        images = _blur(images, pixel * (0.4, 0.6, 0.8, 1.0, 1.3)[level])
    elif kind == "contrast":
        mean = images.mean((1, 2, 3), keepdim=True)
        images = mean + (images - mean) * (0.75, 0.6, 0.45, 0.3, 0.2)[level]
    elif kind == "brightness":
        images = images + (0.1, 0.2, 0.3, 0.4, 0.5)[level]
    elif kind == "noise":
        images = images + (0.04, 0.08, 0.12, 0.18, 0.25)[level] * torch.randn(images.shape, **where).to(images)
    elif kind == "impulse":
        hit = torch.rand(images.shape, **where) < (0.01, 0.02, 0.04, 0.07, 0.1)[level]
        salt = (torch.rand(images.shape, **where) < 0.5).to(images)
        images = torch.where(hit.to(images.device), salt, images)
    else:
        side = round(pixel * (2, 3, 4, 5, 6)[level])
        corner = torch.randint(0, images.shape[-1] - side + 1, (len(images), 2, 1), **where)
        line = torch.arange(images.shape[-1], device=generator.device)
        inside = (line >= corner) & (line < corner + side)
        box = (inside[:, 0, :, None] & inside[:, 1, None, :]).unsqueeze(1).to(images.device)
        images = torch.where(box, images.mean((1, 2, 3), keepdim=True), images)
    return images.clamp(0, 1)


def corruptions(images: Tensor, seed: int) -> "Iterator[tuple[str, int, Tensor]]":
    """``(kind, severity, corrupted images)`` for every kind and severity."""
    generator = torch.Generator().manual_seed(seed)
    for kind in CORRUPTIONS:
        for severity in SEVERITIES:
            yield kind, severity, corrupt(images, kind, severity, generator)


def batches(train: Images, steps: int, size: int, seed: int) -> "Iterator[tuple[Tensor, Tensor]]":
    """``steps`` batches, reshuffled each time round; short last ones are dropped."""
    generator = torch.Generator().manual_seed(seed)
    size = min(size, len(train.labels))
    order = torch.empty(0, dtype=torch.int64)
    for _ in range(steps):
        if len(order) < size:
            order = torch.randperm(len(train.labels), generator=generator)
        index, order = order[:size].to(train.labels.device), order[size:]
        yield train.images[index], train.labels[index]


def source_model(
    source: Images, seed: int, steps: int = 600, on_step: "Callable[[], None] | None" = None
) -> VisionTransformer:
    """A 3-layer, 64-wide timm ViT with 4x4 patches, trained on ``source`` (about 97 % on unseen source digits)."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VisionTransformer(
            img_size=SIZE, patch_size=4, in_chans=1, num_classes=10, embed_dim=64, depth=3, num_heads=4, mlp_ratio=2.0
        ).to(source.images.device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.05)
    adapt(model, source, lambda parameters: optimizer, steps, batch=64, seed=seed, on_step=on_step)
    return model


def adapt(
    model: nn.Module,
    train: Images,
    make_optimizer: "Callable[[list[nn.Parameter]], torch.optim.Optimizer]",
    steps: int,
    batch: int = 25,
    seed: int = 0,
    on_step: "Callable[[], None] | None" = None,
) -> "list[float]":
    """Train what is trainable in ``model`` and return the loss of every step.

    ``make_optimizer(parameters)`` gives the optimizer; its lr follows a cosine to 0. The step is taken through a closure,
    so that optimizers of one and of several gradients a step (SAM, LBFGS) fit alike. ``on_step()`` is called after each.
    """
    optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    model.train()
    losses = []
    for images, labels in batches(train, steps, batch, seed):

        def closure(images=images, labels=labels):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(images), labels)
            loss.backward()
            return loss

        losses.append(optimizer.step(closure).item())
        scheduler.step()
        if on_step is not None:
            on_step()
    return losses


@torch.no_grad()
def evaluate(model: nn.Module, images: Tensor, labels: Tensor) -> "tuple[float, float]":
    """Accuracy in [0, 1] and mean cross-entropy in nats, in eval mode."""
    training = model.training
    model.eval()
    logits = torch.cat([model(chunk) for chunk in images.split(512)]).float()
    model.train(training)
    return float((logits.argmax(1) == labels).float().mean()), float(F.cross_entropy(logits, labels))
