"""The end of a run as a Hugging Face folder: safetensors, configuration and the tokenizer's model file."""

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor

from nsa_train.config import schema
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import StorageError


def export_model(
    weights: dict[str, Tensor], rope_factor: float, config: schema.Config, tokenizer: Path, target: Path
) -> None:
    """Write `target` as a whole; it opens with `AutoModelForCausalLM.from_pretrained` after importing
    `nsa_train.model.pretrained`, with the weights' dtype of the run.

    weights: those of the Transformer by name; rope_factor: of the last stage."""
    from transformers.utils import logging as transformers_logging

    from nsa_train.model.pretrained import NSATrainConfig, NSATrainForCausalLM

    transformers_logging.disable_progress_bar()
    eos = Tokenizer.load(tokenizer).eos
    trained = dataclasses.replace(config.model, rope_factor=rope_factor)
    with torch.device("meta"):
        wrapped = NSATrainForCausalLM(
            NSATrainConfig.of(trained, config.attention, config.moe, eos_token_id=eos, pad_token_id=eos)
        )
    wrapped.transformer.load_state_dict(weights, strict=not config.model.tied_embeddings, assign=True)
    wrapped.tie_weights()
    wrapped.config.dtype = weights["embed.weight"].dtype
    aside = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        wrapped.save_pretrained(aside)
        for file in tokenizer.parent.glob("tokenizer*"):
            shutil.copy2(file, aside)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(aside, ignore_errors=True)
        raise StorageError(
            f"{target}: cannot be written ({error}); free some space and run again: the last checkpoint is whole"
        ) from error
