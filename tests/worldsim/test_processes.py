"""Worker processes: what they give back, and that the death of one is noticed."""

import signal
from concurrent.futures.process import BrokenProcessPool
from functools import partial

import pytest

from worldsim.processes import locked, run_all


@pytest.mark.parametrize("workers", [0, 2])
def test_every_argument_is_worked_on_once(workers):
    assert sorted(run_all(abs, [-3, 1, -2], workers)) == [1, 2, 3]
    assert list(run_all(abs, [], workers)) == []
    with pytest.raises(TypeError, match="bad operand"):
        list(run_all(abs, ["x"], workers))


def test_the_function_is_sent_once_to_each_worker():
    pickled = []

    class Heavy(partial):
        def __reduce__(self):
            pickled.append(1)
            return partial, (abs,)

    assert sorted(run_all(Heavy(abs), range(-50, 0), 2)) == list(range(1, 51))
    assert len(pickled) <= 2


def test_arguments_are_made_when_their_turn_comes():
    made = []
    results = run_all(abs, (made.append(k) or -k for k in range(100)), 2)
    next(results)
    assert len(made) < 20
    assert sum(results) > 0 and len(made) == 100


def test_a_killed_worker_is_noticed():
    with pytest.raises(BrokenProcessPool):
        list(run_all(signal.raise_signal, [signal.SIGKILL], 1))


def test_a_folder_is_locked_for_others_alone(tmp_path):
    with locked(tmp_path), pytest.raises(ValueError, match="is in use by another process"), locked(tmp_path):
        pass
    with locked(tmp_path):
        pass
