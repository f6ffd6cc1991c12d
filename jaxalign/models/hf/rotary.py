"""Rotary settings in `config.json`, old and new forms."""

import math

from jaxalign.errors import UserError
from jaxalign.models.hf.config_json import Fields, JsonObject
from jaxalign.models.rope import Scaling

KINDS = ("linear", "dynamic", "llama3")


def read(
  fields: Fields, *, fraction: float = 1.0
) -> tuple[float, float, Scaling | None]:
  """`(base, rotated fraction, scaling)` of a model.

  Before transformers 5 they were spread over `rope_theta` or
  `rotary_emb_base`, `rotary_pct` and `rope_scaling`; since then they are all
  in `rope_parameters`.

  Args:
    fields: the config file.
    fraction: the architecture's default where the file has none.

  Raises:
    UserError: a scaling that is not supported, or lacks a number.
  """
  # One object of both forms; the new one wins.
  merged: JsonObject = {}
  for name in ("rope_scaling", "rope_parameters"):
    part = fields.values.get(name) or {}
    if not isinstance(part, dict):
      raise UserError(f"{fields.where}: {name} must be an object, got {part!r}")
    merged |= part
  # The new place first, then the old ones.
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

  # "type" is the older name.
  kind = rope.get(str, "rope_type", "type", default="default")
  if kind == "default":
    return base, share, None
  if kind not in KINDS:
    raise UserError(
      f"{rope.where}: rope_type {kind!r} is not supported; supported are "
      f"default, {', '.join(KINDS)}"
    )
  factor = rope.get(float, "factor")
  if kind != "llama3":
    return base, share, Scaling(kind, factor)
  return (
    base,
    share,
    Scaling(
      kind,
      factor,
      low=rope.get(float, "low_freq_factor"),
      high=rope.get(float, "high_freq_factor"),
      original=rope.get(int, "original_max_position_embeddings"),
    ),
  )


def write(
  base: float, fraction: float | None, scaling: Scaling | None
) -> JsonObject:
  """The settings' fields of `config.json`, for old and new readers."""
  values: JsonObject = {"rope_type": "default"}
  if scaling is not None:
    values = {"rope_type": scaling.kind, "factor": scaling.factor}
  if scaling is not None and scaling.kind == "llama3":
    values["low_freq_factor"] = scaling.low
    values["high_freq_factor"] = scaling.high
    values["original_max_position_embeddings"] = scaling.original
  # transformers 4 reads the first, transformers 5 the second.
  old = {"rope_scaling": values} if scaling is not None else {}
  new = values | {"rope_theta": base}
  if fraction is not None:
    new["partial_rotary_factor"] = fraction
  return {**old, "rope_parameters": new}
