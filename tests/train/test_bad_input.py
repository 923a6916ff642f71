"""A user's mistake gets one screen that says what and where, the right exit code, and nothing is written over."""

import json

import pytest
from launch import contents, summary

pytestmark = pytest.mark.process
SCREEN_LINES = 24
LINE = json.dumps({"text": "some text\n" * 20}) + "\n"


def folder_with(tmp_path, name, content):
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / name).write_bytes(content)
    return [f"data.root={tmp_path / 'text'}", "data.paths=[.]"]


def foreign_tokenizer(tmp_path, corpus):
    from nsa_train.data.tokenizer import train_tokenizer

    text = "".join(chr(97 + i % 23) + chr(97 + i * 7 % 26) + " " for i in range(4000))
    return [f"data.tokenizer={train_tokenizer([text], 320, 'bpe', 1, 0).save(tmp_path)}"]


MISTAKES = {
    "an unknown key": (lambda tmp, corpus: ["trainer.step=5"], 2, ["trainer.step: no such key; did you mean steps?"]),
    "a wrong type": (lambda tmp, corpus: ["trainer.steps=many"], 2, ["trainer.steps='many' must be an integer"]),
    "a row beyond the model": (
        lambda tmp, corpus: ["trainer.seq_len=4096", "model.max_seq_len=2048"],
        2,
        ["trainer.seq_len=4096 is beyond model.max_seq_len=2048", "shorten the row"],
    ),
    "an empty corpus": (
        lambda tmp, corpus: folder_with(tmp, "empty.txt", b""), 2, ["corpus 'files' has no text", "data.paths"],
    ),
    "a corpus that is not there": (
        lambda tmp, corpus: ["data.paths=[nowhere.jsonl]"], 2, ["nowhere.jsonl: no such file or folder", "data.root"],
    ),
    "an unreadable corpus": (
        lambda tmp, corpus: folder_with(tmp, "damaged.jsonl.zst", b"this is not zstd"), 2,
        ["damaged.jsonl.zst: not zst, or damaged"],
    ),
    "a line that is not JSON": (
        lambda tmp, corpus: folder_with(tmp, "lines.jsonl", (LINE * 2 + '{"text": "cut').encode()), 2,
        ["lines.jsonl:3: not JSON"],
    ),
    "text that is not UTF-8": (
        lambda tmp, corpus: folder_with(tmp, "latin.txt", "two lines\nna\xefve".encode("latin-1")), 2,
        ["latin.txt:2: not UTF-8 (byte 12 of the file)"],
    ),
    "too little text for the vocabulary": (
        lambda tmp, corpus: folder_with(tmp, "short.jsonl", (LINE + LINE.replace("some", "more")).encode()), 2,
        ["cannot fill a vocabulary of 400", "model.vocab"],
    ),
    "a tokenizer of another vocabulary": (
        foreign_tokenizer, 2, ["has 320 pieces but model.vocab=400", "set model.vocab=320"],
    ),
    "a tokenizer that is none": (
        lambda tmp, corpus: [f"data.tokenizer={tmp / 'run' / 'metrics.jsonl'}"], 2, ["not a SentencePiece model"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_told_on_one_screen_and_the_run_stays_as_it_was(mistake, train, killed, corpus, tmp_path):
    """In the folder of a run that has checkpoints, where a later start with the mistake put right must go on."""
    make, code, words = MISTAKES[mistake]
    overrides = make(tmp_path, corpus)
    before = contents(killed)
    bound = (killed / "config.yaml").read_text()
    (killed / "config.yaml").unlink()  # else the other corpus is refused for being another configuration
    job = train(*overrides)
    assert job.wait() == code, job.text
    for part in words:
        assert part in job.text
    assert "Traceback" not in job.text
    assert [line.startswith("error: ") for line in job.text.splitlines()].count(True) == 1
    assert len(job.text.splitlines()) <= SCREEN_LINES
    (killed / "config.yaml").write_text(bound)
    after = contents(killed)
    after.pop("summary.json", None)
    assert after == before
    assert (
        mistake in ("an unknown key", "a wrong type", "a row beyond the model") or summary(killed)["exit_code"] == code
    )


def test_a_mistake_in_the_corpus_leaves_no_half_prepared_folder(train, tmp_path):
    overrides = folder_with(tmp_path, "lines.jsonl", (LINE * 2 + "{").encode())
    assert train(*overrides, f"data.prepared_dir={tmp_path / 'prepared'}").wait() == 2
    assert not list((tmp_path / "prepared").iterdir())
