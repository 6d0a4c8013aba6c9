"""When selection phases run, and what share of the support each replaces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from spieldose_trainer.selectors.schedule import ReselectionSchedule

schedules = st.integers(1, 20).flatmap(
    lambda steps: st.builds(
        ReselectionSchedule,
        steps=st.just(steps),
        every=st.integers(steps + 1, 40),
        initial_rate=st.floats(0, 1),
        decay=st.sampled_from(["linear", "cosine"]),
        total=st.integers(1, 400),
    )
)


def paper(decay: str = "linear", total: int = 100) -> ReselectionSchedule:
    return ReselectionSchedule(every=20, steps=5, initial_rate=0.2, decay=decay, total=total)


def test_the_first_phase_begins_with_the_first_update() -> None:
    assert [u for u in range(1, 21) if paper().in_phase(u)] == [1, 2, 3, 4, 5]


def test_later_phases_begin_every_s_updates() -> None:
    assert [u for u in range(1, 101) if paper().opens_phase(u)] == [1, 21, 41, 61, 81]


def test_the_support_changes_after_the_last_update_of_a_phase() -> None:
    assert [u for u in range(1, 101) if paper().due(u)] == [5, 25, 45, 65, 85]


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_first_reselection_replaces_the_whole_random_support(decay: str) -> None:
    assert paper(decay).rate(5) == 1.0


@pytest.mark.parametrize("decay", ["linear", "cosine"])
def test_the_last_update_replaces_nothing_because_nothing_would_train_it(decay: str) -> None:
    assert paper(decay, total=25).rate(25) == 0.0
    assert paper(decay, total=5).rate(5) == 0.0


def test_the_linear_rate_falls_in_a_line() -> None:
    assert paper("linear").rate(25) == pytest.approx(0.2 * 0.75)
    assert paper("linear").rate(75) == pytest.approx(0.2 * 0.25)


def test_the_cosine_rate_falls_in_half_a_cosine() -> None:
    assert paper("cosine").rate(25) == pytest.approx(0.2 * 0.853553, rel=1e-5)
    assert paper("cosine").rate(50) == pytest.approx(0.2 * 0.5)


@given(schedules)
def test_every_phase_has_as_many_updates_as_asked(schedule: ReselectionSchedule) -> None:
    length = 0
    for update in range(1, 5 * schedule.every + 1):
        length = 1 if schedule.opens_phase(update) else length + schedule.in_phase(update)
        if schedule.due(update):
            assert length == schedule.steps


@given(schedules)
def test_every_period_opens_and_closes_exactly_one_phase(schedule: ReselectionSchedule) -> None:
    period = range(1, schedule.every + 1)
    assert sum(map(schedule.opens_phase, period)) == 1
    assert sum(map(schedule.due, period)) == 1


@given(schedules)
def test_rates_after_the_first_fall_from_the_initial_rate(schedule: ReselectionSchedule) -> None:
    later = range(schedule.steps + schedule.every, schedule.total + 1, schedule.every)
    rates = [schedule.rate(update) for update in later]
    assert rates == sorted(rates, reverse=True)
    assert all(0 <= rate <= schedule.initial_rate for rate in rates)
