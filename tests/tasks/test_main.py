import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from jaxdistill import ablate, main, sample
from jaxdistill.errors import UserError
from jaxdistill.interop import card
from jaxdistill.run import checkpoint
from jaxdistill.tasks import open_task
from jaxdistill.tasks.settings import changed

WITHOUT_US = """
import sys
import jax, numpy as np, orbax.checkpoint as ocp
folder = sys.argv[1]
params = ocp.StandardCheckpointer().restore(folder + "/student/params")
program = jax.export.deserialize(bytearray(open(folder + "/sampler.stablehlo", "rb").read()))
assert set(program.platforms) == {"cpu", "tpu", "cuda"}, program.platforms
noise = np.load(folder + "/noise.npy")
for n in (1, 2, 3):
    for b in (1, 5):
        times = np.float32([1.0, 0.5, 0.2][:n])
        images = program.call(params, noise[:b], np.arange(b, dtype=np.int32), times)
        np.save(f"{folder}/out_{n}_{b}.npy", images)
assert "jaxdistill" not in sys.modules
"""


def test_a_run_leaves_what_it_promises(finished):
    folder, results = finished
    assert json.loads((folder / "results.json").read_text()) == json.loads(json.dumps(results))
    settings = {(r["model"], r["steps"]) for r in results["rows"]}
    assert settings == {
        ("teacher", 5),
        *((m, n) for m in ("teacher", "student") for n in (1, 2, 3)),
    }
    for row in results["rows"]:
        for key in (
            "guidance",
            "fd",
            "accuracy",
            "precision",
            "recall",
            "diversity",
            "images_per_second",
            "nearest_neighbour",
        ):
            assert np.isfinite(row[key]), key
    assert (
        results["floor_fd"] > 0
        and results["seed"] == 0
        and results["config"]["student"]["batch_size"] == 12
    )
    assert {"extractor", "teacher", "student", "evaluation"} <= results[
        "seconds"
    ].keys() and "jax" in results["versions"]
    assert (folder / "results.md").read_text().count("| student |") == 3
    for name in (
        "results.png",
        "curves.png",
        "samples/student_0000012.png",
        "samples/teacher_0000040.png",
    ):
        assert Image.open(folder / name).size[0] > 50
    for name in (
        "checkpoints/teacher",
        "checkpoints/student",
        "tensorboard/student",
        "teacher/card.json",
        "student/card.json",
    ):
        assert (folder / name).exists()
    made = json.loads((folder / "student/card.json").read_text())
    assert (
        made["sampler"]["times"] == [1.0, 0.5, 0.2] and made["prediction"] == "v" and made["sha256"]
    )


@pytest.mark.long
def test_the_program_runs_without_this_package_and_draws_our_images(finished):
    folder, _ = finished
    noise = np.asarray(card.draw_noise(0, 0, 5, (8, 8, 1)))
    np.save(folder / "noise.npy", noise)
    subprocess.run([sys.executable, "-c", WITHOUT_US, str(folder)], check=True, timeout=120)
    for n in (1, 2, 3):
        ours, _ = sample.generate(folder / "student", num=5, steps=n, seed=0)
        np.testing.assert_allclose(np.load(folder / f"out_{n}_5.npy"), ours, atol=1e-5)
        np.testing.assert_allclose(np.load(folder / f"out_{n}_1.npy"), ours[:1], atol=1e-5)


def test_a_second_start_evaluates_and_leaves_the_student_alone(finished):
    folder, results = finished
    before = (folder / "student/card.json").stat().st_mtime_ns
    again = main.run(tiny.get_config(), folder)
    assert (folder / "student/card.json").stat().st_mtime_ns == before
    drop = lambda rows: [{k: v for k, v in row.items() if k != "images_per_second"} for row in rows]  # noqa: E731
    assert drop(again["rows"]) == drop(results["rows"])


def test_another_configs_workdir_is_refused(finished):
    config = tiny.get_config()
    config.methods.imagine_flash.learning_rate = 5e-4
    with pytest.raises(
        UserError, match=r"imagine_flash\.learning_rate = 0\.004 there, 0\.0005 here"
    ):
        main.run(config, finished[0])


@pytest.mark.costly
@pytest.mark.parametrize(
    "changes",
    [
        ablate.VARIANTS["eps model"].changes,
        {"methods.imagine_flash.adversarial_weight": 0.0, "student.grid": "trailing"},
        {
            "methods.imagine_flash.backward": False,
            "methods.imagine_flash.whole_trajectory": False,
            "adversarial.loss": "non_saturating",
        },
    ],
)
def test_every_switch_makes_a_working_loss(changes):
    task = open_task(changed(tiny.get_config(), changes))
    teacher, found = task.first_params(), task.distillation
    stage = task.recipe.stages[0]
    params = found.first_params(0, teacher, None)
    batch = {"x0": jnp.zeros((12, 8, 8, 1)), "cond": jnp.arange(12) % 10}
    batch |= {"real": batch["x0"], "real_cond": batch["cond"]}
    given = {"teacher": teacher, "null": {}}
    loss, metrics = jax.jit(found.loss(0))(params, given, batch, jax.random.key(0))
    assert np.isfinite(float(loss))
    weight = changes.get("methods.imagine_flash.adversarial_weight")
    assert ("discriminator" in metrics) == ("discriminator" in stage.networks) == (weight != 0.0)


def test_sample_writes_what_it_says(finished, tmp_path):
    student = str(finished[0] / "student")
    paths = [tmp_path / f"{i}.npz" for i in range(4)]
    for path, extra in zip(
        paths,
        (["--num=25"], ["--num=25"], ["--num=9", "--batch_size=4"], ["--num=6", "--labels=3,7"]),
        strict=True,
    ):
        sample.main([f"--model={student}", "--steps=3", "--seed=7", f"--out={path}", *extra])
    one, two, short, chosen = (np.load(path) for path in paths)
    assert one["images"].dtype == np.float32 and one["images"].shape == (25, 8, 8, 1)
    assert one["images"].min() >= 0 and one["images"].max() <= 1
    assert one["labels"].tolist() == [*range(10), *range(10), *range(5)]
    np.testing.assert_array_equal(one["images"], two["images"])
    np.testing.assert_allclose(short["images"], one["images"][:9], atol=1e-6)
    assert chosen["labels"].tolist() == [3, 7, 3, 7, 3, 7]


def test_sample_serves_the_teacher_guidance_and_pictures(finished, tmp_path):
    sample.main(
        [f"--model={finished[0] / 'teacher'}", "--num=4", f"--out={tmp_path / 'teacher.png'}"]
    )
    assert Image.open(tmp_path / "teacher.png").size == (130, 130)
    plain, _ = sample.generate(finished[0] / "student", num=4, steps=2)
    guided, _ = sample.generate(finished[0] / "student", num=4, steps=2, guidance=2.0)
    uncorrected, _ = sample.generate(
        finished[0] / "student", num=4, steps=2, noise_correction=False
    )
    assert np.abs(plain - guided).max() > 1e-4
    np.testing.assert_allclose(
        plain, uncorrected, atol=1e-5
    )  # the identity for v and zero terminal SNR


def test_a_flipped_bit_in_an_export_is_named(finished, tmp_path):
    import shutil

    copy = tmp_path / "student"
    shutil.copytree(finished[0] / "student", copy)
    victim = max(
        (p for p in (copy / "params").rglob("*") if p.is_file()), key=lambda p: p.stat().st_size
    )
    raw = bytearray(victim.read_bytes())
    raw[len(raw) // 2] ^= 1
    victim.write_bytes(raw)
    with pytest.raises(checkpoint.CheckpointError, match=victim.name):
        sample.generate(copy, num=1)
