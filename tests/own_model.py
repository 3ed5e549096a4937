"""A Gaussian of each class, whose teacher is known in closed form."""

import jax.numpy as jnp
import numpy as np

import jaxdistill as jd

SHAPE, ROWS = (4,), 64
MEANS = np.linspace(-1.0, 1.0, 12, dtype=np.float32).reshape(3, 4)
SPREAD = 0.5
PARAMS = {
    "means": MEANS,
    "slope": np.zeros((3,), np.float32),  # of x, a polynomial of t: zero for the teacher
    "offset": np.zeros((3, 4), np.float32),
}
SCHEDULE = jd.cosine()


def apply(params, x, t, cond):
    """E[x0 | x_t] of N(mean of the class, SPREAD²), and what a student adds to it."""
    alpha, sigma = SCHEDULE.alpha(t)[:, None], SCHEDULE.sigma(t)[:, None]
    mean, powers = params["means"][cond], t[:, None] ** jnp.arange(3)
    gain = alpha * SPREAD**2 / (alpha**2 * SPREAD**2 + sigma**2)
    added = (powers @ params["slope"])[:, None] * x + powers @ params["offset"]
    return mean + gain * (x - alpha * mean) + added


def conds(i):
    return (np.arange(ROWS) + i) % 3


def features(params, x, t, cond):
    return [jnp.stack([x, x**2], axis=-1)]


def problem(**changes):
    given = {"conds": conds, **changes}
    model = jd.Model(apply, SCHEDULE, jd.x0_prediction)
    return jd.Problem(model, PARAMS, SHAPE, **given)
