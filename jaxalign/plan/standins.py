"""What takes the place of models and data that are not on this machine.

A plan needs a model's `config.json` and the lengths of texts, no weight and no
text. So a folder without weights gets a file that has their header alone, and
data that would have to be fetched become rows of a given length.
"""

import dataclasses
import json
import os
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp

from jaxalign.config import TrainingConfig
from jaxalign.config.names import is_function, parse_groups
from jaxalign.config.online import OnlineConfig
from jaxalign.config.supervised import SupervisedConfig
from jaxalign.data import sources
from jaxalign.data.tokenizer import load_tokenizer
from jaxalign.errors import UserError
from jaxalign.models.hf import folder as hf
from jaxalign.models.hf import hub, table, write
from jaxalign.models.hf.architectures import architecture
from jaxalign.models.hf.config_json import read_config
from jaxalign.models.hf.weights import ADAPTER_FILES, MODEL_FILES
from jaxalign.setup.models import LAB, LAB_MODELS, locate_model

ROWS = 10_000  # of a data set whose size is not known
_TOKENIZERS = ("tokenizer*", "*.model", "special_tokens_map.json", "*.jinja")
_ONE_FILE = 2**63  # no model needs a second
# What the format of a conversation adds to a prompt, at most.
_FRAME_TOKENS, _FRAME_CHARS = 16, 1000
_NO_VALIDATION: dict[str, Any] = {  # fields of several types
  "validation_data": "",
  "validation_interval": 0,
}


@dataclasses.dataclass(frozen=True)
class StandIns:
  """A config whose models and data are all here.

  Attributes:
    config: of the run, with stand-ins in the place of what is missing.
    notes: what they stand for, a sentence each.
  """

  config: TrainingConfig
  notes: tuple[str, ...]


def stand_in(
  config: TrainingConfig, folder: pathlib.Path, tokens: int = 0, rows: int = 0
) -> StandIns:
  """The same run with stand-ins for what is not on this machine.

  Args:
    config: of the run.
    folder: where to write them; they take little space.
    tokens: of a prompt or a text that is not here; 0 = a quarter of
      `max_prompt_chars`, or `max_length`.
    rows: of a data set that is not here; 0 = `ROWS`, or a few where the steps
      do not depend on it.

  Raises:
    UserError: a model that has no config.json here and cannot be fetched.
    HostError: the hub does not answer.
  """
  stand: dict[str, list[str]] = {_WITHOUT: [], _UNTOKENIZED: []}

  # The models, of reward models those in brackets and with weights too.
  changes: dict[str, Any] = {}  # fields of several types
  if config.policy != "init":
    head = None if config.algorithm == "reward_model" else "lm"
    changes["policy"] = _model(config.policy, "policy", head, folder, stand)
  for field in ("reward_model", "test_reward_model"):
    named = getattr(config, f"{field}s", ())
    if named:
      changes[field] = ",".join(
        f"{_reward(name, field, folder, stand)}*{weight}"
        for name, weight in named
      )
  value_model = getattr(config, "value_model", "shared")
  if value_model not in ("shared", "separate"):
    found = _reward(value_model, "value_model", folder, stand)
    changes["value_model"] = found
  config = dataclasses.replace(config, **changes)
  config, note = _data(config, folder, tokens, rows)
  notes = [f"{what}: {', '.join(of)}" for what, of in stand.items() if of]
  return StandIns(config, tuple([*notes, note] if note else notes))


# Notes, each followed by the fields that it holds for.
_WITHOUT = "planned by its config.json alone"
_UNTOKENIZED = "without a tokenizer, so the lab's counts its tokens"


def _reward(
  name: str, field: str, folder: pathlib.Path, stand: dict[str, list[str]]
) -> str:
  """A reward's name with that of its model changed; brackets stay."""
  if is_function(name):
    return name
  place, _ = parse_groups(name)
  found = _model(place, field, None, folder, stand)
  return found + name.removeprefix(place)


def _model(
  name: str,
  field: str,
  head: str | None,
  folder: pathlib.Path,
  stand: dict[str, list[str]],
) -> str:
  """The name of a model whose headers can be read here."""
  if name == "lab" or name in [f"lab/{model}" for model in LAB_MODELS]:
    return name
  place = locate_model(name, "policy")
  source = pathlib.Path(place).expanduser()
  local = source.exists() or place.startswith((".", "/", "~", "runs/"))
  if not local:
    source = _fetched(name, field)
  found = [*MODEL_FILES, *ADAPTER_FILES]
  found += [f"{file}.index.json" for file in found]
  if any((source / file).is_file() for file in found):
    return place
  if not (source / "config.json").is_file():
    raise UserError(
      f"config.{field}: {name} is not on this machine; a plan needs nothing "
      f"but its config.json: give --config.{field}=FOLDER that holds one"
    )
  count = len(stand[_WITHOUT])
  target = folder / f"model-{count}"
  _write_header(source, head, target)
  stand[_WITHOUT].append(field)
  if not any(source.glob("tokenizer*")) and not any(source.glob("*.model")):
    for path in (LAB / "policy").glob("tokenizer*"):
      shutil.copy(path, target)
    stand[_UNTOKENIZED].append(field)
  return str(target)


def _fetched(name: str, field: str) -> pathlib.Path:
  """A hub model's folder without its weights, fetched if need be."""
  import huggingface_hub  # slow to import, and most plans need no hub

  repository, _, revision = name.partition("@")
  try:
    path = huggingface_hub.snapshot_download(
      repository,
      revision=revision or None,
      allow_patterns=list(hub.CONFIGS),
    )
  except (OSError, ValueError) as error:
    raise UserError(
      f"config.{field}: {name} is not on this machine and the hub cannot be "
      "reached; a plan needs nothing but its config.json: give "
      f"--config.{field}=FOLDER that holds one"
    ) from error
  return pathlib.Path(path)


def _write_header(
  folder: pathlib.Path, head: str | None, target: pathlib.Path
) -> None:
  """A copy of a model's folder, with the header of its weights alone."""
  fields = read_config(folder)
  model = hf.from_config(
    fields, head or fields.head, dtype="bfloat16", remat="none"
  )
  entries = table.entries(architecture(model).names(model.config), model.shapes)
  plan = write.plan_files(
    entries, model.shapes, jnp.dtype("bfloat16"), _ONE_FILE
  )
  target.mkdir(parents=True)
  shutil.copy(folder / "config.json", target)
  for pattern in _TOKENIZERS:
    for path in folder.glob(pattern):
      shutil.copy(path, target)
  ((name, header),) = plan.headers.items()
  with (target / name).open("wb") as file:
    file.write(header)
    # A hole: the file has its size and takes no space.
    os.truncate(file.fileno(), len(header) + plan.tensor_bytes)


def _data(
  config: TrainingConfig,
  folder: pathlib.Path,
  tokens: int,
  rows: int,
) -> tuple[TrainingConfig, str]:
  """The config with rows of one length where its data are not here; a note."""
  source = getattr(config, "prompts", "") or getattr(config, "data", "")
  held_out = getattr(config, "validation_data", "")
  if _all_here(source):
    if not held_out or _all_here(held_out):
      return config, ""
    note = f"validation_data is not here and left out: {held_out}"
    return dataclasses.replace(config, **_NO_VALIDATION), note
  if isinstance(config, OnlineConfig):
    tokens = tokens or max(config.max_prompt_chars // 4, 1)
    tokens = min(tokens, config.max_length - 1)
    framed = max(tokens - _FRAME_TOKENS, 1)
    count = rows or max(ROWS if not config.prompts_per_step else 0, 64)
    count += config.evaluation.num_prompts
  else:
    framed = tokens = min(tokens or config.max_length, config.max_length)
    count = rows or (64 if config.steps else ROWS)
  text = _text(config, framed)
  row = {"prompt": text}
  if isinstance(config, SupervisedConfig):
    half = _text(config, max(tokens // 2, 1))
    row = {
      "prompt": half,
      "completion": half,
      "chosen": half,
      "rejected": half.removesuffix("the") + "and",
      "label": True,
    }
    wanted = {
      "sft": ("prompt", "completion"),
      "kto": ("prompt", "completion", "label"),
    }.get(config.algorithm, ("prompt", "chosen", "rejected"))
    row = {name: row[name] for name in wanted}
  path = folder / "rows.jsonl"
  folder.mkdir(parents=True, exist_ok=True)
  path.write_text((json.dumps(row) + "\n") * count)
  note = (
    f"data are not read: {count} rows of {tokens} tokens stand for them "
    "(--tokens, --rows)"
  )
  if isinstance(config, OnlineConfig):
    # All tokens of a prompt are counted in `tokens`.
    config = dataclasses.replace(
      config,
      prompts=str(path),
      system_prompt="",
      max_prompt_chars=len(text) + _FRAME_CHARS,
      deduplicate=False,
      holdout=0,
      num_prompts=0,
      num_prompts_per_set=0,
    )
    return config, note
  assert isinstance(config, SupervisedConfig)
  return dataclasses.replace(config, data=str(path), **_NO_VALIDATION), note


def _all_here(source: str) -> bool:
  """Whether all parts of a source can be read without a network."""
  return all(_is_here(name) for name in sources.part_names(source))


def _is_here(name: str) -> bool:
  head = name
  if not os.path.exists(os.path.expanduser(name)):
    head = name.rpartition("@")[0] or name
  return sources.is_local(head)


def _text(config: TrainingConfig, tokens: int) -> str:
  """A text of so many tokens in the policy's tokenizer."""
  place = config.init.tokenizer
  if config.policy != "init":
    place = locate_model(config.policy, "policy")
  tokenizer = load_tokenizer(hub.resolve(place, weights=False))
  # A repeated word costs the same number of tokens each time.
  words = 64
  each = len(tokenizer.encode(" the" * words)) / words
  count = max(int(tokens / each), 1)
  text = "the" + " the" * (count - 1)
  while count > 1 and len(tokenizer.encode(text)) > tokens:
    count -= 1
    text = "the" + " the" * (count - 1)
  return text
