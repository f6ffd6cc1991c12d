"""The functions of `import jaxalign`, for notebooks and programs.

What they are given is checked here, before anything is compiled: a mistake is
a `UserError` of one line.
"""

import dataclasses
import inspect
import math
import numbers
import os
import pathlib
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.progress

from jaxalign import algorithms, cli, paths
from jaxalign.config import TrainingConfig, to_mapping
from jaxalign.config.changes import suffix
from jaxalign.config.hints import nearest
from jaxalign.config.names import is_function
from jaxalign.data.fields import BadRow, check_text, messages_of
from jaxalign.data.rows import PromptRow
from jaxalign.data.tokenizer import Tokenizer, has_tokenizer
from jaxalign.errors import UserError
from jaxalign.models import groups
from jaxalign.models.config import CausalConfig
from jaxalign.models.hf import card, folder, hub, write
from jaxalign.report import logged
from jaxalign.runtime import files, signals
from jaxalign.runtime import workdir as runs
from jaxalign.runtime.metrics import number
from jaxalign.sampling.generator import Generator
from jaxalign.sampling.sampler import Sampler
from jaxalign.sampling.settings import fitting, make
from jaxalign.scoring.function import RewardFunction, open_function
from jaxalign.scoring.scorer import Scorer
from jaxalign.setup import models
from jaxalign.setup.models import Loaded
from jaxalign.text.templates import Message

T = TypeVar("T")
# A text that is continued as it is, or the turns of a conversation.
Prompt = str | Sequence[Message]
Metrics = dict[str, int | float]  # of a step, "step" included

DTYPES = ("float32", "bfloat16", "float16")
# What one call of `generate` may take by default, in rows and in bytes.
MOST_ROWS = 256
MOST_BYTES = 2**30
# What others call settings of `generate`.
_ELSEWHERE = {
  "n": "samples_per_prompt",
  "num_return_sequences": "samples_per_prompt",
  "max_tokens": "max_new_tokens",
  "max_length": "max_new_tokens",
  "do_sample": "temperature, which is 0 for the likeliest tokens",
  "stop_strings": "stop",
  "no_repeat_ngram_size": "no_repeat_ngram",
}
SCORED = 1024  # texts that `score` hands to the device at a time


def load(
  source: str | os.PathLike,
  *,
  dtype: str = "float32",
  compute_dtype: str | None = None,
  head: str | None = None,
  group_weights: Mapping[str, float] | None = None,
) -> Loaded:
  """A causal LM or a sequence classifier, as its `config.json` says.

  Args:
    source: a hub id, a Hugging Face folder, a folder with PEFT adapters, a
      run's folder, or a model that ships with the package: `lab` or
      `lab/policy`, `lab/reward-train`, `lab/reward-test`.
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
    HostError: the hub or the store does not answer.
  """
  if not isinstance(source, str | os.PathLike):
    raise UserError(
      f"load needs a model's name or folder, got {source!r:.100}; give a text "
      "such as 'lab' or 'EleutherAI/pythia-70m'"
    )
  if group_weights is not None and not (
    isinstance(group_weights, Mapping)
    and all(_is_number(weight) for weight in group_weights.values())
  ):
    raise UserError(
      f"group_weights must be a number for each group, got "
      f"{group_weights!r:.100}; write {{'name': 0.7}}"
    )
  name = os.fspath(source)
  path = hub.resolve(models.locate_model(name, "policy"))
  model, params = folder.load(
    path, dtype=dtype, compute_dtype=compute_dtype, head=head
  )
  if group_weights is not None:
    known = model.config.groups
    weights = groups.weights_of(known, group_weights, f"group_weights: {path}")
    model, params = groups.fold(model, params, weights)
  tokenizer = models.tokenizer_of(path, model) if has_tokenizer(path) else None
  return Loaded(model, params, tokenizer, name)


def logits(
  model: Loaded,
  token_ids: np.ndarray | jax.Array | Sequence[Sequence[int]],
  mask: np.ndarray | jax.Array | Sequence[Sequence[bool]] | None = None,
) -> jax.Array:
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
  _check_model("logits", model)
  architecture = model.model
  # A wrong id would read another token's row, so it is looked for here.
  try:
    ids = np.asarray(token_ids)
    real = np.ones(ids.shape, bool) if mask is None else np.asarray(mask)
  except (ValueError, TypeError) as error:  # rows of unlike lengths
    raise UserError(
      "token_ids must be rows of one length [B, T]; pad them and give a mask "
      "of the same shape"
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
  if real.shape != ids.shape or real.dtype.kind not in "biuf":
    raise UserError(
      f"mask must have the shape of token_ids {list(ids.shape)}, got "
      f"{real.dtype} {list(real.shape)}; it is True for real tokens"
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

  compiled = _kept(model, "logits", lambda: forward)
  return compiled(
    model.params, jnp.asarray(ids, jnp.int32), jnp.asarray(real, bool)
  )


def generate(
  model: Loaded,
  prompts: Prompt | Sequence[Prompt],
  *,
  samples_per_prompt: int = 1,
  max_new_tokens: int = 64,
  temperature: int | float = 1.0,
  top_p: int | float = 1.0,
  stop: Sequence[str] = (),
  seed: int = 0,
  batch_size: int | None = None,
  progress: bool = False,
  **settings: Any,  # of `sampling.settings.make`, which checks them
) -> list[list[str]]:
  """Completions of each prompt.

  Args:
    model: a causal language model with its tokenizer.
    prompts: P prompts in a list, or one. A text is continued as it is. A role
      list, `[{"role": "user", "content": "Hello"}]`, is written in the model's
      own format with the assistant's turn opened.
    samples_per_prompt: S, completions of each.
    max_new_tokens: a completion ends after as many tokens, or at the end of
      text.
    temperature: divides the logits; 0 takes the likeliest token.
    top_p: draw from the likeliest tokens that hold this much probability.
    stop: texts that end a completion and are left out of it.
    seed: the same seed gives the same texts, whatever the other prompts are.
    batch_size: prompts a call of the model; it changes nothing but time and
      memory. None = as many as take some 1 GiB and 256 rows, S of each.
    progress: show a bar of the prompts that are done, on stderr or in the
      notebook.
    **settings: further ones of `sampling.settings.make`, such as `top_k`.

  Returns:
    For each of the P prompts a list of S completions, also where one prompt
    was given. A text's completion begins with the whitespace that was drawn; a
    role list's is the assistant's turn alone, without whitespace around it.

  Raises:
    UserError: the model is no language model, a prompt is no text or role
      list or does not fit into the context, or a setting is unknown or out of
      its range.
  """
  tokenizer = _tokenizer("generate", model)
  config = model.model.config
  if config.head != "lm":
    raise UserError(
      f"generate needs a language model, this one has the head {config.head!r}"
    )
  assert isinstance(config, CausalConfig), config

  # Settings.
  stop = _texts("stop", stop)
  if "" in stop:
    raise UserError("stop must hold texts of at least one character, got ''")
  _check_whole("samples_per_prompt", samples_per_prompt, 1, 2**31)
  _check_whole("seed", seed, 0, 2**32)
  _check_batch(batch_size, progress)
  known = [*inspect.signature(make).parameters, "samples_per_prompt", "stop"]
  if unknown := [name for name in settings if name not in known]:
    there = _ELSEWHERE.get(unknown[0])
    near = [there] if there else nearest(unknown[0], known)
    hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(known)}"
    raise UserError(f"generate has no setting {unknown[0]!r}; {hint}")
  settings.setdefault("pad_id", tokenizer.pad_id)
  settings.setdefault("eos_ids", tokenizer.end_ids)
  more = settings.pop("stops", ())
  if not isinstance(more, Sequence):
    raise UserError(
      f"stops must be a list of texts or of lists of token ids, got {more!r}"
    )
  stops = [*([more] if isinstance(more, str) else more), *stop]
  stop = [text for text in stops if isinstance(text, str)]

  # Prompts as texts, and what ends a completion of each: a reply also ends
  # where its format opens the next turn.
  asked = _prompts(tokenizer, prompts)
  if not asked:
    return []
  texts = [
    prompt if isinstance(prompt, str) else tokenizer.render_chat(prompt, True)
    for prompt in asked
  ]
  turns = list(tokenizer.format.turns)
  ends = [stop if isinstance(prompt, str) else stop + turns for prompt in asked]
  # Sampling ends early where a stop text is drawn as its own tokens; wherever
  # else it occurs, it is cut below.
  early = stop if any(isinstance(prompt, str) for prompt in asked) else ends[0]
  sequences = [tokenizer.encode(text) for text in early]
  given = [s for s in stops if not isinstance(s, str)]
  settings["stops"] = given + fitting(sequences)
  packed = make(
    temperature=temperature,
    top_p=top_p,
    max_new_tokens=max_new_tokens,
    **settings,
  )
  sampler = _kept(model, "sampler", lambda: Sampler(model.model))
  prompt_ids = tokenizer.encode_prompts(texts)
  sampler.check(prompt_ids)

  # How many prompts fit into a call: keys and values of each token, and some
  # copies of the logits in float32.
  if batch_size is None:
    tokens = max(map(len, prompt_ids)) + max_new_tokens
    cached = 2 * config.layers * config.kv_heads * config.head_dim
    row = cached * jnp.dtype(config.dtype).itemsize * tokens
    rows = min(MOST_ROWS, MOST_BYTES // (row + 16 * config.vocab_size))
    batch_size = max(1, rows // samples_per_prompt)
  # Calls of nearly one size: another number of rows is another program.
  calls = math.ceil(len(texts) / batch_size)
  size = math.ceil(len(texts) / calls)

  # Drawing.
  generator = Generator(sampler, tokenizer, packed)
  key, step = jax.random.key(seed), samples_per_prompt
  found: list[list[str]] = []
  with _bar(progress) as bar:
    task = bar.add_task("prompts", total=len(texts))
    for start in range(0, len(texts), size):
      part = texts[start : start + size]
      drawn = generator(model.params, part, step, key, first_prompt=start).texts
      for i in range(len(part)):
        completions = drawn[i * step : (i + 1) * step]
        for text in ends[start + i]:
          completions = [whole.partition(text)[0] for whole in completions]
        if not isinstance(asked[start + i], str):
          completions = [whole.strip() for whole in completions]
        found.append(completions)
      bar.advance(task, len(part))
  return found


def score(
  reward_model: Loaded | Callable[..., Any] | str,  # its columns: any name
  prompts: Prompt | Sequence[Prompt],
  completions: Sequence[Prompt],
  *,
  columns: Mapping[str, Sequence[object]] | None = None,
  encoding: str = "auto",
  batch_size: int | None = None,
  progress: bool = False,
) -> np.ndarray:
  """The reward of each completion.

  Args:
    reward_model: a sequence classifier with its tokenizer; or a reward
      function of yours, itself or as "FILE.py:FUNCTION", which is called as in
      a run (docs/reward_functions.md).
    prompts: prompt of each completion: a text that is read as it is, or a role
      list, which is written in the reward model's own format.
    completions: as many texts; or role lists of one answer each, as TRL has
      them.
    columns: what a reward function takes besides these two: name -> a value
      for each completion.
    encoding: "concat" (the SuperHF paper's) or "pair", see
      `Tokenizer.encode_rewards`; "auto" = as the model's folder says, or by its
      architecture.
    batch_size: completions a call of the model, rounded down to a power of
      two; it changes nothing but time and memory. None = 64, fewer where they
      are longer than 64 tokens.
    progress: show a bar of the completions that are done, on stderr or in the
      notebook.

  Returns:
    float32 numpy `[B]`, raw logits, higher is better. A score does not
    depend on the others. Of a model with groups it is the mean of their
    scores; see `load` for other weights. NaN where a function gives None,
    -inf where it gives no finite number.

  Raises:
    UserError: the model is no sequence classifier, there are not as many
      prompts as completions, or they are no texts; a function fails or needs
      other columns.
  """
  if isinstance(reward_model, str) or not isinstance(reward_model, Loaded):
    return _ask_function(reward_model, prompts, completions, columns or {})
  if columns is not None:
    raise UserError(
      "score takes columns for reward functions, and a model reads none; leave "
      "them out"
    )
  tokenizer = _tokenizer("score", reward_model)
  if reward_model.model.config.head == "lm":
    raise UserError("score needs a sequence classifier, not a language model")
  if encoding not in ("auto", "concat", "pair"):
    raise UserError(
      f"encoding must be auto, concat or pair, got {encoding!r}; leave it auto"
    )
  _check_batch(batch_size, progress)

  def make_scorer() -> Scorer:
    folded = groups.fold(reward_model.model, reward_model.params)
    chosen = models.choose_encoding(
      encoding, tokenizer, reward_model.model, tokenizer.name
    )
    scorer = Scorer(*folded, tokenizer, chosen)
    if batch_size is None:
      return scorer
    most = batch_size * scorer.max_length
    return dataclasses.replace(scorer, rows=batch_size, tokens=most)

  scorer = _kept(reward_model, f"score {encoding} {batch_size}", make_scorer)
  # Its chat template writes whole texts only; a pair is written without one.
  writer = tokenizer if scorer.encoding == "concat" else None
  asked = _prompts(writer, prompts)
  completions = _texts("completions", _answers(completions))
  if len(asked) != len(completions):
    raise UserError(
      f"score needs as many prompts as completions, got {len(asked)} and "
      f"{len(completions)}"
    )
  rows = [
    PromptRow(prompt)
    if isinstance(prompt, str)
    else PromptRow("", messages=tuple(prompt))
    for prompt in asked
  ]
  texts = scorer.encode(rows, completions)
  # By length, so that the texts of a call need little padding.
  order = sorted(range(len(texts)), key=lambda i: len(texts[i][0]))
  scores = np.full(len(texts), np.nan, np.float32)
  with _bar(progress) as bar:
    task = bar.add_task("completions", total=len(texts))
    for start in range(0, len(order), SCORED):
      part = order[start : start + SCORED]
      scores[part] = scorer.score_ids([texts[i] for i in part])
      bar.advance(task, len(part))
  scorer.warn_non_finite(scores)
  return scores


def _ask_function(
  function: object,
  prompts: Prompt | Sequence[Prompt],
  completions: Sequence[Prompt],
  columns: Mapping[str, Sequence[object]],
) -> np.ndarray:
  """The rewards of a user's function, float32 `[B]`; see `score`."""
  if isinstance(function, str) and is_function(function):
    opened = open_function(function, "reward_model")
  elif callable(function):
    name = getattr(function, "__name__", type(function).__name__)
    opened = RewardFunction(f"{name}()", function, "reward_model")
  else:
    raise UserError(
      f"score needs a model from jaxalign.load, a function, or its name "
      f"'FILE.py:FUNCTION', got {function!r:.100}"
    )
  asked, completions = (
    _prompts(None, prompts),
    _texts("completions", _answers(completions)),
  )
  counts = {"prompts": len(asked)} | {k: len(x) for k, x in columns.items()}
  for name, count in counts.items():
    if count != len(completions):
      raise UserError(
        f"score needs as many {name} as completions, got {count} and "
        f"{len(completions)}"
      )
  rows = []
  for i, prompt in enumerate(asked):
    own = {name: values[i] for name, values in columns.items()}
    if isinstance(prompt, str):
      rows.append(PromptRow(prompt, columns=own | {"prompt": prompt}))
    else:
      text = prompt[-1]["content"]
      rows.append(PromptRow(text, messages=tuple(prompt), columns=own))
  opened.check_columns(sorted(columns), "columns")
  scores = opened(rows, completions).astype(np.float32)
  # -inf, so that it is never the best.
  return np.where(np.isinf(scores), -np.inf, scores)


def save(
  model: Loaded,
  folder: str | os.PathLike,
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
  _check_model("save", model)
  if not isinstance(folder, str | os.PathLike):
    raise UserError(f"folder must be a path, got {folder!r}; give a text")
  if dtype is not None and dtype not in DTYPES:
    raise UserError(
      f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}; None keeps "
      "that of the parameters"
    )
  if not isinstance(license, str):
    raise UserError(f"license must be a text, got {license!r}; such as 'mit'")
  tokenizer = model.tokenizer
  ids = {} if tokenizer is None else tokenizer.special_ids()

  def also(new: pathlib.Path) -> None:
    if tokenizer is not None:
      tokenizer.save(new)
    card.write(new, license=license)

  write.save(
    model.model,
    model.params,
    pathlib.Path(folder),
    dtype=dtype,
    config=ids,
    also=also,
  )


@dataclasses.dataclass(frozen=True, repr=False)
class TrainResult:
  """What a run has left.

  Attributes:
    workdir: its folder.
    finished: False where it was asked to stop; the same call goes on.
    metrics: a dict for each line of metrics.jsonl with its "step", steps
      rising; `read_run(workdir)` gives them as a pandas frame.
    model: the trained model's folder, for `load` and transformers; None until
      the run is finished.
  """

  workdir: pathlib.Path
  finished: bool
  metrics: list[Metrics]
  model: pathlib.Path | None

  @property
  def step(self) -> int:
    """Steps that are done and in `metrics`."""
    return int(self.metrics[-1]["step"]) if self.metrics else 0

  def __repr__(self) -> str:
    state = "finished" if self.finished else "stopped"
    where = f", model {self.model}" if self.model else ""
    return (
      f"TrainResult({self.workdir}: {state} after {self.step} steps{where})"
    )


def train(
  # A user wrote a mapping: `read_config` checks it.
  config: str | os.PathLike | TrainingConfig | Mapping[str, Any] | Any,
  workdir: str | os.PathLike | None = None,
  *,
  overrides: Mapping[str, object] | None = None,
  extend: bool = False,
  fresh: bool = False,
  quiet: bool = False,
  **fields: object,
) -> TrainResult:
  """Trains what a config describes, as `python -m jaxalign.main` does.

  The same call again continues the run, or returns what it has left. Ctrl-C
  (a notebook's "interrupt") ends it after the step and saves; a second one
  raises `KeyboardInterrupt`. In another thread than the main one nothing
  stops it.

  Args:
    config: "FILE.py" or "FILE.py:PRESET"; or a dict or ConfigDict of fields,
      in which `algorithm` chooses the method and fields that are left out have
      their defaults; or the dataclass that `algorithms.read_config` returns.
    workdir: folder of the run; None = the command's, below ./runs, named after
      the config and the fields that differ from it.
    overrides: fields that win over the config's, nested or dotted:
      `{"steps": 20, "optimizer.learning_rate": 1e-4}`.
    extend: give the run that is there the length of this config.
    fresh: move the run that is there to `<workdir>.1` and begin again.
    quiet: print no example of what is trained on.
    **fields: overrides without a dot in their names: `steps=20`.

  Returns:
    Folder, metrics and model of the run.

  Raises:
    UserError: one line that says what is wrong with the config or with what
      it names. It names the command's flags: `--fresh` is `fresh=True`.
  """
  if not isinstance(workdir, str | os.PathLike | None):
    raise UserError(f"workdir must be a path, got {workdir!r}; give a text")
  if not isinstance(overrides, Mapping | None):
    raise UserError(
      f"overrides must be a mapping of fields, got {overrides!r:.100}; write "
      "{'steps': 20}"
    )
  for name, value in (("extend", extend), ("fresh", fresh), ("quiet", quiet)):
    if not isinstance(value, bool):
      raise UserError(f"{name} must be True or False, got {value!r}")
  # The config, and the part of its folder's name that it gives.
  mapping, place = config, ""
  if isinstance(config, str | os.PathLike):
    mapping, place = cli.load_config(os.fspath(config))
  elif isinstance(config, TrainingConfig):
    mapping = to_mapping(config)
  changes = files.flatten({**(overrides or {}), **fields})
  run_config = algorithms.read_config(mapping, list(changes.items()))
  if workdir is None:
    preset = type(run_config)()
    if place:
      preset = algorithms.preset_of(mapping, run_config)
    place = place or f"runs/{run_config.algorithm}"
    workdir = place + suffix(run_config, preset, extend=extend)
  paths.refuse_remote(
    workdir,
    "workdir",
    "the command jaxalign.main takes --workdir=gs://bucket/run",
  )
  path = pathlib.Path(workdir)

  with signals.raise_second():
    algorithms.run(run_config, path, extend=extend, fresh=fresh, quiet=quiet)
  finished = runs.read_finished(path) is not None
  return TrainResult(
    path,
    finished,
    _rows_of(logged.read_run(path, empty=True)),
    path / "model" if finished else None,
  )


def read_run(folder: str | os.PathLike) -> Any:  # pandas may be missing
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
  if not isinstance(folder, str | os.PathLike):
    raise UserError(f"folder must be a path, got {folder!r}; give a text")
  rows = _rows_of(logged.read_run(folder))
  try:
    import pandas as pd
  except ImportError:
    return rows
  return pd.DataFrame(rows).set_index("step")


def _rows_of(run: logged.LoggedRun) -> list[Metrics]:
  """The numbers of a run's log."""
  rows: list[Metrics] = []
  for row in run.rows:
    known = {name: number(value) for name, value in row.items()}
    rows.append(
      {name: value for name, value in known.items() if value is not None}
      | {"step": row["step"]}
    )
  return rows


def _check_model(function: str, model: object) -> None:
  if not isinstance(model, Loaded):
    raise UserError(
      f"{function} needs a model from jaxalign.load, got {model!r:.100}; write "
      f"{function}(jaxalign.load(name), ...)"
    )


def _tokenizer(function: str, model: Loaded) -> Tokenizer:
  _check_model(function, model)
  if model.tokenizer is None:
    raise UserError("the model's folder has no tokenizer files; add them")
  return model.tokenizer


def _is_number(value: object) -> bool:
  return isinstance(value, numbers.Real) and math.isfinite(value)


def _check_whole(name: str, value: object, low: int, high: int) -> None:
  whole = isinstance(value, numbers.Integral) and not isinstance(value, bool)
  if not whole or not low <= int(value) < high:
    raise UserError(
      f"{name} must be a whole number >= {low} and below {high}, got "
      f"{value!r}; the default is {low}"
    )


def _check_batch(batch_size: object, progress: object) -> None:
  if batch_size is not None:
    _check_whole("batch_size", batch_size, 1, 2**31)
  if not isinstance(progress, bool):
    raise UserError(f"progress must be True or False, got {progress!r}")


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
        f"{name}[{i}] must be a text, got {type(text).__name__} {text!r:.100}"
      )
    _check_characters(f"{name}[{i}]", text)
  return texts


def _answers(value: object) -> object:
  """Completions, those that are role lists of one answer (TRL's) as texts."""
  if isinstance(value, str) or not isinstance(value, Iterable):
    return value
  answers = list(value)
  if answers and isinstance(answers[0], Mapping):  # the turn of one
    answers = [answers]

  def text_of(answer: object) -> object:
    if isinstance(answer, str) or not isinstance(answer, Sequence):
      return answer
    turns = [turn for turn in answer if isinstance(turn, Mapping)]
    alone = len(turns) == len(answer) == 1
    is_answer = alone and turns[0].get("role") == "assistant"
    return turns[0].get("content") if is_answer else answer

  return [text_of(answer) for answer in answers]


def _prompts(
  tokenizer: Tokenizer | None, value: object
) -> list[str | list[Message]]:
  """Prompts as a list, checked; a single one is a list of one."""
  if not isinstance(value, Iterable) or isinstance(value, Mapping):
    raise UserError(
      f"prompts must be a text, a role list or a list of them, got "
      f"{value!r:.100}; a role list is [{{'role': 'user', 'content': 'Hi'}}]"
    )
  prompts = [value] if isinstance(value, str) else list(value)
  if prompts and isinstance(prompts[0], Mapping):  # the turns of one
    prompts = [prompts]
  found: list[str | list[Message]] = []
  for i, prompt in enumerate(prompts):
    if isinstance(prompt, str):
      _check_characters(f"prompts[{i}]", prompt)
      found.append(prompt)
      continue
    if not isinstance(prompt, list | tuple):
      raise UserError(
        f"prompts[{i}] must be a text or a role list, got "
        f"{type(prompt).__name__} {prompt!r:.100}"
      )
    try:
      messages = messages_of(list(prompt), "it", tokenizer)
    except BadRow as error:
      raise UserError(f"prompts[{i}] {error}") from error
    roles = [turn["role"] for turn in messages]
    if "user" not in roles or roles[-1] == "assistant":
      raise UserError(
        f"prompts[{i}] must have a user's turn and not end with the "
        f"assistant's, got {', '.join(map(str, roles))}; the model writes "
        "the assistant's next turn"
      )
    found.append(messages)
  return found


def _check_characters(name: str, text: str) -> None:
  try:
    check_text(text, "it")
  except BadRow as error:
    raise UserError(f"{name} {error}; no tokenizer can read it") from error


def _bar(shown: bool) -> rich.progress.Progress:
  """A bar on stderr, or in a notebook; none where it is not shown."""
  return rich.progress.Progress(
    *rich.progress.Progress.get_default_columns(),
    rich.progress.MofNCompleteColumn(),
    console=rich.console.Console(stderr=True),
    disable=not shown,
  )


# Compiled programs, dropped together with the model that they belong to.
_programs: weakref.WeakKeyDictionary[Loaded, dict[str, Any]]
_programs = weakref.WeakKeyDictionary()


def _kept(model: Loaded, name: str, make: Callable[[], T]) -> T:
  programs = _programs.setdefault(model, {})
  if name not in programs:
    programs[name] = make()
  return programs[name]
