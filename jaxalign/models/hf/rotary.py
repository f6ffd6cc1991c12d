"""Rotary settings in `config.json`, old and new forms."""

import math

from jaxalign.errors import UserError
from jaxalign.models.hf.config_json import Fields, JsonObject
from jaxalign.models.rope import Scaling

# The kinds of scaling, and the settings of each.
KINDS = {
  "default": (),
  "linear": ("factor",),
  "dynamic": ("factor",),
  "llama3": (
    "factor",
    "low_freq_factor",
    "high_freq_factor",
    "original_max_position_embeddings",
  ),
  "yarn": (
    "factor",
    "beta_slow",
    "beta_fast",
    "truncate",
    "attention_factor",
    "mscale",
    "mscale_all_dim",
    "original_max_position_embeddings",
  ),
  "longrope": (
    "factor",
    "short_factor",
    "long_factor",
    "attention_factor",
    "original_max_position_embeddings",
  ),
}
# What every kind may have; "finetuned" is a note in YaRN's own models.
_COMMON = (
  *("rope_type", "type", "rope_theta", "partial_rotary_factor"),
  "finetuned",
)
# The same settings outside of the object, where they are read if it lacks them.
_OUTSIDE = (
  *("rope_theta", "rotary_emb_base", "partial_rotary_factor", "rotary_pct"),
  "original_max_position_embeddings",
)
_OFF = (None, False, [], {})


def read(
  fields: Fields,
  *,
  fraction: float = 1.0,
  kinds: tuple[str, ...] = tuple(KINDS),
) -> tuple[float, float, Scaling | None]:
  """`(base, rotated fraction, scaling)` of a model.

  Before transformers 5 they were spread over `rope_theta` or
  `rotary_emb_base`, `rotary_pct` and `rope_scaling`; since then they are all
  in `rope_parameters`.

  Args:
    fields: the config file.
    fraction: the architecture's default where the file has none.
    kinds: those that transformers knows for the architecture.

  Raises:
    UserError: a scaling or a setting of it that is not supported, or a number
      that is missing.
  """
  # One object of both forms; the new one wins.
  merged: JsonObject = {}
  for name in ("rope_scaling", "rope_parameters"):
    part = fields.raw(name) or {}
    if not isinstance(part, dict):
      raise UserError(f"{fields.where}: {name} must be an object, got {part!r}")
    merged |= part
  # The new place first, then the old ones.
  fields.asked.update(_OUTSIDE)
  rope = Fields(merged, f"{fields.where}: rope_parameters")
  # NaN marks an absent number: without a default `get` refuses the file.
  base = rope.get(float, "rope_theta", default=math.nan)
  if math.isnan(base):
    # 1e4 is the base of Su et al. (2021).
    base = fields.get(float, "rope_theta", "rotary_emb_base", default=1e4)
  share = rope.get(float, "partial_rotary_factor", default=math.nan)
  if math.isnan(share):
    names = ("partial_rotary_factor", "rotary_pct")
    share = fields.get(float, *names, default=fraction)

  # "type" is the older name, "su" and Phi-3's "yarn" are those of longrope.
  kind = rope.get(str, "rope_type", "type", default="default")
  if kind == "su" or (kind == "yarn" and "short_factor" in merged):
    kind = "longrope"
  if kind not in kinds:
    raise UserError(
      f"{rope.where}: rope_type {kind!r} is not supported; supported are "
      f"{', '.join(kinds)}"
    )
  for name, value in merged.items():
    if name not in (*_COMMON, *KINDS[kind]) and value not in _OFF:
      raise UserError(
        f"{rope.where}: {name} is not a setting of rope_type {kind!r}; it has "
        f"{', '.join(KINDS[kind]) or 'none'}"
      )
  if kind == "default":
    return base, share, None
  return base, share, _scaling(kind, fields, rope)


def _scaling(kind: str, fields: Fields, rope: Fields) -> Scaling:
  if kind in ("linear", "dynamic"):
    return Scaling(kind, rope.get(float, "factor"))
  # The context of pretraining: Phi-3 has it outside; else it is the model's.
  context = fields.size("max_position_embeddings", default=2048)
  name = "original_max_position_embeddings"
  original = rope.size(name, default=context)
  original = fields.size(name, default=original)
  if kind == "llama3":
    return Scaling(
      kind,
      rope.get(float, "factor"),
      low=rope.get(float, "low_freq_factor"),
      high=rope.get(float, "high_freq_factor"),
      original=original,
    )

  factor = rope.get(float, "factor", default=context / original)
  if kind == "yarn":
    attention = _mscale(factor, 1.0)
    scales = [
      rope.get(float, name, default=0.0)
      for name in ("mscale", "mscale_all_dim")
    ]
    if all(scales):  # as in DeepSeek's models; one alone is not read
      attention = _mscale(factor, scales[0]) / _mscale(factor, scales[1])
    return Scaling(
      kind,
      factor,
      low=rope.get(float, "beta_slow", default=1.0),
      high=rope.get(float, "beta_fast", default=32.0),
      original=original,
      truncate=rope.get(bool, "truncate", default=True),
      attention=rope.get(float, "attention_factor", default=attention),
    )
  return Scaling(
    kind,
    original=original,
    attention=rope.get(
      float, "attention_factor", default=longrope_attention(factor, original)
    ),
    short=_numbers(rope, "short_factor"),
    long=_numbers(rope, "long_factor"),
  )


def _mscale(factor: float, scale: float) -> float:
  """YaRN's temperature, as a factor of queries and keys."""
  return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_attention(factor: float, original: int) -> float:
  """LongRoPE's temperature, the same way, where the file does not say it."""
  if factor <= 1:
    return 1.0
  return math.sqrt(1 + math.log(factor) / math.log(original))


def _numbers(rope: Fields, name: str) -> tuple[float, ...]:
  """A list of positive numbers."""
  values = rope.values.get(name)
  if (
    not isinstance(values, list)
    or not values
    or not all(type(x) in (int, float) and x > 0 for x in values)
  ):
    raise UserError(
      f"{rope.where}: {name} must be a list of positive numbers, one for each "
      f"pair of rotated features, got {values!r}"
    )
  return tuple(map(float, values))


def write(
  base: float, fraction: float | None, scaling: Scaling | None
) -> JsonObject:
  """The settings' fields of `config.json`, for old and new readers."""
  values: JsonObject = {"rope_type": scaling.kind if scaling else "default"}
  old: JsonObject = {}
  if scaling is not None:
    kind = scaling.kind
    old = {"rope_scaling": values}
    if kind != "longrope":
      values["factor"] = scaling.factor
    if kind in ("llama3", "yarn", "longrope"):
      values["original_max_position_embeddings"] = scaling.original
    if kind in ("yarn", "longrope"):
      values["attention_factor"] = scaling.attention
    if kind == "llama3":
      values["low_freq_factor"] = scaling.low
      values["high_freq_factor"] = scaling.high
    if kind == "yarn":
      values["beta_slow"] = scaling.low
      values["beta_fast"] = scaling.high
      values["truncate"] = scaling.truncate
    if kind == "longrope":
      values["short_factor"] = list(scaling.short)
      values["long_factor"] = list(scaling.long)
      old["original_max_position_embeddings"] = scaling.original
  # transformers 4 reads `old`, transformers 5 both.
  new = values | {"rope_theta": base}
  if fraction is not None:
    new["partial_rotary_factor"] = fraction
  return {**old, "rope_parameters": new}
