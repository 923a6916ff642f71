"""Forward and backward pass of small models on odd and short packs: every kernel at its borders, for a memory checker.

PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck --error-exitcode 1 python scripts/odd_packs.py

Without PyTorch's cache each tensor is an allocation of its own, whose end the checker sees.
"""

from __future__ import annotations

import torch

from nsa_train import runtime
from nsa_train.config.load import load_config
from nsa_train.data.loader import NO_LABEL
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing

HEADS = [(64, 64, 16, 1), (128, 128, 16, 1), (192, 128, 32, 2), (96, 64, 8, 2)]  # the last on the plain kernels
PACKS = [(1,), (31, 32, 33, 63, 64, 65), (1, 1, 2, 1, 15, 17), (1171,), (129, 1, 700, 64)]


def main() -> None:
    device = runtime.device()
    for D, Dv, Hq, Hk in HEADS:
        config = load_config([
            "experiment=r1", "model.vocab=512", "model.layers=2", "model.width=128", "moe.experts=8",
            "moe.expert_width=64", f"model.key_dim={D}", f"model.value_dim={Dv}", f"model.heads={Hq}",
            f"model.kv_heads={Hk}",
        ])  # fmt: skip
        model = Transformer(config.model, config.attention, config.moe)
        model.start(config.seed)
        model.to(device, torch.bfloat16 if device.type == "cuda" else torch.float32)
        for router in model.routers():
            router.bias = router.bias.float()
        for lengths in PACKS:
            packing = Packing.from_lengths(lengths, documents=len(lengths) + 2).to(device)
            tokens = torch.arange(packing.tokens, device=device) * 7919 % config.model.vocab
            labels = tokens.roll(-1)
            labels[packing.cu_seqlens[1:].long().clamp(min=1) - 1] = NO_LABEL
            out = model(tokens, labels, packing, 256)
            (out.token_losses.sum() + out.balance).backward()
            norm = torch.stack([p.grad.float().norm() for p in model.parameters() if p.grad is not None]).norm()
            model.zero_grad()
            print(f"{D}/{Dv}, {Hq}/{Hk} heads, documents of {lengths}: gradient norm {float(norm):.3f}", flush=True)


if __name__ == "__main__":
    main()
