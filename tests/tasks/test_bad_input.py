"""Each mistake is one clear line, before anything long starts."""

import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from flax import linen as nn
from shell import assert_one_error_line, run_command

from configs import base, digits, fashion, scenes, sd15, sd21, sdxl, smoke
from jaxdistill import sample
from jaxdistill.interop import card
from jaxdistill.methods import METHODS
from jaxdistill.tasks import open_task
from jaxdistill.tasks.labelled_images import data
from jaxdistill.tasks.settings import changed


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"student.times": (1.0, 0.2, 0.5)}, "must decrease strictly, got"),
        ({"student.times": (0.9, 0.5, 0.2)}, "must start at T = 1, got"),
        ({"student.grid": "listed"}, "must hold a list for each number of steps"),
        ({"methods.imagine_flash.reference": "edm"}, "choose one of 'cosine', 'flow'"),
        ({"student.grid": "leading"}, "must start at T = 1, got"),
        ({"prediction": "eps"}, "cannot start from zero terminal SNR"),
        (
            {"prediction": "epsilon"},
            "prediction = 'epsilon' is not known; choose one of 'eps', 'v'",
        ),
        ({"schedule.name": "cos"}, "schedule.name = 'cos' is not known"),
        ({"schedule.snr_scale": 0.0}, "snr_scale must be above 0"),
        ({"model.name": "resnet"}, "model.name = 'resnet' is not known"),
        ({"data.name": "mnist"}, "data.name = 'mnist' is not known"),
        ({"data.name": "fashion"}, "config.data.folder is empty"),
        (
            {"methods.imagine_flash.noise": "white"},
            "config.methods.imagine_flash: noise = 'white' is not known",
        ),
        (
            {"methods.imagine_flash.shift": "step"},
            "config.methods.imagine_flash: shift = 'step' is not known",
        ),
        (
            {
                "methods.imagine_flash.shift": "linear",
                "methods.imagine_flash.shifts.linear.high": 1.2,
            },
            "linear_shift needs 0 < low <= high <= 1, got",
        ),
        (
            {
                "methods.imagine_flash.shift": "power",
                "methods.imagine_flash.shifts.power.strength": 1.5,
            },
            "power_shift needs 0 <= strength < 1",
        ),
        (
            {"methods.imagine_flash.teacher_solver": "heun"},
            "teacher_solver = 'heun' is not known; choose one of 'ddim', 'dpm_solver_pp_2m'",
        ),
        ({"teacher.solver": "euler"}, "sampler.solver = 'euler' is not known"),
        ({"adversarial.loss": "wasserstein"}, "adversarial.loss = 'wasserstein' is not known"),
        ({"adversarial.reals": "web"}, "adversarial.reals = 'web' is not known"),
        ({"student.steps": (0, 1)}, "student.steps must hold step counts of at least 1"),
        (
            {"student.keep_best": "fd_9"},
            "config.student.keep_best = 'fd_9' is not known; choose one of fd_1, ",
        ),
        (
            {"methods.imagine_flash.teacher_steps": 0},
            "config.methods.imagine_flash: the teacher needs k >= 1 steps, got 0",
        ),
        (
            {"student.decay_to": 1.5},
            "config.student.decay_to must be in [0, 1] (1: no decay), got 1.5",
        ),
        ({"student.batch_size": 0}, "config.student.batch_size = 0 must be a positive multiple"),
        ({"teacher.drop_cond": 0.0}, "needs a teacher trained with config.teacher.drop_cond > 0"),
        (
            {"eval.samples": 10},
            "too few for a Frechet distance of 16 features; at least 17 are needed",
        ),
        (
            {"student.grid": "trailing", "student.batch_size": 11},
            "must be a multiple of the 2 grids",
        ),
    ],
)
def test_a_bad_config_is_refused_with_the_value_and_the_mend(changes, message):
    with pytest.raises(ValueError) as error:
        open_task(changed(tiny.get_config(), changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {},
            (
                "config.teacher.path is empty, but config.method.name = 'endpoint' needs the"
                " student/ folder"
            ),
        ),
        (
            {"method.name": "end"},
            "config.method.name = 'end' is not known; choose one of 'imagine_flash', 'matched'",
        ),
        ({"student.steps": (1, 2)}, 'set config.student.steps="(1,)", got (1, 2)'),
        ({"methods.endpoint.steps": 1}, "endpoint needs a grid of several steps, got [1.0]"),
    ],
)
def test_a_bad_config_of_one_step_from_several_is_refused(changes, message):
    with pytest.raises(ValueError) as error:
        open_task(changed(base.chosen(tiny.get_config(), "one", file="tiny"), changes))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "config", [digits, fashion, scenes, sd15, sd21, sdxl, smoke], ids=lambda config: config.__name__
)
def test_each_config_has_a_variant_of_each_method_and_no_other(config):
    for name in METHODS:
        assert config.get_config(name).method.name == name
    assert config.get_config("one").method.name == "endpoint"
    assert config.get_config("one").student.steps == (1,)
    file = config.__name__.removeprefix("configs.")
    message = (
        rf"configs/{file}.py:two is not known; choose one of configs/{file}.py, :imagine_flash,"
    )
    with pytest.raises(ValueError, match=message):
        config.get_config("two")


def test_a_model_that_does_not_fit_the_images_is_refused():
    config = tiny.get_config()
    with config.unlocked():
        config.model = {
            "name": "unet",
            "channels": (8, 8),
            "blocks": 1,
            "patch": 3,
            "time_scale": 1000.0,
        }
    with pytest.raises(ValueError, match="does not take images of shape"):
        open_task(config)


class NeedsItsRows(nn.Module):
    """A network that cannot be exported for batches of any size."""

    num_classes: int

    @nn.compact
    def __call__(self, x, t, cond, *, features=False):
        del features
        return nn.Dense(1)(x) + jnp.zeros((len(x), 1, 1, 1))

    def null_cond(self, cond):
        return jnp.full_like(cond, self.num_classes)


def test_a_model_whose_batch_is_not_open_is_refused(monkeypatch):
    monkeypatch.setitem(card.MODELS, "mine", NeedsItsRows)
    config = tiny.get_config()
    with config.unlocked():
        config.model = {"name": "mine"}
    with pytest.raises(ValueError, match=r"must leave its batch open \(x.shape\[0\], not len"):
        open_task(config)


@pytest.mark.parametrize(
    ("split", "changes", "message"),
    [
        ("train", {"images": lambda a: 2 * a - 1}, "holds pixels from -1 to 1; they must be in"),
        ("test", {"images": lambda a: a * np.nan}, "holds pixels from nan"),
        ("test", {"images": lambda a: a[..., 0]}, "holds images float32 [360, 8, 8]; they must be"),
        ("train", {"images": lambda a: a.astype(np.float64)}, "holds images float64"),
        ("train", {"labels": lambda a: a + 1}, "holds labels [1078] from 1 to 10; they must be"),
        ("validation", {"labels": lambda a: a[1:]}, "they must be whole numbers [359] of 0..9"),
        ("test", {"labels": lambda a: a / 2}, "they must be whole numbers"),
    ],
)
def test_a_dataset_of_other_ranges_or_shapes_is_refused(monkeypatch, split, changes, message):
    real = data.digits()
    changed_split = getattr(real, split)
    for name, change in changes.items():
        changed_split = changed_split._replace(**{name: change(getattr(changed_split, name))})
    monkeypatch.setattr(data, "digits", lambda: real._replace(**{split: changed_split}))
    with pytest.raises(ValueError, match=rf"^digits's {split} split .*") as refused:
        open_task(tiny.get_config())
    assert message in str(refused.value)


@pytest.mark.long
def test_the_command_answers_a_mistake_in_one_line(tmp_path):
    """Of the process itself; which mistakes, tests/run/test_cli.py says."""
    flags = ["--config=tests/tiny.py", f"--workdir={tmp_path}", "--config.studnt.steps=1"]
    found = run_command("jaxdistill.main", *flags)
    assert_one_error_line(found, "unknown config key: config.studnt; did you mean config.student?")
    assert found.returncode == 2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--model={dir}", "--out={dir}/x.png"], "is not a pipeline folder"),
        (["--model={student}", "--out={dir}/x.jpg"], "must end in .png or .npz"),
        (["--model={student}", "--out={dir}/no/x.png"], "does not exist"),
        (
            ["--model={student}", "--out={dir}/x.png", "--steps=0"],
            "--steps must be at least 1, got 0",
        ),
        (["--model={student}", "--out={dir}/x.png", "--num=0"], "--num must be at least 1, got 0"),
        (["--model={student}", "--out={dir}/x.png", "--labels=3,12"], "class 12 is not in 0..9"),
        (
            ["--model={student}", "--out={dir}/x.png", "--labels=a"],
            "--labels=a is not a list of class numbers",
        ),
        (
            ["--model={student}", "--out={dir}/x.png", "--noise_correction=maybe"],
            "neither true nor false",
        ),
        (
            ["--model={student}", "--out={dir}/x.png", "--guidance=-1"],
            "--guidance must be a number of at least 0",
        ),
        (["--model={extractor}", "--out={dir}/x.png"], "draws no images"),
    ],
)
def test_sample_answers_a_mistake_in_one_line(flags, message, finished, tmp_path, capsys):
    paths = {
        "dir": tmp_path,
        "student": finished[0] / "student",
        "extractor": finished[0] / "extractor",
    }
    with pytest.raises(SystemExit) as stop:
        sample.main([flag.format(**paths) for flag in flags])
    text = capsys.readouterr().err
    assert (
        stop.value.code == 2
        and text.startswith("error: ")
        and text.count("\n") == 1
        and message in text
    )
