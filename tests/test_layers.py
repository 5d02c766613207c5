"""The package has layers: what lies below knows nothing of what lies above, and no file imports itself by a detour."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

import flatopt

ROOT = Path(flatopt.__file__).parent
# folder, or file beside the folders -> what it may import from besides itself
BELOW = {
    "core": set(),
    "ops": {"core"},
    "adapters": {"core"},
    "perturbation": {"core", "ops", "adapters"},
    "optimizers": {"core", "ops", "adapters", "perturbation"},
    "flatness": {"core", "ops", "adapters", "perturbation", "optimizers"},
    "create": {"optimizers"},
    "noise": {"ops"},
    "integrations": {"core", "optimizers"},
    "flatopt": {"adapters", "create", "flatness", "optimizers"},
}
# for a type alone, under TYPE_CHECKING: a weight names the adapter that tells its update
TYPES = {("flatopt.core.weight", "flatopt.adapters.base")}


def name_of(file: Path) -> str:
    parts = file.relative_to(ROOT.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def imported(file: Path, types: bool):
    """The modules of flatopt that ``file`` imports, inside of functions too; ``types``: only those, or all but those, that
    stand under TYPE_CHECKING."""
    package = name_of(file) if file.name == "__init__.py" else name_of(file).rpartition(".")[0]
    tree = ast.parse(file.read_text())
    for_types = {
        id(node)
        for block in ast.walk(tree)
        if isinstance(block, ast.If) and ast.unparse(block.test) == "TYPE_CHECKING"
        for statement in block.body
        for node in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if (id(node) in for_types) is not types:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in FILES)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                inner = f"{module}.{alias.name}"
                if inner in FILES or module in FILES:
                    yield inner if inner in FILES else module


def layer_of(module: str) -> str:
    return [*module.split("."), "flatopt"][1]


@pytest.mark.parametrize("module", FILES)
def test_imports_point_down(module):
    above = {
        other
        for other in imported(FILES[module], types=False)
        if layer_of(other) not in BELOW[layer_of(module)] | {layer_of(module)}
    }
    assert not above
    across = {(module, other) for other in imported(FILES[module], types=True) if layer_of(other) != layer_of(module)}
    assert across <= TYPES


def test_no_file_imports_itself_by_a_detour():
    TopologicalSorter({module: set(imported(file, types=False)) for module, file in FILES.items()}).prepare()


def test_an_import_is_seen_wherever_it_stands():
    """The test above tested: a lazy import in a function, and a file's own name in a package."""
    found = set(imported(FILES["flatopt.perturbation.noisy_layers"], types=False))
    assert {"flatopt.ops.triton.noisy_weights", "flatopt.ops.noise", "flatopt.core.weight"} <= found
    assert set(imported(FILES["flatopt.core.weight"], types=True)) == {"flatopt.adapters.base"}
