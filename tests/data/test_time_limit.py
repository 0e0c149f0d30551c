"""A program that does not end costs its seconds, and another limit around it goes on."""

import signal
import threading
import time

import pytest

from rlhf.data.time_limit import time_limit


def test_what_takes_too_long_is_stopped():
    with pytest.raises(TimeoutError, match=r"^no end within 0\.01 seconds$"), time_limit(0.01):
        time.sleep(5)


def test_a_limit_leaves_the_alarm_and_its_handler_as_they_were():
    def mine(*_):
        raise AssertionError

    before = signal.signal(signal.SIGALRM, mine)
    try:
        signal.setitimer(signal.ITIMER_REAL, 100)
        with time_limit(5):
            assert signal.getitimer(signal.ITIMER_REAL)[0] <= 5
        assert 90 < signal.getitimer(signal.ITIMER_REAL)[0] <= 100
        assert signal.getsignal(signal.SIGALRM) is mine
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    with time_limit(5):
        pass
    assert signal.getitimer(signal.ITIMER_REAL)[0] == 0


def test_a_thread_has_no_limit():
    done = []

    def work():
        with time_limit(0.001):
            time.sleep(0.01)
            done.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert done == [True]
