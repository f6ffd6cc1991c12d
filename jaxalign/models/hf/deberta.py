"""DeBERTa-v2 and v3 folders: `config.json` and tensor names."""

from typing import Unpack

from jaxalign.errors import UserError
from jaxalign.models.deberta import DebertaConfig
from jaxalign.models.hf.config_json import Fields, JsonObject, Switches
from jaxalign.models.hf.table import Entry
from jaxalign.models.layers import ACTIVATIONS

MODEL_TYPE = "deberta-v2"
BASE = "deberta."
CLASSES = {
  "score_context": "DebertaV2ForSequenceClassification",
  "score_mean": "DebertaV2ForSequenceClassification",
}
HEADS = ("score_head", "pooler")
ALIASES = ()
IGNORED = (
  # A buffer that older files carry.
  r"embeddings\.position_ids$",
  # v3 files carry an absolute position table that the config turns off.
  r"embeddings\.position_embeddings\.weight$",
  # The heads of pretraining.
  r"^(cls|lm_predictions|mask_predictions)\.",
  # The head that another task would use.
  r"^(pooler|classifier)\.",
)


def from_hf(fields: Fields, **switches: Unpack[Switches]) -> DebertaConfig:
  """The config of a `config.json`; `switches`: head, groups, dtype, remat.

  Raises:
    UserError: a setting that this architecture's code does not have.
  """
  width = fields.size("hidden_size")
  positions = fields.size("max_position_embeddings", default=512)
  # -1 stands for the whole context here, and for no buckets below.
  distance = fields.get(int, "max_relative_positions", default=-1)
  inner = fields.size("embedding_size", default=width)
  relative = fields.get(bool, "relative_attention", default=False)
  config = DebertaConfig(
    vocab_size=fields.size("vocab_size"),
    hidden_size=width,
    layers=fields.size("num_hidden_layers"),
    heads=fields.size("num_attention_heads"),
    intermediate_size=fields.size("intermediate_size"),
    max_positions=positions,
    relative=relative,
    max_distance=distance if distance > 0 else positions,
    buckets=max(fields.get(int, "position_buckets", default=-1), 0),
    pos_att_type=_words(fields, "pos_att_type"),
    share_att_key=fields.get(bool, "share_att_key", default=False),
    norm_relative=relative and "layer_norm" in _words(fields, "norm_rel_ebd"),
    conv_kernel_size=fields.get(int, "conv_kernel_size", default=0),
    conv_groups=fields.get(int, "conv_groups", default=1),
    conv_activation=fields.get(str, "conv_act", default="tanh"),
    # Embeddings as wide as the hidden states need no projection.
    embedding_size=0 if inner == width else inner,
    type_vocab_size=fields.get(int, "type_vocab_size", default=0),
    position_biased_input=fields.get(
      bool, "position_biased_input", default=True
    ),
    eps=fields.get(float, "layer_norm_eps", default=1e-7),
    activation=fields.get(str, "hidden_act", default="gelu"),
    pooler_activation=fields.get(str, "pooler_hidden_act", default="gelu"),
    **switches,
  )
  _check(fields, config)
  return config


def _words(fields: Fields, name: str) -> tuple[str, ...]:
  """A field that is a list or a string joined by `|`; "none" is nothing."""
  value = fields.raw(name) or ()
  words = value.lower().split("|") if isinstance(value, str) else value
  return tuple(w for w in map(str.strip, words) if w != "none")


def _check(fields: Fields, config: DebertaConfig) -> None:
  """UserError where the files ask for more than the layers can do."""
  width = config.hidden_size
  # Field -> whether it holds, and the rule for the message.
  rules = {
    "num_attention_heads": (
      width % config.heads == 0,
      f"a divisor of hidden_size={width}",
    ),
    "attention_head_size": (
      fields.get(int, "attention_head_size", default=config.head_dim)
      == config.head_dim,
      f"hidden_size / num_attention_heads = {config.head_dim}",
    ),
    "pooler_hidden_size": (
      fields.get(int, "pooler_hidden_size", default=width) == width,
      f"hidden_size = {width}",
    ),
    "pos_att_type": (
      set(config.pos_att_type) <= {"c2p", "p2c"},
      "made of c2p and p2c",
    ),
    "conv_kernel_size": (
      config.conv_kernel_size == 0 or config.conv_kernel_size % 2 == 1,
      "0 or odd",
    ),
    "hidden_act": (config.activation in ACTIVATIONS, _ONE_OF),
    "conv_act": (config.conv_activation in ACTIVATIONS, _ONE_OF),
    "pooler_hidden_act": (config.pooler_activation in ACTIVATIONS, _ONE_OF),
  }
  # The first that is broken is reported, with the value as the file has it.
  for name, (holds, rule) in rules.items():
    if not holds:
      raise UserError(
        f"{fields.where}: {name} must be {rule}, got "
        f"{fields.values.get(name)!r}; this model is not supported"
      )


_ONE_OF = "one of " + ", ".join(ACTIVATIONS)


def to_hf(config: DebertaConfig) -> JsonObject:
  """The architecture's part of `config.json`."""
  values = {
    "vocab_size": config.vocab_size,
    "hidden_size": config.hidden_size,
    "num_hidden_layers": config.layers,
    "num_attention_heads": config.heads,
    "intermediate_size": config.intermediate_size,
    "max_position_embeddings": config.max_positions,
    "relative_attention": config.relative,
    "max_relative_positions": config.max_distance,
    # transformers writes "no buckets" as -1.
    "position_buckets": config.buckets or -1,
    "pos_att_type": list(config.pos_att_type),
    "share_att_key": config.share_att_key,
    "norm_rel_ebd": "layer_norm" if config.norm_relative else "none",
    "type_vocab_size": config.type_vocab_size,
    "position_biased_input": config.position_biased_input,
    "layer_norm_eps": config.eps,
    "hidden_act": config.activation,
    "pooler_hidden_act": config.pooler_activation,
    "pooler_hidden_size": config.hidden_size,
    # Of transformers' ContextPooler; nothing is dropped here.
    "pooler_dropout": 0.0,
  }
  # Left out where there is no such layer, which readers take as off.
  if config.embedding_size:
    values["embedding_size"] = config.embedding_size
  if config.conv_kernel_size:
    values["conv_kernel_size"] = config.conv_kernel_size
    values["conv_groups"] = config.conv_groups
    values["conv_act"] = config.conv_activation
  return values


def names(config: DebertaConfig) -> dict[str, str | Entry]:
  """Our modules -> theirs."""
  del config
  embeddings, encoder = "deberta.embeddings", "deberta.encoder"
  layer = f"{encoder}.layer.{{i}}"
  attention = f"{layer}.attention.self"
  return {
    "embedding": f"{embeddings}.word_embeddings",
    "position_embeddings": f"{embeddings}.position_embeddings",
    "type_embeddings": f"{embeddings}.token_type_embeddings",
    "embed_proj": f"{embeddings}.embed_proj",
    "embedding_norm": f"{embeddings}.LayerNorm",
    "rel_embeddings": f"{encoder}.rel_embeddings",
    "relative_norm": f"{encoder}.LayerNorm",
    # torch keeps a convolution as [out, in, width], we as [width, in, out].
    "conv.kernel": Entry(f"{encoder}.conv.conv.weight", (2, 1, 0)),
    "conv": f"{encoder}.conv.conv",
    "conv.norm": f"{encoder}.conv.LayerNorm",
    "blocks.query_proj": f"{attention}.query_proj",
    "blocks.key_proj": f"{attention}.key_proj",
    "blocks.value_proj": f"{attention}.value_proj",
    "blocks.pos_key_proj": f"{attention}.pos_key_proj",
    "blocks.pos_query_proj": f"{attention}.pos_query_proj",
    "blocks.attention_output": f"{layer}.attention.output.dense",
    "blocks.attention_norm": f"{layer}.attention.output.LayerNorm",
    "blocks.intermediate": f"{layer}.intermediate.dense",
    "blocks.output": f"{layer}.output.dense",
    "blocks.output_norm": f"{layer}.output.LayerNorm",
    "pooler": "pooler.dense",
    "score_head": "classifier",
  }
