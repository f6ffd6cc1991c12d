"""GPT-Neo folders: `config.json` and tensor names."""

from typing import Unpack

from jaxalign.errors import UserError
from jaxalign.models.gpt_neo import GPTNeoConfig
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches

MODEL_TYPE = "gpt_neo"
BASE = "transformer."
CLASSES = {
  "lm": "GPTNeoForCausalLM",
  "score_last": "GPTNeoForSequenceClassification",
  "score_eos": "GPTNeoForSequenceClassification",
  "score_mean": "GPTNeoForSequenceClassification",
}
HEADS = ("score_head",)
# SuperHF's reward models call their score head `v_head`.
ALIASES = (("score.", "v_head."),)
IGNORED = (
  # Buffers of the causal mask, which older files carry.
  r"attn\.attention\.(bias|masked_bias)$",
  # The head that another task would use.
  r"^(lm_head|score|v_head)\.",
)


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> GPTNeoConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat."""
  width = fields.size("hidden_size")
  layers = fields.size("num_layers", "num_hidden_layers")
  return GPTNeoConfig(
    vocab_size=fields.size("vocab_size"),
    hidden_size=width,
    layers=layers,
    heads=fields.size("num_heads", "num_attention_heads"),
    # Null in the released files, which means four times the width.
    intermediate_size=fields.size("intermediate_size", default=4 * width),
    windows=_windows(fields, layers),
    max_positions=fields.size("max_position_embeddings", default=2048),
    eps=fields.get(float, "layer_norm_epsilon", default=1e-5),
    activation=fields.get(str, "activation_function", default="gelu_new"),
    tied=fields.get(bool, "tie_word_embeddings", default=True),
    eos_id=fields.token_id("eos_token_id", default=50256),
    pad_id=fields.token_id("pad_token_id", default=-1),
    **switches,
  )


def _windows(fields: Fields, layers: int) -> tuple[int, ...]:
  """From `attention_types`, e.g. [[["global", "local"], 12]]."""
  window = fields.get(int, "window_size", default=256)
  # A list of (pattern, repetitions), which spells out every layer.
  kinds = []
  for names, repeat in fields.raw("attention_types") or []:
    kinds += list(names) * repeat
  if len(kinds) != layers or not set(kinds) <= {"global", "local"}:
    raise UserError(
      f"{fields.where}: attention_types names {len(kinds)} layers, "
      f"num_layers is {layers}; each is to be 'global' or 'local'"
    )
  return tuple(window if kind == "local" else 0 for kind in kinds)


def to_hf(config: GPTNeoConfig) -> JsonObject:
  """The architecture's part of `config.json`."""
  kinds = ["local" if window else "global" for window in config.windows]
  return {
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "num_layers": config.layers,
    "num_heads": config.heads,
    "intermediate_size": config.intermediate_size,
    # Both spellings, as transformers writes them.
    "attention_types": [[kinds, 1]],
    "attention_layers": kinds,
    # 256 is transformers' default, for models without a local layer.
    "window_size": max(config.windows) or 256,
    "max_position_embeddings": config.max_positions,
    "layer_norm_epsilon": config.eps,
    "activation_function": config.activation,
    "tie_word_embeddings": config.tied,
    "eos_token_id": config.eos_id,
  }


def names(config: GPTNeoConfig) -> dict[str, str]:
  """Our modules -> theirs."""
  del config
  layer = "transformer.h.{i}"
  return {
    "embedding": "transformer.wte",
    "position_embedding": "transformer.wpe",
    "blocks.ln_1": f"{layer}.ln_1",
    "blocks.ln_2": f"{layer}.ln_2",
    "blocks.q_proj": f"{layer}.attn.attention.q_proj",
    "blocks.k_proj": f"{layer}.attn.attention.k_proj",
    "blocks.v_proj": f"{layer}.attn.attention.v_proj",
    "blocks.out_proj": f"{layer}.attn.attention.out_proj",
    "blocks.c_fc": f"{layer}.mlp.c_fc",
    "blocks.c_proj": f"{layer}.mlp.c_proj",
    "final_norm": "transformer.ln_f",
    "lm_head": "lm_head",
    "score_head": "score",
  }
