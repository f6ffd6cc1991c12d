"""Demonstrations as the batches of SFT."""

import dataclasses

from jaxalign.algorithms.sft.config import SFTConfig
from jaxalign.core.types import TextBatch
from jaxalign.data import batches, formats, packing
from jaxalign.data.encode import Encoded, encode_rows
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.setup.dataset import account, fits, source_of


@dataclasses.dataclass(frozen=True)
class SFTData:
  """Encoded rows, each of one text or, with packing, of several.

  Attributes:
    config: of the run, with its final number of steps.
    rows: to train on.
    length: tokens of a row at most.
    pad_id: fills rows.
    validation: `[1, B, T]`, never trained on.
  """

  config: SFTConfig
  rows: list[list[Encoded]]
  length: int
  pad_id: int
  validation: list[TextBatch]
  # `data/...` of the first step: rows that are used and left out.
  counts: dict[str, int] = dataclasses.field(default_factory=dict)

  def batch(self, step: int) -> TextBatch:
    """Numpy rows `[M, B, T]` of a step, a pure function of seed and step."""
    config, count = self.config, len(self.rows)
    chosen = batches.rows_of_step(config.seed, step, config.batch_size, count)
    rows = [self.rows[i] for i in chosen]
    # Packed rows are nearly full, so they all have the full width.
    width = self.length
    if not config.packing:
      width = packing.row_width(rows, self.length, config.length_buckets)
    micros = config.batch_size // config.micro_rows
    return packing.pack(rows, width, self.pad_id, micros)


def load_data(config: SFTConfig, tokenizer: Tokenizer, context: int) -> SFTData:
  """Loads and encodes the rows; settles how many steps the run has.

  Args:
    config: its data, packing and lengths.
    tokenizer: the policy's.
    context: tokens the model can read.

  Raises:
    UserError: a bad source, or no row is left.
  """
  length = min(config.max_length, context)
  texts, counts = _load_rows(config, tokenizer, length)
  rows = [[text] for text in texts]
  # Packed once for the run; every epoch shuffles the same rows.
  if config.packing:
    plan = packing.plan_packing([len(text) for text in texts], length)
    rows = [[texts[i] for i in members] for members in plan]
  # Held-out rows: one text each, sorted so that they hold little padding.
  validation = []
  if config.validation_data:
    found, _ = _load_rows(config, tokenizer, length, validation=True)
    found = sorted(found[: config.validation_rows or None], key=len)
    size = config.micro_rows
    for start in range(0, len(found), size):
      part = [[text] for text in found[start : start + size]]
      width = packing.row_width(part, length, config.length_buckets)
      # Empty rows fill the last part, so that a mesh can split it.
      part += [[]] * (size - len(part))
      validation.append(packing.pack(part, width, tokenizer.pad_id))
  config = dataclasses.replace(config, steps=config.steps_over(len(rows)))
  return SFTData(config, rows, length, tokenizer.pad_id, validation, counts)


def _load_rows(
  config: SFTConfig,
  tokenizer: Tokenizer,
  length: int,
  validation: bool = False,
) -> tuple[list[Encoded], dict[str, int]]:
  """Encoded rows, without those that leave no room, and counts."""
  source, options = source_of(
    config, tokenizer, validation, "demonstrations.jsonl"
  )
  every_turn = config.loss_on == "assistant"
  found = formats.load_completions(source, every_turn=every_turn, **options)
  kept = [row for row in found.rows if fits(config, row.prompt, row.completion)]
  encoded = encode_rows(
    tokenizer,
    [row.prompt for row in kept],
    [row.completion for row in kept],
    max_length=length,
    loss="all" if config.loss_on == "all" else "completion",
    train_eos=config.train_eos,
    overlong="skip",
    turns=[row.turns for row in kept],
  )
  left = len(encoded.rows)
  cut = sum(not row.complete for row in encoded.rows)
  counts = account(
    config, source, found, left, length, short=len(kept), encoded=left, cut=cut
  )
  return list(encoded.rows), counts
