"""LoRA adapters in PEFT's format, in and out."""

import dataclasses
import pathlib
import re

import jax.numpy as jnp

from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models import lora
from jaxalign.models.groups import listed
from jaxalign.models.hf import table, write
from jaxalign.models.hf.architectures import architecture
from jaxalign.models.hf.config_json import Fields, JsonObject, read_json
from jaxalign.models.layers import LoraConfig
from jaxalign.models.model import Model

CONFIG = "adapter_config.json"
PREFIX = "base_model.model."  # of every tensor's name
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


def is_scorer(folder: pathlib.Path) -> bool:
  """Whether the adapters were trained with a score head."""
  task = _fields(folder).get(str, "task_type", default="CAUSAL_LM")
  return task == "SEQ_CLS"


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
  # What changes the arithmetic of an adapter, and is not implemented here.
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

  # The targets by our names: PEFT's may be ends of a path or a pattern.
  wanted = fields.values.get("target_modules")
  names = {path: name for name, path in lora.linears(model).items()}
  targets = tuple(
    name for path, name in names.items() if _is_target(model, path, wanted)
  )
  if not targets:
    raise UserError(
      f"{fields.where}: target_modules {wanted!r} names no linear layer of the "
      f"model; it has {lora.known(model)}"
    )
  return LoraConfig(rank, alpha, dropout, targets)


def entries(model: Model) -> dict[str, table.Entry]:
  """Names of the adapters' tensors, and of the weights kept with them.

  These are the score head, and in files of the peft library the output matrix.
  """
  names = _names(model)
  plain = table.entries(names, model.shapes)
  matched = {}
  if "lora_a" in model.shapes.get("lm_head", {}):
    # The peft library keeps a matrix that it has wrapped under this name.
    name = f"{PREFIX}{names['lm_head']}.base_layer.weight"
    matched["lm_head.embedding"] = table.Entry(name)
  for path in table.flatten(lora.split(model.shapes)[0]):
    module, _, leaf = path.rpartition(".")
    if leaf in lora.LEAVES:
      # Theirs are [r, in] and [out, r], the transposes of ours.
      name = f"{PREFIX}{names[module]}.lora_{leaf[-1].upper()}.weight"
      matched[path] = table.Entry(name, (1, 0))
    else:
      entry = plain[path]
      matched[path] = dataclasses.replace(entry, name=PREFIX + entry.name)
  return matched


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
    UserError: the model has no adapters or has groups, or the folder cannot be
      written.
  """
  if model.lora is None:
    raise UserError(
      f"{folder}: the model has no LoRA adapters; save it as a whole model"
    )
  if model.config.groups:
    raise UserError(
      f"{folder}: the model has a score head for each of "
      f"{listed(model.config.groups)}, and PEFT's format keeps no names; save "
      "it as a whole model"
    )
  # The adapters and what is saved with them; the base stays where it is.
  leaves = table.flatten(params)
  shapes = lora.split(model.shapes)[0]
  every = entries(model)
  kept = {path: every[path] for path in table.flatten(shapes)}
  dtype = jnp.dtype(leaves[next(iter(kept))].dtype)
  # Adapters are small: one file, as the peft library expects.
  plan = write.plan_files(kept, shapes, dtype, 2**60, "adapter_model")
  with write.replacing(pathlib.Path(folder)) as new:
    write.write_json(new / CONFIG, _config(model, model.lora, base))
    tensors = ((path, write.fetch(leaves[path])) for path in kept)
    write.write_tensors(tensors, plan, new)


def _config(model: Model, adapters: LoraConfig, base: str) -> JsonObject:
  is_lm = model.config.head == "lm"
  names, paths = _names(model), lora.linears(model)
  heads = sorted({names[h] for h in lora.HEADS if h in model.shapes})
  targets = [n for t in adapters.targets for n in _theirs(model, paths[t])]
  return {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM" if is_lm else "SEQ_CLS",
    "base_model_name_or_path": base,
    "r": adapters.rank,
    "lora_alpha": adapters.alpha,
    "lora_dropout": adapters.dropout,
    "target_modules": list(dict.fromkeys(targets)),
    "modules_to_save": heads or None,
    "bias": "none",
    "fan_in_fan_out": False,
    "inference_mode": True,
  }


def _names(model: Model) -> dict[str, str]:
  """Our modules -> transformers', which has lm_head in GPT-NeoX as well."""
  names = architecture(model).names(model.config)
  return {
    path: name for path, name in names.items() if isinstance(name, str)
  } | {"lm_head": "lm_head"}


def _theirs(model: Model, path: str) -> list[str]:
  """Names of a module in whole, one a layer: any part may be ambiguous."""
  layers = model.config.layers if path.startswith("blocks.") else 0
  return table.Entry(_names(model)[path]).names((layers,))


def _is_target(model: Model, path: str, wanted: str | list[str] | None) -> bool:
  """Whether `target_modules` names this module, by PEFT's rules."""
  is_output = path == "lm_head"
  # PEFT leaves the output matrix out of "all-linear".
  if wanted == "all-linear":
    return not is_output
  names = model.config.module.outputs if is_output else _theirs(model, path)
  if isinstance(wanted, str):  # a pattern for the whole path
    return any(re.fullmatch(wanted, name) for name in names)
  # A name matches whole parts of the path, hence the leading dots.
  ends = tuple(f".{target}" for target in wanted or ())
  return any(f".{name}".endswith(ends) for name in names)


def _fields(folder: pathlib.Path) -> Fields:
  return Fields(read_json(folder / CONFIG), str(folder / CONFIG))
