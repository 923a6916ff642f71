"""What a rank says at its end: the first error of any rank, and that it was interrupted only where none failed."""

import errno
import json

import pytest

from nsa_train.errors import CheckpointError, DivergedError, Interrupted
from nsa_train.train.failures import FIRST_FAILURE, ending_of, failure_of


@pytest.fixture
def ended(tmp_path, monkeypatch):
    """exit_code in the summary of a rank that ends with an error; ranks in the order in which they end."""
    monkeypatch.setenv("WORLD_SIZE", "2")

    def end(rank, error):
        monkeypatch.setenv("RANK", str(rank))
        return ending_of(failure_of(error, tmp_path))["exit_code"]

    return end


FAILURES = [(CheckpointError("none is whole"), 17), (OSError(errno.ENOSPC, "full"), 20), (RuntimeError("a bug"), 1)]


@pytest.mark.parametrize(("first", "code"), FAILURES)
@pytest.mark.parametrize("then", [KeyboardInterrupt(), RuntimeError("peer gone")])
def test_a_rank_that_fails_first_names_the_end_of_one_that_is_stopped_then(first, code, then, ended):
    assert [ended(1, first), ended(0, then)] == [code, code]


@pytest.mark.parametrize("then", [KeyboardInterrupt(), RuntimeError("peer gone")])
def test_where_the_first_was_stopped_all_are_interrupted(then, ended):
    assert [ended(1, KeyboardInterrupt()), ended(0, then)] == [75, 75]


@pytest.mark.parametrize("error", [Interrupted("stopped after step 5"), DivergedError("jumped")])
def test_an_end_that_all_ranks_agreed_to_is_no_failure_of_the_first(error, ended, tmp_path):
    assert [ended(1, error), ended(0, error)] == [error.exit_code] * 2
    assert json.loads((tmp_path / FIRST_FAILURE).read_text())["agreed"]


def test_a_rank_that_loses_one_that_ended_by_agreement_ends_likewise(ended):
    assert [ended(1, Interrupted("stopped")), ended(0, RuntimeError("peer gone"))] == [75, 75]
