"""`import jaxdistill as jd`: its names, and `jd.distill` on a network of one's own."""

import ast
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from paths import ROOT

import jaxdistill as jd

COSINE = jd.cosine()
MEANS = jnp.asarray([[1.0, -1.0], [-0.5, 0.5]])


def exact(params, x, t, cond):
    """The v network of N(mean of the class, e^logvar), with a linear term of its own."""
    a, s = COSINE.alpha(t)[:, None], COSINE.sigma(t)[:, None]
    mean, variance = params["mean"][cond], jnp.exp(params["logvar"])
    x0 = mean + a * variance / (a * a * variance + s * s) * (x - a * mean)
    eps = (x - a * x0) / jnp.maximum(s, 1e-3)
    return a * eps - s * x0 + params["slope"] * s * x


TEACHER = {"mean": MEANS, "logvar": jnp.full(2, -2.0), "slope": jnp.zeros(2)}
NO_GAN = {
    "imagine_flash": {"adversarial_weight": 0.0},
    "dmd2": {"adversarial_weight": 0.0},
    "matched": {"flash": {"adversarial_weight": 0.0}},
}


def problem(**changes):
    given = {
        "model": jd.Model(exact, COSINE, jd.v_prediction),
        "params": TEACHER,
        "image_shape": (2,),
        "conds": lambda i: np.arange(32) % 2,
        "null_cond": lambda cond: cond,
    }
    return jd.Problem(**given | changes)


def options(**changes):
    given = {"iterations": 8, "health_every": 8, "pool": 64, "teacher_steps": 10}
    return jd.Options(**given | changes)


def test_every_public_name_is_there_and_says_what_it_is():
    assert 30 <= len(jd.__all__) <= 50
    for name in jd.__all__:
        value = getattr(jd, name)
        assert value is getattr(jd, name) and name in dir(jd)
        assert isinstance(value, dict) or value.__doc__, name
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        _ = jd.nothing


def test_type_checkers_read_the_same_names():
    tree = ast.parse((ROOT / "jaxdistill" / "__init__.py").read_text())
    (guarded,) = [node for node in tree.body if isinstance(node, ast.If)]
    seen = {alias.name: node.module for node in guarded.body for alias in node.names}
    assert seen == {name: f"jaxdistill.{module}" for name, module in jd._MODULE_OF.items()}


def test_the_import_alone_brings_no_library():
    code = (
        "import sys, jaxdistill;"
        "print([m for m in ('jax', 'flax', 'optax', 'orbax', 'numpy') if m in sys.modules])"
    )
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert found.stdout == "[]\n"


@pytest.mark.costly
@pytest.mark.parametrize("method", sorted(set(jd.METHODS) - {"add", "lightning"}))
def test_each_method_leaves_a_student_for_all_its_steps(method):
    steps = (1,) if method == "endpoint" else (1, 2, 3)
    found = jd.distill(problem(), method, settings=NO_GAN.get(method), options=options(steps=steps))
    assert tuple(found.params) == steps
    noise = jax.random.normal(jax.random.key(0), (4, 2))
    for n in steps:
        images = found.sample(noise, jnp.arange(4) % 2, n)
        assert images.shape == (4, 2) and bool(jnp.isfinite(images).all())
    assert any("loss" in record for records in found.history.values() for record in records)


def test_a_student_goes_where_its_teacher_goes():
    """Ten steps of the exact score end far from one: regression on the pairs brings them near."""
    settings = {"learning_rate": 0.05}
    made = options(iterations=150, health_every=150, steps=(1,), pool=512)
    before = jd.distill(
        problem(), "direct", settings=settings, options=options(iterations=1, steps=(1,))
    )
    after = jd.distill(problem(), "direct", settings=settings, options=made)
    distance = [
        records[-1]["health/distance_1"]
        for found in (before, after)
        for records in found.history.values()
    ]
    assert distance[1] < 0.7 * distance[0], distance


def test_one_seed_gives_the_same_bits_and_another_one_others():
    def trained(seed):
        made = jd.distill(problem(), "tdm", options=options(seed=seed))
        return np.concatenate([np.ravel(a) for a in jax.tree.leaves(made.params[3])])

    first = trained(0)
    assert first.tobytes() == trained(0).tobytes() != trained(1).tobytes()


def test_a_workdir_resumes_and_belongs_to_one_problem(tmp_path):
    first = jd.distill(problem(), "tdm", options=options(), workdir=tmp_path / "run")
    again = jd.distill(problem(), "tdm", options=options(), workdir=tmp_path / "run")
    for a, b in zip(jax.tree.leaves(first.params), jax.tree.leaves(again.params), strict=True):
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    other = problem(params={**TEACHER, "slope": jnp.ones(2)})
    with pytest.raises(jd.UserError, match="holds a run of another config"):
        jd.distill(other, "tdm", options=options(), workdir=tmp_path / "run")


@pytest.mark.parametrize(
    ("changes", "method", "settings", "message"),
    [
        ({}, "imagine_flesh", {}, "method = 'imagine_flesh' is not known; choose one of"),
        ({}, "tdm", {"rate": 1.0}, "settings has no setting 'rate'; it has learning_rate"),
        ({}, "tdm", {"learning_rate": 0.0}, "learning_rate must be above 0, got 0"),
        ({}, "add", {}, "give problem.features"),
        ({"null_cond": None}, "tdm", {"guidance": 2.0}, "guidance other than 1 needs"),
        ({"conds": lambda i: np.arange(2)}, "tdm", {}, "a batch of 2 rows is too small"),
    ],
)
def test_a_mistake_is_one_line(changes, method, settings, message):
    with pytest.raises(jd.UserError) as error:
        jd.distill(problem(**changes), method, settings=settings, options=options())
    assert message in str(error.value) and "\n" not in str(error.value)
