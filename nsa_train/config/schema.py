"""What every key in configs/ means: its name, its type, and the rules between keys.

No field has a default. Values live in the YAML files, and nowhere else. `problems()` lists breaches as
`key: what is wrong; what to do`; the loader shows the breaches of the whole tree in one report.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nsa_train.config import deepspeed_keys
from nsa_train.config.data_schema import DataConfig
from nsa_train.config.rules import SAFE_NAME, mixture_problems, negative, not_positive

Branch = Literal["cmp", "slc", "win", "full"]
LayerPart = Literal["attention", "mlp"]
BRANCH_LISTS = (("full",), ("win",), ("cmp", "slc", "win"), ("cmp", "win"), ("cmp", "slc"))
YEAR_S = 365 * 86400
GROUPED_ALIGN = 8  # elements: 16 bytes of bf16
BF16_AT_STAGE_1 = "parallel.zero_stage=1 sums bf16 gradients in bf16; use parallel.zero_stage=2"
AUTO_AT_STAGE_1 = f"trainer.dtype=auto is bf16 on a GPU, and {BF16_AT_STAGE_1}"


@dataclass(frozen=True)
class ModelConfig:
    """The transformer around attention and experts."""

    vocab: int  # tokenizer's size and rows of the embedding
    layers: int
    width: int  # M
    heads: int  # Hq, query heads
    kv_heads: int  # Hk, each serves heads // kv_heads query heads
    key_dim: int  # D
    value_dim: int  # Dv
    dense_layers: int  # first layers whose MLP is dense; the others are mixtures of experts
    max_seq_len: int  # longest row the positions are meant for
    rope_theta: float
    rope_factor: float  # YaRN: stretches positions for rows so many times rope_trained_len; 1: none
    rope_trained_len: int  # tokens of the rows that the positions are trained at before they are stretched
    norm_eps: float
    tied_embeddings: bool
    init_std: float
    head_prior: bool  # a fixed prior in the logits
    embedding_std: float  # of embeddings that are not tied to the head

    def problems(self) -> list[str]:
        found = not_positive(self, "vocab", "layers", "width", "heads", "kv_heads", "key_dim", "value_dim", "norm_eps")
        found += not_positive(self, "max_seq_len", "rope_theta", "rope_trained_len", "init_std", "embedding_std")
        if self.kv_heads > 0 and self.heads % self.kv_heads:
            found.append(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.key_dim % 2:
            found.append(f"key_dim={self.key_dim} must be even: RoPE rotates pairs")
        if not self.rope_factor >= 1:
            found.append(f"rope_factor={self.rope_factor} must be 1 (none) or more")
        if self.vocab < 300:
            found.append(f"vocab={self.vocab} leaves no room beside 256 byte pieces; use at least 300")
        if not 0 <= self.dense_layers <= self.layers:
            found.append(f"dense_layers={self.dense_layers} must lie between 0 and layers={self.layers}")
        return found


@dataclass(frozen=True)
class AttentionConfig:
    """One attention layer. Letters in brackets are the paper's (arXiv 2502.11089)."""

    branches: tuple[Branch, ...]  # [full] is the FlashAttention baseline, [cmp, slc, win] is NSA
    gate: bool  # sigmoid gate per query head and branch
    phi: Literal["mlp", "linear", "gated_pool", "mean"]  # how a block becomes one compressed key or value
    shared_kv: bool  # one K/V projection for all branches instead of one each
    selection: Literal["topn", "random", "none"]  # how the free blocks are chosen; none: forced blocks only
    backend: Literal["auto", "reference", "triton"]  # of NSA's op; auto: Triton on a GPU, the reference on a CPU
    cmp_block: int  # [l]   tokens pooled into one compressed key
    cmp_stride: int  # [d]   tokens from one compressed key to the next
    slc_block: int  # [l']  tokens in one selectable block
    slc_count: int  # [n]   blocks a query reads, forced ones included
    slc_init: int  # forced: first blocks of the document
    slc_local: int  # forced: last blocks up to the query's own
    window: int  # [w]   tokens the sliding window sees, the query's own included

    @property
    def selects_from(self) -> int:
        """Position in a document, n l', up to which the blocks that a query reads are all that there are."""
        return self.slc_count * self.slc_block

    def problems(self) -> list[str]:
        sizes = ("cmp_block", "cmp_stride", "slc_block", "slc_count", "slc_local", "window")
        found = not_positive(self, *sizes) + negative(self, "slc_init")
        if self.branches not in BRANCH_LISTS:
            choices = " or ".join("[" + ",".join(names) + "]" for names in BRANCH_LISTS)
            found.append(f"branches=[{','.join(self.branches)}] is not trainable; use {choices}")
        if len(self.branches) > 1 and not self.gate:
            found.append("gate=false needs a single branch: several are summed by their gates")
        if self.cmp_stride > 0 and self.cmp_block % self.cmp_stride:
            found.append(f"cmp_stride={self.cmp_stride} must divide cmp_block={self.cmp_block}")
        if self.cmp_stride > 0 and self.slc_block % self.cmp_stride:
            found.append(f"cmp_stride={self.cmp_stride} must divide slc_block={self.slc_block}")
        if self.slc_count < (forced := self.slc_init + self.slc_local):
            found.append(f"slc_count={self.slc_count} is less than the forced blocks slc_init + slc_local = {forced}")
        return found


@dataclass(frozen=True)
class MoEConfig:
    """The mixture of experts that replaces the MLP behind the dense layers."""

    experts: int  # E, routed
    shared: int  # experts that every token visits
    top_k: int  # K, routed experts per token
    expert_width: int  # F
    router: Literal["sigmoid", "softmax"]
    normalise: bool  # the K weights of a token sum to routed_scale
    routed_scale: float
    bias_rate: float  # step of the loss-free balancing bias; 0 switches it off
    aux_weight: float  # weight of the balance loss per document; 0 switches it off

    def problems(self) -> list[str]:
        found = not_positive(self, "experts", "top_k", "expert_width", "routed_scale")
        found += negative(self, "shared", "bias_rate", "aux_weight")
        if self.top_k > self.experts:
            found.append(f"top_k={self.top_k} must lie between 1 and experts={self.experts}")
        return found


@dataclass(frozen=True)
class OptimConfig:
    """AdamW. Matrices decay; vectors (norms, biases) and embeddings do not."""

    lr: float  # peak
    beta1: float
    beta2: float
    eps: float
    weight_decay: float
    clip: float  # global gradient norm; 0 switches it off

    def problems(self) -> list[str]:
        betas = {key: getattr(self, key) for key in ("beta1", "beta2")}
        bad = [f"{key}={beta} must lie in [0, 1)" for key, beta in betas.items() if not 0 <= beta < 1]
        return not_positive(self, "lr", "eps") + bad + negative(self, "weight_decay", "clip")


@dataclass(frozen=True)
class ScheduleConfig:
    """Learning rate over steps: linear warm-up, then cosine, or stable and linear decay (WSD)."""

    kind: Literal["cosine", "wsd"]
    warmup_share: float  # of all steps
    decay_share: float  # wsd: of the steps behind the warm-up, spent in the final decay
    final_share: float  # of the peak: what the rate has fallen to when all steps are done

    def problems(self) -> list[str]:
        found = []
        if not 0 <= self.warmup_share < 1:
            found.append(f"warmup_share={self.warmup_share} must lie in [0, 1)")
        if not 0 < self.decay_share <= 1:
            found.append(f"decay_share={self.decay_share} must lie in (0, 1]")
        if not 0 <= self.final_share <= 1:
            found.append(f"final_share={self.final_share} must lie in [0, 1]")
        return found


@dataclass(frozen=True)
class ParallelConfig:
    """What DeepSpeed shards, and how ranks talk."""

    zero_stage: int  # 1: optimizer state is sharded; 2: gradients too, summed in fp32; 3: weights too
    offload_optimizer: Literal["none", "cpu"]  # where fp32 weights and moments are kept and updated
    offload_params: Literal["none", "cpu"]  # where shards of the weights are kept
    reduce_dtype: Literal["fp32", "bf16"]  # gradients between ranks
    timeout_s: int  # a collective that takes longer ends the job
    hang_s: float  # after so long without the end of a step, validation or checkpoint, stacks are written and it ends
    deepspeed: dict[str, Any]  # DeepSpeed's own keys beside ours

    def problems(self) -> list[str]:
        found = not_positive(self, "timeout_s", "hang_s")
        if self.timeout_s > YEAR_S:
            found.append(f"timeout_s={self.timeout_s} must be at most {YEAR_S}, a year")
        if self.hang_s >= self.timeout_s:
            found.append(f"hang_s={self.hang_s:g} must be below timeout_s={self.timeout_s}, which ends without stacks")
        if self.zero_stage not in (1, 2, 3):
            found.append(f"zero_stage={self.zero_stage} must be 1, 2 or 3")
        if self.offload_params != "none" and self.zero_stage != 3:
            found.append(
                f"offload_params={self.offload_params} needs sharded weights: zero_stage=3, not {self.zero_stage}"
            )
        return found + deepspeed_keys.problems(self.deepspeed)


@dataclass(frozen=True)
class TrainerConfig:
    """Length, batch and habits of a run. A row is a packed sequence of seq_len tokens."""

    steps: int
    seq_len: int  # tokens in a row
    batch_rows: int  # rows in a step, over all ranks
    micro_rows: int  # rows in one forward pass of one rank, at most
    dtype: Literal["auto", "bf16", "fp32"]  # auto: bf16 on a GPU, fp32 on a CPU
    activation_checkpointing: bool
    recomputed: tuple[LayerPart, ...]  # parts of a layer that activation checkpointing computes again
    compile: bool  # torch.compile each layer's attention around the NSA op
    cuda_graphs: bool | Literal["auto"]  # on a GPU: passes are recorded and replayed; auto: see `Config.in_graphs`
    force_balance: bool  # every expert gets as many tokens, whatever the router says: for benchmarks only
    loss_chunk_tokens: int  # logits exist for so many tokens at once
    log_every: int
    val_every: int
    val_rows: int  # held-out rows in a validation, at most
    heldout_rows: int | None  # of losses by document at the end, at most; None: those of a validation
    checkpoint_every: int  # and at the end; 0: only where a signal stops the run
    keep_checkpoints: int
    max_bad_steps: int  # skipped steps in a row that stop the run
    on_spike: Literal["warn", "skip", "stop"]  # what a step does whose loss lies far above the last ones
    spike_sigmas: float  # far: so many standard deviations; 0: never
    spike_window: int  # the last ones: so many steps that were taken
    export: bool  # write export/ (Hugging Face safetensors) at the end

    def problems(self) -> list[str]:
        found = not_positive(
            self, "steps", "seq_len", "batch_rows", "micro_rows", "loss_chunk_tokens", "log_every", "val_every",
            "val_rows", "heldout_rows", "keep_checkpoints", "max_bad_steps",
        )  # fmt: skip
        if self.checkpoint_every < 0:
            found.append(
                f"checkpoint_every={self.checkpoint_every} must not be negative; 0 writes one only at a signal"
            )
        if self.spike_sigmas < 0:
            found.append(f"spike_sigmas={self.spike_sigmas} must not be negative; 0 switches it off")
        if self.spike_window < 2:
            found.append(f"spike_window={self.spike_window} has no deviation; use at least 2 steps")
        if len(set(self.recomputed)) != max(1, len(self.recomputed)):
            found.append(f"recomputed=[{','.join(self.recomputed)}] must name attention, mlp or both, each once")
        return found

    @property
    def computed_again(self) -> tuple[LayerPart, ...]:
        """Parts of a layer whose forward pass the backward pass repeats."""
        return self.recomputed if self.activation_checkpointing else ()


@dataclass(frozen=True)
class StageConfig:
    """A part of a run with its own length of rows. Tokens in a step stay those of the trainer."""

    tokens: int | None  # that the stage reads, rounded up to whole steps; null, in the last one: until the run ends
    seq_len: int  # tokens in a row
    mixture: dict[str, float]  # as data.mixture; empty: that one
    rope_factor: float  # YaRN: seq_len over model.rope_trained_len, or 1

    def problems(self) -> list[str]:
        found = mixture_problems(self.mixture) + not_positive(self, "tokens")
        if self.seq_len < 2:
            found.append(f"seq_len={self.seq_len} leaves nothing to predict; use at least 2")
        if not self.rope_factor >= 1:
            found.append(f"rope_factor={self.rope_factor} must be 1 (none) or more")
        return found


@dataclass(frozen=True)
class StagesConfig:
    """Stages in their order. Without any, the whole run has rows of trainer.seq_len."""

    parts: dict[str, StageConfig]

    def problems(self) -> list[str]:
        found, last = [], next(reversed(self.parts), None)
        for name, part in self.parts.items():
            if name != last and part.tokens is None:
                found.append(f"parts.{name}.tokens is null, which only the last stage may be; say how many it reads")
            if name == last and part.tokens is not None:
                found.append(f"parts.{name}.tokens={part.tokens}: the last stage lasts until the run ends; set null")
        longest = max((part.seq_len for part in self.parts.values()), default=0)
        found += [
            f"parts.{name}.seq_len={part.seq_len} does not divide the longest stage's {longest}"
            for name, part in self.parts.items()
            if part.seq_len > 0 and longest % part.seq_len
        ]
        return found


@dataclass(frozen=True)
class LoggingConfig:
    """Weights & Biases. metrics.jsonl and the console are always on."""

    wandb: Literal["auto", "online", "offline", "disabled"]  # auto: online with a key, else offline
    project: str
    group: str | None  # null: the experiment's name
    tags: tuple[str, ...]  # beside the attention arm

    def problems(self) -> list[str]:
        return []


@dataclass(frozen=True)
class ProfileConfig:
    """Where the time of a step goes: a trace and a table of a few steps."""

    steps: int  # to trace; 0: none
    skip: int  # steps before them, and one more to warm the profiler up

    def problems(self) -> list[str]:
        return negative(self, "steps", "skip")

    @property
    def until_written(self) -> int:
        """Steps of a launch until its profile is written; 0: there is none."""
        return self.skip + 1 + self.steps if self.steps else 0


@dataclass(frozen=True)
class Config:
    """The whole tree. `experiment` and `arm` are the chosen options of their groups; the loader fills them in."""

    experiment: str
    arm: str
    name: str  # of the run and its folder; null in YAML: <experiment>-<attention>
    runs_dir: str
    seed: int
    init_from: str | None  # folder of a run, a checkpoint or an export whose weights the run starts with
    model: ModelConfig
    attention: AttentionConfig
    moe: MoEConfig
    data: DataConfig
    optim: OptimConfig
    schedule: ScheduleConfig
    parallel: ParallelConfig
    trainer: TrainerConfig
    stages: StagesConfig
    logging: LoggingConfig
    profile: ProfileConfig

    def problems(self) -> list[str]:
        found = negative(self, "seed")
        if not SAFE_NAME.fullmatch(self.name):
            found.append(f"name={self.name!r} may hold letters, digits and . _ - only, 100 at most")
        rows = {f"stages.parts.{name}": part.seq_len for name, part in self.stages.parts.items()}
        for place, seq_len in {"trainer": self.trainer.seq_len, **rows}.items():
            if seq_len > self.model.max_seq_len:
                found.append(
                    f"{place}.seq_len={seq_len} is beyond model.max_seq_len={self.model.max_seq_len}; "
                    "shorten the row, or raise the model's limit"
                )
            if self.data.align > 0 and seq_len % self.data.align:
                found.append(f"{place}.seq_len={seq_len} is not a multiple of data.align={self.data.align}")
        found += self._stage_problems()
        if self.trainer.cuda_graphs is True and (against := ", ".join(self._against_graphs())):
            found.append(f"trainer.cuda_graphs=true does not go with {against}; leave it false, or auto")
        if self.trainer.seq_len < 2:
            found.append(f"trainer.seq_len={self.trainer.seq_len} leaves nothing to predict; use at least 2")
        if self.parallel.zero_stage == 1 and self.trainer.dtype == "bf16":
            found.append(BF16_AT_STAGE_1)
        if (needed := self.profile.until_written) > self.trainer.steps > 0:
            found.append(f"trainer.steps={self.trainer.steps} are too few; use {needed} or a lower profile.skip")
        return found

    def gpu_problems(self) -> list[str]:
        """What is wrong on a GPU only."""
        found, bf16 = [], self.trainer.dtype in ("auto", "bf16")
        if self.parallel.zero_stage == 1 and self.trainer.dtype == "auto":
            found.append(AUTO_AT_STAGE_1)
        if bf16 and self.moe.expert_width % GROUPED_ALIGN and self.model.layers > self.model.dense_layers:
            found.append(
                f"moe.expert_width={self.moe.expert_width} is not a multiple of {GROUPED_ALIGN}, which grouped matrix "
                "products in bf16 need on a GPU; change it, or use trainer.dtype=fp32"
            )
        return found

    def _against_graphs(self) -> list[str]:
        """What asks the device, or moves weights and gradients."""
        attention, parallel, trainer = self.attention, self.parallel, self.trainer
        against = {
            "attention.backend=reference": attention.backend == "reference",
            "trainer.dtype=fp32": trainer.dtype == "fp32",
            "trainer.compile=true": trainer.compile,
            "trainer.activation_checkpointing=true": trainer.activation_checkpointing,
            "parallel.zero_stage=3": parallel.zero_stage == 3,
            "parallel.offload_optimizer=cpu": parallel.offload_optimizer == "cpu",
        }
        return [key for key, so in against.items() if so]

    @property
    def in_graphs(self) -> bool:
        """Whether passes are to be replayed as CUDA graphs, where the machine can; auto: if no key is against it."""
        asked = self.trainer.cuda_graphs
        return asked is True or (asked == "auto" and not self._against_graphs())

    def _stage_problems(self) -> list[str]:
        step_tokens = self.trainer.seq_len * self.trainer.batch_rows
        found, before = [], 0
        for name, part in self.stages.parts.items():
            if part.seq_len > 0 and step_tokens % part.seq_len:
                found.append(
                    f"stages.parts.{name}.seq_len={part.seq_len} does not divide a step's {step_tokens} tokens "
                    "(trainer.batch_rows x trainer.seq_len)"
                )
            if step_tokens > 0 and -(-before // step_tokens) >= self.trainer.steps:
                found.append(
                    f"stages.parts.{name} is never reached: the stages before it read {before} tokens, the run "
                    f"{self.trainer.steps * step_tokens}; raise trainer.steps"
                )
            after = before + (part.tokens or 0)
            if part.tokens and step_tokens > 0 and -(-before // step_tokens) == -(-after // step_tokens):
                found.append(
                    f"stages.parts.{name}.tokens={part.tokens} are none of the run's steps: the stages before it end "
                    f"inside a step of {step_tokens} tokens, which is whole; use that many at least"
                )
            before = after
        return found

    def sharing_problems(self, processes: int) -> list[str]:
        """Rows of a step that so many processes cannot share evenly."""
        batch_rows = self.trainer.batch_rows
        rows = {} if self.stages.parts else {f"trainer.batch_rows={batch_rows} is": batch_rows}
        for name, part in self.stages.parts.items():
            number = batch_rows * self.trainer.seq_len // max(1, part.seq_len)
            rows[f"stages.parts.{name}: {number} rows of {part.seq_len} tokens in a step are"] = number
        wrong = f"not a multiple of the {processes} processes; change trainer.batch_rows or their number"
        return [f"{what} {wrong}" for what, number in rows.items() if number % processes]

    @property
    def run_dir(self) -> Path:
        return Path(self.runs_dir) / self.name
