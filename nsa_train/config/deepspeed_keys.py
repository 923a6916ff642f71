"""Which of DeepSpeed's own keys may be added to those that we set: `parallel.deepspeed`, merged into deepspeed.json.

DeepSpeed takes a misspelt key without a word, and a key of ours given twice would say two things. So only these pass.
"""

from __future__ import annotations

from typing import Any

WHOLE, POSITIVE, EVEN = range(2**63), range(1, 2**63), range(0, 2**63, 2)  # numbers that DeepSpeed takes
# Names are DeepSpeed 0.19's; none of them changes what is computed, only when and in what pieces.
ADDABLE: dict[str, Any] = {
    "wall_clock_breakdown": bool,
    "memory_breakdown": bool,
    "dump_state": bool,
    "comms_logger": {"enabled": bool, "verbose": bool, "prof_all": bool, "debug": bool},
    "zero_optimization": {
        "overlap_comm": bool,
        "contiguous_gradients": bool,
        "reduce_scatter": bool,
        "reduce_bucket_size": POSITIVE,
        "allgather_partitions": bool,
        "allgather_bucket_size": EVEN,  # else an assertion of stages 1 and 2 fails
        "sub_group_size": WHOLE,
        "stage3_prefetch_bucket_size": WHOLE,
        "stage3_param_persistence_threshold": WHOLE,
        "stage3_model_persistence_threshold": WHOLE,
        "stage3_max_live_parameters": WHOLE,
        "stage3_max_reuse_distance": WHOLE,
        "stage3_use_all_reduce_for_fetch_params": bool,
        "stage3_allgather_sequential": bool,
    },
}
# DeepSpeed's name -> our key that decides it.
OURS = {
    "train_batch_size": "trainer.batch_rows",
    "train_micro_batch_size_per_gpu": "trainer.micro_rows",
    "gradient_accumulation_steps": "trainer.micro_rows",
    "gradient_clipping": "optim.clip",
    "optimizer": "optim",
    "scheduler": "schedule",
    "bf16": "trainer.dtype",
    "fp16": "trainer.dtype",
    "torch_autocast": "trainer.dtype",
    "data_types": "trainer.dtype",
    "communication_data_type": "parallel.reduce_dtype",
    "activation_checkpointing": "trainer.activation_checkpointing",
    "zero_optimization.stage": "parallel.zero_stage",
    "zero_optimization.offload_optimizer": "parallel.offload_optimizer",
    "zero_optimization.offload_param": "parallel.offload_params",
}
KINDS = {
    bool: "true or false",
    WHOLE: "a whole number",
    POSITIVE: "a positive whole number",
    EVEN: "an even whole number",
}


def problems(raw: dict[str, Any], known: dict[str, Any] = ADDABLE, place: str = "") -> list[str]:
    """Breaches of `raw`, one line each: keys that we set, keys that do not exist, values of a wrong type."""
    found = []
    for key, value in raw.items():
        name, kind = f"{place}{key}", known.get(key)
        if name in OURS:
            found.append(f"deepspeed.{name}={value!r}: {OURS[name]} decides this; set that instead")
        elif kind is None:
            found.append(f"deepspeed.{name}: no key that can be added; here are {', '.join(known)}")
        elif isinstance(kind, dict) and isinstance(value, dict):
            found += problems(value, kind, f"{name}.")
        elif isinstance(kind, dict):
            found.append(f"deepspeed.{name}={value!r} must be a table of DeepSpeed's keys")
        elif not _fits(value, kind):
            found.append(f"deepspeed.{name}={value!r} must be {KINDS[kind]}")
    return found


def _fits(value: Any, kind: Any) -> bool:
    return type(value) is bool if kind is bool else type(value) is int and value in kind


def merged(settings: dict[str, Any], raw: dict[str, Any]) -> dict[str, Any]:
    """`settings` with the checked keys of `raw` in their places."""
    both = {key: merged(settings.get(key, {}), value) for key, value in raw.items() if isinstance(value, dict)}
    return {**settings, **raw, **both}
