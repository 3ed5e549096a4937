"""Tell how a student is drawn in another program, or write a workflow for ComfyUI.

    python -m jaxdistill.interop.how_to_sample --model=runs/sd15/diffusers --ui=a1111

What the programs do with steps and sigmas is a fact of their sources: `comfy/model_sampling.py`,
`nodes.py` and `comfy_extras` of ComfyUI; `modules/sd_schedulers.py` and `sd_samplers_*.py` of A1111
and Forge.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill import schedule as schedules
from jaxdistill.interop import diffusers_scheduler as schedulers
from jaxdistill.interop import flow_scheduler
from jaxdistill.interop.diffusers_folder import FolderError, read_json
from jaxdistill.run.checkpoint import write_json
from jaxdistill.run.help import Parser, named

FORMAT = "jaxdistill-how-to-sample/1"
FILE, WORKFLOW = "how_to_sample.json", "comfyui_workflow.json"
UIS = ("diffusers", "comfyui", "a1111", "forge")
FLOW = "flow_prediction"
"""The prediction_type of flow matching: u = eps - x0."""
OWN = (
    "clip_sample",
    "set_alpha_to_one",
    "steps_offset",
    "thresholding",
    "timestep_spacing",
    "original_inference_steps",
    "timestep_scaling",
)
"""Of a student's scheduler, what a LoRA's base has not: for `from_config` of its own."""
LAST_ALPHA_BAR = {"diffusers": 2.0**-24, "comfyui": 4.8973451890853435e-08}
"""In place of 0 at zero terminal SNR, so that the first sigma is finite."""

Json = dict[str, Any]


@dataclass(frozen=True)
class Student:
    """What the programs are told of a student.

    Attributes:
      scheduler: its scheduler_config.json, of `student_config`.
      steps: the step counts that it serves.
      size: height and width in pixels.
      noise_correction: whether it was trained with it, and draws with it by default.
      clip_skip: as of `Folder`.
      layers_out: layers of its text encoder that are left out without clip_skip: 1 of 2.x and XL.
      call: what more diffusers is told in each call.
    """

    scheduler: Mapping[str, Any]
    steps: Sequence[int]
    size: tuple[int, int]
    noise_correction: bool = False
    clip_skip: int = 0
    layers_out: int = 0
    call: Mapping[str, Any] = field(default_factory=dict)

    @cached_property
    def predicts(self) -> str:
        """A key of `diffusers_scheduler.PREDICTIONS`."""
        return str(self.scheduler.get("prediction_type", "epsilon"))

    @property
    def zero_snr(self) -> bool:
        """Zero terminal SNR."""
        return bool(self.scheduler.get("rescale_betas_zero_snr"))

    @property
    def renoises(self) -> bool:
        """Fresh noise between the steps."""
        return self.scheduler["_class_name"] == schedulers.LCM

    @property
    def corrects(self) -> bool:
        """Whether noise correction is another sampler: not for v from zero terminal SNR."""
        exact = self.predicts == "v_prediction" and self.zero_snr
        return not self.renoises and not exact and max(self.steps) > 1

    @cached_property
    def betas(self) -> np.ndarray:
        """Its betas [T]."""
        return schedulers.betas_of(self.scheduler, Path("scheduler_config.json"))

    @property
    def usual(self) -> bool:
        """Whether its noise levels are Stable Diffusion's, which are all that the UIs know."""
        betas = schedules.scaled_linear_betas()
        betas = schedules.rescale_zero_terminal_snr(betas) if self.zero_snr else betas
        return betas.shape == self.betas.shape and np.allclose(betas, self.betas, rtol=1e-3)

    @property
    def most(self) -> int:
        """The largest number of steps."""
        return max(self.steps)

    def timesteps(self, steps: int) -> list[int]:
        """Diffusers' timesteps [N]."""
        return schedulers.student_timesteps(self.scheduler, steps)

    def sigmas(self, steps: int, program: str) -> list[float]:
        """Sigma/alpha of a program at these timesteps, and 0: [N + 1]."""
        bar = np.cumprod(1.0 - self.betas)
        if self.zero_snr:
            bar[-1] = LAST_ALPHA_BAR[program]
        ratios = np.sqrt((1.0 - bar) / bar)
        return [*(round(float(ratios[t]), 6) for t in self.timesteps(steps)), 0.0]

    def of_steps(self, value: Callable[[int], Any], *, least: int = 1) -> Json:
        """{steps: value} of all step counts from `least`."""
        return {str(n): value(n) for n in sorted(self.steps) if n >= least}


@dataclass(frozen=True)
class FlowStudent:
    """What the programs are told of a student of flow matching, as of `Student`. `guidance`: the
    scale of its calls, as its pipeline means it.
    """

    scheduler: Mapping[str, Any]
    steps: Sequence[int]
    size: tuple[int, int]
    guidance: float


def of_flow(student: FlowStudent) -> Json:
    """The content of how_to_sample.json. A call passes sigmas, to which the scheduler adds its
    shift; what is under "sigmas" and "timesteps" is shifted, as the network sees it.
    """
    (height, width), counts = student.size, sorted(student.steps)
    even = {str(n): flow_scheduler.student_sigmas(n) for n in counts}
    moved = {
        n: [round(float(flow_scheduler.shifted(s, student.scheduler["shift"])), 6) for s in sigmas]
        for n, sigmas in even.items()
    }
    size = {"guidance_scale": student.guidance, "height": height, "width": width}
    cannot = {"cannot": "has weights in diffusers' layout alone, so draw it with diffusers"}
    return {
        "format": FORMAT,
        "steps": counts,
        "default_steps": counts[-1],
        "guidance": student.guidance,
        "height": height,
        "width": width,
        "prediction_type": FLOW,
        "zero_terminal_snr": True,
        "noise_correction": False,
        "clip_skip": 0,
        "timesteps": {n: [round(1000.0 * s, 3) for s in sigmas] for n, sigmas in moved.items()},
        "sigmas": {n: [*sigmas, 0.0] for n, sigmas in moved.items()},
        "diffusers": {
            "trust_remote_code": False,
            "trained_with_noise_correction": False,
            "scheduler": student.scheduler["_class_name"],
            "from_config": {k: v for k, v in student.scheduler.items() if not k.startswith("_")},
            "calls": {
                n: {"num_inference_steps": int(n), "sigmas": sigmas, **size}
                for n, sigmas in even.items()
            },
        },
        **dict.fromkeys(("comfyui", "a1111", "forge"), cannot),
    }


def how_to_sample(student: Student | FlowStudent) -> Json:
    """The content of how_to_sample.json."""
    if isinstance(student, FlowStudent):
        return of_flow(student)
    height, width = student.size
    return {
        "format": FORMAT,
        "steps": sorted(student.steps),
        "default_steps": student.most,
        "guidance": 1.0,
        "height": height,
        "width": width,
        "prediction_type": student.predicts,
        "zero_terminal_snr": student.zero_snr,
        "noise_correction": student.noise_correction,
        "clip_skip": student.clip_skip,
        "timesteps": student.of_steps(student.timesteps),
        "sigmas": student.of_steps(lambda n: student.sigmas(n, "diffusers")),
        "diffusers": in_diffusers(student),
        "comfyui": in_comfyui(student),
        "a1111": in_a1111(student),
        "forge": in_forge(student),
    }


def read(path: Path) -> Json:
    """A how_to_sample.json. Raises FolderError for another file of the name."""
    found = read_json(path)
    sizes = ("steps", "default_steps", "height", "width", "timesteps", "sigmas")
    says = ("prediction_type", "zero_terminal_snr", "noise_correction", "clip_skip")
    missing = [key for key in (*sizes, *says, *UIS) if key not in found]
    if found.get("format") != FORMAT or missing or "from_config" not in found["diffusers"]:
        raise FolderError(
            f"{path} is not what this version writes of a student"
            f"{f' (it lacks {missing[0]})' if missing else ''}; move it away, or write it anew"
        )
    return found


def corrected_sigmas(sigmas: Sequence[float]) -> list[float]:
    """Sigmas with which a plain Euler sampler takes the first step of noise correction.

    With x~ = x/α and s = σ/α that step is x~_2 = x̂0 + s_2 x_T = (1/α_T + s_2) x_T - s_T ε̂ of an eps
    network. Euler from sqrt(S² + 1) x_T goes to sqrt(S² + 1) x_T + (s_2 - S) ε̂, and no program
    tells the network a time above T - 1. So S = s_T + s_2; what is left is x_T (1/S - 1/s_T)/2.
    """
    first, second, *rest = sigmas
    return [round(first + second, 6), second, *rest] if rest else list(sigmas)


def in_diffusers(student: Student) -> Json:
    """Calls of the student's folder as it is and, for eps, with noise correction."""
    height, width = student.size
    common: Json = {"guidance_scale": 1.0, "height": height, "width": width, **student.call}
    if student.clip_skip:
        common["clip_skip"] = student.clip_skip
    found: Json = {
        "trust_remote_code": False,
        "trained_with_noise_correction": student.noise_correction,
        "scheduler": student.scheduler["_class_name"],
        "from_config": {k: v for k, v in student.scheduler.items() if k in OWN},
        "calls": student.of_steps(lambda n: {"num_inference_steps": n, **common}),
    }
    if student.corrects and student.predicts == "epsilon":

        def call(n: int) -> Json:
            return {"sigmas": corrected_sigmas(student.sigmas(n, "diffusers")), **common}

        found["with_noise_correction"] = {
            "scheduler": "EulerDiscreteScheduler",
            "from_config": {"timestep_spacing": "leading"},
            "calls": student.of_steps(call),
        }
    return found


def unusual(student: Student) -> str:
    """Why the UIs cannot draw the student, or nothing."""
    if student.predicts == "sample":
        return "predicts the image itself, which the program does not read"
    return "" if student.usual else "has other noise levels than Stable Diffusion's"


def in_comfyui(student: Student) -> Json:
    """The sampler and the sigmas; of noise correction two samplers, which is exact: x̂0 in one step,
    then the same noise once more at the second sigma.
    """
    if reason := unusual(student):
        return {"cannot": reason}
    height, width = student.size
    sigmas = student.of_steps(lambda n: student.sigmas(n, "comfyui"))
    found: Json = {
        "trained_with_noise_correction": student.noise_correction,
        "sampler": "lcm" if student.renoises else "euler",
        "cfg": 1.0,
        "height": height,
        "width": width,
        "sigmas": sigmas,
    }
    if student.predicts == "v_prediction":
        found["model_sampling"] = {"sampling": "v_prediction", "zsnr": student.zero_snr}
    if student.clip_skip:
        found["stop_at_clip_layer"] = -1 - student.layers_out - student.clip_skip
    if student.corrects:
        found["with_noise_correction"] = {
            n: {"first": [s[0], 0.0], "then": s[1:]} for n, s in sigmas.items() if n != "1"
        }
    return found


def in_a1111(student: Student) -> Json:
    """Sampler, schedule type and settings; `timesteps` are those that the program then takes."""
    if reason := unusual(student):
        return {"cannot": reason}
    if student.renoises and student.predicts != "epsilon":
        return {"cannot": "renoises with v-prediction, which the sampler LCM does not read"}
    height, width = student.size
    low = 19 if student.renoises else 0  # the first of LCM's 50 times

    def timesteps(n: int) -> list[float]:
        return [round(float(t), 1) for t in np.linspace(999, low, n + 1)[:-1]]

    settings: Json = {"SGM noise multiplier": True}
    if student.zero_snr:
        settings["Noise schedule for sampling"] = "Zero Terminal SNR"
    without = ["noise correction"] if student.noise_correction else []
    if student.clip_skip and not student.layers_out:
        settings["Clip skip"] = 1 + student.clip_skip
    elif student.clip_skip:
        without.append("clip skip, which the program has for 1.x alone")
    found = {
        "sampler": "LCM" if student.renoises else "Euler",
        "schedule_type": "SGM Uniform",
        "cfg_scale": 1.0,
        "height": height,
        "width": width,
        "settings": settings,
        "timesteps": student.of_steps(timesteps),
    }
    return found | ({"without": without} if without else {})


def in_forge(student: Student) -> Json:
    """As A1111, but for a schedule type that has the student's own times."""
    found = in_a1111(student)
    if "cannot" in found or student.renoises:
        return found
    return {**found, "schedule_type": "Turbo", "timesteps": student.of_steps(student.timesteps)}


# ---------------------------------------------------------------------------------------- ComfyUI


def written(sigmas: Sequence[float]) -> str:
    """As the node ManualSigmas reads them: decimals, no exponents."""
    return ", ".join(f"{sigma:.6f}" for sigma in sigmas)


def comfyui_workflow(
    how: Mapping[str, Any], *, checkpoint: str, lora: str = "", steps: int = 0
) -> Json:
    """A workflow in ComfyUI's API format, which its page opens and its /prompt takes.

    Args:
      how: of `how_to_sample`; with a student's LoRA its `loras` are the styles below it.
      checkpoint: name of the file in models/checkpoints.
      lora: name of the student's LoRA in models/loras, where the checkpoint is its base.
      steps: of those that the student serves; 0 is the most.

    Raises:
      ValueError: steps that it does not serve, or a student that ComfyUI cannot draw.
    """
    comfy, count = how["comfyui"], steps or how["default_steps"]
    if "cannot" in comfy:
        raise ValueError(f"ComfyUI cannot draw this student: it {comfy['cannot']}")
    if str(count) not in comfy["sigmas"]:
        served = ", ".join(map(str, how["steps"]))
        raise ValueError(f"steps = {count} is not what the student was made for: {served}")
    nodes: Json = {}

    def node(kind: str, **inputs: Any) -> str:
        name = str(len(nodes) + 1)
        nodes[name] = {"class_type": kind, "inputs": inputs, "_meta": {"title": kind}}
        return name

    loader = node("CheckpointLoaderSimple", ckpt_name=checkpoint)
    model, clip = [loader, 0], [loader, 1]
    for style in how.get("loras", ()) if lora else ():
        strength = dict.fromkeys(("strength_model", "strength_clip"), float(style["weight"]))
        name = node("LoraLoader", model=model, clip=clip, lora_name=style["file"], **strength)
        model, clip = [name, 0], [name, 1]
    if lora:
        model = [node("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0), 0]
    if "model_sampling" in comfy:
        model = [node("ModelSamplingDiscrete", model=model, **comfy["model_sampling"]), 0]
    if layer := comfy.get("stop_at_clip_layer"):
        clip = [node("CLIPSetLastLayer", clip=clip, stop_at_clip_layer=layer), 0]
    text = node("CLIPTextEncode", text="a photo of a cat", clip=clip)
    size = {"width": comfy["width"], "height": comfy["height"], "batch_size": 1}
    latents = node("EmptyLatentImage", **size)
    common = {
        "noise": [node("RandomNoise", noise_seed=0), 0],
        "guider": [node("BasicGuider", model=model, conditioning=[text, 0]), 0],
        "sampler": [node("KSamplerSelect", sampler_name=comfy["sampler"]), 0],
    }
    corrected = comfy.get("with_noise_correction", {}).get(str(count), {})
    parts = corrected.values() if how["noise_correction"] and corrected else ()
    for sigmas in parts or (comfy["sigmas"][str(count)],):
        listed = [node("ManualSigmas", sigmas=written(sigmas)), 0]
        latents = node("SamplerCustomAdvanced", **common, sigmas=listed, latent_image=[latents, 0])
    image = node("VAEDecode", samples=[latents, 0], vae=[loader, 2])
    node("SaveImage", images=[image, 0], filename_prefix="student")
    return nodes


def files(how: Mapping[str, Any], *, checkpoint: str, lora: str = "") -> dict[str, Json]:
    """{file name: content} of what lies beside a student: FILE and, where ComfyUI can draw it,
    WORKFLOW. `checkpoint` and `lora` as of `comfyui_workflow`.
    """
    if "cannot" in how["comfyui"]:
        return {FILE: dict(how)}
    name = checkpoint if checkpoint.endswith(".safetensors") else f"{checkpoint}.safetensors"
    return {FILE: dict(how), WORKFLOW: comfyui_workflow(how, checkpoint=name, lora=lora)}


# ---------------------------------------------------------------------------------------- command


def parser() -> Parser:
    """The flags."""
    p = Parser("\n".join((__doc__ or "").splitlines()[:3]), "--model=FOLDER --ui=NAME")
    add = p.add_argument
    about = "what a run or an export wrote: it holds how_to_sample.json"
    add("--model", required=True, metavar="FOLDER", help=about)
    add("--ui", required=True, **named(UIS), help=f"the program: {', '.join(UIS)}")
    about = ".json to write a workflow to (comfyui)"
    add("--out", metavar="FILE", help=about)
    about = "of the workflow, one of the student's (default: its most)"
    add("--steps", type=int, metavar="N", help=about)
    about = "of the workflow: the file in models/checkpoints (default: as the folder's)"
    add("--checkpoint", metavar="NAME", help=about)
    about = "of the workflow: the file in models/loras (default: as the folder's)"
    add("--lora", metavar="NAME", help=about)
    return p


def names_of(folder: Path) -> dict[str, str]:
    """The checkpoint and the LoRA that the folder's own workflow names."""
    path = folder / WORKFLOW
    nodes = read_json(path).values() if path.is_file() else ()
    inputs = {key: value for node in nodes for key, value in node["inputs"].items()}
    return {"checkpoint": inputs.get("ckpt_name", ""), "lora": inputs.get("lora_name", "")}


def run(args: argparse.Namespace) -> str:
    """What the command prints. Raises ValueError."""
    folder = Path(args.model)
    if not (folder / FILE).is_file():
        raise ValueError(
            f"--model={folder} has no {FILE}; give the diffusers/ or lora/ folder of a finished run"
        )
    how = read(folder / FILE)
    given = {"--steps": args.steps, "--checkpoint": args.checkpoint, "--lora": args.lora}
    if args.out is None:
        if flags := [flag for flag, value in given.items() if value is not None]:
            raise ValueError(f"{flags[0]} is of a workflow; give --ui=comfyui and --out=FILE")
        return json.dumps(how[args.ui], indent=2)
    out = Path(args.out)
    if args.ui != "comfyui" or out.suffix != ".json":
        raise ValueError(f"--out={out}: only --ui=comfyui has a workflow, a .json file")
    if args.steps is not None and args.steps < 1:
        raise ValueError(f"--steps must be at least 1, got {args.steps}")
    names: dict[str, Any] = names_of(folder)
    names |= {key: value for key in names if (value := getattr(args, key)) is not None}
    write_json(out, comfyui_workflow(how, **names, steps=args.steps or 0))
    return str(out)


def main(argv: list[str] | None = None) -> None:
    """Parse, tell or write."""
    args = parser().parse_args(argv)
    try:
        print(run(args))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
