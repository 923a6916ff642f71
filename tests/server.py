"""Processes of tests are forked from a server that has imported torch and DeepSpeed once, which takes ten seconds."""

import multiprocessing

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(
    [
        "nsa_train.train.loop", "nsa_train.model.pretrained", "deepspeed.runtime.zero.stage_1_and_2", "wandb",
        "deepspeed.runtime.zero.muon.muon_optimizer", "matplotlib.pyplot", "hydra._internal.hydra", "sentencepiece",
    ]
)  # fmt: skip
