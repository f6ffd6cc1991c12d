"""Data of reward-model runs: answers with the rewards they should get."""

import collections
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterable

import numpy as np

from jaxalign.algorithms.reward_model import ScoredBatch
from jaxalign.build.supervised import fits, parts, reading
from jaxalign.config import RewardModelConfig
from jaxalign.data import batches, formats
from jaxalign.data.rows import CompletionRow, PreferenceRow
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.models.groups import listed
from jaxalign.runtime.context import Task

WINDOW = 32  # batches among which rows of like length are brought together
FEW = 20  # answers, below which a group's own head is told to be doubtful

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Answer:
  """An answer to a prompt, and what it is worth to whom."""

  prompt: str
  text: str
  reward: float | None
  margin: float
  number: int  # answers that are compared carry one
  who: str  # "" where there are no groups


def reward_task(
  config: RewardModelConfig,
  tokenizer: Tokenizer,
  context: int,
  head: str,
  known: tuple[str, ...] = (),
) -> tuple[Task, RewardModelConfig]:
  """The rows of a reward-model run.

  Args:
    config: its data and lengths.
    tokenizer: the policy's.
    context: tokens the model can read.
    head: the model's, which may read the score at an end of text.
    known: groups that the model has heads for.

  Returns:
    The rows, and the config with what they decide: its steps and groups.
  """
  _check_groups(config, known)
  length = min(config.max_length, context)
  read = functools.partial(
    _scored_rows, config, tokenizer, length, head == "score_eos"
  )
  rows = read()
  size = config.batch_size
  micro = config.micro_batch or size
  a_pass = len(rows["ids"]) // size
  if a_pass == 0:
    raise UserError(
      f"config.data: {config.data} gives {len(rows['ids'])} answers, fewer "
      f"than config.batch_size={size}; lower it or give more data"
    )
  groups = known or config.groups or _found_groups(config, rows)
  _assign_heads(rows, groups, "data", config.data)
  steps = config.steps or math.ceil(config.epochs * a_pass)

  @functools.lru_cache(maxsize=2)
  def order(epoch: int) -> np.ndarray:
    return _grouped_order(config, rows, epoch, size)

  def batch(step: int) -> ScoredBatch:
    epoch, at = divmod(step, a_pass)
    return _scored_batch(rows, order(epoch)[at], length, size // micro)

  held = ()
  if config.validation_data:
    found = read(validation=True)
    _assign_heads(found, groups, "validation_data", config.validation_data)
    count = min(config.validation_rows or len(found["ids"]), len(found["ids"]))
    by_length = sorted(range(count), key=lambda i: len(found["ids"][i]))
    held = tuple(
      _scored_batch(found, np.array(part), length, 1, fill=micro)
      for part in parts(by_length, micro)
    )
  decided = dataclasses.replace(config, steps=steps, groups=groups)
  return Task(batch, held), decided


def _check_groups(config: RewardModelConfig, known: tuple[str, ...]) -> None:
  """UserError if the policy's groups and the config's do not fit."""
  if known and not config.group_column:
    raise UserError(
      f"config.policy: {config.policy} has a score head for each of "
      f"{listed(known)}; name the column that says who judged a row with "
      "config.group_column"
    )
  if known and config.groups not in ((), known):
    raise UserError(
      f"config.groups={','.join(config.groups)} differs from the heads that "
      f"{config.policy} has, {listed(known)}; leave it empty"
    )


def _found_groups(
  config: RewardModelConfig, rows: dict[str, list]
) -> tuple[str, ...]:
  """The names in `group_column`, sorted; () where none is asked for."""
  names = tuple(sorted(set(rows["who"])))
  if config.group_column and len(names) == 1:
    raise UserError(
      f"config.group_column: {config.group_column} is {names[0]!r} in every "
      f"row of {config.data}, and one group is one head; leave it empty"
    )
  return names if config.group_column else ()


def _assign_heads(
  rows: dict[str, list], groups: tuple[str, ...], field: str, source: str
) -> None:
  """Adds the column `head`, each row's group's; tells how many rows each has.

  Raises:
    UserError: a group has no head.
  """
  if not groups:
    return
  counts = dict.fromkeys(groups, 0) | collections.Counter(rows["who"])
  unknown = tuple(sorted(set(counts) - set(groups)))
  if unknown:
    raise UserError(
      f"config.{field}: {source} has rows of {listed(unknown)}, for whom there "
      f"is no head; the groups are {listed(groups)}"
    )
  terms = tuple(f"{name} {count}" for name, count in counts.items())
  print(f"{source}: answers by group: {listed(terms)}")
  few = tuple(name for name, count in counts.items() if count < FEW)
  if few and field == "data":
    _log.warning(
      "%s: fewer than %d answers by %s; heads of their own will hardly tell "
      "their taste",
      *(source, FEW, listed(few)),
    )
  heads = {name: head for head, name in enumerate(groups)}
  rows["head"] = [heads[who] for who in rows["who"]]


def _scored_rows(
  config: RewardModelConfig,
  tokenizer: Tokenizer,
  length: int,
  end: bool,
  validation: bool = False,
) -> dict[str, list]:
  """Columns of answers: ids, types, reward, margin, group, chars, who."""
  source, options = reading(config, tokenizer, validation, "comparisons.jsonl")
  options |= {
    "part": "all" if validation else config.half,
    "group": config.group_column,
  }
  if config.loss == "pairwise":
    found = formats.load_preferences(source, **options)
    answers = _compared(config, found.rows)
  else:
    columns = {"reward": config.reward_column}
    found = formats.load_completions(
      source, need="reward", columns=columns, **options
    )
    answers = _graded(config, found.rows)
  print(f"{source}: {found}")
  if not answers:
    raise UserError(
      f"{source}: none of {len(found.rows)} rows is within "
      f"config.max_example_chars={config.max_example_chars}; raise it"
    )
  encoded = tokenizer.encode_rewards(
    [a.prompt for a in answers],
    [a.text for a in answers],
    config.encoding,
    length,
    end,
  )
  return {
    "ids": [ids for ids, _ in encoded],
    "types": [types for _, types in encoded],
    "reward": [a.reward for a in answers],
    "margin": [a.margin for a in answers],
    "group": [a.number for a in answers],
    "chars": [len(a.text) for a in answers],
    "who": [a.who for a in answers],
  }


def _compared(
  config: RewardModelConfig, rows: Iterable[PreferenceRow]
) -> list[Answer]:
  """Both answers of each comparison, worth 1 and 0."""
  kept = [r for r in rows if fits(config, r.prompt, r.chosen, r.rejected)]
  answers = []
  for number, row in enumerate(kept):
    who = row.group if config.group_column else ""
    margin = row.margin if config.margin else 0.0
    answers += [
      Answer(row.prompt, row.chosen, 1.0, margin, number, who),
      Answer(row.prompt, row.rejected, 0.0, 0.0, number, who),
    ]
  return answers


def _graded(
  config: RewardModelConfig, rows: Iterable[CompletionRow]
) -> list[Answer]:
  """Scored answers; those by one group to one prompt are compared."""
  numbers: dict[tuple[str, str], int] = {}
  answers = []
  for row in rows:
    if fits(config, row.prompt, row.completion):
      who = row.group if config.group_column else ""
      number = numbers.setdefault((row.prompt, who), len(numbers))
      answers.append(
        Answer(row.prompt, row.completion, row.reward, 0.0, number, who)
      )
  return answers


def _grouped_order(
  config: RewardModelConfig, rows: dict[str, list], epoch: int, size: int
) -> np.ndarray:
  """Batches `[N, B]` of an epoch, answers to one prompt side by side.

  Each prompt's answers are shuffled and cut into groups; the groups are
  shuffled; within a window of batches they are sorted by length, so that a
  batch holds little padding; the batches are shuffled again. A group of fewer
  answers than the others may end in the next pass, which costs its pairs.
  """
  count = len(rows["ids"])
  most = 2 if config.loss == "pairwise" else config.answers_per_prompt
  rank = np.argsort(batches.permutation(config.seed, epoch, count))
  group = np.array(rows["group"])
  order = np.lexsort((rank, group))
  start = np.r_[True, group[order][1:] != group[order][:-1]]
  first = np.maximum.accumulate(np.where(start, np.arange(count), 0))
  fresh = (np.arange(count) - first) % most == 0
  pieces = np.split(order, np.flatnonzero(fresh)[1:])
  pieces.sort(key=lambda piece: rank[piece].min())
  window = WINDOW * size
  cut, lines, held = [], [], 0
  for piece in pieces:
    lines.append(piece)
    held += len(piece)
    if held >= window:
      cut.append(lines)
      lines, held = [], 0
  cut.append(lines)
  longest = lambda piece: max(len(rows["ids"][i]) for i in piece)
  flat = np.concatenate(
    [p for lines in cut for p in sorted(lines, key=longest)]
  )
  whole = flat[: count // size * size].reshape(-1, size)
  return whole[batches.permutation(config.seed + 1, epoch, len(whole))]


def _scored_batch(
  rows: dict[str, list],
  chosen: np.ndarray,
  length: int,
  micros: int,
  fill: int = 0,
) -> ScoredBatch:
  """Rows as arrays `[M, B, T]`, filled up to `fill` rows.

  Answers to one prompt differ much in length, so a batch has two widths: as
  many quarters of its rows as fit are read at half the width.
  """
  real = np.arange(max(len(chosen), fill)) < len(chosen)
  index = np.where(real, np.resize(chosen, len(real)), chosen[0])
  count = np.array([len(rows["ids"][i]) for i in index]).reshape(micros, -1)
  order = np.argsort(count, axis=1, kind="stable")
  sort: Callable = lambda x: np.take_along_axis(
    x.reshape(micros, -1), order, axis=1
  ).reshape(-1)
  index, real = sort(index), sort(real)
  width = min(length, batches.bucket_length(int(count.max())))
  half = batches.bucket_length(width // 2)
  quarter = count.shape[1] // 4
  fitting = int((count <= half).sum(axis=1).min())
  short = (
    min(fitting // quarter, 3) * quarter if quarter and half < width else 0
  )
  ids = [rows["ids"][i] for i in index]
  tokens, mask = batches.pad_rows(ids, width)
  types, _ = batches.pad_rows([rows["types"][i] for i in index], width)
  column = lambda name, kind: np.array([rows[name][i] for i in index], kind)
  cut: Callable = lambda x: x.reshape(micros, -1, *x.shape[1:])
  return ScoredBatch(
    tokens=cut(tokens),
    mask=cut(mask),
    types=cut(types),
    reward=cut(column("reward", np.float32)),
    margin=cut(column("margin", np.float32)),
    group=cut(column("group", np.int32)),
    chars=cut(column("chars", np.int32)),
    real=cut(real),
    head=cut(column("head", np.int32)) if "head" in rows else None,
    short=short,
    half=half,
  )
