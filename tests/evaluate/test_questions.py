"""Quizzes as tokens: of the wanted length, told by the tokens they name, marked where nothing must be chosen."""

import re
from itertools import pairwise

import numpy as np
import pytest
from helpers import load_script

from nsa_train.config.load import load_config
from nsa_train.data.recall import QUIZ_HOPS, QUIZ_NEEDLES, WORDS, Haystack, recall_documents
from nsa_train.data.tokenizer import train_tokenizer
from nsa_train.errors import ConfigError
from nsa_train.evaluate.questions import KINDS, Asked, Quizzes

LENGTH, DEPTHS, SAMPLES = 2000, 5, 3
DENSE = "\n".join(f"{i:x}" * 9 for i in range(2000))  # many more tokens a character
TEXT = "\n".join(f"    line {i} = {'some ' * (i % 9)}other text" for i in range(3000)) + "\n" + DENSE


@pytest.fixture(scope="module", params=[400, 3000], ids=["few words", "many words"])
def tokenizer(request):
    texts = [document.text for document in recall_documents("train", Haystack([TEXT]), 40, 500, 5000)]
    return train_tokenizer(texts, request.param, "bpe", 1, 0)


def made(task, tokenizer, length=LENGTH, depths=DEPTHS, samples=SAMPLES, **words):
    return list(Quizzes(tokenizer, [TEXT]).documents(task, length, depths, samples, **words))


@pytest.mark.parametrize("task", KINDS)
def test_documents_nearly_have_the_wanted_length_and_come_again(task, tokenizer):
    documents = made(task, tokenizer)
    assert len(documents) == SAMPLES * (1 if task == "mqar" else DEPTHS)
    assert all(0.94 * LENGTH < len(document.tokens) <= LENGTH for document in documents)
    again = made(task, tokenizer)
    assert all(np.array_equal(a.tokens, b.tokens) and a.asked == b.asked for a, b in zip(documents, again, strict=True))
    assert len({document.tokens.tobytes() for document in documents}) == len(documents)


@pytest.mark.parametrize("task", KINDS)
def test_the_named_tokens_tell_the_answer(task, tokenizer):
    for document in made(task, tokenizer):
        assert (len(document.asked) > 5) == (task == "mqar")
        for asked in document.asked:
            answer = tokenizer.decode(document.tokens[slice(*asked.answer)])
            question = tokenizer.decode(document.tokens[: asked.answer[0]]).split("\n")[-1]
            facts = [tokenizer.decode(document.tokens[slice(*fact)]) for fact in asked.facts]
            assert re.fullmatch("[1-9][0-9]{4}", answer)  # without the space before it
            key = question.split()[1]
            assert key in facts[-1]
            assert f" {answer}\n" in facts[0]
            assert len(facts) == (QUIZ_HOPS + 1 if task == "vartrace" else 1)
            names = [set(fact.split()) for fact in facts]
            assert all(len(a & b - {"set"}) == 1 for a, b in pairwise(names))


@pytest.mark.parametrize("task", KINDS)
def test_what_followed_the_questions_tokens_in_the_fact_is_the_answer(task, tokenizer):
    """So induction answers it; of a chain it finds the line of the last copy, from the key on."""
    for document in made(task, tokenizer):
        newline, *_ = tokenizer.encode("\n").tolist()
        tokens = document.tokens.tolist()
        for asked in document.asked:
            begin = asked.answer[0] - tokens[: asked.answer[0]][::-1].index(newline)
            question, fact = tokens[begin : asked.answer[0]], tokens[slice(*asked.facts[-1])]
            if task == "vartrace":
                key = tokenizer.encode(f" {tokenizer.decode(question).split()[1]}").tolist()
                while not tokenizer.decode(question[-1:]).strip():  # a space before the answer
                    question.pop()
                assert question[-len(key) :] == key
                assert key in [fact[i : i + len(key)] for i in range(len(fact))]
            else:
                assert fact == [*question, *tokens[slice(*asked.answer)], newline]


def test_facts_of_every_form_are_asked_for_up_to_their_value(tokenizer, monkeypatch):
    for form in load_script("recall_forms", monkeypatch).FORMS.values():
        for task in ("needle", "multikey"):
            for document in made(task, tokenizer, words=form):
                (asked,) = document.asked
                begin, end = asked.facts[0]
                assert np.array_equal(document.tokens[begin - end :], document.tokens[begin:end])
                value = tokenizer.decode(document.tokens[slice(*asked.answer)])
                assert value.strip() == tokenizer.decode(document.tokens[begin:end]).split()[-1]


def test_a_multikey_quiz_has_many_facts_of_one_form(tokenizer):
    form = WORDS["heldout"].needle.split("{")[0]
    for document in made("multikey", tokenizer):
        assert tokenizer.decode(document.tokens).count(form) == QUIZ_NEEDLES + 1  # and the question


@pytest.mark.parametrize("task", KINDS)
def test_the_words_of_training_can_be_asked_with(task, tokenizer):
    few = {"depths": 1, "samples": 1}
    text = {words: tokenizer.decode(made(task, tokenizer, **few, words=WORDS[words])[0].tokens) for words in WORDS}
    for words, of in WORDS.items():
        asked = text[words].split("\n")[-2]
        assert asked.startswith((of.trace if task == "vartrace" else of.needle).partition("{")[0])
    assert text["heldout"] == tokenizer.decode(made(task, tokenizer, **few)[0].tokens)


@pytest.mark.parametrize("task", ["needle", "multikey", "vartrace"])
def test_the_first_fact_stands_at_its_depth(task, tokenizer):
    for document in made(task, tokenizer):
        (asked,) = document.asked
        place = asked.facts[0][0] / asked.answer[0]
        assert place == pytest.approx(asked.depth / (DEPTHS - 1), abs=0.15)


def test_depths_of_mqar_are_those_of_the_lines(tokenizer):
    (document, *_) = made("mqar", tokenizer)
    told = max(asked.facts[0][1] for asked in document.asked)
    for asked in document.asked:
        assert asked.depth == pytest.approx(DEPTHS * asked.facts[0][0] / told, abs=1.05)
    assert {asked.depth for asked in document.asked} == set(range(DEPTHS))


def test_a_length_that_cannot_hold_the_quiz_is_refused(tokenizer):
    with pytest.raises(ConfigError, match=r"lengths: task=multikey needs \d+ tokens, 200 are too few"):
        made("multikey", tokenizer, 200)


@pytest.mark.parametrize(
    ("facts", "zone"),
    [
        ([(0, 16)], "forced"),  # the first block
        ([(10, 17)], None),  # and a token of the second
        ([(448, 460)], "window"),  # t = 511, its block begins at 496, the one before at 480; the window at 448
        ([(447, 460)], None),
        ([(0, 16), (500, 505)], "window"),
        ([(0, 16), (100, 105)], None),
    ],
)
def test_zones_are_what_a_query_sees_without_choosing(facts, zone):
    """A fact of which one token must be selected needs selection."""
    attention = load_config().attention
    assert (attention.slc_block, attention.slc_init, attention.slc_local, attention.window) == (16, 1, 2, 64)
    assert Asked((512, 517), tuple(facts), 0).zone(attention) == zone


def test_local_blocks_may_reach_beyond_the_window():
    attention = load_config(["attention.window=8"]).attention
    assert Asked((512, 517), ((480, 490),), 0).zone(attention) == "forced"
    assert Asked((512, 517), ((479, 490),), 0).zone(attention) is None
