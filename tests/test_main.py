import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import shell
from jaxdistill import card, checkpoint, experiment, loop, main, sample
from PIL import Image
from shell import assert_same_bits, folder_bytes, run_command, run_script, tiny_config

ROW_KEYS = {"model", "steps", "guidance", "fd", "accuracy", "precision", "recall", "diversity", "images_per_second"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return shell.finished_run(tmp_path_factory)


@pytest.fixture(scope="module")
def results(finished):
    return json.loads((finished / "results.json").read_text())


@pytest.fixture(scope="module")
def config():
    return tiny_config()


def without_rates(rows):
    return [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]


# ------------------------------------------------------------------------------------ what a run leaves


def test_rows_cover_reference_extra_guidances_and_each_step_count(results, config):
    found = [(row["model"], row["steps"], row["guidance"]) for row in results["rows"]]
    teacher = [("teacher", 5, 1.25), ("teacher", 5, 1.0), *(("teacher", n, 1.25) for n in (1, 2, 3))]
    assert found == teacher + [("student", n, 1.0) for n in (1, 2, 3)]


def test_rows_hold_every_promised_number_and_all_are_finite_and_in_range(results):
    for row in results["rows"]:
        assert set(row) >= ROW_KEYS
        numbers = {k: v for k, v in row.items() if k != "model"}
        assert np.isfinite(list(numbers.values())).all(), row
        assert row["fd"] > 0 and row["images_per_second"] > 0 and row["diversity"] > 0
        assert all(0 <= row[k] <= 1 for k in ("accuracy", "precision", "recall"))


def test_ratio_is_fd_over_the_references(results):
    first = results["rows"][0]
    assert results["reference"] == {k: first[k] for k in results["reference"]} and first["ratio"] == 1.0
    for row in results["rows"]:
        assert row["ratio"] == pytest.approx(row["fd"] / first["fd"], abs=1e-3)


def test_results_carry_config_seed_versions_floor_and_seconds_by_phase(results, config):
    assert results["config"] == json.loads(config.to_json())
    assert results["seed"] == config.seed
    assert results["floor_fd"] > 0 and results["train_fd"] > 0
    assert set(results["seconds"]) >= {"extractor", "teacher", "student", "evaluation"}
    assert all(v >= 0 for v in results["seconds"].values())
    assert results["versions"]["jax"] == jax.__version__ and {"jaxdistill", "python", "numpy", "machine"} <= set(results["versions"])


def test_protocol_says_what_the_numbers_depend_on(results, finished, config):
    protocol = results["protocol"]
    assert protocol["samples"] == config.eval.samples and protocol["sampling_seed"] == config.eval.seed
    assert protocol["reference_count"] == 360 and protocol["pixel_range"] == [0.0, 1.0]
    assert protocol["extractor_sha256"] == json.loads((finished / "extractor" / "card.json").read_text())["hash"]


def test_results_md_is_the_same_table(results, finished):
    lines = [line for line in (finished / "results.md").read_text().splitlines() if line.startswith("|")]
    head, rows = [c.strip() for c in lines[0].strip("|").split("|")], [[c.strip() for c in s.strip("|").split("|")] for s in lines[2:]]
    assert len(rows) == len(results["rows"])
    for cells, row in zip(rows, results["rows"], strict=True):
        shown = dict(zip(head, cells, strict=True))
        assert (shown["model"], shown["steps"], float(shown["guidance"])) == (row["model"], str(row["steps"]), row["guidance"])
        for key in ("fd", "accuracy", "precision", "recall", "diversity"):
            title = next(h for h in head if h.lower().startswith(key))
            assert float(shown[title]) == pytest.approx(row[key], abs=6e-4)


def test_floor_and_extractor_are_named_beside_the_table(results, finished):
    text = (finished / "results.md").read_text()
    assert results["protocol"]["extractor_sha256"] in text and f"{results['floor_fd']:.3f}" in text


@pytest.mark.parametrize("name", ["results.png", "curves.png"])
def test_picture_opens_and_shows_something(finished, name):
    with Image.open(finished / name) as picture:
        picture.load()
        assert picture.format == "PNG" and min(picture.size) > 200
        assert np.asarray(picture.convert("L")).std() > 5


def test_sample_grids_of_both_phases_are_kept(finished):
    names = sorted(p.name for p in (finished / "samples").iterdir())
    assert names == ["student_0000006.png", "student_0000012.png", "teacher_0000020.png", "teacher_0000040.png"]
    for name in names:
        with Image.open(finished / "samples" / name) as picture:
            assert np.asarray(picture).std() > 5


def test_health_and_losses_are_in_the_curves(finished):
    student = loop.read_curve(finished / "curves" / "student.jsonl")
    losses, health = [r for r in student if "loss" in r], [r for r in student if "health/diversity_1" in r]
    assert [r["step"] for r in losses] == [4, 8, 12] and [r["step"] for r in health] == [6, 12]
    assert {"reconstruction", "generator", "discriminator", "grad_norm"} <= set(losses[0])
    wanted = {f"health/{k}_{n}" for k in ("diversity", "contrast", "saturation", "distance", "fd") for n in (1, 2, 3)}
    assert wanted <= set(health[0])
    assert [r["step"] for r in loop.read_curve(finished / "curves" / "teacher.jsonl") if "health/fd" in r] == [20, 40]


def test_checkpoints_and_tensorboard_logs_of_both_phases_are_there(finished):
    for phase, steps in (("teacher", {36, 40}), ("student", {8, 12})):
        assert {int(p.name) for p in (finished / "checkpoints" / phase).iterdir() if p.name.isdigit()} == steps
        events = list((finished / "tensorboard" / phase).glob("events.out.tfevents.*"))
        assert events and all(p.stat().st_size > 500 for p in events)


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_card_says_how_to_run_the_parameters(finished, config, role):
    _, found = checkpoint.load_export(finished / role)
    assert found["role"] == role and found["format"] and found["prediction"] == config.prediction
    assert found["model"] == {**config.model.to_dict(), "num_classes": 10}
    assert found["schedule"] == config.schedule.to_dict()
    wanted = {
        "teacher": {"grid": "trailing", "steps": 5, "guidance": 1.25, "noise_correction": False},
        "student": {"grid": "nested", "times": [1.0, 0.5, 0.2], "steps": 3, "guidance": 1.0, "noise_correction": True},
    }[role]
    assert {k: found["sampler"][k] for k in wanted} == wanted
    assert found["data"]["image_shape"] == [8, 8, 1] and found["data"]["range"] == [-1.0, 1.0]


def test_exports_are_the_averaged_parameters_of_the_last_checkpoint(finished, config):
    built = experiment.build(config)
    teacher = checkpoint.load_export(finished / "teacher")[0]
    params = built.student_params(teacher)
    state = jax.eval_shape(lambda: main.init_state(params, built.student_tx, jax.random.key(0), ema_of=experiment.student_of))
    checkpoints = checkpoint.Checkpoints(finished / "checkpoints" / "student")
    assert checkpoints.latest == 12
    restored, _ = checkpoints.restore(state)
    exported = checkpoint.load_export(finished / "student")[0]
    assert_same_bits(exported, restored.ema_params)
    assert int(restored.step) == 12 and restored.params["discriminator"]
    moved = [np.abs(np.asarray(a) - b).max() for a, b in zip(jax.tree.leaves(exported), jax.tree.leaves(teacher), strict=True)]
    assert max(moved) > 0  # it is no copy of the teacher


# ----------------------------------------------------------------------------------------- the program


PROGRAM = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
folder, inputs, out = sys.argv[1:]
exported = jax.export.deserialize(open(folder + "/sampler.stablehlo", "rb").read())
params = ocp.StandardCheckpointer().restore(folder + "/student/params")
given = np.load(inputs)
found = {"platforms": np.array(exported.platforms)}
for b in (1, 5):
    for n in (1, 2, 3):
        images = jax.jit(exported.call)(params, given["noise"][:b], given["labels"][:b], given["times"][:n])
        found[f"{b}_{n}"] = np.asarray(images)
np.savez(out, **found)
"""


@pytest.fixture(scope="module")
def program_output(finished, tmp_path_factory):
    folder = tmp_path_factory.mktemp("program")
    noise, labels = card.draw_noise(3, 0, 5, (8, 8, 1)), np.arange(5, dtype=np.int32)
    times = np.array(json.loads((finished / "student" / "card.json").read_text())["sampler"]["times"], np.float32)
    np.savez(folder / "in.npz", noise=noise, labels=labels, times=times)
    run_script(PROGRAM, finished, folder / "in.npz", folder / "out.npz")
    return dict(np.load(folder / "out.npz"))


def test_program_is_lowered_for_cpu_tpu_and_cuda(program_output):
    assert sorted(program_output["platforms"]) == ["cpu", "cuda", "tpu"]


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_program_without_the_package_draws_the_same_images_as_sample(program_output, finished, tmp_path, steps):
    images, _ = drawn(tmp_path, finished / "student", f"--steps={steps}", "--num=5", "--seed=3")
    for batch in (1, 5):
        found = program_output[f"{batch}_{steps}"]
        assert found.shape == (batch, 8, 8, 1) and found.dtype == np.float32
        assert np.abs(found - images[:batch]).max() < 1e-5


# ------------------------------------------------------------------------------------- starting it again


def test_second_start_of_the_real_command_evaluates_again_and_leaves_the_exports(finished, results, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    kept = {name: folder_bytes(folder / name) for name in ("student", "teacher", "extractor", "checkpoints", "curves")}
    stamps = {p: p.stat().st_mtime_ns for p in (folder / "student").rglob("*")}
    found = run_command("jaxdistill.main", f"--config={shell.TINY}", f"--workdir={folder}")
    assert found.returncode == 0, found.stderr
    assert "| student | 3 |" in found.stdout and "finished" in found.stdout
    again = json.loads((folder / "results.json").read_text())
    assert without_rates(again["rows"]) == without_rates(results["rows"])
    assert {name: folder_bytes(folder / name) for name in kept} == kept
    assert {p: p.stat().st_mtime_ns for p in (folder / "student").rglob("*")} == stamps


def test_lost_results_are_made_again_from_the_exports(finished, results, config, tmp_path):
    folder = Path(shutil.copytree(finished, tmp_path / "run"))
    for name in ("results.json", "results.md", "results.png", "curves.png", "sampler.stablehlo"):
        (folder / name).unlink()
    student = folder_bytes(folder / "student")
    again = main.run(config, folder)
    assert without_rates(again["rows"]) == without_rates(results["rows"])
    assert without_rates(json.loads((folder / "results.json").read_text())["rows"]) == without_rates(results["rows"])
    assert all((folder / name).stat().st_size > 0 for name in ("results.md", "results.png", "curves.png", "sampler.stablehlo"))
    assert folder_bytes(folder / "student") == student
    assert again["seconds"]["teacher"] == results["seconds"]["teacher"]


def test_folder_of_another_config_is_refused_with_the_key_and_both_values(finished):
    before = (finished / "config.json").read_bytes()
    with pytest.raises(main.UserError) as error:
        main.run(tiny_config(**{"student.learning_rate": 0.123}), finished)
    text = str(error.value)
    assert "\n" not in text and str(finished) in text and "student.learning_rate" in text and "0.123 here" in text and "workdir" in text
    assert (finished / "config.json").read_bytes() == before


# ------------------------------------------------------------------------------------- ablations by flag

# Where noise correction matters: eps with some signal left at T.
EPS = {"prediction": "eps", "schedule.name": "linear", "model.time_scale": 1.0}
ABLATIONS = {
    "default": {},
    "forward": {"method.backward": False},
    "no-srl": {"method.srl": False},
    "fresh-noise": {"method.noise": "fresh"},
    "initial-noise": {"method.noise": "initial"},
    "one-step": {"method.whole_trajectory": False},
    "forward-one-step": {"method.backward": False, "method.whole_trajectory": False},
    "no-adversary": {"adversarial.weight": 0.0},
    "non-saturating": {"adversarial.loss": "non_saturating"},
    "power-shift": {"method.shift": "power"},
    "weighted": {"method.weight_power": 1.0},
    "guidance": {"method.guidance": 3.0},
    "two-teacher-steps": {"method.teacher_steps": 2},
    "trailing": {"student.grid": "trailing"},
    "eps": EPS,
    "eps-no-correction": {**EPS, "method.noise_correction": False},
}


@pytest.fixture(scope="module")
def losses(config):
    """{name: (loss, metrics)} at the same parameters, batch and key."""
    found = {}
    for name, changes in ABLATIONS.items():
        small = {"model.width": 16, "adversarial.width": 8}
        built = experiment.build(tiny_config(**small, **changes))
        # Fresh networks end in zeros; with random outputs every part of the method has something to say.
        shapes = jax.eval_shape(lambda b=built: card.init_params(b.model, b.image_shape, 0))
        rng = np.random.default_rng(0)
        teacher, student = (
            jax.tree.map(lambda s, rng=rng: jnp.asarray(rng.normal(size=s.shape, scale=0.2), jnp.float32), shapes) for _ in range(2)
        )
        params = built.student_params(teacher) | {"student": student}
        batch = {"x0": built.dataset.train.images[:12] * 2 - 1, "cond": built.dataset.train.labels[:12]}
        loss, metrics = jax.jit(built.student_loss)(params, teacher, batch, jax.random.key(1))
        found[name] = float(loss), jax.tree.map(float, metrics)
    return found


@pytest.mark.slow
@pytest.mark.parametrize("name", ABLATIONS)
def test_each_flag_gives_a_finite_loss_of_its_own(losses, name):
    loss, metrics = losses[name]
    assert np.isfinite([loss, *metrics.values()]).all()
    others = {other: value for other, (value, _) in losses.items() if other != name}
    nearest = min(others, key=lambda other: abs(others[other] - loss))
    assert abs(others[nearest] - loss) > 1e-5 * abs(loss), f"{name} and {nearest} have the same loss"


def test_weight_zero_leaves_the_discriminator_out_and_the_rest_as_it_was(losses, config):
    (full, metrics), (bare, without) = losses["default"], losses["no-adversary"]
    assert "discriminator" in metrics and "discriminator" not in without
    assert bare == pytest.approx(metrics["reconstruction"], rel=1e-5)
    assert full == pytest.approx(bare + config.adversarial.weight * metrics["generator"] + metrics["discriminator"], rel=1e-5)
    assert experiment.build(tiny_config(**{"adversarial.weight": 0.0})).student_params({})["discriminator"] == {}


def test_noise_correction_flag_reaches_the_card(config):
    for value in (True, False):
        built = experiment.build(tiny_config(**{"method.noise_correction": value}))
        assert built.student_sampler.card["sampler"]["noise_correction"] is value


def test_reals_from_the_teacher_are_its_images_in_the_unit_range(finished, tmp_path):
    config = tiny_config(**{"adversarial.reals": "teacher", "adversarial.pool": 30, "eval.batch_size": 20})
    job = main.Run(experiment.build(config), tmp_path, loop.StopSignal())
    split = job.teacher_reals(checkpoint.load_export(finished / "teacher")[0])
    assert split.images.shape[1:] == (8, 8, 1) and len(split.images) == len(split.labels) >= 30
    assert 0 <= split.images.min() < 0.2 and 0.8 < split.images.max() <= 1
    assert np.array_equal(split.labels, np.arange(len(split.labels)) % 10)
    assert len(np.unique(split.images.reshape(len(split.images), -1), axis=0)) == len(split.images)
    images, labels = drawn(tmp_path, finished / "teacher", "--num=12", f"--seed={config.seed + 200}")
    assert np.abs(split.images[:12] - images).max() < 1e-5 and np.array_equal(split.labels[:12], labels)


def test_teacher_of_another_run_is_taken_and_an_unlike_one_refused(finished, tmp_path):
    path = {"teacher.path": str(finished / "teacher")}
    job = main.Run(experiment.build(tiny_config(**path)), tmp_path, loop.StopSignal())
    assert_same_bits(job.teacher(None), checkpoint.load_export(finished / "teacher")[0])
    with pytest.raises(main.UserError, match=r"schedule.*cosine.*flow"):
        main.run(tiny_config(**path, **{"schedule.name": "flow", "prediction": "flow"}), tmp_path / "other")
    with pytest.raises(main.UserError, match="config.teacher.path.*nowhere|nowhere.*card.json"):
        main.run(tiny_config(**{"teacher.path": str(tmp_path / "nowhere")}), tmp_path / "third")


def test_warning_is_printed_when_diversity_falls(finished, tmp_path, capsys):
    job = main.Run(experiment.build(tiny_config()), tmp_path, loop.StopSignal())
    teacher = checkpoint.load_export(finished / "teacher")[0]

    class Scores:
        def quick_fd(self, images):
            return 0.0

    health = main.StudentHealth(job, teacher, Scores())
    health.teacher = health.teacher * 0.5 + 0.25  # less spread than the student, which is the teacher itself
    health(teacher, 7)
    one_step_only = capsys.readouterr().out
    dead = jax.tree.map(np.zeros_like, teacher)
    numbers = health(dead, 8)
    warned = [line for line in capsys.readouterr().out.splitlines() if line.startswith("WARNING")]
    assert len(warned) == 1 and "student 8" in warned[0] and "0.8" in warned[0] and "1 step" in warned[0] and "config.method" in warned[0]
    assert all(numbers[f"diversity_{n}"] < 0.8 for n in (1, 2, 3))
    assert "3 steps" not in next((line for line in one_step_only.splitlines() if line.startswith("WARNING")), "")


# -------------------------------------------------------------------------------------------- sampling


def drawn(tmp_path, model, *arguments):
    """(images, labels) of jaxdistill.sample's npz."""
    out = tmp_path / "drawn.npz"
    sample.main([f"--model={model}", *arguments, f"--out={out}"])
    found = np.load(out)
    assert set(found.files) == {"images", "labels"}
    return found["images"], found["labels"]


@pytest.fixture
def draw(finished, tmp_path):
    return lambda *arguments, role="student": drawn(tmp_path, finished / role, *arguments)


@pytest.mark.parametrize("role", ["student", "teacher"])
def test_npz_holds_unit_images_and_labels_that_go_round_the_classes(draw, role):
    images, labels = draw("--num=25", role=role)
    assert images.shape == (25, 8, 8, 1) and images.dtype == np.float32
    assert 0 <= images.min() and images.max() <= 1 and images.std() > 0.05
    assert np.issubdtype(labels.dtype, np.integer) and np.array_equal(labels, np.arange(25) % 10)


def test_labels_are_taken_in_turn_and_change_the_images(draw):
    images, labels = draw("--num=5", "--labels=3,7")
    assert labels.tolist() == [3, 7, 3, 7, 3]
    others, other_labels = draw("--num=5", "--labels=7,3")
    assert other_labels.tolist() == [7, 3, 7, 3, 7] and np.abs(images - others).max() > 1e-4


def test_same_seed_gives_the_same_bits_and_another_seed_other_images(draw):
    first, again, other = (draw("--num=6", f"--seed={seed}")[0] for seed in (1, 1, 2))
    assert first.tobytes() == again.tobytes()
    assert np.abs(first - other).reshape(6, -1).max(1).min() > 0.1


def test_fewer_images_are_the_beginning_of_more(draw):
    few, few_labels = draw("--num=5", "--seed=4")
    many, many_labels = draw("--num=9", "--seed=4")
    assert np.abs(few - many[:5]).max() < 1e-6 and np.array_equal(few_labels, many_labels[:5])


@pytest.mark.parametrize("size", [1, 4, 9, 64])
def test_batch_size_does_not_change_the_images(draw, size):
    whole, labels = draw("--num=9", "--seed=4")
    found, found_labels = draw("--num=9", "--seed=4", f"--batch_size={size}")
    assert np.abs(found - whole).max() < 1e-6 and np.array_equal(found_labels, labels)


def test_steps_default_to_the_cards_and_change_the_images(draw):
    default = draw("--num=4")[0]
    by_steps = {n: draw("--num=4", f"--steps={n}")[0] for n in (1, 2, 3)}
    assert default.tobytes() == by_steps[3].tobytes()
    assert np.abs(by_steps[1] - by_steps[2]).max() > 1e-3 and np.abs(by_steps[2] - by_steps[3]).max() > 1e-3


def test_guidance_changes_the_images_and_one_is_none(draw):
    plain, one, guided = draw("--num=4")[0], draw("--num=4", "--guidance=1.0")[0], draw("--num=4", "--guidance=1.5")[0]
    assert plain.tobytes() == one.tobytes()
    assert np.abs(plain - guided).max() > 1e-3 and np.isfinite(guided).all()
    teacher, unguided = draw("--num=4", role="teacher")[0], draw("--num=4", "--guidance=1", role="teacher")[0]
    assert np.abs(teacher - unguided).max() > 1e-3  # the card's scale is 1.25


def test_noise_correction_flag_is_the_identity_for_v_and_zero_terminal_snr(draw):
    with_it, without = (draw("--num=4", f"--noise_correction={v}")[0] for v in ("true", "false"))
    assert np.abs(with_it - without).max() < 1e-5


def test_noise_correction_flag_is_obeyed_where_it_matters(tmp_path):
    built = experiment.build(tiny_config(**EPS))
    params = card.init_params(built.model, built.image_shape, 0)
    params = jax.tree.map(lambda p: p + 0.01 * jnp.cos(jnp.arange(p.size)).reshape(p.shape), params)
    checkpoint.export(tmp_path / "student", params, built.student_sampler.card)
    default, on, off = (
        drawn(tmp_path, tmp_path / "student", "--num=4", "--steps=2", *flag)[0]
        for flag in ([], ["--noise_correction=true"], ["--noise_correction=false"])
    )
    assert default.tobytes() == on.tobytes() and np.abs(on - off).max() > 1e-3


@pytest.mark.parametrize("num", [1, 12])
def test_png_is_a_grid_of_all_images(finished, tmp_path, num, capsys):
    out = tmp_path / "grid.png"
    sample.main([f"--model={finished / 'student'}", f"--num={num}", f"--out={out}"])
    side = int(np.ceil(np.sqrt(num)))
    with Image.open(out) as picture:
        assert picture.format == "PNG"
        assert 64 * side <= picture.width <= 64 * side + 4 * side
        assert 64 * (num // side) <= picture.height
        assert np.asarray(picture).std() > 5
    assert f"{num} images" in capsys.readouterr().out
