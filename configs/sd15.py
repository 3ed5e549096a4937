"""Stable Diffusion 1.x, 512x512, to one, two and three steps.

    python -m jaxdistill.main --config=configs/sd15.py --workdir=runs/sd15 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

FOLDER is a pipeline as diffusers' `save_pretrained` writes it; no images are needed. Leaves
runs/sd15/diffusers (a pipeline for diffusers) and runs/sd15/student (Orbax). Not run at full size
yet: the iterations and rates below are a start, not a result. `configs/sd15.py:one` with
--config.teacher.folder=runs/sd15/diffusers trains a student of one step alone on where that one's
end.
"""

from ml_collections import ConfigDict

from jaxdistill import variants


def get_config(name: str = "") -> ConfigDict:
    """The config, or its variant `name`; every key can be set as --config.key=value."""
    config = ConfigDict()
    config.task = "text_to_image"
    config.seed = 0

    config.teacher = ConfigDict(
        {
            "folder": "",  # the pipeline
            "architecture": "",  # instead of a folder, to plan a run (jaxdistill.aot): sd15 | sd21 | sdxl
            "solver": "",  # ddim | dpm_solver_pp_2m | ...: of the teacher's own images instead of its folder's scheduler
            "steps": 50,  # of the teacher's own images: in the health lines, and for the discriminator
            "guidance": 7.5,
        }
    )
    config.data = ConfigDict(
        {
            "prompts": "",  # .txt (one a line), .jsonl ("prompt" or "caption"), or tfds:name:split[:key]
            "images": "",  # for adversarial.reals = "data": folder of images with metadata.jsonl, or tfds:name:split[:key of the captions]
            "tfds_dir": "",  # data_dir of tensorflow-datasets; ~/tensorflow_datasets by default
            "cache": "",  # folder of the encoded prompts; default: the workdir's
            "height": 0,  # pixels; 0: the checkpoint's
            "width": 0,
        }
    )
    config.compute = ConfigDict(
        {
            "dtype": "bfloat16",  # of the networks; norms and the student's parameters stay float32
            "teacher_dtype": "bfloat16",  # of the teacher's parameters
            "attention": "auto",  # auto (looped on CPU, else plain) | plain | looped | chunked, flash (TPU)
            "remat": "full",  # none | dots | full: what is computed again in the backward pass
            "compilation_cache": "",  # folder or gs://bucket/path of compiled programs: a restart need not compile again
            "scan": False,  # loop over the transformer blocks of a level: compiles sooner where there are many (XL)
        }
    )
    config.mesh = ConfigDict(
        {
            "data": -1,  # devices by which the batch is divided; -1: all that the others leave
            "fsdp": 1,  # by which the batch and the parameters, averages and optimizer state are divided
            "tensor": 1,  # by which layers are divided
            "smallest": 65536,  # arrays of fewer elements are copied
            "rules": (),  # before `jaxdistill.partition.RULES`: (expression of the path, axes of the last dimensions)
        }
    )
    config.student = ConfigDict(
        {
            "iterations": 10_000,
            "health_every": 500,
            "keep_best": "",  # a health number, such as distance_3: export the averages of the step where it was lowest
            "batch_size": 48,
            "accumulate": 1,  # micro-batches a step: one is in memory at a time
            "learning_rate": 1e-5,
            "warmup": 200,
            "decay_to": 0.02,  # share of the rate at which its cosine ends
            "weight_decay": 0.0,
            "adam_b2": 0.999,
            "ema_decay": 0.999,
            "steps": (1, 2, 3),
            "lora_rank": 0,  # above 0: train low-rank updates of lora_targets only
            # Regular expressions of the ends of layer names.
            "lora_targets": ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"),
        }
    )
    config.method = ConfigDict(
        {
            "name": "imagine_flash",  # imagine_flash | endpoint: ours, one step from another student's several (:one)
            "backward": True,
            "whole_trajectory": True,  # False: one random state an example
            "noise_correction": True,
            "srl": True,
            "noise": "trajectory",  # trajectory | initial | fresh
            "shift": "table",  # none | power | linear | table
            "weight_power": 0.0,
            "shortcut": 0.0,  # ours: weight of the first state's distance to the end of its trajectory
            "teacher_steps": 2,  # k
            "teacher_solver": "ddim",  # ddim | dpm_solver_pp_2m
            "guidance": 7.5,  # scale of the teacher that is distilled
        }
    )
    config.shifts = ConfigDict(
        {
            "power": {"strength": 0.3, "power": 3.0},
            "linear": {"low": 0.1, "high": 0.9},
            "table": {"times": (0.333, 0.5, 0.667, 1.0), "values": (0.45, 0.6, 0.7, 0.85)},
        }
    )
    config.adversarial = ConfigDict(
        {
            "weight": 0.05,  # 0 switches it off
            "loss": "hinge",
            "learning_rate": 1e-4,
            "width": 256,
            "states": "one",  # of a row's states, which the discriminator judges: one at random | all
            "low": 0.0,
            "high": 1.0,
            "reals": "teacher",  # teacher: a pool of its images is drawn first; data: config.data.images
            "pool": 2000,
        }
    )
    config.export = ConfigDict({"dtype": "float16"})  # of the UNet in diffusers/
    config.log = ConfigDict({"every": 10, "checkpoint_every": 500, "health_prompts": 4})
    config.log.batch_size = 4  # images a device that are drawn at once: the health lines', and the teacher's for the discriminator
    config.log.checkpoints = (
        ""  # folder of the checkpoints, default: the workdir's; may be gs://bucket/path
    )
    config.log.profile = 0  # steps of which a trace is written for TensorBoard
    return variants.chosen(config, name, file="sd15")
