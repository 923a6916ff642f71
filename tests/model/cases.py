"""Models of a few thousand parameters, one for each arm of a comparison, and rows to feed them."""

import dataclasses

import torch

from nsa_train.config.schema import AttentionConfig, ModelConfig, MoEConfig
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing

MODEL = ModelConfig(
    vocab=61, layers=2, width=32, heads=4, kv_heads=2, key_dim=8, value_dim=6, dense_layers=1, max_seq_len=256,
    rope_theta=10000.0, rope_factor=1.0, rope_trained_len=64, norm_eps=1e-6, tied_embeddings=False, init_std=0.02,
    head_prior=True, embedding_std=1.0,
)  # fmt: skip
MOE = MoEConfig(
    experts=4, shared=1, top_k=2, expert_width=16, router="sigmoid", normalise=True, routed_scale=1.0, bias_rate=1e-3,
    aux_weight=1e-4,
)  # fmt: skip
NSA = AttentionConfig(
    branches=("cmp", "slc", "win"), gate=True, phi="mlp", shared_kv=False, selection="topn", cmp_block=4, cmp_stride=2,
    slc_block=4, slc_count=4, slc_init=1, slc_local=2, window=5, backend="auto",
)  # fmt: skip
LENGTHS = (19, 3, 26)


def nsa(**fields):
    return dataclasses.replace(NSA, **fields)


FULL = nsa(branches=("full",), gate=False)
ARMS = {
    "full": FULL,
    "full_gated": nsa(branches=("full",)),
    "window": nsa(branches=("win",)),
    "nsa": NSA,
    "nsa-linear": nsa(phi="linear"),
    "nsa-gated_pool": nsa(phi="gated_pool"),
    "nsa-mean": nsa(phi="mean"),
    "nsa-shared_kv": nsa(shared_kv=True),
    "nsa-random": nsa(selection="random"),
    "nsa-none": nsa(selection="none"),
    "nsa-no_slc": nsa(branches=("cmp", "win")),
    "nsa-no_win": nsa(branches=("cmp", "slc")),
}


def build(attention=NSA, seed=0, moe=None, **fields):
    model = Transformer(dataclasses.replace(MODEL, **fields), attention, dataclasses.replace(MOE, **(moe or {})))
    model.start(seed)
    return model


def rows(lengths=LENGTHS, vocab=MODEL.vocab, seed=0):
    """(tokens, labels, packing): every token's label is the next one of its document, the last has none."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(vocab, (sum(lengths),), generator=generator)
    labels = torch.cat([torch.cat([part[1:], part.new_tensor([-100])]) for part in tokens.split(lengths)])
    return tokens, labels, Packing.from_lengths(lengths)


def loss_of(model, case, chunk_tokens=16):
    out = model(*case, chunk_tokens)
    return out.token_losses.sum() + 0.1 * out.balance, out


def grow(model, std=0.3):
    """Give every parameter a value, as training would: phi, gates and all."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            generator = torch.Generator().manual_seed(len(name) + parameter.numel())
            parameter += std * torch.randn(parameter.shape, generator=generator) / max(parameter.shape[-1], 4) ** 0.5
    return model
