"""What a user is told of families of pipelines: refusals, prompts that are cut, and settings that a
network does not read.
"""

import json
import types

import numpy as np
import pytest

from jaxdistill.interop import architectures, families, flow_scheduler, how_to_sample
from jaxdistill.interop.clip_tokenizer import Tokens
from jaxdistill.interop.diffusers_folder import FolderError
from jaxdistill.interop.known_students import Described, known
from jaxdistill.tasks.text_to_image import pipeline

CLIP, T5 = ["transformers", "CLIPTextModelWithProjection"], ["transformers", "T5EncoderModel"]
SD3 = {
    "_class_name": "StableDiffusion3Pipeline",
    "transformer": ["diffusers", "SD3Transformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
    "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
    "text_encoder": CLIP,
    "text_encoder_2": CLIP,
    "text_encoder_3": T5,
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "tokenizer_2": ["transformers", "CLIPTokenizer"],
    "tokenizer_3": ["transformers", "T5TokenizerFast"],
}
NULL = [None, None]


def published(name):
    return architectures.folder(architectures.PIPELINES[name])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"_class_name": "CogView4Pipeline"}, "'CogView4Pipeline' is not supported, only Stable"),
        ({"_class_name": "FluxFillPipeline"}, "is of inpainting; it is not supported"),
        ({"_class_name": "FluxKontextPipeline"}, "is of editing by instructions"),
        ({"_class_name": "FluxControlPipeline"}, "is of pictures from a control image"),
        ({"_class_name": "FluxImg2ImgPipeline"}, "then save them as FluxPipeline"),
        (
            {"_class_name": "StableDiffusion3Img2ImgPipeline"},
            "then save them as StableDiffusion3Pipeline",
        ),
        ({"_class_name": "StableDiffusionImg2ImgPipeline"}, "save them as StableDiffusionPipeline"),
        (
            {"text_encoder": NULL, "tokenizer": NULL},
            "names no text_encoder, which StableDiffusion3Pipeline needs"
            " (CLIPTextModelWithProjection); only text_encoder_3 may be left out",
        ),
        ({"tokenizer_3": NULL}, "names no tokenizer_3, which StableDiffusion3Pipeline needs"),
        ({"text_encoder_2": T5}, "text_encoder_2 is of class 'T5EncoderModel'; only CLIPText"),
        (
            {"transformer": ["diffusers", "FluxTransformer2DModel"]},
            "transformer is of class 'FluxTransformer2DModel'; only SD3Transformer2DModel",
        ),
    ],
)
def test_a_pipeline_that_is_not_known_or_not_whole_is_refused(changes, message, tmp_path):
    (tmp_path / "model_index.json").write_text(json.dumps(SD3 | changes))
    with pytest.raises(FolderError) as told:
        families.open_folder(tmp_path)
    line = str(told.value)
    assert message in line and str(tmp_path) in line and "\n" not in line


class Words:
    """A tokenizer of words."""

    def __init__(self, length):
        self.length = length

    def __call__(self, texts):
        cut = [" ".join(text.split()[self.length :]) for text in texts]
        shape = (len(texts), self.length)
        return Tokens(np.zeros(shape, np.int32), np.ones(shape, bool), cut)


def encoders(*lengths):
    """Those of a folder, without weights."""
    made = object.__new__(pipeline.TextEncoders)
    names = ("text_encoder", "text_encoder_2", "text_encoder_3")[: len(lengths)]
    made.folder = types.SimpleNamespace(encoder_names=names)
    made.tokenizers = [Words(length) for length in lengths]
    made._said, made._lines = set(), 0
    return made


def test_each_length_of_encoders_says_what_it_cuts(capsys):
    encoders(2, 2, 4).announce(["a b", "a b c", "a b c d e"])
    longest, shorter = capsys.readouterr().err.splitlines()
    assert "a prompt has more than 4 tokens" in longest and "without 'e'" in longest
    assert "in text_encoder_3:" in longest
    assert "2 prompts have more than 2 tokens" in shorter and "without 'c'" in shorter
    assert "in text_encoder and text_encoder_2 (text_encoder_3 reads 4):" in shorter


def test_encoders_of_one_length_say_it_once(capsys):
    made = encoders(2, 2)
    made.announce(["a b c"])
    made.announce(["a b c"])
    (line,) = capsys.readouterr().err.splitlines()
    assert "more than 2 tokens, and the rest is cut off: 'a b c'... without 'c'" in line


@pytest.mark.parametrize(
    ("name", "guidance", "message"),
    [
        ("flux-schnell", 3.5, "guidance = 3.5: its network has no such input"),
        ("flux-schnell", None, ""),
        ("flux-dev", 3.5, ""),
        ("sd3-medium", 7.0, ""),
        ("zimage", 0.0, ""),
        ("sd15", 7.5, ""),
    ],
)
def test_a_scale_that_no_network_reads_is_said(name, guidance, message):
    pipe = object.__new__(pipeline.TextToImage)
    pipe.folder = published(name)
    pipe.network = pipe.folder.network.module
    assert pipe.unread(guidance=guidance, negative_prompt=None) == message


def described(tmp_path, folder, guidance=1.0):
    config = folder.family.student_config(folder, "ddim", (1024, 1024))
    student = how_to_sample.FlowStudent(config, (1, 3), (1024, 1024), guidance)
    return Described(tmp_path / how_to_sample.FILE, how_to_sample.how_to_sample(student)), config


@pytest.mark.parametrize("name", ["sd3-medium", "flux-dev", "zimage"])
def test_a_lora_of_flow_is_drawn_at_its_students_times(name, tmp_path):
    folder = published(name)
    few, config = described(tmp_path, folder, guidance=2.5)
    times = few.scheduler(folder).run(3).times
    wanted = flow_scheduler.shifted(np.asarray([1, 2 / 3, 1 / 3]), config["shift"])
    np.testing.assert_allclose(times, wanted, rtol=1e-6)
    assert few.settings(folder) | {"steps": 3, "guidance": 2.5} == few.settings(folder)


def test_students_of_flow_and_of_betas_do_not_mix(tmp_path):
    flow, betas = published("sd3-medium"), published("sd15")
    few, _ = described(tmp_path, flow)
    with pytest.raises(FolderError, match="is of a student of flow matching, and"):
        few.scheduler(betas)
    with pytest.raises(FolderError, match="--as=lcm: these students have a schedule of betas"):
        known("lcm").scheduler(flow)


def test_a_flow_student_is_for_diffusers_alone(tmp_path):
    few, config = described(tmp_path, published("flux-dev"), guidance=3.5)
    call = few.content["diffusers"]["calls"]["3"]
    assert call["guidance_scale"] == 3.5 and call["height"] == 1024
    np.testing.assert_allclose(call["sigmas"], [1, 2 / 3, 1 / 3])
    assert few.content["diffusers"]["from_config"]["shift"] == config["shift"]
    assert set(how_to_sample.files(few.content, checkpoint="x")) == {how_to_sample.FILE}
    with pytest.raises(ValueError, match="ComfyUI cannot draw this student: it has weights in"):
        how_to_sample.comfyui_workflow(few.content, checkpoint="x")
