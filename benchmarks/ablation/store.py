"""The results file of a task: runs are looked up by environment, settings and seed, and never run twice."""

import importlib.metadata
import json
import os
import platform
import re
import sys
import time
from pathlib import Path

import torch

SAVE_EVERY = 5.0  # seconds


def environment(task, device: str) -> dict:
    """What numbers depend on besides the settings."""
    versions = {name: importlib.metadata.version(name) for name in ("torch", "peft", "timm", "transformers", "scikit-learn")}
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine() + " CPU"
    # source models of the digits are trained on the CPU, and another CPU may round otherwise
    cpu = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if sys.platform == "linux" else None
    return {
        "data": task.fingerprint,
        "device": name,
        "cpu": cpu[1] if cpu else platform.processor(),
        "python": platform.python_version(),
        **versions,
    }


class Store:
    """The results file of one task: ``tuned``, ``environments`` and ``runs``, each ``{environment, config, seed, metrics}``.

    Runs are looked up in one environment at a time, ``index``, so that pairs are never mixed from two.
    """

    def __init__(self, path: Path):
        self.path, self.saved_at, self.index = path, time.monotonic(), 0
        content = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        self.environments, self.tuned = content.get("environments", []), content.get("tuned", {})
        self.runs = {self.key(r["environment"], r["config"], r["seed"]): r for r in content.get("runs", [])}

    @staticmethod
    def key(*of) -> str:
        return json.dumps(of, sort_keys=True)

    def enter(self, environment: dict) -> None:
        if environment not in self.environments:
            self.environments.append(environment)
        self.index = self.environments.index(environment)

    def get(self, config: dict, seed: int) -> "dict | None":
        found = self.runs.get(self.key(self.index, config, seed))
        return found and found["metrics"]

    def add(self, config: dict, seed: int, metrics: dict) -> None:
        run = {"environment": self.index, "config": config, "seed": seed, "metrics": metrics}
        self.runs[self.key(self.index, config, seed)] = run
        if time.monotonic() - self.saved_at > SAVE_EVERY:
            self.save()

    def save(self) -> None:
        """One run a line; written beside and moved, so that a run stopped at any time leaves a whole file."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        lines = ",\n".join(json.dumps(self.runs[key]) for key in sorted(self.runs))
        head = json.dumps({"tuned": self.tuned, "environments": self.environments}, indent=1)
        beside = self.path.with_suffix(".part")
        beside.write_text(f'{head[:-2]},\n "runs": [\n{lines}\n]}}\n', encoding="utf-8")
        os.replace(beside, self.path)
        self.saved_at = time.monotonic()
