"""The contract of a finished run in detail: results, cards, exports, health; sampling; and that
every flag has an effect.
"""

import json
import math
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from shell import TINY, assert_same_bits, folder_bytes, run_command, tiny_config

from configs import base
from jaxdistill import main, sample
from jaxdistill.errors import UserError
from jaxdistill.methods import METHODS, Method
from jaxdistill.methods.recipe import Recipe, SamplerSpec, Stage, adamw
from jaxdistill.run import checkpoint, distillation, loop, phase, records, report
from jaxdistill.run.distillation import Distillation
from jaxdistill.run.guard import Event
from jaxdistill.run.run import Run
from jaxdistill.run.seeds import seed_of
from jaxdistill.tasks import open_task
from jaxdistill.tasks.health import Health
from jaxdistill.tasks.labelled_images import data
from jaxdistill.tasks.settings import changed
from jaxdistill.tasks.small import SmallTask

ROW_KEYS = {
    "model",
    "steps",
    "guidance",
    "fd",
    "accuracy",
    "precision",
    "recall",
    "diversity",
    "images_per_second",
}


@pytest.fixture(scope="module")
def folder(finished):
    return Path(finished[0])


@pytest.fixture(scope="module")
def results(finished):
    return json.loads(json.dumps(finished[1]))


@pytest.fixture(scope="module")
def config():
    return tiny_config()


def without_rates(rows):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


def job(config, workdir):
    """A task with its run in a workdir."""
    task = open_task(config)
    workdir.mkdir(exist_ok=True)
    return task, Run(config, workdir, loop.StopSignal(), task.layout)


# -------------------------------------------------------------------------------- what a run leaves


def test_rows_cover_reference_extra_guidances_and_each_step_count(results):
    found = [(row["model"], row["steps"], row["guidance"]) for row in results["rows"]]
    teacher = [
        ("teacher", 5, 1.25),
        ("teacher", 5, 1.0),
        *(("teacher", n, 1.25) for n in (1, 2, 3)),
    ]
    assert found == teacher + [("student", n, 1.0) for n in (1, 2, 3)]


def test_rows_hold_every_promised_number_in_its_range(results):
    for row in results["rows"]:
        assert set(row) >= ROW_KEYS
        assert np.isfinite([v for k, v in row.items() if k != "model"]).all(), row
        assert row["fd"] > 0 and row["images_per_second"] > 0 and row["diversity"] > 0
        assert all(0 <= row[k] <= 1 for k in ("accuracy", "precision", "recall"))


def test_ratio_is_fd_over_the_references(results):
    first = results["rows"][0]
    assert (
        results["reference"] == {k: first[k] for k in results["reference"]}
        and first["ratio"] == 1.0
    )
    for row in results["rows"]:
        assert row["ratio"] == pytest.approx(row["fd"] / first["fd"], abs=1e-3)


def test_results_and_protocol_say_what_the_numbers_depend_on(results, folder, config):
    assert results["config"] == json.loads(config.to_json()) and results["seed"] == config.seed
    assert results["versions"]["jax"] == jax.__version__ and {
        "jaxdistill",
        "python",
        "numpy",
        "machine",
    } <= set(results["versions"])
    assert all(v >= 0 for v in results["seconds"].values())
    protocol = results["protocol"]
    assert (
        protocol["samples"] == config.eval.samples and protocol["sampling_seed"] == config.eval.seed
    )
    assert protocol["reference_count"] == 360 and protocol["pixel_range"] == [0.0, 1.0]
    assert (
        protocol["extractor_sha256"]
        == json.loads((folder / "extractor" / "card.json").read_text())["hash"]
    )


@pytest.mark.long
def test_the_other_split_is_scored_on_request(results, folder, tmp_path):
    """One run on both splits: its distances to validation are known from the table on test."""
    shutil.copytree(folder, tmp_path / "run")
    config = tiny_config(**{"eval.split": "validation"})
    (tmp_path / "run" / "config.json").write_text(
        config.to_json()
    )  # as if it had been the run's config: nothing is trained again
    found = main.run(config, tmp_path / "run")
    for row, on_test in zip(found["rows"], results["rows"], strict=True):
        assert row["fd"] == row["fd_validation"] == on_test["fd_validation"] != on_test["fd"]
    protocol = found["protocol"]
    assert (
        protocol["reference_set"] == "digits validation split"
        and protocol["reference_count"] == 359
    )
    assert protocol["reference_sha256"] != results["protocol"]["reference_sha256"]


def test_results_md_is_the_same_table_with_its_protocol(results, folder):
    text = (folder / "results.md").read_text()
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in text.splitlines()
        if line.startswith("|")
    ]
    head, rows = lines[0], lines[2:]
    for cells, row in zip(rows, results["rows"], strict=True):
        shown = dict(zip(head, cells, strict=True))
        assert (shown["model"], shown["steps"], float(shown["guidance"])) == (
            row["model"],
            str(row["steps"]),
            row["guidance"],
        )
        for key in ("fd", "accuracy", "precision", "recall", "diversity"):
            title = next(h for h in head if h.lower().startswith(key))
            assert float(shown[title]) == pytest.approx(row[key], abs=6e-4)
    assert results["protocol"]["extractor_sha256"] in text and f"{results['floor_fd']:.3f}" in text


def test_results_keep_the_guards_events_until_the_training_is_made_again(config, tmp_path):
    wrong = Event(10, "contrast_1", 2.0, math.nan, 1.5, 0.0, 0.2, "stop")
    worse, found = wrong._replace(number="diversity_2", value=3.0, far=4.0), []
    for events in ({"student": [Event.of_loss(3), wrong, worse]}, {}, {"student": []}):
        run = job(config, tmp_path / "run")[1]
        run.events = events
        results = run.write_results({"rows": []}, title="T", notes="", columns={})
        found.append((results["guard"], (run.workdir / "results.md").read_text()))
    assert len(found[0][0]["student"]) == 3 and found[0][0] == found[1][0]
    assert "Guard, student, step 10: diversity_2 = 3 ± nan is 4.00 times" in found[0][1]
    assert found[0][1].count("Guard, ") == 2 and "(and 1 more): stop." in found[0][1]
    assert found[0][1] == found[1][1] and found[2][0] == {}


def test_pictures_show_something(folder):
    for name in (
        "results.png",
        "curves.png",
        *(p.relative_to(folder) for p in (folder / "samples").iterdir()),
    ):
        with Image.open(folder / name) as picture:
            assert picture.format == "PNG" and min(picture.size) > 50
            assert np.asarray(picture.convert("L")).std() > 5, name


@pytest.mark.parametrize("split", ["test", "validation"])
def test_the_chart_names_the_split_that_was_scored(split):
    row = {"steps": 2, "guidance": 1.0, "fd": 1.0, "fd_noise": 0.1}
    rows = [{**row, "model": model} for model in ("teacher", "student")]
    axes = report.new_figure(4.0, 3.0).subplots()
    report.fd_curve(axes, {"rows": rows, "reference": None, "config": {"eval": {"split": split}}})
    assert axes.get_ylabel() == f"Fréchet distance ({split})"


def test_the_curves_picture_shows_numbers_without_their_errors(tmp_path, monkeypatch):
    figure = report.new_figure(8.0, 4.0)
    monkeypatch.setattr(report, "new_figure", lambda width, height: figure)
    line = {"step": 1, "health/contrast_1": 1.0, "health/contrast_1_error": 0.1}
    report.curves_picture(tmp_path / "curves.png", {"student": [line]})
    shown = [line.get_label() for axes in figure.axes for line in axes.lines]
    assert shown == ["contrast_1"]


def test_health_and_losses_are_in_the_curves(folder):
    student = records.read_curve(folder / "curves" / "student.jsonl")
    losses, health = (
        [r for r in student if "loss" in r],
        [r for r in student if "health/diversity_1" in r],
    )
    assert [r["step"] for r in losses] == [4, 8, 12] and [r["step"] for r in health] == [0, 12]
    assert {"reconstruction", "generator", "discriminator", "grad_norm"} <= set(losses[0])
    assert {
        f"health/{k}_{n}"
        for k in ("diversity", "contrast", "saturation", "distance", "fd")
        for n in (1, 2, 3)
    } <= set(health[0])
    assert [
        r["step"]
        for r in records.read_curve(folder / "curves" / "teacher.jsonl")
        if "health/fd" in r
    ] == [12, 24, 36, 40]


def test_last_two_checkpoints_and_tensorboard_logs_of_both_phases_are_kept(folder):
    for name, steps in (("teacher", {36, 40}), ("student", {8, 12})):
        assert {
            int(p.name) for p in (folder / "checkpoints" / name).iterdir() if p.name.isdigit()
        } == steps
        events = list((folder / "tensorboard" / name).glob("events.out.tfevents.*"))
        assert events and all(p.stat().st_size > 500 for p in events)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_card_says_how_to_run_the_parameters(folder, config, role):
    _, found = checkpoint.load_export(folder / role)
    assert found["role"] == role and found["format"] and found["prediction"] == config.prediction
    assert found["model"] == {**config.model.to_dict(), "num_classes": 10}
    assert found["schedule"] == config.schedule.to_dict()
    wanted = {
        "teacher": {"grid": "trailing", "steps": 5, "guidance": 1.25, "noise_correction": False},
        "student": {
            "grid": "nested",
            "times": [1.0, 0.5, 0.2],
            "steps": 3,
            "guidance": 1.0,
            "noise_correction": True,
        },
    }[role]
    assert {k: found["sampler"][k] for k in wanted} == wanted
    assert found["data"]["image_shape"] == [8, 8, 1] and found["data"]["range"] == [-1.0, 1.0]


def test_exports_are_the_averaged_parameters_of_the_last_checkpoint(folder, config):
    made = phase.programs(open_task(config).distillation.planned(0), open_task(config).layout)
    restored, _ = checkpoint.Checkpoints(folder / "checkpoints" / "student").restore(made.state)
    exported = checkpoint.load_export(folder / "student")[0]
    assert int(restored.step) == 12 and restored.params["discriminator"]
    assert_same_bits(exported, restored.ema_params)
    with pytest.raises(AssertionError):  # the average, not the last step's own
        assert_same_bits(exported, restored.params["student"])
    with pytest.raises(AssertionError):  # and no copy of the teacher
        assert_same_bits(exported, checkpoint.load_export(folder / "teacher")[0])


# -------------------------------------------------------------------------------- starting it again


@pytest.mark.long
def test_second_start_of_the_real_command_makes_lost_results_again_and_leaves_everything_else(
    folder, results, tmp_path
):
    copy = Path(shutil.copytree(folder, tmp_path / "run"))
    lost = ("results.json", "results.md", "results.png", "curves.png", "sampler.stablehlo")
    for name in lost:
        (copy / name).unlink()
    kept = {
        name: folder_bytes(copy / name)
        for name in ("student", "teacher", "extractor", "checkpoints", "curves")
    }
    stamps = {p: p.stat().st_mtime_ns for p in (copy / "student").rglob("*")}
    found = run_command("jaxdistill.main", f"--config={TINY}", f"--workdir={copy}")
    assert found.returncode == 0, found.stderr
    assert "| student | 3 |" in found.stdout
    again = json.loads((copy / "results.json").read_text())
    assert without_rates(again["rows"]) == without_rates(results["rows"])
    assert again["seconds"]["teacher"] == results["seconds"]["teacher"]
    assert all((copy / name).stat().st_size > 0 for name in lost)
    assert {name: folder_bytes(copy / name) for name in kept} == kept
    assert {p: p.stat().st_mtime_ns for p in (copy / "student").rglob("*")} == stamps


# ------------------------------------------------------------------------- each flag does something

EPS = {"prediction": "eps", "schedule.name": "linear", "model.time_scale": 1.0}
FLAGS = {
    "default": {},
    "forward": {"methods.imagine_flash.backward": False},
    "no SRL": {"methods.imagine_flash.srl": False},
    "fresh noise": {"methods.imagine_flash.noise": "fresh"},
    "initial noise": {"methods.imagine_flash.noise": "initial"},
    "one step": {"methods.imagine_flash.whole_trajectory": False},
    "forward, one step": {
        "methods.imagine_flash.backward": False,
        "methods.imagine_flash.whole_trajectory": False,
    },
    "no adversary": {"methods.imagine_flash.adversarial_weight": 0.0},
    "stronger adversary": {"methods.imagine_flash.adversarial_weight": 0.5},
    "adversary at low noise": {"adversarial.high": 0.5},
    "non-saturating": {"adversarial.loss": "non_saturating"},
    "wider heads": {"adversarial.width": 24},
    "no noise correction": {"methods.imagine_flash.noise_correction": False},
    "no shift": {"methods.imagine_flash.shift": "none"},
    "linear shift": {"methods.imagine_flash.shift": "linear"},
    "another linear shift": {
        "methods.imagine_flash.shift": "linear",
        "methods.imagine_flash.shifts.linear.high": 0.8,
    },
    "power shift": {"methods.imagine_flash.shift": "power"},
    "another power shift": {
        "methods.imagine_flash.shift": "power",
        "methods.imagine_flash.shifts.power.strength": 0.2,
    },
    "another table": {"methods.imagine_flash.shifts.table.values": (0.1, 0.2, 0.3)},
    "weighted": {"methods.imagine_flash.weight_power": 1.0},
    "shortcut": {"methods.imagine_flash.shortcut": 0.5},
    "narrower conditioning": {"model.cond_width": 16},
    "no guidance": {"methods.imagine_flash.guidance": 1.0},
    "more guidance": {"methods.imagine_flash.guidance": 3.0},
    "two teacher steps": {"methods.imagine_flash.teacher_steps": 2},
    "two teacher steps of second order": {
        "methods.imagine_flash.teacher_steps": 2,
        "methods.imagine_flash.teacher_solver": "dpm_solver_pp_2m",
    },
    "trailing grid": {"student.grid": "trailing"},
    "other times": {"student.times": (1.0, 0.6, 0.3)},
    "fewer steps": {"student.steps": (1, 2)},
    "other schedule": {"schedule.snr_scale": 2.0},
    "x0 prediction": {"prediction": "x0"},
    "eps": EPS,
    "eps, no noise correction": {**EPS, "methods.imagine_flash.noise_correction": False},
}


@pytest.mark.long
def test_each_flag_changes_the_program_of_the_students_loss(monkeypatch):
    """Traced, not compiled: a flag that is read nowhere leaves the program as it was."""
    monkeypatch.setattr(Distillation, "check", lambda distillation: None)  # traces it, too
    programs = {}
    for name, changes in FLAGS.items():
        task = open_task(tiny_config(**changes))
        found = task.distillation

        def loss(batch, key, task=task, found=found):
            teacher = task.first_params()
            params = found.first_params(0, teacher, None)
            return found.loss(0)(params, {"teacher": teacher, "null": {}}, batch, key)

        batch = data.Batches(task.dataset.train, 12, 0)[0]
        closed = jax.make_jaxpr(loss)(
            {**batch, "real": batch["x0"], "real_cond": batch["cond"]}, jax.random.key(0)
        )
        constants = b"".join(
            np.asarray(c).tobytes()
            for c in closed.consts
            if not jax.dtypes.issubdtype(c.dtype, jax.dtypes.prng_key)
        )
        programs[name] = f"{closed.jaxpr}{constants!r}"
    for name, program in programs.items():
        same = [other for other in programs if other != name and programs[other] == program]
        assert not same, f"{name} is the same as {same}"


@pytest.mark.parametrize("decay_to", [1.0, 0.5, 0.02])
def test_the_rate_ends_at_the_asked_share(decay_to):
    """Of a gradient that never changes, Adam's step is the rate."""
    tx = adamw(0.1, 60, warmup=10, b2=0.99, decay_to=decay_to)
    state, sizes, update = tx.init(jnp.zeros(())), [], jax.jit(tx.update)
    for _ in range(61):
        step, state = update(jnp.ones(()), state, jnp.zeros(()))
        sizes.append(-float(step))
    np.testing.assert_allclose(
        [sizes[0], sizes[10], max(sizes), sizes[-1]], [0.0, 0.1, 0.1, 0.1 * decay_to], atol=1e-6
    )


def test_reals_from_the_teacher_are_its_own_images_beside_their_labels(folder, tmp_path):
    config = tiny_config(
        **{"adversarial.reals": "teacher", "adversarial.pool": 30, "eval.batch_size": 20}
    )
    task, run = job(config, tmp_path / "run")
    task.prepare(run, checkpoint.load_export(folder / "teacher")[0])
    stage = task.recipe.stages[0]
    batches = [task.batches(stage, "student")(i) for i in range(5)]
    reals, labels = (np.concatenate([b[key] for b in batches]) for key in ("real", "real_cond"))
    assert reals.shape == (60, 8, 8, 1) and reals.min() >= -1 and reals.max() <= 1
    assert len(np.unique(reals.reshape(60, -1), axis=0)) == 30  # the pool, twice
    seed = seed_of(config.seed, "pool")
    images, drawn_labels = drawn(tmp_path, folder / "teacher", "--num=30", f"--seed={seed}")
    for image, label in zip(images * 2 - 1, drawn_labels, strict=True):
        near = np.abs(reals - image).reshape(60, -1).max(1) < 1e-4
        assert near.sum() == 2 and (labels[near] == label).all()
    # What the student is conditioned on comes from the data all the same.
    seen = np.concatenate([b["x0"] for b in batches])
    train_images = task.dataset.train.images * 2 - 1
    assert all((train_images == x).all(axis=(1, 2, 3)).any() for x in seen)


def test_reals_are_the_data_by_default(tmp_path):
    task, _ = job(tiny_config(), tmp_path / "run")
    batch = task.batches(task.recipe.stages[0], "student")(0)
    assert np.array_equal(batch["real"], batch["x0"])
    assert np.array_equal(batch["real_cond"], batch["cond"])


def test_a_health_line_has_each_number_with_its_error(tmp_path, capsys):
    random = np.random.default_rng(0)
    reference = random.uniform(size=(20, 4, 4, 1)).astype(np.float32)
    latents = random.normal(size=(20, 2, 2, 3)).astype(np.float32)
    grey = {n: 0.5 + np.float32(n / 4) * (reference - 0.5) for n in (1, 3)}

    def draw(trained, steps):
        return {n: (grey[n], latents + 1) for n in steps}

    groups = np.arange(20) % 2
    made = Health(reference, groups, draw, tmp_path, latents=latents)
    numbers = made.of("student", (1, 3), 40)(None, 10)
    assert numbers["diversity_1"] == pytest.approx(0.25, rel=1e-4)
    assert numbers["contrast_3"] == pytest.approx(0.75, rel=1e-4)
    assert numbers["channel_mean_3"] == pytest.approx(1.0, rel=0.2)
    for name in ("brightness", "contrast", "detail", "diversity", "channel_spread"):
        assert numbers[f"{name}_1_error"] >= 0
    assert "student 10/40, 3 steps: diversity 0.750" in capsys.readouterr().out
    assert (tmp_path / "student_0000010.png").exists()


@pytest.mark.parametrize(
    ("method", "changes", "wanted"),
    [
        ("add", {}, "a lower {}adversarial_weight or a lower learning rate"),
        ("matched", {}, "a lower {}flash.adversarial_weight or a lower learning rate"),
        ("tdm", {}, "a lower {}learning_rate"),
        (
            "imagine_flash",
            {"methods.imagine_flash.noise": "fresh"},
            "{0}noise=trajectory or a lower {0}adversarial_weight or a lower learning rate",
        ),
    ],
)
def test_a_guards_advice_names_settings_that_the_method_has(method, changes, wanted):
    found = distillation.mend(changed(tiny_config(), {"method.name": method, **changes}))
    assert found == wanted.format(f"config.methods.{method}.")


@pytest.mark.costly
@pytest.mark.parametrize("method", [name for name in METHODS if name != "endpoint"])
def test_a_stage_ends_by_numbers_of_what_its_student_is_for(method, monkeypatch):
    """One for eight steps, or half of one for a single step, is no worse for its three steps."""
    unlike = {"step_distillation": {"8"}, "lightning": {"4", "2-flow", "1-flow"}}
    changes = {"method.name": method, "student.keep_best": "fd_3"}
    changes |= {"methods.step_distillation.first": 8}
    monkeypatch.setattr(SmallTask, "batches", lambda *given: lambda i: None)
    work = open_task(changed(tiny_config(), changes)).distillation
    trainings = [
        (stage.name, work.training(i, {}, {}, {}, lambda trained, step: {}))
        for i, stage in enumerate(work.recipe.stages)
    ]
    assert {name for name, made in trainings if made.guard is None} == unlike.get(method, set())
    assert not any(made.keep_best for name, made in trainings if made.guard is None)
    assert any(made.keep_best for name, made in trainings)


def test_an_export_of_fewer_iterations_is_not_taken_for_a_longer_run(folder):
    config = tiny_config()
    task, run = job(config, folder)
    assert task.exported(run).keys() == {*config.student.steps}
    longer = tiny_config(**{"student.iterations": config.student.iterations + 1})
    assert job(longer, folder)[0].exported(run) == {}


def test_a_workdir_of_other_images_is_refused(folder, tmp_path, monkeypatch):
    shutil.copy(folder / "inputs.json", tmp_path)
    real = data.digits()
    other = real.train._replace(images=real.train.images[:, ::-1].copy())
    monkeypatch.setattr(data, "digits", lambda: real._replace(train=other))
    task, run = job(tiny_config(), tmp_path)
    with pytest.raises(UserError, match=r"changed since it began: the images \(config.data\);"):
        task.execute(run)


@pytest.mark.parametrize("made", [lambda x: x, lambda x: (x, 0.0), lambda x: (x[:, 0], {})])
def test_a_loss_of_another_form_is_refused_before_any_work(monkeypatch, made):
    def loss(params, teacher_params, batch, key):
        return made(batch["x0"])

    def recipe(kit, settings):
        stage = Stage("", loss, kit.optimizers(settings.learning_rate), serves=kit.steps)
        return Recipe([stage], SamplerSpec())

    monkeypatch.setitem(METHODS, "lcm", Method(METHODS["lcm"].settings, recipe))
    with pytest.raises(UserError, match=r"student's loss must return \(scalar, dict of"):
        open_task(changed(tiny_config(), {"method.name": "lcm"}))


def test_teacher_of_another_run_is_taken_over(folder, tmp_path):
    task, run = job(tiny_config(**{"teacher.path": str(folder / "teacher")}), tmp_path / "run")
    wanted = checkpoint.load_export(folder / "teacher")[0]
    assert_same_bits(task.teacher(run), wanted)
    assert_same_bits(checkpoint.load_export(tmp_path / "run" / "teacher")[0], wanted)


# ---------------------------------------------------------------------------- one step from several


def one_step(folder, **changes):
    """The tiny config's variant whose teacher is the student that `folder` holds."""
    config = base.chosen(tiny_config(), "one", file="tiny")
    config.update_from_flattened_dict({"teacher.path": str(folder), **changes})
    return config


@pytest.mark.long
def test_a_student_of_one_step_learns_from_a_finished_one(folder, results, tmp_path):
    found = main.run(
        one_step(folder / "student", **{"student.iterations": 60, "log.every": 10}),
        tmp_path / "run",
    )
    before, after = (without_rates(r["rows"]) for r in (results, found))
    several, once = (
        {k: v for k, v in row.items() if k not in ("model", "ratio")} for row in after[:2]
    )
    same = [
        {k: v for k, v in row.items() if k not in ("model", "ratio")}
        for row in before
        if row["model"] == "student"
    ]
    assert several == same[2] and once == same[0]  # as that run scored it at three steps and at one
    assert [(row["model"], row["steps"]) for row in after] == [
        ("teacher", 3),
        ("teacher", 1),
        ("student", 1),
    ]
    assert after[2]["fd"] < after[1]["fd"]
    curve = records.read_curve(tmp_path / "run" / "curves" / "student.jsonl")
    losses = [record["loss"] for record in curve if "loss" in record]
    health = [record["health/distance_1"] for record in curve if "health/distance_1" in record]
    assert losses[-1] < losses[0] and health[-1] < health[0]
    assert checkpoint.load_export(tmp_path / "run" / "student")[1]["sampler"]["steps"] == 1


@pytest.mark.parametrize(
    ("role", "changes", "message"),
    [
        (
            "teacher",
            {},
            "holds a teacher, but config.method.name = 'endpoint' needs the student/ folder",
        ),
        (
            "student",
            {"methods.endpoint.noise_correction": False},
            "has sampler.noise_correction = True, but the config says False",
        ),
        (
            "student",
            {"student.times": (1.0, 0.6, 0.2)},
            "has sampler.times = [1.0, 0.5, 0.2], but the config says [1.0, 0.6, 0.2]",
        ),
        (
            "student",
            {"student.grid": "trailing"},
            "has sampler.grid = nested, but the config says trailing",
        ),
    ],
)
def test_a_student_that_is_not_drawn_from_as_the_config_says_is_refused(
    folder, tmp_path, role, changes, message
):
    with pytest.raises(UserError) as refused:
        main.run(one_step(folder / role, **changes), tmp_path / "run")
    assert message in str(refused.value) and not (tmp_path / "run" / "extractor").exists()


# ----------------------------------------------------------------------------------------- sampling


def drawn(tmp_path, model, *arguments):
    """(images, labels) of jaxdistill.sample's npz."""
    out = tmp_path / "drawn.npz"
    sample.main([f"--model={model}", *arguments, f"--out={out}"])
    found = np.load(out)
    assert set(found.files) == {"images", "labels"}
    return found["images"], found["labels"]


@pytest.fixture
def draw(folder, tmp_path):
    return lambda *arguments, role="student": drawn(tmp_path, folder / role, *arguments)


def test_teachers_npz_holds_unit_images_and_labels_that_go_round_the_classes(draw):
    images, labels = draw("--num=25", role="teacher")
    assert images.shape == (25, 8, 8, 1) and images.dtype == np.float32
    assert images.min() >= 0 and images.max() <= 1 and images.std() > 0.05
    assert np.issubdtype(labels.dtype, np.integer) and np.array_equal(labels, np.arange(25) % 10)


def test_labels_change_the_images(draw):
    images, labels = draw("--num=5", "--labels=3,7")
    others, other_labels = draw("--num=5", "--labels=7,3")
    assert labels.tolist() == [3, 7, 3, 7, 3] and other_labels.tolist() == [7, 3, 7, 3, 7]
    assert np.abs(images - others).reshape(5, -1).max(1).min() > 1e-4


def test_same_seed_gives_the_same_bits_and_another_seed_other_images(draw):
    first, again, other = (draw("--num=6", f"--seed={seed}")[0] for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert np.abs(first - other).reshape(6, -1).max(1).min() > 0.1


def test_fewer_images_are_the_beginning_of_more_and_batch_size_does_not_matter(draw):
    many, labels = draw("--num=9", "--seed=4")
    assert len(np.unique(many.reshape(9, -1), axis=0)) == 9
    for arguments in (["--num=5"], ["--num=9", "--batch_size=1"], ["--num=9", "--batch_size=4"]):
        few, few_labels = draw(*arguments, "--seed=4")
        assert np.abs(few - many[: len(few)]).max() < 1e-6 and np.array_equal(
            few_labels, labels[: len(few)]
        )


def test_steps_default_to_the_cards_and_change_the_images(draw):
    default = draw("--num=4")[0]
    by_steps = {n: draw("--num=4", f"--steps={n}")[0] for n in (1, 2, 3)}
    assert default.tobytes() == by_steps[3].tobytes()
    assert (
        np.abs(by_steps[1] - by_steps[2]).max() > 1e-3
        and np.abs(by_steps[2] - by_steps[3]).max() > 1e-3
    )


def test_guidance_defaults_to_the_cards_and_changes_the_images(draw):
    plain, one, guided = (
        draw("--num=4")[0],
        draw("--num=4", "--guidance=1.0")[0],
        draw("--num=4", "--guidance=1.5")[0],
    )
    assert plain.tobytes() == one.tobytes()
    assert np.abs(plain - guided).max() > 1e-3 and np.isfinite(guided).all()
    teacher = {
        scale: draw("--num=4", *flag, role="teacher")[0]
        for scale, flag in {None: [], 1.25: ["--guidance=1.25"]}.items()
    }
    assert teacher[None].tobytes() == teacher[1.25].tobytes()


def test_noise_correction_flag_is_obeyed_where_it_matters(tmp_path):
    built = open_task(tiny_config(**EPS))
    params = built.first_params()
    params = jax.tree.map(lambda p: p + 0.03 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    checkpoint.export(tmp_path / "student", params, built.student_sampler.card)
    default, on, off = (
        drawn(tmp_path, tmp_path / "student", "--num=64", "--steps=2", *flag)[0]
        for flag in ([], ["--noise_correction=true"], ["--noise_correction=false"])
    )
    assert default.tobytes() == on.tobytes() and np.abs(on - off).max() > 1e-3


@pytest.mark.parametrize("num", [1, 12])
def test_png_is_a_grid_of_all_images(folder, tmp_path, num, capsys):
    out = tmp_path / "grid.png"
    sample.main([f"--model={folder / 'student'}", f"--num={num}", f"--out={out}"])
    side = int(np.ceil(np.sqrt(num)))
    with Image.open(out) as picture:
        assert picture.format == "PNG" and np.asarray(picture).std() > 5
        assert (
            64 * side <= picture.width < 68 * side
            and 64 * -(-num // side) <= picture.height < 68 * side
        )
    assert f"{num} image" in capsys.readouterr().out
