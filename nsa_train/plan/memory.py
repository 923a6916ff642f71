"""How much memory a rank needs for a configuration, by part, before anything starts: counted from what the code keeps.

Activations are those of a forward pass of T tokens on a GPU. What lies there from the forward to the backward pass is
`kept`; of what comes and goes, `passing`, the largest counts. All in bytes. Letters as in `ops/`: M width, Hq and Hk
heads, D and Dv their widths, K of E experts of width F a token.
"""

from __future__ import annotations

from dataclasses import dataclass

from nsa_train.config.schema import Config
from nsa_train.model.counts import meta_model, parameters_by_part
from nsa_train.ops.compressed import query_chunk
from nsa_train.ops.select import SCRATCH_BYTES
from nsa_train.parallel.engine import BUCKET_ELEMENTS
from nsa_train.parallel.one_rank import adds_at_once
from nsa_train.runtime import dtype_of

FP32, INT64 = 4, 8
STAGE_3 = {  # DeepSpeed's defaults, in elements; `parallel.deepspeed` may set others
    "stage3_max_reuse_distance": 10**9,
    "stage3_prefetch_bucket_size": 5 * 10**7,
    "stage3_max_live_parameters": 10**9,
}


@dataclass(frozen=True)
class Memory:
    """Bytes of one rank, by part."""

    states: dict[str, float]
    kept: dict[str, float]
    passing: dict[str, float]

    @property
    def counted(self) -> dict[str, float]:
        """The parts of `total`: of what passes the largest."""
        largest = max(self.passing, key=lambda part: self.passing[part])
        return {**self.states, **self.kept, largest: self.passing[largest]}

    @property
    def total(self) -> float:
        return sum(self.counted.values())


def memory(config: Config, ranks: int, tokens: int | None = None) -> Memory:
    """Of each rank; `tokens` of a forward pass, by default trainer.micro_rows rows."""
    tokens = tokens or config.trainer.micro_rows * config.trainer.seq_len
    found = Memory(states(config, ranks), kept(config, tokens), passing(config, tokens))
    if config.parallel.zero_stage == 3:
        # What is gathered lies there at the turn from forward to backward, as activations do.
        found.kept["gathered"] = gathered(config, ranks)
        found.passing["gradients scattered"] = _scattered(config)
    return found


def states(config: Config, ranks: int) -> dict[str, float]:
    """Weights, gradients, optimizer, and the buckets in which gradients travel, as ZeRO's stage shards them.

    What is offloaded is on the host, also stage 3's gradients. (Stage 2 sums them on the GPU and copies the sums.)
    """
    parameters = sum(total for total, _ in parameters_by_part(meta_model(config)).values())
    stage, width = config.parallel.zero_stage, dtype_of(config.trainer.dtype).itemsize
    weights_there = config.parallel.offload_params == "none"
    optimizer_there = config.parallel.offload_optimizer == "none"
    buckets = 0.0  # of full size, also where the model is smaller
    if stage == 3:  # in the dtype in which gradients travel
        buckets = BUCKET_ELEMENTS * _travelling(config)
    elif not without_buckets(config, ranks):
        buckets = BUCKET_ELEMENTS * width
    return {
        "weights": weights_there * parameters * width / (ranks if stage == 3 else 1),
        "gradients": (optimizer_there or stage < 3) * parameters * (width if stage == 1 else FP32 / ranks),
        "optimizer": optimizer_there * parameters * 3 * FP32 / ranks,
        "communication": buckets,
    }


def _travelling(config: Config) -> int:
    """Bytes of a gradient's element between ranks."""
    return 2 if config.parallel.reduce_dtype == "bf16" and dtype_of(config.trainer.dtype).itemsize == 2 else FP32


def _scattered(config: Config) -> float:
    """The copy of a full bucket that stage 3 makes to scatter it, or of a parameter that is larger than the bucket."""
    sizes = [p.numel() for p in meta_model(config).parameters()]
    return max(min(BUCKET_ELEMENTS, sum(sizes)), *sizes) * _travelling(config)


def gathered(config: Config, ranks: int) -> float:
    """Whole weights at stage 3, beside this rank's shards, and the gradients of the module that runs."""
    width = dtype_of(config.trainer.dtype).itemsize
    copied = ranks > 1 or config.parallel.offload_params != "none"  # else the shard on the GPU is the weight
    return width * (copied * whole_weights(config) + max(_module_sizes(config)))


def whole_weights(config: Config) -> int:
    """Elements of weights that a rank has gathered at once at stage 3, at most.

    A module's are there while it runs, and from its forward to its backward pass where fewer elements are used between
    them than the reuse distance. And each module gathers some for those behind it, as long as fewer than allowed live.
    """
    *sizes, head = _module_sizes(config)
    zero = STAGE_3 | config.parallel.deepspeed.get("zero_optimization", {})
    held = head  # which the whole model reads: it is there all the time, and used once between the passes
    for size in reversed(sizes):  # the backward pass begins with what ran last
        if 2 * held - head >= zero["stage3_max_reuse_distance"]:
            break
        held += size
    others = zero["stage3_max_live_parameters"] if zero["stage3_prefetch_bucket_size"] else head
    return min(max(held, others + max(sizes)), sum(p.numel() for p in meta_model(config).parameters()))


def _module_sizes(config: Config) -> list[int]:
    """Elements of each module's own parameters, about in the order in which they run."""
    return [sum(p.numel() for p in module.parameters(recurse=False)) for module in meta_model(config).modules()]


def without_buckets(config: Config, ranks: int) -> bool:
    parallel, bf16 = config.parallel, dtype_of(config.trainer.dtype).itemsize == 2
    return adds_at_once(ranks, parallel.zero_stage, bf16, parallel.offload_optimizer != "none")


def attention_bytes(config: Config) -> float:
    """Kept by one attention layer, of a token: its input, what the branches read and gave, the gates."""
    m, a, width = config.model, config.attention, dtype_of(config.trainer.dtype).itemsize
    heads_out, pair = m.heads * m.value_dim * width, m.kv_heads * (m.key_dim + m.value_dim) * width
    found = m.width * width + m.heads * m.key_dim * width  # normed input, rotated queries
    gates = m.heads * len(a.branches) * width if a.gate else 0.0
    if "cmp" not in a.branches:
        # K and V, each document's output and all of them side by side, log-sum-exps; gated outputs
        return found + pair + 2 * heads_out + m.heads * FP32 + gates + (heads_out if a.gate else 0.0)
    # segments; phi's hidden layer before and after its silu, compressed K and V
    found += pair * ((a.phi != "mean") + (1 + 2 * (a.phi == "mlp")) / a.cmp_stride)
    own = sum(branch in a.branches for branch in ("slc", "win"))
    found += pair * (1 if a.shared_kv else own)
    # output of the branches and of the op, log-sum-exps, chosen blocks, gates as the op takes them
    return found + 4 * heads_out + 3 * m.heads * FP32 + m.kv_heads * a.slc_count * FP32 + 2 * gates


def experts_bytes(config: Config) -> float:
    """Kept by a mixture of experts, of a token."""
    e, width = config.moe, dtype_of(config.trainer.dtype).itemsize
    rows = e.top_k * (2 * e.expert_width * width + 2 * INT64)  # gate_up's product; tables of rows
    return routing_bytes(config) + rows + 3 * e.shared * e.expert_width * width


def routing_bytes(config: Config) -> float:
    """Kept by a router, of a token: its input, logits, and what it gave the experts. Never recomputed."""
    m, e = config.model, config.moe
    return m.width * dtype_of(config.trainer.dtype).itemsize + e.experts * FP32 + e.top_k * (INT64 + FP32)


def dense_bytes(config: Config) -> float:
    """Kept by a dense MLP, of a token."""
    m, e, width = config.model, config.moe, dtype_of(config.trainer.dtype).itemsize
    return (m.width + 3 * (e.top_k + e.shared) * e.expert_width) * width


def kept(config: Config, tokens: int) -> dict[str, float]:
    m, width = config.model, dtype_of(config.trainer.dtype).itemsize
    sparse = m.layers - m.dense_layers
    residual = (m.width * width + FP32) * tokens  # what a norm keeps: its input, and a number
    again = config.trainer.computed_again
    attention = 0.0 if "attention" in again else m.layers * attention_bytes(config) * tokens
    experts = routing_bytes(config) if "mlp" in again else experts_bytes(config)
    dense = m.width * width if "mlp" in again else dense_bytes(config)
    return {
        "attention": attention,
        "experts": sparse * experts * tokens,
        "dense MLP": m.dense_layers * dense * tokens,
        "residual stream": (2 * m.layers + 1) * residual,
        "head": (m.width * width + FP32) * tokens,
    }


def passing(config: Config, tokens: int) -> dict[str, float]:
    """What comes and goes: the backward passes of the head, of an expert layer and of an attention layer."""
    m, a, e = config.model, config.attention, config.moe
    width, again = dtype_of(config.trainer.dtype).itemsize, config.trainer.computed_again
    logits = min(config.trainer.loss_chunk_tokens, tokens) * m.vocab * width  # they become their gradient
    summed = m.vocab * m.width * (FP32 + (width if width < FP32 else 0))  # the weight's gradient, and rounded
    head = logits + summed + tokens * m.width * width
    experts = tokens * e.top_k * (m.width + 4 * e.expert_width) * width  # rows of the gradient; of h and gate_up twice
    attention = tokens * (2 * m.heads * m.key_dim + m.heads * m.value_dim) * width
    if "cmp" in a.branches:
        chunks = -(-tokens // query_chunk(tokens))
        sums = chunks * tokens // a.cmp_stride * m.kv_heads * (m.key_dim + m.value_dim) * FP32
        lists = 2 * tokens * m.kv_heads * a.slc_count * FP32
        attention += max(sums, SCRATCH_BYTES, lists)
    # A part that is computed once more lies there in whole.
    if "mlp" in again:
        experts += tokens * experts_bytes(config)
    if "attention" in again:
        attention += tokens * attention_bytes(config)
    return {"head backward": head, "experts backward": experts, "attention backward": attention}
