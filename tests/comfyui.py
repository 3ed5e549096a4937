"""What ComfyUI's nodes declare and do, stated independently: inputs and outputs by type, and the
sampling nodes in numpy. Facts of `nodes.py`, `comfy_extras/nodes_custom_sampler.py`,
`comfy_extras/nodes_model_advanced.py`, `comfy/model_sampling.py` and `comfy/k_diffusion`.
"""

import itertools
import re

import numpy as np

NODES = {
    "CheckpointLoaderSimple": ({"ckpt_name": str}, ("MODEL", "CLIP", "VAE")),
    "LoraLoaderModelOnly": (
        {"model": "MODEL", "lora_name": str, "strength_model": float},
        ("MODEL",),
    ),
    "LoraLoader": (
        {
            "model": "MODEL",
            "clip": "CLIP",
            "lora_name": str,
            "strength_model": float,
            "strength_clip": float,
        },
        ("MODEL", "CLIP"),
    ),
    "ModelSamplingDiscrete": ({"model": "MODEL", "sampling": str, "zsnr": bool}, ("MODEL",)),
    "CLIPSetLastLayer": ({"clip": "CLIP", "stop_at_clip_layer": int}, ("CLIP",)),
    "CLIPTextEncode": ({"text": str, "clip": "CLIP"}, ("CONDITIONING",)),
    "EmptyLatentImage": ({"width": int, "height": int, "batch_size": int}, ("LATENT",)),
    "RandomNoise": ({"noise_seed": int}, ("NOISE",)),
    "BasicGuider": ({"model": "MODEL", "conditioning": "CONDITIONING"}, ("GUIDER",)),
    "KSamplerSelect": ({"sampler_name": str}, ("SAMPLER",)),
    "ManualSigmas": ({"sigmas": str}, ("SIGMAS",)),
    "SamplerCustomAdvanced": (
        {
            "noise": "NOISE",
            "guider": "GUIDER",
            "sampler": "SAMPLER",
            "sigmas": "SIGMAS",
            "latent_image": "LATENT",
        },
        ("LATENT", "LATENT"),
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ("IMAGE",)),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": str}, ()),
}
"""{class: ({required input: its type}, types of the outputs)}."""
CHOICES = {"sampling": ("eps", "v_prediction", "lcm"), "sampler_name": ("euler", "lcm")}


def check(workflow):
    """Every node is one of NODES with all of its inputs, and every link has the right type."""
    for name, node in workflow.items():
        inputs, _ = NODES[node["class_type"]]
        assert set(node["inputs"]) == set(inputs), name
        for key, wanted in inputs.items():
            value = node["inputs"][key]
            if isinstance(wanted, str):
                source, index = value
                assert NODES[workflow[source]["class_type"]][1][index] == wanted, (name, key)
            else:
                assert type(value) is wanted, (name, key)
            assert key not in CHOICES or value in CHOICES[key]


def table(*, zsnr):
    """The sigmas [1000] of its model sampling, float32."""
    betas = np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    bar = np.cumprod(1 - betas)
    sigmas = np.sqrt((1 - bar) / bar).astype(np.float32).astype(np.float64)
    if zsnr:
        root = np.sqrt(1 / (sigmas**2 + 1))
        root = (root - root[-1]) * root[0] / (root[0] - root[-1])
        bar = np.append(root[:-1] ** 2, 4.8973451890853435e-08)
        sigmas = np.sqrt((1 - bar) / bar)
    return sigmas


def manual_sigmas(text):
    """What the node reads in its string."""
    return [float(found) for found in re.findall(r"[-+]?(?:\d*\.*\d+)", text)]


def run(workflow, network, noise, fresh):
    """The latents of the workflow's image: `network` (x, timestep) -> output stands for the model,
    `noise` for what its seed gives, and `fresh` yields the later draws of the sampler lcm.
    """
    kinds = {}
    for node in workflow.values():
        kinds.setdefault(node["class_type"], []).append(node["inputs"])
    sampling = kinds.get("ModelSamplingDiscrete", [{"sampling": "eps", "zsnr": False}])[0]
    sigmas_of = table(zsnr=sampling["zsnr"])

    def denoised(x, sigma):
        scale = np.sqrt(sigma**2 + 1)
        t = np.abs(np.log(sigma) - np.log(sigmas_of)).argmin()
        output = network(x / scale, t)
        if sampling["sampling"] == "v_prediction":
            return x / scale**2 - output * sigma / scale
        return x - output * sigma

    def sampled(name):
        inputs = workflow[name]["inputs"]
        source = workflow[inputs["latent_image"][0]]
        empty = source["class_type"] == "EmptyLatentImage"
        latents = np.zeros_like(noise) if empty else sampled(inputs["latent_image"][0])
        sigmas = manual_sigmas(workflow[inputs["sigmas"][0]]["inputs"]["sigmas"])
        most = sigmas[0] > sigmas_of[-1] or np.isclose(sigmas[0], sigmas_of[-1], rtol=1e-5, atol=0)
        x = latents + noise * (np.sqrt(1 + sigmas[0] ** 2) if most else sigmas[0])
        for sigma, following in itertools.pairwise(sigmas):
            x0 = denoised(x, sigma)
            if workflow[inputs["sampler"][0]]["inputs"]["sampler_name"] == "lcm":
                x = x0 + (following * next(fresh) if following else 0)
            else:
                x = x + (x - x0) / sigma * (following - sigma)
        return x

    return sampled(kinds["VAEDecode"][0]["samples"][0])
