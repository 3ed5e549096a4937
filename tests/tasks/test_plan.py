"""What a plan tells is what a run does: bytes, parameters, calls, FLOPs, disk; and a run that does
not fit reads and writes nothing.
"""

import json
import re
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest
import text_config
from shell import ROOT, TINY, quick, tiny_config

from jaxdistill import main
from jaxdistill.costs import chips
from jaxdistill.errors import UserError
from jaxdistill.interop import diffusers_folder
from jaxdistill.run import compilation, cost, phase
from jaxdistill.run.cost import bytes_of
from jaxdistill.tasks import estimate, open_task, plan_task
from jaxdistill.tasks.small import SmallTask


class Enough(Exception):
    """Ends a run that has shown what was asked."""


def held(tree):
    """Bytes of arrays on the first device."""
    return sum(np.asarray(a.addressable_data(0)).nbytes for a in jax.tree.leaves(tree))


@pytest.fixture
def loops(monkeypatch):
    """{phase: (its loop, {kind: bytes on the first device})} of the trainings that a run begins.
    Those of a student end the run.
    """
    found, real = {}, phase.train_loop

    def watched(loop, place):
        state, batch = loop.first(), loop.batches(0)
        alone = loop.name == "teacher"
        trained = {"teacher": state.params} if alone else state.params
        rest = {"average": state.ema_params, "optimizer": state.opt_state, "batch": batch}
        kinds = {**trained, **rest, "frozen": loop.given}
        found[loop.name] = loop, {name: held(tree) for name, tree in kinds.items()}
        if not alone:
            raise Enough
        del state, trained, rest, kinds
        return real(loop, place)

    monkeypatch.setattr(phase, "train_loop", watched)
    return found


@pytest.mark.long
@pytest.mark.parametrize("rank", [0, 2])
def test_what_is_kept_is_what_a_run_holds(loops, tmp_path, rank):
    config = tiny_config(**{"student.lora_rank": rank, "teacher.batch_size": 8})
    with pytest.raises(Enough):
        main.run(config, tmp_path / "run")
    task = plan_task(config)
    assert task.distillation.kept(0) == loops["student"][1]
    alone = task.cost(plan=True).kept
    largest = max((kinds for _, kinds in loops.values()), key=lambda kinds: sum(kinds.values()))
    assert alone == largest and ("teacher" in alone) == bool(rank)


def parameters_of(params):
    return sum(np.size(a) for a in jax.tree.leaves(params))


@pytest.mark.long
def test_a_text_run_holds_keeps_and_counts_what_its_plan_told(loops, monkeypatch, tmp_path, capsys):
    folders = pytest.importorskip("folders")
    (tmp_path / "prompts.txt").write_text("a cat\na dog at a cat\nphoto\n")
    config = text_config.get_config()
    config.teacher.folder = str(folders.folder("sd"))
    config.data.prompts = str(tmp_path / "prompts.txt")
    config.student.lora_rank = 2
    config.compute.update({"teacher_dtype": "bfloat16", "remat": "full"})
    told = plan_task(config).cost(plan=True)
    monkeypatch.setattr(chips, "of_device", lambda device: chips.CHIPS["v4"])  # so that MFU is told
    with pytest.raises(Enough):
        main.run(config, tmp_path / "run")
    loop, kinds = loops["student"]
    assert told.kept == kinds and {"student", "discriminator"} < set(kinds)
    # The FLOPs of the MFU, and what they make of the first lines.
    student = next(part for part in told.work if part.name == "student")
    assert student.flops == loop.flops * loop.steps and student.iterations == loop.steps
    out = capsys.readouterr().out
    assert f"{told.flops:.3g} FLOPs" in out and "hours on 1 x v4 at an MFU of 0.4" in out
    # Networks.
    folder = plan_task(config).folder
    for name, part in {"teacher": folder.network, "vae": folder.vae, **folder.encoders}.items():
        params = diffusers_folder.load_params(part)
        assert told.networks[name] == parameters_of(params), name
        if name in told.drawing:
            assert told.drawing[name] == 4 * parameters_of(params)
    # Disk.
    wanted = {"prompts": 3, "teacher": config.adversarial.pool}
    metas = {
        path.parent.name.partition("-")[0]: json.loads(path.read_text())
        for path in tmp_path.glob("run/cache/*/meta.json")
    }
    assert metas.keys() == wanted.keys()
    for records, (name, number) in zip(told.records, wanted.items(), strict=True):
        fields = metas[name]["fields"].values()
        sizes = [np.dtype(f["dtype"]).itemsize * int(np.prod(f["shape"])) for f in fields]
        assert metas[name]["count"] == number == records.number
        assert records.record == sum(sizes), name
    # The teacher's images: the pool's, in steps of two calls each.
    drawn = config.adversarial.pool * config.teacher.steps * 2 / config.student.batch_size
    assert told.work[0].calls == drawn


@pytest.mark.costly
@pytest.mark.parametrize("method", ["imagine_flash", "direct", "matched", "lcm"])
def test_the_calls_of_the_stages_and_pairs_are_the_budget(method):
    """As much of it as whole iterations and pairs come to."""
    config = tiny_config(**{"student.iterations": 0, "student.budget": 4000})
    config.method.name, config.adversarial.reals = method, "teacher"
    config.teacher.path = "runs/a/teacher"  # nothing is trained but the student
    task = plan_task(config)
    found = task.cost(plan=True)
    other = {"evaluation", "the teacher's images for the discriminator"}
    calls = sum(part.calls for part in found.work if part.name not in other)
    one = sum(task.distillation.calls(i) for i in range(len(task.recipe.stages)))
    assert calls <= 4000 < calls + one + 20  # calls of a pair
    assert found.calls > calls


def test_the_calls_of_a_table_are_those_that_draw_it(monkeypatch):
    """Rows and steps of all programs that the table asks for."""
    config = tiny_config()
    task, rows = open_task(config), []

    def program(self, sampler, guidance):
        def draw(params, noise, cond, grid):
            rows.append(len(noise) * len(grid) * (1 if guidance == 1.0 else 2))
            return noise

        return draw

    monkeypatch.setattr(SmallTask, "program", program)
    for sampled in task.sampled():
        task.draw(sampled._replace(params={}), task.labels, task.scored, 0)
    told = task.cost(plan=True).work[-1]
    assert told.name == "evaluation" and told.calls * config.student.batch_size == sum(rows)


@pytest.mark.long
def test_the_pool_of_a_small_task_takes_what_its_files_hold(loops, tmp_path):
    config = tiny_config(**{"adversarial.reals": "teacher", "adversarial.pool": 7})
    with pytest.raises(Enough):
        main.run(config, tmp_path / "run")
    (records,) = plan_task(config).cost(plan=True).records
    (path,) = tmp_path.glob("run/cache/pool-*/meta.json")
    meta = json.loads(path.read_text())
    sizes = [np.dtype(f["dtype"]).itemsize * np.prod(f["shape"]) for f in meta["fields"].values()]
    assert (records.number, records.record) == (meta["count"], sum(sizes))


def test_the_checkpoints_of_a_plan_are_those_that_a_run_leaves(finished):
    """Compressed, with some files that describe them."""
    told = plan_task(tiny_config()).cost(plan=True).checkpoints
    left = {"checkpoints of teacher", "checkpoints of student", "best line of student"}
    assert {records.name for records in told} == left
    for name, number, size in told:
        what, _, phase = name.rpartition(" of ")
        folder = finished[0] / "checkpoints" / (phase + ("-best" if what == "best line" else ""))
        steps = [path for path in folder.iterdir() if path.name.isdigit()]
        assert len(steps) == number
        for step in steps:
            found = sum(path.stat().st_size for path in step.rglob("*") if path.is_file())
            assert 0.8 * size < found < size + 200_000, (name, size, found)


@pytest.mark.parametrize(
    ("changes", "wanted"),
    [
        ({}, "average"),
        ({"guard.action": "rollback"}, "state"),
        ({"guard.action": "warn"}, None),
        ({"guard.action": "warn", "student.keep_best": "fd_1"}, "average"),
    ],
)
def test_the_best_line_is_kept_of_what_the_guard_goes_back_to(changes, wanted):
    task = plan_task(tiny_config(**changes))
    state, *best = (records.record for records in task.distillation.checkpoints())
    average = bytes_of(task.distillation.kinds(0)["average"])
    assert best == ([] if wanted is None else [{"state": state, "average": average}[wanted]])


MESH = """
import jax, numpy as np
from shell import tiny_config
from jaxdistill.run.cost import bytes_a_device
from jaxdistill.tasks import open_task, plan_task
config = tiny_config(**{"student.batch_size": 16, "mesh.fsdp": 2, "mesh.smallest": 1024})
here, away = open_task(config).cost(plan=True), plan_task(config, 4).cost(plan=True)
assert jax.device_count() == 4 and here == away, (here, away)
task = open_task(config)
layout = task.layout
made = layout.place(jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), task.abstract))
held = max(
    sum(s.data.nbytes for a in jax.tree.leaves(made) for s in a.addressable_shards if s.device == d)
    for d in jax.devices()
)
assert away.kept["student"] == held < 4 * away.networks["student"], (away.kept, held)
"""


@pytest.mark.long
def test_devices_that_are_not_here_keep_what_they_would_here():
    env = quick("--xla_force_host_platform_device_count=4", PYTHONPATH=f"{ROOT}:{ROOT / 'tests'}")
    ended = subprocess.run([sys.executable, "-c", MESH], env=env, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


# --------------------------------------------------------------------------- what does not fit


def small_machine(monkeypatch, memory, **more):
    place = cost.here()._replace(memory=memory, **more)
    monkeypatch.setattr(cost, "here", lambda: place)


@pytest.mark.long
def test_a_run_that_does_not_fit_reads_no_weights_and_writes_nothing(monkeypatch, tmp_path):
    """The teacher's weights are not even there."""
    folders = pytest.importorskip("folders")
    copy = shutil.copytree(folders.folder("sd"), tmp_path / "teacher")
    for path in copy.rglob("*.safetensors"):
        path.unlink()
    (tmp_path / "prompts.txt").write_text("a cat\n")
    config = text_config.get_config()
    config.teacher.folder, config.data.prompts = str(copy), str(tmp_path / "prompts.txt")
    config.compute.attention = "flash"
    small_machine(monkeypatch, 2**20)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(
        UserError, match=r"^the run needs .* a device .*, and .* has 1 MiB; try "
    ) as e:
        main.run(config, tmp_path / "run")
    assert sorted(tmp_path.rglob("*")) == before
    told = re.findall(r"--config\.(\S+)=(\S+) \((\S+ \S+) kept; ([^)]*)\)", str(e.value))
    knobs = {key: (value, kept) for key, value, kept, _ in told}
    assert set(knobs) == {"compute.remat", "student.lora_rank"}
    for key, (value, kept) in knobs.items():
        changed = config.copy_and_resolve_references()
        changed.update_from_flattened_dict(
            {key: type(config.student.lora_rank)(value) if value.isdigit() else value}
        )
        other = plan_task(changed).cost().kept
        assert kept == cost.gib(sum(other.values())), key
    small_machine(monkeypatch, 2**40)
    with pytest.raises(UserError, match=r"safetensors is missing"):
        main.run(config, tmp_path / "run")


def test_a_small_run_that_does_not_fit_is_refused_and_one_that_does_is_not(monkeypatch, tmp_path):
    config = tiny_config()
    needed = plan_task(config).cost().needed(None)
    small_machine(monkeypatch, needed - 1)
    with pytest.raises(UserError, match=r"student\.lora_rank=64"):
        main.run(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    small_machine(monkeypatch, needed)
    monkeypatch.setattr(main, "Run", lambda *arguments: None)
    monkeypatch.setattr(SmallTask, "execute", lambda self, run: {})
    assert main.run(config, tmp_path / "run") == {}


@pytest.mark.long
def test_the_program_that_is_compiled_beforehand_is_the_trainings(loops, monkeypatch, tmp_path):
    """A cache of programs has the step then: training does not compile it again."""
    config = tiny_config(**{"compute.compilation_cache": str(tmp_path / "programs")})
    config.teacher.update({"iterations": 2, "health_every": 2})
    small_machine(monkeypatch, 2**40, compiles=True)
    before = jax.config.jax_compilation_cache_dir
    steps = lambda: {p.name for p in (tmp_path / "programs").glob("jit_train_step*-cache")}  # noqa: E731
    try:
        compilation.use_cache(str(tmp_path / "programs"))
        task = open_task(config)
        found = estimate.estimate(config, task, cost.here(), main.RATES)
        (planned,) = steps()
        with pytest.raises(Enough):
            main.run(config, tmp_path / "run")
        both = steps()  # the teacher's beside it
        loop, _ = loops["student"]
        loop.step.lower(loop.like, task.batch_shapes(task.recipe.stages[0]), loop.given).compile()
        assert planned in both and len(both) == 2 and steps() == both
    finally:
        compilation.use_cache(before or "")
    assert re.search(r"a step's temporaries [\d.]+ \wiB", found.lines[1])


@pytest.mark.long
def test_a_step_that_the_compiler_cannot_place_is_refused(monkeypatch):
    def refuse(self):
        raise cost.DoesNotFit("the program does not fit: RESOURCE_EXHAUSTED", "report")

    small_machine(monkeypatch, 2**40, compiles=True)
    monkeypatch.setattr("jaxdistill.run.distillation.Distillation.temporaries", refuse)
    config = tiny_config()
    found = estimate.estimate(config, open_task(config), cost.here(), main.RATES, plan=True)
    assert found.refusal.startswith("the program does not fit: RESOURCE_EXHAUSTED; try --config.")


# -------------------------------------------------------------------------------- the command


@pytest.mark.costly
@pytest.mark.parametrize("more", [[], ["--plan_for=v5e:4", "--price_per_hour=2"]])
def test_a_plan_is_printed_without_a_workdir_and_nothing_is_written(
    call, monkeypatch, tmp_path, more
):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(main, "--plan", f"--config={TINY}", *more)
    assert (code, err) == (0, "") and len(out.splitlines()) <= 6
    names = [line.split()[0] for line in out.splitlines()]
    assert names == ["networks", "memory", "work", "time", "disk"]
    assert ("4 x v5e" in out) == bool(more)
    assert list(tmp_path.iterdir()) == []


def test_a_plan_that_does_not_fit_ends_with_one(call, monkeypatch):
    small_machine(monkeypatch, 1000)
    code, out, err = call(main, "--plan", f"--config={TINY}")
    assert code == 1 and out.startswith("networks") and err.startswith("error: the run needs ")
    assert err.count("\n") == 1


@pytest.mark.long
@pytest.mark.parametrize("family", ["sd15", "sd3-medium", "pixart-sigma", "flux-dev", "zimage"])
def test_a_teacher_may_be_named_by_its_architecture(family):
    """Without counting: at full size that takes seconds."""
    config = text_config.get_config()
    config.update_from_flattened_dict(
        {"teacher.architecture": family, "student.lora_rank": 4, "student.batch_size": 16,
         "methods.imagine_flash.adversarial_weight": 0.0, "mesh.fsdp": 16, "compute.scan": True,
         "compute.teacher_dtype": "bfloat16"}
    )  # fmt: skip
    if family != "sd15":
        config.student.lora_targets = ("to_q",)
    found = plan_task(config, 16).cost()
    whole = 2 * found.networks["teacher"]
    assert whole / 16 < found.kept["frozen"] < 1.2 * whole / 16  # small arrays are whole
    assert found.calls is None and found.networks["student"] < found.networks["teacher"] / 50


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--plan", "--mfu=0"], "--mfu=0 must be above 0 and at most 1"),
        (["--mfu=2"], "--mfu=2 must be above 0 and at most 1"),
        (["--plan", "--price_per_hour=-1"], "--price_per_hour=-1 must be 0 or more"),
        (["--plan", "--price_per_hour=nan"], "--price_per_hour=nan must be 0 or more"),
        (["--plan", "--plan_for=v9:4"], "--plan_for=v9:4 is not known; give CHIP:COUNT"),
        (["--workdir=w", "--plan_for=v4:4"], "--plan_for=v4:4 goes with --plan"),
        (["--plan", "--plan_for=v4:8"], "must be a positive multiple of the 8 devices"),
        ([], "--config and --workdir are needed"),
    ],
)
def test_a_mistake_is_one_line(call, flags, words):
    code, out, err = call(main, f"--config={TINY}", *flags)
    assert code == 2 and out == "" and err.count("\n") == 1
    assert words in err


def test_a_start_that_resumes_tells_it_again(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(SmallTask, "execute", lambda self, run: {})
    for _ in range(2):
        main.run(tiny_config(), tmp_path / "run")
        out = capsys.readouterr().out
        assert [line.split()[0] for line in out.splitlines()] == [
            "networks",
            "memory",
            "work",
            "time",
            "disk",
        ]
