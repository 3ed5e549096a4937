"""Planning for a TPU that is not here: the compiler's own report, the search for a batch, and what
is refused.
"""

import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_config
from shell import assert_one_error_line, run_command

from configs import base, gpu, tpu_v4
from jaxdistill import partition
from jaxdistill.costs import chips, hlo
from jaxdistill.costs.flops import flops_of
from jaxdistill.interop import architectures, card, diffusers_scheduler
from jaxdistill.run import cost
from jaxdistill.run.cost import Rates, elsewhere, run_lines
from jaxdistill.run.phase import programs
from jaxdistill.tasks.estimate import knobs_of
from jaxdistill.tasks.text_to_image import pipeline, plan
from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

TINY = {
    "unet": {
        "in_channels": 4,
        "out_channels": 4,
        "sample_size": 16,
        "layers_per_block": 1,
        "block_out_channels": (32, 32),
        "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
        "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
        "attention_head_dim": 2,
        "cross_attention_dim": 32,
    },
    "vae": architectures.PIPELINES["sd15"]["vae"],
    "model_index": architectures.PIPELINES["sd15"]["model_index"],
    "scheduler": architectures.PIPELINES["sd15"]["scheduler"],
}


def make_config(**changes):
    config = text_config.get_config()
    config.teacher.architecture = "tiny"
    config.methods.imagine_flash.adversarial_weight = 0.0
    config.student.batch_size = 16
    config.compute.dtype = "bfloat16"
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture
def tiny(monkeypatch):
    monkeypatch.setattr(architectures, "PIPELINES", {"tiny": TINY})


@pytest.mark.long
@pytest.mark.parametrize(("variant", "remat"), [("", "none"), ("one", "none"), ("", "full")])
def test_the_analytic_count_is_that_of_the_step_as_it_is_written(tiny, variant, remat):
    """N states of 3 student and k c teacher calls each; what is computed again counts by itself."""
    changes = {"methods.imagine_flash.teacher_steps": 2, "compute.remat": remat}
    config = base.chosen(make_config(**changes), variant, file="text_config")
    setup = TextSetup(config, open_teacher(config))
    made = programs(setup.distillation.planned(0), setup.layout)
    batch = setup.batch_shapes(setup.recipe.stages[0])
    counted = flops_of(made.step, made.state, batch, made.given)
    assert counted / setup.step_flops(remat=remat) == pytest.approx(1.0, abs=0.05)
    assert (counted > 1.1 * setup.step_flops()) == (remat == "full")
    teacher = 2 * 2 if not variant else 0
    calls = 3 * (3 + teacher) if not variant else 3 + 3
    assert setup.step_flops() / (16 * setup.call_flops()) == pytest.approx(calls, rel=0.1)


@pytest.mark.long
def test_the_planned_sampler_draws_the_pipelines_images():
    folders = pytest.importorskip("folders")
    pipe = pipeline.load(folders.folder("sd"))
    config = make_config(
        **{
            "teacher.folder": str(folders.folder("sd")),
            "compute.dtype": "float32",
            "data.height": 64,
            "data.width": 64,
            "methods.imagine_flash.noise_correction": True,
        }
    )
    setup = TextSetup(config, open_teacher(config))
    start = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    plain = diffusers_scheduler.student_config(pipe.folder.scheduler)
    pipe.scheduler = diffusers_scheduler.of_folder(
        pipe.folder._replace(scheduler=plain), noise_correction=True
    )
    expected = pipe(folders.PROMPTS, steps=3, guidance=1.0, height=64, width=64, latents=start)
    found = setup.sample(
        pipe.params,
        pipe.vae_params,
        jnp.asarray(start.transpose(0, 2, 3, 1)),
        jax.tree.map(jnp.asarray, pipe.text(folders.PROMPTS)),
        steps=3,
    )
    np.testing.assert_allclose(card.to_unit(found), expected, atol=1e-4)
    assert expected.std() > 0.05


@pytest.mark.long
def test_the_sampler_is_counted_as_it_is_written(tiny):
    config = make_config(**{"student.batch_size": 6, "student.steps": (1, 3)})
    program = plan.sampler_program(config, jax.devices())
    counted = flops_of(program.function, *program.arguments)
    assert counted == pytest.approx(program.analytic_flops, rel=0.02) and program.rows == 6
    setup = TextSetup(config, open_teacher(config))
    assert program.analytic_flops == pytest.approx(
        6 * (3 * setup.call_flops() + setup.decode_flops())
    )
    assert set(program.kinds) == {"student", "decoder", "batch"}


@pytest.mark.long
@pytest.mark.parametrize("guidance", [3.0, 1.0])
def test_the_teachers_step_is_counted_as_it_is_written(tiny, guidance):
    """Of one host's chips, each with config.log.batch_size images; under guidance with two rows of
    conditioning for one of states.
    """
    config = make_config(**{"log.batch_size": 3, "teacher.guidance": guidance})
    program = plan.teacher_program(config, jax.devices())
    counted = flops_of(program.function, *program.arguments)
    setup = TextSetup(config, open_teacher(config))
    assert counted == pytest.approx(program.analytic_flops, rel=0.02)
    assert program.rows == 3 * len(jax.devices()) and set(program.kinds) == {"teacher", "batch"}
    assert program.analytic_flops == pytest.approx(
        program.rows * setup.call_flops(copies=2 if guidance > 1 else 1)
    )
    assert setup.call_flops(copies=2) > 1.3 * setup.call_flops()


def test_what_goes_between_slices_is_priced_by_their_network():
    chip = chips.CHIPS["v4"]
    program = plan.Program(None, (), {}, 275e12, 8)
    counts = hlo.Counts(
        flops=275e12,
        bytes=1228e9,
        collectives={"all-reduce": 3e9, hlo.NETWORK: 12.5e9},
        gathers=[],
        unknown_loops=0,
    )
    report = plan.counted(counts, program, chip, 1)
    assert report["roofline_ms"] == {
        "compute": 1000.0,
        "memory": 1000.0,
        "interconnect": 10.0,
        "network": 2000.0,
    }
    assert report["bound"] == "network" and report["step_ms_at_least"] == 2000.0
    del counts.collectives[hlo.NETWORK]
    assert plan.counted(counts, program, chip, 1)["bound"] == "compute"


def test_the_sum_of_the_kinds_is_what_the_arguments_weigh():
    layout = partition.layout()
    tree = layout.describe(
        {
            "kernel": jax.ShapeDtypeStruct((64, 32), jnp.bfloat16),
            "key": jax.eval_shape(lambda: jax.random.key(0)),
        }
    )
    assert cost.bytes_a_device(tree) == 64 * 32 * 2 + 8


def fake(limit, calls):
    def measure(program, chip, devices):
        calls.append(program)
        if program > 2 * limit:
            raise plan.DoesNotFit("too large", "")
        return {"memory_gib": {"needed": float(program)}, "fits": program <= limit, "rows": program}

    return measure


@pytest.mark.parametrize(
    ("limit", "step", "best"), [(44, 1, 11), (44, 2, 10), (4, 1, 1), (3, 1, 0), (4096, 1, 1024)]
)
def test_the_search_finds_the_largest_batch_that_fits(monkeypatch, limit, step, best):
    calls = []
    monkeypatch.setattr(plan, "measure", fake(limit, calls))
    rows, report = plan.search(lambda rows: rows, chips.CHIPS["v4"], 4, step)
    assert rows == best and len(calls) <= 2 * np.log2(1024) + 2 and len(set(calls)) == len(calls)
    assert (report is None) if best == 0 else report["rows"] == 4 * best


def unreadable(self):
    raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure\nbelow")


def looped():
    """A program with a loop, so that counts of another text than the optimized one would differ."""
    x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    program = jax.jit(lambda a: jax.lax.fori_loop(0, 5, lambda _, b: jnp.tanh(b @ a), a))
    return plan.Program(program, (x,), {"batch": x}, 5 * 2.0 * 64**3, 64)


def test_a_program_that_jaxlib_cannot_read_is_counted_from_the_compilers_own_text(monkeypatch):
    """As v6e's of 1.5 at full size, after an hour of compiling."""
    whole = plan.measure(looped(), chips.CHIPS["v6e"], 1)
    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    report = plan.measure(looped(), chips.CHIPS["v6e"], 1)
    assert "unread" not in report and report["flops_a_chip"] >= 5 * 2.0 * 64**3
    assert {key: value for key, value in report.items() if key != "compile_seconds"} == {
        key: value for key, value in whole.items() if key != "compile_seconds"
    }


def test_without_any_text_the_memory_figures_are_kept(monkeypatch):
    program = looped()
    whole = plan.measure(program, chips.CHIPS["v6e"], 1)
    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    monkeypatch.setattr(plan, "WRITTEN", "none of this name")
    report = plan.measure(program, chips.CHIPS["v6e"], 1)
    assert report["unread"] == "INTERNAL: RET_CHECK failure" and report["fits"]
    same = ("memory_gib", "analytic_flops_a_chip", "rows", "versions")
    assert {key: report[key] for key in same} == {
        key: whole[key] for key in same
    } and "flops_ratio" in whole
    text = plan.text_of({"topology": "v6e:1x1", "compiled": "step", **report})
    assert (
        "of 32: fits" in text
        and "cannot read what libtpu compiled (INTERNAL: RET_CHECK failure)" in text
    )


OOM = """RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20G of 16G
  Largest program allocations in hbm:
  1. Size: 4.00G
     Operator: op_name="jit(train_step)/dot"
     Shape: bf16[48,8,4096,4096]
"""


def test_a_job_that_does_not_fit_names_its_buffers():
    lines = plan.largest_buffers(OOM.replace("1. ", ""))
    assert lines == [
        '  Size: 4.00G  Shape: bf16[48,8,4096,4096]  Operator: op_name="jit(train_step)/dot"'
    ]
    assert plan.largest_buffers("first\nsecond\n\nthird") == ["  second", "  third"]


@pytest.mark.long
def test_a_report_ends_with_the_whole_run(tiny):
    """Of the slice's chips; a plan of as many that are not here says the same."""
    config = make_config(**{"mesh.fsdp": 2})
    found = plan.run_lines(config, "v5e:2x2", 1, Rates(0.4, 2.0))
    place = elsewhere("v5e:4")
    assert found == run_lines(TextSetup.planned(config, 4).cost(plan=True), place, Rates(0.4, 2.0))
    assert any("hours on 4 x v5e at an MFU of 0.4" in line for line in found)
    devices = plan.topology("v5e:2x2")[1]
    there, as_many = (TextSetup.planned(config, d).cost() for d in (devices, 4))
    assert there == as_many and knobs_of(config, devices) == knobs_of(config, 4)


@pytest.mark.costly
@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--topology=v4:2x2x1"], "--config is missing"),
        (
            ["--config=configs/tpu_v4.py"],
            "--topology is missing; give CHIP:SHAPE, such as v4:2x2x1",
        ),
        (
            ["--config=configs/tpu_v4.py", "--topology=v9:2x2"],
            "--topology=v9:2x2 is not known; give CHIP:SHAPE",
        ),
        (["--config=configs/digits.py", "--topology=v4:2x2x1"], "plans text-to-image configs"),
        (["--config=configs/tpu_v4.py", "--topology=v4:2x2x1", "--program=all"], "--program=all"),
        (
            ["--config=configs/tpu_v4.py", "--topology=v4:2x2x1", "--program=teacher", "--search"],
            "--search looks for config.student.batch_size",
        ),
        (
            ["--config=configs/tpu_v4.py", "--topology=v4:2x2x1", "--json=/nowhere/x.json"],
            "the folder /nowhere does not exist",
        ),
    ],
)
def test_a_mistake_is_one_line(flags, words):
    assert_one_error_line(run_command("jaxdistill.aot", *flags), words)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"mesh.fsdp": 3}, "does not divide the 1 devices"),
        (
            {"student.accumulate": 3},
            "config.student.accumulate = 3 must divide config.student.batch_size = 16",
        ),
        ({"student.accumulate": 0}, "config.student.accumulate must be at least 1, got 0"),
        ({"student.batch_size": 0}, "must be a positive multiple"),
        ({"compute.remat": "some"}, "config.compute.remat = 'some' is not known"),
        ({"teacher.architecture": "sd99"}, "config.teacher.architecture = 'sd99' is not known"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(tiny, changes, words):
    with pytest.raises(ValueError, match=re.escape(words)):
        config = make_config(**changes)
        TextSetup(config, open_teacher(config))


@pytest.mark.parametrize("name", ["v4:2x2x1", "v5e:2x2", "v5p:2x2x1", "v6e:2x2"])
def test_one_slice_of_every_kind_of_chip_makes_a_mesh(name):
    _, devices = plan.topology(name)
    assert partition.make_mesh(2, -1, 1, devices=devices).shape == {
        "data": 2,
        "fsdp": len(devices) // 2,
        "tensor": 1,
    }


def test_several_slices_divide_the_data_and_nothing_else():
    _, devices = plan.topology("v4:2x2x1", slices=2)
    for sizes in ((-1, 1, 1), (2, 4, 1), (4, 1, 2)):
        mesh = partition.make_mesh(*sizes, devices=devices)
        halves = np.split(np.vectorize(lambda device: device.slice_index)(mesh.devices), 2)
        assert [np.unique(half).tolist() for half in halves] == [[0], [1]]
    with pytest.raises(ValueError, match="must divide data over the 2 slices"):
        partition.make_mesh(1, 8, 1, devices=devices)


PUBLISHED = {
    **{"sd15": 859.5, "sd21": 865.9, "sdxl": 2567.5, "sd3-medium": 2085.0, "sd35-medium": 2469.7},
    **{"sd35-large": 8146.3, "pixart-sigma": 610.9, "flux-dev": 11901.4, "flux-schnell": 11891.2},
    "zimage": 6154.9,
}
"""Millions of parameters, a table of positions among them."""


@pytest.mark.long
def test_published_architectures_have_their_published_size():
    for name, millions in PUBLISHED.items():
        part = architectures.folder(architectures.PIPELINES[name]).network
        count = sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(aot_params(part)))
        assert count / 1e6 == pytest.approx(millions, abs=0.1), name


def aot_params(part):
    from jaxdistill.interop import diffusers_folder

    return diffusers_folder.abstract_params(part)


def test_every_size_of_the_tpu_config_is_a_plan():
    import configs.tpu_v4 as file

    for size in file.SIZES:
        config = file.get_config(size)
        assert json.loads(config.to_json())["teacher"]["architecture"] in architectures.PIPELINES
        assert config.student.batch_size % file.CHIPS == 0
    with pytest.raises(ValueError, match=r"tpu_v4\.py:v9 is not known"):
        file.get_config("v9")


@pytest.mark.parametrize("method", ["imagine_flash", "matched", "tdm"])
@pytest.mark.parametrize("size", ["", "v5e-", "v6e-", "sdxl-"])
def test_each_chip_has_rows_of_each_grid_that_shares_a_batch(size, method):
    config = tpu_v4.get_config(size + method)
    counts = {"matched": config.methods.matched.matching.counts, "tdm": config.student.steps}
    rows, left = divmod(config.student.batch_size, config.student.accumulate * tpu_v4.CHIPS)
    assert left == 0 and rows > 0 and rows % len(counts.get(method, [1])) == 0


@pytest.mark.parametrize("method", ["imagine_flash", "matched", "tdm"])
@pytest.mark.parametrize("cards", [1, 8])
@pytest.mark.parametrize("size", gpu.ROWS)
def test_each_card_has_rows_of_each_grid_that_shares_a_batch(size, cards, method):
    config = gpu.get_config(f"{size}_x{cards}-{method}" if cards > 1 else f"{size}-{method}")
    counts = {"matched": config.methods.matched.matching.counts, "tdm": config.student.steps}
    grids = len(counts.get(method, [1]))
    rows, left = divmod(config.student.batch_size, config.student.accumulate * cards)
    assert left == 0 and rows % grids == 0 and gpu.ROWS[size] - grids < rows <= gpu.ROWS[size]
    assert config.teacher.architecture in architectures.PIPELINES
    assert bool(config.student.lora_rank) == size.endswith("_lora")


def test_a_size_of_the_gpu_config_that_is_none_is_refused():
    for name in ("sd15lora", "sd15_x0", "sd15_xmany", "sdxl_lora_x8-other"):
        with pytest.raises(ValueError, match=r"gpu\.py:\S+ is not known; .* :sdxl_lora, "):
            gpu.get_config(name)
    assert gpu.get_config("tdm").student.lora_rank == 64  # of the first size
