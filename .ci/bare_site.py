"""Links torch, numpy and what they need, and nothing else, from this environment into another one's site-packages.

    .venv/bin/python .ci/bare_site.py FOLDER

So a wheel can be tried where no extra is installed, without another six gigabytes of torch.
"""

import re
import sys
from importlib.metadata import Distribution, PackageNotFoundError
from pathlib import Path


def needed(names: "list[str]") -> "dict[str, Distribution]":
    found: dict[str, Distribution] = {}
    while names:
        name = re.match(r"[\w.-]+", names.pop())[0].lower()
        if name in found:
            continue
        try:
            found[name] = Distribution.from_name(name)
        except PackageNotFoundError:
            continue  # of another platform
        names += [line for line in found[name].requires or () if "extra ==" not in line]
    return found


def main() -> None:
    folder = Path(sys.argv[1])
    for distribution in needed(["torch", "numpy"]).values():
        site = Path(str(distribution.locate_file("")))
        for top in {file.parts[0] for file in distribution.files or () if file.parts[0] not in ("..", "__pycache__")}:
            if not (folder / top).exists():
                (folder / top).symlink_to(site / top)


if __name__ == "__main__":
    main()
