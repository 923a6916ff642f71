"""Implementations side by side: figures of those that run, the error of one that does not."""

import pytest

from nsa_train.bench import timing


def test_an_implementation_that_cannot_run_has_its_error_and_the_others_their_figures(monkeypatch):
    def broken():
        raise ImportError("no module named liger_kernel")

    taken = []
    monkeypatch.setattr(timing, "peak_gib", lambda work: 2.5)
    monkeypatch.setattr(
        timing,
        "take_turns",
        lambda works, seconds, max_turns: taken.append(works) or {impl: [3.0, 1.0, 2.0] for impl in works},
    )
    rows = timing.side_by_side({"ours": lambda: lambda: 7, "theirs": broken}, lambda got: got / 2, 1.0)
    assert rows["ours"] == {"rel_err": 3.5, "peak_gib": 2.5, "ms": 2.0, "ms_min": 1.0, "ms_max": 3.0, "turns": 3}
    assert rows["theirs"] == {"error": "no module named liger_kernel"}
    assert [list(works) for works in taken] == [["ours"]]


def test_another_failure_than_of_an_implementation_is_not_hidden():
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        timing.side_by_side({"ours": interrupted}, float, 1.0)
