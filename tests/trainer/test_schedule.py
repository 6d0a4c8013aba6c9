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


@pytest.mark.parametrize(("total", "phases"), [(3, 0), (5, 0), (6, 1), (24, 1), (25, 1), (26, 2)])
def test_no_phase_ends_with_the_run_or_later_because_nothing_would_train_what_it_grew(
    total: int, phases: int
) -> None:
    schedule, updates = paper(total=total), range(1, total + 1)
    assert [u for u in updates if schedule.opens_phase(u)] == [1, 21][:phases]
    assert [u for u in updates if schedule.due(u)] == [5, 25][:phases]
    assert sum(map(schedule.in_phase, updates)) == 5 * phases


def test_the_linear_rate_falls_in_a_line() -> None:
    assert paper("linear").rate(25) == pytest.approx(0.2 * 0.75)
    assert paper("linear").rate(75) == pytest.approx(0.2 * 0.25)


def test_the_cosine_rate_falls_in_half_a_cosine() -> None:
    assert paper("cosine").rate(25) == pytest.approx(0.2 * 0.853553, rel=1e-5)
    assert paper("cosine").rate(50) == pytest.approx(0.2 * 0.5)


@given(schedules)
def test_every_phase_has_as_many_updates_as_asked(schedule: ReselectionSchedule) -> None:
    length, complete = 0, 0
    for update in range(1, schedule.total + 1):
        length = 1 if schedule.opens_phase(update) else length + schedule.in_phase(update)
        if schedule.due(update):
            assert length == schedule.steps
            length, complete = 0, complete + 1
    assert length == 0
    assert complete == len(range(schedule.steps, schedule.total, schedule.every))


@given(schedules)
def test_every_period_opens_and_closes_at_most_one_phase(schedule: ReselectionSchedule) -> None:
    for first in range(1, schedule.total + 1, schedule.every):
        period = range(first, first + schedule.every)
        opened = sum(map(schedule.opens_phase, period))
        assert opened == sum(map(schedule.due, period)) <= 1


@given(schedules)
def test_rates_after_the_first_fall_from_the_initial_rate(schedule: ReselectionSchedule) -> None:
    later = range(schedule.steps + schedule.every, schedule.total, schedule.every)
    rates = [schedule.rate(update) for update in later]
    assert rates == sorted(rates, reverse=True)
    assert all(0 <= rate <= schedule.initial_rate for rate in rates)
