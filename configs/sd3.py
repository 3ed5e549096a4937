"""Stable Diffusion 3 and 3.5, 1024x1024, to one, two and three steps.

    python -m jaxdistill.main --config=configs/sd3.py --workdir=runs/sd3 \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

As configs/sdxl.py: low-rank updates over one copy of the teacher, its blocks as a loop. FOLDER is a
StableDiffusion3Pipeline, with T5 or without. γ is carried over from the 1.x schedule (`sd15.flow`).
Stock diffusers draws the student in N steps when it is called with sigmas=linspace(1, 1/N, N). Not
run at full size yet.
"""

from ml_collections import ConfigDict

from configs import base, sd15, sdxl

TARGETS = (
    r"attn2?\.to_[qkv]",
    r"attn2?\.to_out\.0",
    r"attn\.add_[qkv]_proj",
    r"attn\.to_add_out",
    r"ff(_context)?\.net\.0\.proj",
    r"ff(_context)?\.net\.2",
)
"""The layers of the blocks, of the image and of the text."""


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is a method's, or "one"."""
    return base.chosen(whole(), name, file="sd3")


def whole() -> ConfigDict:
    """XL's config with the pipeline's guidance and steps, and the network's layers."""
    config = sdxl.whole()
    config.teacher.update({"guidance": 7.0, "steps": 28})
    config.student.lora_targets = TARGETS
    sd15.flow(config)
    config.export.dtype = "bfloat16"
    return config
