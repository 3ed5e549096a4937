"""Text to image from a pipeline folder or a student's export: prompts in, images out."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxdistill import partition, sampling
from jaxdistill.errors import NotFinite
from jaxdistill.interop import (
    NOTHING,
    Beside,
    card,
    diffusers_folder,
    diffusers_scheduler,
    is_file,
    single_file,
    torch_weights,
)
from jaxdistill.interop.clip_tokenizer import say_cut
from jaxdistill.interop.diffusers_folder import Folder, FolderError
from jaxdistill.interop.diffusers_scheduler import Run, Scheduler
from jaxdistill.interop.known_students import Described, Known
from jaxdistill.interop.recognise import read_header
from jaxdistill.models.text.clip import CLIPText
from jaxdistill.run import checkpoint

SETTINGS = "jaxdistill.json"
"""What a student's folder says beyond diffusers' own files: {"steps", "guidance", "height",
"width", "clip_skip", "timesteps" or "sigmas" of each number of steps, "noise_correction"}.
"""
KEY = diffusers_folder.KEY
"""Of a student's scheduler_config.json: these but the last. Diffusers' `save_pretrained` keeps such
a key, and drops SETTINGS.
"""

LINES = 8
"""About prompts that are cut, at most, of a loaded pipeline."""


def check_finite(values: Array | np.ndarray, component: str, dtype: Any) -> None:
    """Raise NotFinite where a component, computing in `dtype`, gives values that are no numbers."""
    if bool(jnp.isfinite(values).all()):
        return
    half = jnp.finfo(dtype).bits < 32
    mend = (
        f"it computes in {np.dtype(dtype)}, whose range it may leave: take --dtype=float32, in a"
        " run config.compute.dtype=float32"
        if half
        else "its weights are finite, but do not work: give another checkpoint, or lower the"
        " guidance"
    )
    raise NotFinite(f"{component} gives values that are not finite (NaN or infinite); {mend}")


def dtype_of(encoder: diffusers_folder.Part, dtype: Any = np.float32) -> Any:
    """Of the parameters of a text encoder: see `TextEncoders`."""
    return dtype if isinstance(encoder.module, CLIPText) else encoder.module.dtype


class TextEncoders:
    """The frozen text side of a folder: prompts -> the network's conditioning.

    T5's and Qwen's parameters, 5 and 4 billions, are kept in the type of the computation, CLIP's in
    `dtype`. Raises as `Family.open_tokenizers`.
    """

    def __init__(self, folder: Folder, *, dtype: Any = np.float32) -> None:
        self.folder = folder
        self.tokenizers = folder.family.open_tokenizers(folder)
        self.dtype = folder.text_encoders[0].module.dtype
        self.params = [
            diffusers_folder.load_params(part, dtype=dtype_of(part, dtype))
            for part in folder.text_encoders
        ]
        self._said: set[tuple[int, str]] = set()
        self._lines = 0
        self._encode = jax.jit(folder.family.encode(folder), static_argnums=3)

    def __call__(
        self, prompts: Sequence[str], *, batch_size: int = 16, skip: int | None = None
    ) -> dict[str, np.ndarray]:
        """The network's conditioning, float32 [n, ...] each; says on stderr what of a long prompt
        is cut. `skip` layers at the end are left out, the folder's clip_skip if None.

        Raises UserError for a prompt that is no text.
        """
        found = [tokenizer(prompts) for tokenizer in self.tokenizers]
        for length, (number, whose) in self._bounds().items():
            self._say(prompts, found[number].cut, length, whose)
        for part, tokens, path in zip(
            self.folder.text_encoders, found, self.folder.tokenizers, strict=True
        ):
            if tokens.ids.max() >= part.module.vocab_size:
                raise ValueError(
                    f"{path} gives the token {tokens.ids.max()}, but its encoder knows"
                    f" {part.module.vocab_size}; words that were added to a tokenizer need the"
                    " text encoder that was saved with them"
                )
        size = min(batch_size, len(prompts))
        skip = self.folder.clip_skip if skip is None else skip
        parts = []
        for i in range(0, len(prompts), batch_size):
            rows = range(i, min(i + batch_size, len(prompts)))
            ids = [np.resize(t.ids[rows], (size, t.ids.shape[1])) for t in found]
            masks = [np.resize(t.mask[rows], (size, t.mask.shape[1])) for t in found]
            made = self._encode(self.params, ids, masks, skip)
            encoded = {k: np.asarray(v)[: len(rows)] for k, v in made.items()}
            for values in encoded.values():
                check_finite(values, "the text encoder", self.dtype)
            parts.append(encoded)
        return {k: np.concatenate([p[k] for p in parts]) for k in parts[0]}

    def _bounds(self) -> dict[int, tuple[int, str]]:
        """{length of texts: number of a tokenizer of it, words for whose it is}, the longest first;
        no words where all have one length.
        """
        names: dict[int, list[str]] = {}
        for name, tokenizer in zip(self.folder.encoder_names, self.tokenizers, strict=True):
            names.setdefault(tokenizer.length, []).append(name)
        found, longer = {}, ""
        for length, those in sorted(names.items(), reverse=True):
            number = self.folder.encoder_names.index(those[0])
            listed = " and ".join(those)
            found[length] = (number, f" in {listed}{longer}" if len(names) > 1 else "")
            longer = longer or f" ({listed} {'reads' if len(those) == 1 else 'read'} {length})"
        return found

    def _say(self, prompts: Sequence[str], cut: Sequence[str], length: int, whose: str) -> None:
        """Each prompt that is cut is said once, in at most LINES lines: a server sees many."""
        pairs = zip(prompts, cut, strict=True)
        new = {p: c for p, c in pairs if c and (length, p) not in self._said}
        if not new or self._lines == LINES:
            return
        self._said.update((length, prompt) for prompt in new)
        self._lines += 1
        last = "; more such prompts are not said" if self._lines == LINES else ""
        say_cut(new, length, whose=whose, more=last)

    def announce(self, prompts: Sequence[str]) -> None:
        """One line for all of these prompts that are cut at one length, before they are encoded in
        parts.

        Raises UserError for a prompt that is no text.
        """
        for length, (number, whose) in self._bounds().items():
            cut: list[str] = []
            for i in range(0, len(prompts), 4096):
                cut += self.tokenizers[number](prompts[i : i + 4096]).cut
            self._say(prompts, cut, length, whose)

    def negative(self, prompt: str | None) -> dict[str, np.ndarray]:
        """The conditioning of one negative prompt, [1, ...]; None is the pipeline's own: zeros for
        XL where its index says so. Stock pipelines leave no layer out here.
        """
        encoded = self([prompt or ""], skip=0)
        return (
            {k: np.zeros_like(v) for k, v in encoded.items()}
            if prompt is None and self.folder.zero_empty_prompt
            else encoded
        )


def with_null(
    null: Mapping[str, Array | np.ndarray], cond: Mapping[str, Array]
) -> dict[str, Array]:
    """A batch's conditioning with the negative prompt's [1, ...] in the place of its own; what
    `null` does not name, as time ids, stays.
    """
    return {
        name: jnp.broadcast_to(null[name], value.shape) if name in null else value
        for name, value in cond.items()
    }


# ------------------------------------------------------------------------------------------- images


def decode_tiled(
    decode: Callable[[Array], Array], z: Array, *, tile: int, overlap: int, factor: int
) -> Array:
    """Decode latents [b, h, w, c] in overlapping tiles of `tile` latents a side, blended linearly
    over `overlap` latents.

    All tiles have one shape; the last of a row or column is moved inside. Memory grows with a tile,
    not with the image. Raises ValueError unless 0 < overlap <= tile / 2.
    """
    if not 0 < overlap <= tile // 2:
        raise ValueError(f"overlap must be in 1..{tile // 2} for tiles of {tile}, got {overlap}")
    b, h, w, _ = z.shape

    def starts(size: int) -> list[int]:
        last = max(size - tile, 0)
        return sorted({*range(0, last, tile - overlap), last})

    def ramp(size: int) -> np.ndarray:
        pixels = min(tile, size) * factor
        edge = np.minimum(np.arange(pixels) + 0.5, pixels - np.arange(pixels) - 0.5) / (
            overlap * factor
        )
        return np.clip(edge, 1e-3, 1.0).astype(np.float32)

    weight = jnp.asarray(ramp(h)[:, None] * ramp(w)[None, :])[..., None]
    total, weights = (
        jnp.zeros((b, h * factor, w * factor, 3)),
        jnp.zeros((1, h * factor, w * factor, 1)),
    )
    for y in starts(h):
        for x in starts(w):
            part = decode(z[:, y : y + tile, x : x + tile])
            area = (
                slice(None),
                slice(y * factor, y * factor + part.shape[1]),
                slice(x * factor, x * factor + part.shape[2]),
            )
            total, weights = total.at[area].add(part * weight), weights.at[area].add(weight)
    return total / weights


def image_size(folder: Folder, height: int | None, width: int | None) -> tuple[int, int]:
    """Pixels; None is the checkpoint's own.

    Raises ValueError where a side does not divide into latents, and these into patches, or the
    network has no positions for it.
    """
    largest = folder.family.largest(folder)
    native, multiple = folder.family.native_size(folder), folder.family.multiple(folder)
    found = [
        side if given is None else given
        for given, side in zip((height, width), native, strict=True)
    ]
    for name, side in zip(("height", "width"), found, strict=True):
        if side < multiple or side % multiple:
            raise ValueError(f"{name} must be a positive multiple of {multiple}, got {side}")
        if 0 < largest < side:
            raise ValueError(
                f"{name} must be at most {largest}, where the network's positions end, got {side}"
            )
    return found[0], found[1]


class Inputs(NamedTuple):
    """What the steps of a run share: starts [b, h, w, c], conditioning, null conditioning of one
    row, and the scale.
    """

    noise: Array
    cond: Any
    null: Any
    guidance: Any


class Stepper(NamedTuple):
    """One network call and the solver's step, as a program. The loop over the times is Python's:
    one program serves every number of steps.
    """

    folder: Folder
    scheduler: Scheduler
    layout: partition.Layout | None

    def step(
        self, params: Any, state: Any, inputs: Inputs, t: Array, t_next: Array, *, guided: bool
    ) -> Any:
        """The solver's state at t_next."""
        network, cond = self.folder.network.module, inputs.cond
        if self.layout is not None:
            params = self.layout.gathered(params, network.dtype)
        if network.takes_guidance:
            cond = {**cond, "guidance": jnp.full(inputs.noise.shape[:1], inputs.guidance)}
        denoiser = sampling.guided_denoiser(
            network.apply,
            params,
            cond,
            schedule=self.scheduler.schedule,
            parameterization=self.scheduler.parameterization,
            null_cond=partial(with_null, inputs.null),
            scale=self.folder.family.cfg_scale(inputs.guidance) if guided else 1.0,
            shared=True,
        )
        with partition.on_mesh(self.layout):
            return self.scheduler.advance(denoiser, state, inputs.noise, t, t_next)


class TextToImage:
    """A loaded pipeline. Programs are compiled once a shape and kept.

    With a `layout`, on whose mesh `network_params` are, it draws on all of its devices, each
    `batch_size` images at once.
    """

    def __init__(
        self,
        folder: Folder,
        network_params: Any,
        scheduler: Scheduler,
        *,
        settings: Mapping[str, Any] | None = None,
        param_dtype: Any = np.float32,
        tile: int = 0,
        share: "TextToImage | None" = None,
        layout: partition.Layout | None = None,
    ) -> None:
        self.folder, self.scheduler, self.layout = folder, scheduler, layout
        self.params = network_params
        self.settings, self.tile = dict(settings or {}), tile
        self.network, self.vae = folder.network.module, folder.vae.module
        self.text: TextEncoders = share.text if share else TextEncoders(folder, dtype=param_dtype)
        self.vae_params: Any = (
            share.vae_params
            if share
            else diffusers_folder.load_params(folder.vae, dtype=param_dtype)
        )
        self.advance = jax.jit(self._step, static_argnames="guided")
        self._decode: Callable[..., Array] = (
            share._decode if share else jax.jit(partial(self._vae, "decode"))
        )
        self._encode: Callable[..., Array] = (
            share._encode if share else jax.jit(partial(self._vae, "encode"))
        )

    # -- settings

    @property
    def role(self) -> str:
        """The network that is distilled, for messages."""
        return f"the {role_of(self.folder)}"

    @property
    def steps(self) -> int:
        """The default number of steps."""
        return int(self.settings.get("steps", self.folder.family.steps))

    @property
    def guidance(self) -> float:
        """The default guidance scale."""
        return float(self.settings.get("guidance", self.folder.family.guidance))

    def check(self, **call: Any) -> tuple[int, int]:
        """Height and width of the images that such a call draws; see `check_call`."""
        return check_call(self.folder, self.scheduler, self.settings, **call)

    def unread(self, *, guidance: float | None, negative_prompt: str | None) -> str:
        """What of a call this model does not read, in words, or "". None is what was not asked."""
        if self.guides(np.inf):
            return ""
        if guidance is not None and not self.network.takes_guidance:
            return f"guidance = {guidance:g}: its network has no such input"
        if negative_prompt is not None and self.folder.family.negative:  # else it is refused
            return "a negative prompt: its guidance scale is an input of the network"
        return ""

    def guides(self, scale: float) -> bool:
        """Whether each step has a second call without the prompt at this scale."""
        return self.folder.family.guides(self.folder, scale)

    # -- devices

    @property
    def parts(self) -> int:
        """Of a batch: the devices that draw side by side."""
        return 1 if self.layout is None else partition.parts(self.layout.mesh)

    def place(self, rows: np.ndarray) -> Array:
        """Rows, a multiple of `parts`, divided among the devices."""
        return (
            jnp.asarray(rows)
            if self.layout is None
            else jax.device_put(rows, partition.batch_sharding(self.layout.mesh))
        )

    # -- programs

    def _step(self, *arguments: Any, guided: bool) -> Any:
        return Stepper(self.folder, self.scheduler, self.layout).step(*arguments, guided=guided)

    def _vae(self, method: str, params: Any, x: Array) -> Any:
        with partition.on_mesh(self.layout):
            return self.vae.apply(params, x, method=method)

    def encode(self, images: np.ndarray) -> np.ndarray:
        """Images float32 [b, h, w, 3] in [-1, 1] -> scaled latents float32 [b, h / f, w / f, c]."""
        rows = np.arange(-(-len(images) // self.parts) * self.parts) % len(images)
        latents = self._encode(self.vae_params, self.place(images[rows]))
        check_finite(latents, "the VAE's encoder", self.vae.dtype)
        return np.asarray(latents, np.float32)[: len(images)]

    def decode(self, latents: Array) -> np.ndarray:
        """Latents [b, h, w, c] -> images float32 [b, f h, f w, 3] in [0, 1]; in tiles where that
        was asked for. Raises NotFinite.
        """
        tile = self.tile
        check_finite(latents, self.role, self.network.dtype)
        if tile and max(latents.shape[1:3]) > tile:
            images = decode_tiled(
                lambda z: self._decode(self.vae_params, z),
                latents,
                tile=tile,
                overlap=max(1, tile // 4),
                factor=self.vae.factor,
            )
        else:
            images = self._decode(self.vae_params, latents)
        check_finite(images, "the VAE's decoder", self.vae.dtype)  # to_unit would hide infinity
        return np.asarray(card.to_unit(images))

    def decoded(self, latents: np.ndarray, *, batch_size: int = 4) -> np.ndarray:
        """As `decode` of latents on the host, so many at once on each device."""
        count = len(latents)
        block = min(batch_size, count) * self.parts
        rows = (np.arange(i, i + block) % count for i in range(0, count, block))
        return np.concatenate([self.decode(self.place(latents[part])) for part in rows])[:count]

    def draw(self, seed: int, start: int, count: int, height: int, width: int) -> np.ndarray:
        """Standard normal latents [count, h, w, c]; the one of image i is a function of (seed,
        start + i).
        """
        shape = (height // self.vae.factor, width // self.vae.factor, self.network.in_channels)
        return np.asarray(card.draw_noise(seed, start, count, shape))

    def __call__(
        self,
        prompts: Sequence[str],
        *,
        negative_prompt: str | None = None,
        steps: int | None = None,
        guidance: float | None = None,
        height: int | None = None,
        width: int | None = None,
        seed: int = 0,
        start: int = 0,
        batch_size: int = 4,
        latents: np.ndarray | None = None,
        decode: bool = True,
    ) -> np.ndarray:
        """Images float32 [n, height, width, 3] in [0, 1], one a prompt; or the scaled latents [n,
        h, w, c] that the decoder would get.

        Args:
          prompts: n texts.
          negative_prompt: what guidance leads away from; None is the pipeline's own.
          steps: of the sampler; None is the folder's.
          guidance: scale, as the stock pipeline means it (`Family.guides`).
          height: pixels; None is the student's or the checkpoint's own.
          width: likewise.
          seed: image i is a function of (seed, start + i) and its prompt.
          start: number of the first image.
          batch_size: images at once, on each device.
          latents: starts float32 [n, c, h, w], or as the stock pipeline has them, standard normal,
            instead of the seed's.
          decode: False leaves the decoder out.

        Raises:
          ValueError: a size, number of steps, scale or latents that do not fit.
          NotFinite: text, latents or images are no numbers; names the component.
        """
        if not prompts:
            raise ValueError("at least one prompt is needed")
        height, width = self.check(
            steps=steps,
            guidance=guidance,
            height=height,
            width=width,
            batch_size=batch_size,
            negative_prompt=negative_prompt,
            latents=latents,
            count=len(prompts),
        )
        steps = self.steps if steps is None else steps
        guidance = self.guidance if guidance is None else guidance
        run = self.scheduler.run(steps, self.folder.family.image_tokens(self.folder, height, width))
        if latents is None:
            noise = self.draw(seed, start, len(prompts), height, width)
        else:
            noise = starts_of(self.folder, latents, len(prompts), (height, width))
        cond = self.text(prompts)
        null = self.text.negative(negative_prompt) if self.guides(guidance) else {}
        for name, values in self.folder.family.at_size(self.folder, height, width).items():
            cond[name] = np.tile(values, (len(prompts), 1))
        found, block = [], min(batch_size, len(prompts)) * self.parts
        for i in range(0, len(prompts), block):
            # The last block is filled up, so that one program serves all.
            rows = np.arange(i, i + block) % len(prompts)
            part = {k: self.place(v[rows]) for k, v in cond.items()}
            x = self._sampled(self.place(noise[rows]), part, null, run, guidance)
            if decode:
                found.append(self.decode(x))
            else:
                check_finite(x, self.role, self.network.dtype)
                found.append(np.asarray(x))
        return np.concatenate(found)[: len(prompts)]

    def _sampled(self, starts: Array, cond: Any, null: Any, run: Run, guidance: float) -> Array:
        """The latents to which a scheduler's run leads from these starts, one block of rows."""
        inputs, guided = Inputs(starts, cond, null, np.float32(guidance)), self.guides(guidance)
        state = self.scheduler.begin(starts, run)
        for t, t_next in zip(run.times, run.next_times, strict=True):
            state = self.advance(self.params, state, inputs, t, t_next, guided=guided)
        return state.x


def check_call(
    folder: Folder,
    scheduler: Scheduler,
    settings: Mapping[str, Any],
    *,
    steps: int | None = None,
    guidance: float | None = None,
    height: int | None = None,
    width: int | None = None,
    batch_size: int = 1,
    negative_prompt: str | None = None,
    latents: np.ndarray | None = None,
    count: int = 1,
) -> tuple[int, int]:
    """Height and width of the images that a call of a `TextToImage` of these draws; nothing is
    computed, and no weights are needed. `count`: of its prompts. Raises ValueError as the call.
    """
    family = folder.family
    if negative_prompt is not None and not family.negative:
        raise ValueError(
            "a negative prompt has no effect: this network is called once a step, and its"
            " guidance is no second call; leave it out"
        )
    card.check_guidance(settings.get("guidance", family.guidance) if guidance is None else guidance)
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    made = settings.get("height"), settings.get("width")
    height, width = (m if g is None else g for g, m in zip((height, width), made, strict=True))
    size = image_size(folder, height, width)
    steps = int(settings.get("steps", family.steps)) if steps is None else steps
    scheduler.run(steps, family.image_tokens(folder, *size))
    if latents is not None:
        starts_of(folder, latents, count, size)
    return size


def starts_of(folder: Folder, latents: np.ndarray, count: int, size: tuple[int, int]) -> np.ndarray:
    """Starts of so many images of that size as float32 [n, h, w, c]. Raises ValueError."""
    height, width = (side // folder.vae.module.factor for side in size)
    shape = (count, folder.network.module.in_channels, height, width)
    return check_latents(folder.family.unpacked(latents, shape), shape)


def check_latents(latents: np.ndarray, shape: tuple[int, int, int, int]) -> np.ndarray:
    """NCHW starts as NHWC float32.

    Raises ValueError where they are no finite float array of `shape` [n, c, h, w].
    """
    if latents.dtype.kind != "f" or latents.shape != shape:
        raise ValueError(
            f"latents must be float32 of shape {list(shape)} [n, c, h, w], got {latents.dtype}"
            f" {list(latents.shape)}"
        )
    if not np.isfinite(latents).all():
        raise ValueError("latents must be finite")
    return latents.astype(np.float32).transpose(0, 2, 3, 1)


def every_device() -> partition.Layout | None:
    """All devices side by side, to draw on; None for a single one."""
    return partition.layout() if jax.device_count() > 1 else None


def served(settings: Mapping[str, Any]) -> tuple[int, ...]:
    """The step counts of a student's settings."""
    return tuple(sorted(int(n) for n in settings.get("timesteps", settings.get("sigmas", {}))))


def unlike(
    settings: Mapping[str, Any],
    *,
    steps: int,
    guidance: float | None,
    size: tuple[int | None, int | None],
) -> str:
    """What of a call a student of these settings was not made for, in words, or "".

    guidance, and each side of the size: None is the student's own.
    """
    counts, found = served(settings), []
    if not counts:
        return ""
    if steps not in counts:
        found.append(f"{diffusers_scheduler.one_of(counts)} steps, not {steps}")
    own = float(settings.get("guidance", 1.0))
    # At 1 or less, where a student has 1, there is no guidance.
    if guidance is not None and (guidance > 1.0 if own == 1.0 else guidance != own):
        found.append(f"guidance {own:g}, not {guidance:g} (it is distilled in)")
    made = (settings.get("height"), settings.get("width"))
    drawn = tuple(m if side is None else side for side, m in zip(size, made, strict=True))
    if all(made) and drawn != made:
        found.append(f"{made[0]}x{made[1]} pixels (height, width), not {drawn[0]}x{drawn[1]}")
    return f"made for {'; '.join(found)}" if found else ""


def components_of(root: Path, exported: Mapping[str, Any]) -> Path:
    """The pipeline folder that an export's card names. Raises FolderError where there is none."""
    if "components" not in exported:
        role = exported.get("role", "thing")
        raise FolderError(
            f"{root} holds a {role} that reads no text; give a pipeline folder or a text-to-image"
            " student"
        )
    found = (root / exported["components"]).resolve()
    if not found.is_dir():
        raise FolderError(
            f"{root} holds a student's network alone, and its other components are not at {found};"
            " copy that folder beside it, or give it instead"
        )
    return found


def role_of(folder: Folder) -> str:
    """The network that is distilled, for messages."""
    return {"unet": "UNet"}.get(folder.family.network, folder.family.network)


def made_for(path: str | Path) -> dict[str, Any]:
    """What a student's folder, export or file says that it was made for, as of SETTINGS; {} of
    others.

    Raises FolderError.
    """
    root, found = Path(path).expanduser(), {}
    if is_file(root):
        made: dict[str, Any] = single_file.student_scheduler(root, read_header(root)[1])
        return dict(made.get(KEY, {}))
    if (root / "card.json").is_file():
        exported = diffusers_folder.read_json(root / "card.json")
        if "components" in exported:
            found, root = exported["sampler"], components_of(root, exported)
    scheduler = root / "scheduler" / "scheduler_config.json"
    kept = diffusers_folder.read_json(scheduler).get(KEY, {}) if scheduler.is_file() else {}
    own = diffusers_folder.read_json(root / SETTINGS) if (root / SETTINGS).is_file() else {}
    return {**kept, **own, **found}


def load(
    path: str | Path,
    *,
    beside: Beside = NOTHING,
    known: Known | Described | None = None,
    attention: str = "auto",
    dtype: Any = jnp.float32,
    param_dtype: Any = np.float32,
    grid: str | None = None,
    solver: str | None = None,
    noise_correction: bool | None = None,
    tile: int = 0,
    scan: bool = False,
    layout: partition.Layout | None = None,
    call: Mapping[str, Any] | None = None,
) -> TextToImage:
    """A pipeline from a diffusers folder, or from a student's export whose card names the folder of
    its other components.

    Args:
      path: the folder, or a single file.
      beside: what is named beside it.
      known: the kind of a published student, or what is said beside a LoRA, instead of the
        folder's scheduler and settings.
      attention: a key of `attention.ATTENTION`.
      dtype: of the computation.
      param_dtype: of the parameters.
      grid: instead of the folder's timestep spacing.
      solver: instead of the folder's scheduler class.
      noise_correction: instead of the folder's.
      tile: decode in tiles of so many latents a side where an image is larger; 0 never does.
      scan: run the transformer blocks of a level as a loop; an export is read as it was trained.
      layout: draw on all devices of its mesh, as `every_device`.
      call: what it will be asked for, as of `check_call`: refused before weights are read.

    Raises:
      ValueError: of `check_call`.
      FolderError, WeightsError, CheckpointError: what cannot be read, in one line.
    """
    root, params, settings = Path(path).expanduser(), None, made_for(path)
    if (root / "card.json").is_file():
        params, exported = checkpoint.load_export(root)
        params = torch_weights.restacked(params)
        scan, root = bool(exported.get("stacked")), components_of(root, exported)
    folder = single_file.open_checkpoint(root, beside, attention=attention, dtype=dtype, scan=scan)
    if params is not None and folder.network.updates:
        raise FolderError(f"{path} is an export, to which no LoRA is added; give {root}")
    if known is not None:
        kept = ("height", "width", "clip_skip")
        settings = {k: v for k, v in settings.items() if k in kept} | known.settings(folder)
    if not folder.clip_skip:
        folder = folder._replace(clip_skip=int(settings.get("clip_skip", 0)))
    if noise_correction is None:
        noise_correction = settings.get("noise_correction")
    # Read first: what is not supported should not cost the reading of the weights.
    read = diffusers_scheduler.of_folder if known is None else known.scheduler
    grid = grid or ("trailing" if "sigmas" in settings else None)
    scheduler = read(folder, grid=grid, solver=solver, noise_correction=noise_correction)
    folder.family.open_tokenizers(folder)
    if call is not None:
        check_call(folder, scheduler, settings, **call)
    diffusers_folder.check_weights(folder.vae, *folder.text_encoders)
    if params is None:
        params = diffusers_folder.load_params(folder.network, dtype=param_dtype)
    params = params if layout is None else layout.place(params)
    return TextToImage(
        folder,
        params,
        scheduler,
        settings=settings,
        param_dtype=param_dtype,
        tile=tile,
        layout=layout,
    )
