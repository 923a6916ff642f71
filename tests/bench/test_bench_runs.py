"""What a benchmark says of a run that failed."""

from nsa_train.bench.runs import Run, last_words, train_run
from nsa_train.ops import dense


def test_a_run_that_failed_under_torchrun_is_reported_by_its_own_words(tmp_path):
    run = train_run(tmp_path / "a", ["trainer.steps=0", f"runs_dir={tmp_path}", "name=a"], processes=1)
    assert run.error == "exit code 1: error: 1 problem in the configuration:\n  trainer.steps=0 must be positive"


def test_where_only_torchrun_spoke_its_words_stand():
    assert last_words("W torch/distributed/elastic/api.py: no rank\nfound") == (
        "W torch/distributed/elastic/api.py: no rank\nfound"
    )


def test_the_kernels_of_full_attention_are_read_from_what_a_run_prints(caplog):
    dense._log_once.cache_clear()
    with caplog.at_level("INFO", logger="nsa_train"):
        for backend in ("varlen", "flash4", "varlen"):
            dense._log_once(backend, 192, 128)
    assert Run(1.0, None, [], {}, f"starting\n{caplog.text}done").dense_kernels == ["flash4", "varlen"]
