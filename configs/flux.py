"""FLUX.1 dev, 1024x1024, to one, two and three steps.

    python -m jaxdistill.main --config=configs/flux.py --workdir=runs/flux \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

As configs/sdxl.py: low-rank updates over one copy of the teacher's twelve billion weights, its
blocks as a loop. The guidance scale is an input of dev's network: teacher and student both get
config.teacher.guidance, and the student keeps the input, of that one scale. schnell has no such
input. γ is carried over from the 1.x schedule (`sd15.flow`). Stock
diffusers draws the student by a plain call: its scheduler has the shift of the size that it was
trained for. Not run at full size yet.
"""

from ml_collections import ConfigDict

from configs import base, sd15, sdxl

TARGETS = (
    r"attn\.to_[qkv]",
    r"attn\.to_out\.0",
    r"attn\.add_[qkv]_proj",
    r"attn\.to_add_out",
    r"ff(_context)?\.net\.0\.proj",
    r"ff(_context)?\.net\.2",
    "proj_mlp",
    r"single_transformer_blocks[^/]*\.proj_out",
)
"""The layers of all blocks."""


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is a method's, or "one"."""
    return base.chosen(whole(), name, file="flux")


def whole() -> ConfigDict:
    """XL's config with the pipeline's guidance and steps, and the network's layers."""
    config = sdxl.whole()
    config.teacher.update({"guidance": 3.5, "steps": 28})
    config.student.update({"batch_size": 8, "lora_targets": TARGETS})
    sd15.flow(config)
    config.export.dtype = "bfloat16"
    return config
