"""Language models aligned by preference: SuperHF, RLHF and others, in JAX.

Six functions for notebooks; everything else is `python -m jaxalign.main`.
Importing this package imports neither jax nor starts a backend.
"""

import numbers
import os
import pathlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from jaxalign.errors import UserError

if TYPE_CHECKING:
  import jax
  import numpy as np
  import pandas as pd

  from jaxalign.data.tokenizer import Tokenizer
  from jaxalign.setup.models import Loaded

__all__ = [
  "Loaded",
  "UserError",
  "generate",
  "load",
  "logits",
  "read_run",
  "save",
  "score",
]

T = TypeVar("T")

DTYPES = ("float32", "bfloat16", "float16")


def __getattr__(name: str) -> Any:  # a module's attribute may be anything
  """`Loaded`, what `load` returns; it lives where jax is imported."""
  if name == "Loaded":
    from jaxalign.setup.models import Loaded

    return Loaded
  raise AttributeError(f"module 'jaxalign' has no attribute {name!r}")


def load(
  source: str | pathlib.Path,
  *,
  dtype: str = "float32",
  compute_dtype: str | None = None,
  head: str | None = None,
  group_weights: Mapping[str, float] | None = None,
) -> "Loaded":
  """A causal LM or a sequence classifier, as its `config.json` says.

  Args:
    source: a hub id, a Hugging Face folder, a folder with PEFT adapters, or
      `lab` for the policy that ships with the package.
    dtype: of the parameters: "float32", "bfloat16" or "float16".
    compute_dtype: of the arithmetic; None = `dtype`.
    head: another head than the file's, see `models.hf.folder.open_pretrained`.
    group_weights: of a reward model with a head for each group: how much each
      counts, 0 where it is left out; its one score is then their weighted sum.
      None = keep all heads.

  Returns:
    The model, its parameters and its tokenizer (None if it has no files).

  Raises:
    UserError: one line that says what is wrong with the folder.
  """
  from jaxalign.data.tokenizer import has_tokenizer
  from jaxalign.models import groups
  from jaxalign.models.hf import folder, hub
  from jaxalign.setup import models

  path = hub.resolve(models.locate_model(str(source), "policy"))
  model, params = folder.load(
    path, dtype=dtype, compute_dtype=compute_dtype, head=head
  )
  if group_weights is not None:
    names = model.config.groups
    weights = groups.weights_of(names, group_weights, f"group_weights: {path}")
    model, params = groups.fold(model, params, weights)
  tokenizer = models.tokenizer_of(path, model) if has_tokenizer(path) else None
  return models.Loaded(model, params, tokenizer)


def logits(
  model: "Loaded",
  token_ids: "np.ndarray | jax.Array | Sequence[Sequence[int]]",
  mask: "np.ndarray | jax.Array | Sequence[Sequence[bool]] | None" = None,
) -> "jax.Array":
  """The model's logits for token ids, padded on either side.

  Args:
    model: from `load`.
    token_ids: int `[B, T]`.
    mask: bool `[B, T]`, True = a real token; None = all are.

  Returns:
    float32 `[B, T, V]`; of a classifier `[B]`, or `[B, G]` where it has a
    head for each of G groups.

  Raises:
    UserError: ids that are not the model's, or a mask of another shape.
  """
  import jax
  import jax.numpy as jnp
  import numpy as np

  _check_model("logits", model)
  architecture = model.model
  # A wrong id would read another token's row, so it is looked for here.
  try:
    ids = np.asarray(token_ids)
  except ValueError as error:  # rows of unlike lengths
    raise UserError(
      "token_ids must be rows of one length [B, T]; pad them and give a mask"
    ) from error
  if ids.ndim != 2 or 0 in ids.shape or ids.dtype.kind not in "iu":
    raise UserError(
      f"token_ids must be whole numbers [B, T] with B and T >= 1, got "
      f"{ids.dtype} {list(ids.shape)}; one row is [[1, 2, 3]]"
    )
  size = architecture.config.vocab_size
  if ids.min() < 0 or ids.max() >= size:
    raise UserError(
      f"token_ids must be in [0, {size}), the model's vocabulary, got "
      f"{ids.min()} to {ids.max()}; encode texts with model.tokenizer"
    )
  if mask is not None and np.shape(mask) != ids.shape:
    raise UserError(
      f"mask must have the shape of token_ids {list(ids.shape)}, got "
      f"{list(np.shape(mask))}; it is True for real tokens"
    )

  @jax.jit
  def forward(params, tokens, mask):
    module = architecture.bind(params)
    if architecture.config.head != "lm":
      scores = module.scores(tokens, mask)
      return scores if architecture.config.groups else scores[:, 0]
    positions = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    hidden, _ = module(tokens, positions, mask.astype(jnp.int32))
    return module.unembed(hidden)

  tokens = jnp.asarray(ids, jnp.int32)
  real = jnp.ones(tokens.shape, bool) if mask is None else jnp.asarray(mask)
  compiled = _kept(model, "logits", lambda: forward)
  return compiled(model.params, tokens, real.astype(bool))


def generate(
  model: "Loaded",
  prompts: Sequence[str] | str,
  *,
  samples_per_prompt: int = 1,
  max_new_tokens: int = 64,
  temperature: int | float = 1.0,
  top_p: int | float = 1.0,
  stop: Sequence[str] = (),
  seed: int = 0,
  **settings: Any,  # of `sampling.settings.make`, which checks them
) -> list[list[str]]:
  """Completions of each prompt.

  Args:
    model: a causal language model with its tokenizer.
    prompts: texts, or one of them; they are continued verbatim.
    samples_per_prompt: S, completions of each.
    max_new_tokens: a completion ends after as many tokens, or at the end of
      text.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: draw from the likeliest tokens that hold this much probability.
    stop: texts that end a completion and are left out of it.
    seed: the same seed gives the same texts, whatever the other prompts are.
    **settings: further ones of `sampling.settings.make`, such as `top_k`.

  Returns:
    For each prompt a list of S completions, the prompt not included.

  Raises:
    UserError: the model is no language model, a prompt is no text, or a
      setting is unknown or out of its range.
  """
  import inspect

  import jax

  from jaxalign.sampling.generator import Generator
  from jaxalign.sampling.sampler import Sampler
  from jaxalign.sampling.settings import STOP_SLOTS, STOP_WIDTH, make

  tokenizer = _tokenizer("generate", model)
  prompts = _texts("prompts", prompts)
  stop = _texts("stop", stop)
  for name, value, low, high in (
    ("samples_per_prompt", samples_per_prompt, 1, 2**31),
    ("seed", seed, 0, 2**32),
  ):
    if not isinstance(value, numbers.Integral) or not low <= value < high:
      raise UserError(
        f"{name} must be a whole number >= {low} and below {high}, got "
        f"{value!r}; the default is {low}"
      )
  known = inspect.signature(make).parameters
  if unknown := [name for name in settings if name not in known]:
    raise UserError(
      f"generate has no setting {unknown[0]!r}; it has {', '.join(known)}, stop"
    )
  if "" in stop:
    raise UserError("stop must hold texts of at least one character, got ''")
  if not prompts:
    return []
  if model.model.config.head != "lm":
    raise UserError(
      f"generate needs a language model, this one has the head "
      f"{model.model.config.head!r}"
    )
  settings.setdefault("pad_id", tokenizer.pad_id)
  settings.setdefault("eos_ids", tokenizer.end_ids)
  # Sampling ends early where a stop text is drawn as its own tokens; wherever
  # else it occurs, it is cut below.
  more = settings.pop("stops", ())
  if not isinstance(more, Sequence):
    raise UserError(
      f"stops must be a list of texts or of lists of token ids, got {more!r}"
    )
  stops = [*([more] if isinstance(more, str) else more), *stop]
  stop = [text for text in stops if isinstance(text, str)]
  sequences = [tokenizer.encode(text) for text in stop]
  settings["stops"] = [s for s in stops if not isinstance(s, str)] + [
    ids for ids in sequences if 1 <= len(ids) <= STOP_WIDTH
  ][:STOP_SLOTS]
  generator = Generator(
    _kept(model, "sampler", lambda: Sampler(model.model)),
    tokenizer,
    make(
      temperature=temperature,
      top_p=top_p,
      max_new_tokens=max_new_tokens,
      **settings,
    ),
  )
  texts = generator(
    model.params, prompts, samples_per_prompt, jax.random.key(seed)
  ).texts
  for text in stop:
    texts = [whole.partition(text)[0] for whole in texts]
  step = samples_per_prompt
  return [texts[i : i + step] for i in range(0, len(texts), step)]


def score(
  reward_model: "Loaded",
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  encoding: str = "auto",
) -> "np.ndarray":
  """The reward of each completion.

  Args:
    reward_model: a sequence classifier with its tokenizer.
    prompts: prompt of each completion.
    completions: as many texts.
    encoding: "concat" (the SuperHF paper's) or "pair", see
      `Tokenizer.encode_rewards`; "auto" = as the model's folder says, or by its
      architecture.

  Returns:
    float32 numpy `[B]`, raw logits, higher is better. A score does not
    depend on the others. Of a model with groups it is the mean of their
    scores; see `load` for other weights.

  Raises:
    UserError: the model is no sequence classifier, there are not as many
      prompts as completions, or they are no texts.
  """
  from jaxalign.data.rows import PromptRow
  from jaxalign.models import groups
  from jaxalign.scoring.reward_model import RewardModel
  from jaxalign.scoring.scorer import Scorer
  from jaxalign.setup.models import choose_encoding

  tokenizer = _tokenizer("score", reward_model)
  prompts = _texts("prompts", prompts)
  completions = _texts("completions", completions)
  if encoding not in ("auto", "concat", "pair"):
    raise UserError(
      f"encoding must be auto, concat or pair, got {encoding!r}; leave it auto"
    )
  if reward_model.model.config.head == "lm":
    raise UserError("score needs a sequence classifier, not a language model")
  if len(prompts) != len(completions):
    raise UserError(
      f"score needs as many prompts as completions, got {len(prompts)} and "
      f"{len(completions)}"
    )

  def make() -> RewardModel:
    folded = groups.fold(reward_model.model, reward_model.params)
    chosen = choose_encoding(
      encoding, tokenizer, reward_model.model, tokenizer.name
    )
    return RewardModel((Scorer(*folded, tokenizer, chosen),))

  rewards = _kept(reward_model, f"score {encoding}", make)
  return rewards([PromptRow(prompt) for prompt in prompts], completions)


def save(
  model: "Loaded",
  folder: str | pathlib.Path,
  *,
  dtype: str | None = None,
  license: str = "other",
) -> None:
  """Writes a folder that transformers loads, tokenizer and card included.

  Args:
    model: from `load`; adapters are merged.
    folder: replaced if it holds a model, refused if it holds other files.
    dtype: of the file's tensors; None = that of the parameters.
    license: for the model card.

  Raises:
    UserError: the folder holds other files, or cannot be written; or there is
      no such dtype.
  """
  from jaxalign.models.hf import card, write

  _check_model("save", model)
  if not isinstance(folder, str | os.PathLike):
    raise UserError(f"folder must be a path, got {folder!r}; give a text")
  if dtype is not None and dtype not in DTYPES:
    raise UserError(
      f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}; None keeps "
      "that of the parameters"
    )
  tokenizer = model.tokenizer
  ids = {} if tokenizer is None else tokenizer.special_ids()

  def also(new: pathlib.Path) -> None:
    if tokenizer is not None:
      tokenizer.save(new)
    card.write(new, license=license)

  write.save(
    model.model, model.params, folder, dtype=dtype, config=ids, also=also
  )


def read_run(
  folder: str | pathlib.Path,
) -> "pd.DataFrame | list[dict[str, int | float]]":
  """The metrics of a run, finished or not.

  Args:
    folder: the run's folder (`--workdir`).

  Returns:
    A pandas frame with a row for each line of metrics.jsonl, steps rising: the
    steps are its index, the metrics its columns, NaN where a step has no such
    value. Where pandas is not installed, the rows as dicts with "step".

  Raises:
    UserError: no such folder, no metrics in it, or a damaged file.
  """
  from jaxalign.report import logged
  from jaxalign.runtime.metrics import number

  rows = []
  for row in logged.read_run(folder).rows:
    numbers = {name: number(value) for name, value in row.items()}
    known = {
      name: value for name, value in numbers.items() if value is not None
    }
    rows.append(known | {"step": row["step"]})
  try:
    import pandas as pd
  except ImportError:
    return rows
  return pd.DataFrame(rows).set_index("step")


def _check_model(function: str, model: object) -> None:
  from jaxalign.setup.models import Loaded

  if not isinstance(model, Loaded):
    raise UserError(
      f"{function} needs a model from jaxalign.load, got {model!r:.100}; write "
      f"{function}(jaxalign.load(name), ...)"
    )


def _texts(name: str, value: object) -> list[str]:
  """The texts as a list; a single one is a list of one."""
  texts = [value] if isinstance(value, str) else value
  if not isinstance(texts, Iterable):
    raise UserError(
      f"{name} must be a text or several in a list, got {value!r:.100}"
    )
  texts = list(texts)
  for i, text in enumerate(texts):
    if not isinstance(text, str):
      raise UserError(
        f"{name}[{i}] must be a text, got {type(text).__name__} {text!r:.100}; "
        "role lists are rendered by model.tokenizer.render_chat"
      )
  return texts


def _tokenizer(function: str, model: "Loaded") -> "Tokenizer":
  _check_model(function, model)
  if model.tokenizer is None:
    raise UserError("the model's folder has no tokenizer files; add them")
  return model.tokenizer


# Compiled programs, dropped together with the model that they belong to.
_programs: weakref.WeakKeyDictionary["Loaded", dict[str, Any]]
_programs = weakref.WeakKeyDictionary()


def _kept(model: "Loaded", name: str, make: Callable[[], T]) -> T:
  programs = _programs.setdefault(model, {})
  if name not in programs:
    programs[name] = make()
  return programs[name]
