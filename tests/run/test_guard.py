"""What counts as gone wrong, whatever it is that the numbers measure."""

import math

import pytest

from jaxdistill.run.guard import (
    DIFFERENCES,
    RATIOS,
    RISES,
    Event,
    Guard,
    GuardSettings,
    by_line,
    guard_settings,
    summary,
)

LIMITS = {"contrast": 0.5, "brightness": 0.1, "fd": 0.5}


def guard(**changes):
    return Guard(GuardSettings(limits=LIMITS, **{"lines": 1, **changes}))


def judged(made, *lines):
    """The numbers that are found at each line of contrast_1."""
    return [
        [event.number for event in made.judge(i, {"contrast_1": value}, last=False)]
        for i, value in enumerate(lines)
    ]


@pytest.mark.parametrize("wrong", [1.6, 1 / 1.6])
def test_a_number_beyond_its_limit_that_was_within(wrong):
    assert judged(guard(), 1.4, 1.0, 1.2, wrong) == [[], [], [], ["contrast_1"]]
    assert judged(guard(), 1.4, 1.0, 1 / 1.4, 1.49) == [[]] * 4


def test_a_student_that_starts_far_off_may_recover_and_may_not_fall_again():
    assert judged(guard(), 0.1, 0.2, 0.19, 0.4, 0.38, 0.9) == [[]] * 6
    assert judged(guard(), 0.1, 0.4, 0.2) == [[], [], ["contrast_1"]]
    assert judged(guard(), 0.1, 0.05, 0.01) == [[], ["contrast_1"], ["contrast_1"]]


@pytest.mark.parametrize("lines", [1, 2, 3])
def test_so_many_wrong_lines_in_a_row_are_an_event(lines):
    """A right line between them counts anew, and so does what follows a rollback."""
    wrong, right = 2.0, 1.0
    made = guard(action="rollback", lines=lines)

    def acts(*values):
        found = [made.judge(0, {"contrast_1": value}, last=False) for value in values]
        return [made.act(events, 0) if events else "" for events in found]

    quiet = [""] * (lines - 1)
    assert acts(right, *[wrong] * (lines - 1), right) == ["", *quiet, ""]
    assert acts(*[wrong] * lines) == [*quiet, "rollback"]
    assert acts(*[wrong] * lines) == [*quiet, "rollback"]
    assert acts(*[wrong] * lines) == [*quiet, "stop"]


def test_at_the_last_line_one_is_enough():
    made = guard(lines=3)
    assert judged(made, 1.0, 2.0) == [[], []]
    assert made.judge(2, {"contrast_1": 2.0}, last=True)


def test_without_a_best_line_it_can_only_warn():
    assert [guard(action="stop").act([], best) for best in (None, 0)] == ["warn", "stop"]


def test_what_should_fall_may_not_rise_by_more_than_its_limit():
    """However it compares with the teacher's, and whatever it was in between."""
    made, found = guard(), []
    for value in (8.0, 2.0, 2.9, 3.1, 2.9, 1.0, 1.6, math.nan, 1.4):
        found.append([str(event) for event in made.judge(0, {"fd_3": value}, last=False)])
    assert [len(events) for events in found] == [0, 0, 0, 1, 0, 0, 1, 1, 0]
    assert "has risen from its lowest 1.10 times as far as it may" in found[3][0]
    late = guard()
    found = [len(late.judge(0, {"fd_3": value}, last=False)) for value in (math.nan, 2.0, 4.0)]
    assert found == [1, 0, 1]
    assert made.drift({"fd_3": 9.0}) == 0  # it says nothing of the teacher's


def test_two_errors_are_no_event():
    made = guard()
    made.judge(0, {"contrast_1": 1.0, "contrast_1_error": 0.3}, last=False)
    assert not made.judge(1, {"contrast_1": 2.0, "contrast_1_error": 0.3}, last=False)
    assert made.judge(2, {"contrast_1": 2.0, "contrast_1_error": 0.1}, last=False)


def test_a_number_of_unknown_error_is_no_event_unless_it_is_none():
    for value, found in ((9.0, 0), (math.nan, 1), (0.0, 1)):
        made = guard()
        made.judge(0, {"contrast_1": 1.0, "contrast_1_error": math.nan}, last=False)
        line = {"contrast_1": value, "contrast_1_error": math.nan}
        assert len(made.judge(1, line, last=True)) == found
        assert made.drift(line) == (0 if found == 0 else math.inf)


def test_events_are_told_by_their_lines():
    def event(step, number, action, far=2.0):
        return Event(step, number, 1.0, 0.0, far, 0.0, 0.0, action)

    stop = [event(15, "a_1", "stop", 3.0), event(15, "a_2", "stop", math.inf)]
    back = [event(15, "a_1", "rollback", 9.0)]
    assert by_line([*back, *back, *stop]) == [back, back, stop]
    assert by_line([Event.of_loss(3)] * 2) == [[Event.of_loss(3)]] * 2 and by_line([]) == []
    for events in (stop, stop[::-1], [Event.of_record(e.record()) for e in stop]):
        assert summary(events).startswith("step 15: a_2") and "(and 1 more)" in summary(events)


def test_differences_have_their_limit_on_both_sides():
    for value, found in ((0.09, 0), (-0.09, 0), (0.15, 1), (-0.15, 1)):
        made = guard()
        made.judge(0, {"brightness_2": 0.0}, last=False)
        assert len(made.judge(1, {"brightness_2": value}, last=False)) == found
    assert guard().drift({"brightness_2": -0.05, "contrast_2": 1.0, "fd_2": 9.0}) == 0.5


@pytest.mark.parametrize("value", [math.nan, math.inf, 0.0, -1.0])
def test_no_number_is_infinitely_far(value):
    assert guard().drift({"contrast_1": value}) == math.inf
    assert judged(guard(), 1.0, value) == [[], ["contrast_1"]]


def test_what_it_remembers_survives_a_restart():
    settings = {"action": "rollback", "lines": 2, "rollbacks": 2, "rate": 0.5}
    made = guard(**settings)
    nan = {"contrast_1": math.nan}
    made.judge(0, {"contrast_1": 1.0, "fd_1": 2.0}, last=False)
    assert made.act(made.judge(5, nan, last=True), 0) == "rollback"
    assert not made.judge(6, nan, last=False)
    again = guard(**settings)
    again.resume(made.state())
    assert str(again.events) == str(made.events) and again.least == made.least
    assert again.lowest == made.lowest == {"fd_1": 2.0}
    assert again.rate == made.rate == 0.5
    assert (events := again.judge(7, nan, last=False)) and again.act(events, 0) == "rollback"
    assert again.act([], 0) == "stop"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": "halt"}, "config.guard.action"),
        ({"limits": {"sharpness": 0.1}}, "limits.sharpness: no health line has such a number"),
        ({"limits": {"contrast": 0.0}}, "limits.contrast must be above 0, got 0"),
        ({"rollbacks": 0}, "rollbacks must be at least 1, got 0"),
        ({"lines": 0}, "lines must be at least 1, got 0"),
        ({"rate": 1.0}, "rate must be above 0 and below 1, got 1"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, message):
    whole = {"action": "stop", "lines": 2, "rollbacks": 2, "rate": 0.3, "limits": LIMITS, **changes}
    with pytest.raises(ValueError, match=message) as told:
        guard_settings(whole)
    assert "\n" not in str(told.value)


def test_every_number_of_the_config_can_be_judged():
    from configs import base

    limits = base.base("labelled_images", guidance=1.0).guard.limits
    assert {*limits} == {*RATIOS, *DIFFERENCES, *RISES}
