"""One thread for linear algebra, whoever asks first and whoever leaves last."""

import threading

import numpy as np
import pytest
from threadpoolctl import threadpool_info, threadpool_limits

from pipeline.blas import one_blas_thread


def _threads() -> set[int]:
    return {library["num_threads"] for library in threadpool_info() if library["user_api"] == "blas"}


def _in_a_thread(work):
    answers = []
    thread = threading.Thread(target=lambda: answers.append(work()))
    thread.start()
    thread.join()
    return answers[0]


def _limited() -> set[int]:
    with one_blas_thread():
        np.ones((8, 8)) @ np.ones((8, 8))
        return _threads()


@pytest.fixture(autouse=True)
def _several():
    """Two threads, as on any machine with cores: a machine with one would show nothing."""
    with threadpool_limits(2, user_api="blas"):
        if _threads() != {2}:
            pytest.skip("linear algebra here has one thread whatever is asked")
        yield


def test_every_thread_is_held_to_one_whoever_set_a_limit_before():
    assert _limited() == {1}
    for _ in range(3):
        assert _in_a_thread(_limited) == {1}
        assert _threads() == {2}
        assert _limited() == {1}


def test_the_last_one_out_takes_the_limit_back_from_another_thread():
    inside, leave = threading.Event(), threading.Event()

    def stays() -> set[int]:
        with one_blas_thread():
            inside.set()
            leave.wait(60)
            return _threads()

    answers = []
    other = threading.Thread(target=lambda: answers.append(stays()))
    with one_blas_thread():
        other.start()
        assert inside.wait(60)
    assert _threads() == {1}, "the first one out must not lift it under the other"
    leave.set()
    other.join()
    assert answers == [{1}]
    assert _threads() == {2}
