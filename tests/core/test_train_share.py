import time

from p2pfm.runtime.train_share import TrainShare


def work(cpu_s: float) -> None:
    start = time.thread_time()
    while time.thread_time() - start < cpu_s:
        pass


def rest_after(share: TrainShare, cpu_s: float) -> float:
    share.pause()
    work(cpu_s)
    start = time.monotonic()
    share.pause()
    return time.monotonic() - start


def test_training_rests_as_long_as_its_share_demands_while_streams_are_served() -> None:
    assert rest_after(TrainShare(0.25, lambda: True), 0.05) >= 0.14  # three times its work
    assert rest_after(TrainShare(0.5, lambda: True), 0.05) >= 0.045


def test_it_does_not_rest_when_nobody_waits_for_tokens_and_stops_resting_when_they_have_gone() -> None:
    asked = iter([True, True, *[False] * 10])
    tenth = TrainShare(0.01, lambda: next(asked))  # would rest five seconds
    share = TrainShare(0.01, lambda: False)
    assert max(rest_after(share, 0.05), rest_after(tenth, 0.05)) < 4


def test_time_without_work_counts_for_nothing() -> None:
    share = TrainShare(0.01, lambda: True)
    share.pause()
    time.sleep(0.1)  # as work it would be paid for with ten seconds
    start = time.monotonic()
    share.pause()
    assert time.monotonic() - start < 5
