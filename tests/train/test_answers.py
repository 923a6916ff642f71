"""Answers add up by length where they were asked alike."""

from nsa_train.train.answers import added


def answer(task, length, loss=0.0, **settings):
    return [
        {"what": "cell", "task": task, "length": length, "loss": loss},
        {"what": "summary", "task": task, "length": length, "loss": loss, "settings": settings},
    ]


def test_new_lengths_are_added_and_the_same_ones_replaced():
    short, long, again = (answer("needle", n, loss, samples=2) for n, loss in ((512, 1.0), (1024, 1.0), (512, 2.0)))
    assert added([*short, *long], again) == [*long, *again]
    assert added([], short) == short
    assert added(short, []) == short
    assert added([*short, *long], [*short, *long]) == [*short, *long]


def test_other_tasks_stay_and_what_was_asked_otherwise_goes():
    needle, mqar = answer("needle", 512, samples=2), answer("mqar", 512, samples=2)
    more = answer("needle", 1024, samples=3)
    assert added([*needle, *mqar], more) == [*mqar, *more]
    unknown = [{"what": "summary", "task": "needle", "length": 256}]
    assert added(unknown, more) == more
    assert added(unknown, [{**unknown[0], "length": 128}]) == [*unknown, {**unknown[0], "length": 128}]
