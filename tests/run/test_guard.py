"""What counts as gone wrong, whatever it is that the numbers measure."""

import math

import pytest

from jaxdistill.run.guard import DIFFERENCES, RATIOS, Guard, GuardSettings, guard_settings

LIMITS = {"contrast": 0.5, "brightness": 0.1}


def guard(**changes):
    return Guard(GuardSettings(limits=LIMITS, **changes))


def judged(made, *lines, last=False):
    """The numbers that are found at each line of contrast_1."""
    return [
        [event.number for event in made.judge(i, {"contrast_1": value}, last=last)]
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


def test_far_off_at_the_end_is_told_though_it_was_never_nearer():
    made = guard()
    assert judged(made, 0.1) == [[]]
    (event,) = made.judge(1, {"contrast_1": 0.2}, last=True)
    assert not event.worse


def test_two_errors_are_no_event():
    made = guard()
    made.judge(0, {"contrast_1": 1.0, "contrast_1_error": 0.3}, last=False)
    assert not made.judge(1, {"contrast_1": 2.0, "contrast_1_error": 0.3}, last=False)
    assert made.judge(2, {"contrast_1": 2.0, "contrast_1_error": 0.1}, last=False)


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
    made = guard(action="rollback", rollbacks=2, rate=0.5)
    made.judge(0, {"contrast_1": 1.0}, last=False)
    assert made.act(made.judge(5, {"contrast_1": math.nan}, last=False), "rollback") == "rollback"
    again = guard(action="rollback", rollbacks=2, rate=0.5)
    again.resume(made.state())
    assert str(again.events) == str(made.events) and again.least == made.least
    assert again.rate == made.rate == 0.5
    assert [again.act([], "rollback") for _ in range(2)] == ["rollback", "stop"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"action": "halt"}, "config.guard.action"),
        ({"limits": {"sharpness": 0.1}}, "limits.sharpness: no health line has such a number"),
        ({"limits": {"contrast": 0.0}}, "limits.contrast must be above 0, got 0"),
        ({"rollbacks": 0}, "rollbacks must be at least 1, got 0"),
        ({"rate": 1.0}, "rate must be above 0 and below 1, got 1"),
    ],
)
def test_settings_that_cannot_be_are_named(changes, message):
    whole = {"action": "stop", "rollbacks": 2, "rate": 0.3, "limits": LIMITS, **changes}
    with pytest.raises(ValueError, match=message) as told:
        guard_settings(whole)
    assert "\n" not in str(told.value)


def test_every_number_of_the_config_can_be_judged():
    from configs import base

    limits = base.base("labelled_images", guidance=1.0).guard.limits
    assert {*limits} == {*RATIOS, *DIFFERENCES}
