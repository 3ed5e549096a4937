"""Write diffusers.json: reference numbers from diffusers' schedulers.

    python tests/golden/make_diffusers_goldens.py

Needs an environment of its own with torch==2.13.0 and diffusers==0.42.1; the tests read only the
JSON file. Times in the file are diffusers' timesteps: one below ours, and -1 is clean data.
"""

import json
from pathlib import Path

import diffusers
import numpy as np
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler

TRAIN_STEPS = 1000
SD_BETAS = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
BETAS = {
    "scaled_linear": SD_BETAS,
    "linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"},
}
PROBES = [0, 1, 2, 10, 100, 249, 500, 750, 900, 990, 998, 999]
STEP_COUNTS = [1, 2, 3, 4, 7, 20, 50]
C0, C1 = 0.8, 0.3


def model(x: torch.Tensor, timestep: int) -> torch.Tensor:
    """The stand-in for a network."""
    return C0 * torch.tanh(0.3 * x) + C1 * timestep / TRAIN_STEPS


def numbers(values) -> list:
    """Nested lists with the nine digits that identify a float32."""
    rounded = [float(f"{v:.9g}") for v in np.asarray(values, np.float32).ravel()]
    return np.asarray(rounded).reshape(np.shape(values)).tolist()


def waves(shape: tuple[int, ...], phase: float, scale: float) -> torch.Tensor:
    """A fixed input without any structure that a wrong formula could share."""
    flat = scale * np.sin(1.7 * np.arange(np.prod(shape)) + phase)
    return torch.from_numpy(flat.reshape(shape).astype(np.float32))


def alphas_cumprod() -> dict:
    tables = {}
    for name, betas in BETAS.items():
        for rescale in (False, True):
            options = {
                **betas,
                "num_train_timesteps": TRAIN_STEPS,
                "rescale_betas_zero_snr": rescale,
            }
            table = DDPMScheduler(**options).alphas_cumprod
            assert torch.equal(table, DDIMScheduler(**options).alphas_cumprod)
            tables[f"{name}{'_zero_snr' if rescale else ''}"] = numbers(table[PROBES])
    return tables


def timesteps() -> dict:
    kinds = {
        "trailing": {"timestep_spacing": "trailing"},
        "leading_offset_0": {"timestep_spacing": "leading", "steps_offset": 0},
        "leading_offset_1": {"timestep_spacing": "leading", "steps_offset": 1},
        "linspace": {"timestep_spacing": "linspace"},
    }
    found = {}
    for kind, options in kinds.items():
        scheduler = DDIMScheduler(**SD_BETAS, **options)
        found[kind] = {}
        for steps in STEP_COUNTS:
            scheduler.set_timesteps(steps)
            found[kind][steps] = scheduler.timesteps.tolist()
    return found


def forward_process() -> dict:
    scheduler = DDPMScheduler(**SD_BETAS)
    x0, noise, t = (
        waves((4, 2, 2, 1), 0.1, 1.0),
        waves((4, 2, 2, 1), 1.3, 1.5),
        torch.tensor([0, 250, 700, 999]),
    )
    return {
        "x0": numbers(x0),
        "noise": numbers(noise),
        "timesteps": t.tolist(),
        "noisy": numbers(scheduler.add_noise(x0, noise, t)),
        "velocity": numbers(scheduler.get_velocity(x0, noise, t)),
    }


def ddim_steps() -> dict:
    sample, output = waves((1, 2, 2, 2), 0.4, 1.6), waves((1, 2, 2, 2), 2.2, 0.9)
    steps = []
    for prediction in ("epsilon", "v_prediction", "sample"):
        for count, timestep, to_one, clip in [
            (4, 999, True, False),
            (4, 499, True, False),
            (50, 501, True, False),
            (8, 124, True, False),
            (8, 124, False, False),
            (8, 499, True, True),
        ]:
            scheduler = DDIMScheduler(
                **SD_BETAS, prediction_type=prediction, set_alpha_to_one=to_one, clip_sample=clip
            )
            scheduler.set_timesteps(count)
            out = scheduler.step(output, timestep, sample, use_clipped_model_output=clip)
            steps.append(
                {
                    "prediction_type": prediction,
                    "t": timestep,
                    "t_prev": timestep - TRAIN_STEPS // count,
                    "set_alpha_to_one": to_one,
                    "clip": clip,
                    "prev_sample": numbers(out.prev_sample),
                    "x0": numbers(out.pred_original_sample),
                }
            )
    return {"sample": numbers(sample), "output": numbers(output), "steps": steps}


def trajectory(scheduler, x: torch.Tensor, steps: int) -> dict:
    scheduler.set_timesteps(steps)
    states = [x]
    for t in scheduler.timesteps.tolist():
        states.append(scheduler.step(model(states[-1], t), t, states[-1]).prev_sample)
    return {"timesteps": scheduler.timesteps.tolist(), "states": numbers(torch.stack(states))}


def trajectories() -> list:
    x, runs = waves((1, 4, 4, 1), 0.9, 1.5), []
    ddim = {
        "ddim trailing": {"timestep_spacing": "trailing", "set_alpha_to_one": True},
        "ddim leading": {
            "timestep_spacing": "leading",
            "set_alpha_to_one": False,
            "steps_offset": 1,
        },
        "ddim zero snr": {
            "timestep_spacing": "trailing",
            "set_alpha_to_one": True,
            "rescale_betas_zero_snr": True,
        },
    }
    # Only the last step is of first order in ours, and only if it goes to t = 0.
    dpm = {
        "dpm trailing": {
            "timestep_spacing": "trailing",
            "final_sigmas_type": "zero",
            "lower_order_final": True,
        },
        "dpm linspace": {
            "timestep_spacing": "linspace",
            "final_sigmas_type": "zero",
            "lower_order_final": True,
        },
        "dpm to sigma_min": {
            "timestep_spacing": "trailing",
            "final_sigmas_type": "sigma_min",
            "lower_order_final": False,
        },
    }
    for prediction in ("epsilon", "v_prediction"):
        for name, options in ddim.items():
            zero_snr = options.get("rescale_betas_zero_snr", False)
            if zero_snr and prediction == "epsilon":
                continue
            scheduler = DDIMScheduler(
                **SD_BETAS, **options, prediction_type=prediction, clip_sample=False
            )
            t_end = 0 if options["set_alpha_to_one"] else 1
            runs.append(
                {
                    "name": name,
                    "solver": "ddim",
                    "prediction_type": prediction,
                    "zero_snr": zero_snr,
                    "our_t_end": t_end,
                    **trajectory(scheduler, x, 8),
                }
            )
        for name, options in dpm.items():
            scheduler = DPMSolverMultistepScheduler(
                **SD_BETAS,
                **options,
                prediction_type=prediction,
                solver_order=2,
                algorithm_type="dpmsolver++",
                solver_type="midpoint",
            )
            t_end = 0 if options["final_sigmas_type"] == "zero" else 1
            runs.append(
                {
                    "name": name,
                    "solver": "dpm_solver_pp_2m",
                    "prediction_type": prediction,
                    "zero_snr": False,
                    "our_t_end": t_end,
                    **trajectory(scheduler, x, 8),
                }
            )
    return runs


def main() -> None:
    goldens = {
        "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__},
        "model": {"c0": C0, "c1": C1},
        "probes": PROBES,
        "alphas_cumprod": alphas_cumprod(),
        "timesteps": timesteps(),
        "forward_process": forward_process(),
        "ddim_steps": ddim_steps(),
        "trajectories": trajectories(),
    }
    path = Path(__file__).parent / "diffusers.json"
    lines = ",\n".join(
        f"{json.dumps(k)}: {json.dumps(v, separators=(',', ':'))}" for k, v in goldens.items()
    )
    path.write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    main()
