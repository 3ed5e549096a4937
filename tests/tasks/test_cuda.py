"""What docs/gpu.md says of the code, as far as a machine without a GPU can tell: it lowers for
CUDA. Nothing is executed there.
"""

import jax
import jax.numpy as jnp
import pytest
import text_config
from jax._src.cudnn import fused_attention_stablehlo
from test_aot import TINY

from jaxdistill.errors import UserError
from jaxdistill.interop import architectures
from jaxdistill.models import attention
from jaxdistill.models.attention import ATTENTION
from jaxdistill.run.phase import programs
from jaxdistill.tasks.text_to_image.setup import TextSetup, open_teacher

CUDA = {"lowering_platforms": ("cuda",)}


def lowered(kernel):
    rows = jax.ShapeDtypeStruct((1, 1024, 2, 40), jnp.bfloat16)
    gradient = jax.grad(lambda *qkv: ATTENTION[kernel](*qkv).astype(jnp.float32).sum())
    return jax.jit(gradient).trace(rows, rows, rows).lower(**CUDA).as_text()


@pytest.mark.parametrize("kernel", sorted(ATTENTION))
def test_attention_lowers_for_cuda_without_a_gpu(kernel):
    if kernel in ("flash", "cudnn"):  # a TPU's, and one that asks for the GPU of its process
        with pytest.raises((ValueError, NotImplementedError)):
            lowered(kernel)
        return
    text = lowered(kernel)
    assert "custom_call" not in text
    assert ("stablehlo.while" in text) == (kernel in ("chunked", "looped"))


def test_cudnn_in_a_config_needs_a_gpu(monkeypatch):
    monkeypatch.setattr(architectures, "PIPELINES", {"tiny": TINY})
    config = text_config.get_config()
    config.teacher.architecture, config.compute.attention = "tiny", "cudnn"
    if jax.default_backend() != "gpu":
        with pytest.raises(UserError, match="attention = 'cudnn' needs an NVIDIA GPU"):
            open_teacher(config)
    monkeypatch.setattr("jaxdistill.tasks.text_to_image.setup.gpu_capability", lambda: (8, 0))
    open_teacher(config)


@pytest.mark.long
@pytest.mark.parametrize(("lora_rank", "fused"), [(0, False), (4, True)])
def test_the_training_step_lowers_for_cuda_and_writes_over_its_state(monkeypatch, lora_rank, fused):
    """`fused`: as a process with a GPU has it, in bfloat16 and at 4,096 positions."""
    monkeypatch.setattr(architectures, "PIPELINES", {"tiny": TINY})
    config = text_config.get_config()
    config.teacher.architecture = "tiny"
    config.methods.imagine_flash.adversarial_weight = 0.0
    config.student.lora_rank = lora_rank
    if fused:
        monkeypatch.setattr(attention, "gpu_capability", lambda: (8, 0))
        monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 90800)
        config.data.update({"height": 512, "width": 512})
        config.compute.update({"dtype": "bfloat16", "remat": "full"})
    setup = TextSetup(config, open_teacher(config))
    made = programs(setup.distillation.planned(0), setup.layout)
    arguments = (made.state, setup.batch_shapes(setup.recipe.stages[0]), made.given)
    text = made.step.trace(*arguments).lower(**CUDA).as_text()
    (head,) = (line for line in text.splitlines() if "func public @main" in line)
    given = [part for part in head.split("%arg")[1:] if "->" not in part]
    written = [("tf.aliasing_output" in part or "jax.buffer_donor" in part) for part in given]
    states = len(jax.tree.leaves(made.state))
    assert all(written[:states]) and not any(written[states:])
    assert ("__cudnn$fmhaSoftmaxBackward" in text) == fused and "4096x4096x" not in text
