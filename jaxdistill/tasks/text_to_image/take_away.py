"""What a user takes away of a text-to-image student: the whole checkpoint as one file, or a LoRA
file that makes a student of its teacher.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from jaxdistill.errors import UserError
from jaxdistill.interop import (
    FLAGS,
    NOTHING,
    Beside,
    diffusers_folder,
    diffusers_scheduler,
    families,
    is_file,
    lora,
    lora_names,
    single_file,
    single_file_out,
    torch_weights,
)
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.interop.single_file_out import KEEP
from jaxdistill.interop.torch_weights import TreeWeights, Weights
from jaxdistill.run import checkpoint, inputs
from jaxdistill.run.help import note
from jaxdistill.tasks.text_to_image import pipeline
from jaxdistill.tasks.text_to_image.checksums import Checksums, weights_of
from jaxdistill.tasks.text_to_image.data import prompts_of

PROMPTS = ("a photo of a cat", "a portrait of an old man", "a castle on a hill", "a bowl of fruit")
"""Where nobody gives others."""


@dataclass(frozen=True)
class Student:
    """A student as a run leaves it, or any pipeline folder.

    Attributes:
      path: as it was given.
      folder: its pipeline.
      unet: its weights.
      settings: how it is drawn.
      config: of its run, {} where it is not in a workdir.
      lora: the file of the updates that were trained, if it is a LoRA.
    """

    path: Path
    folder: Folder
    unet: Weights
    settings: Mapping[str, Any]
    config: Mapping[str, Any] = field(default_factory=dict)
    lora: Path | None = None

    @property
    def steps(self) -> list[int]:
        """The step counts that it is for; none where nobody has said so."""
        return list(pipeline.served(self.settings))

    @property
    def hint(self) -> str:
        """How it is used."""
        counts = diffusers_scheduler.one_of(self.steps) if self.steps else "few"
        family = self.folder.family
        guidance = self.settings.get("guidance", family.unguided)
        times = "sigmas from 1 to 1/steps" if "sigmas" in self.settings else "trailing timesteps"
        return f"{counts} steps, {'CFG' if family.original else 'guidance'} {guidance:g}, {times}"


def trained(path: Path, folder: Folder, params: Any, settings: Mapping[str, Any]) -> Student:
    """A run's student from its parameters, arrays or their shapes."""
    return Student(path, folder, TreeWeights(params), settings)


def open_student(path: str | Path) -> Student:
    """A run's student/ or diffusers/, or another pipeline folder.

    Raises FolderError, WeightsError or CheckpointError.
    """
    path = root = Path(path).expanduser()
    if is_file(path):
        raise FolderError(f"{path} is a file already; give a run's student/ or diffusers/ folder")
    settings = pipeline.made_for(path)
    unet: Weights | None = None
    if (path / "card.json").is_file():
        params, card = checkpoint.load_export(path)
        if "components" not in card:
            raise FolderError(
                f"{path} holds a {card.get('role', 'thing')} that reads no text; give a"
                " text-to-image student"
            )
        root = pipeline.components_of(path, card)
        unet = TreeWeights(torch_weights.restacked(params))
    folder = families.open_folder(root)
    unet = unet or folder.network.weights()
    config_file = root.parent / "config.json"
    config = diffusers_folder.read_json(config_file) if config_file.is_file() else {}
    file = root.parent / root.name.replace("diffusers", "lora", 1) / lora.FILE
    low = file if config and "lora" in file.parent.name and file.is_file() else None
    return Student(path, folder, unet, settings, config, low)


def open_teacher(student: Student, given: str, beside: Beside = NOTHING) -> Folder | None:
    """The checkpoint that was given or, without one, that the student's run names, with what the
    run named beside it where `beside` does not say otherwise; None without either.

    Raises FolderError where it is not there, has changed or has another UNet.
    """
    named = student.config.get("teacher", {})
    path = given or named.get("folder", "")
    if not path:
        return None
    if not given and not Path(path).expanduser().exists():
        raise FolderError(
            f"{path}, the teacher of {student.path}, is not there; give --teacher=PATH"
        )
    told: dict[str, Any] = {name: named[name] for name in FLAGS if name in named}
    told = {k: tuple(value) if isinstance(value, list) else value for k, value in told.items()}
    chosen = {k: value for k, value in asdict(beside).items() if value != getattr(NOTHING, k)}
    beside = Beside(**(told | chosen))
    found = single_file.open_checkpoint(path, beside)
    if found.network.module != student.folder.network.module:
        role = pipeline.role_of(found)
        raise FolderError(f"{path} has another {role} than {student.path}: it is not its teacher")
    checksums, workdir = Checksums(), student.folder.path.parent
    for name, part in {"vae": found.vae, **lora_names.components(found)}.items():
        weights = weights_of(name)
        if not given and not inputs.unchanged(workdir, weights, checksums.input(part)):
            raise FolderError(
                f"{weights} ({path}{' and its LoRAs' * bool(part.updates)}) have changed since"
                f" {student.path} was trained; put back what was there, or give --teacher=PATH"
            )
    return found


# ------------------------------------------------------------------------------------- one file


def write_file(
    student: Student, teacher: Folder | None, out: Path, *, dtype: str, others: str = KEEP
) -> None:
    """The whole checkpoint; arguments as of `single_file_out.entries`."""
    options = {"dtype": dtype, "others": others}
    tensors = single_file_out.entries(student.folder, student.unet, teacher=teacher, **options)
    made_for = {
        pipeline.KEY: json.dumps({**student.folder.scheduler, pipeline.KEY: student.settings})
    }
    single_file_out.write(out, tensors, spec_of(student, teacher) | made_for)


def size_of_file(student: Student, teacher: Folder, dtype: str) -> int:
    """Bytes of the tensors of that file. Raises WeightsError where it could not be written."""
    tensors = single_file_out.entries(student.folder, student.unet, dtype=dtype, teacher=teacher)
    return sum(entry.size for entry in tensors.values())


def spec_of(student: Student, teacher: Folder | None) -> dict[str, str]:
    """Modelspec's metadata of a student."""
    size = pipeline.image_size(
        student.folder, student.settings.get("height"), student.settings.get("width")
    )
    source = teacher or student.folder
    steps = f" in {student.steps[-1]} steps" if student.steps else ", few-step student"
    title = f"{Path(source.name).stem}{steps}"
    found = single_file_out.modelspec(
        student.folder, source, title=title, size=size, hint=student.hint
    )
    if skip := int(student.settings.get("clip_skip", 0)):
        found["modelspec.encoder_layer"] = str(skip + 1)  # counted as A1111 does
    return found


# ----------------------------------------------------------------------------------------- a LoRA


def write_lora(
    student: Student, factors: lora.Factors, out: Path, *, dtype: str, form: str
) -> None:
    """A LoRA's file in one of `lora.FORMATS`, and what its loader wants beside it."""
    spec = spec_of(student, None)
    if form == "diffusers":
        spec["modelspec.implementation"] = "diffusers"
    about = lora.metadata(student.folder, factors, spec)
    adapter = form == "diffusers" and student.folder.family.adapter
    form = "peft" if adapter else form
    tensors = lora.entries(factors, student.folder, dtype=dtype, form=form)
    single_file_out.write(out, tensors, about)
    if adapter:
        lora.write_config(out.parent, factors)


def check_format(student: Student, form: str, out: Path) -> None:
    """Raise UserError for a format ("checkpoint" or one of `lora.FORMATS`) that the student's
    family does not have, and for an `out` that its loader would not find.
    """
    family = student.folder.family
    if form != "diffusers" and not family.original:
        what = "LoRAs of Kohya's names" if form == "kohya" else "single files"
        raise UserError(
            f"--format={form}: of {family.name} no {what} are written; add --format=diffusers for"
            " a LoRA, and give programs the run's diffusers/ folder for the whole student"
        )
    if form != "diffusers" or not family.adapter:
        return
    if out.name != lora.ADAPTER:
        raise UserError(
            f"--out={out}: stock diffusers loads no LoRA of {family.name}, only PEFT does, from a"
            f" folder; give --out={out.with_suffix('') / lora.ADAPTER}"
        )
    if (config := out.with_name(lora.ADAPTER_CONFIG)).exists():
        raise UserError(f"{config} exists already; give --out another folder")


@dataclass(frozen=True)
class Distance:
    """Root-mean-square differences of pixels in [0, 1] from the student's pictures, all by its own
    sampler: of its teacher without and with the LoRA.
    """

    teacher: float
    lora: float


def distance(
    student: Student, teacher: Folder, factors: lora.Factors, prompts: Sequence[str], **options: Any
) -> Distance:
    """Draws one picture a prompt with the student, its teacher, and its teacher with the LoRA.

    `options`: of the pipeline's call. The three networks are in memory one after the other.
    """
    pipe = pipeline.load(student.path)
    part = pipe.folder.network
    base = teacher.network.weights()

    guidance = student.settings.get("guidance", pipe.folder.family.unguided)

    def drawn(weights: Weights | None) -> np.ndarray:
        if weights is not None:
            pipe.params = None
            pipe.params = torch_weights.load(
                weights,
                diffusers_folder.abstract_params(part),
                where=teacher.network.where,
                ignore=lambda name: True,
            )
        return pipe(prompts, guidance=guidance, **options)

    target = drawn(None)
    far, near = (
        float(np.sqrt(np.mean(np.square(drawn(weights) - target))))
        for weights in (base, lora.Merged(base, factors))
    )
    return Distance(teacher=far, lora=near)


def nearest(
    student: Student, teacher: Folder | None, rank: int, *, prompts: str, num: int
) -> lora.Factors:
    """The LoRA nearest to what a student has learned; prints what it is worth.

    Args:
      student: with all weights trained.
      teacher: what they were.
      rank: of the LoRA.
      prompts: file of prompts for pictures; "": the run's, where they are there.
      num: of pictures; 0 draws none.

    Raises UserError for a rank that no layer has, or without a teacher.
    """
    if teacher is None:
        raise UserError(f"{student.path} names no teacher; give --teacher=PATH")
    narrow = lora.check_rank(student.folder, rank)
    texts = _prompts(student, prompts)
    if narrow:
        print(f"held whole: {len(narrow)} layers narrower than {rank}, such as {narrow[0]}")
    count = len(lora.layer_widths(student.folder))
    note(f"{student.path}: decomposing {count} layers (about a second for each of an XL's)")
    found = lora.truncated(student.unet, teacher.network.weights(), student.folder, rank)
    worst = ", ".join(f"{layer} {share:.1%}" for layer, share in found.worst(3))
    print(f"kept: {found.share:.1%} of the squared difference of all weights")
    print(f"biases and norms, which a LoRA cannot hold: {found.rest / found.total:.1%} of it")
    print(f"most is lost in: {worst}")
    if num:
        drawn = [texts[i % len(texts)] for i in range(num)]
        rms = distance(student, teacher, found.factors, drawn)
        print(
            f"pictures: the teacher with the LoRA is {rms.lora:.4f} RMS from the student, without"
            f" it {rms.teacher:.4f}: {rms.lora / rms.teacher:.1%} is left"
        )
    return found.factors


def _prompts(student: Student, given: str) -> list[str]:
    named = given or student.config.get("data", {}).get("prompts", "")
    return prompts_of(named, "") if given or Path(named).is_file() else list(PROMPTS)
