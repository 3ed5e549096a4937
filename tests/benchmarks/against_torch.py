"""Sampling and one distillation step against torch on this machine, side by side: the same weights,
the same dtype.

    python tests/benchmarks/against_torch.py --out=docs/results/against_torch.json

A UNet of about 100 M parameters of the 1.x layout with 64x64 latents, float32. The contenders take
turns, and the numbers are medians of ratios of neighbours: the machine's other work then hits both.
torch runs as it comes and compiled (`torch.compile`).

Sampling: DDIM steps with guidance (a batch of 2 for one image). Distillation: a rollout of 2
student steps, one teacher step with guidance from each visited state, the squared error, its
gradient and an AdamW step. Profile: where the time of both goes, by kind, on one thread (start it
on one core; the profilers cost time themselves).
"""

import argparse
import json
import os
import platform
import re
import shlex
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import diffusers
import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch

from jaxdistill import sampling, schedule
from jaxdistill.interop import diffusers_folder
from jaxdistill.interop.families import stable_diffusion
from jaxdistill.interop.torch_weights import from_torch, torch_name
from jaxdistill.methods.imagine_flash import Model, Reconstruction, imagine_flash
from jaxdistill.prediction import as_denoiser, eps_prediction
from jaxdistill.train import Objective, init_state, train_step

WIDE = {"block_out_channels": (128, 256, 448, 448), "cross_attention_dim": 512, "sample_size": 64}
TINY = {
    "block_out_channels": (32, 64),
    "cross_attention_dim": 32,
    "sample_size": 16,
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
}
BETAS = schedule.scaled_linear_betas()
SCHEDULE = schedule.ddpm(BETAS)
TIMES = np.float32([1000.0, 500.0])


class Setup:
    """One network in both libraries."""

    def __init__(self, small: bool, attention: str) -> None:
        torch.manual_seed(0)
        settings = TINY if small else WIDE
        self.torch = diffusers.UNet2DConditionModel(**settings).eval()
        config = json.loads(self.torch.to_json_string())
        where = Path("unet/config.json")
        part = diffusers_folder.Part(
            stable_diffusion.unet_module(config, where, attention=attention),
            config,
            where.parent,
            "",
        )
        state = {name: a.cpu().numpy() for name, a in self.torch.state_dict().items()}
        self.apply = part.module.apply
        self.params = jax.tree_util.tree_map_with_path(
            lambda path, leaf: jnp.asarray(
                from_torch([k.key for k in path][1:], state[torch_name([k.key for k in path][1:])])
            ),
            diffusers_folder.abstract_params(part),
        )
        r = np.random.default_rng(0)
        side, width = settings["sample_size"], settings["cross_attention_dim"]
        self.noise, self.null = (
            r.standard_normal((1, side, side, 4), np.float32),
            r.standard_normal((1, 77, width), np.float32),
        )
        self.context = r.standard_normal((1, 77, width), np.float32)
        self.parameters = sum(p.numel() for p in self.torch.parameters())


def torch_sampler(setup: Setup, unet: Callable) -> Callable[[], np.ndarray]:
    """DDIM with guidance over TIMES."""
    alphas = torch.tensor(np.concatenate([[1.0], np.cumprod(1 - BETAS)]), dtype=torch.float32)
    both = torch.tensor(np.concatenate([setup.context, setup.null]))

    @torch.no_grad()
    def run() -> np.ndarray:
        x = torch.tensor(setup.noise.transpose(0, 3, 1, 2))
        for t, t_next in zip(TIMES, [*TIMES[1:], 0.0], strict=True):
            conditional, unconditional = unet(
                torch.cat([x, x]), torch.tensor(t - 1), both
            ).sample.chunk(2)
            eps = unconditional + 3.0 * (conditional - unconditional)
            a, b = alphas[int(t)], alphas[int(t_next)]
            x = b.sqrt() * (x - (1 - a).sqrt() * eps) / a.sqrt() + (1 - b).sqrt() * eps
        return x.cpu().numpy().transpose(0, 2, 3, 1)

    return run


def jax_sampler(setup: Setup, texts: list[str] | None = None) -> Callable[[], np.ndarray]:
    """The same by this package, one program a step as `pipeline` has it; its compiled text is
    appended to `texts`.
    """
    step = sampling.ddim(SCHEDULE)
    both = {"context": np.concatenate([setup.context, setup.null])}

    @jax.jit
    def advance(params, state, t, t_next):
        denoiser = as_denoiser(
            setup.apply, params, both, schedule=SCHEDULE, parameterization=eps_prediction, copies=2
        )
        return step(sampling.guidance(3.0, shared=True)(denoiser)(state.x, t), state, t, t_next)

    if texts is not None:
        texts.append(
            advance.lower(
                setup.params, sampling.start(jnp.asarray(setup.noise)), TIMES[0], TIMES[1]
            )
            .compile()
            .as_text()
        )

    def run() -> np.ndarray:
        state = sampling.start(jnp.asarray(setup.noise))
        for t, t_next in zip(TIMES, np.append(TIMES[1:], 0.0), strict=True):
            state = advance(setup.params, state, t, np.float32(t_next))
        return np.asarray(state.x)

    return run


def torch_step(setup: Setup, compiled: bool) -> Callable[[], float]:
    """Backward distillation in a few lines of torch: no SRL, one teacher step."""
    import copy

    student, teacher = copy.deepcopy(setup.torch).train(), setup.torch
    optimizer = torch.optim.AdamW(student.parameters(), lr=1e-5, weight_decay=0.0)
    forward, guide = (torch.compile(net) if compiled else net for net in (student, teacher))
    alphas = torch.tensor(np.concatenate([[1.0], np.cumprod(1 - BETAS)]), dtype=torch.float32)
    context, both = (
        torch.tensor(setup.context),
        torch.tensor(np.concatenate([setup.context, setup.null])),
    )

    def x0_of(x, eps, t):
        return (x - (1 - alphas[int(t)]).sqrt() * eps) / alphas[int(t)].sqrt()

    def run() -> float:
        x = torch.tensor(setup.noise.transpose(0, 3, 1, 2))
        loss = torch.zeros(())
        for t, t_next in zip(TIMES, [*TIMES[1:], 0.0], strict=True):
            eps = forward(x, torch.tensor(t - 1), context).sample
            x0 = x0_of(x, eps, t)
            with torch.no_grad():
                conditional, unconditional = guide(
                    torch.cat([x, x]), torch.tensor(t - 1), both
                ).sample.chunk(2)
                target = x0_of(x, unconditional + 3.0 * (conditional - unconditional), t)
            loss = loss + ((target - x0) ** 2).mean() / len(TIMES)
            b = alphas[int(t_next)]
            x = (b.sqrt() * x0 + (1 - b).sqrt() * eps).detach()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return run


def jax_step(
    setup: Setup, texts: list[str] | None = None, *, unroll: bool = True
) -> Callable[[], float]:
    """The same by this package's own loss and training step; its compiled text is appended to
    `texts`.
    """
    network, tx = (
        Model(setup.apply, SCHEDULE, eps_prediction, shares=True),
        optax.adamw(1e-5, weight_decay=0.0),
    )
    loss_fn = imagine_flash(
        network,
        network,
        grids=[TIMES],
        null_cond=lambda cond: {"context": jnp.broadcast_to(setup.null, cond["context"].shape)},
        reconstruction=Reconstruction(noise_source=None, steps=1, guidance_scale=3.0),
        correct_noise=False,
        unroll=unroll,
    )
    step = jax.jit(
        lambda state, batch, teacher: train_step(
            state, batch, teacher, objective=Objective(loss_fn, tx), ema_decay=0.0
        ),
        donate_argnums=0,
    )
    batch = {"x0": jnp.zeros(setup.noise.shape), "cond": {"context": jnp.asarray(setup.context)}}
    state = [init_state({"student": jax.tree.map(jnp.array, setup.params)}, tx, jax.random.key(0))]
    if texts is not None:
        texts.append(step.lower(state[0], batch, setup.params).compile().as_text())

    def run() -> float:
        state[0], metrics = step(state[0], batch, setup.params)
        return float(metrics["loss"])

    return run


TORCH_KINDS = {
    "attention": ("scaled_dot_product",),
    "convolutions": ("conv",),
    "linear layers": ("addmm", "::mm", "linear"),
}
JAX_KINDS = {
    "convolutions": ("conv_general_dilated",),
    "linear layers": ("dot_general", "transpose"),
}


def torch_profile(run: Callable[[], object]) -> dict[str, float]:
    """Seconds of one run by kind of operator."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as found:
        run()
    seconds: Counter[str] = Counter()
    for event in found.key_averages():
        kind = next(
            (k for k, names in TORCH_KINDS.items() if any(name in event.key for name in names)),
            "other",
        )
        seconds[kind] += event.self_cpu_time_total / 1e6
    return rounded(seconds)


def jax_profile(run: Callable[[], object], text: str) -> dict[str, float]:
    """Seconds of one run by kind of HLO instruction, whose compiled `text` says from which layer it
    comes.
    """
    layers = dict(re.findall(r'%?([\w.\-]+) = [^\n]*?op_name="([^"]*)"', text))
    own: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            run()
        (file,) = Path(folder).rglob("*.xplane.pb")
        for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
            for line in plane.lines:
                if "Eigen" not in line.name and "PjRt" not in line.name:
                    continue
                open_events: list[tuple[float, str]] = []
                for start, length, name in sorted(
                    (e.start_ns, -e.duration_ns, e.name) for e in line.events
                ):
                    while open_events and open_events[-1][0] <= start:
                        open_events.pop()
                    if open_events:
                        own[open_events[-1][1]] += (
                            length  # negative: an inner event is not its outer one's own time
                        )
                    own[name] -= length
                    open_events.append((start - length, name))
    seconds: Counter[str] = Counter()
    for name, spent in own.items():
        if name not in layers:
            continue  # the executor and its waiting
        layer = layers[name]
        kind = next(
            (k for k, names in JAX_KINDS.items() if layer.rsplit("/", 1)[-1] in names), "other"
        )
        if "/attn" in layer and "while" in layer:
            kind = "attention"
        seconds[kind] += spent / 1e9
    return rounded(seconds)


def rounded(seconds: Counter[str]) -> dict[str, float]:
    return {kind: round(spent, 3) for kind, spent in seconds.most_common()}


def profiles(setup: Setup) -> dict[str, object]:
    """Of sampling and of the step."""
    torch.set_num_threads(1)
    found: dict[str, object] = {}
    for name, ours, theirs in (
        ("sampling", jax_sampler, torch_sampler),
        ("step", jax_step, torch_step),
    ):
        texts: list[str] = []
        run, other = ours(setup, texts), theirs(setup, setup.torch if name == "sampling" else False)
        run(), other()
        found[name] = {
            "torch eager": torch_profile(other),
            "jaxdistill": jax_profile(run, texts[0]),
        }
        print(json.dumps(found[name], indent=2), flush=True)
    return found


def alternate(contenders: dict[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each, taking turns after one round to warm up."""
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds + 1):
        for name, run in contenders.items():
            began = time.perf_counter()
            run()
            if i:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def summary(seconds: dict[str, list[float]]) -> dict[str, object]:
    """Medians, and the ratio of each torch to ours, round by round."""
    found: dict[str, object] = {
        "seconds": {name: round(float(np.median(s)), 3) for name, s in seconds.items()}
    }
    ratios = {
        n: [a / b for a, b in zip(s, seconds["jaxdistill"], strict=True)]
        for n, s in seconds.items()
        if n != "jaxdistill"
    }
    found["times_faster"] = {name: round(float(np.median(r)), 3) for name, r in ratios.items()}
    found["spread"] = {name: [round(min(r), 3), round(max(r), 3)] for name, r in ratios.items()}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", required=True)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--small", action="store_true", help="a tiny network: shows that the script works"
    )
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--parts", default="sampling,step")
    args = parser.parse_args()
    setup = Setup(args.small, args.attention)
    torch.set_num_threads(os.cpu_count() or 1)
    ours, theirs = jax_sampler(setup), torch_sampler(setup, setup.torch)
    expected = theirs()
    error = float(np.abs(ours() - expected).max() / np.abs(expected).max())
    results = {
        "command": shlex.join(["python", *sys.argv]),
        "parameters": setup.parameters,
        "attention": args.attention,
        "relative_error_of_the_samples": error,
        "machine": f"{os.cpu_count()} CPU cores ({platform.machine()})",
        "versions": {
            "jax": jax.__version__,
            "torch": torch.__version__,
            "diffusers": diffusers.__version__,
        },
    }
    if "sampling" in args.parts:
        contenders = {
            "torch eager": theirs,
            "torch compiled": torch_sampler(setup, torch.compile(setup.torch)),
            "jaxdistill": ours,
        }
        results["sampling"] = summary(alternate(contenders, args.rounds))
        print(json.dumps(results["sampling"], indent=2), flush=True)
    if "step" in args.parts:
        contenders = {
            "torch eager": torch_step(setup, False),
            "torch compiled": torch_step(setup, True),
            "jaxdistill": jax_step(setup),
        }
        contenders["jaxdistill, as a loop"] = jax_step(
            setup, unroll=False
        )  # as the text-to-image configs have it
        losses = {name: run() for name, run in contenders.items()}
        results["first_losses"] = {name: round(loss, 6) for name, loss in losses.items()}
        results["step"] = summary(alternate(contenders, args.rounds))
        print(json.dumps(results["step"], indent=2), flush=True)
    if "profile" in args.parts:
        results["profile"] = profiles(setup)
    Path(args.out).write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
