"""`import jaxdistill as jd`: its names."""

import ast
import subprocess
import sys

import pytest
from paths import ROOT

import jaxdistill as jd


@pytest.mark.parametrize("name", jd.__all__)
def test_each_name_resolves_and_says_what_it_is(name):
    value = getattr(jd, name)
    assert name in dir(jd)
    assert value.__doc__ and not value.__doc__.startswith(f"{name}("), name


def test_type_checkers_read_the_same_names():
    tree = ast.parse((ROOT / "jaxdistill" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == {name: f"jaxdistill.{module}" for name, module in jd._MODULE_OF.items()}


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        jd.nothing  # noqa: B018


def test_the_import_alone_brings_no_library():
    code = (
        "import sys, jaxdistill; print({'jax', 'flax', 'optax', 'orbax', 'numpy'} & {*sys.modules})"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout.strip() == "set()"
