"""The studies in ``benchmarks/studies``, and the settings of each run that they ask for."""

import json
from pathlib import Path

from .train import DEFAULTS, canonical

STUDIES = Path(__file__).parents[1] / "studies"
TIMES = ("sigma", "lr", "labels", "steps")  # a row may give these relative to what was chosen: "sigma_times": 0.5


def read_studies(names: "list[str]") -> "dict[str, dict]":
    """Name -> study, in the order given; without ``names`` all of them, in the order of the letters in their titles.

    Raises:
        SystemExit: there is no such study.
    """
    files = {file.stem: file for file in STUDIES.glob("*.json") if file.stem != "base"}
    unknown = set(names) - set(files)
    if unknown:
        raise SystemExit(f"no study {', '.join(sorted(unknown))}; there are {', '.join(sorted(files))}")
    studies = {name: json.loads(file.read_text(encoding="utf-8")) for name, file in files.items()}
    return {name: studies[name] for name in names or sorted(studies, key=lambda name: studies[name]["title"])}


def read_base(quick: bool) -> dict:
    base = json.loads((STUDIES / "base.json").read_text(encoding="utf-8"))
    return base["quick"] if quick else base


def settings(base: dict, tuned: dict, *overrides: dict) -> dict:
    """The canonical settings of a run: base, then what was chosen by tuning, then the overrides in order."""
    given = {**base, "sigma": tuned["sigma"]}
    for override in overrides:
        given |= {key: value for key, value in override.items() if key != "name"}
    given.setdefault("lr", tuned["lr"][given.get("adapter", DEFAULTS["adapter"])])
    for key in TIMES:
        factor = given.pop(f"{key}_times", 1)
        if factor != 1:
            value = given[key] * factor
            given[key] = value if key in ("sigma", "lr") else round(value)
    return canonical(given)


def pairs(study: dict, base: dict, tuned: dict) -> "list[tuple[str, dict, dict]]":
    """``(name, settings, settings of the reference)`` of every row."""
    return [
        (
            row["name"],
            settings(base, tuned, study["all"], row),
            settings(base, tuned, study["all"], row, study["reference"]),
        )
        for row in study["rows"]
    ]
