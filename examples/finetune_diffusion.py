"""DreamBooth-style LoRA on a diffusers UNet (attention and convolutions), plain and flat side by side.

    pip install -e '.[peft]' diffusers scikit-learn rich scipy
    python examples/finetune_diffusion.py                          # offline: a small UNet on handwritten digits
    python examples/finetune_diffusion.py --model stabilityai/stable-diffusion-xl-base-1.0 --images my_icons/ \\
        --prompt "a 3d icon in the style of sks"                   # the paper's recipe, on a GPU with a network

The recipe (Li et al., ICML 2025): r = alpha = 4, AdamW at a constant lr of 1e-4, 500 steps of batch 1, sigma 0.1, 23 images
of one style. Not run on SDXL. Offline, a UNet learns digits and is then given 20 that lie on their side, under a word of
their own: ten minutes of a core. Compared is the loss, at fixed times and noises, on images held out of both styles.
"""

import argparse
import copy
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from paired import show
from peft import LoraConfig
from rich.progress import track
from sklearn.datasets import load_digits
from torch import Tensor

from flatopt import FlatPerturbOptimizer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIZE = 1024  # pixels a side, for SDXL
ADAPTED = ["to_q", "to_k", "to_v", "to_out.0", "conv1", "conv2"]


def denoising_loss(unet, scheduler, images: Tensor, condition: dict, generator: torch.Generator) -> Tensor:
    """Mean square error of the predicted noise, at random times. ``condition``: keyword arguments of the UNet."""
    times = torch.randint(scheduler.config.num_train_timesteps, (len(images),), generator=generator).to(DEVICE)
    noise = torch.randn(images.shape, generator=generator).to(images)
    with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
        predicted = unet(scheduler.add_noise(images, noise, times), times, **condition).sample
    return F.mse_loss(predicted.float(), noise.float())


def train(unet, scheduler, images: Tensor, condition, steps: int, batch: int, lr: float, seed: int, what: str, sigma=0.0):
    """Train what is trainable in ``unet``, flat if ``sigma`` > 0. ``condition(index)`` belongs to ``images[index]``."""
    optimizer = torch.optim.AdamW([p for p in unet.parameters() if p.requires_grad], lr=lr)
    if sigma > 0:
        optimizer = FlatPerturbOptimizer(optimizer, unet, sigma=sigma, total_steps=steps, seed=seed)  # <- all that differs
    generator = torch.Generator().manual_seed(seed)
    unet.train()
    for _ in track(range(steps), description=what):
        index = torch.randint(len(images), (batch,), generator=generator).to(DEVICE)
        denoising_loss(unet, scheduler, images[index], condition(index), generator).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def score(unet, scheduler, images: Tensor, condition) -> float:
    """The denoising loss, each image at the same 8 times and noises in every run."""
    index = torch.arange(len(images), device=DEVICE).repeat(8)
    return denoising_loss(unet.eval(), scheduler, images[index], condition(index), torch.Generator().manual_seed(0)).item()


def digits(seed: int, tiny: bool):
    """A source UNet, and images of the old and the new style with their conditions."""
    raw = load_digits()
    images = F.interpolate(torch.tensor(raw.images, dtype=torch.float32).unsqueeze(1) / 8 - 1, size=(16, 16)).to(DEVICE)
    words = torch.tensor(raw.target, device=DEVICE)
    torch.manual_seed(seed)
    table = torch.randn(11, 1, 32, device=DEVICE)  # a word for each digit, and one more for the new style
    unet = UNet2DConditionModel(
        sample_size=16, in_channels=1, out_channels=1, block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=32, attention_head_dim=8,
    ).to(DEVICE)  # fmt: skip
    scheduler = DDPMScheduler()

    def old(index):
        return {"encoder_hidden_states": table[words[index]]}

    def new(index):
        return {"encoder_hidden_states": table[10].expand(len(index), 1, 32)}

    train(unet, scheduler, images[:1400], old, 5 if tiny else 600, 4 if tiny else 64, 1e-3, seed, "source UNet")
    turned, many = images[1400:].rot90(1, (2, 3)), 4 if tiny else 100
    held_out = {
        "new style, held out: loss": (turned[20 : 20 + many], new),
        "old digits: loss": (images[1400 : 1400 + many], lambda i: old(i + 1400)),
    }
    return unet, scheduler, turned[:20], new, held_out


def sdxl(args):
    """SDXL's UNet in bf16, and the latents of the images in a folder, every fourth held out, under one prompt."""
    from diffusers import StableDiffusionXLPipeline
    from torchvision.io import ImageReadMode, decode_image
    from torchvision.transforms.v2.functional import center_crop, resize

    pipeline = StableDiffusionXLPipeline.from_pretrained(args.model, torch_dtype=torch.bfloat16).to(DEVICE)
    vae, latents = pipeline.vae.float(), []
    with torch.no_grad():
        prompt, _, pooled, _ = pipeline.encode_prompt(args.prompt, device=DEVICE, do_classifier_free_guidance=False)
        for path in sorted(p for p in Path(args.images).iterdir() if p.suffix.lower() in (".png", ".jpg", ".jpeg")):
            image = center_crop(resize(decode_image(str(path), ImageReadMode.RGB), [SIZE]), [SIZE, SIZE])
            latent = vae.encode(image[None].to(DEVICE) / 127.5 - 1).latent_dist.mode() * vae.config.scaling_factor
            latents.append(latent.to(torch.bfloat16))
    images, ids = torch.cat(latents), torch.tensor([SIZE, SIZE, 0, 0, SIZE, SIZE], device=DEVICE)

    def condition(index):
        added = {"text_embeds": pooled.expand(len(index), -1), "time_ids": ids.expand(len(index), -1).to(pooled.dtype)}
        return {"encoder_hidden_states": prompt.expand(len(index), -1, -1), "added_cond_kwargs": added}

    train_on = torch.arange(len(images)) % 4 != 3
    held_out = {"held out: loss": (images[~train_on], condition)}
    return pipeline.unet, DDPMScheduler.from_config(pipeline.scheduler.config), images[train_on], condition, held_out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="an SDXL model of the hub, with --images; default: a small UNet on digits")
    parser.add_argument("--images", help="a folder of pictures in the new style")
    parser.add_argument("--prompt", default="a picture in the style of sks", help="of all pictures (%(default)s)")
    parser.add_argument("--sigma", type=float, default=0.1, help="strength of the noise of the flat run (%(default)s)")
    parser.add_argument("--lr", type=float, help="learning rate (1e-4; on digits 1e-3)")
    parser.add_argument("--steps", type=int, default=500, help="optimizer steps (%(default)s)")
    parser.add_argument("--seeds", type=int, default=1, help="paired runs (%(default)s)")
    parser.add_argument("--tiny", action="store_true", help="digits, 5 steps: shows that it runs, and nothing else")
    args = parser.parse_args()
    if bool(args.model) != bool(args.images):
        parser.error("--model and --images go together")
    steps, lr = 5 if args.tiny else args.steps, args.lr or (1e-4 if args.model else 1e-3)

    runs = []
    for seed in range(args.seeds):
        base, scheduler, images, condition, held_out = sdxl(args) if args.model else digits(seed, args.tiny)
        run = {}
        for arm, sigma in (("plain", 0.0), ("flat", args.sigma)):
            torch.manual_seed(seed)
            unet = copy.deepcopy(base).requires_grad_(False)
            unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=ADAPTED))
            cast_training_params(unet, dtype=torch.float32)
            train(unet, scheduler, images, condition, steps, 1, lr, seed, arm, sigma)
            run[arm] = {name: score(unet, scheduler, *each) for name, each in held_out.items()}
        runs.append(run)
    show(f"{args.model or 'a UNet on digits'}, {steps} steps, sigma {args.sigma}", runs)


if __name__ == "__main__":
    main()
