"""LLaMA folders, and what the folders of its relatives share with them."""

import dataclasses
from typing import Unpack

from jaxalign.errors import UserError
from jaxalign.models.hf import rotary
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.llama import LlamaConfig


def classes(name: str) -> dict[str, str]:
  """Head -> class, of the causal architecture that transformers calls so."""
  scores = ("score_last", "score_eos", "score_mean")
  scorer = f"{name}ForSequenceClassification"
  return {"lm": f"{name}ForCausalLM"} | dict.fromkeys(scores, scorer)


MODEL_TYPE = "llama"
BASE = "model."
CLASSES = classes("Llama")
HEADS = ("score_head",)
ALIASES = (("score.", "v_head."),)
# Buffers of older files, and the head that another task would use.
IGNORED = (r"rotary_emb\.inv_freq$", r"^(lm_head|score|v_head)\.")
FULL, SLIDING = "full_attention", "sliding_attention"  # kinds of layers
# What transformers takes where the file lacks a field.
DEFAULTS: JsonObject = {"max_position_embeddings": 2048, "eos_token_id": 2}


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> LlamaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  config = read(fields.over(DEFAULTS), **switches)
  bias = fields.get(bool, "attention_bias", default=False)
  return dataclasses.replace(
    config,
    attention_bias=bias,
    output_bias=bias,
    mlp_bias=fields.get(bool, "mlp_bias", default=False),
  )


def read(
  fields: Fields,
  *,
  partial: bool = False,
  kinds: tuple[str, ...] = tuple(rotary.KINDS),
  **switches: Unpack[Switches],
) -> LlamaConfig:
  """What the files of all relatives have in common; see `from_hf`.

  Args:
    fields: of the file, and what its architecture takes where they lack.
    partial: whether a part of a head may be left unrotated.
    kinds: of rotary scaling that its files may have.
    **switches: head, groups, dtype, remat.

  Raises:
    UserError: a field is missing, or has a value that is not supported.
  """
  base, fraction, scaling = rotary.read(fields, kinds=kinds)
  if fraction != 1 and not partial:
    raise UserError(
      f"{fields.where}: partial_rotary_factor must be 1 for a "
      f"{fields.model_type} model, got {fraction}"
    )
  heads = fields.size("num_attention_heads")
  width = fields.size("hidden_size")
  # Absent in older files, whose heads share the width evenly.
  head_dim = fields.size("head_dim", default=width // heads)
  pairs = int(head_dim * fraction) / 2
  if scaling is not None and scaling.kind == "longrope":
    for name, factors in (("short", scaling.short), ("long", scaling.long)):
      if len(factors) != pairs:
        raise UserError(
          f"{fields.where}: {name}_factor has {len(factors)} numbers; a head "
          f"has {pairs:g} pairs of rotated features"
        )
  return LlamaConfig(
    vocab_size=fields.size("vocab_size"),
    hidden_size=width,
    layers=fields.size("num_hidden_layers"),
    heads=heads,
    # Null, and absent in LLaMA 1's files: as many as query heads.
    kv_heads=fields.size("num_key_value_heads", default=heads),
    head_dim=head_dim,
    intermediate_size=fields.size("intermediate_size"),
    model_type=fields.model_type,
    max_positions=fields.size("max_position_embeddings"),
    rotary_fraction=fraction,
    rotary_base=base,
    rotary_scaling=scaling,
    eps=fields.get(float, "rms_norm_eps", default=1e-6),
    activation=fields.get(str, "hidden_act", default="silu"),
    tied=fields.get(bool, "tie_word_embeddings", default=False),
    eos_id=fields.token_id("eos_token_id", default=-1),  # null: it has none
    pad_id=fields.token_id("pad_token_id", default=-1),
    **switches,
  )


def windows(
  fields: Fields, kinds: list[str], window: int
) -> tuple[int, ...] | None:
  """Each layer's window, from `layer_types`.

  Args:
    fields: of the file.
    kinds: of the layers, where the file is older than the field.
    window: of those layers that have one; 0 = there is none.

  Raises:
    UserError: `layer_types` does not fit the model.
  """
  layers = len(kinds)
  given = fields.raw("layer_types")
  if given is not None and (
    not isinstance(given, list) or len(given) != layers
  ):
    raise UserError(
      f"{fields.where}: layer_types must name {layers} layers, as "
      f"num_hidden_layers says, got {given!r}"
    )
  kinds = kinds if given is None else given
  for kind in kinds:
    if kind not in (FULL, SLIDING):
      raise UserError(
        f"{fields.where}: layer_types must be made of {FULL} and {SLIDING}, "
        f"got {kind!r}; this model is not supported"
      )
  if SLIDING not in kinds:
    return None
  if window < 1:
    raise UserError(
      f"{fields.where}: a layer with {SLIDING} needs a sliding_window of at "
      "least 1, and in Qwen2 and Qwen3 use_sliding_window=true"
    )
  return tuple(window if kind == SLIDING else 0 for kind in kinds)


def to_hf(config: LlamaConfig) -> JsonObject:
  """The architecture's part of `config.json`, for old and new readers."""
  return write(config) | {
    "attention_bias": config.attention_bias,
    "mlp_bias": config.mlp_bias,
  }


def write(config: LlamaConfig) -> JsonObject:
  """The inverse of `read`."""
  fraction = None if config.rotary_fraction == 1 else config.rotary_fraction
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "num_key_value_heads": config.kv_heads,
    "head_dim": config.head_dim,
    "intermediate_size": config.intermediate_size,
    "max_position_embeddings": config.max_positions,
    # transformers 4 reads this; `write` adds what version 5 reads.
    "rope_theta": config.rotary_base,
    **rotary.write(config.rotary_base, fraction, config.rotary_scaling),
    "rms_norm_eps": config.eps,
    "hidden_act": config.activation,
    "tie_word_embeddings": config.tied,
    "eos_token_id": config.eos_id if config.eos_id >= 0 else None,
  }


def names(config: LlamaConfig) -> dict[str, str]:
  """Our modules -> theirs; a model has those that its switches ask for."""
  del config
  layer = "model.layers.{i}"
  return {
    "embedding": "model.embed_tokens",
    "blocks.input_layernorm": f"{layer}.input_layernorm",
    "blocks.post_attention_layernorm": f"{layer}.post_attention_layernorm",
    "blocks.q_proj": f"{layer}.self_attn.q_proj",
    "blocks.k_proj": f"{layer}.self_attn.k_proj",
    "blocks.v_proj": f"{layer}.self_attn.v_proj",
    "blocks.qkv_proj": f"{layer}.self_attn.qkv_proj",
    "blocks.q_norm": f"{layer}.self_attn.q_norm",
    "blocks.k_norm": f"{layer}.self_attn.k_norm",
    "blocks.o_proj": f"{layer}.self_attn.o_proj",
    "blocks.gate_proj": f"{layer}.mlp.gate_proj",
    "blocks.up_proj": f"{layer}.mlp.up_proj",
    "blocks.gate_up_proj": f"{layer}.mlp.gate_up_proj",
    "blocks.down_proj": f"{layer}.mlp.down_proj",
    "final_norm": "model.norm",
    "lm_head": "lm_head",
    "score_head": "score",
  }
