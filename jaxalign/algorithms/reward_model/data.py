"""Completions with the rewards that they should get, in batches."""

import collections
import dataclasses
import functools
import logging
import math
import typing
from collections.abc import Sequence

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxalign.algorithms.reward_model.config import RewardModelConfig
from jaxalign.core.types import AnyArray
from jaxalign.data import batches, formats
from jaxalign.data.prompt_format import DIALOGUE
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.models.groups import listed
from jaxalign.setup.dataset import account, fits, source_of

WINDOW = 32  # batches within which rows of similar length are brought together
FEW = 20  # completions, below which a group's own head is doubtful

_log = logging.getLogger(__name__)


@typing.no_type_check  # holds numpy rows on the host
@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ScoredBatch:
  """Completions with the rewards they should get, the shorter ones first."""

  tokens: Int[AnyArray, "*M B T"]
  mask: Bool[AnyArray, "*M B T"]  # True = a real token
  types: Int[AnyArray, "*M B T"]  # 0 = prompt, 1 = completion, under `pair`
  reward: Float[AnyArray, "*M B"]  # target; only its order counts in pairs
  margin: Float[AnyArray, "*M B"]  # by how much a chosen completion should win
  group: Int[AnyArray, "*M B"]  # completions that are compared carry one number
  chars: Int[AnyArray, "*M B"]  # length of the completion in characters
  real: Bool[AnyArray, "*M B"]  # True = a row, False = filler
  # Whose judgement it is: a column of the score head; None = it has one.
  head: Int[AnyArray, "*M B"] | None = None
  # Rows that end before column `half`; only so much of them is computed.
  short: int = dataclasses.field(default=0, metadata={"static": True})
  half: int = dataclasses.field(default=0, metadata={"static": True})


@dataclasses.dataclass
class ScoredRows:
  """Encoded completions, a column a list."""

  ids: list[list[int]]
  types: list[list[int]]  # segment of each token
  reward: list[float | None]
  margin: list[float]
  group: list[int]  # completions that are compared carry one number
  chars: list[int]
  judge: list[str]  # whose judgement it is; "" where there are no groups
  head: list[int] | None = None  # each row's column of the score head

  def pack(
    self,
    chosen: Int[np.ndarray, " B"],
    length: int,
    buckets: Sequence[int],
    micro_batches: int,
    fill: int = 0,
    parts: int = 1,
  ) -> ScoredBatch:
    """Some of the rows as numpy arrays `[M, B, T]`.

    Completions of one prompt differ much in length, so a batch has two
    widths: as many quarters of its rows as fit are read at half the width.

    Args:
      chosen: indices of the rows.
      length: tokens of a row at most.
      buckets: the widths of rows.
      micro_batches: M.
      fill: filler is added up to as many rows.
      parts: that a mesh splits rows into; those of each width divide by it.
    """
    # Filler repeats rows, so that it adds no shape and no length.
    real = np.arange(max(len(chosen), fill)) < len(chosen)
    index = np.where(real, np.resize(chosen, len(real)), chosen[0])

    # The shorter rows of each micro-batch come first.
    count = np.array([len(self.ids[i]) for i in index])
    count = count.reshape(micro_batches, -1)
    order = np.argsort(count, axis=1, kind="stable")
    shape = micro_batches, -1
    index = np.take_along_axis(index.reshape(shape), order, axis=1)
    real = np.take_along_axis(real.reshape(shape), order, axis=1)
    index = index.reshape(-1).tolist()
    # The two widths, and how many rows of each micro-batch fit the smaller.
    # In quarters only: each number of rows is a program of its own. What did
    # not divide over the mesh would be computed by every device.
    width = min(length, batches.bucket_length(int(count.max()), buckets))
    half = batches.bucket_length(width // 2, buckets)
    rows = count.shape[1]
    quarter = -(-(rows // 4) // parts) * parts
    short = 0
    if quarter and half < width:
      fitting = int((count <= half).sum(axis=1).min())
      short = min(fitting // quarter, 3, (rows - 1) // quarter) * quarter

    def column(values: Sequence, kind: type) -> np.ndarray:
      return np.array([values[i] for i in index], kind).reshape(shape)

    tokens, mask = batches.pad_rows([self.ids[i] for i in index], width)
    types, _ = batches.pad_rows([self.types[i] for i in index], width)
    return ScoredBatch(
      tokens=tokens.reshape(*shape, width),
      mask=mask.reshape(*shape, width),
      types=types.reshape(*shape, width),
      reward=column(self.reward, np.float32),
      margin=column(self.margin, np.float32),
      group=column(self.group, np.int32),
      chars=column(self.chars, np.int32),
      real=real,
      head=None if self.head is None else column(self.head, np.int32),
      short=short,
      half=half,
    )


@dataclasses.dataclass(frozen=True, eq=False)  # hashable: by identity
class ScoredData:
  """The rows of a run.

  Attributes:
    config: of the run, with its final steps and groups.
    rows: to train on.
    length: tokens of a row at most.
    validation: `[1, B, T]`, never trained on.
  """

  config: RewardModelConfig
  rows: ScoredRows
  length: int
  validation: list[ScoredBatch]
  # `data/...` of the first step: rows that are used and left out.
  counts: dict[str, int] = dataclasses.field(default_factory=dict)
  parts: int = 1  # that the mesh splits rows into

  def batch(self, step: int) -> ScoredBatch:
    """Numpy rows `[M, B, T]` of a step, a pure function of seed and step."""
    config = self.config
    # An epoch has whole batches only; a few rows are left out of each.
    epoch, at = divmod(step, len(self.rows.ids) // config.batch_size)
    chosen = self.order(epoch)[at]
    return self.rows.pack(
      chosen,
      self.length,
      config.length_buckets,
      config.micro_batches,
      parts=self.parts,
    )

  @functools.lru_cache(maxsize=2)  # noqa: B019, a run has one of these
  def order(self, epoch: int) -> Int[np.ndarray, "N B"]:
    """Batches of an epoch, completions of one prompt next to each other.

    Each prompt's completions are shuffled and cut into groups; the groups are
    shuffled; within a window of batches they are sorted by length, so that a
    batch holds little padding; the batches are shuffled again. A group of fewer
    completions than the others may end in the next pass, which costs its pairs.
    """
    config, rows = self.config, self.rows
    size, count = config.batch_size, len(rows.ids)
    most = 2 if config.loss == "pairwise" else config.answers_per_prompt
    # Each row's place in the random order of this epoch.
    rank = np.argsort(batches.permutation(config.seed, epoch, count))

    # Groups of at most `most` completions, in random order.
    group = np.array(rows.group)
    order = np.lexsort((rank, group))
    # The rows of a prompt lie side by side; every `most` of them are a group.
    start = np.r_[True, group[order][1:] != group[order][:-1]]
    first = np.maximum.accumulate(np.where(start, np.arange(count), 0))
    opens = (np.arange(count) - first) % most == 0
    groups = np.split(order, np.flatnonzero(opens)[1:])
    groups.sort(key=lambda members: rank[members].min())

    # Windows of batches, sorted by length within.
    def longest(members: Int[np.ndarray, " N"]) -> int:
      return max(len(rows.ids[i]) for i in members)

    flat, window, held = [], [], 0
    for members in groups:
      window.append(members)
      held += len(members)
      if held >= WINDOW * size:
        flat += sorted(window, key=longest)
        window, held = [], 0
    flat += sorted(window, key=longest)
    # Whole batches, in random order: the sorting put short ones first.
    whole = np.concatenate(flat)[: count // size * size].reshape(-1, size)
    return whole[batches.permutation(config.seed + 1, epoch, len(whole))]


def blank_batch(
  shape: tuple[int, int, int], *, several_heads: bool
) -> ScoredBatch:
  """A batch `[M, B, T]` of nothing but filler, for its shape."""
  rows = shape[:2]
  ids, numbers = np.zeros(shape, np.int32), np.zeros(rows, np.int32)
  floats = np.zeros(rows, np.float32)
  return ScoredBatch(
    tokens=ids,
    mask=np.zeros(shape, bool),
    types=ids,
    reward=floats,
    margin=floats,
    group=numbers,
    chars=numbers,
    real=np.zeros(rows, bool),
    head=numbers if several_heads else None,
  )


def load_data(
  config: RewardModelConfig,
  tokenizer: Tokenizer,
  context: int,
  head: str,
  groups: tuple[str, ...] = (),
  parts: int = 1,
) -> ScoredData:
  """Loads and encodes the rows; settles the run's steps and groups.

  Args:
    config: its data and lengths.
    tokenizer: the model's.
    context: tokens the model can read.
    head: the model's, which may read the score at an end of text.
    groups: those that the model has heads for already.
    parts: that the mesh splits rows into.

  Raises:
    UserError: a bad source, too few rows, or groups that do not fit.
  """
  # Groups: those of the model, the config and the data have to agree.
  if groups and not config.group_column:
    raise UserError(
      f"config.policy: {config.policy} has a score head for each of "
      f"{listed(groups)}; name the column that says who judged a row with "
      "config.group_column"
    )
  if groups and config.groups not in ((), groups):
    raise UserError(
      f"config.groups={','.join(config.groups)} differs from the heads that "
      f"{config.policy} has, {listed(groups)}; leave it empty"
    )
  # Rows to train on, and the head that each of them is scored by.
  length, end = min(config.max_length, context), head == "score_eos"
  rows, counts = load_rows(config, tokenizer, length, end)
  size, count = config.batch_size, len(rows.ids)
  if count < size:
    share = "" if config.half == "all" else f" (config.half={config.half})"
    raise UserError(
      f"config.data: {config.data} gives {count} completions{share}, fewer "
      f"than config.batch_size={size}; lower it or give more data"
    )
  groups = groups or config.groups
  if config.group_column and not groups:
    groups = tuple(sorted(set(rows.judge)))
    if len(groups) == 1:
      raise UserError(
        f"config.group_column: {config.group_column} is {groups[0]!r} in every "
        f"row of {config.data}, and one group is one head; leave it empty"
      )
  _assign_heads(rows, groups, "data", config.data)
  # Held-out rows, sorted by length so that a batch holds little padding.
  validation = []
  if config.validation_data:
    found, _ = load_rows(config, tokenizer, length, end, validation=True)
    _assign_heads(found, groups, "validation_data", config.validation_data)
    held = min(config.validation_rows or len(found.ids), len(found.ids))
    by_length = sorted(range(held), key=lambda i: len(found.ids[i]))
    micro, buckets = config.micro_rows, config.length_buckets
    validation = [
      found.pack(
        np.array(by_length[at : at + micro]),
        length,
        buckets,
        1,
        fill=micro,
        parts=parts,
      )
      for at in range(0, held, micro)
    ]
  steps = config.steps or math.ceil(config.epochs * (count // size))
  config = dataclasses.replace(config, steps=steps, groups=groups)
  return ScoredData(config, rows, length, validation, counts, parts)


def _assign_heads(
  rows: ScoredRows, groups: tuple[str, ...], field: str, source: str
) -> None:
  """Fills the column `head`; prints how many rows each group has.

  Raises:
    UserError: a group has no head.
  """
  if not groups:
    return
  # The groups in order, also those without rows, then unknown ones.
  counts = dict.fromkeys(groups, 0) | collections.Counter(rows.judge)
  unknown = tuple(sorted(set(counts) - set(groups)))
  if unknown:
    raise UserError(
      f"config.{field}: {source} has rows of {listed(unknown)}, for whom there "
      f"is no head; the groups are {listed(groups)}"
    )
  terms = tuple(f"{name} {count}" for name, count in counts.items())
  print(f"{source}: completions by group: {listed(terms)}")
  few = tuple(name for name, count in counts.items() if count < FEW)
  if few and field == "data":
    _log.warning(
      "%s: fewer than %d completions by %s; heads of their own will hardly "
      "learn their taste",
      source,
      FEW,
      listed(few),
    )
  heads = {name: head for head, name in enumerate(groups)}
  rows.head = [heads[judge] for judge in rows.judge]


class _Scored(typing.NamedTuple):
  """A completion of a prompt, and what it is worth to whom."""

  prompt: str
  completion: str
  reward: float | None
  margin: float
  group: int
  judge: str


def load_rows(
  config: RewardModelConfig,
  tokenizer: Tokenizer,
  length: int,
  end: bool,
  validation: bool = False,
) -> tuple[ScoredRows, dict[str, int]]:
  """Rows of at most `length` tokens, and how many were left out for what.

  With `end` each text ends in the end of text, which a score head reads.
  """
  reader = tokenizer
  # Two segments are the bare question and its answer, in no template.
  if config.encoding == "pair":
    reader = dataclasses.replace(tokenizer, format=DIALOGUE)
  source, options = source_of(config, reader, validation, "comparisons.jsonl")
  options |= {
    "part": "all" if validation else config.half,
    "group": config.group_column,
    "system": config.system_prompt,
  }
  scored: list[_Scored] = []
  if config.loss == "pairwise":
    # Both completions of each comparison, with rewards 1 and 0.
    found = formats.load_preferences(source, **options)
    pairs = [
      r for r in found.rows if fits(config, r.prompt, r.chosen, r.rejected)
    ]
    for number, row in enumerate(pairs):
      judge = row.group if config.group_column else ""
      # Only the better row's margin is read.
      margin = row.margin if config.margin else 0.0
      scored += [
        _Scored(row.prompt, row.chosen, 1.0, margin, number, judge),
        _Scored(row.prompt, row.rejected, 0.0, 0.0, number, judge),
      ]
  else:
    # Scored completions; those by one judge of one prompt are compared.
    columns = {"reward": config.reward_column}
    found = formats.load_completions(
      source, need="reward", columns=columns, **options
    )
    numbers: dict[tuple[str, str], int] = {}
    for row in found.rows:
      if fits(config, row.prompt, row.completion):
        judge = row.group if config.group_column else ""
        group = numbers.setdefault((row.prompt, judge), len(numbers))
        scored.append(
          _Scored(row.prompt, row.completion, row.reward, 0.0, group, judge)
        )
  encoded = tokenizer.encode_rewards(
    [row.prompt for row in scored],
    [row.completion for row in scored],
    config.encoding,
    length,
    end,
  )
  # Of a comparison both completions stay, or none where all that differs is
  # cut off.
  each = 2 if config.loss == "pairwise" else 1
  kept = [
    i
    for i in range(len(scored))
    if each == 1 or encoded[i - i % 2][0] != encoded[i - i % 2 + 1][0]
  ]
  counts = account(
    config,
    source,
    found,
    len(kept) // each,
    length,
    short=len(scored) // each,
    encoded=len(scored) // each,
    cut=sum(len(encoded[i][0]) >= length for i in kept),
  )
  scored, encoded = [scored[i] for i in kept], [encoded[i] for i in kept]
  rows = ScoredRows(
    ids=[ids for ids, _ in encoded],
    types=[types for _, types in encoded],
    reward=[row.reward for row in scored],
    margin=[row.margin for row in scored],
    group=[row.group for row in scored],
    chars=[len(row.completion) for row in scored],
    judge=[row.judge for row in scored],
  )
  return rows, counts
