"""Stable Diffusion 1.x, 512x512, to one, two and three steps.

    python -m jaxdistill.main --config=configs/sd15.py --workdir=runs/sd15 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

FOLDER is a pipeline as diffusers' `save_pretrained` writes it; no images are needed. Leaves
runs/sd15/diffusers (a pipeline for diffusers) and runs/sd15/student (Orbax). Any method by name:
`configs/sd15.py:matched`, `:dmd2`, ...; `configs/sd15.py:one` with
--config.teacher.folder=runs/sd15/diffusers trains a student of one step alone on where that one's
end. Not run at full size yet: the iterations and rates below are a start, not a result.
"""

from ml_collections import ConfigDict

from configs import base

RATES = {
    "imagine_flash": 1e-5,
    "endpoint": 1e-5,
    "direct": 1e-5,
    "step_distillation": 1e-5,
    "lcm": 1e-5,
    "add": 1e-5,
    "lightning": 1e-5,
    "dmd2": 2e-6,
    "tdm": 2e-6,
}
"""Of the students, all weights. LoRA takes ten times as much."""


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is a method's, or "one"."""
    return base.chosen(whole(), name, file="sd15")


def whole() -> ConfigDict:
    """The config with the settings of all methods."""
    config = base.base("text_to_image", guidance=7.5)
    config.teacher.update(
        {
            "folder": "",  # the pipeline, or a single .safetensors file
            # Of a file: a pipeline folder of its kind, instead of the published configs.
            "like": "",
            "vae": "",  # a file or folder, instead of the checkpoint's
            "text_encoder": "",  # the same; of XL A,B
            "prediction": "",  # of a file, eps | v | v_ztsnr: instead of what its marks say
            "ema": True,  # of a file with both: the averaged weights of its UNet
            "clip_skip": 0,  # text layers left out, as in diffusers; 1 is A1111's clip skip 2
            "loras": (),  # added to it before anything: "style.safetensors:0.8", ...
            # Instead, to plan a run (jaxdistill.aot): sd15 | sd21 | sd21-base | sdxl.
            "architecture": "",
            "solver": "",  # ddim | dpm_solver_pp_2m: of its images, instead of its scheduler
            "steps": 50,  # of its images: in the health lines, and for the discriminator
        }
    )
    config.data.update(
        {
            # .txt (one a line), .jsonl, .csv, .parquet ("prompt", "caption" or "text"), tars, or
            # tfds:name:split[:key].
            "prompts": "",
            # For adversarial.reals = "data": folder of images with metadata.jsonl or a .txt each,
            # "data/{000..099}.tar" (WebDataset), or tfds:name:split[:key of the captions].
            "images": "",
            "tfds_dir": "",  # data_dir of tensorflow-datasets; ~/tensorflow_datasets by default
            "cache": "",  # folder of prompts, latents and pairs; default: the workdir's
            "height": 0,  # pixels; 0: the checkpoint's
            "width": 0,
        }
    )
    config.compute.update(
        {
            "dtype": "bfloat16",  # of the networks; norms and the student's parameters are float32
            "teacher_dtype": "bfloat16",  # of the teacher's parameters
            # auto (CPU: looped, GPU: cuDNN or chunked, TPU: plain) | plain | looped | chunked |
            # flash (TPU) | cudnn (GPU).
            "attention": "auto",
            "remat": "full",  # none | dots | full: what is computed again in the backward pass
            "scan": False,  # loop over the blocks of a level: compiles sooner (XL)
        }
    )
    config.student.update(
        {
            "iterations": 10_000,
            "health_every": 500,
            "batch_size": 48,
            "warmup": 200,
            "ema_decay": 0.999,
            "lora_targets": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        }
    )
    rates(config, 1.0)
    table = {"times": (0.333, 0.5, 0.667, 1.0), "values": (0.45, 0.6, 0.7, 0.85)}
    for flash in (config.methods.imagine_flash, config.methods.matched.flash):
        flash.shifts.table = ConfigDict(table)
    config.methods.matched.one.steps = 3
    # As a plain call of stock programs takes the first step; with True they need sigmas for it
    # (docs/your_ui.md).
    flashes = (config.methods.imagine_flash, config.methods.matched.flash)
    for block in (*flashes, config.methods.endpoint, config.methods.direct):
        block.noise_correction = False
    config.adversarial.update(
        {"learning_rate": 1e-4, "width": 256, "states": "one", "reals": "teacher"}
    )
    config.export = ConfigDict(
        {
            "dtype": "float16",  # of the UNet in diffusers/ and in the single file
            "single_file": "auto",  # student.safetensors: always | never | auto: of a single file
        }
    )
    config.log.update(
        {
            "every": 10,
            "health_prompts": 4,
            "batch_size": 4,  # images a device drawn at once: health lines and the teacher's
            "checkpoints": "",  # their folder, default: the workdir's; may be gs://bucket/path
            "profile": 0,  # steps of which a trace is written for TensorBoard
        }
    )
    return config


def flow(config: ConfigDict) -> None:
    """γ and the k teacher steps of a flow-matching teacher: at the noise levels that they have on
    the 1.x schedule, which was the best on scenes (docs/results/flow_scenes.md).
    """
    for flash in (config.methods.imagine_flash, config.methods.matched.flash):
        flash.reference = "scaled_linear"


def rates(config: ConfigDict, factor: float) -> None:
    """Learning rates of all methods."""
    for name, rate in RATES.items():
        block = config.methods[name]
        block.learning_rate = factor * rate
        if "fake_learning_rate" in block:
            block.fake_learning_rate = factor * 1e-5
    config.methods.lightning.adversarial_learning_rate = factor * 1e-6
    matched = config.methods.matched
    matched.flash.learning_rate = factor * 1e-5
    matched.matching.update({"learning_rate": factor * 2e-6, "fake_learning_rate": factor * 1e-5})
    matched.one.learning_rate = factor * 5e-6
