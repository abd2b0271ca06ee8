"""Reading a `config.json` that another program wrote: each key is understood, harmless, or refused by name."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from functional_lm.errors import DataError

REQUIRED = object()
# Keys that change no logits, whatever they are: names, ids, precision, and settings of training, heads and outputs.
HARMLESS = frozenset({
    "architectures", "model_type", "torch_dtype", "dtype", "transformers_version", "_name_or_path", "use_cache",
    "tokenizer_class", "tokenizer_sha256", "bos_token_id", "eos_token_id", "pad_token_id", "sep_token_id",
    "pretraining_tp",
    "task_specific_params", "id2label", "label2id", "return_dict", "output_attentions", "output_hidden_states",
    "output_scores", "problem_type", "finetuning_task", "is_decoder", "classifier_dropout", "summary_type",
    "summary_use_proj", "summary_activation", "summary_proj_to_labels", "summary_first_dropout",
    "reorder_and_upcast_attn", "gradient_checkpointing", "_attn_implementation", "attn_implementation",
    "_attn_implementation_autoset", "_num_labels", "is_llama_config", "max_sequence_length", "max_length", "do_sample",
    "temperature", "top_k", "top_p", "repetition_penalty",
})  # fmt: skip
# Keys that change nothing at one value.
NEUTRAL: dict[str, Any] = {
    "add_cross_attention": False,
    "is_encoder_decoder": False,
    "tie_encoder_decoder": False,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "chunk_size_feed_forward": 0,
    "pruned_heads": {},
    "torchscript": False,
    "use_bfloat16": False,
    "rope_interleaved": False,
    "use_mrope": False,
}
# What a value has to be before anything is computed with it; of what stands in none of them, whoever reads it decides.
WHOLE = frozenset({
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "intermediate_size", "max_position_embeddings", "sliding_window",
    "max_window_layers", "n_embd", "n_layer", "n_head", "n_inner", "n_positions", "n_ctx",
})  # fmt: skip
REAL = frozenset({
    "rope_theta", "partial_rotary_factor", "factor", "low_freq_factor", "high_freq_factor", "rotary_pct",
    "rotary_emb_base", "rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "initializer_range",
    "attention_dropout", "hidden_dropout", "resid_pdrop", "embd_pdrop", "attn_pdrop",
    "original_max_position_embeddings",
})  # fmt: skip
SWITCHES = frozenset({
    "attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window", "use_parallel_residual",
})  # fmt: skip
OBJECTS = frozenset({"rope_scaling", "rope_parameters"})
LISTS, WORDS = frozenset({"layer_types"}), frozenset({"rope_type", "type"})
POSITIVE = frozenset({"num_attention_heads", "num_key_value_heads", "n_head"})
REMEDIES = {
    "quantization_config": "quantised weights are not read; import the folder that they were made from",
    "auto_map": "the model brings code of its own, which is never run",
}


class Keys:
    """The keys of a `config.json`, each to be taken once; what is left at the end has to be harmless."""

    def __init__(self, values: Mapping[str, Any], source: str) -> None:
        self._values = {key: value for key, value in values.items() if value is not None}
        self._source = source

    def take(self, key: str, default: Any = REQUIRED) -> Any:
        """The value of a key; null counts as absent."""
        value = self._values.pop(key, default)
        if value is REQUIRED:
            raise DataError(f"{self._source} lacks {key!r}, which its model_type needs")
        if value is not default:
            self._check(key, value)
        return value

    def _check(self, key: str, value: Any) -> None:
        """Refuse a value of another kind than the key's, and what an object holds of such."""
        number, whole = isinstance(value, (int, float)) and not isinstance(value, bool), isinstance(value, int)
        wanted = [
            word
            for names, right, word in (
                (WHOLE, number and whole, "a whole number"),
                (REAL, number, "a number"),
                (SWITCHES, isinstance(value, bool), "true or false"),
                (OBJECTS, isinstance(value, dict), "an object of settings"),
                (LISTS, isinstance(value, list) and all(isinstance(each, str) for each in value), "a list of words"),
                (WORDS, isinstance(value, str), "a word"),
                (POSITIVE, number and value > 0, "above 0"),
            )
            if key in names and not right
        ]
        if wanted:
            raise self.refusal(key, value, f"it has to be {wanted[0]}")
        if key in OBJECTS:
            for inner, part in value.items():
                if part is not None:
                    self._check(inner, part)

    def choose(self, key: str, choices: Mapping[Any, Any], default: Any) -> Any:
        """What a value among `choices` means."""
        value = self.take(key, default)
        if isinstance(value, dict | list) or value not in choices:
            raise self.refusal(key, value, f"it can be {' or '.join(map(repr, choices))}")
        return choices[value]

    def only(self, key: str, neutral: Any) -> None:
        """A key that may have this value alone."""
        value = self.take(key, neutral)
        if value != neutral:
            raise self.refusal(key, value, f"it can only be {neutral!r}")

    def rest(self) -> None:
        """Refuse, by name, what nobody took and what is not known to be harmless."""
        for key, value in NEUTRAL.items():
            self.only(key, value)
        for key, value in self._values.items():
            if key not in HARMLESS:
                reason = REMEDIES.get(
                    key, "this version does not know what it changes; remove it if it changes nothing"
                )
                raise self.refusal(key, value, reason)

    def refusal(self, key: str, value: Any, reason: str) -> DataError:
        shown = repr(value)
        return DataError(f"{self._source}: {key!r} is {shown[:57] + '...' if len(shown) > 60 else shown}; {reason}")
