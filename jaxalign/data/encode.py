"""Prompt and completion to token ids with a loss mask."""

import dataclasses
from collections.abc import Sequence

import numpy as np
from jaxtyping import Int

from jaxalign.core.types import Answers
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.text import templates

LOSSES = ("completion", "all")
OVERLONG = ("error", "skip")


@dataclasses.dataclass(frozen=True)
class Encoded:
  """One row of ids, unpadded."""

  ids: tuple[int, ...]  # prompt, then completion
  prompt_length: int  # ids in front of the completion
  loss_mask: tuple[bool, ...]  # True = predicting this id counts in the loss
  complete: bool  # False where the completion was cut at `max_length`

  def __len__(self) -> int:
    return len(self.ids)


@dataclasses.dataclass(frozen=True)
class EncodedRows:
  """Encoded rows and the indices of the inputs they came from."""

  rows: tuple[Encoded, ...]
  kept: tuple[int, ...]  # input index of each row
  skipped: int  # inputs whose prompt fills the context


def encode_rows(
  tokenizer: Tokenizer,
  prompts: Sequence[str],
  completions: Sequence[str],
  *,
  max_length: int,
  loss: str = "completion",
  train_eos: bool = False,
  overlong: str = "error",
) -> EncodedRows:
  """Encodes prompt + completion as the texts that are trained on.

  The prompt's ids are those that the sampler starts from. The text is
  tokenised whole, so the space before the completion belongs to it; where a
  token would straddle the seam, the completion is tokenised by itself instead
  of changing the prompt.

  Args:
    tokenizer: of the model.
    prompts: may be empty strings: then the whole text counts.
    completions: as many.
    max_length: ids a row at most; the completion is cut on the right.
    loss: `completion`: only its ids count; `all`: all but the first id.
    train_eos: append the eos id to completions that were not cut and count
      it, so that the model learns to stop. The seeds did not.
    overlong: what to do with a prompt that leaves no room for one id of the
      completion: `error`, or `skip` and count it.

  Raises:
    UserError: an overlong prompt under `error`, an unknown option, or
      `train_eos` with a tokenizer that has no eos token.
  """
  _check_options(tokenizer, loss, overlong, train_eos)
  texts = [
    templates.join(*pair) for pair in zip(prompts, completions, strict=True)
  ]
  end = [tokenizer.eos_id] if train_eos and tokenizer.eos_id is not None else []
  whole = tokenizer.encode_prompts(texts)
  distinct = list(dict.fromkeys(prompts))  # a prompt often has many answers
  starts = dict(zip(distinct, tokenizer.encode_prompts(distinct), strict=True))
  rows, kept = [], []
  for index, ids in enumerate(whole):
    start = starts[prompts[index]]
    if len(start) >= max_length:
      if overlong == "skip":
        continue
      raise UserError(
        f"the prompt of row {index + 1} has {len(start)} tokens, the context "
        f"holds {max_length} with at least one for the completion; filter "
        f"prompts by length or skip them: {prompts[index][:60]!r}"
      )
    if ids[: len(start)] != start:
      seam = texts[index][len(prompts[index]) :]
      ids = start + tokenizer.encode(seam)
    complete = len(ids) + len(end) <= max_length
    ids = (ids + end if complete else ids)[:max_length]
    rows.append(_row(ids, len(start), loss, complete))
    kept.append(index)
  return EncodedRows(tuple(rows), tuple(kept), len(texts) - len(rows))


def encode_answers(
  tokenizer: Tokenizer,
  answers: Answers,
  chosen: Int[np.ndarray, " N"],
  max_length: int,
  train_eos: bool,
) -> list[Encoded]:
  """Some of the policy's own answers, as the texts that are trained on.

  Args:
    tokenizer: of the model.
    answers: of one step.
    chosen: flat indices of the answers.
    max_length: ids a row at most.
    train_eos: append the eos id to answers that ended and were not cut.
  """
  rows = encode_rows(
    tokenizer,
    [answers.asked[i] for i in chosen],
    [answers.texts[i] for i in chosen],
    max_length=max_length,
  ).rows
  eos = tokenizer.eos_id
  return [
    dataclasses.replace(
      row, ids=(*row.ids, eos), loss_mask=(*row.loss_mask, True)
    )
    if train_eos
    and eos is not None
    and answers.ended[i]
    and len(row) < max_length
    else row
    for row, i in zip(rows, chosen, strict=True)
  ]


def _row(ids: list[int], start: int, loss: str, complete: bool) -> Encoded:
  # Nothing predicts the first id, so it never counts.
  first = max(1, start if loss == "completion" else 1)
  mask = tuple(position >= first for position in range(len(ids)))
  return Encoded(tuple(ids), start, mask, complete)


def _check_options(
  tokenizer: Tokenizer, loss: str, overlong: str, train_eos: bool
) -> None:
  for name, value, known in (
    ("loss", loss, LOSSES),
    ("overlong", overlong, OVERLONG),
  ):
    if value not in known:
      raise UserError(
        f"{name} must be one of {', '.join(known)}, got {value!r}"
      )
  if train_eos and tokenizer.eos_id is None:
    raise UserError(
      f"train_eos needs an eos token, {tokenizer.name} has none; turn it off"
    )
