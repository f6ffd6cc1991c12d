"""LoRA adapters in PEFT's format, in and out."""

import dataclasses
import pathlib
import re
from typing import Any

import jax.numpy as jnp

from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.hf import table, write
from jaxalign.models.hf.architectures import architecture
from jaxalign.models.hf.fields import Fields, read_json
from jaxalign.models.layers import LoraConfig
from jaxalign.models.model import Model

CONFIG = "adapter_config.json"
_PREFIX = "base_model.model."
# Settings under which an adapter is more than W + scale A B.
_REFUSED = (
  "use_dora",
  "rank_pattern",
  "alpha_pattern",
  "layers_to_transform",
  "lora_bias",
  "trainable_token_indices",
)


def is_adapters(folder: pathlib.Path) -> bool:
  """Whether a folder holds adapters."""
  return (folder / CONFIG).is_file()


def base(folder: pathlib.Path) -> str:
  """The folder or hub id of the model that the adapters belong to."""
  return _fields(folder).get(str, "base_model_name_or_path")


def head(folder: pathlib.Path) -> str | None:
  """The head that the adapters were trained with, if they tell."""
  task = _fields(folder).get(str, "task_type", default="CAUSAL_LM")
  return "score_last" if task == "SEQ_CLS" else None


def read_config(folder: pathlib.Path, model: Model) -> LoraConfig:
  """The adapters of `adapter_config.json`, with our names as targets.

  Args:
    folder: holds the adapters.
    model: their base, without adapters.

  Raises:
    UserError: not LoRA, or a kind of LoRA that is not supported.
  """
  fields = _fields(folder)
  if fields.get(str, "peft_type") != "LORA":
    raise UserError(f"{fields.where}: peft_type must be LORA")
  odd = [name for name in _REFUSED if fields.values.get(name)]
  if fields.get(str, "bias", default="none") != "none":
    odd.append("bias")
  if odd:
    raise UserError(
      f"{fields.where}: {', '.join(odd)} is not supported; merge the adapters "
      "with peft and load the whole model"
    )
  rank = fields.get(int, "r")
  alpha = fields.get(float, "lora_alpha")
  if fields.get(bool, "use_rslora", default=False):
    alpha *= rank**0.5  # there the update is scaled by alpha / sqrt(r)
  dropout = fields.get(float, "lora_dropout", default=0.0)
  wanted = fields.values.get("target_modules")
  names = {ours: _theirs(model, ours) for ours in lora.linears(model)}
  targets = tuple(o for o, t in names.items() if _is_target(t, wanted))
  if not targets:
    raise UserError(
      f"{fields.where}: target_modules {wanted!r} names no linear layer of the "
      f"model; it has {', '.join(names.values())}"
    )
  return LoraConfig(rank, alpha, dropout, targets)


def entries(model: Model) -> dict[str, table.Entry]:
  """Names of the adapters' tensors, and of the score head kept with them."""
  names = architecture(model).names(model.config)
  plain = table.entries(names, model.shapes)
  found = {}
  for path in table.flatten(lora.split(model.shapes)[0]):
    module, _, leaf = path.rpartition(".")
    if leaf in lora.LEAVES:
      name = f"{_PREFIX}{names[module]}.lora_{leaf[-1].upper()}.weight"
      found[path] = table.Entry(name, (1, 0))
    else:
      entry = plain[path]
      found[path] = dataclasses.replace(entry, name=_PREFIX + entry.name)
  return found


def save(
  model: Model,
  params: Params,
  folder: str | pathlib.Path,
  *,
  base: str = "",
) -> None:
  """Writes adapters so that the peft library loads them.

  Args:
    model: with adapters.
    params: all parameters, or the trainable ones alone.
    folder: as in `write.save`.
    base: hub id or folder of the model that the adapters belong to.

  Raises:
    UserError: the model has no adapters, or the folder cannot be written.
  """
  if model.lora is None:
    raise UserError(
      f"{folder}: the model has no LoRA adapters; save it as a whole model"
    )
  leaves = table.flatten(params)
  found = entries(model)
  shapes = lora.split(model.shapes)[0]
  dtype = jnp.dtype(leaves[next(iter(found))].dtype)
  plan = write.plan_files(found, shapes, dtype, 2**60, "adapter_model")
  with write.replacing(pathlib.Path(folder)) as new:
    write.write_json(new / CONFIG, _config(model, model.lora, base))
    tensors = ((path, write.fetch(leaves[path])) for path in found)
    write.write_tensors(tensors, plan, new)


def _config(model: Model, adapters: LoraConfig, base: str) -> dict[str, Any]:
  is_lm = model.config.head == "lm"
  names = architecture(model).names(model.config)
  heads = sorted({names[h] for h in lora.HEADS if h in model.shapes})
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM" if is_lm else "SEQ_CLS",
    "base_model_name_or_path": base,
    "r": adapters.rank,
    "lora_alpha": adapters.alpha,
    "lora_dropout": adapters.dropout,
    "target_modules": [_theirs(model, name) for name in adapters.targets],
    "modules_to_save": heads or None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }


def _theirs(model: Model, ours: str) -> str:
  """Hugging Face's name of a block's linear, without the layer's prefix."""
  name = architecture(model).names(model.config)[f"blocks.{ours}"]
  return name.partition("{i}.")[2]


def _is_target(name: str, wanted: Any) -> bool:
  if wanted == "all-linear":
    return True
  if isinstance(wanted, str):  # a pattern for the whole path
    return re.fullmatch(wanted, f"model.layers.0.{name}") is not None
  return any(f".{name}".endswith(f".{target}") for target in wanted or ())


def _fields(folder: pathlib.Path) -> Fields:
  return Fields(read_json(folder / CONFIG), str(folder / CONFIG))
