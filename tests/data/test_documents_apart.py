"""In a batch as the loader packs it, no document's logits depend on another document."""

from itertools import pairwise

import numpy as np
import pytest
import torch
from loaders import make_loader

from nsa_train.config.load import load_config
from nsa_train.data.pack import aligned
from nsa_train.model.transformer import Transformer


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("align", [1, 64])
@pytest.mark.parametrize("attention", ["nsa", "full"])
def test_another_text_of_one_document_leaves_the_logits_of_the_others_to_the_bit(attention, align, device, store):
    """Every MLP is dense: an expert's matrix product has another shape when another token comes to it."""
    vocab = store.manifest["vocab"]
    config = load_config([f"attention={attention}", f"model.vocab={vocab}", "model.dense_layers=4"])
    model = Transformer(config.model, config.attention, config.moe)
    model.start(0)
    model.to(device, torch.float32 if device == "cpu" else torch.bfloat16)
    loader = make_loader(store, seq_len=3072, batch_rows=1, align=align, max_documents=8)
    step, row = next(
        (i, row) for i in range(99) for row in loader.step_rows(i) if row.pieces.stop - row.pieces.start > 2
    )
    (batch,) = (batch.to(device) for batch in loader.micro_batches(step, 0, 1, 1))
    ends = np.cumsum(aligned(row.plan.length[row.pieces], align)).tolist()
    assert ends[0] > config.attention.slc_count * config.attention.slc_block
    with torch.no_grad():
        before = model.logits(batch.tokens, batch.packing)
        for begin, end in pairwise([0, *ends]):
            other = batch.tokens.clone()
            other[begin:end] = (other[begin:end] * 7 + 1) % vocab
            after = model.logits(other, batch.packing)
            assert not torch.equal(after[begin:end], before[begin:end])
            assert torch.equal(after[:begin], before[:begin])
            assert torch.equal(after[end:], before[end:])
