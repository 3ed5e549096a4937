"""Imports inside the package point only to layers below; the core knows no shell library."""

import ast
from pathlib import Path

from paths import ROOT

PACKAGE = ROOT / "jaxdistill"
CORE = ("schedule", "prediction", "sampling", "adversarial", "methods", "train")
SHELL = (
    "variants",
    "distributed",
    "checkpoint",
    "interop",
    "data",
    "scenes",
    "evaluate",
    "recognise",
    "card",
    "report",
    "loop",
    "workers",
    "experiment",
    "workdir",
    "pipeline",
    "record_cache",
    "image_metrics",
    "text_setup",
    "distil",
    "main",
    "aot",
    "text_export",
    "serving",
    "sample",
    "serve",
    "compare",
    "ablate",
    "contenders",
    "benchmark",
    "teacher_states",
)
ALONE = ("models", "partition", "chips", "hlo")
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


def layer_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def violations(path: Path) -> list[str]:
    layer, found = layer_of(path), imports(path)
    inside = {name.split(".")[1] for name in found if name.startswith("jaxdistill.")}
    libraries = {name.split(".")[0] for name in found}
    if layer in CORE:
        allowed = set(CORE[: CORE.index(layer) + 1])
    elif layer in ALONE:
        allowed = {layer}
    else:
        allowed = {*CORE, *ALONE, *SHELL[: SHELL.index(layer)], layer}
    bad = [f"{layer} imports {name}" for name in inside - allowed]
    if layer not in SHELL:
        bad += [f"{layer} uses {name}" for name in libraries & SHELL_LIBRARIES]
    return bad


def test_every_module_has_a_layer():
    layers = {layer_of(path) for path in PACKAGE.rglob("*.py")} - {"__init__"}
    assert layers == {*CORE, *SHELL, *ALONE}


def test_imports_point_only_to_layers_below():
    assert [
        v
        for path in PACKAGE.rglob("*.py")
        if layer_of(path) != "__init__"
        for v in violations(path)
    ] == []


def test_an_import_of_the_shell_from_the_core_would_be_seen(tmp_path, monkeypatch):
    monkeypatch.setattr("test_layers.PACKAGE", tmp_path)
    (tmp_path / "schedule.py").write_text(
        "from jaxdistill.sampling import ddim\nimport orbax.checkpoint\n"
    )
    assert violations(tmp_path / "schedule.py") == [
        "schedule imports sampling",
        "schedule uses orbax",
    ]
