"""Imports inside the package point only to layers below, by folder; the core knows no shell
library.
"""

import ast

import pytest
from paths import ROOT

PACKAGE = ROOT / "jaxdistill"
ORDER = (
    "core",
    "methods",
    "models",
    "costs",
    "run",
    "interop",
    "metrics",
    "tasks",
    "page",
    "commands",
)
"""A folder may import those before it. The core and the commands are the files at the top."""
COMMANDS = {
    "__init__",
    "main",
    "sample",
    "compare",
    "benchmark",
    "ablate",
    "serve",
    "aot",
    "export",
    "teacher_states",
}
PURE = ("core", "methods", "models")
"""Arrays and functions: no files, flags or logging."""
SHELL_LIBRARIES = {
    "absl",
    "ml_collections",
    "orbax",
    "matplotlib",
    "PIL",
    "tqdm",
    "tensorboardX",
    "sklearn",
    "scipy",
    "logging",
    "argparse",
    "json",
    "grain",
    "tensorflow_datasets",
    "safetensors",
    "tokenizers",
    "transformers",
    "array_record",
}


def layer_of(first: str) -> str:
    """Of the first part of a module's path below the package."""
    if first in ORDER:
        return first
    return "commands" if first in COMMANDS else "core"


def imports(path) -> set[str]:
    """What a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(path, package=PACKAGE) -> list[str]:
    layer, found = layer_of(path.relative_to(package).parts[0].removesuffix(".py")), imports(path)
    inside = {name.split(".")[1] for name in found if name.startswith("jaxdistill.")}
    allowed = ORDER[: ORDER.index(layer) + 1]
    bad = [f"{layer} imports {name}" for name in sorted(inside) if layer_of(name) not in allowed]
    libraries = {name.split(".")[0] for name in found}
    if layer in PURE:
        bad += [f"{layer} uses {name}" for name in sorted(libraries & SHELL_LIBRARIES)]
    return bad


def test_imports_point_only_to_layers_below():
    assert {path.name for path in PACKAGE.iterdir() if (path / "__init__.py").exists()} == set(
        ORDER[1:-1]
    )
    files = [path for path in PACKAGE.rglob("*.py") if path != PACKAGE / "__init__.py"]
    assert {str(path): violations(path) for path in files if violations(path)} == {}


@pytest.mark.parametrize(
    ("name", "text", "bad"),
    [
        ("schedule.py", "import orbax.checkpoint", ["core uses orbax"]),
        ("schedule.py", "from jaxdistill.methods import lcm", ["core imports methods"]),
        ("run/loop.py", "def f():\n    from jaxdistill.tasks import x", ["run imports tasks"]),
        ("tasks/small.py", "from jaxdistill import main", ["tasks imports main"]),
        ("tasks/small.py", "from jaxdistill.run import loop\nimport json", []),
    ],
)
def test_an_import_of_a_layer_above_would_be_seen(tmp_path, name, text, bad):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(text + "\n")
    assert violations(path, tmp_path) == bad


def test_few_modules_stand_at_the_top():
    assert len(list(PACKAGE.glob("*.py"))) <= 18
