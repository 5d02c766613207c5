"""A user's use of register_low_rank passes strict mypy, and pyright where it is installed."""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

import flatopt

USER = Path(__file__).with_name("user_module.py")
ROOT = Path(flatopt.__file__).parents[1]


def test_mypy(tmp_path):
    pytest.importorskip("mypy")
    cache = Path(tempfile.gettempdir()) / "flatopt-mypy-cache"  # torch takes mypy a minute, the first time
    options = ["--strict", "--follow-imports=silent", f"--cache-dir={cache}", "--config-file="]
    done = subprocess.run(
        [sys.executable, "-m", "mypy", *options, str(USER)],
        env={**os.environ, "MYPYPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(shutil.which("pyright") is None, reason="pyright is not installed")
def test_pyright(tmp_path):
    shutil.copy(USER, tmp_path)  # pyright looks at what lies beside its configuration
    config = {"extraPaths": [str(ROOT)], "typeCheckingMode": "strict"}
    (tmp_path / "pyrightconfig.json").write_text(json.dumps(config))
    command = ["pyright", "--pythonpath", sys.executable, "-p", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
