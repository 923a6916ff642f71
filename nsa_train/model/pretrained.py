"""The same model as a `transformers` PreTrainedModel, so that a run's export opens with the Auto classes.

    import nsa_train.model.pretrained
    model = AutoModelForCausalLM.from_pretrained("runs/tiny-nsa/export")

Import on demand: `transformers` costs seconds. Batches [B, S] are flattened to packed documents.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationMixin, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nsa_train.config.schema import AttentionConfig, ModelConfig, MoEConfig
from nsa_train.errors import ConfigError, NsaTrainError
from nsa_train.model.transformer import Transformer
from nsa_train.packing import Packing


class NSATrainConfig(PretrainedConfig):
    """The sections `model`, `attention` and `moe` of a run's configuration, as plain data."""

    model_type = "nsa_train"

    def __init__(
        self,
        model: dict[str, Any] | None = None,
        attention: dict[str, Any] | None = None,
        moe: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.model, self.attention, self.moe = model or {}, attention or {}, moe or {}
        self.vocab_size, self.hidden_size = self.model.get("vocab"), self.model.get("width")
        self.num_hidden_layers, self.use_cache = self.model.get("layers"), False
        self.max_position_embeddings = self.model.get("max_seq_len")
        super().__init__(**{"tie_word_embeddings": bool(self.model.get("tied_embeddings")), **kwargs})

    @staticmethod
    def of(model: ModelConfig, attention: AttentionConfig, moe: MoEConfig, **kwargs: Any) -> NSATrainConfig:
        sections = dataclasses.asdict(model), dataclasses.asdict(attention), dataclasses.asdict(moe)
        return NSATrainConfig(*sections, **kwargs)

    def build(self) -> Transformer:
        """The model with the default device's memory. ConfigError where another version wrote other keys."""
        wrong = []
        for section, kind in (("model", ModelConfig), ("attention", AttentionConfig), ("moe", MoEConfig)):
            known = {field.name for field in dataclasses.fields(kind)}
            wrong += [
                f"  {section}.{key}: {'missing' if key in known else 'no such key'}"
                for key in sorted(known ^ getattr(self, section).keys())
            ]
        if wrong:
            raise ConfigError(
                f"{self.name_or_path or 'the export'}: another version of nsa_train wrote its config.json; use that "
                "one, or train and export again with this one:\n" + "\n".join(wrong)
            )
        attention = {**self.attention, "branches": tuple(self.attention["branches"])}
        return Transformer(ModelConfig(**self.model), AttentionConfig(**attention), MoEConfig(**self.moe))


class NSATrainForCausalLM(PreTrainedModel, GenerationMixin):
    """[B, S] token ids -> logits [B, S, V]. Generation without a cache."""

    config_class = NSATrainConfig
    base_model_prefix = "transformer"
    _tied_weights_keys = {"transformer.head.weight": "transformer.embed.weight"}  # noqa: RUF012
    _keep_in_fp32_modules_strict = {"router.bias", "head.prior"}  # noqa: RUF012
    _supports_cache_class = False
    accepts_loss_kwargs = False  # the loss is a mean: transformers' Trainer has to divide by its accumulation steps

    def __init__(self, config: NSATrainConfig) -> None:
        super().__init__(config)
        self.transformer = config.build()
        if not self.transformer.embed.weight.is_meta:  # made, not loaded: weights of a run with seed 0
            self.transformer.start(seed=0)
        self.post_init()

    @staticmethod
    def _finalize_model_loading(model: PreTrainedModel, load_config: Any, loading_info: Any) -> Any:
        """As of transformers, which would leave what a file lacks as it lay in memory, with a warning at most.

        Raises NsaTrainError. Here, because what `from_pretrained` tells forgets a lost tensor of two tied names.
        """
        missing = set(loading_info.missing_keys)
        for tied in model.all_tied_weights_keys.items():
            if not missing.issuperset(tied):
                missing.difference_update(tied)
        if missing:
            place = load_config.pretrained_model_name_or_path or "the export"
            raise NsaTrainError(
                f"{place}: {len(missing)} of the model's tensors are not there; copy it from where it is whole, or "
                "train and export again:\n  " + "\n  ".join(sorted(missing))
            )
        return PreTrainedModel._finalize_model_loading(model, load_config, loading_info)

    def _init_weights(self, module: nn.Module) -> None:
        """Nothing: `Transformer.start` has set every value, or the file that is being loaded does."""

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.transformer.head

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """labels [B, S] as usual in transformers: shifted here, -100 ignored. Padding becomes documents of its own.

        Raises ValueError for what would be read otherwise than it is meant: position_ids, which tell packed documents
        in other models, and text with padding inside.
        """
        B, S = input_ids.shape
        if position_ids is not None:
            raise ValueError("position_ids are not taken: give packed documents as rows, or Packing to the transformer")
        if self.config.max_position_embeddings < S:
            raise ValueError(f"{S} tokens are beyond the model's max_seq_len={self.config.max_position_embeddings}")
        lengths = [S] * B if attention_mask is None else _document_lengths(attention_mask)
        with torch.autocast(input_ids.device.type, enabled=False):  # each part has its precision, the router fp32
            logits = self.transformer.logits(input_ids.flatten(), Packing.from_lengths(lengths).to(input_ids.device))
        logits = logits.view(B, S, -1)
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=-100)
        return CausalLMOutput(loss=loss, logits=logits)

    def prepare_inputs_for_generation(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> dict:
        return {"input_ids": input_ids, "attention_mask": attention_mask}


def _document_lengths(mask: Tensor) -> list[int]:
    """Runs of equal mask values, row by row: text and padding of [B, S] as packed documents."""
    runs = [torch.unique_consecutive(row, return_counts=True) for row in mask]
    if any(values.count_nonzero() > 1 for values, _ in runs):
        raise ValueError("attention_mask has padding inside a row's text; pad on the left for generate()")
    return [int(n) for _, counts in runs for n in counts]


AutoConfig.register("nsa_train", NSATrainConfig, exist_ok=True)
AutoModelForCausalLM.register(NSATrainConfig, NSATrainForCausalLM, exist_ok=True)
