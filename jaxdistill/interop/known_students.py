"""How published few-step students are drawn from: LCM, Turbo, Lightning, Hyper, DMD2.

Their files say little of it, and their LoRAs nothing. Sources are the authors' model cards, as
stock diffusers runs them: Luo et al. 2023 (LCM and LCM-LoRA), Sauer et al. 2023 (ADD: SD-Turbo and
SDXL-Turbo), Lin et al. 2024 (SDXL-Lightning), Ren et al. 2024 (Hyper-SD), Yin et al. 2024 (DMD2).
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from jaxdistill.interop import Beside, how_to_sample, lora_files
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.interop.diffusers_scheduler import (
    ANCESTRAL,
    DDIM,
    DEFAULTS,
    EULER,
    LCM,
    Runs,
    Scheduler,
    of_folder,
    one_of,
    with_defaults,
)
from jaxdistill.interop.families.family import FlowFamily

KEPT = (
    *DEFAULTS,
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "set_alpha_to_one",
    "steps_offset",
)
"""Of the base's scheduler_config.json, what its student shares with it."""


@dataclass(frozen=True)
class Kind:
    """One kind of student.

    Attributes:
      scheduler: what its scheduler has, beside the base's betas and prediction.
      steps: the step counts that it draws in.
      default: of `steps`; 0 where the user has to say which.
      single: each file is for one of `steps` alone.
      timesteps: {steps: those at which it is called}, where they are not the scheduler's.
      prediction: {steps: prediction_type}, where it is not the base's.
      guidance_input: the scale of a network to which it is an input. All others have none.
    """

    scheduler: Mapping[str, Any]
    steps: tuple[int, ...]
    default: int
    single: bool = False
    timesteps: Mapping[int, tuple[int, ...]] = field(default_factory=dict)
    prediction: Mapping[int, str] = field(default_factory=dict)
    guidance_input: float = 1.0


TRAILING = {"timestep_spacing": "trailing"}
KINDS: Mapping[str, Kind] = {
    "lcm": Kind({"_class_name": LCM}, tuple(range(1, 9)), 4, guidance_input=8.0),
    "turbo": Kind({"_class_name": ANCESTRAL, **TRAILING}, (1, 2, 3, 4), 1),
    "lightning": Kind(
        {"_class_name": EULER, **TRAILING},
        (1, 2, 4, 8),
        0,
        single=True,
        prediction={1: "sample"},
    ),
    "hyper": Kind({"_class_name": DDIM, **TRAILING}, (2, 4, 8), 0, single=True),
    "dmd2": Kind(
        {"_class_name": LCM},
        (1, 4),
        4,
        single=True,
        timesteps={4: (999, 749, 499, 249), 1: (399,)},
    ),
}


@dataclass(frozen=True)
class Known:
    """A kind, and the number of steps that is its default: of a kind of single ones, the only."""

    name: str
    steps: int

    @property
    def kind(self) -> Kind:
        """What is known of it."""
        return KINDS[self.name]

    @property
    def counts(self) -> tuple[int, ...]:
        """The step counts that it has."""
        return (self.steps,) if self.kind.single else self.kind.steps

    def settings(self, folder: Folder) -> dict[str, Any]:
        """Default steps and guidance, as of a student's folder."""
        scale = self.kind.guidance_input if folder.network.module.takes_guidance else 1.0
        return {"steps": self.steps, "guidance": scale}

    def config(self, base: Mapping[str, Any]) -> dict[str, Any]:
        """The scheduler_config.json for the one of its base."""
        base = with_defaults(base)
        changes: dict[str, Any] = {**self.kind.scheduler, "clip_sample": False}
        if predicts := self.kind.prediction.get(self.steps):
            changes["prediction_type"] = predicts
        return {**{key: base[key] for key in KEPT if key in base}, **changes}

    def scheduler(self, folder: Folder, **options: Any) -> Scheduler:
        """The folder's, as this student has it; `options` as of `diffusers_scheduler.read`. Raises
        FolderError.
        """
        if isinstance(folder.family, FlowFamily):
            raise FolderError(
                f"--as={self.name}: these students have a schedule of betas, and {folder.name} is"
                " of flow matching; leave it out"
            )
        config = self.config(folder.scheduler)
        found = of_folder(folder._replace(scheduler=config), **options)
        own = {} if options.get("grid") else self.kind.timesteps
        assert isinstance(found.run, Runs)  # all known students are of betas
        return found._replace(run=replace(found.run, counts=self.counts, listed=own))


@dataclass(frozen=True)
class Described:
    """A student of this package whose file says nothing, as a LoRA's, by the how_to_sample.json
    beside it.
    """

    path: Path
    content: Mapping[str, Any]

    def settings(self, folder: Folder) -> dict[str, Any]:
        """What it was made for, as of a student's folder."""
        found = {k: self.content[k] for k in ("height", "width", "timesteps") if k in self.content}
        guidance = self.content.get("guidance", 1.0)
        return {**found, "steps": self.content["default_steps"], "guidance": guidance}

    def scheduler(self, folder: Folder, **options: Any) -> Scheduler:
        """The folder's, as this student has it; `options` as of `diffusers_scheduler.read`. Raises
        FolderError.
        """
        base, own = with_defaults(folder.scheduler), self.content["diffusers"]
        flow = self.content["prediction_type"] == how_to_sample.FLOW
        if flow and isinstance(folder.family, FlowFamily):
            config = {"_class_name": own["scheduler"], **own["from_config"]}
            options["grid"] = options.get("grid") or "trailing"
            return of_folder(folder._replace(scheduler=config), **options)
        if flow or isinstance(folder.family, FlowFamily):
            raise FolderError(
                f"{self.path} is of a student of {'flow matching' if flow else 'noised images'},"
                f" and {folder.name} is not; give a base of the same kind"
            )
        made = {
            "prediction_type": (self.content["prediction_type"], "epsilon"),
            "rescale_betas_zero_snr": (self.content["zero_terminal_snr"], False),
        }
        for key, (value, default) in made.items():
            if base.get(key, default) != value:
                raise FolderError(
                    f"{self.path} is of a student with {key} = {value}, but {folder.name} has"
                    f" {base.get(key, default)}; give a base of the same kind"
                )
        config = {key: base[key] for key in KEPT if key in base}
        config |= {"_class_name": own["scheduler"], **own["from_config"]}
        if options.get("noise_correction") is None:
            options["noise_correction"] = self.content["noise_correction"]
        return of_folder(folder._replace(scheduler=config), **options)


def of(text: str | None, counts: Sequence[int], files: Beside) -> Known | Described | None:
    """What --as or, without it, a LoRA of few steps says of how its student is drawn. Raises
    FolderError.
    """
    if text:
        return known(text, counts)
    paths = [lora_files.parse(lora)[0] for lora in files.loras]
    found = [each for path in paths if (each := described(path))]
    if len(found) > 1:
        raise FolderError(
            f"{found[0].path} and {found[1].path} are of two students; leave one's LoRA out"
        )
    for each in found:
        print(f"drawn as {each.path} says", file=sys.stderr)
    return found[0] if found else None


def counts_of(student: Known | Described) -> list[int]:
    """The step counts that it is compared at."""
    return [student.steps] if isinstance(student, Known) else list(student.content["steps"])


def described(file: Path) -> Described | None:
    """What is beside a LoRA's file (or in its folder). Raises FolderError for another file of the
    name.
    """
    path = (file if file.is_dir() else file.parent) / how_to_sample.FILE
    if not path.is_file():
        return None
    return Described(path, how_to_sample.read(path))


def known(text: str | None, counts: Sequence[int] = ()) -> Known | None:
    """NAME or NAME:STEPS, as "lightning:4"; None for none.

    Args:
      text: the flag's.
      counts: of steps that are asked for. A single one stands for the STEPS of a kind of single
        ones.

    Raises:
      FolderError: an unknown name, a number of steps that the kind does not have or, where it has
        to be named, none.
    """
    if not text:
        return None
    name, _, own = text.partition(":")
    if name not in KINDS:
        raise FolderError(f"--as={text} is not known; choose one of {', '.join(KINDS)}")
    kind = KINDS[name]
    for count in (*([own] if own else []), *map(str, counts)):
        if count not in map(str, kind.steps):
            raise FolderError(f"--as={name} has {one_of(kind.steps)} steps, not {count}")
    if not own and kind.single and len(counts) == 1:
        return Known(name, counts[0])
    if not own and not kind.default:
        raise FolderError(
            f"--as={name}: each of its files is for one number of steps; say which, as in"
            f" --as={name}:4"
        )
    return Known(name, int(own or kind.default))
