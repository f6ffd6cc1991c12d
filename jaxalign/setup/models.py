"""The models that a config names: opened and checked first, read later."""

import dataclasses
import hashlib
import operator
import os
import pathlib
from collections.abc import Mapping

import jax
import numpy as np
from jax.sharding import Mesh

from jaxalign import paths
from jaxalign.config.names import parse_groups
from jaxalign.config.sections import InitConfig, TrainingConfig
from jaxalign.core.types import JsonObject, Params
from jaxalign.data.tokenizer import (
  Tokenizer,
  check_vocabulary,
  load_tokenizer,
  with_format,
  with_notes,
)
from jaxalign.errors import UserError
from jaxalign.models import attention as attentions
from jaxalign.models import groups
from jaxalign.models.config import CausalConfig
from jaxalign.models.hf import folder as hf
from jaxalign.models.hf import hub
from jaxalign.models.hf.config_json import Fields, read_json
from jaxalign.models.layers import LoraConfig
from jaxalign.models.model import Model
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes

# Of a weight file `ModelSpec.digest` reads so many blocks of so many bytes.
BLOCKS, BLOCK = 32, 2**17
LAB = pathlib.Path(__file__).parent.parent / "lab"
LAB_MODELS = ("policy", "reward-train", "reward-test")


# Hashable by identity; its repr would list every parameter.
@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Loaded:
  """A model with its parameters and its tokenizer.

  Attributes:
    model: the architecture.
    params: its parameters, nested dicts of arrays.
    tokenizer: None if the model's folder has no tokenizer files.
    name: what it was loaded by, for people; "" if it was made otherwise.
  """

  model: Model
  params: Params
  tokenizer: Tokenizer | None
  name: str = ""

  def __repr__(self) -> str:
    config, leaves = self.model.config, jax.tree.leaves(self.params)
    parts = [
      config.model_type,
      f"{sum(leaf.size for leaf in leaves):,} parameters",
      f"head {config.head}",
    ]
    if config.groups:
      parts.append(f"groups {groups.listed(config.groups)}")
    if self.model.lora:
      parts.append(f"LoRA of rank {self.model.lora.rank}")
    # Adapters are float32 whatever the others are, so the largest array counts.
    dtype = str(max(leaves, key=operator.attrgetter("size")).dtype)
    parts.append(dtype)
    if dtype != config.dtype:
      parts.append(f"computes in {config.dtype}")
    name = f"{self.name}: " if self.name else ""
    return f"Loaded({name}{', '.join(parts)})"


@dataclasses.dataclass(frozen=True)
class ModelSpec:
  """A model that was opened and checked; none of its parameters is read.

  A run opens all of its models and its data before it reads a parameter, so
  that a mistake in the last of them shows within seconds.

  Attributes:
    model: as it will be used.
    tokenizer: its own.
    mesh: where the parameters go.
    pretrained: its folder; None = random parameters.
    seed: of random parameters.
    stored: the model as its folder has it; None = as it is used.
    group_weights: how much each group's score head counts; their weighted sum
      becomes the one head.
    encoding: how a reward model reads texts; "" for other models.
  """

  model: Model
  tokenizer: Tokenizer
  mesh: Mesh
  pretrained: hf.Pretrained | None
  seed: int = 0
  stored: Model | None = None
  group_weights: Mapping[str, float] | None = None
  encoding: str = ""

  def read(self) -> Params:
    """Reads the parameters onto the mesh, which takes the time."""
    # Files have the shapes of the stored model, whose heads may differ.
    stored = self.stored or self.model
    where = meshes.shardings(stored.shapes, self.mesh)
    if self.pretrained is None:
      # Drawn where it belongs: no device may have room for the whole.
      init = jax.jit(stored.init, out_shardings=where)
      params = init(jax.random.key(self.seed))
    else:
      params = self.pretrained.read(where)
    return self._with_heads(params)

  def shapes(self) -> Params:
    """What `read` gives, as shapes with their shardings; nothing is read."""
    shapes = (self.stored or self.model).shapes
    if self.pretrained is not None:
      shapes = self.pretrained.shapes
    shapes = jax.eval_shape(self._with_heads, shapes)
    return meshes.with_shardings(shapes, self.mesh)

  def _with_heads(self, params: Params) -> Params:
    """Heads of groups: folded into one, or made out of one."""
    stored = self.stored or self.model
    if self.group_weights:
      return groups.fold(stored, params, self.group_weights)[1]
    if self.model.config.groups != stored.config.groups:
      count = len(self.model.config.groups)
      return groups.widen(params, count, self.seed)
    return params

  def load(self) -> Loaded:
    """The model with its parameters."""
    name = self.tokenizer.name
    return Loaded(self.model, self.read(), self.tokenizer, name)

  def fingerprint(self) -> dict[str, str]:
    """What tells this model from others: its config and its weight files."""
    # Remat changes no value; attention is in no config's repr.
    config = repr(dataclasses.replace(self.model.config, remat="none"))
    found = {"config": config, "parameters": f"seed {self.seed}"}
    if self.pretrained is not None:
      # The lead alone reads the files for it.
      digest = hosts.from_lead(self._sha256, np.zeros(32, np.uint8))
      found["parameters"] = digest.tobytes().hex()
    return found

  def _weight_files(self) -> list[paths.Folder]:
    assert self.pretrained is not None
    tensors = self.pretrained.tensors.values()
    return sorted({part.path for leaf in tensors for part in leaf})

  def _sha256(self) -> np.ndarray:
    """SHA-256 of the weight files, as 32 bytes."""
    assert self.pretrained is not None
    # Parameters of another type are rounded from the same files.
    total = hashlib.sha256(self.pretrained.dtype.encode())
    for path in self._weight_files():
      one = hashlib.sha256()
      with path.open("rb") as file:
        while block := file.read(2**24):
          one.update(block)
      total.update(one.digest())
    return np.frombuffer(total.digest(), np.uint8)

  def digest(self) -> str:
    """Tells whether the files have changed: config.json, and parts of weights.

    A quick look, as every start takes it: training moves every matrix, and of a
    large file spread blocks are read. "" of random parameters.
    """
    if self.pretrained is None:
      return ""
    files = self._weight_files()
    total = hashlib.blake2b(digest_size=16)
    for config in sorted({path.parent / "config.json" for path in files}):
      total.update(config.read_bytes() if config.is_file() else b"")
    for path in files:
      size = paths.size(path)
      total.update(f"{path.name} {size} ".encode())
      with path.open("rb") as file:
        for i in range(BLOCKS):
          file.seek(max(0, size - BLOCK) * i // (BLOCKS - 1))
          total.update(file.read(BLOCK))
          if size <= BLOCK:
            break
    return total.hexdigest()


def compute_dtype(setting: str, mesh: Mesh) -> str:
  """`auto` is bfloat16 on accelerators and float32 on CPU."""
  if setting != "auto":
    return setting
  return "float32" if meshes.platform(mesh) == "cpu" else "bfloat16"


def attention_of(
  model: Model, mesh: Mesh, asked: str, length: int = 0
) -> attentions.Choice:
  """How a model's texts are attended to on these devices.

  Args:
    model: any; a DeBERTa has only dense attention.
    mesh: the devices that it is compiled for.
    asked: as `config.attention`.
    length: of the longest text in tokens, which a window may cover; 0 = the
      model's context.
  """
  config = model.config
  if not isinstance(config, CausalConfig):
    return attentions.Choice("dense")
  device = mesh.devices.flat[0]
  return attentions.choose(
    asked,
    meshes.platform(mesh),
    config.dtype,
    config.head_dim,
    attentions.Mask(
      windows=attentions.sees_part(
        config.windows, length or config.max_positions
      ),
      capped=bool(getattr(config, "attention_cap", 0)),
    ),
    attentions.parse_capability(getattr(device, "compute_capability", "")),
  )


def with_attention(
  model: Model, mesh: Mesh, asked: str, length: int = 0
) -> Model:
  """The same model with the attention that `attention_of` chooses for it."""
  kind = attention_of(model, mesh, asked, length).kind
  known = getattr(model.config, "attention", "dense")
  return model if kind == known else model.replace(attention=kind)


def locate(name: str, lab: str) -> str:
  """A name, where `lab` is what ships as `lab/<lab>`, or `lab/MODEL` is."""
  if name in [f"lab/{model}" for model in LAB_MODELS]:
    lab, name = name.removeprefix("lab/"), "lab"
  elif name.startswith("lab/") and not os.path.exists(name):
    raise UserError(
      f"{name} is no model that ships with jaxalign; those are "
      f"{', '.join(f'lab/{model}' for model in LAB_MODELS)}"
    )
  return str(LAB / lab) if name == "lab" else name


def locate_model(name: str, lab: str) -> str:
  """As `locate`; a run's folder stands for the model that it trained.

  Raises:
    UserError: the run has not finished.
  """
  place = locate(name, lab)
  folder = pathlib.Path(place).expanduser()
  # A run's config names its method, a model's does not.
  config = folder / "config.json"
  if not os.path.isfile(config) or "algorithm" not in read_json(config):
    return place
  if not os.path.isfile(folder / "model" / "config.json"):
    raise UserError(
      f"{name} holds a run that is not finished; go on with it, or write its "
      f"newest checkpoint as a model: python -m jaxalign.convert {name} MODEL"
    )
  return str(folder / "model")


def tokenizer_of(source: str | pathlib.Path, model: Model) -> Tokenizer:
  """The tokenizer in a model's folder, with the ends that the folder names.

  Raises:
    UserError: there is none, or it is another model's.
  """
  tokenizer = load_tokenizer(source)
  tokenizer = with_notes(tokenizer, *hf.generation_configs(source))
  return check_vocabulary(tokenizer, model.config.vocab_size, str(source))


def with_reward_notes(
  tokenizer: Tokenizer, config: TrainingConfig
) -> Tokenizer:
  """The tokenizer of a reward model with how a run has trained it to read.

  Args:
    tokenizer: of its policy.
    config: a `RewardModelConfig`.
  """
  notes = dataclasses.replace(
    tokenizer.notes,
    encoding=getattr(config, "encoding", ""),
    max_length=config.max_length,
    system_prompt=getattr(config, "system_prompt", ""),
  )
  return dataclasses.replace(tokenizer, notes=notes)


def choose_encoding(
  asked: str, tokenizer: Tokenizer, model: Model, where: str
) -> str:
  """How a reward model reads prompt and completion: "concat" or "pair".

  Args:
    asked: one of these, or "auto": as its folder says, else by architecture.
    tokenizer: of the reward model.
    model: the reward model.
    where: its name, for messages.

  Raises:
    UserError: another one is asked for than it was trained with.
  """
  noted = tokenizer.notes.encoding
  if noted and asked not in (noted, "auto"):
    raise UserError(
      f"{where} was trained with the encoding {noted}, got {asked}; its scores "
      "would mean nothing: give --config.scoring.encoding=auto (in chat: leave "
      "out --encoding)"
    )
  if noted or asked != "auto":
    return noted or asked
  # A model that tells two segments apart was trained on pairs of them.
  default = "concat"
  if getattr(model.config, "type_vocab_size", 0) > 1:
    default = "pair"
  print(
    f"{where} does not say how it reads prompt and completion: the encoding is "
    f"{default}, by its architecture"
  )
  return default


def open_policy(
  config: TrainingConfig, mesh: Mesh, head: str = "lm"
) -> ModelSpec:
  """The model that `config.policy` names, with adapters if `config.lora` says.

  Args:
    config: of any training run.
    mesh: where the parameters go.
    head: "lm", "score_...", or "auto" for the one that the folder has.

  Raises:
    UserError: anything that keeps it from being loaded, or from attending as
      `config.attention` asks.
  """
  compute = compute_dtype(config.precision.compute, mesh)
  # A new model: the config takes the place of a folder's config.json.
  if config.policy == "init":
    source = hub.resolve(config.init.tokenizer, weights=False)
    tokenizer = with_format(load_tokenizer(source), config.prompt_format)
    model = hf.from_config(
      Fields(_config_json(config.init, tokenizer), "config.init"),
      "lm" if head == "auto" else head,
      dtype=compute,
      remat=config.remat_policy,
    )
    meshes.check_heads(mesh, model.config.heads, "config.init")
    model = _with_policy_attention(model, mesh, config)
    return ModelSpec(model, tokenizer, mesh, None, config.seed)
  # A pretrained model, with adapters if a rank is given.
  lora = None
  if config.lora.rank:
    lora = LoraConfig(
      config.lora.rank,
      config.lora.alpha,
      config.lora.dropout,
      config.lora.targets,
    )
  source = hub.resolve(
    locate_model(config.policy, "policy" if head == "lm" else "reward-train")
  )
  pretrained = hf.open_pretrained(
    source,
    dtype=config.precision.params,
    compute_dtype=compute,
    head=None if head == "auto" else head,
    lora=lora,
    remat=config.remat_policy,
    seed=config.seed,
  )
  meshes.check_heads(mesh, pretrained.model.config.heads, config.policy)
  tokenizer = with_format(
    tokenizer_of(source, pretrained.model), config.prompt_format
  )
  model = pretrained.model
  if (
    model.config.head == "score_last"
    and "score_head.kernel" in pretrained.drawn
  ):
    # A language model's config.json seldom names the pad token.
    pad = tokenizer.pad_token_id
    model = model.replace(pad_id=-1 if pad is None else pad)
  model = _with_policy_attention(model, mesh, config)
  return ModelSpec(model, tokenizer, mesh, pretrained, config.seed)


def _with_policy_attention(
  model: Model, mesh: Mesh, config: TrainingConfig
) -> Model:
  """As `with_attention`; what was asked for by name must be possible."""
  asked, length = config.attention, config.max_length
  choice = attention_of(model, mesh, asked, length)
  if asked not in ("auto", choice.kind):
    why = choice.reason or "the model has only dense attention"
    raise UserError(
      f"config.attention must be auto, or one that this model can have here, "
      f"got {asked}: {why}; auto takes the fastest that it can have"
    )
  return with_attention(model, mesh, asked, length)


def open_reward_model(
  name: str,
  mesh: Mesh,
  dtype: str,
  field: str,
  lab: str = "reward-train",
  attention: str = "auto",
) -> ModelSpec:
  """A frozen reward model; where it has groups, their weighted sum.

  Args:
    name: hub id, folder, or `lab`; weights of groups follow in brackets.
    mesh: where the parameters go.
    dtype: "float32", "bfloat16" or "auto", of parameters and arithmetic.
    field: what named it, for messages: a config field or a flag.
    lab: which of the models that ship `lab` means.
    attention: as `config.attention`; dense where the model cannot have it.

  Raises:
    UserError: it cannot be loaded, has no score head or not these groups.
  """
  place, given = parse_groups(name)
  source = hub.resolve(locate_model(place, lab))
  pretrained = hf.open_pretrained(source, dtype=compute_dtype(dtype, mesh))
  model = with_attention(pretrained.model, mesh, attention)
  if model.config.head == "lm":
    raise UserError(
      f"{field}: {name} is a language model without a score head; give "
      "a sequence classifier, e.g. one trained with configs/reward_model.py"
    )
  tokenizer = tokenizer_of(source, model)
  # Groups: the folder has a head for each, the run reads their sum.
  weights = groups.weights_of(model.config.groups, given, f"{field}: {place}")
  if not weights:
    return ModelSpec(model, tokenizer, mesh, pretrained)
  terms = tuple(f"{weight:.3g} {name}" for name, weight in weights.items())
  hint = "" if given else "; all alike, as no weights are given in brackets"
  print(f"{field}: {place} scores with {groups.listed(terms, ' + ')}{hint}")
  return ModelSpec(
    model.replace(groups=()),
    tokenizer,
    mesh,
    pretrained,
    stored=model,
    group_weights=weights,
  )


def with_groups(spec: ModelSpec, names: tuple[str, ...]) -> ModelSpec:
  """The same model with a score head for each group; see `groups.widen`.

  Args:
    spec: with a score head; one that has groups is returned unchanged.
    names: of the groups; empty = none.
  """
  if not names or spec.model.config.groups:
    return spec
  widened = spec.model.replace(groups=names)
  return dataclasses.replace(spec, model=widened, stored=spec.model)


def _config_json(init: InitConfig, tokenizer: Tokenizer) -> JsonObject:
  """`config.init` as a Hugging Face config.json; its values are JSON's."""
  values: JsonObject = {
    name: value
    for name, value in dataclasses.asdict(init).items()
    if name != "tokenizer" and value != 0
  }
  values.setdefault("intermediate_size", 4 * init.hidden_size)
  # False equals 0, so an untied output was left out above.
  values |= {
    "tie_word_embeddings": init.tie_word_embeddings,
    "vocab_size": tokenizer.vocab_size,
    "pad_token_id": tokenizer.pad_token_id,
    "eos_token_id": tokenizer.eos_id or 0,
  }
  # LLaMA's relatives would take the numbers of their released sizes.
  if init.model_type not in ("gpt_neox", "gpt_neo", "deberta-v2"):
    values.setdefault("num_key_value_heads", init.num_attention_heads)
    values |= {
      "head_dim": init.hidden_size // init.num_attention_heads,
      "sliding_window": None,
    }
  if init.model_type.startswith("gemma"):  # some of its layers have a window
    values["sliding_window"] = init.max_position_embeddings
  # GPT-Neo alternates global and local attention, layer by layer.
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
