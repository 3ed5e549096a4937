import gc
import json
import shutil
import signal
import sys
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorboardX
from shell import assert_same_bits

from jaxdistill import partition
from jaxdistill.costs import chips
from jaxdistill.run import loop, records
from jaxdistill.run.checkpoint import Checkpoints
from jaxdistill.run.guard import GuardSettings, numbers_of
from jaxdistill.run.loop import (
    Loop,
    NonFiniteError,
    Place,
    Stopped,
    StopSignal,
    train_loop,
)
from jaxdistill.run.phase import Training, train
from jaxdistill.run.records import Curve, read_curve
from jaxdistill.train import Objective, init_state, train_step

STEPS = 20
TX = optax.adam(0.05)


def loss_fn(params, teacher, batch, key):
    """Noisy regression: every part of the state, the batch and the key matter to it."""
    noise = 0.1 * jax.random.normal(key, batch.shape)
    error = jnp.tanh(params["w"] * batch + params["b"]) - teacher * batch - noise
    return jnp.mean(error**2), {"bias": jnp.mean(error)}


STEP = jax.jit(partial(train_step, objective=Objective(loss_fn, TX), ema_decay=0.9))


def fresh_state():
    return init_state({"w": jnp.linspace(-1, 1, 8), "b": jnp.zeros(8)}, TX, jax.random.key(5))


def batch(i):
    return np.random.default_rng(i).normal(size=8).astype(np.float32)


LAYOUT = partition.layout()
PLACES = {"every": 2, "checkpoint_every": 4, "checkpoints": "", "profile": 0}
"""What a place of the tests' loops is; the rest of `run`'s changes are the loop's."""


def run(
    folder,
    *,
    batches=batch,
    step_fn=STEP,
    health=lambda params, step: {"w0": float(params["w"][0])},
    stop=None,
    **changes,
):
    place = {key: changes.pop(key, default) for key, default in PLACES.items()}
    settings = {"steps": STEPS, "health_every": 5, "advice": "lower the learning rate", **changes}
    toy = Loop(
        name="toy",
        first=fresh_state,
        like=jax.eval_shape(fresh_state),
        step=step_fn,
        batches=batches,
        given=jnp.float32(0.5),
        health=health,
        **settings,
    )
    return train_loop(toy, Place(folder, stop or StopSignal(), LAYOUT, **place))


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp("uninterrupted")
    return run(folder).state, (folder / "curves" / "toy.jsonl").read_text()


class Killed(Exception):
    """Stands for kill -9: the loop is left without a save."""


def killed_at(n):
    def batches(i):
        if i == n:
            raise Killed
        return batch(i)

    return batches


def no_batch(i):
    raise Killed


def newest(folder):
    return Checkpoints(folder / "checkpoints" / "toy").latest


# ----------------------------------------------------------------------------------------- resuming


@pytest.mark.parametrize("at", [[6], [4, 15], [1, 19]], ids=str)
def test_killed_and_resumed_loop_ends_in_the_same_bits_and_the_same_curve(
    tmp_path, uninterrupted, at
):
    for n in at:
        with pytest.raises(Killed):
            run(tmp_path, batches=killed_at(n))
        assert newest(tmp_path) == (n // 4 * 4 or None)
    state = run(tmp_path).state
    assert_same_bits(state, uninterrupted[0])
    assert (tmp_path / "curves" / "toy.jsonl").read_text() == uninterrupted[1]


def test_resume_reads_each_batch_by_its_step_and_none_twice(tmp_path):
    with pytest.raises(Killed):
        run(tmp_path, batches=killed_at(10))
    asked = []
    run(tmp_path, batches=lambda i: asked.append(i) or batch(i))
    assert asked == list(range(8, STEPS))


def test_finished_loop_returns_its_state_without_a_step(tmp_path, uninterrupted):
    before = run(tmp_path).health
    found = run(tmp_path, batches=killed_at(0), step_fn=lambda *_: None)
    assert_same_bits(found.state, uninterrupted[0])
    assert found.seconds.total > 0 and found.health == before


def test_seconds_add_up_over_restarts(tmp_path, monkeypatch):
    clock = iter(np.arange(0.0, 1e6, 10.0))
    monkeypatch.setattr(loop.time, "perf_counter", lambda: next(clock))
    with pytest.raises(Killed):
        run(tmp_path, batches=killed_at(5))
    saved = Checkpoints(tmp_path / "checkpoints" / "toy").restore(fresh_state())[1]["seconds"]
    assert saved > 0
    assert run(tmp_path).seconds.total > saved


def test_final_step_is_saved_whatever_the_interval(tmp_path):
    run(tmp_path, checkpoint_every=7)
    assert newest(tmp_path) == STEPS


# -------------------------------------------------------------------------------------------- curve


def test_curve_has_losses_and_health_at_their_steps(uninterrupted):
    records = [json.loads(line) for line in uninterrupted[1].splitlines()]
    losses, health = [r for r in records if "loss" in r], [r for r in records if "health/w0" in r]
    assert [r["step"] for r in losses] == list(range(2, STEPS + 1, 2))
    assert [r["step"] for r in health] == list(range(5, STEPS + 1, 5))
    assert all({"loss", "grad_norm", "bias"} <= set(r) for r in losses)


def test_curve_holds_each_steps_own_loss(uninterrupted):
    state, wanted = fresh_state(), {}
    for i in range(STEPS):
        state, metrics = STEP(state, batch(i), jnp.float32(0.5))
        wanted[i + 1] = float(metrics["loss"])
    for record in map(json.loads, uninterrupted[1].splitlines()):
        if "loss" in record:
            assert record["loss"] == pytest.approx(wanted[record["step"]], rel=1e-5)


def test_health_gets_the_averaged_parameters(uninterrupted, tmp_path):
    seen = {}
    state = run(
        tmp_path, health=lambda params, step: seen.update({step: np.asarray(params["w"])}) or {}
    ).state
    assert list(seen) == [5, 10, 15, 20]
    assert np.array_equal(seen[20], state.ema_params["w"]) and not np.array_equal(
        seen[20], state.params["w"]
    )


def test_curve_drops_what_lies_beyond_the_checkpoint(tmp_path):
    path = tmp_path / "curves" / "x.jsonl"
    first = Curve(path, 0)
    for step in (2, 4, 6, 8):
        first.add(step, {"loss": step / 3})
    resumed = Curve(path, 4)
    assert [r["step"] for r in read_curve(path)] == [2, 4]
    resumed.add(6, {"loss": 0.25})
    assert read_curve(path)[-1] == {"step": 6, "loss": 0.25} and len(read_curve(path)) == 3


@pytest.mark.parametrize("tail", ['{"step": 6, "lo', '{"step"', "{", '{"step": 6, "loss": 0.1'])
def test_half_written_last_line_is_left_out_and_overwritten(tmp_path, tail):
    path = tmp_path / "curves" / "x.jsonl"
    Curve(path, 0).add(2, {"loss": 0.5})
    whole = path.read_text()
    path.write_text(whole + tail)
    assert read_curve(path) == [{"step": 2, "loss": 0.5}]
    Curve(path, 8).add(8, {"loss": 0.25})
    assert [r["step"] for r in read_curve(path)] == [2, 8]


def test_loop_resumes_over_a_half_written_curve(tmp_path, uninterrupted):
    with pytest.raises(Killed):
        run(tmp_path, batches=killed_at(9))
    with (tmp_path / "curves" / "toy.jsonl").open("a") as file:
        file.write('{"step": 10, "loss": 0.')
    run(tmp_path)
    assert (tmp_path / "curves" / "toy.jsonl").read_text() == uninterrupted[1]


# --------------------------------------------------------------------------------------- not finite


def poisoned_from(n):
    return lambda i: np.full(8, np.nan, np.float32) if i >= n else batch(i)


def all_finite(tree):
    return all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("n", [0, 3, 4, 9, 19])
def test_loss_that_is_no_number_stops_the_loop_and_names_step_term_and_mend(tmp_path, n):
    with pytest.raises(NonFiniteError) as error:
        run(tmp_path, batches=poisoned_from(n))
    text = str(error.value)
    assert (
        "\n" not in text
        and f"toy step {n}:" in text
        and "loss = nan" in text
        and "bias = nan" in text
    )
    # What gives no numbers before any update is not to be mended by the learning rate.
    assert ("lower the learning rate" if n else "nothing has been trained yet") in text
    assert ("learning rate" in text) == (n > 0)
    assert newest(tmp_path) == (n // 4 * 4 or None)
    if newest(tmp_path):
        assert f"step {newest(tmp_path)} is kept" in text
        restored = Checkpoints(tmp_path / "checkpoints" / "toy").restore(fresh_state())[0]
        assert all_finite((restored.params, restored.ema_params))
    curve = tmp_path / "curves" / "toy.jsonl"
    assert all(np.isfinite(list(r.values())).all() for r in read_curve(curve))


def test_gradient_that_is_no_number_stops_the_loop_though_the_loss_is_finite(tmp_path):
    def step(state, x, teacher):
        state, metrics = STEP(state, x, teacher)
        return state, metrics | {
            "grad_norm": jnp.where(state.step == 6, jnp.inf, metrics["grad_norm"])
        }

    with pytest.raises(NonFiniteError, match=r"toy step 5: grad_norm = inf"):
        run(tmp_path, step_fn=jax.jit(step))
    assert newest(tmp_path) == 4


@pytest.mark.parametrize("n", [8, STEPS], ids=["at a checkpoint", "at the end"])
def test_parameters_that_overflow_are_not_saved_though_loss_and_gradient_are_finite(tmp_path, n):
    def step(state, x, teacher):
        state, metrics = STEP(state, x, teacher)
        overflown = jax.tree.map(lambda p: jnp.where(state.step == n, jnp.inf, p), state.params)
        return state._replace(params=overflown), metrics

    with pytest.raises(NonFiniteError):
        run(tmp_path, step_fn=jax.jit(step))
    restored = Checkpoints(tmp_path / "checkpoints" / "toy").restore(fresh_state())[0]
    assert all_finite(restored.params) and int(restored.step) < n


# ------------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("n", [0, 5, 7])
def test_signal_saves_after_the_step_and_the_rest_ends_in_the_same_bits(tmp_path, uninterrupted, n):
    stop = StopSignal()

    def batches(i):
        if i == n:
            stop.received = "SIGTERM"
        return batch(i)

    with pytest.raises(Stopped) as stopped:
        run(tmp_path, batches=batches, stop=stop)
    text = str(stopped.value)
    assert (
        "\n" not in text
        and "SIGTERM" in text
        and f"step {n + 1} of {STEPS}" in text
        and "resumes" in text
    )
    assert newest(tmp_path) == n + 1
    state = run(tmp_path).state
    assert_same_bits(state, uninterrupted[0])
    assert (tmp_path / "curves" / "toy.jsonl").read_text() == uninterrupted[1]


def test_signal_in_the_last_step_finishes(tmp_path, uninterrupted):
    stop = StopSignal()
    found = run(
        tmp_path,
        batches=lambda i: (
            setattr(stop, "received", "SIGINT" if i == STEPS - 1 else None) or batch(i)
        ),
        stop=stop,
    )
    assert_same_bits(found.state, uninterrupted[0])


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_first_signal_is_remembered_and_the_second_acts(number, monkeypatch):
    raised = []
    before = signal.getsignal(number)
    with StopSignal().installed() as stop:
        signal.raise_signal(number)
        assert stop.received == number.name
        monkeypatch.setattr(loop.signal, "raise_signal", raised.append)
        stop._handle(number, None)
        assert raised == [number] and signal.getsignal(number) is signal.SIG_DFL
    assert signal.getsignal(number) is before


def test_handlers_are_restored_after_an_exception():
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(ZeroDivisionError), StopSignal().installed():
        raise ZeroDivisionError
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


# ----------------------------------------------------------------------------------------- progress


def test_progress_shows_phase_rate_loss_and_remaining_time(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(tmp_path)
    shown = capsys.readouterr().err
    assert (
        "toy" in shown
        and f"{STEPS}/{STEPS}" in shown
        and "loss 0." in shown
        and "step/s" in shown
        and "<" in shown
    )


def test_tensorboard_events_are_written(tmp_path):
    run(tmp_path)
    files = list((tmp_path / "tensorboard" / "toy").glob("events.*"))
    assert files and all(
        b"grad_norm" in f.read_bytes() and b"health/w0" in f.read_bytes() for f in files
    )


def test_the_writer_is_imported_without_torch(monkeypatch):
    for name in [name for name in sys.modules if name.split(".")[0] in ("torch", "tensorboardX")]:
        monkeypatch.delitem(sys.modules, name)
    assert records.summary_writer().__name__ == "SummaryWriter" and "torch" not in sys.modules


def test_tensorboard_keeps_the_checkpoints_own_step_on_resume(tmp_path, monkeypatch):
    """TensorBoard drops all events from `purge_step` on; the first step that is run again is the
    one after the checkpoint.
    """
    with pytest.raises(Killed):
        run(tmp_path, batches=killed_at(10))
    given = []
    writer = tensorboardX.SummaryWriter
    keep = lambda *args, **kwargs: given.append(kwargs["purge_step"]) or writer(*args, **kwargs)  # noqa: E731
    monkeypatch.setattr(tensorboardX, "SummaryWriter", keep)
    run(tmp_path)
    assert given == [9]


# -------------------------------------------------------------------------------------------- speed


def test_meter_tells_training_from_waiting_saving_and_health(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(loop.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(records.chips, "of_device", lambda device: chips.CHIPS["v4"])
    meter = records.Meter(examples=8, flops=55e12)
    for _ in range(4):
        with meter.spent("input"):
            now[0] += 0.1
        meter.step()
        now[0] += 0.4
    with meter.spent("save"):
        now[0] += 3.0
    found = meter.read()
    devices = loop.jax.device_count()
    assert found["step_seconds"] == pytest.approx(0.5) and found["input_wait"] == pytest.approx(0.2)
    assert found["goodput"] == pytest.approx(2 / 5)
    assert found["images_per_second_a_chip"] == pytest.approx(16 / devices)
    assert found["mfu"] == pytest.approx(2 * 55e12 / 275e12 / devices)
    with meter.spent("health"):
        now[0] += 5.0
    meter.step()
    now[0] += 1.0
    found = meter.read()
    assert found["step_seconds"] == pytest.approx(1.0) and found["goodput"] == pytest.approx(3 / 11)


def test_speed_is_in_tensorboard_and_a_profile_is_written(tmp_path, monkeypatch):
    started, stopped = [], []
    monkeypatch.setattr(records.jax.profiler, "start_trace", started.append)
    monkeypatch.setattr(records.jax.profiler, "stop_trace", lambda: stopped.append(1))
    seen = []
    monkeypatch.setattr(
        tensorboardX.SummaryWriter, "add_scalar", lambda self, name, value, step: seen.append(name)
    )
    run(tmp_path, profile=3, examples=4)
    assert {
        "speed/step_seconds",
        "speed/input_wait",
        "speed/goodput",
        "speed/images_per_second_a_chip",
        "loss",
    } <= set(seen)
    assert started == [str(tmp_path / "tensorboard" / "toy")] and stopped == [1]


class Slow(Checkpoints):
    """Each call waits for a while of the test's clock."""

    def save(self, *args):
        CLOCK[0] += 3.0
        super().save(*args)

    def wait(self):
        CLOCK[0] += 0.5
        super().wait()

    def close(self):
        CLOCK[0] += 7.0
        super().close()


CLOCK = [0.0]


@pytest.mark.parametrize("stopped_at", [None, 10])
def test_time_lost_to_saving_is_what_the_loop_waits_for_checkpoints_and_nothing_else(
    tmp_path, monkeypatch, capsys, stopped_at
):
    CLOCK[0] = 0.0
    monkeypatch.setattr(loop.time, "perf_counter", lambda: CLOCK[0])
    monkeypatch.setattr(loop, "Checkpoints", Slow)
    get, shown, stop = jax.device_get, {}, StopSignal()
    monkeypatch.setattr(
        loop.jax, "device_get", lambda x: CLOCK.__setitem__(0, CLOCK[0] + 1.0) or get(x)
    )  # a step's own time
    monkeypatch.setattr(
        tensorboardX.SummaryWriter,
        "add_scalar",
        lambda self, name, value, step: shown.setdefault(name, {}).update({step: value}),
    )

    def batches(i):
        if i + 1 == stopped_at:
            stop.received = "SIGTERM"
        return batch(i)

    if stopped_at:
        with pytest.raises(Stopped):
            run(tmp_path, batches=batches, stop=stop, every=5)
        # Saves after 4, 8 and 10 steps, each of which waits for the one before; then the wait for
        # the last, and the end.
        assert (
            f"toy: {10 + 3 * 3.5 + 0.5 + 7.5:.1f} s, of which {3 * 3.5 + 0.5 + 7.5:.1f} s lost to"
            " saving" in capsys.readouterr().out
        )
        before = 2 * 3.5  # until the last save
        assert Checkpoints(tmp_path / "checkpoints" / "toy").restore(fresh_state())[1][
            "save_seconds"
        ] == pytest.approx(before)
    else:
        before = 0.0
    seconds = run(tmp_path, every=5).seconds
    saves = 3 if stopped_at else 5
    assert seconds.saving == pytest.approx(before + saves * 3.5 + 7.5)
    assert seconds.total - seconds.saving == pytest.approx(STEPS)
    assert f"of which {seconds.saving:.1f} s lost to saving" in capsys.readouterr().out
    assert shown["speed/save_seconds"][20] == pytest.approx(
        before + (saves - 1) * 3.5
    )  # the line comes before the last save
    assert shown["speed/step_seconds"][20] == pytest.approx(1.0)


def test_a_trace_is_closed_where_the_run_ends_before_its_last_step(tmp_path, monkeypatch):
    calls, stop = [], StopSignal()
    monkeypatch.setattr(records.jax.profiler, "start_trace", lambda folder: calls.append("start"))
    monkeypatch.setattr(records.jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def batches(i):
        stop.received = "SIGTERM" if i == 12 else None
        return batch(i)

    with pytest.raises(Stopped):
        run(tmp_path / "stopped", profile=5, batches=batches, stop=stop)
    assert calls == ["start", "stop"]
    run(tmp_path / "short", profile=50)
    assert calls == ["start", "stop"] * 2
    with pytest.raises(Killed):
        run(tmp_path / "failed", profile=5, batches=killed_at(12))
    assert calls == ["start", "stop"] * 3


class SeveralProcesses:
    """JAX, as the loop sees it, where there are two processes."""

    process_count = staticmethod(lambda: 2)

    def __getattr__(self, name):
        return getattr(jax, name)


def test_no_trace_is_written_while_the_watchdog_waits_for_a_step(tmp_path, monkeypatch):
    """Writing one may take longer than any step."""
    calls = []

    class Watchdog:
        step, pause, close = (
            lambda self, name=name: calls.append(name) for name in ("step", "pause", "close")
        )

    monkeypatch.setattr(loop, "jax", SeveralProcesses())
    monkeypatch.setattr(loop.distributed, "Watchdog", Watchdog)
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: None)
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("trace"))
    often = {"every": 1, "health_every": STEPS, "checkpoint_every": STEPS}
    run(tmp_path / "whole", profile=3, **often)
    assert calls[calls.index("trace") - 1] == "pause" and calls.count("step") == STEPS
    calls.clear()
    run(tmp_path / "short", profile=50, **often)
    assert calls[-2:] == ["close", "trace"]


# -------------------------------------------------------------------------------- the best averages


def valley(params, step):
    """Lowest at step 10 of 5, 10, 15, 20."""
    return {"fd_1": abs(step - 10) + 1.0, "w0": float(params["w"][0])}


@pytest.mark.parametrize("stopped", [[], [7], [12], [18]], ids=str)
def test_the_best_averages_and_their_numbers_are_returned_also_after_a_kill(
    tmp_path, uninterrupted, stopped
):
    """In a workdir of its own each time, with the checkpoints elsewhere."""
    kept, checkpoints = {}, str(tmp_path / "checkpoints")

    def health(params, step):
        kept[step] = jax.tree.map(np.asarray, params)
        return valley(params, step)

    best = {"health": health, "keep_best": "fd_1", "checkpoints": checkpoints}
    for n in stopped:
        with pytest.raises(Killed):
            run(tmp_path / f"killed at {n}", batches=killed_at(n), **best)
    for again in range(2):  # and of a finished one
        state, _, numbers, _ = run(tmp_path / f"finished {again}", **best)
        assert_same_bits(state.ema_params, kept[10])
        assert numbers == {"fd_1": 1.0, "w0": float(kept[10]["w"][0])}
        # Only the averages are those of another step.
        assert_same_bits(state.params, uninterrupted[0].params)


def test_a_training_that_begins_anew_forgets_the_best_of_an_earlier_one(tmp_path):
    """Its checkpoints were removed, and what it had kept as the best was not."""
    lines = []

    def health(params, step):
        lines.append(step)
        return {"fd_1": 1.0 if len(lines) < 4 else 2.0}

    for _ in range(2):
        found = run(tmp_path, health=health, keep_best="fd_1")
        shutil.rmtree(tmp_path / "checkpoints" / "toy")
    assert found.health == {"fd_1": 2.0}
    with pytest.raises(NonFiniteError):  # a guard has nothing to end with, either
        run(
            tmp_path,
            batches=lambda i: np.full(8, np.nan, np.float32) if i == 3 else batch(i),
            **Drifting("stop").given,
        )


def test_a_best_line_of_a_start_that_came_farther_gives_way_to_a_better_one(tmp_path):
    """The newest checkpoint was removed, and the steps behind it turned out better."""
    best = {"health": lambda params, step: {"fd_1": values[step]}, "keep_best": "fd_1"}
    values = {0: 9.0, 5: 5.0, 10: 4.0, 15: 4.0, 20: 3.0}
    run(tmp_path, **best)
    checkpoints = Checkpoints(tmp_path / "checkpoints" / "toy")
    checkpoints.drop(STEPS)
    checkpoints.close()
    values[20] = 1.0
    for _ in range(2):  # and of a finished one
        assert run(tmp_path, **best).health == {"fd_1": 1.0}


def test_an_error_that_nobody_knows_is_not_sent_to_tensorboard(tmp_path, caplog):
    """It would warn at each health line of a single prompt; of a number that is none it should."""
    numbers = {"a_1": 1.0, "a_1_error": float("nan")}
    run(tmp_path / "a", health=lambda params, step: numbers)
    assert "NaN" not in caplog.text
    numbers["a_1"] = float("nan")
    run(tmp_path / "b", health=lambda params, step: numbers)
    assert "NaN" in caplog.text


def test_numbers_that_are_no_numbers_are_never_the_best(tmp_path, uninterrupted):
    found = run(tmp_path, health=lambda params, step: {"fd_1": float("nan")}, keep_best="fd_1")
    assert_same_bits(found.state, uninterrupted[0])
    assert np.isnan(found.health["fd_1"])


@pytest.mark.parametrize("stopped", [[], [7], [12]], ids=str)
def test_a_number_that_is_none_does_not_win_over_a_later_or_an_earlier_one(tmp_path, stopped):
    def health(params, step):
        return {"fd_1": {5: float("nan"), 10: 2.0}.get(step, float("nan")), "step": float(step)}

    for n in stopped:
        with pytest.raises(Killed):
            run(tmp_path, batches=killed_at(n), health=health, keep_best="fd_1")
    assert run(tmp_path, health=health, keep_best="fd_1").health == {"fd_1": 2.0, "step": 10.0}


def test_an_unknown_health_number_is_named(tmp_path):
    with pytest.raises(
        ValueError, match="keep_best = 'fd_9' is not a health number; choose one of fd_1, w0"
    ):
        run(tmp_path, health=valley, keep_best="fd_9")


# ------------------------------------------------------------------------------- numbers to results

ODD = {"third": 1 / 3, "tiny": 5e-324, "nan": float("nan"), "inf": float("inf")}


@pytest.mark.parametrize("at", [12, 15, STEPS], ids=lambda n: f"killed at {n}")
def test_a_run_that_has_lost_its_curves_and_files_returns_the_same_health_numbers(tmp_path, at):
    """They are in the checkpoint, to the bit: also those that JSON has no word for, and those of a
    line that came before the checkpoint.
    """

    def health(params, step):
        return {"w0": float(params["w"][0]), "step": float(step), **ODD}

    wanted = run(tmp_path / "whole", health=health).health
    assert wanted["step"] == STEPS
    # After the last checkpoint before the kill no further line is due.
    options = {"checkpoints": str(tmp_path / "kept"), "health_every": 10}
    if at < STEPS:
        with pytest.raises(Killed):
            run(tmp_path / "lost", batches=killed_at(at), health=health, **options)
        meta = Checkpoints(tmp_path / "kept" / "toy").restore(fresh_state())[1]
        assert numbers_of(meta["health"])["step"] == 10
    run(tmp_path / "lost", health=health, **options)
    shutil.rmtree(tmp_path / "lost")
    found = run(tmp_path / "new", health=lambda *_: {}, batches=killed_at(0), **options).health
    assert found.keys() == wanted.keys()
    np.testing.assert_array_equal([*found.values()], [*wanted.values()])  # NaN is NaN


def test_the_devices_hold_one_state_at_a_first_start_and_at_a_resumed_one(tmp_path):
    """Weight, average and Adam's two: neither the parameters that training starts from nor a fresh
    state that is restored over.
    """
    width, counted = 137, []

    def health(params, step):
        gc.collect()
        counted.append(sum(array.shape == (width,) for array in jax.live_arrays()))
        return {}

    def loss(params, teacher, batch, key):
        return jnp.mean((params["w"] - batch) ** 2), {}

    place = Place(tmp_path, StopSignal(), LAYOUT, every=1, checkpoint_every=2)
    for steps in (2, 4):
        training = Training(
            name="toy",
            objective=Objective(loss, optax.adam(0.1)),
            params=lambda: {"w": jnp.ones(width)},
            shapes={"w": jax.ShapeDtypeStruct((width,), jnp.float32)},
            key=jax.random.key(0),
            batches=lambda i: np.zeros((1, 1), np.float32),
            given=None,
            health=health,
            steps=steps,
            health_every=2,
            ema_decay=0.9,
        )
        train(training, place)
    assert counted == [4, 4]


# ---------------------------------------------------------------------------------------- the guard


LIMITS = {"contrast": 0.35}


class Drifting:
    """Health lines of a training that goes wrong at a step at its whole rate, and what the loop is
    told of the guard.
    """

    def __init__(self, action, *, at=15, lines=1, **settings):
        self.at, self.rate, self.averages = at, 1.0, {}
        self.given = {
            "health": self.line,
            "guard": GuardSettings(action=action, lines=lines, rate=0.5, limits=LIMITS, **settings),
            "slower": self.slower,
            "mend": "MEND",
        }

    def slower(self, rate):
        self.rate = rate
        tx = optax.GradientTransformation(
            TX.init, lambda g, s, p: self.scaled(rate, *TX.update(g, s, p))
        )
        return jax.jit(partial(train_step, objective=Objective(loss_fn, tx), ema_decay=0.9))

    @staticmethod
    def scaled(rate, updates, state):
        return jax.tree.map(lambda a: rate * a, updates), state

    def line(self, params, step):
        self.averages[step] = jax.tree.map(np.asarray, params)
        wrong = step == self.at and self.rate > 0.3
        return {"contrast_1": 2.0 if wrong else 1.3 - 0.01 * step, "contrast_1_error": 0.01}


@pytest.mark.parametrize("stopped", [[], [12]], ids=str)
def test_a_guard_that_stops_leaves_what_the_best_line_had(tmp_path, stopped, capsys):
    made = Drifting("stop")
    for n in stopped:
        with pytest.raises(Killed):
            run(tmp_path, batches=killed_at(n), **Drifting("stop").given)
    first = run(tmp_path, **made.given)
    assert "training ends, with what step 10 had" in capsys.readouterr().err
    kept = made.averages.get(10)
    if kept is not None:  # else of the start before
        assert_same_bits(first.state.ema_params, kept)
    assert int(first.state.step) == 15 and first.health["contrast_1"] == pytest.approx(1.2)
    (event,) = first.events
    assert (event.step, event.number, event.action) == (15, "contrast_1", "stop")
    assert_a_rerun_changes_nothing(tmp_path, first)


def assert_a_rerun_changes_nothing(workdir, first):
    """No step is left, and no line is lost or made twice."""
    curve = read_curve(workdir / "curves" / "toy.jsonl")
    again = run(workdir, batches=no_batch, **Drifting("stop").given)
    assert_same_bits(again.state, first.state)
    assert str(again.events) == str(first.events) and again.health == first.health
    assert read_curve(workdir / "curves" / "toy.jsonl") == curve


def test_more_steps_go_on_after_a_guards_stop(tmp_path):
    """From where it stopped, and with the guard."""
    first = run(tmp_path, **Drifting("stop").given)
    more = run(tmp_path, steps=STEPS + 5, **Drifting("stop", at=0).given)
    assert int(first.state.step) == 15 and int(more.state.step) == STEPS + 5
    assert more.events == first.events


@pytest.mark.costly
@pytest.mark.parametrize("stopped", [[2], [12], [15], [16, 18]], ids=str)
def test_a_guard_goes_back_to_the_best_line_and_on_more_slowly(tmp_path, stopped):
    """Twice at half the rate each time; a kill before or after changes no bit."""
    given = {"rollbacks": 2}
    whole = run(tmp_path / "whole", **Drifting("rollback", **given).given)
    assert [(e.step, e.action) for e in whole.events] == [(15, "rollback")] * 2
    assert int(whole.state.step) == STEPS
    folder = tmp_path / "killed"
    for n in stopped:
        with pytest.raises(Killed):
            run(folder, batches=killed_at(n), **Drifting("rollback", **given).given)
    found = run(folder, **Drifting("rollback", **given).given)
    assert_same_bits(found.state, whole.state)
    assert found.events == whole.events
    curves = [read_curve(f / "curves" / "toy.jsonl") for f in (tmp_path / "whole", folder)]
    assert curves[0] == curves[1]
    steps = [record["step"] for record in curves[0] if "loss" in record]
    assert steps == sorted(set(steps))  # nothing of what was left


def test_one_wrong_line_at_the_end_is_enough(tmp_path):
    """In between it is not, where two in a row are asked for."""
    made = Drifting("stop", at=STEPS, lines=2)
    found = run(tmp_path / "end", **made.given)
    assert [(e.step, e.action) for e in found.events] == [(STEPS, "stop")]
    assert_same_bits(found.state.ema_params, made.averages[STEPS - 5])
    assert not run(tmp_path / "between", **Drifting("stop", lines=2).given).events


def test_after_the_last_rollback_it_stops(tmp_path):
    found = run(tmp_path, **Drifting("rollback", rollbacks=1).given)
    assert [event.action for event in found.events] == ["rollback", "stop"]
    assert int(found.state.step) == 10


def test_a_guard_that_warns_changes_no_bit(tmp_path, uninterrupted, capsys):
    found = run(tmp_path, **Drifting("warn").given)
    assert_same_bits(found.state, uninterrupted[0])
    assert "contrast_1 = 2" in (told := capsys.readouterr().err) and "try MEND" in told
    assert [event.action for event in found.events] == ["warn"]


def test_a_loss_that_is_no_number_is_an_event_where_a_guard_acts(tmp_path):
    def broken(i):
        return np.full(8, np.nan, np.float32) if i == 12 else batch(i)

    made = Drifting("stop")
    found = run(tmp_path, batches=broken, **made.given)
    assert [(e.step, e.number, e.action) for e in found.events] == [(12, "loss", "stop")]
    early = {"batches": lambda i: np.full(8, np.nan, np.float32) if i == 3 else batch(i)}
    with pytest.raises(NonFiniteError):  # there is nothing but the untrained student
        run(tmp_path / "early", **early, **Drifting("stop").given)
    back = run(tmp_path / "back", **early, **Drifting("rollback").given)
    assert [e.action for e in back.events] == ["rollback", "rollback", "stop"]
    assert_same_bits(found.state.ema_params, made.averages[10])
    assert_a_rerun_changes_nothing(tmp_path, found)
    seldom = {"checkpoint_every": 100, "batches": broken, **Drifting("stop").given}
    assert_a_rerun_changes_nothing(tmp_path / "seldom", run(tmp_path / "seldom", **seldom))
    unranked = Drifting("rollback").given | {"keep_best": "contrast_1"}
    with pytest.raises(NonFiniteError):  # there is no best line
        run(tmp_path / "unranked", **early, **unranked)
    with pytest.raises(NonFiniteError):
        run(tmp_path / "warn", batches=broken, **Drifting("warn").given)
