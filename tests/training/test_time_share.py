"""A measurement never takes more than its share of a run's time, and is not starved either."""

from __future__ import annotations

import time
from itertools import count

from hypothesis import given
from hypothesis import strategies as st

from lip_plugin import LipschitzConfig, retrofit
from lip_plugin.training.time_share import TimeShare, expected_seconds
from tests.support.families import tiny

seconds = st.floats(0.01, 100.0)


@given(st.floats(0.001, 0.5), st.floats(0.0, 5.0), st.lists(st.tuples(seconds, seconds)))
def test_the_share_is_kept(share, free, steps):
    """If each measurement takes at most what the one before took, the share is never exceeded."""
    now, takes = 0.0, 50.0
    times = TimeShare(share, free, clock=lambda: now)
    times.expect(takes)
    for step, less in steps:
        now += step
        if times.due():
            takes = min(takes, less)
            times.count(takes)
            now += takes
        assert times.spent <= free + share * now + 1e-9


def test_it_is_due_as_soon_as_it_is_earned():
    now = 0.0
    times = TimeShare(0.01, free=0.0, clock=lambda: now)
    times.expect(2.0)
    ran = []
    for step in range(1000):
        now = float(step)
        if times.due():
            times.count(2.0)
            ran.append(step)
    assert ran == [200, 400, 600, 800]


def test_a_share_of_one_is_always_due():
    times = TimeShare(1.0, free=0.0, clock=lambda: 0.0)
    times.expect(1e9)
    assert times.due()


def test_a_first_certificate_is_expected_to_take_more_where_there_is_more_to_prove(monkeypatch):
    ticks = count()  # each small proof takes one second, so that only the work differs
    monkeypatch.setattr(time, "perf_counter", lambda: next(ticks))
    small, large = tiny("gpt2"), tiny("gpt2", hidden_size=64, num_hidden_layers=4)
    for model in (small, large):
        retrofit(model, LipschitzConfig())
    assert 0 < expected_seconds(small) * 2 < expected_seconds(large)
