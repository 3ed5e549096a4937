"""A folder and prompts in, a student's folder out: what it draws, that it resumes, and what is
refused before anything starts.
"""

import json
import shutil
import signal
from pathlib import Path

import folders
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import text_config
from PIL import Image
from safetensors.numpy import load_file
from shell import assert_one_error_line, assert_same_bits, run_command

from configs import base
from jaxdistill import main, partition
from jaxdistill.errors import UserError
from jaxdistill.interop import (
    Beside,
    diffusers_folder,
    diffusers_scheduler,
    families,
    lora,
    single_file,
)
from jaxdistill.model import lora_init, lora_merge
from jaxdistill.run import checkpoint, loop, record_cache, records
from jaxdistill.run.run import Run
from jaxdistill.tasks.text_to_image import pipeline
from jaxdistill.tasks.text_to_image.task import Drawn, TextToImageTask

CONFIG = Path(text_config.__file__)


def write_prompts(folder):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "prompts.txt").write_text("a cat\na dog at a cat\nphoto\nphoto of a dog\n")
    return folder / "prompts.txt"


def make_config(tmp_path, variant="sd", **changes):
    config = text_config.get_config()
    config.teacher.folder = str(folders.folder(variant))
    config.data.prompts = str(write_prompts(tmp_path))
    config.update_from_flattened_dict(changes)
    return config


def flags(tmp_path, variant="sd", **changes):
    given = {
        "teacher.folder": folders.folder(variant),
        "data.prompts": write_prompts(tmp_path),
        **changes,
    }
    return [f"--config={CONFIG}", *(f"--config.{key}={value}" for key, value in given.items())]


def run_in_two_starts(config, folder, *, stop_at, between=lambda: None):
    """A run that is stopped by a signal in its step `stop_at` and given again, `between` in
    between.
    """
    put, calls = partition.put_batch, []

    def put_batch(batch, mesh):
        calls.append(1)
        if len(calls) == stop_at:
            signal.raise_signal(signal.SIGTERM)
        return put(batch, mesh)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(partition, "put_batch", put_batch)
        with pytest.raises(
            loop.Stopped,
            match=f"stopped by SIGTERM and saved at step {stop_at} of {config.student.iterations}",
        ):
            main.run(config, folder)
    assert not (folder / "student").exists()
    between()
    main.run(config, folder)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of the 1.x folder, stopped by a signal in its third step and given again."""
    tmp_path = tmp_path_factory.mktemp("distil")
    run_in_two_starts(make_config(tmp_path), tmp_path / "run", stop_at=3)
    return tmp_path / "run"


@pytest.mark.long
def test_a_stopped_run_ends_in_the_bits_of_one_that_was_not(finished, tmp_path):
    folder = finished
    main.run(make_config(tmp_path), tmp_path / "whole")
    whole, parts = (
        records.read_curve(f / "curves" / "student.jsonl") for f in (tmp_path / "whole", folder)
    )
    assert [r for r in whole if "loss" in r] == [r for r in parts if "loss" in r]
    ours, theirs = (checkpoint.load_export(f / "student")[0] for f in (tmp_path / "whole", folder))
    assert_same_bits(ours, theirs)
    teacher = diffusers_folder.load_params(families.open_folder(folders.folder("sd")).network)
    moved = jax.tree.map(
        lambda a, b: float(np.abs(np.asarray(a) - np.asarray(b)).max()), ours, teacher
    )
    assert min(jax.tree.leaves(moved)) > 0  # every weight has learned


# Without SRL: its targets move with the student, and those of a teacher of random weights anywhere.
LEARNING = {
    "student.iterations": 12,
    "student.health_every": 12,
    "methods.imagine_flash.learning_rate": 3e-4,
    "student.steps": (2,),
    "log.checkpoint_every": 4,
    "methods.imagine_flash.adversarial_weight": 0.0,
    "methods.imagine_flash.srl": False,
}


def losses(folder):
    return [
        r["loss"] for r in records.read_curve(folder / "curves" / "student.jsonl") if "loss" in r
    ]


def health_lines(folder):
    curve = records.read_curve(folder / "curves" / "student.jsonl")
    return [record for record in curve if "health/distance_1" in record]


@pytest.mark.long
@pytest.mark.parametrize("variant", ["sd", "sdxl"])
def test_the_loss_of_a_student_falls(tmp_path, variant):
    main.run(make_config(tmp_path, variant, **LEARNING), tmp_path / "run")
    found = losses(tmp_path / "run")
    assert len(found) == 12 and np.mean(found[-4:]) < 0.7 * np.mean(found[:2])


@pytest.mark.long
def test_a_run_that_loses_its_workdir_ends_in_the_same_rows(tmp_path):
    """Checkpoints are elsewhere and hold what results need, the best averages' numbers too: after a
    stop, and again when all training is done.
    """
    changes = {
        **LEARNING,
        "student.iterations": 6,
        "student.health_every": 2,
        "student.steps": (1,),
        "student.keep_best": "distance_1",
        "methods.imagine_flash.learning_rate": 0.1,  # so large that the last is not the best
        "log.checkpoint_every": 6,
    }
    config, lost = make_config(tmp_path, **changes), tmp_path / "lost"
    expected = main.run(config, tmp_path / "whole")["rows"]
    config.log.checkpoints = str(tmp_path / "kept")
    run_in_two_starts(config, lost, stop_at=4, between=lambda: shutil.rmtree(lost))
    assert json.loads((lost / "results.json").read_text())["rows"] == expected
    shutil.rmtree(lost)
    assert main.run(config, lost)["rows"] == expected
    ours, theirs = (checkpoint.load_export(f / "student")[0] for f in (lost, tmp_path / "whole"))
    assert_same_bits(ours, theirs)
    numbers = [r["health/distance_1"] for r in health_lines(tmp_path / "whole")]
    assert len(numbers) == 4 and numbers[0] < numbers[-1]  # before any step: never the best
    numbers = numbers[1:]
    assert numbers[-1] > min(numbers)
    assert expected[0]["distance"] == round(min(numbers), 5)


@pytest.mark.long
def test_stock_diffusers_draws_our_students_images(finished):
    """Nothing is said of the sampler, and no code travels in the folder."""
    folder = finished
    start = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    theirs = folders.load_torch(folder / "diffusers")
    assert type(theirs.scheduler).__name__ == "DDIMScheduler"
    assert not list((folder / "diffusers").rglob("*.py"))
    ours, export = pipeline.load(folder / "diffusers"), pipeline.load(folder / "student")
    assert ours.steps == 3 and ours.guidance == 1.0
    for steps in (1, 2, 3):
        expected = folders.torch_images(theirs, latents=start, steps=steps, guidance=1.0)
        found = ours(folders.PROMPTS, steps=steps, latents=start)
        assert np.abs(found - expected).max() < 1 / 255
        np.testing.assert_array_equal(found, export(folders.PROMPTS, steps=steps, latents=start))


@pytest.mark.long
def test_what_a_run_leaves(finished):
    folder = finished
    results = json.loads((folder / "results.json").read_text())
    assert [row["steps"] for row in results["rows"]] == [1, 2, 3]
    for name in (
        "results.md",
        "curves.png",
        "config.json",
        "samples/teacher.png",
        "student/card.json",
        "diffusers/jaxdistill.json",
        "diffusers/how_to_sample.json",
        "diffusers/comfyui_workflow.json",
    ):
        assert (folder / name).is_file(), name
    cards = json.loads((folder / "student" / "card.json").read_text())
    assert cards["role"] == "text-to-image student" and cards["components"] == "../diffusers"


@pytest.mark.long
def test_a_student_of_one_step_learns_from_a_finished_one(finished, tmp_path):
    config = base.chosen(make_config(tmp_path), "one", file="text_config")
    config.update_from_flattened_dict(
        {
            "teacher.folder": str(finished / "diffusers"),
            "student.iterations": 10,
            "student.health_every": 10,
        }
    )
    results = main.run(config, tmp_path / "run")
    assert [row["steps"] for row in results["rows"]] == [1]
    curve = records.read_curve(tmp_path / "run" / "curves" / "student.jsonl")
    losses = [record["loss"] for record in curve if "loss" in record]
    assert np.mean(losses[-3:]) < 0.8 * np.mean(losses[:3])
    drawn, saved = (
        np.asarray(Image.open(f / "samples" / name))
        for f, name in ((tmp_path / "run", "teacher.png"), (finished, "student_0000006.png"))
    )
    np.testing.assert_array_equal(drawn, saved[-len(drawn) :])  # the finished one at three steps
    assert pipeline.load(tmp_path / "run" / "diffusers").steps == 1


def test_a_folder_that_is_no_student_cannot_teach_one_step(tmp_path):
    config = base.chosen(make_config(tmp_path), "one", file="text_config")
    with pytest.raises(
        UserError,
        match=r"is not a student: its scheduler's _class_name is .*; give the diffusers/ folder",
    ):
        main.run(config, tmp_path / "run")


def test_a_student_of_another_first_step_cannot_teach_one_step(tmp_path):
    """Noise correction is no part of its scheduler, but of its sampler."""
    source = families.open_folder(folders.folder("sd"))
    diffusers_folder.save_student(
        source,
        tmp_path / "student",
        diffusers_folder.load_params(source.network),
        scheduler=diffusers_scheduler.student_config(source.scheduler),
        extra={pipeline.SETTINGS: {"noise_correction": True, "height": 64, "width": 64}},
    )
    changes = {"teacher.folder": str(tmp_path / "student")}
    config = base.chosen(make_config(tmp_path, **changes), "one", file="text_config")
    with pytest.raises(UserError, match=r"set config\.methods\.endpoint\.noise_correction=True$"):
        main.run(config, tmp_path / "run")


@pytest.mark.long
def test_low_rank_updates_load_in_diffusers_and_fuse(tmp_path):
    pytest.importorskip("peft")
    changes = {
        "student.lora_rank": 3,
        "student.lora_targets": ("to_q", "to_out.0", "conv1", "proj_in"),
        "methods.imagine_flash.adversarial_weight": 0.0,
        "methods.imagine_flash.learning_rate": 3e-2,
        "export.single_file": "always",
    }
    config = make_config(tmp_path, "sd2", **changes)  # v-prediction from zero terminal SNR
    config.student.update({"iterations": 3, "steps": (1,)})
    main.run(config, tmp_path / "run")
    start = np.random.default_rng(0).standard_normal((2, 4, 8, 8), np.float32)
    theirs = folders.load_torch(tmp_path / "run" / "diffusers")
    assert (
        type(theirs.scheduler).__name__ == "DDIMScheduler"
    )  # its first step is exact: no noise to correct
    fused = folders.torch_images(theirs, latents=start, steps=2, guidance=1.0)
    ours = pipeline.load(tmp_path / "run" / "diffusers")(folders.PROMPTS, steps=2, latents=start)
    assert np.abs(ours - fused).max() < 1 / 255
    # The teacher with the LoRA file is the same student; without it, it is not.
    base = folders.load_torch(folders.folder("sd2"))
    base.scheduler = theirs.scheduler
    without = folders.torch_images(base, latents=start, steps=2, guidance=1.0)
    assert np.abs(without - fused).max() > 1 / 255
    for name in (lora.FILE, lora.KOHYA_FILE):  # in diffusers' names and in Kohya's
        base.load_lora_weights(tmp_path / "run" / "lora", weight_name=name)
        beside = folders.torch_images(base, latents=start, steps=2, guidance=1.0)
        base.unload_lora_weights()
        assert np.abs(beside - fused).max() < 1 / 255
    # And the run's single file is the student's folder.
    files = Beside(like=tmp_path / "run" / "diffusers")
    found = single_file.open_checkpoint(tmp_path / "run" / "student.safetensors", files)
    weights = (found.network, families.open_folder(files.like).network)
    assert_same_bits(*map(diffusers_folder.load_params, weights))
    tensors = load_file(tmp_path / "run" / "lora" / lora.FILE)
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {3} and any(
        "conv1.lora_B" in n for n in tensors
    )


@pytest.mark.long
def test_merging_is_the_layers_own_update():
    """W + down up, for a linear layer, a convolution and a stack, is what the layers compute beside
    their kernels.
    """
    part = families.open_folder(folders.folder("sdxl"), scan=True).network
    params = diffusers_folder.load_params(part)
    updates = lora_init(jax.random.key(0), params, ["to_k", "conv2", "proj_out"], 2)
    updates = jax.tree.map(lambda a: a + 0.1, updates)
    x, t, cond = diffusers_folder.example_inputs(part)
    x = jax.random.normal(jax.random.key(1), x.shape)
    apply = jax.jit(part.module.apply)
    beside = apply({**params, "lora": updates}, x, t, cond)
    np.testing.assert_allclose(beside, apply(lora_merge(params, updates), x, t, cond), atol=1e-4)
    assert np.abs(beside - apply(params, x, t, cond)).max() > 1e-2


def fill(folder, make, *, count=10, until=None, **options):
    """A writer that has all of the records, or so many, and is not closed then."""
    writer = record_cache.Writer(folder, count, **options)
    while writer.done < (until or count):
        writer.add(make(writer.done, min(writer.done + options["block"], count)))
    if until is None:
        writer.close()
    return writer


@pytest.mark.parametrize("dtype", [np.float16, jnp.bfloat16])
def test_a_cache_gives_back_its_records_in_an_order_of_its_own(tmp_path, dtype):
    values = np.arange(60).astype(dtype).reshape(10, 2, 3)

    def make(first, last):
        return {"a": values[first:last], "b": np.arange(first, last, dtype=np.int32)}

    fill(tmp_path / "c", make, block=3, shard=4)
    cache = record_cache.Cache(tmp_path / "c")
    assert len(list((tmp_path / "c").glob("*.array_record"))) == 3
    assert all(np.array_equal(cache[i]["a"], values[i]) and cache[i]["b"] == i for i in range(10))
    batches = cache.batches(5, seed=1)
    epochs = [np.concatenate([batches(2 * e + i)["b"] for i in range(2)]) for e in range(3)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs) and not np.array_equal(
        epochs[0], epochs[1]
    )
    np.testing.assert_array_equal(cache.batches(5, seed=1)(3)["b"], batches(3)["b"])
    next((tmp_path / "c").glob("*.array_record")).unlink()
    with pytest.raises(record_cache.CacheError, match="is missing; remove"):
        record_cache.Cache(tmp_path / "c")


@pytest.mark.parametrize("stopped_after", [3, 6, 9, 10])
def test_a_cache_that_is_stopped_goes_on_in_the_same_blocks(tmp_path, stopped_after):
    asked = []

    def make(first, last):
        asked.append((first, last))
        return {"a": np.arange(first, last, dtype=np.int32)}

    fill(tmp_path / "c", make, until=stopped_after, block=3, shard=6).close()
    assert (tmp_path / "c").exists() == (stopped_after == 10)
    fill(tmp_path / "c", make, block=3, shard=6)
    cache = record_cache.Cache(tmp_path / "c")
    assert asked == [(0, 3), (3, 6), (6, 9), (9, 10)] and [
        int(cache[i]["a"]) for i in range(len(cache))
    ] == list(range(10))
    assert list(tmp_path.iterdir()) == [tmp_path / "c"]
    # Killed: what was in whole files is kept.
    asked.clear()
    fill(tmp_path / "k", make, until=6, block=3, shard=3)
    shutil.copytree(tmp_path / "k.tmp", tmp_path / "l.tmp")
    fill(tmp_path / "l", make, block=3, shard=3)
    cache = record_cache.Cache(tmp_path / "l")
    assert asked == [(0, 3), (3, 6), (3, 6), (6, 9), (9, 10)] and [
        int(cache[i]["a"]) for i in range(10)
    ] == list(range(10))


def test_a_signal_while_prompts_are_encoded_is_heeded_and_what_is_encoded_is_kept(tmp_path):
    config = make_config(tmp_path, **{"methods.imagine_flash.adversarial_weight": 0.0})
    Path(config.data.prompts).write_text("".join(f"a cat {i}\n" for i in range(40)))
    (tmp_path / "run").mkdir()
    pipe = pipeline.load(folders.folder("sd"))
    text, asked = pipe.text, []

    class Text:
        negative, announce = text.negative, text.announce

        def __call__(self, prompts):
            asked.append(len(prompts))
            if len(asked) == 2:
                signal.raise_signal(signal.SIGTERM)
            return text(prompts)

    pipe.text = Text()
    task = TextToImageTask(config)
    with loop.StopSignal().installed() as stop:
        run = Run(config, tmp_path / "run", stop, task.layout)
        with pytest.raises(
            loop.Stopped,
            match=r"^encoding prompts: stopped by SIGTERM; the same command resumes it$",
        ):
            task.open_data(run, pipe)
    assert asked == [16, 16]  # rows of a program, always
    run = Run(config, tmp_path / "run", loop.StopSignal(), task.layout)
    task.open_data(run, pipe)
    texts = task._caches["prompts"]
    assert asked == [16, 16, 16] and len(texts) == 40
    np.testing.assert_allclose(texts[20]["context"], text(["a cat 20"])["context"][0], atol=2e-3)


@pytest.mark.long
def test_images_are_cropped_encoded_and_kept_with_their_captions(tmp_path):
    """For the adversarial term's reals: an image of another size and shape, and its caption, as the
    discriminator will see them.
    """
    (tmp_path / "images").mkdir()
    wide = np.random.default_rng(0).integers(0, 255, (32, 48, 3), np.uint8)
    Image.fromarray(wide).save(tmp_path / "images" / "a.png")
    Image.fromarray(wide[:, ::-1]).save(tmp_path / "images" / "b.png")
    lines = [{"file_name": "a.png", "prompt": "a cat"}, {"file_name": "b.png", "prompt": "a dog"}]
    (tmp_path / "images" / "metadata.jsonl").write_text(
        "".join(json.dumps(line) + "\n" for line in lines)
    )
    config = make_config(
        tmp_path, **{"adversarial.reals": "data", "data.images": str(tmp_path / "images")}
    )
    (tmp_path / "run").mkdir()
    task = TextToImageTask(config)
    pipe = pipeline.load(folders.folder("sd"))
    task.open_data(Run(config, tmp_path / "run", loop.StopSignal(), task.layout), pipe)
    reals, encode = task._caches["images"], task.folder.vae.module.apply
    for i, image in enumerate((wide, wide[:, ::-1])):
        square = (
            Image.fromarray(image).resize((96, 64), Image.Resampling.LANCZOS).crop((16, 0, 80, 64))
        )
        expected = encode(
            pipe.vae_params,
            jax.numpy.asarray(square, np.float32)[None] / 127.5 - 1,
            method="encode",
        )[0]
        np.testing.assert_allclose(reals[i]["latents"], expected, atol=1e-4)
        np.testing.assert_allclose(
            reals[i]["context"], pipe.text([lines[i]["prompt"]])["context"][0], atol=2e-3
        )
    found = task.batches(task.recipe.stages[0], "student")(0)
    assert found["real"].shape == (config.student.batch_size, *task.latent_shape)
    assert not np.array_equal(reals[0]["latents"], reals[1]["latents"])


REFUSALS = [
    ({"teacher.folder": ""}, "config.teacher.folder is empty"),
    ({"teacher.folder": "/nowhere"}, "/nowhere does not exist"),
    (
        {"teacher.folder": str(folders.folder("lcm"))},
        "guidance is an input of its UNet (time_cond_proj_dim = 24)",
    ),
    ({"data.prompts": ""}, "config.data.prompts is empty"),
    ({"data.images": "/nowhere"}, "config.data.images = /nowhere is not a folder"),
    ({"adversarial.reals": "data"}, "needs config.data.images"),
    (
        {"student.lora_rank": 2, "student.lora_targets": ("to_qq",)},
        "LoRA target 'to_qq' matches no layer",
    ),
    ({"student.lora_rank": -1}, "config.student.lora_rank must be at least 0"),
    ({"student.batch_size": 5}, "batch size 5 must be a multiple of the 2 grids that share it"),
    (
        {"data.cache": "gs://bucket/cache"},
        "config.data.cache = 'gs://bucket/cache' must be a folder",
    ),
    ({"log.health_prompts": 0}, "config.log.health_prompts must be at least 1, got 0"),
    ({"log.batch_size": 0}, "config.log.batch_size must be at least 1, got 0"),
    ({"data.height": 60}, "height must be a positive multiple of 8"),
    ({"compute.attention": "fast"}, "config.compute.attention = 'fast' is not known"),
    (
        {"methods.imagine_flash.backward": False, "adversarial.reals": "data"},
        "needs config.data.images",
    ),
    ({"methods.imagine_flash.learning_rate": 0.0}, "learning_rate must be above 0"),
]


@pytest.mark.parametrize(("changes", "words"), REFUSALS)
def test_a_bad_config_is_refused_before_anything_is_written(changes, words, tmp_path):
    with pytest.raises(UserError) as failure:
        main.run(make_config(tmp_path, **changes), tmp_path / "run")
    assert words in str(failure.value) and "\n" not in str(failure.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_the_command_gives_one_line(tmp_path):
    found = run_command(
        "jaxdistill.main",
        *flags(tmp_path, **{"teacher.folder": "/nowhere"}),
        f"--workdir={tmp_path / 'run'}",
    )
    assert_one_error_line(found, "/nowhere does not exist")


def test_a_students_export_that_was_copied_alone_says_what_it_lacks(tmp_path):
    card = {"components": "../diffusers", "sampler": {"steps": 2}}
    checkpoint.export(tmp_path / "student", {"params": {"a": np.ones(2, np.float32)}}, card)
    with pytest.raises(
        UserError, match=r"holds a student's network alone, .*copy that folder beside"
    ):
        pipeline.load(tmp_path / "student")


@pytest.mark.long
def test_a_student_that_draws_no_numbers_in_training_is_not_laid_on_its_teacher(tmp_path):
    task = TextToImageTask(make_config(tmp_path))
    pipe = pipeline.load(folders.folder("sd"), layout=partition.own_layout(task.layout))
    drawn = Drawn(task, pipe, pipe, ["a cat"], {"height": 16, "width": 16})
    bad = jax.tree.map(lambda a: np.full_like(a, 1e30), drawn.params)
    with pytest.raises(UserError, match=r"^the student in training: the UNet .* learning rate"):
        drawn(bad, [1])


@pytest.mark.long
def test_the_exports_are_rehearsed_before_any_weight_is_read(tmp_path, monkeypatch):
    def full(*given):
        raise UserError("no space")

    def load(*given):
        raise AssertionError

    monkeypatch.setattr(checkpoint, "check_space", full)
    monkeypatch.setattr(TextToImageTask, "load", load)
    with pytest.raises(UserError, match="no space"):
        main.run(make_config(tmp_path), tmp_path / "run")


@pytest.mark.long
def test_an_export_of_scanned_blocks_is_read_as_such(tmp_path):
    """configs/sdxl.py trains with stacked blocks; its Orbax export draws what the folder draws."""
    source = families.open_folder(folders.folder("sdxl"), scan=True)
    params = diffusers_folder.load_params(source.network)
    card = {
        "role": "text-to-image student",
        "components": str(source.path),
        "stacked": True,
        "sampler": {"steps": 2},
    }
    checkpoint.export(tmp_path / "student", params, card)
    found, expected = (
        pipeline.load(path)(["cat"], steps=2, guidance=1.0)
        for path in (tmp_path / "student", source.path)
    )
    assert np.abs(found - expected).max() < 1e-4
