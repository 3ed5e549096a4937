import dataclasses
import json
import shutil
from functools import cache
from pathlib import Path

import jax
import numpy as np
import pytest
from idx import write_fashion
from matplotlib import pyplot as plt
from paths import TESTS
from PIL import Image
from shell import assert_one_error_line, assert_same_bits, run_command

from configs import benchmark as config_file
from jaxdistill import benchmark, sample, sampling, schedule, teacher_states
from jaxdistill.errors import UserError
from jaxdistill.interop import card
from jaxdistill.interop.text_export import TextExport
from jaxdistill.methods.matched import added
from jaxdistill.run import checkpoint, loop, record_cache, report
from jaxdistill.tasks.scenes.scenes import open_scenes
from jaxdistill.tasks.scenes.scores import SceneScores
from jaxdistill.tasks.scenes.task import Scenes, caption_of, watched
from jaxdistill.tasks.settings import changed

METHODS = ("imagine_flash", "step_distillation")
GOLDEN = TESTS / "golden" / "bert"


def config_of(size=""):
    """Of a size, with a source of scenes and a small encoder."""
    config = config_file.get_config(size)
    config.data.source, config.text.folder = "fashion-mnist", str(GOLDEN)
    return config


def study_of(config, workdir=Path("unused")):
    """Every name of the list once; nothing is made."""
    config.benchmark.seeds = config.benchmark.seeds[:1]
    return benchmark.Study(config, workdir, benchmark.listed(config), loop.StopSignal())


@cache
def opened():
    """A task of the benchmark's size; others share its network."""
    return Scenes(config_of())


def recipe_of(config, name):
    return Scenes(changed(config, {"method.name": name}), share=opened()).recipe


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write_fashion(tmp_path_factory.mktemp("idx"))


@pytest.fixture(scope="module")
def smoke(source, tmp_path_factory):
    """(workdir, flags) of a finished smoke benchmark: the command as users give it."""
    workdir = tmp_path_factory.mktemp("benchmark") / "run"
    flags = [
        "--config=configs/benchmark.py:smoke",
        f"--config.data.source={source}",
        f"--config.text.folder={GOLDEN}",
        f"--config.data.cache={workdir.parent / 'cache'}",
        f"--workdir={workdir}",
        f"--config.benchmark.methods={METHODS}",
    ]
    found = run_command("jaxdistill.benchmark", *flags, timeout=600)
    assert found.returncode == 0, found.stderr[-3000:]
    assert "| imagine_flash | student | 1 |" in found.stdout
    return workdir, flags


@pytest.mark.long
def test_smoke_benchmark_scores_every_method_at_every_step_count(smoke):
    workdir, _ = smoke
    results = json.loads((workdir / "results.json").read_text())
    found = {(row["method"], row["steps"]) for row in results["rows"]}
    config = config_of("smoke")
    assert found == {(m, n) for m in METHODS for n in config.student.steps} | {
        ("teacher", n) for n in (1, 2, 4)
    }
    for row in results["rows"]:
        assert (
            np.isfinite([row[k] for k in SceneScores._fields]).all()
            and row["images_per_second"] > 0
        )
    assert results["floor_fd"] > 0 and set(results["ceiling"]) == {
        "colour",
        "garment",
        "relation",
        "all_right",
    }
    assert "| step_distillation | student | 2 |" in (workdir / "results.md").read_text()
    assert Image.open(workdir / "results.png").size[0] == 1200


@pytest.mark.long
def test_rows_alone_carry_a_finished_benchmark_and_other_settings_are_refused(smoke, tmp_path):
    workdir, flags = smoke
    bare = tmp_path / "bare"
    shutil.copytree(
        workdir, bare, ignore=shutil.ignore_patterns("students", "checkpoints", "pictures")
    )
    (bare / "results.json").unlink()
    found = run_command(
        "jaxdistill.benchmark", *(f.replace(str(workdir), str(bare)) for f in flags), timeout=300
    )
    assert found.returncode == 0, found.stderr[-3000:]
    assert (
        not (bare / "students").exists() and not (bare / "pictures").exists()
    )  # nothing was trained or scored again
    assert (bare / "rows.json").read_bytes() == (workdir / "rows.json").read_bytes()
    again, first = (json.loads((folder / "results.json").read_text()) for folder in (bare, workdir))
    assert again["rows"] == first["rows"] and again["ceiling"] == first["ceiling"]
    assert Image.open(bare / "results.png").size[0] == 1200  # with grey in place of the pictures
    found = run_command("jaxdistill.benchmark", *flags, "--config.eval.samples=40")
    # Libraries may warn at import (Grain does with an older jaxlib); of ours there is one line.
    errors = [line for line in found.stderr.splitlines() if line.startswith("error: ")]
    assert found.returncode == 2 and len(errors) == 1 and "Traceback" not in found.stderr
    assert "another config" in errors[0] and "eval.samples" in errors[0]


@pytest.mark.long
@pytest.mark.parametrize("name", ["imagine_flash-0", "step_distillation-0"])
def test_export_draws_the_images_that_were_scored(smoke, source, name):
    """The card alone, with the encoder, brings back solver, grid and noise correction."""
    workdir, _ = smoke
    config, model = (
        config_of("smoke"),
        TextExport(workdir / "students" / name / "student", encoder=GOLDEN),
    )
    scenes = open_scenes(source, workdir.parent / "cache/scenes", scale=config.data.scale)
    captions = [caption_of(item) for item in scenes["test"]][: config.eval.samples]
    images = model(captions, steps=2, seed=config.eval.seed, batch_size=config.eval.batch_size)
    scored = np.load(workdir / "pictures" / f"{name}-student-2-1.npy").astype(np.float32)
    np.testing.assert_allclose(images[: len(scored)] * 255.0, scored, atol=1.01)
    assert model.card["sampler"]["steps"] == 2 and model.card["sampler"]["guidance"] == 1.0
    # An image is a function of its caption, the seed and its number, not of its batch.
    np.testing.assert_allclose(
        model(captions[:3], seed=config.eval.seed, batch_size=2), images[:3], atol=1e-4
    )


@pytest.mark.long
def test_each_stages_export_names_a_step_count_that_it_serves(smoke):
    steps = {
        str(p.parent.relative_to(smoke[0] / "students")): json.loads(p.read_text())["sampler"][
            "steps"
        ]
        for p in smoke[0].glob("students/*/student*/card.json")
    }
    assert steps == {
        "imagine_flash-0/student": 2,
        "step_distillation-0/student": 2,
        "step_distillation-0/student_1_step": 1,
    }


@pytest.mark.long
def test_sample_reads_captions(smoke, tmp_path, capsys):
    folder, out = smoke[0] / "students" / "imagine_flash-0" / "student", tmp_path / "x.npz"
    flags = [f"--model={folder}", f"--out={out}", f"--text_encoder={GOLDEN}"]
    caption = "a red bag above a blue boot"
    sample.main([*flags, f"--prompt={caption}", "--num=2", "--steps=1", "--seed=3"])
    found = np.load(out)
    assert found["images"].shape == (2, 32, 32, 3) and list(found["prompts"]) == [caption] * 2
    expected = TextExport(folder, encoder=GOLDEN)([caption] * 2, steps=1, seed=3)
    np.testing.assert_array_equal(found["images"], expected)
    for more, words in [
        ([], "draws from text"),
        (["--prompt=a bag", "--labels=3"], "has no classes"),
        (["--prompt=a bag", "--height=64"], "--height"),
        (["--prompt=" + "bag " * 40], "tokens"),
        (["--prompt=a bag", "--guidance=-1"], "guidance must be"),
        (["--prompt=a bag", "--steps=0"], "--steps must be"),
        (["--prompt=a bag", "--text_encoder=nowhere"], "nowhere"),
    ]:
        with pytest.raises(SystemExit) as stop:
            sample.main([*flags, *more])
        printed = capsys.readouterr().err
        assert stop.value.code == 2 and words in printed and printed.count("\n") == 1, printed


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"benchmark.methods": ("direct", "magic")}, ("methods", "'magic'", "dmd2", "tdm")),
        ({"base": "/nowhere"}, ("config.base = /nowhere", "config.json")),
        ({"eval.samples": 5}, ("eval.samples = 5", "at least 9")),
        ({"eval.samples": 0}, ("eval.samples must be at least 1, got 0",)),
        ({"eval.unseen": 0}, ("eval.unseen must be at least 1, got 0",)),
        ({"eval.diversity_captions": 0}, ("eval.diversity_captions must be at least 1, got 0",)),
        ({"eval.repeats": 1}, ("eval.repeats must be at least 2, got 1",)),
        ({"eval.split": "train"}, ("eval.split", "'train'", "'test'")),
        ({"student.steps": (0, 1)}, ("student.steps", "at least 1")),
    ],
)
def test_bad_config_is_refused_before_any_work(changes, words):
    config = config_of("smoke")
    config.update_from_flattened_dict(changes)
    with pytest.raises(ValueError) as error:
        study_of(config)
    for word in words:
        assert word in str(error.value)


@pytest.mark.long
def test_variants_run_on_the_exports_of_another_benchmark(smoke, tmp_path):
    made, flags = smoke
    config = config_of("smoke")
    base, workdir = tmp_path / "base", tmp_path / "run"
    base.mkdir()
    shutil.copy(made / "config.json", base)
    for part in ("teacher", "recogniser"):
        shutil.copytree(made / part, base / part)
    before = {p: p.stat().st_mtime_ns for p in base.rglob("*")}
    changed = [f for f in flags if "workdir" not in f and "methods" not in f]
    few = (
        "--config.benchmark.methods=('direct',)",
        "--config.benchmark.seeds=(1,)",
        "--config.student.steps=(1,)",
    )
    run = [*changed, f"--config.base={base}", f"--workdir={workdir}", *few]
    found = run_command("jaxdistill.benchmark", *run, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    # The teacher is a copy and nothing was trained but the student.
    assert_same_bits(*(checkpoint.load_export(f / "teacher")[0] for f in (base, workdir)))
    assert not (workdir / "curves" / "teacher.jsonl").exists()
    assert not (workdir / "recogniser").exists() and (made / "curves" / "teacher.jsonl").exists()
    assert {p: p.stat().st_mtime_ns for p in base.rglob("*")} == before
    rows = {
        name: json.loads((folder / "results.json").read_text())["reference"]
        for name, folder in (("base", made), ("run", workdir))
    }
    assert {k: v for k, v in rows["run"].items() if k != "images_per_second"} == {
        k: v for k, v in rows["base"].items() if k != "images_per_second"
    }
    config.base, config.teacher.iterations = str(base), 31
    with pytest.raises(ValueError, match=r"teacher.iterations = 30, but here it is 31"):
        study_of(config)
    config.teacher.iterations, config.teacher.guidance = 30, 3.0  # the sampler's: free
    study_of(config)


@pytest.mark.long
def test_teacher_is_scored_on_real_and_on_the_students_states(smoke, tmp_path):
    workdir, _ = smoke
    flags = [f"--benchmark={workdir}", f"--out={tmp_path}", "--samples=50", "--steps=2"]
    found = run_command("jaxdistill.teacher_states", *flags, timeout=300)
    assert found.returncode == 0, found.stderr[-3000:]
    results = json.loads((tmp_path / "teacher_states.json").read_text())
    times = {
        source: [r["t"] for r in results["rows"] if r["source"] == source]
        for source in teacher_states.SOURCES
    }
    assert times["student"] == [1.0, 0.75] and times["renoised"] == times["renoised_fresh"] == [
        0.87,
        0.77,
    ]
    assert sorted(times["real"]) == sorted(
        {*times["student"], *times["renoised"]}
    )  # each has a real state to compare with
    # At t = T every state is noise, and these two are of different draws of it.
    at_T = [r["fd"] for r in results["rows"] if r["t"] == 1.0]
    assert len(at_T) == 2 and np.isfinite(at_T).all()
    assert (tmp_path / "teacher_states.png").stat().st_size > 5000
    found = run_command("jaxdistill.teacher_states", f"--benchmark={workdir}", "--student=nobody")
    assert found.returncode == 2 and "students/nobody/student/card.json" in found.stderr
    found = run_command(
        "jaxdistill.teacher_states", f"--benchmark={workdir}", "--student=step_distillation-0"
    )
    assert (
        found.returncode == 2
        and "'step_distillation', which has no shift" in found.stderr
        and "Traceback" not in found.stderr
    )


@pytest.mark.long
@pytest.mark.parametrize("size", ["ablation", "leakage"])
def test_every_variant_of_the_studies_can_be_built(size):
    config = config_of(size)
    tasks = study_of(config).tasks
    full = config_of().methods.imagine_flash
    for name in config.benchmark.methods:
        assert tasks[f"{name}-0"].recipe.sampler.times[0] == 1.0
        changes = {k for k, v in config.methods[name].items() if k != "method" and v != full.get(k)}
        assert size == "leakage" or len(changes) == (name != "full"), (name, changes)


@pytest.mark.long
@pytest.mark.parametrize("size", ["", "tuning", "updates", "digits", "flow", "flow_scenes"])
def test_every_size_can_be_opened(size):
    own = size in ("digits", "flow")
    config = config_file.get_config(size) if own else config_of(size)
    names = {name.rpartition("-")[0] for name in study_of(config).tasks}
    assert names == {"teacher", *config.benchmark.methods}


def test_a_list_without_names_is_refused():
    for config in (config_file.scenes.get_config(), config_of()):
        if "benchmark" in config:
            config.benchmark.methods = ()
        with pytest.raises(ValueError, match=r"config\.benchmark\.methods is empty"):
            benchmark.listed(config)


def test_a_method_that_needs_a_student_is_refused_before_any_work():
    config = config_of("smoke")
    config.benchmark.methods, config.student.steps = ("add", "endpoint"), (1,)
    with pytest.raises(ValueError, match="endpoint learns from a student"):
        study_of(config)


@pytest.mark.long
def test_processes_below_none_are_refused(tmp_path):
    flags = [
        "--config=configs/benchmark.py:smoke",
        "--config.data.source=fashion-mnist",
        f"--workdir={tmp_path / 'run'}",
        "--processes=-1",
    ]
    assert_one_error_line(run_command("jaxdistill.benchmark", *flags), "--processes=-1")
    assert not (tmp_path / "run").exists()


def test_methods_follow_the_teachers_guidance_and_steps_until_they_have_their_own():
    config = config_of("ablation")
    config.methods.lcm.guidance = 7.0
    assert config.teacher.guidance == 2.0
    config.teacher.guidance = 4.0
    settings = config.methods.to_dict()
    assert settings["lcm"]["guidance"] == 7.0
    following = ("imagine_flash", "tdm", "step_distillation", "full", "dmd2_faithful")
    assert {settings[name]["guidance"] for name in following} == {4.0}
    matched = settings["matched"]  # as much beyond 1, and a half more
    assert matched["flash"]["guidance"] == matched["matching"]["guidance"] == 5.5
    less, more = (settings[f"guidance_{name}"]["guidance"] for name in ("less", "more"))
    assert (less, more) == (2.5, 5.5)


@pytest.mark.long
def test_the_search_changes_a_competitors_rates_or_its_guidance_and_nothing_else():
    config, shipped = config_of("search"), config_of().methods
    study_of(config)
    assert config.eval.split == "validation" and len(config.benchmark.methods) == 3 * 6 + 2
    for name in config.benchmark.methods:
        found, method = config.methods[name].to_dict(), config.methods[name].method
        kind = name.rpartition("_")[2]
        factor = {"faster": 3.0, "slower": 1 / 3}.get(kind, 1.0)
        for key, value in shipped[method].to_dict().items():
            if key == "guidance" and kind == "guided":
                value = 2.5
            expected = value * factor if key.endswith("learning_rate") else value
            assert found[key] == expected, (name, key)


@pytest.mark.long
def test_matched_is_imagine_flash_then_tdm_then_one_step_with_one_sampler():
    config = config_of()
    flash, matched = (recipe_of(config, name) for name in ("imagine_flash", "matched"))
    np.testing.assert_allclose([stage.share for stage in matched.stages], [0.35, 0.35, 0.3])
    assert [tuple(stage.serves) for stage in matched.stages] == [(), (2, 3, 4), (1,)]
    assert [stage.networks for stage in matched.stages] == [
        ("student", "discriminator"),
        ("student", "fake"),
        ("student",),
    ]
    assert [stage.teacher for stage in matched.stages] == ["teacher", "teacher", "previous"]
    assert tuple(map(tuple, matched.sampler.times))[:2] == ((1.0,), (1.0, 0.5))
    nested = {"grid": "nested", "times": (1.0, 0.75, 0.5, 0.3)}
    assert dataclasses.replace(matched.sampler, **nested) == flash.sampler
    config.methods.matched.matching.grid = "nested"
    assert recipe_of(config, "matched").sampler == flash.sampler
    for share in (0.0, 0.7, -0.5):
        config.methods.matched.matching.share = share
        with pytest.raises(ValueError, match=r"matching\.share must be"):
            recipe_of(config, "matched")


def test_listed_grids_are_chosen_by_their_length_and_checked():
    block = {"grid": "listed", "times": [[1.0], [1.0, 0.5], [1.0, 0.75, 0.5]]}
    for n in (1, 2, 3):
        np.testing.assert_allclose(
            card.build_grid(block, n, 1000.0), 1000.0 * np.float32(block["times"][n - 1])
        )
    np.testing.assert_array_equal(card.build_grid(block, 4, 1.0), sampling.trailing_grid(4, 1.0))
    with pytest.raises(ValueError, match="must start at T"):
        card.build_grid({**block, "times": [[0.9]]}, 1, 1.0)


@pytest.mark.parametrize("kind", ["nested", "listed"])
def test_a_grid_of_a_discrete_schedule_holds_its_own_times_only(kind):
    times = [1.0, 0.6666, 0.3333]
    block = {"grid": kind, "times": times if kind == "nested" else [times]}
    np.testing.assert_array_equal(card.build_grid(block, 3, 1000.0), [1000.0, 667.0, 333.0])
    np.testing.assert_array_equal(
        card.build_grid(block, 7, 1000.0), sampling.trailing_grid(7, 1000.0, discrete=True)
    )
    with pytest.raises(ValueError, match="ends above 0"):
        card.build_grid({"grid": "nested", "times": [1.0, 0.0004]}, 2, 1000.0)


def test_added_losses_have_keys_of_their_own_and_the_weight():
    first, second = (
        lambda p, t, b, key, n=n: (p * jax.random.uniform(key), {n: p, "both": n})
        for n in ("a", "b")
    )
    value, metrics = added(first, second, weight=3.0)(2.0, None, {}, jax.random.key(0))
    keys = jax.random.split(jax.random.key(0))
    np.testing.assert_allclose(
        value, 2.0 * jax.random.uniform(keys[0]) + 6.0 * jax.random.uniform(keys[1]), rtol=1e-6
    )
    assert metrics == {"a": 2.0, "b": 2.0, "both": "a"}


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_a_share_for_pairs_that_leaves_nothing_is_refused(share):
    config = config_of()
    config.methods.direct.pairs_share = share
    with pytest.raises(ValueError, match="pairs_share must be above 0 and below 1"):
        recipe_of(config, "direct")


@pytest.mark.parametrize("scale", [0.25, 1.0, 4.0])
def test_times_of_a_scaled_snr_have_it(scale):
    cosine = schedule.cosine()
    times, even = config_file.at_snr(scale), sampling.trailing_grid(3, 1.0)
    assert times[0] == 1.0
    ratio = lambda t: float(cosine.alpha(float(t)) / cosine.sigma(float(t)))  # noqa: E731
    for t, before in zip(times[1:], even[1:], strict=True):
        np.testing.assert_allclose(ratio(t), scale * ratio(before), rtol=1e-5)


def test_picture_of_methods_has_a_row_for_each(tmp_path):
    score = {"fd": 1.0, "all_right": 0.5, "seed": 0}
    chart = {"kind": "methods", "scores": Scenes.charted}
    rows = [{"method": "teacher", "steps": n, "guidance": 2.0, **score} for n in (50, 1, 2)]
    rows += [
        {"method": m, "steps": n, "guidance": 1.0, **score}
        for m in ("imagine_flash", "lcm")
        for n in (1, 2)
    ]
    results = {"rows": rows, "reference": rows[0], "ceiling": {"all_right": 0.9}, "floor_fd": 0.2}
    sizes = []
    for methods in (("imagine_flash",), ("imagine_flash", "lcm")):
        pictures = {(m, 2): np.full((3, 32, 32, 3), 0.5, np.float32) for m in methods}
        captions = ["a red bag above a blue bag"] * 3
        report.methods_picture(tmp_path / "p.png", results, captions, pictures, chart)
        sizes.append(Image.open(tmp_path / "p.png").size)
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] > sizes[0][1] + 100


def test_chart_of_variants_shows_each_as_a_multiple_of_the_first():
    scores = (("full", 1.0), ("full", 3.0), ("forward", 4.0), ("forward", 4.0))
    rows = [{"method": m, "model": "student", "steps": 3, "fd": fd} for m, fd in scores]
    figure = plt.figure()
    teacher = {"method": "full", "model": "teacher", "steps": 50, "fd": 9.0}
    report.variants_chart(figure, {"rows": [teacher, *rows]}, {})
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["full", "forward"]
    points = [line.get_xdata() for line in axes.get_lines() if line.get_marker() == "o"]
    np.testing.assert_allclose(points, [[0.5, 1.5], [2.0, 2.0]])
    plt.close(figure)


def test_chart_by_an_axis_reads_the_number_in_the_name():
    scores = {
        "forward_snr_25": 3.0,
        "forward_snr_400": 5.0,
        "backward_snr_25": 2.0,
        "backward_snr_400": 1.0,
    }
    rows = [
        {"method": m, "model": "student", "steps": 3, "seed": 0, "fd": fd, "all_right": 0.5}
        for m, fd in scores.items()
    ]
    results = {"rows": rows, "reference": {"fd": 0.9, "all_right": 0.8, "steps": 50}}
    figure = plt.figure()
    chart = {"axis": "snr", "label": "SNR", "scores": Scenes.charted}
    report.axis_chart(figure, results, chart)
    curves = {line.get_label(): line.get_xydata().tolist() for line in figure.axes[0].get_lines()}
    assert curves["forward"] == [[25, 3.0], [400, 5.0]] and curves["backward"] == [
        [25, 2.0],
        [400, 1.0],
    ]
    plt.close(figure)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"matching.flash_weight": -1.0}, "matching.flash_weight must be at least 0, got -1"),
        ({"matching.counts": (2, 5)}, "matching.counts holds 5, but the listed times have no grid"),
        (
            {"matching.grid": "nested", "matching.counts": (2, 5)},
            "counts holds 5, but the nested times have no grid",
        ),
        (
            {"matching.grid": "leading"},
            "matching.grid = 'leading' is not known; choose one of 'listed', 'nested', 'trailing'",
        ),
        ({"one.steps": 5}, "one.steps holds 5, but the listed times have no grid"),
        ({"one.steps": 1}, "endpoint needs a grid of several steps"),
        ({"one.share": 0.7}, "their sum below 1 (the rest is Imagine Flash's), got 0.35 and 0.7"),
        ({"one.share": -0.1}, "one.share at least 0"),
    ],
)
def test_bad_settings_of_a_method_are_refused_before_any_work(change, said):
    config = config_of("smoke")
    config.methods.matched = config_of().methods.matched
    config.methods.matched.update_from_flattened_dict(change)
    config.benchmark.methods, config.student.steps = ("matched",), (1, 2, 3, 4)
    with pytest.raises(ValueError, match=r"config\.methods\.matched: ") as refused:
        study_of(config)
    assert said in str(refused.value)


def test_a_student_of_one_step_that_nobody_asked_for_is_refused():
    config = config_of()
    config.student.steps, config.benchmark.methods = (2, 3), ("matched",)
    with pytest.raises(
        ValueError,
        match=(
            r"matched: one.share = 0.3 trains a student of one step.* \(2, 3\) has no 1; set it"
            r" to 0"
        ),
    ):
        study_of(config)
    config.methods.matched.one.share = 0.0
    stages = recipe_of(config, "matched").stages
    assert [tuple(stage.serves) for stage in stages] == [(), (2, 3)]


@pytest.mark.parametrize(
    ("kind", "said"), [("pie", "config.benchmark.chart.kind = 'pie'"), ("axis", "CURVE_snr_100")]
)
def test_a_chart_that_cannot_be_drawn_is_refused_before_any_work(kind, said):
    config = config_of("smoke")
    config.benchmark.chart.update({"kind": kind, "axis": "snr"})
    with pytest.raises(ValueError, match=said):
        study_of(config)


def test_unknown_size_of_the_config_is_refused():
    with pytest.raises(ValueError, match="huge is not known"):
        config_file.get_config("huge")


class Known:
    """Data of which only the recogniser's hash is known."""

    recogniser = type("Recogniser", (), {"hash": "this"})()


def known(workdir, **wanted):
    """A benchmark whose scores could be made."""
    config = config_of("smoke")
    config.benchmark.update(wanted)
    listing = benchmark.listed(config)
    made = benchmark.Study(config, workdir, listing, loop.StopSignal())
    made.first.data = Known()
    return made


def store(study, rows, **other):
    """Its rows.json."""
    stored = {"protocol": {**study.first.protocol(), **other}, "rows": rows}
    study.rows_path.write_text(json.dumps(stored))


def row_of(method, seed, steps, guidance=1.0):
    model = "teacher" if method == "teacher" else "student"
    at = {"method": method, "seed": seed, "model": model, "steps": steps, "guidance": guidance}
    return {**at, "fd": 2.0}


def test_what_is_left_to_train_is_known_from_the_rows(tmp_path):
    made = known(tmp_path, methods=("imagine_flash", "direct"), seeds=(0, 1))
    unscored = lambda: {e.key for e in made.entries if made.missing(e)}  # noqa: E731
    four = {"imagine_flash-0", "imagine_flash-1", "direct-0", "direct-1"}
    assert unscored() == {"teacher-0", *four}
    store(made, [row_of("direct", 0, 1), row_of("direct", 0, 2), row_of("direct", 1, 1)])
    assert unscored() == {"teacher-0", *four} - {"direct-0"}  # seed 1 lacks two steps


def test_stored_rows_of_another_recogniser_or_method_are_never_mixed(tmp_path):
    made = known(tmp_path)
    store(made, [], recogniser_sha256="that")
    with pytest.raises(UserError, match="another protocol"):
        made.stored()
    store(made, [row_of("mine", 0, 1), row_of("imagine_flash", 0, 1)])
    assert [row["method"] for row in made.rows()] == ["imagine_flash"]
    assert set(made.stored()) == {"mine-0-student-1-1", "imagine_flash-0-student-1-1"}


@pytest.mark.long
def test_rows_stand_in_the_order_of_the_config_whoever_finished_first(tmp_path):
    made = known(tmp_path, methods=("tdm", "add"), seeds=(0, 1))
    made.first.config.eval.guidances = (5.0,)
    steps, guidance = made.config.teacher.steps, made.config.teacher.guidance
    ordered = [
        row_of("teacher", 0, steps, guidance),
        row_of("teacher", 0, steps, 5.0),
        row_of("teacher", 0, 1, guidance),
        *(row_of(m, seed, n) for m in ("tdm", "add") for seed in (0, 1) for n in (1, 2)),
    ]
    mixed = [ordered[i] for i in np.random.default_rng(0).permutation(len(ordered))]
    store(made, mixed)
    found = made.rows()
    assert {row.pop("ratio") for row in found} == {1.0}
    assert mixed != ordered == found


def test_means_are_over_seeds_and_tell_guidances_apart():
    """Rows of one step count at two guidances are no two seeds."""
    rows = [row_of("teacher", 0, 4, 1.0), row_of("teacher", 0, 4, 2.0)]
    rows += [{**row_of("tdm", seed, 1), "fd": fd} for seed, fd in ((0, 1.0), (1, 2.0))]
    rows = [{**row, "all_right": None} for row in rows]
    found = benchmark.averages(rows)
    assert [mean["seeds"] for mean in found] == [1, 1, 2]
    assert (found[0]["fd"], found[0]["fd_sd"]) == (2.0, None)
    assert (found[2]["fd"], found[2]["fd_sd"]) == (1.5, 0.7071)
    columns = {"fd": ("FD", "{:.2f}"), "all_right": ("all right", "{:.3f}")}
    lines = benchmark.table(found, "name", columns).splitlines()
    assert lines[0] == "| name | model | steps | FD | all right |"
    assert lines[2:] == [
        "| teacher | teacher, guidance 1 | 4 | 2.00 |  |",
        "| teacher | teacher, guidance 2 | 4 | 2.00 |  |",
        "| tdm | student | 1 | 1.50 ± 0.71 |  |",
    ]


def test_pairs_of_noise_target_and_caption_stay_together(tmp_path):
    numbers = np.arange(6)
    field = numbers.astype(np.float32).reshape(6, 1, 1, 1)
    writer = record_cache.Writer(tmp_path / "pairs", 6, block=6)
    writer.add({"noise": field, "target": -field, "number": numbers[:, None]})
    writer.close()
    task = object.__new__(Scenes)
    task._pairs, task.train_conds = record_cache.Cache(tmp_path / "pairs"), lambda rows: rows
    batches, others = (task.pair_batches(4, seed, np.arange(4)) for seed in (0, 1))
    for i in range(5):
        batch = batches(i)
        np.testing.assert_array_equal(batch["noise"].ravel(), batch["cond"])
        np.testing.assert_array_equal(batch["target"], -batch["noise"])
        assert len(batch["cond"]) == 4
    different = [(others(i)["cond"] != batches(i)["cond"]).any() for i in range(5)]
    assert any(different)  # seeds have orders of their own


def test_a_signal_ends_what_is_watched():
    stop, seen = loop.StopSignal(), []
    with pytest.raises(loop.Stopped, match="SIGTERM; the same command resumes it"):
        for step in watched("images", stop.heed)(range(0, 9, 3)):
            seen.append(step)
            stop.received = "SIGTERM" if step == 3 else None
    assert seen == [0, 3]


# ---------------------------------------------------------------------------- the budget


@pytest.fixture(scope="module")
def first():
    """A task of the smoke size; others share its programs."""
    return Scenes(config_of("smoke"))


@pytest.mark.costly
@pytest.mark.parametrize("method", [*METHODS, "matched", "direct", "dmd2_faithful"])
def test_methods_spend_the_same_budget(first, method):
    """In network calls: FLOPs of the losses and gradients over those of one call."""
    task = Scenes(changed(first.config, {"method.name": method}), share=first)
    distillation, student = task.distillation, task.config.student
    stages = range(len(task.recipe.stages))
    spent = sum(distillation.calls(i) * distillation.iterations(i) for i in stages)
    slack = sum(distillation.calls(i) for i in stages)
    if task.recipe.pairs:
        calls = 2 * task.recipe.pairs.steps / student.batch_size
        spent, slack = spent + calls * distillation.pair_count(guided=True), slack + calls
    assert student.budget - slack <= spent <= student.budget
