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
# Settings that are read here, or that change no weight whatever they are.
_KNOWN = {
  "peft_type",
  "task_type",
  "base_model_name_or_path",
  "r",
  "lora_alpha",
  "lora_dropout",
  "use_rslora",
  "target_modules",
  "modules_to_save",
  "init_lora_weights",
  "inference_mode",
  "auto_mapping",
  "fan_in_fan_out",  # peft turns it off for the layers that occur here
  "peft_version",
  "megatron_core",
  "qalora_group_size",
  "eva_config",
}
# How adapters may have begun: other ways (PiSSA, OLoRA ...) change the base.
_INITS = (None, True, False, "gaussian", "orthogonal", "eva")
_OFF = (None, False, "none", "", [], {})  # a setting that is not used


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
  # Under any other setting an adapter may be more than W + scale A B.
  odd = [
    name
    for name, value in fields.values.items()
    if name not in _KNOWN and value not in _OFF
  ]
  start = fields.values.get("init_lora_weights")
  if start not in _INITS:
    odd.append(f"init_lora_weights={start!r}, which changes the base,")
  if odd:
    raise UserError(
      f"{fields.where}: {', '.join(odd)} is not supported; merge the adapters "
      "with peft and load the whole model"
    )
  # The adapter's sizes and scale.
  rank = fields.get(int, "r")
  alpha = fields.get(float, "lora_alpha")
  if fields.get(bool, "use_rslora", default=False):
    alpha *= rank**0.5  # there the update is scaled by alpha / sqrt(r)
  dropout = fields.get(float, "lora_dropout", default=0.0)

  # The targets by our names: PEFT's may be ends of a path or a pattern.
  wanted = fields.values.get("target_modules")
  names = {path: name for name, path in lora.linears(model).items()}
  share = {path: _target_share(model, path, wanted) for path in names}
  targets = tuple(name for path, name in names.items() if share[path] == 1)
  partly = [names[path] for path in names if 0 < share[path] < 1]
  if partly:
    raise UserError(
      f"{fields.where}: target_modules {wanted!r} names {', '.join(partly)} of "
      "some layers only, which is not supported; merge the adapters with peft "
      "and load the whole model"
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
  # The adapters, and the heads that are trained in full.
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
      f"{folder}: the model has no LoRA adapters; save it as a whole model "
      "(without --adapters)"
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
  # A file has one dtype: that of the first leaf, which is an adapter's.
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
    # Once each: two of our names may stand for one layer.
    "target_modules": list(dict.fromkeys(targets)),
    # PEFT saves and loads these whole, next to the adapters.
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


def _target_share(
  model: Model, path: str, wanted: str | list[str] | None
) -> float:
  """In how many of the layers `target_modules` names this module, in [0, 1]."""
  is_output = path == "lm_head"
  # PEFT leaves the output matrix out of "all-linear".
  if wanted == "all-linear":
    return float(not is_output)
  names = model.config.module.outputs if is_output else _theirs(model, path)
  if isinstance(wanted, str):  # a pattern for the whole path
    named = [bool(re.fullmatch(wanted, name)) for name in names]
  else:
    # A name matches whole parts of the path, hence the leading dots.
    ends = tuple(f".{target}" for target in wanted or ())
    named = [f".{name}".endswith(ends) for name in names]
  # The output matrix has several names and is there once.
  return float(any(named)) if is_output else sum(named) / len(named)


def _fields(folder: pathlib.Path) -> Fields:
  return Fields(read_json(folder / CONFIG), str(folder / CONFIG))
