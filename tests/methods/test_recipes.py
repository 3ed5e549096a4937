"""What a method is beyond its loss: the stages of every recipe on one small kit, the critics, and
settings.
"""

import re
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxdistill import schedule as schedules
from jaxdistill.methods import METHODS, Method, build
from jaxdistill.methods.dmd2 import dmd2
from jaxdistill.methods.recipe import (
    Kit,
    Recipe,
    SamplerSpec,
    Stage,
    StudentSettings,
    settings_block,
    settings_from,
)
from jaxdistill.methods.tdm import tdm
from jaxdistill.model import Model
from jaxdistill.prediction import x0_prediction
from jaxdistill.sampling import trailing_grid

COSINE = schedules.cosine()
KEY = jax.random.key(3)
ROWS = 12


def apply(params, x, t, cond):
    """x̂0 of one weight, of another bend and level for each row's conditioning."""
    return params * x / (1 + x**2) ** 0.25 + 0.1 * cond[:, None]


def grid(sampler, steps):
    """Of each kind of sampler that the methods ask for."""
    if sampler.grid == "nested":
        return np.float32(sampler.times[:steps])
    if sampler.grid == "listed":
        return np.float32({len(times): times for times in sampler.times}[steps])
    return trailing_grid(steps, 1.0)


def kit(*steps):
    return Kit(
        network=Model(apply, COSINE, x0_prediction),
        null_cond=jnp.zeros_like,
        grid=grid,
        features=lambda params, x, t, cond: [apply(params, x, t, cond)],
        heads=lambda params, states, cond: params * jnp.tanh(states[0]),
        student=StudentSettings(steps=steps, grid="nested", times=(1.0, 0.8, 0.6, 0.4, 0.2)),
    )


def batch_of(stage):
    """What a task gives a stage, by what it says it wants."""
    keys = jax.random.split(jax.random.key(1), 4)
    images = {
        name: 0.7 * jax.random.normal(key, (ROWS, 8))
        for name, key in zip(("x0", "real", "noise", "target"), keys, strict=True)
    }
    wanted = {"x0"} | ({"noise", "target"} if stage.data == "pairs" else set())
    wanted |= {"real"} if stage.reals else set()
    cond = jnp.linspace(-1.0, 1.0, ROWS)
    found = {name: images[name] for name in wanted} | {"cond": cond}
    return found | ({"real_cond": cond[::-1]} if stage.reals else {})


class Read(dict):
    """A dictionary that remembers which keys were looked up."""

    def __init__(self, *args):
        super().__init__(*args)
        self.keys_read = set()

    def __getitem__(self, key):
        self.keys_read.add(key)
        return super().__getitem__(key)


# -------------------------------------------------------------------------------------- the stages

SERVED = {
    **{name: [(1,), (2,), (1, 2, 3), (2, 4), (1, 2, 3, 4, 5)] for name in METHODS},
    "endpoint": [(1,)],
}
ANY_STEPS = {"matched": {"one": {"share": 0.0}}}
"""Settings with which a method serves a student that has no single step."""


@pytest.mark.parametrize("name", METHODS)
def test_stages_divide_the_budget_and_the_step_counts(name):
    for steps in SERVED[name]:
        settings = {} if 1 in steps else ANY_STEPS.get(name, {})
        recipe = build(name, {name: settings})(kit(*steps))
        stages = recipe.stages
        assert sum(stage.share for stage in stages) == pytest.approx(1.0)
        assert all(0 < stage.share <= 1 for stage in stages)
        assert sorted(n for stage in stages for n in stage.serves) == list(steps)
        assert len({stage.name for stage in stages}) == len(stages)
        # Nobody stands before the first, and nobody's critic is without one.
        assert stages[0].teacher == "teacher"
        assert all(stage.critic is not None for stage in stages if stage.critic_updates)
        for n in steps:
            assert len(grid(recipe.sampler, n)) == n


STAGES = [
    pytest.param(name, i, id=f"{name}-{stage.name}" if stage.name else name)
    for name in METHODS
    for i, stage in enumerate(build(name, {})(kit(*SERVED[name][0])).stages)
]


@pytest.mark.parametrize(("name", "i"), STAGES)
def test_a_networks_call_has_whole_multiples_of_rows_that_were_divided_among_devices(name, i):
    """So that each of the devices has its part of every call."""
    seen, divided = set(), set()

    def spied(params, x, t, cond):
        seen.add(x.shape[0])
        return apply(params, x, t, cond)

    def constrain(x):
        divided.add(x.shape[0])
        return x

    network = Model(spied, COSINE, x0_prediction)
    small = replace(kit(*((1,) if name == "endpoint" else (1, 2, 3))), network=network)
    stage = build(name, {})(replace(small, constrain=constrain)).stages[i]
    params = dict.fromkeys(stage.networks, jnp.float32(0.3))
    teacher = jnp.float32(0.7)
    given = {"previous": teacher, "original": teacher} if stage.teacher == "both" else teacher
    for loss in (stage.loss, stage.critic):
        if loss is not None:
            jax.eval_shape(loss, params, given, batch_of(stage), KEY)
    assert seen
    assert all(any(rows % part == 0 for part in divided | {ROWS}) for rows in seen)


@pytest.mark.costly
@pytest.mark.parametrize(("name", "i"), STAGES)
def test_a_stages_loss_reads_what_the_stage_says(name, i):
    """Its networks and no other; of them it pulls on those with an optimizer, and on the teacher
    never; and it looks at images only where it asks for them.
    """
    steps = (1,) if name == "endpoint" else (1, 2, 3)
    stage = build(name, {})(kit(*steps)).stages[i]
    params = {network: jnp.float32(0.3 + 0.1 * j) for j, network in enumerate(stage.networks)}
    previous, original = jnp.float32(0.8), jnp.float32(0.7)
    teacher = {"previous": previous, "original": original} if stage.teacher == "both" else original
    batch, read = batch_of(stage), Read()

    def loss(params, teacher, batch):
        known = Read(params)
        value, _ = stage.loss(known, teacher, batch, KEY)
        read.keys_read |= known.keys_read
        return value

    step = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    value, (on_networks, on_teacher) = step(params, teacher, batch)
    assert np.isfinite(value) and read.keys_read == set(stage.networks)
    trained = {network for network, pull in on_networks.items() if float(pull) != 0}
    assert trained == set(stage.optimizers(1)) and "student" in trained
    if stage.teacher == "teacher":
        assert all(float(pull) == 0 for pull in jax.tree.leaves(on_teacher))
    elsewhere = step(params, teacher, {**batch, "x0": batch["x0"] + 0.5})[0]
    at_T = stage.name.split("-")[0] == "1"  # x_T is noise alone, whatever the image
    assert (float(elsewhere) != float(value)) is (stage.data == "images" and not at_T)


# ------------------------------------------------------------------------------------- the critics


def critics(**options):
    """The methods that have one, on a kit's network without an adversary."""
    network, common = Model(apply, COSINE, x0_prediction), {"null_cond": jnp.zeros_like}
    grids = [trailing_grid(n, 1.0) for n in (1, 2, 3)]
    return {
        "dmd2": dmd2(network, network, grid=grids[-1], guidance_scale=2.0, **common, **options),
        "tdm": tdm(network, network, grids=grids, guidance_scale=2.0, **common, **options),
    }


def states(rows, seed=0):
    return {"x0": jnp.zeros((rows, 8)), "cond": jax.random.normal(jax.random.key(seed), (rows,))}


NETWORKS = {"student": jnp.float32(0.4), "fake": jnp.float32(0.6)}
REAL = jnp.float32(0.7)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["dmd2", "tdm"])
def test_a_critic_learns_of_the_student_and_never_pulls_on_it(name):
    critic = critics()[name].critic

    def value(params, teacher):
        return critic(params, teacher, states(ROWS), KEY)[0]

    of_networks, of_teacher = jax.jit(jax.grad(value, argnums=(0, 1)))(NETWORKS, REAL)
    assert float(of_networks["student"]) == 0 == float(of_teacher)
    assert float(of_networks["fake"]) != 0
    moved = {**NETWORKS, "student": jnp.float32(0.5)}
    assert float(value(moved, REAL)) != float(value(NETWORKS, REAL))


@pytest.mark.costly
@pytest.mark.parametrize("name", ["dmd2", "tdm"])
def test_a_critics_gradient_is_the_one_that_the_loss_gives_to_the_fake_score(name):
    """In expectation: each draws a trajectory of its own. Low noise would weigh single rows."""
    losses, batch = critics(fake_weight=3.0, low=0.3)[name], states(2**15)

    def pull(loss):
        found = jax.jit(jax.grad(lambda p: loss(p, REAL, batch, KEY)[0]))(NETWORKS)
        return float(found["fake"])

    both = pull(losses.loss), pull(losses.critic)
    assert both[0] != both[1]
    np.testing.assert_allclose(*both, rtol=0.02)


@pytest.mark.costly
@pytest.mark.parametrize("name", ["dmd2", "tdm"])
def test_the_fake_scores_loss_pulls_on_the_fake_score_alone(name):
    """Whatever its weight, the student's gradient is the matching's."""

    def pull(weight):
        loss = critics(fake_weight=weight)[name].loss
        return jax.jit(jax.grad(lambda p: loss(p, REAL, states(ROWS), KEY)[0]))(NETWORKS)

    light, heavy = pull(1.0), pull(3.0)
    assert float(heavy["student"]) == pytest.approx(float(light["student"]), rel=1e-5)
    assert float(heavy["fake"]) == pytest.approx(3.0 * float(light["fake"]), rel=1e-5)
    assert float(light["student"]) != 0 != float(light["fake"])


@pytest.mark.parametrize("part", ["loss", "critic"])
@pytest.mark.parametrize("grids", [(2,), (1, 2), (2, 3)])
def test_a_row_of_tdms_batch_meets_its_own_conditioning_alone(grids, part):
    """The loss is a sum over rows: what one row's conditioning changes does not depend on
    another's. Rows that met the state or the conditioning of a neighbour would break it.
    """
    network, rows = Model(apply, COSINE, x0_prediction), 6
    found = tdm(
        network,
        network,
        grids=[trailing_grid(n, 1.0) for n in grids],
        null_cond=jnp.zeros_like,
        guidance_scale=2.0,
    )
    noise = states(rows)["x0"]
    function = jax.jit(
        lambda cond: getattr(found, part)(NETWORKS, REAL, {"x0": noise, "cond": cond}, KEY)[0]
    )

    def value(*changed):
        return float(function(jnp.zeros(rows).at[jnp.asarray(changed, jnp.int32)].set(2.0)))

    plain, alone = value(), [value(row) for row in range(rows)]
    for row in range(rows):
        assert abs(alone[row] - plain) > 1e-4
        for other in range(row):
            together = value(row, other)
            np.testing.assert_allclose(together - alone[row], alone[other] - plain, atol=1e-5)


# ---------------------------------------------------------------------------------------- settings


def test_settings_are_defaults_changed_by_a_block_also_a_nested_one():
    kind = METHODS["matched"].settings
    found = settings_from(kind, {"one": {"share": 0.1}, "flash": {"srl": False}}, "here")
    assert found == replace(
        kind(), one=replace(kind().one, share=0.1), flash=replace(kind().flash, srl=False)
    )


@pytest.mark.parametrize("name", METHODS)
def test_a_methods_block_is_its_settings(name):
    kind = METHODS[name].settings
    assert settings_from(kind, settings_block(kind()), "here") == kind()


@pytest.mark.parametrize(
    ("block", "message"),
    [
        ({"rate": 1}, "config.methods.matched has no setting 'rate'; it has flash, matching, one"),
        (
            {"one": {"stepps": 1}},
            "config.methods.matched.one has no setting 'stepps'; it has share, steps,"
            " learning_rate",
        ),
    ],
)
def test_a_setting_that_a_method_does_not_have_is_refused_with_those_it_has(block, message):
    with pytest.raises(ValueError) as error:
        build("matched", {"matched": block})
    assert str(error.value) == message


def test_a_setting_without_a_default_is_refused_by_its_name():
    @dataclass
    class Settings:
        learning_rate: float

    with pytest.raises(ValueError, match=r"^block: .*Settings\.learning_rate needs a default$"):
        settings_from(Settings, {"learning_rate": 0.1}, "block")


def loss(params, teacher_params, batch, key):
    return 0.0, {}


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda make: [Stage("", loss, make, serves=(1, 2))], "must return Recipe"),
        (lambda make: Recipe(Stage("", loss, make, serves=(1, 2)), SamplerSpec()), "must return"),
        (lambda make: Recipe([Stage("", loss, make)], SamplerSpec()), "no stage serves 1 steps"),
        (
            lambda make: Recipe([Stage("", loss, make, serves=(1,))], SamplerSpec()),
            "no stage serves 2 steps",
        ),
        (
            lambda make: Recipe([Stage("a", loss, make, data="image")], SamplerSpec()),
            "Stage('a').data = 'image' is not known; choose one of 'noise', 'images', 'pairs'",
        ),
        (
            lambda make: Recipe([Stage("a", loss, make, teacher="last")], SamplerSpec()),
            "Stage('a').teacher = 'last' is not known",
        ),
        (
            lambda make: Recipe([Stage("a", loss, lambda n: {"fake": 0})], SamplerSpec()),
            "Stage('a').optimizers must hold one of 'student'",
        ),
    ],
)
def test_a_recipe_that_cannot_be_trained_is_refused(monkeypatch, made, message):
    @dataclass
    class Settings:
        learning_rate: float = 0.1

    def recipe(kit, settings):
        return made(kit.optimizers(settings.learning_rate))

    monkeypatch.setitem(METHODS, "mine", Method(Settings, recipe))
    with pytest.raises(ValueError, match=re.escape("config.methods.mine: ") + ".*") as refused:
        build("mine", {})(kit(1, 2))
    assert message in str(refused.value)


def test_a_block_may_be_a_variant_of_another_method():
    blocks = {"tdm": {"fake_updates": 2}, "often": {"method": "tdm", "fake_updates": 6}}
    updates = {name: build(name, blocks)(kit(1, 2)).stages[0].critic_updates for name in blocks}
    assert updates == {"tdm": 1, "often": 5}  # the loss itself has one
    assert build("dmd2", blocks)(kit(1, 2)).stages[0].critic_updates == 0
    with pytest.raises(ValueError, match=r"^config\.methods\.often has no setting 'intervals'"):
        build("often", {"often": {"method": "tdm", "intervals": 3}})
    with pytest.raises(ValueError, match=r"^config\.methods\.often: fake_updates must be at least"):
        build("often", {"often": {"method": "tdm", "fake_updates": 0}})(kit(1, 2))


@pytest.mark.parametrize(
    ("name", "blocks", "message"),
    [
        ("tmd", {}, "config.method.name = 'tmd' is not known; choose one of 'imagine_flash',"),
        ("mine", {"mine": {"method": "tmd"}}, "mine.method = 'tmd' is not known; choose one of"),
    ],
)
def test_an_unknown_method_is_refused_with_the_key_that_names_it(name, blocks, message):
    with pytest.raises(ValueError) as error:
        build(name, blocks)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize(
    ("name", "steps", "block", "message"),
    [
        ("endpoint", (1, 2), {}, 'set config.student.steps="(1,)", got (1, 2)'),
        ("endpoint", (2,), {}, 'set config.student.steps="(1,)", got (2,)'),
        ("endpoint", (1,), {"steps": 1}, "needs a grid of several steps"),
        ("matched", (1, 2), {"matching": {"share": 0.0}}, "matching.share must be above 0"),
        ("matched", (1, 2), {"one": {"share": -0.1}}, "one.share at least 0"),
        ("matched", (1, 2), {"one": {"share": 0.65}}, "their sum below 1"),
        ("matched", (2, 3), {}, "config.student.steps = (2, 3) has no 1; set it to 0"),
        ("matched", (1, 2), {"matching": {"flash_weight": -1.0}}, "flash_weight must be at least"),
        ("matched", (1, 2), {"matching": {"fake_updates": 0}}, "fake_updates must be at least 1"),
        ("matched", (1, 2), {"matching": {"grid": "even"}}, "matching.grid = 'even' is not known"),
        (
            "matched",
            (1, 2),
            {"matching": {"grid": "listed", "counts": (2, 6)}},
            "matching.counts holds 6, but the listed times have no grid of that many",
        ),
        (
            "matched",
            (1, 2),
            {"matching": {"grid": "nested"}, "one": {"steps": 6}},
            "one.steps holds 6, but the nested times have no grid of that many",
        ),
        ("dmd2", (1, 2), {"fake_updates": 0}, "fake_updates must be at least 1, got 0"),
        ("dmd2", (1, 2), {"adversarial_weight": -1.0}, "adversarial_weight must be at least 0"),
        ("add", (1, 2), {"adversarial_weight": 0.0}, "add needs its adversary"),
        ("lcm", (1, 2), {"target_decay": 1.0}, "target_decay must be in [0, 1), got 1"),
        ("lightning", (1, 2), {"counts": (3, 1)}, "each of counts must divide the one before"),
        ("lightning", (1, 2), {"first_share": 1.0}, "first_share must be in (0, 1), got 1"),
        ("step_distillation", (1, 32), {}, "first = 16 must be at least the most steps"),
        ("step_distillation", (1,), {"first": 0}, "first must be at least 1, got 0"),
        ("direct", (1, 2), {"pairs_share": 1.0}, "pairs_share must be above 0 and below 1"),
        ("direct", (1, 2), {"pairs_steps": 0}, "pairs_steps at least 1, got 0 and 0"),
        ("imagine_flash", (1, 2), {"shift": "odd"}, "shift = 'odd' is not known"),
    ],
)
def test_settings_that_do_not_go_together_are_refused_by_their_names(name, steps, block, message):
    with pytest.raises(ValueError) as error:
        build(name, {name: block})(kit(*steps))
    assert str(error.value).startswith(f"config.methods.{name}: ") and message in str(error.value)


def test_optimizers_are_of_the_networks_that_are_asked_for():
    made = kit(1).optimizers(1e-3, fake=1e-4, discriminator=True)(10)
    assert set(made) == {"student", "fake", "discriminator"}
    assert set(kit(1).optimizers(1e-3)(10)) == {"student"}
    for rate in (0.0, -1.0):
        with pytest.raises(ValueError, match="learning_rate must be above 0"):
            kit(1).optimizers(rate)
