"""The end of a run as a Hugging Face folder: safetensors, configuration and the tokenizer's model file."""

from __future__ import annotations

import dataclasses
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError
from torch import Tensor

from nsa_train import runtime
from nsa_train.config import schema
from nsa_train.data.tokenizer import Tokenizer
from nsa_train.errors import NsaTrainError, StorageError

if TYPE_CHECKING:
    from nsa_train.model.pretrained import NSATrainForCausalLM

ROW_TOKENS = 128  # of the row whose logits are compared: several compressed keys at the paper's sizes
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 2e-2}  # relative RMS: sums depend on where a tensor lies in memory


def export_model(
    weights: dict[str, Tensor], rope_factor: float, config: schema.Config, tokenizer: Path, target: Path,
    beat: Callable[[], None],
) -> None:  # fmt: skip
    """Write `target` as a whole; it opens with `AutoModelForCausalLM.from_pretrained` after importing
    `nsa_train.model.pretrained`, with the weights' dtype of the run.

    weights: those of the Transformer by name; rope_factor: of the last stage; beat: is called as each part has ended.
    It has its name only after it was opened and compared with `weights` (`_check`); else NsaTrainError."""
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
        for file in aside.glob("*.safetensors"):
            runtime.readable_as_its_folder(file)
        for file in tokenizer.parent.glob("tokenizer*"):
            shutil.copy2(file, aside)
        beat()
        _check(aside, wrapped, target, beat)
        shutil.rmtree(target, ignore_errors=True)
        os.rename(aside, target)
    except (OSError, SafetensorError) as error:
        raise StorageError(
            f"{target}: cannot be written ({error}); free some space and run again: the last checkpoint is whole"
        ) from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)


@torch.no_grad()
def _check(aside: Path, written: NSATrainForCausalLM, target: Path, beat: Callable[[], None]) -> None:
    """Open the folder as anybody would and compare it with the model that was written, or raise NsaTrainError.

    Names, dtypes and bits of all tensors; then the logits of one row, up to TOLERANCE, in which configuration and code
    of the opened model have a part. Both models are in rank 0's host memory and run there, with the reference of NSA:
    a GPU may have no room for a second model, and its kernels round otherwise. So it costs the weights once more in
    host memory. That `Engine.whole_weights` gathers what the GPUs hold is not looked at again here.
    """
    from transformers import AutoModelForCausalLM

    opened = AutoModelForCausalLM.from_pretrained(aside)
    beat()
    want, got = written.state_dict(), opened.state_dict()
    differing = want.keys() ^ got.keys()
    differing |= {name for name in want.keys() & got.keys() if not _same(want[name], got[name])}
    if differing:
        raise NsaTrainError(
            f"{target}: opened again, {len(differing)} of its tensors are not those that were written; look at the "
            "disk and run again, the last checkpoint is whole:\n  " + "\n  ".join(sorted(differing))
        )
    config, limit = written.config, TOLERANCE[written.transformer.embed.weight.dtype]
    size = 1, min(ROW_TOKENS, config.max_position_embeddings)
    row = torch.randint(config.vocab_size, size, generator=torch.Generator().manual_seed(0))
    ours = _logits(written, row)
    beat()
    theirs = _logits(opened, row)
    error = float((theirs - ours).square().mean().sqrt() / ours.square().mean().sqrt())
    if not error <= limit:
        raise NsaTrainError(
            f"{target}: opened again, the logits of a row of {size[1]} tokens are off by {error:.1e} of their RMS (at "
            f"most {limit:g}) with equal tensors, so it is another model than was trained. Install the transformers "
            "that constraints.txt names and run again; the last checkpoint is whole"
        )


def _same(one: Tensor, other: Tensor) -> bool:
    return one.dtype == other.dtype and torch.equal(one, other)


def _logits(model: NSATrainForCausalLM, row: Tensor) -> Tensor:
    """[1, S] -> [1, S, V] in fp32, on a CPU whatever the run's `attention.backend` is."""
    for layer in model.transformer.layers:
        layer.attention.config = dataclasses.replace(layer.attention.config, backend="reference")
    return model.eval()(row).logits.float()
