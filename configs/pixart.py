"""PixArt-α or -Σ, 1024x1024, to one, two and three steps.

    python -m jaxdistill.main --config=configs/pixart.py --workdir=runs/pixart \
        --config.teacher.folder=FOLDER --config.data.prompts=prompts.txt

As configs/sd15.py. All 0.6 billion weights are trained; --config.student.lora_rank=64 trains
low-rank updates. Of α of 512 pixels give --config.data.height=512 --config.data.width=512. The
betas are linear: γ, which was chosen for Stable Diffusion's, is carried over by equal log-SNR. Not
run at full size yet.
"""

from ml_collections import ConfigDict

from configs import base, sd15


def get_config(name: str = "") -> ConfigDict:
    """The config; `name` is a method's, or "one"."""
    return base.chosen(whole(), name, file="pixart")


def whole() -> ConfigDict:
    """The 1.x config with PixArt's guidance and size, and a loop over the blocks."""
    config = sd15.whole()
    config.teacher.update({"guidance": 4.5, "steps": 20})
    config.compute.scan = True
    for flash in (config.methods.imagine_flash, config.methods.matched.flash):
        flash.reference = "scaled_linear"
    config.student.batch_size = 24
    config.data.update({"height": 1024, "width": 1024})
    return config
