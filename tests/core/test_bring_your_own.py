"""A model of another framework, distilled: the README shows this file."""

# readme: begin
from functools import partial

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from jaxdistill import sampling, schedule
from jaxdistill.methods.imagine_flash import Reconstruction, imagine_flash
from jaxdistill.model import Model
from jaxdistill.prediction import v_prediction
from jaxdistill.train import Objective, init_state, train_step


class Net(nnx.Module):
    def __init__(self, rngs):
        self.embed, self.out = (
            nnx.Linear(10 + 64 + 1, 128, rngs=rngs),
            nnx.Linear(128, 64, rngs=rngs),
        )

    def __call__(self, x, t, label):
        h = jnp.concatenate([x.reshape(len(x), -1), t[:, None], jax.nn.one_hot(label, 10)], axis=-1)
        return self.out(nnx.gelu(self.embed(h))).reshape(x.shape)


graphdef, teacher_params = nnx.split(Net(nnx.Rngs(0)), nnx.Param)  # a trained one, in earnest
model = Model(
    lambda params, *inputs: nnx.merge(graphdef, params)(*inputs), schedule.cosine(), v_prediction
)
grids = [sampling.trailing_grid(steps, T=1.0) for steps in (1, 2)]
loss_fn = imagine_flash(
    model, model, grids=grids, null_cond=jnp.zeros_like, reconstruction=Reconstruction(steps=2)
)
tx = optax.adam(1e-3)
state = init_state({"student": teacher_params}, tx, jax.random.key(0))
step = jax.jit(partial(train_step, objective=Objective(loss_fn, tx), ema_decay=0.99))
batch = {
    "x0": jnp.zeros((32, 8, 8, 1)),
    "cond": jnp.arange(32) % 10,
}  # labels; x0 gives the shape only
# readme: end


def test_an_nnx_model_learns_its_own_teacher():
    current, losses = state, []
    for _ in range(60):
        current, metrics = step(current, batch, teacher_params)
        losses.append(float(metrics["loss"]))
    assert sum(losses[-10:]) < 0.5 * sum(losses[:10])
    assert int(current.step) == 60
