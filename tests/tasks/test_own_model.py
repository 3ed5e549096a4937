"""`jd.distill`: every method on a Gaussian whose teacher is known in closed form."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import own_model
import pytest

import jaxdistill as jd
from jaxdistill.run import cost
from jaxdistill.run.loop import NonFiniteError
from jaxdistill.tasks.own_model.problem import following

PLAIN = {"adversarial_weight": 0, "learning_rate": 1e-2}
RATES = {"learning_rate": 1e-3, "fake_learning_rate": 1e-2}
SETTINGS = {
    "imagine_flash": {**PLAIN, "teacher_steps": 20},
    "matched": {"flash": PLAIN, "matching": RATES, "one": {"learning_rate": 1e-2}},
    "endpoint": {"learning_rate": 1e-2, "steps": 3},
    "direct": {"learning_rate": 1e-2, "pairs_steps": 20},
    "step_distillation": {"learning_rate": 1e-2, "first": 4},
    "lcm": {"learning_rate": 1e-2, "intervals": 10},
    "tdm": RATES,
    "dmd2": {**RATES, "adversarial_weight": 0},
}
OPTIONS = jd.Options(steps=(1,), iterations=600, health_every=300, teacher_steps=20, pool=512)


def distilled(method, problem=None, *, settings=None, workdir=None, **changes):
    return jd.distill(
        problem or own_model.problem(),
        method,
        settings=SETTINGS.get(method, {}) if settings is None else settings,
        options=dataclasses.replace(OPTIONS, **changes),
        workdir=workdir,
    )


def spread_of(images, labels):
    return np.mean([np.std(images[labels == c], axis=0).mean() for c in range(3)])


def inputs():
    noise = np.random.default_rng(0).standard_normal((1024, 4)).astype(np.float32)
    return noise, np.arange(1024) % 3


SOLVED = {"step_distillation": 8, "endpoint": 3, "lcm": 10}
"""Methods whose student ends where so many of the teacher's steps do, which spread less."""


@pytest.mark.costly
@pytest.mark.parametrize("method", SETTINGS)
def test_a_student_of_one_step_spreads_as_what_it_learns_from(method):
    """The teacher's own single step draws the classes' means: no spread at all."""
    steps = (1, 2, 3) if method == "matched" else (1,)
    iterations = 2000 if method == "lcm" else 600
    student = distilled(method, steps=steps, iterations=iterations)
    noise, labels = inputs()
    images = np.asarray(student.sample(noise, labels, 1))
    wanted = own_model.SPREAD
    if method in SOLVED:
        wanted = spread_of(teacher_images(noise, labels, SOLVED[method]), labels)
    np.testing.assert_allclose(spread_of(images, labels), wanted, rtol=0.25)
    for c in range(3):
        np.testing.assert_allclose(images[labels == c].mean(0), own_model.MEANS[c], atol=0.2)


def teacher_images(noise, labels, steps):
    model, noise = own_model.problem().model, jnp.asarray(noise)
    denoiser = jd.noise_correction(noise, 1.0)(model.denoiser(own_model.PARAMS, labels))
    grid = jd.trailing_grid(steps, T=1.0)
    return np.asarray(jd.rollout(jd.ddim(model.schedule), denoiser, jd.start(noise), grid)[0].x)


def test_endpoint_ends_where_three_steps_do():
    noise, labels = inputs()
    images = distilled("endpoint").sample(noise, labels, 1)
    np.testing.assert_allclose(images, teacher_images(noise, labels, 3), atol=0.02)


@pytest.mark.costly
@pytest.mark.parametrize("method", ["add", "lightning", "dmd2"])
def test_a_discriminator_on_the_teachers_images_trains(method):
    settings = {"lightning": {"first": 2, "counts": (2, 1)}}.get(method, {})
    student = distilled(
        method,
        own_model.problem(features=own_model.features),
        settings=settings,
        iterations=20,
        pool=64,
    )
    rows = [row for history in student.history.values() for row in history if "loss" in row]
    assert any("discriminator" in row for row in rows)
    assert all(np.isfinite(row["loss"]) for row in rows)


def test_images_are_used_where_they_are_given():
    seen = []

    def images(i):
        seen.append(i)
        return own_model.MEANS[own_model.conds(i)], own_model.conds(i)

    distilled("lcm", own_model.problem(images=images), iterations=4)
    assert seen == [0, 0, 1, 2, 3]  # the first one for its shape


def test_an_iterator_is_as_good_as_a_function_of_i():
    by_function = distilled("imagine_flash", iterations=30)
    stream = (own_model.conds(i) for i in range(30))
    by_iterator = distilled("imagine_flash", own_model.problem(conds=stream), iterations=30)
    np.testing.assert_array_equal(by_function.params[1]["offset"], by_iterator.params[1]["offset"])


def test_a_workdir_gives_the_bits_of_memory_and_is_not_trained_twice(tmp_path):
    memory = distilled("imagine_flash", iterations=60)
    on_disk = distilled("imagine_flash", iterations=60, workdir=tmp_path / "run")
    again = distilled("imagine_flash", iterations=60, workdir=tmp_path / "run")
    for student in (on_disk, again):
        jax.tree.map(np.testing.assert_array_equal, memory.params[1], student.params[1])
    losses = [
        {r["step"]: r["loss"] for r in s.history["student"] if "loss" in r} for s in (memory, again)
    ]
    assert losses[1].keys() == {50, 60}
    for step, loss in losses[1].items():
        np.testing.assert_allclose(losses[0][step], loss, rtol=1e-5)
    with pytest.raises(jd.UserError, match="another config"):
        distilled("imagine_flash", iterations=61, workdir=tmp_path / "run")


def test_nothing_is_written_without_a_workdir(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    distilled("tdm", iterations=2)
    assert list(tmp_path.iterdir()) == []


def linen_problem():
    """A linear network: Flax parameters {"params": {layer: {"kernel"}}}."""
    kernel = np.random.default_rng(0).standard_normal((4, 4)).astype(np.float32) * 0.1
    params = {"params": {"linear": {"kernel": kernel}, "other": {"kernel": kernel}}}

    def apply(params, x, t, cond):
        layers = params["params"]
        return x @ layers["linear"]["kernel"] + t[:, None] * x @ layers["other"]["kernel"]

    model = jd.Model(apply, jd.cosine(), jd.x0_prediction)
    return jd.Problem(model, params, (4,), own_model.conds)


def test_lora_moves_the_named_layer_by_its_rank_and_no_other():
    problem = linen_problem()
    student = distilled(
        "imagine_flash", problem, iterations=30, lora_rank=1, lora_targets=("linear",)
    )
    old, new = problem.params["params"], student.params[1]["params"]
    np.testing.assert_array_equal(new["other"]["kernel"], old["other"]["kernel"])
    moved = np.asarray(new["linear"]["kernel"]) - old["linear"]["kernel"]
    assert np.linalg.matrix_rank(moved, tol=1e-5) == 1


def test_guidance_follows_the_options_and_reaches_the_teacher():
    problem = own_model.problem(null_cond=jnp.zeros_like)
    plain, guided = (
        distilled("direct", problem, iterations=200, guidance=g).sample(*inputs(), 1)
        for g in (1.0, 2.0)
    )
    labels = inputs()[1]
    # The null class is the first, so that the last class is pushed away from it.
    assert np.mean(guided[labels == 2]) > np.mean(plain[labels == 2]) + 0.2


def test_all_guidance_of_a_method_follows_but_what_is_set():
    kind = jd.METHODS["matched"].settings
    found = following(kind, {"matching": {"guidance": 1.0}}, 3.0)
    assert found == {"flash": {"guidance": 3.0}, "matching": {"guidance": 1.0}, "one": {}}


BAD = {
    "options.steps must hold step counts": dict(steps=()),
    "one of options.iterations": dict(iterations=0),
    "options.ema_decay must be in": dict(ema_decay=1.0),
    "give problem.features, or set adversarial_weight": dict(settings={}),
    "needs problem.null_cond": dict(guidance=2.0),
    "options.lora_rank needs Flax parameters": dict(lora_rank=1),
    "'v' needs a schedule with": dict(
        problem=jd.Problem(
            jd.Model(own_model.apply, jd.flow(), jd.v_prediction),
            own_model.PARAMS,
            (4,),
            own_model.conds,
        )
    ),
}


@pytest.mark.parametrize("line", BAD)
def test_a_mistake_is_one_line_before_any_training(line):
    given = {"method": "imagine_flash", "settings": PLAIN, **BAD[line]}
    with pytest.raises(jd.UserError) as error:
        distilled(**given)
    assert line in str(error.value) and "\n" not in str(error.value)
    assert "config." not in str(error.value)


def test_steps_that_are_not_served_are_refused():
    student = distilled("tdm", iterations=2)
    with pytest.raises(
        jd.UserError, match="steps = 4 is not served by this student; choose one of 1"
    ):
        student.sample(*inputs(), 4)


def test_a_stream_that_ends_is_told():
    stream = iter([own_model.conds(i) for i in range(5)])
    with pytest.raises(jd.UserError, match=r"problem\.conds ended"):
        distilled("tdm", own_model.problem(conds=stream), iterations=10)


def test_iterators_do_not_resume(tmp_path):
    stream = iter([own_model.conds(i) for i in range(5)])
    with pytest.raises(jd.UserError, match="iterators do not resume"):
        distilled("tdm", own_model.problem(conds=stream), iterations=4, workdir=tmp_path / "run")


def test_a_loss_that_is_no_number_is_told():
    problem = own_model.problem()
    broken = {**own_model.PARAMS, "means": own_model.MEANS * 1e30}
    with pytest.raises(NonFiniteError, match=r"student step 0: .*loss = (nan|inf)"):
        distilled("tdm", dataclasses.replace(problem, params=broken), iterations=4)


def test_what_it_costs_is_told_before_the_teacher_draws(capsys):
    distilled("direct", iterations=4, pool=64)
    told = capsys.readouterr().out
    kept, work, drawn = (told.index(word) for word in ("memory ", "work ", "the teacher draws"))
    assert kept < work < drawn and "student 4 iterations, 8 calls" in told


def test_a_training_that_does_not_fit_is_refused_before_any_work(monkeypatch, capsys):
    here = cost.here()._replace(memory=100)
    monkeypatch.setattr(cost, "here", lambda: here)
    with pytest.raises(jd.UserError, match=r"needs .* a device .*, and .* has 100 B") as told:
        distilled("direct", iterations=4)
    assert "\n" not in str(told.value) and not capsys.readouterr().out
