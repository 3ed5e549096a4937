"""A compiled step as a file: what loads it runs in the same bits, and what does not fit is refused."""

import json
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from shell import ROOT, assert_same_bits, flip_bit, quick
from test_distil import make_config

from jaxdistill import aot
from jaxdistill.run import saved_program
from jaxdistill.run.saved_program import ProgramError
from jaxdistill.run.workdir import UserError
from jaxdistill.tasks.text_to_image import distil


def lowered_on(devices, width=16):
    mesh = Mesh(np.array(devices), ("data",))
    rows = NamedSharding(mesh, PartitionSpec("data"))
    shape = jax.ShapeDtypeStruct((8, width), jnp.float32, sharding=rows)
    step = jax.jit(lambda state, x: {"w": state["w"] + jnp.tanh(x @ x.T) @ x}, donate_argnums=0)
    return step.lower({"w": shape}, shape), mesh, rows


@pytest.fixture
def saved(tmp_path):
    lowered, mesh, rows = lowered_on(jax.devices())
    saved_program.save(
        str(tmp_path / "step"), lowered, lowered.compile(), mesh, {"student": {"batch_size": 8}}
    )
    return tmp_path / "step", lowered, mesh, rows


def test_a_program_comes_back_with_its_trees_and_still_takes_its_state(saved):
    path, lowered, mesh, rows = saved
    state, x = (
        {"w": jax.device_put(np.ones((8, 16), np.float32), rows)},
        jax.device_put(np.eye(8, 16, dtype=np.float32), rows),
    )
    expected = np.asarray(lowered.compile()(jax.tree.map(jnp.copy, state), x)["w"])
    found = saved_program.load(str(path), lambda: lowered, mesh, {})(state, x)
    np.testing.assert_array_equal(found["w"], expected)
    assert state["w"].is_deleted() and not x.is_deleted()  # or the devices would hold two states
    assert sorted(path.parent.iterdir()) == [path]


def edit(path, **changes):
    head, _, payload = path.read_bytes().partition(b"\n")
    path.write_bytes(json.dumps({**json.loads(head), **changes}).encode() + b"\n" + payload)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"jaxlib": "0.1.0"}, f"does not fit: jaxlib is 0.1.0 there, {jax.lib.__version__} here"),
        (
            {"the kind of device": "TPU v4"},
            "does not fit: the kind of device is TPU v4 there, cpu here",
        ),
        ({"the mesh": {"data": 64}}, "does not fit: the mesh is {'data': 64} there"),
        ({"the chips' order": [[7, 0]]}, "does not fit: the chips' order is [[7, 0]] there"),
        ({"the machine": "elsewhere"}, "does not fit: the machine is elsewhere there"),
        (
            {"step": "0"},
            "is of another training step (config.student.batch_size = 8 there, 16 here)",
        ),
        ({"format": "x"}, "is damaged or no saved program"),
    ],
)
def test_a_program_that_does_not_fit_is_refused_with_what_differs(saved, changes, words):
    path, lowered, mesh, _ = saved
    edit(path, **changes)
    with pytest.raises(ProgramError) as error:
        saved_program.load(
            str(path), lambda: lowered, mesh, {"student": {"batch_size": 16}, "log": {"every": 7}}
        )
    assert str(error.value).startswith(
        f"config.compute.program = {path} {words}"
    ) and "\n" not in str(error.value)
    assert "or leave config.compute.program empty" in str(error.value)


def test_a_program_of_another_step_a_flipped_bit_and_a_missing_file_are_refused(saved):
    path, lowered, mesh, _ = saved
    other, _, _ = lowered_on(jax.devices(), width=32)
    with pytest.raises(ProgramError, match="is of another training step"):
        saved_program.load(str(path), lambda: other, mesh, {"student": {"batch_size": 8}})
    flip_bit(path)
    with pytest.raises(ProgramError, match="is damaged"):
        saved_program.load(str(path), lambda: lowered, mesh, {})
    with pytest.raises(ProgramError, match=r"nowhere cannot be read \(.*No such file"):
        saved_program.load(str(path.parent / "nowhere"), lambda: lowered, mesh, {})


def test_a_program_for_a_slice_is_saved_where_the_slice_is_not(tmp_path):
    """It can be loaded on TPUs only: here it must be refused by its header, before JAX sees it."""
    _, devices = aot.topology("v4:2x2x1")
    lowered, mesh, _ = lowered_on(devices)
    path = tmp_path / "step"
    saved_program.save(str(path), lowered, lowered.compile(), mesh, {})
    header = json.loads(path.read_bytes().partition(b"\n")[0])
    assert (
        header["the kind of device"] == "TPU v4"
        and header["libtpu"]
        and path.stat().st_size > 10_000
    )
    assert [place[0] for place in header["the chips' order"]] == [
        device.id for device in devices
    ] and "the machine" not in header
    here, mesh, _ = lowered_on(jax.devices())
    with pytest.raises(ProgramError, match="the kind of device is TPU v4 there, cpu here"):
        saved_program.load(str(path), lambda: here, mesh, {})


SMALL = {
    "adversarial.weight": 0.0,
    "student.steps": (1,),
    "student.iterations": 3,
    "student.health_every": 3,
    "student.batch_size": 2,
    "compute.program": "",
}

COMPILE = """
import json, sys
from pathlib import Path
import jax
from test_distil import make_config
from test_saved_program import SMALL
from jaxdistill import aot
from jaxdistill.run import saved_program
config = make_config(Path(sys.argv[1]), **SMALL)
program = aot.text_program(config, jax.devices())
lowered, executable = aot.compiled(program)[:2]
mesh = jax.tree.leaves(program.arguments)[0].sharding.mesh
saved_program.save(sys.argv[2], lowered, executable, mesh, json.loads(config.to_json()))
"""


@pytest.mark.long
def test_a_run_with_a_saved_program_takes_the_steps_of_one_that_compiles(tmp_path, monkeypatch):
    """Compiled in another process, from the folder's configs alone; every step of the run in the
    same bits as its own, compiled here.
    """
    path, steps = tmp_path / "step", []
    environment = quick(PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    subprocess.run(
        [sys.executable, "-c", COMPILE, tmp_path, path], cwd=ROOT, env=environment, check=True
    )
    config = make_config(tmp_path, **SMALL | {"compute.program": str(path)})
    own, load = distil.TextRun(config, tmp_path).programs().step, saved_program.load

    def load_and_compare(*arguments):
        program = load(*arguments)

        def both(state, batch, teacher):
            expected = own(jax.tree.map(lambda a: a.copy(), state), batch, teacher)
            found = program(state, batch, teacher)
            assert_same_bits(found, expected)
            steps.append(int(found[0].step))
            return found

        return both

    monkeypatch.setattr(saved_program, "load", load_and_compare)
    distil.run(config, tmp_path / "run")
    assert steps == [1, 2, 3]


def test_a_run_refuses_a_program_before_it_reads_weights(tmp_path, monkeypatch):
    (tmp_path / "step").write_text("{}")
    monkeypatch.setattr(distil.TextRun, "weights", None)
    with pytest.raises(
        UserError,
        match=r"step is damaged or no saved program; .* or leave config\.compute\.program empty",
    ):
        distil.run(
            make_config(tmp_path, **{"compute.program": str(tmp_path / "step")}), tmp_path / "run"
        )
