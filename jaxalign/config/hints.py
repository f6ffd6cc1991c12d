"""What a mistyped name may have meant."""

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from typing import TypeVar, get_type_hints

from jaxalign.errors import UserError

P = TypeVar("P")

# What other trainers call what is no field of a config here.
ELSEWHERE = {
  "its folder is the name of a run: give --workdir": (
    "run_name",
    "wandb_name",
    "wandb_run_name",
    "wandb_run_id",
    "output_dir",
    "logging_dir",
    "workdir",
  ),
  "the same command goes on with a run; --init_from takes another's weights": (
    "resume_from_checkpoint",
    "auto_resume_from_checkpoints",
  ),
  "upload the run's model/ when it is finished: hf upload NAME RUN/model": (
    "push_to_hub",
    "hub_model_id",
    "hub_strategy",
  ),
  "weights are not quantised here; config.lora.rank with "
  "config.precision.params=bfloat16 takes the least memory": (
    "load_in_4bit",
    "load_in_8bit",
    "quantization_config",
  ),
  "several devices share a run by config.mesh": (
    "deepspeed",
    "fsdp_config",
    "ddp_backend",
    "num_processes",
  ),
  "nothing takes its place; leave it out": (
    "attn_implementation",
    "flash_attention",
    "flash_attn",
    "use_vllm",
    "use_liger_kernel",
    "torch_compile",
    "tf32",
    "dataset_num_proc",
    "dataloader_num_workers",
    "group_by_length",
    "pad_to_sequence_len",
    "remove_unused_columns",
    "trust_remote_code",
  ),
  "texts stand in a column `text`, or in TRL's others (docs/datasets.md)": (
    "dataset_text_field",
    "field_messages",
  ),
}
_HOME = 0.15  # what the right section adds to a likeness
_LEAST = 0.72  # likeness, of its section included, of a name that is offered
_LEAST_ALIKE = 0.6  # of the name alone


def nearest(name: str, names: Iterable[str]) -> list[str]:
  """Up to two names that a mistyped one may have meant."""
  return difflib.get_close_matches(name, list(names), 2, 0.6)


def choose_preset(presets: Mapping[str, P], name: str, file: str) -> P:
  """The preset of that name, or a UserError of that file's nearest names."""
  if name in presets:
    return presets[name]
  near = nearest(name, presets)
  hint = f"did you mean {' or '.join(near)}? " if near else ""
  raise UserError(
    f"{file} has no preset {name!r}; {hint}it has {', '.join(presets)}"
  )


def unknown_field(root: type, where: str) -> str:
  """The message for a path that is no field of the config class `root`."""
  if hint := what_was_meant(root, where):
    return f"{where} is not a field; {hint}"
  section, paths = where.rpartition(".")[0], all_paths(root)
  section = section if section in paths else "config"
  split = [path.rpartition(".") for path in paths]
  here = ", ".join(leaf for home, _, leaf in split if home == section)
  return f"{where} is not a field; the fields of {section} are {here}"


def what_was_meant(root: type, where: str) -> str:
  """Which fields of `root` a wrong path may have meant, or ""."""
  section, _, name = where.rpartition(".")
  for words, names in ELSEWHERE.items():
    if name.lower() in names:
      return words
  scores = {}
  for path, others in all_paths(root).items():
    home, _, leaf = path.rpartition(".")
    alike = max(likeness(name.lower(), word) for word in (leaf, *others))
    # The right name in the wrong section, and the name that another program
    # has, count as much as a typing mistake in the right section.
    if alike >= _LEAST_ALIKE:
      scores[path] = alike + (_HOME if home == section else 0.0)
  best = sorted(scores, key=lambda path: -scores[path])[:3]
  # A near-certain match stands alone; doubtful ones are offered together.
  certain = bool(best) and scores[best[0]] >= 1.0
  best = best[:1] if certain else [p for p in best if scores[p] >= _LEAST]
  return f"did you mean {' or '.join(best)}?" if best else ""


def likeness(name: str, word: str) -> float:
  """In [0, 1]; `kl` is much like `kl_coefficient`, if not the same."""
  alike = difflib.SequenceMatcher(None, name, word).ratio()
  return max(alike, 0.75) if name in word.split("_") else alike


def all_paths(cls: type, path: str = "config") -> dict[str, tuple[str, ...]]:
  """Every field and section of a config class, with its other names."""
  kinds, paths = get_type_hints(cls), {}
  for f in dataclasses.fields(cls):
    where, known = f"{path}.{f.name}", f.metadata
    paths[where] = (*known.get("also", ()), *known.get("alias", ()))
    if dataclasses.is_dataclass(kinds[f.name]):
      paths |= all_paths(kinds[f.name], where)
  return paths


def run_together(cls: type, where: str, value: object) -> str:
  """`keep` = best_held_out -> `keep_best=held_out`; "" if no field is meant."""
  section, _, name = where.rpartition(".")
  for f in dataclasses.fields(cls):
    start = f.name.removeprefix(f"{name}_") + "_"
    if f.name.startswith(f"{name}_") and str(value).startswith(start):
      return f"{section}.{f.name}={str(value).removeprefix(start)}"
  return ""
