import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image
from test_image_metrics import write_clip

from jaxdistill import compare
from jaxdistill.interop import NOTHING, how_to_sample
from jaxdistill.interop.known_students import Described, Known
from jaxdistill.metrics import drift, image_metrics
from jaxdistill.metrics.image_metrics import Inception
from jaxdistill.run import report
from jaxdistill.tasks.text_to_image import pipeline

PROMPTS = ["a red cat", "two $dogs$ | one $cat", "a bird", "a house", "a tree by the sea", "snow"]


class Pipe:
    """Stands for a pipeline: image i is a function of its folder, (seed, start + i), its prompt and
    the settings.
    """

    guidance = 7.5
    text = SimpleNamespace(announce=lambda prompts: None)

    def __init__(self, folder, calls):
        self.folder, self.calls = folder, calls

    def __call__(
        self,
        prompts,
        *,
        steps=None,
        guidance=None,
        height=None,
        width=None,
        seed=0,
        start=0,
        batch_size=4,
        negative_prompt=None,
    ):
        self.calls.append(
            (self.folder.name, steps, guidance, seed, start, len(prompts), batch_size)
        )
        size = (height or 16, width or 24, 3)
        return np.stack(
            [
                picture(self.folder.name, steps, seed, start + i, prompt, size)
                for i, prompt in enumerate(prompts)
            ]
        )


def picture(name, steps, seed, i, prompt, size=(16, 24, 3)):
    word = f"{name} {steps} {seed} {i} {prompt}"
    rng = np.random.default_rng(int(hashlib.sha256(word.encode()).hexdigest()[:8], 16))
    return (rng.uniform(size=3) * 0.5 + rng.uniform(size=size) * 0.5).astype(np.float32)


def features(images):
    return np.stack(
        [
            np.r_[x.mean((0, 1)), x.std()] / 64
            for x in (np.asarray(image, np.float64) for image in images)
        ]
    ).astype(np.float32)


def texts(prompts):
    unit = np.stack([np.resize([len(p), ord(p[0]), ord(p[-1])], 4) for p in prompts]).astype(
        np.float32
    )
    return unit / np.linalg.norm(unit, axis=-1, keepdims=True), 1


def images(given):
    found = features(given)
    return found / np.linalg.norm(found, axis=-1, keepdims=True)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """Folders, files and stand-ins: a pipeline, four cheap features, a cheap CLIP.

    Returns (folder, calls).
    """
    calls = []
    for name in ("teacher", "student", "clip", "real"):
        (tmp_path / name).mkdir()
    for i in range(9):
        Image.fromarray(np.random.default_rng(i).integers(0, 99 + i * 9, (8, 8, 3), np.uint8)).save(
            tmp_path / "real" / f"{i}.png"
        )
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS) + "\n")
    (tmp_path / "inception.safetensors").write_bytes(b"")

    def load(folder, *, call, **options):
        if call["steps"] > 1000:
            raise ValueError(f"steps must be in 1..1000, got {call['steps']}")
        calls.append(("load", folder, options))
        return Pipe(tmp_path / folder, calls)

    monkeypatch.setattr(pipeline, "load", load)
    monkeypatch.setattr(
        image_metrics,
        "load_inception",
        lambda path, protocol, batch_size: Inception(features, {"protocol": protocol}),
    )
    monkeypatch.setattr(
        image_metrics,
        "load_clip",
        lambda folder, batch_size: image_metrics.CLIP(images, texts, {"weights": "w"}),
    )
    monkeypatch.setattr("jaxdistill.metrics.compare.TILE", 48)  # a smaller picture is sooner drawn
    monkeypatch.chdir(tmp_path)
    return tmp_path, calls


DRAW = [
    "--teacher=teacher",
    "--student=student",
    "--prompts=prompts.txt",
    "--out=out",
    "--batch_size=2",
]
SCORE = [
    "--inception=inception.safetensors",
    "--reference=real",
    "--clip=clip",
    "--kid_subset_size=5",
]


def run(*argv):
    compare.main(list(argv))
    out = next(a for a in argv if a.startswith("--out=")).removeprefix("--out=")
    return json.loads(Path(out, "scores.json").read_text())


def refused(capsys, *argv):
    with pytest.raises(SystemExit) as stop:
        compare.main(list(argv))
    lines = capsys.readouterr().err.strip().splitlines()
    assert (
        stop.value.code == 2
        and lines[-1].startswith("error: ")
        and "Traceback" not in "".join(lines)
    )
    return lines[-1]


# ------------------------------------------------------------------------------------------- images


def test_all_draw_the_same_prompts_from_the_same_seeds(place):
    folder, calls = place
    results = run(*DRAW, "--steps=1,3", "--teacher_steps=20", "--seed=7", "--guidance=5")
    drawn = [call for call in calls if call[0] != "load"]
    assert drawn == [
        ("student", 1, None, 7, 0, 6, 2),
        ("student", 3, None, 7, 0, 6, 2),
        ("teacher", 20, 5.0, 7, 0, 6, 2),
    ]
    assert [(row["model"], row["steps"], row["guidance"]) for row in results["rows"]] == [
        ("teacher", 20, 5.0), ("student", 1, 7.5), ("student", 3, 7.5)
    ]  # fmt: skip
    for name, steps in (("teacher", 20), ("student", 1), ("student", 3)):
        for i, prompt in enumerate(PROMPTS):
            found = np.asarray(
                Image.open(folder / "out" / "images" / f"{name}-{steps}" / f"{i:05d}.png")
            )
            np.testing.assert_array_equal(
                found, (picture(name, steps, 7, i, prompt) * 255).round().astype(np.uint8)
            )
    assert results["seed"] == 7 and "--seed=7" in results["command"] and "jax" in results["machine"]


def test_steps_and_size_are_what_the_student_was_made_for(place, capsys):
    folder, calls = place
    made_for = {"timesteps": {"2": [999, 499], "1": [999]}, "height": 8, "width": 32}
    (folder / "student" / pipeline.SETTINGS).write_text(json.dumps(made_for))
    run(*DRAW, "--teacher_steps=20")
    assert [call[:2] for call in calls if call[0] != "load"] == [
        ("student", 1),
        ("student", 2),
        ("teacher", 20),
    ]
    for name in ("student-1", "teacher-20"):
        size = Image.open(folder / "out" / "images" / name / "00000.png").size
        assert size == (32, 8)
    assert "warning" not in capsys.readouterr().err
    run(*DRAW, "--out=again", "--steps=3", "--height=16")
    assert "warning: student was made for 1 or 2 steps, not 3; 8x32 pixels" in (
        capsys.readouterr().err
    )


def test_a_known_student_has_its_kinds_sampler_and_steps(place, capsys):
    folder, calls = place
    run(*DRAW, "--as=dmd2")
    assert [(c[1], c[2]["known"]) for c in calls if c[0] == "load"] == [
        ("teacher", None), ("student", Known("dmd2", 4)), ("teacher", None)
    ]  # fmt: skip
    assert [call[:2] for call in calls if call[0] != "load"] == [("student", 4), ("teacher", 50)]
    said = json.loads((folder / "out" / "images" / "student-4" / "row.json").read_text())
    assert said["as"] == "dmd2"
    del calls[:]
    line = refused(capsys, *DRAW[:-2], "--out=other", "--as=lightning", "--steps=1,2")
    assert "each of its files is for one number of steps" in line and not calls


@pytest.mark.parametrize("teacher", [["--teacher=teacher"], []])
def test_a_lora_of_few_steps_beside_a_pair_would_be_in_the_teacher_too(
    teacher, told, place, capsys
):
    flags = ["--student=student", "--lora=few/x.safetensors", "--prompts=prompts.txt", "--out=out"]
    if teacher:
        assert "compare such a LoRA with --bases" in refused(capsys, *teacher, *flags)
        assert place[1] == []
        return
    run(*flags)
    assert [call[:2] for call in place[1] if call[0] != "load"] == [("student", 1), ("student", 3)]


TABLE = [
    "--bases=teacher,student",
    "--styles=none,fox.safetensors:0.8",
    "--lora=few/pytorch_lora_weights.safetensors:0.9",
    "--prompts=prompts.txt",
    "--out=out",
    "--images_per_prompt=2",
    "--teacher_steps=20",
]


@pytest.fixture
def told(place):
    """What is said beside the LoRA of few steps."""
    scheduler = {"_class_name": "DDIMScheduler", "timestep_spacing": "trailing"}
    told = how_to_sample.how_to_sample(how_to_sample.Student(scheduler, (1, 3), (16, 24)))
    (place[0] / "few").mkdir()
    (place[0] / "few" / "how_to_sample.json").write_text(json.dumps(told))
    return told


def test_a_table_draws_each_base_in_each_style_without_and_with_the_lora(place, told):
    folder, calls = place
    results = run(*TABLE)
    few, fox = "few/pytorch_lora_weights.safetensors:0.9", "fox.safetensors:0.8"
    loaded = [(c[1], c[2]["beside"].loras, c[2]["known"]) for c in calls if c[0] == "load"]
    described = Described(Path("few/how_to_sample.json"), told)
    wanted = [
        (base, (*style, *own), known)
        for base in ("teacher", "student")
        for style in ((), (fox,))
        for own, known in (((), None), ((few,), described))
    ]
    assert loaded == [*wanted[1:], *wanted]  # all but the first are read before anything is drawn
    step = "pytorch_lora_weights"
    names = ["teacher", "teacher + fox", "student", "student + fox"]
    assert [(row["model"], row["steps"]) for row in results["rows"]] == [
        (model, steps)
        for name in names
        for model, steps in ((name, 20), (f"{name} + {step}", 1), (f"{name} + {step}", 3))
    ]
    row = next(
        r for r in results["rows"] if (r["model"], r["steps"]) == (f"{names[1]} + {step}", 3)
    )
    pair = [
        np.stack(
            [np.asarray(Image.open(f), np.float32) / 255 for f in sorted(images.glob("*.png"))]
        )
        for images in (
            folder / "out/images/teacher-fox-pytorch_lora_weights-3",
            folder / "out/images/teacher-fox-20",
        )
    ]
    found = drift.of_images(*pair, np.repeat(np.arange(6), 2))
    expected = {name: found[name].value for name in ("contrast", "saturation", "diversity")}
    expected["distance"] = np.sqrt(((pair[0] - pair[1]) ** 2).mean())
    assert {k: row[k] for k in expected} == pytest.approx(expected, rel=1e-4)
    text = (folder / "out" / "scores.md").read_text()
    assert "RMS to teacher" in text and "| student + fox + pytorch_lora_weights | 3 |" in text
    again = run("--images=out/images", "--prompts=prompts.txt", "--images_per_prompt=2", "--out=b")
    assert {r["model"]: r.get("distance") for r in again["rows"] if r["steps"] == 3} == {
        r["model"]: r.get("distance") for r in results["rows"] if r["steps"] == 3
    }


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--styles=none,x.safetensors"], "--styles goes with --bases"),
        (["--bases=teacher"], "--bases needs one --lora=FILE, the LoRA of few steps, got 0"),
        (["--bases=teacher", "--lora=a,b"], "got 2; LoRAs of styles go to --styles"),
        (["--bases=teacher", "--lora=a", "--student=student"], "--bases replaces --teacher and"),
        (["--bases=teacher", "--lora=a.safetensors"], "say --as=NAME"),
        (["--bases=teacher", "--lora=a", "--as=tcd"], "--as=tcd is not known; choose one of lcm"),
        (["--bases=nowhere", "--lora=a"], "--bases: nowhere does not exist"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_refused(flags, words, place, capsys):
    assert words in refused(capsys, *flags, "--prompts=prompts.txt", "--out=out")
    assert place[1] == []


def test_rows_with_like_names_have_folders_of_their_own(place, told):
    folder, _ = place
    for name in ("a b", "a-b"):
        (folder / name).mkdir()
    run("--bases=a b,a-b", *TABLE[2:])
    names = sorted(path.name for path in (folder / "out" / "images").iterdir())
    assert [name for name in names if name.endswith(("20", "20-2"))] == ["a-b-20", "a-b-20-2"]


def test_large_sets_are_drawn_in_pieces_with_running_numbers(place):
    folder, calls = place
    run(
        "--student=student",
        "--prompts=prompts.txt",
        "--out=out",
        "--batch_size=1",
        "--images_per_prompt=3",
        "--steps=2",
        "--height=8",
        "--width=8",
    )
    assert [call[4:] for call in calls if call[0] != "load"] == [(0, 8, 1), (8, 8, 1), (16, 2, 1)]
    drawn = folder / "out" / "images" / "student-2"
    assert len(list(drawn.glob("*.png"))) == 18
    for i in (0, 1, 8, 17):
        wanted = (
            (picture("student", 2, 0, i, PROMPTS[i // 3], (8, 8, 3)) * 255).round().astype(np.uint8)
        )
        np.testing.assert_array_equal(np.asarray(Image.open(drawn / f"{i:05d}.png")), wanted)


def test_every_folder_is_read_before_the_first_image(place, monkeypatch, capsys):
    folder, calls = place
    good = pipeline.load

    def load(source, **options):
        if source == "teacher":
            raise pipeline.FolderError("teacher/unet is damaged")
        return good(source, **options)

    monkeypatch.setattr(pipeline, "load", load)
    assert "teacher/unet is damaged" in refused(capsys, *DRAW)
    assert calls == [] and not (folder / "out").exists()


def test_a_teachers_setting_that_cannot_be_is_refused_before_the_students_first_image(
    place, capsys
):
    assert "steps must be in 1..1000, got 2000" in refused(capsys, *DRAW, "--teacher_steps=2000")
    assert place[1] == []


def test_each_model_has_its_solver_and_both_are_computed_alike(place):
    folder, calls = place
    alike = {"tile": 8, "dtype": jnp.dtype("bfloat16"), "attention": "looped"}
    loaded = {**alike, "beside": NOTHING, "known": None}
    given = [
        "--tile=8",
        "--dtype=bfloat16",
        "--attention=looped",
        "--solver=dpm_solver_pp_2m",
        "--student_solver=ddim",
    ]
    results = run(*DRAW, "--steps=1", *given)
    # The teacher's folder is read before the first image and again to draw.
    assert [call[1:] for call in calls if call[0] == "load"] == [
        ("teacher", {"solver": "dpm_solver_pp_2m", **loaded}),
        ("student", {"solver": "ddim", "layout": None, **loaded}),
        ("teacher", {"solver": "dpm_solver_pp_2m", "layout": None, **loaded}),
    ]
    for row, solver in zip(results["rows"], ("dpm_solver_pp_2m", "ddim"), strict=True):
        said = json.loads(
            (folder / "out" / "images" / f"{row['model']}-{row['steps']}" / "row.json").read_text()
        )
        told = {**asdict(NOTHING), "tile": 8, "dtype": "bfloat16", "solver": solver}
        assert {name: said[name] for name in told} == {**told, "loras": []}
        assert row["protocol"]["drawn"] == said


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--solver=euler", ("--solver=euler is not known; choose one of ", "ddim")),
        ("--student_solver=euler", ("--student_solver=euler is not known; choose one of ", "ddim")),
        ("--dtype=float64", ("--dtype=float64 is not known; choose one of ", "bfloat16")),
        ("--attention=fast", ("--attention=fast is not known; choose one of ", "plain")),
        ("--tile=-1", ("--tile must be 0 (never) or at least 2, got -1",)),
        ("--tile=1", ("--tile must be 0 (never) or at least 2, got 1",)),
        ("--tile=big", ("--tile=big is not a whole number",)),
    ],
)
def test_bad_ways_of_computing_are_refused_before_anything_is_read(
    flag, words, place, monkeypatch, capsys
):
    monkeypatch.setattr(
        image_metrics, "load_inception", lambda *given, **options: pytest.fail("read")
    )
    line = refused(capsys, *DRAW, *SCORE, flag)
    assert all(word in line for word in words), line
    assert place[1] == [] and not (place[0] / "out").exists()


def test_a_setting_that_the_pipeline_refuses_leaves_no_folder(place, monkeypatch, capsys):
    def refuse(self, *arguments, **options):
        raise ValueError("height must be a positive multiple of 8, got 9")

    monkeypatch.setattr(Pipe, "__call__", refuse)
    assert "multiple of 8, got 9" in refused(capsys, *DRAW, "--height=9")
    assert not (place[0] / "out").exists()


# ------------------------------------------------------------------------------------------- scores


def test_scores_are_those_of_the_files(place):
    folder, _ = place
    results = run(*DRAW, *SCORE, "--protocol=pytorch-fid")
    real = features(image_metrics.image_files(folder / "real"))
    for row in results["rows"]:
        files = image_metrics.image_files(
            folder / "out" / "images" / f"{row['model']}-{row['steps']}"
        )
        fake = features(files)
        assert row["fid"] == pytest.approx(
            image_metrics.frechet_distance(
                *image_metrics.moments(fake), *image_metrics.moments(real)
            )
        )
        assert [row["kid"], row["kid_std"]] == pytest.approx(
            image_metrics.kid(fake, real, subset_size=5)
        )
        single = image_metrics.clip_scores(images(files), texts(PROMPTS)[0])
        assert row["clip"] == pytest.approx(single.mean()) and row["clip_error"] == pytest.approx(
            single.std(ddof=1) / np.sqrt(6)
        )
        assert 0 <= row["precision"] <= 1 and 0 <= row["recall"] <= 1
        protocol = row["protocol"]
        assert protocol["count"] == 6 and protocol["inception"] == {"protocol": "pytorch-fid"}
        assert protocol["reference"] == {
            "name": "real",
            "hash": image_metrics.image_files(folder / "real").hash(),
            "count": 9,
        }
        assert protocol["kid"]["subset_size"] == 5 and protocol["precision_recall"] == {
            "k": 3,
            "block": 6,
        }
        assert protocol["clip"]["weights"] == "w" and protocol["clip"]["cut_prompts"] == 1
        drawn = {
            "source": row["model"],
            "seed": 0,
            "steps": row["steps"],
            "guidance": 7.5,
            "batch_size": 2,
        }
        assert drawn.items() <= protocol["drawn"].items() and protocol["sizes"] == ["16 x 24"]
    lines = [
        json.loads(line) for line in (folder / "out" / "images.jsonl").read_text().splitlines()
    ]
    assert len(lines) == 24 and lines[1]["prompt"] == {"prompt": PROMPTS[1]}
    assert np.mean([line["clip"] for line in lines[:6]]) == pytest.approx(
        results["rows"][0]["clip"]
    )


def test_repeated_prompts_are_scored_against_their_own_text(place):
    folder, _ = place
    run(
        "--teacher=teacher",
        "--prompts=prompts.txt",
        "--out=out",
        "--clip=clip",
        "--images_per_prompt=2",
    )
    lines = [
        json.loads(line) for line in (folder / "out" / "images.jsonl").read_text().splitlines()
    ]
    repeated = [prompt for prompt in PROMPTS for _ in range(2)]
    wanted = image_metrics.clip_scores(
        images(image_metrics.image_files("out/images/teacher-50")), texts(repeated)[0]
    )
    np.testing.assert_allclose([line["clip"] for line in lines], wanted, rtol=1e-6)


def test_table_has_a_row_a_setting_and_the_protocol(place):
    folder, _ = place
    results = run(*DRAW, *SCORE)
    text = (folder / "out" / "scores.md").read_text()
    lines = text.splitlines()
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    metrics = [
        "FID ↓",
        "KID × 10³ ↓",
        "± KID × 10³",
        "precision ↑",
        "recall ↑",
        "CLIP score ↑",
        "± CLIP score",
    ]
    assert head == ["model", "steps", "guidance", "images", *metrics]
    for line, row in zip(lines[2:6], results["rows"], strict=True):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert cells[:4] == [row["model"], str(row["steps"]), "7.5", "6"]
        assert cells[4:6] == [f"{row['fid']:.2f}", f"{row['kid'] * 1e3:.3f}"]
    assert (
        "inception: protocol clean-fid" in text
        and f"hash {results['rows'][0]['protocol']['reference']['hash']}" in text
    )


def test_categories_have_scores_of_their_own(place):
    folder, _ = place
    (folder / "color.txt").write_text("a red cat\nsnow\n")
    items = [{"caption": "a bird"}, {"prompt": "a house", "category": "a|b", "more": 1}]
    (folder / "shape.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    flags = ["--teacher=teacher", "--prompts=color.txt,shape.jsonl", "--clip=clip"]
    found = run(*flags, "--out=out")["rows"][0]
    lines = [
        json.loads(line) for line in (folder / "out" / "images.jsonl").read_text().splitlines()
    ]
    assert [line["prompt"].get("category") for line in lines] == ["color", "color", "shape", "a|b"]
    assert lines[3]["prompt"]["more"] == 1
    assert {name: part["count"] for name, part in found["categories"].items()} == {
        "color": 2,
        "shape": 1,
        "a|b": 1,
    }
    assert found["categories"]["color"]["clip"] == pytest.approx(
        np.mean([line["clip"] for line in lines[:2]])
    )
    assert found["categories"]["shape"]["clip_error"] is None
    assert (
        "| model | steps | color (2) | shape (1) | a\\|b (1) |"
        in (folder / "out" / "scores.md").read_text()
    )
    # One file alone names no category.
    assert (
        "categories"
        not in run("--teacher=teacher", "--prompts=color.txt", "--clip=clip", "--out=one")["rows"][
            0
        ]
    )


def test_images_that_are_there_get_the_same_scores(place):
    first = run(*DRAW, *SCORE, "--steps=1,10,2")
    again = run("--images=out/images", "--prompts=prompts.txt", "--out=again", *SCORE)
    assert [(row["model"], row["steps"]) for row in again["rows"]] == [
        ("teacher", 50),
        ("student", 1),
        ("student", 2),
        ("student", 10),
    ]
    assert sorted(again["rows"], key=lambda r: r["fid"]) == sorted(
        first["rows"], key=lambda r: r["fid"]
    )
    alone = run("--images=out/images/student-2", "--prompts=prompts.txt", "--out=alone", *SCORE)
    assert [row["fid"] for row in alone["rows"]] == [again["rows"][2]["fid"]] and alone[
        "seed"
    ] is None


def test_images_of_others_are_a_row_by_the_folders_name(place):
    folder, _ = place
    (folder / "prompts.txt").write_text("\n".join("abcdefghi"))
    found = run("--images=real", "--prompts=prompts.txt", "--out=out", "--clip=clip")["rows"]
    assert [(row["model"], row["steps"], row["guidance"], row["count"]) for row in found] == [
        ("real", None, None, 9)
    ]


def test_images_that_do_not_fit_the_prompts_are_refused(place, capsys):
    folder, _ = place
    assert "real holds 9 images for 6 prompts" in refused(
        capsys, "--images=real", "--prompts=prompts.txt", "--out=again"
    )
    run("--student=student", "--prompts=prompts.txt", "--out=out", "--steps=1")
    (folder / "prompts.txt").write_text("\n".join(["another", *PROMPTS[1:]]))
    assert "student-1 was drawn from other prompts" in refused(
        capsys, "--images=out/images", "--prompts=prompts.txt", "--out=again"
    )


@pytest.mark.long
def test_the_real_clip_is_wired_in(place, monkeypatch):
    monkeypatch.undo()
    folder, _ = place
    monkeypatch.chdir(folder)
    write_clip(folder / "tiny")
    (folder / "prompts.txt").write_text("\n".join("abcdefghi"))
    found = run(
        "--images=real", "--prompts=prompts.txt", "--out=out", "--clip=tiny", "--batch_size=4"
    )["rows"][0]
    clip = image_metrics.load_clip(folder / "tiny", batch_size=9)
    wanted = image_metrics.clip_scores(
        clip.images(image_metrics.image_files("real")), clip.texts([*"abcdefghi"])[0]
    )
    assert (
        found["clip"] == pytest.approx(wanted.mean(), rel=1e-4)
        and found["protocol"]["clip"]["name"] == "tiny"
    )


# ---------------------------------------------------------------------------------------- reference


def test_reference_is_kept_and_used_again(place, capsys):
    first = run(*DRAW, *SCORE, "--save_reference=stats.npz")
    again = run(
        "--images=out/images",
        "--prompts=prompts.txt",
        "--out=again",
        *SCORE,
        "--reference=stats.npz",
    )
    assert again["rows"] == first["rows"]
    compare.main(
        ["--inception=inception.safetensors", "--reference=real", "--save_reference=alone.npz"]
    )
    assert "alone.npz: 9 images" in capsys.readouterr().out
    assert (
        image_metrics.open_reference(
            "alone.npz", Inception(features, {"protocol": "clean-fid"})
        ).count
        == 9
    )
    other = [
        "--images=out/images",
        "--prompts=prompts.txt",
        "--out=third",
        *SCORE,
        "--reference=stats.npz",
        "--protocol=pytorch-fid",
    ]
    assert "another protocol: protocol is 'clean-fid' there and 'pytorch-fid' here" in refused(
        capsys, *other
    )


def test_statistics_alone_give_fid_alone_and_say_so(place, capsys):
    extractor = Inception(features, {"protocol": "clean-fid"})
    image_metrics.save_reference(
        "stats.npz", image_metrics.open_reference("real", extractor), features=False
    )
    flags = [*DRAW, "--inception=inception.safetensors", "--reference=stats.npz"]
    found = run(*flags)["rows"][0]
    assert "fid" in found and "kid" not in found and "precision" not in found
    assert (
        "stats.npz holds statistics only: KID, precision and recall are left out"
        in capsys.readouterr().err
    )
    assert "kid needs the reference's features" in refused(
        capsys, *flags, "--out=other", "--metrics=fid,kid"
    )


def test_too_few_prompts_are_refused_before_anything_is_drawn(place, capsys):
    folder, calls = place
    (folder / "prompts.txt").write_text("a\nb\nc\nd\n")
    assert "fid needs at least 5 images, but there are 4; add images or ask for others" in refused(
        capsys, *DRAW, *SCORE
    )
    assert "kid needs at least 5 images, but there are 4" in refused(
        capsys, *DRAW, *SCORE, "--metrics=kid"
    )
    assert calls == [] and not (folder / "out").exists()
    found = run(*DRAW, *SCORE, "--metrics=precision_recall,clip")["rows"][0]
    assert "precision" in found and "clip" in found and "fid" not in found and "kid" not in found


def test_an_unreadable_reference_is_refused_before_anything_is_drawn(place, capsys):
    folder, calls = place
    (folder / "real" / "4.png").write_bytes(b"no image")
    assert "4.png cannot be read" in refused(capsys, *DRAW, *SCORE)
    assert calls == []


# --------------------------------------------------------------------------------------------- page


def test_page_has_a_row_a_model_and_spread_prompts_as_columns(place, monkeypatch):
    folder, _ = place
    grids = []
    plain = report.image_grid
    monkeypatch.setattr("jaxdistill.metrics.compare.TILE", 256)
    monkeypatch.setattr(
        report, "image_grid", lambda rows, **options: grids.append(rows) or plain(rows, **options)
    )
    run(*DRAW, "--page_prompts=3", "--steps=1,2")
    (grid,) = grids
    assert grid.shape == (3, 3, 170, 256, 3)  # 16 x 24 grown to a longer side of 256
    for row, name in enumerate(("teacher-50", "student-1", "student-2")):
        for column, i in enumerate((0, 2, 5)):
            wanted = (
                np.asarray(
                    Image.open(folder / "out" / "images" / name / f"{i:05d}.png"), np.float32
                )
                / 255
            )
            np.testing.assert_allclose(
                grid[row, column, ::170, ::255], wanted[[0], [[0, -1]]].reshape(1, 2, 3), atol=1e-6
            )
    assert min(Image.open(folder / "out" / "page.png").size) > 500
    assert "No scores: give --inception" in (folder / "out" / "scores.md").read_text()


def test_captions_are_whole_and_no_formulas(place, monkeypatch):
    shown = []
    save = Figure.savefig

    def keep(figure, *arguments, **options):
        axes = figure.axes[0]
        shown.append(
            (
                [t.get_text() for t in axes.get_xticklabels()],
                [t.get_text() for t in axes.get_yticklabels()],
            )
        )
        assert not axes.get_xticklabels()[0].get_parse_math()
        return save(figure, *arguments, **options)

    monkeypatch.setattr(Figure, "savefig", keep)
    run(*DRAW)
    assert [text.replace("\n", " ") for text in shown[0][0]] == PROMPTS
    assert shown[0][1] == [
        "teacher, 50 steps",
        "student, 1 step",
        "student, 2 steps",
        "student, 3 steps",
    ]


# -------------------------------------------------------------------------------------------- flags


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (
            ["--out=out", "--prompts=prompts.txt"],
            "nothing to compare; give --teacher, --student or --images",
        ),
        (["--teacher=teacher", "--out=out"], "--prompts is missing"),
        (["--teacher=teacher", "--prompts=prompts.txt"], "--out is missing"),
        ([*DRAW, "--images=real"], "--images replaces --teacher, --student and --bases"),
        ([*DRAW, "--teacher=none"], "--teacher: none does not exist"),
        ([*DRAW, "--prompts=none.txt"], "none.txt"),
        ([*DRAW, "--out=real"], "--out=real exists and is not empty; choose a new folder"),
        ([*DRAW, "--out=prompts.txt"], "--out=prompts.txt exists"),
        ([*DRAW, "--steps=0,1"], "--steps=0,1 is not a list of whole numbers such as 1,2,3"),
        ([*DRAW, "--steps=a"], "--steps=a is not a list"),
        ([*DRAW, "--teacher_steps=0"], "--teacher_steps must be at least 1, got 0"),
        ([*DRAW, "--batch_size=0"], "--batch_size must be at least 1, got 0"),
        ([*DRAW, "--seed=-1"], "--seed must be in 0..4294967295, got -1"),
        (
            [*DRAW, "--inception=inception.safetensors"],
            "--inception and --reference need each other",
        ),
        ([*DRAW, "--reference=real"], "--inception and --reference need each other"),
        ([*DRAW, "--save_reference=a.npz"], "--save_reference needs --inception and --reference"),
        ([*DRAW, *SCORE, "--save_reference=a"], "--save_reference=a must end in .npz"),
        ([*DRAW, *SCORE, "--reference=none"], "none is not a folder"),
        ([*DRAW, *SCORE, "--protocol=fid"], "--protocol=fid is not known; choose one of clean-fid"),
        ([*DRAW, "--metrics=fid"], "--metrics: fid needs --inception and --reference"),
        ([*DRAW, "--metrics=clip"], "--metrics: clip needs --clip"),
        (
            [*DRAW, *SCORE, "--metrics=is"],
            "--metrics: 'is' is not known; choose one of fid, kid, precision_recall, clip",
        ),
        (["--images=none", "--prompts=prompts.txt", "--out=out"], "none is not a folder"),
    ],
)
def test_flags_that_cannot_be_are_refused_at_once(place, capsys, argv, message):
    folder, calls = place
    assert message in refused(capsys, *argv)
    assert calls == [] and not (folder / "out").exists()
