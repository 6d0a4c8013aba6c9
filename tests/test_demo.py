"""The demo judges fairly: on items kept out of training, and it says when an adapter fails."""

import json
from contextlib import nullcontext
from pathlib import Path

import pytest

import run
from spieldose_proto import inference_pb2 as pb
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


def test_an_adapter_no_better_than_the_base_fails_the_demo(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = [
        run.Answer(task, "prompt", " right", adapter, said)
        for task in TASKS
        for adapter, said in (("", "right"), (task.name, "wrong" if task is TASKS[1] else "right"))
    ]
    assert run.exact_match(answers)["dates"] == {"base": 1.0, "adapter": 0.0}
    monkeypatch.setattr(run, "WORK", tmp_path / "work")
    monkeypatch.setattr(run, "train", lambda base, task, out: out.touch())
    monkeypatch.setattr(run, "server", lambda *_: nullcontext(_Idle()))
    monkeypatch.setattr(run, "compare", lambda *_: "")
    monkeypatch.setattr(run, "play", lambda *_: (answers, 0.1, 1.0))
    monkeypatch.setattr("sys.argv", ["run.py", "--base", "none"])
    with pytest.raises(SystemExit) as stopped:
        run.main()
    assert "dates" in str(stopped.value.code)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["exact_match"]["dates"]


def test_the_first_line_with_anything_in_it_counts() -> None:
    assert run.first_line(iter(["\n", " a", " b\nc", "never read"])) == "a b"
    assert run.first_line(iter(["only"])) == "only"


class _Idle:
    def model(self) -> pb.ModelInfo:
        return pb.ModelInfo()
