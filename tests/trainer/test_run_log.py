"""A run's log goes on after a resumption as if nothing had happened."""

import json
from typing import Any, cast

import pytest
from transformers import TrainerState

from spieldose_trainer.callbacks import Recorder
from spieldose_trainer.run_log import Evaluation, Reselection, RunLog, Update
from spieldose_trainer.selectors.selector import Selector

RECORDS = (
    Update(number=1, loss=2.5, learning_rate=1e-3, seconds=0.5, tokens=100),
    Reselection(update=1, replaced=40, entries=50, lost=None, lost_over_run=None),
    Evaluation(update=1, loss=2.4, exact_match=None),
    Update(number=2, loss=2.25, learning_rate=5e-4, seconds=0.25, tokens=90),
    Reselection(update=2, replaced=10, entries=50, lost=0.125, lost_over_run=0.25),
    Evaluation(update=2, loss=2.2, exact_match=0.5),
)


def log_of(*records: Update | Reselection | Evaluation) -> RunLog:
    log = RunLog()
    for record in records:
        log.append(record)
    return log


def test_records_are_kept_by_kind_in_the_order_they_came() -> None:
    log = log_of(*RECORDS)
    assert log.updates == [RECORDS[0], RECORDS[3]]
    assert log.reselections == [RECORDS[1], RECORDS[4]]
    assert log.evaluations == [RECORDS[2], RECORDS[5]]


def test_a_log_comes_back_from_json_as_it_was() -> None:
    log = log_of(*RECORDS)
    again = RunLog()
    again.load_state_dict(json.loads(json.dumps(log.state_dict())))
    assert again.updates == log.updates
    assert again.reselections == log.reselections
    assert again.evaluations == log.evaluations


def test_a_resumed_log_goes_on_from_the_checkpoint_and_forgets_what_came_after_it() -> None:
    checkpoint = log_of(*RECORDS[:3]).state_dict()
    resumed = log_of(*RECORDS)
    resumed.load_state_dict(checkpoint)
    resumed.append(RECORDS[3])
    assert resumed.updates == [RECORDS[0], RECORDS[3]]
    assert resumed.reselections == [RECORDS[1]]


def test_appending_does_not_change_a_state_taken_before() -> None:
    log = log_of(*RECORDS[:3])
    state = log.state_dict()
    log.append(RECORDS[3])
    assert state["updates"]["number"] == [1]


def test_an_empty_log_comes_back_empty() -> None:
    again = log_of(*RECORDS)
    again.load_state_dict(RunLog().state_dict())
    assert (again.updates, again.reselections, again.evaluations) == ([], [], [])


@pytest.mark.parametrize(("lost", "recorded"), [(0.5, [0.5]), (0.0, []), (None, [])])
def test_what_was_evicted_is_recorded_also_where_no_newcomer_stayed(
    lost: float | None, recorded: list[float]
) -> None:
    selector = Selector()
    selector.lost = lost
    recorder, unread = Recorder(selector, layers={}, method="sgc"), cast(Any, None)
    recorder.on_step_end(unread, TrainerState(global_step=3), unread)
    assert [event.lost for event in recorder.log.reselections] == recorded
