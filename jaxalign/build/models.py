"""Loads what a config names: a policy to train, a reward model to read."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from jaxalign.config import InitConfig, TrainingConfig, parse_groups
from jaxalign.core.types import Params
from jaxalign.data.tokenizer import (
  Tokenizer,
  check_vocabulary,
  load_tokenizer,
)
from jaxalign.errors import UserError
from jaxalign.models import groups, layers
from jaxalign.models.hf import folder as hf
from jaxalign.models.hf import hub
from jaxalign.models.hf.fields import Fields
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes

LAB = pathlib.Path(__file__).parent.parent / "lab"


@dataclasses.dataclass(frozen=True, eq=False)  # hashable: by identity
class Loaded:
  """A model with its parameters and its tokenizer."""

  model: Model
  params: Params
  tokenizer: Tokenizer


@dataclasses.dataclass(frozen=True)
class Opened:
  """A model whose folder was checked and whose parameters are still unread.

  A run opens all of its models and its data before it reads a parameter: what
  is wrong with the last of them shows within seconds.
  """

  model: Model
  tokenizer: Tokenizer
  read: Callable[[], Params]

  def load(self) -> Loaded:
    """Reads the parameters, which takes the time."""
    return Loaded(self.model, self.read(), self.tokenizer)


def compute_dtype(setting: str) -> str:
  """`auto` is bfloat16 on accelerators and float32 on CPU."""
  if setting != "auto":
    return setting
  return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def open_policy(
  config: TrainingConfig, mesh: Mesh, head: str = "auto"
) -> Opened:
  """The model that `config.policy` names, with adapters if `config.lora` says.

  Args:
    config: of any training run.
    mesh: where the parameters go.
    head: "lm", "score_...", or "auto" for what the folder says.

  Raises:
    UserError: anything that keeps it from being loaded.
  """
  compute = compute_dtype(config.precision.compute)
  lora = None
  if config.lora.rank:
    lora = layers.LoraConfig(
      rank=config.lora.rank,
      alpha=config.lora.alpha,
      dropout=config.lora.dropout,
      targets=config.lora.targets,
    )
  if config.policy == "init":
    return _new(config, mesh, head, compute)
  folder = hub.resolve(
    locate(config.policy, "policy" if head == "lm" else "reward-train")
  )
  model, read = hf.prepare(
    folder,
    dtype=config.precision.params,
    compute_dtype=compute,
    head=None if head == "auto" else head,
    lora=lora,
    shardings=lambda shapes: meshes.shardings(shapes, mesh),
    remat=config.remat,
    seed=config.seed,
  )
  return Opened(model, _tokenizer(folder, model), read)


def open_scorer(name: str, mesh: Mesh, dtype: str, field: str) -> Opened:
  """A frozen reward model; where it has groups, their weighted sum.

  Args:
    name: hub id, folder, or `lab`; groups' weights in brackets behind it.
    mesh: where the parameters go.
    dtype: "float32", "bfloat16" or "auto", of parameters and arithmetic.
    field: config field that named it, for messages.

  Raises:
    UserError: it cannot be loaded, has no score head or not these groups.
  """
  place, weights = parse_groups(name)
  default = "reward-test" if "test" in field else "reward-train"
  folder = hub.resolve(locate(place, default))
  dtype = compute_dtype(dtype)
  model, read = hf.prepare(
    folder,
    dtype=dtype,
    shardings=lambda shapes: meshes.shardings(shapes, mesh),
  )
  if model.config.head == "lm":
    raise UserError(
      f"config.{field}: {name} is a language model without a score head; give "
      "a sequence classifier, e.g. one trained with configs/reward_model.py"
    )
  opened = Opened(model, _tokenizer(folder, model), read)
  weights = check_weights(model, weights, f"config.{field}: {place}")
  if not weights:
    return opened
  fold = lambda: groups.fold(model, read(), weights)[1]
  return dataclasses.replace(opened, model=model.replace(groups=()), read=fold)


def check_weights(
  model: Model, given: Mapping[str, float], where: str
) -> dict[str, float]:
  """`groups.weights_of`; prints whom a reward model listens to."""
  weights = groups.weights_of(model.config.groups, given, where)
  if weights:
    terms = tuple(f"{x:.3g} {name}" for name, x in weights.items())
    hint = "" if given else "; all alike, as no weights are given in brackets"
    print(f"{where} scores with {groups.listed(terms, ' + ')}{hint}")
  return weights


def with_groups(
  opened: Opened, names: tuple[str, ...], seed: int = 0
) -> Opened:
  """The same model with a score head for each group; see `groups.widen`.

  Args:
    opened: with a score head; one that has groups is returned as it is.
    names: of the groups; empty = none.
    seed: of what tells the new heads apart.
  """
  model = opened.model
  if not names or model.config.groups:
    return opened
  return dataclasses.replace(
    opened,
    model=model.replace(groups=names),
    read=lambda: groups.widen(opened.read(), len(names), seed),
  )


def with_dropout(opened: Opened, rate: float) -> Opened:
  """The same model, dropping hidden features in training.

  Raises:
    UserError: its architecture has no dropout.
  """
  if not hasattr(opened.model.config, "dropout"):
    raise UserError(
      f"config.dropout={rate} needs a DeBERTa, the policy is a "
      f"{opened.model.config.module.__name__}; set it to 0, or use "
      "config.lora.dropout with adapters"
    )
  model = opened.model.replace(dropout=rate)
  return dataclasses.replace(opened, model=model)


def locate(name: str, lab: str) -> str:
  """A model's name with `lab` put into the folder that ships."""
  return str(LAB / lab) if name == "lab" else name


def _tokenizer(folder: Any, model: Model) -> Tokenizer:
  tokenizer = load_tokenizer(folder)
  check_vocabulary(tokenizer, model.config.vocab_size, str(folder))
  return tokenizer


def _new(config: TrainingConfig, mesh: Mesh, head: str, dtype: str) -> Opened:
  """A model of `config.init`'s sizes with random weights."""
  tokenizer = load_tokenizer(config.init.tokenizer)
  values = _hf_values(config.init, tokenizer)
  head = "lm" if head == "auto" else head
  fields = Fields(values, "config.init")
  model = hf.assemble(fields, head, dtype=dtype, remat=config.remat)
  init = lambda: meshes.put(model.init(jax.random.key(config.seed)), mesh)
  return Opened(model, tokenizer, init)


def _hf_values(init: InitConfig, tokenizer: Tokenizer) -> dict[str, Any]:
  """`config.init` as the config.json of a folder."""
  values: dict[str, Any] = {
    name: value
    for name, value in dataclasses.asdict(init).items()
    if name != "tokenizer" and value != 0
  }
  values.setdefault("intermediate_size", 4 * init.hidden_size)
  values |= {
    "tie_word_embeddings": init.tie_word_embeddings,
    "vocab_size": tokenizer.vocab_size,
    "pad_token_id": tokenizer.pad_id,
    "eos_token_id": tokenizer.eos_id or 0,
  }
  if init.model_type == "gpt_neo":
    kinds = ["global", "local"] * init.num_hidden_layers
    values["attention_types"] = [
      [[kind], 1] for kind in kinds[: init.num_hidden_layers]
    ]
  if init.model_type == "deberta-v2":
    # The third version's attention: shared keys, log buckets.
    values |= {
      "relative_attention": True,
      "pos_att_type": ["p2c", "c2p"],
      "share_att_key": True,
      "position_buckets": 32,
      "norm_rel_ebd": "layer_norm",
      "position_biased_input": False,
      "max_relative_positions": -1,
      "type_vocab_size": init.type_vocab_size,
      "pooler_hidden_size": init.hidden_size,
      "num_labels": 1,
    }
  return values
