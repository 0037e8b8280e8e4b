"""Lines with an estimate, by a clock that is set."""

import pytest

from polynl_mm import progress


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(progress.time, 'monotonic', lambda: now[0])
    return now


def test_the_rest_is_estimated(clock):
    lines = []
    passed = []
    for item in progress.with_estimate('abcd', 4, 'labels', lines.append, 15):
        passed.append(item)
        clock[0] += 10
    assert passed == [*'abcd']
    # At 20 s; at 40 s all is done.
    assert lines == ['2 of 4 labels read, 20 s left']


def test_what_is_quick_is_not_told(clock):
    lines = []
    for _ in progress.with_estimate(range(9), 9, 'labels', lines.append, 15):
        clock[0] += 1
    assert not lines


def test_an_error_ends_it(clock):
    def read():
        yield 1
        raise ValueError('wrong')

    with pytest.raises(ValueError, match='wrong'):
        list(progress.with_estimate(read(), 2, 'labels', print))
