"""Loaders for tests: every argument has a value that fits the small corpora."""

import dataclasses

from nsa_train.config.load import load_config
from nsa_train.data.loader import Loader
from nsa_train.data.stages import Stage

SEQ_LEN, MAX_DOCUMENTS, BATCH_ROWS = 512, 4, 8


DATA = load_config([]).data


def make_loader(store, seq_len=SEQ_LEN, batch_rows=BATCH_ROWS, seed=1, stages=None, **data):
    stages = stages or [Stage("all", 0, seq_len, batch_rows, {}, 1.0)]
    return Loader(store, stages, dataclasses.replace(DATA, **({"max_documents": MAX_DOCUMENTS} | data)), seed)


def stage(first_step, seq_len, batch_rows, name="all", **mixture):
    return Stage(name, first_step, seq_len, batch_rows, mixture, 1.0)
