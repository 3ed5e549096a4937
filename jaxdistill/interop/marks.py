"""What a single file's marks, or a flag, say of what its network predicts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from jaxdistill.errors import choose
from jaxdistill.interop import PREDICTIONS
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.recognise import Place, Shapes
from jaxdistill.interop.torch_weights import WeightFiles

KEYS = ("v_pred", "ztsnr")
"""Keys of no weights: the network predicts v; its schedule ends at zero SNR."""
EDM = "edm_"
"""What keys of another process begin with: Playground's edm_mean, CosXL's edm_vpred.sigma_max."""
SPEC = {
    "epsilon": "epsilon",
    "eps": "epsilon",
    "v": "v_prediction",
    "v_prediction": "v_prediction",
}
"""Of the metadata's modelspec.prediction_type -> of a scheduler's config."""
ARCHITECTURES = {
    "stable-diffusion-v2-512": "epsilon",
    "stable-diffusion-v2-768-v": "v_prediction",
}
"""Of the metadata's modelspec.architecture; others say nothing."""
SPREAD = 0.09
"""Of the bias below, ComfyUI's bound between the published 2.x models of noise and of v."""
BIAS = {
    "": "output_blocks.11.1.transformer_blocks.0.norm1.bias",
    "diffusers": "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias",
}


class Told(NamedTuple):
    """prediction: a scheduler's prediction_type; zero_snr: at the schedule's end; reason: what
    says so.
    """

    prediction: str
    zero_snr: bool
    reason: str

    @property
    def short(self) -> str:
        """For messages."""
        what = {"epsilon": "noise (eps)", "v_prediction": "v"}[self.prediction]
        return f"predicts {what}{', with zero terminal SNR' * self.zero_snr}: {self.reason}"

    def scheduler(self, base: Mapping[str, Any], *, published: bool) -> dict[str, Any]:
        """A scheduler's config with it. A published one is our choice: where it ends at zero SNR,
        its times begin there, and PNDM gives way to DDIM, which has such an end.
        """
        found = {**base, "prediction_type": self.prediction}
        if self.zero_snr:
            found["rescale_betas_zero_snr"] = True
            if published:
                found["timestep_spacing"] = "trailing"
                if base["_class_name"] == "PNDMScheduler":
                    found["_class_name"] = "DDIMScheduler"
        elif self.prediction == "epsilon" and base.get("rescale_betas_zero_snr"):
            found["rescale_betas_zero_snr"] = False  # noise cannot be divided by a zero
        return found


def told(path: Path, shapes: Shapes, metadata: Mapping[str, str], flag: str) -> Told | None:
    """What a file's marks say, or the flag, which wins over them; None where nothing does.

    Raises FolderError for marks that disagree or are not known, and for a process without betas.
    """
    if other := next((name for name in sorted(shapes) if name.startswith(EDM)), ""):
        raise FolderError(
            f"{path} was trained on an EDM schedule (its key {other}), which is not supported; only"
            " models of Stable Diffusion's own schedule are"
        )
    flags = choose(PREDICTIONS, flag, "--prediction (config.teacher.prediction)") if flag else None
    marks = _marks(path, shapes, metadata, strict=not flag)
    zero = "ztsnr" in shapes
    if flags is not None:
        prediction, ztsnr = flags
        against = [text for found, text in marks if found != prediction]
        reason = f"--prediction={flag} says so{', against ' * bool(against)}{' and '.join(against)}"
        return Told(prediction, ztsnr or (zero and prediction != "epsilon"), reason)
    if not marks:
        if zero:
            raise FolderError(
                f"{path} has the key ztsnr and nothing that says what it predicts; add"
                " --prediction=v_ztsnr if it is v"
            )
        return None
    if len({found for found, _ in marks}) > 1:
        raise FolderError(
            f"{path} disagrees with itself on what it predicts"
            f" ({' against '.join(text for _, text in marks)}); say which is right with"
            " --prediction=eps or v, in a config config.teacher.prediction"
        )
    if zero and marks[0][0] == "epsilon":
        raise FolderError(
            f"{path} disagrees with itself: its key ztsnr wants v, but {marks[0][1]} says noise;"
            " say which is right with --prediction=eps or v_ztsnr, in a config"
            " config.teacher.prediction"
        )
    return Told(marks[0][0], zero, " and ".join(text for _, text in marks) + " says so")


def _marks(
    path: Path, shapes: Shapes, metadata: Mapping[str, str], *, strict: bool
) -> list[tuple[str, str]]:
    """[(prediction, what says so)]."""
    found = [("v_prediction", "its key v_pred")] if "v_pred" in shapes else []
    spec = metadata.get("modelspec.prediction_type", "")
    if spec in SPEC:
        found.append((SPEC[spec], f"its modelspec.prediction_type = {spec!r}"))
    elif spec and strict:
        raise FolderError(
            f"{path}: modelspec.prediction_type = {spec!r} in its metadata is not supported, only"
            f" {' or '.join(map(repr, SPEC))}"
        )
    kind = metadata.get("modelspec.architecture", "")
    if kind in ARCHITECTURES:
        found.append((ARCHITECTURES[kind], f"its modelspec.architecture = {kind!r}"))
    return found


def assumed(path: Path, shapes: Shapes, place: Place, family: str) -> Told:
    """What is taken where nothing says it: noise; of 2.x what a bias of the network suggests."""
    other = "; --prediction=v names the other"
    name = place.prefix + BIAS[place.names]
    if family != "sd21" or name not in shapes:
        return Told("epsilon", False, f"assumed, as no mark says otherwise{other}")
    spread = float(WeightFiles([path]).read(name).astype("float32").std())
    found, side = ("v_prediction", "above") if spread > SPREAD else ("epsilon", "below")
    other = other.replace("=v", "=eps") if found != "epsilon" else other
    reason = f"guessed, as no mark says it and a bias of its last attention spreads by {spread:.3f}"
    return Told(found, False, f"{reason}, {side} {SPREAD}{other}")
