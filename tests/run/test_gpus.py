"""What stands between NVIDIA GPUs and JAX is one line, and a process of SLURM takes its part of
them. No GPU is needed.
"""

import logging
import re

import jax
import pytest

from jaxdistill.errors import UserError
from jaxdistill.run import compilation, cuda, distributed
from jaxdistill.run.cuda import Machine, obstacle

FINE = Machine((12,), 12_040, True)


@pytest.mark.parametrize(
    ("machine", "words"),
    [
        (FINE, ""),
        (Machine((13,), 13_000, True), ""),
        (Machine((), None, False), ""),
        (Machine((), 11_040, True), ""),  # JAX says by itself that its plugin is missing
        (FINE._replace(plugins=(12, 13)), "both installed.* pip uninstall jax-cuda12-plugin"),
        (FINE._replace(visible=False), "no NVIDIA GPU is here .* JAX_PLATFORMS=cpu"),
        (FINE._replace(hidden="-1"), "CUDA_VISIBLE_DEVICES='-1' hides all"),
        (FINE._replace(driver=None), "driver does not answer .* nvidia-smi"),
        (
            FINE._replace(plugins=(13,)),
            "runs CUDA 12.4 at most, and jax-cuda13-plugin needs CUDA 13; update the"
            ' driver to 580 or newer, or install the extra "cuda"',
        ),
        (FINE._replace(driver=11_040), "runs CUDA 11.4 .* update the driver to 525 or newer; JAX_"),
    ],
)
def test_an_obstacle_is_one_line_with_its_mend(machine, words):
    line = obstacle(machine)
    assert bool(line) == bool(words) and "\n" not in line
    assert re.search(words, line)


@pytest.fixture
def platforms():
    """Sets what is asked of JAX, and puts it back."""
    before = jax.config.jax_platforms
    yield lambda value: jax.config.update("jax_platforms", value)
    jax.config.update("jax_platforms", before)


@pytest.mark.parametrize(
    ("asked", "chosen"), [("", "cuda,cpu"), ("cpu", "cpu"), ("tpu,cpu", "tpu,cpu"), ("gpu", "gpu")]
)
def test_gpus_are_taken_where_nothing_else_is_asked(monkeypatch, platforms, capsys, asked, chosen):
    monkeypatch.setattr(cuda, "this_machine", lambda: FINE)
    platforms(asked)
    cuda.choose()
    assert jax.config.jax_platforms == chosen
    # libtpu, of the tests' extra, is here: what that means is said where it could matter.
    assert ("note: " in capsys.readouterr().err) == (asked == "")


@pytest.mark.parametrize("asked", ["", "cuda", "gpu", "cuda,cpu"])
def test_without_a_gpu_the_cpu_does_not_stand_in_silently(monkeypatch, platforms, asked):
    monkeypatch.setattr(cuda, "this_machine", lambda: FINE._replace(visible=False))
    platforms(asked)
    with pytest.raises(UserError, match="no NVIDIA GPU is here"):
        compilation.check_devices()
    platforms("cpu")
    compilation.check_devices()


def test_a_plugin_that_cannot_start_is_one_line(monkeypatch, platforms, caplog):
    """JAX logs its traceback and goes on without it; the reason is in our line instead."""

    def devices():
        try:
            raise RuntimeError("Unable to load cuDNN. Is it installed?\nsecond line")
        except RuntimeError:
            logging.getLogger("jax._src.xla_bridge").exception("Jax plugin configuration error")
        raise RuntimeError("Backend 'cuda' is not in the list of known backends")

    monkeypatch.setattr(cuda, "this_machine", lambda: FINE)
    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    platforms("")
    with pytest.raises(UserError) as failure:
        compilation.check_devices()
    assert "(Unable to load cuDNN. Is it installed?); see docs/gpu.md" in str(failure.value)
    assert "\n" not in str(failure.value) and not caplog.records


def test_this_machine_is_looked_at_without_starting_a_device(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert cuda.this_machine().hidden == ""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    assert cuda.this_machine().hidden is None


NODE = {"SLURM_GPUS_ON_NODE": "8", "SLURM_LOCALID": "3", "SLURM_NODEID": "0"}


@pytest.mark.parametrize(
    ("environ", "gpus"),
    [
        ({}, None),
        ({"SLURM_LOCALID": "0"}, None),  # a node without GPUs
        ({**NODE, "SLURM_STEP_TASKS_PER_NODE": "8(x2)"}, [3]),
        ({**NODE, "SLURM_STEP_TASKS_PER_NODE": "4"}, [6, 7]),
        ({**NODE, "SLURM_LOCALID": "0", "SLURM_STEP_TASKS_PER_NODE": "1(x2)"}, [*range(8)]),
        ({**NODE, "SLURM_NODEID": "2", "SLURM_STEP_TASKS_PER_NODE": "8(x2),4"}, [6, 7]),
        # --gpus-per-task has bound it: it sees one, which is its first.
        ({**NODE, "CUDA_VISIBLE_DEVICES": "5", "SLURM_STEP_TASKS_PER_NODE": "8"}, [0]),
        ({**NODE, "CUDA_VISIBLE_DEVICES": "4,5", "SLURM_STEP_TASKS_PER_NODE": "4"}, [0, 1]),
        ({**NODE, "JAX_LOCAL_DEVICE_IDS": "1"}, None),
    ],
)
def test_a_process_of_slurm_takes_its_part_of_the_gpus(environ, gpus):
    assert distributed.slurm_gpus(environ) == gpus


@pytest.mark.parametrize("tasks", ["3", "16"])
def test_parts_that_are_not_equal_are_refused(tasks):
    with pytest.raises(distributed.DistributedError, match=rf"{tasks} processes .* 8 GPUs; start"):
        distributed.slurm_gpus({**NODE, "SLURM_STEP_TASKS_PER_NODE": tasks})


def test_jax_is_told_the_part(monkeypatch):
    given = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda **options: given.update(options))
    monkeypatch.setattr(distributed, "_detected", lambda timeout: None)
    for name, value in {**NODE, "SLURM_STEP_TASKS_PER_NODE": "4"}.items():
        monkeypatch.setenv(name, value)
    distributed.start(detect=True)
    assert given["local_device_ids"] == [6, 7]
