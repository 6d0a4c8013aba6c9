"""The demo's data keeps what it is judged on out of training."""

import pytest

from tasks import TASKS, Task, split


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_held_out_items_do_not_occur_in_training(task: Task) -> None:
    train, held_out = split(task, train=8 * task.updates, held_out=50)
    assert len(train) == 8 * task.updates
    assert len({prompt for prompt, _ in held_out}) == 50
    assert not {prompt for prompt, _ in train} & {prompt for prompt, _ in held_out}


@pytest.mark.parametrize("task", TASKS, ids=lambda task: task.name)
def test_a_prompt_has_one_answer(task: Task) -> None:
    pairs = list(task.pairs())
    assert len(dict(pairs)) == len(pairs)
