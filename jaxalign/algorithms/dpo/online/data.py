"""Pairs of the policy's own completions as the batches of online DPO."""

import numpy as np
from jaxtyping import Int

from jaxalign.algorithms.dpo.data import pack_pairs
from jaxalign.algorithms.dpo.online.config import OnlineDPOConfig
from jaxalign.core.types import Completions, PairBatch
from jaxalign.data.encode import FILLER, encode_completions
from jaxalign.data.tokenizer import Tokenizer


def sampled_pairs(
  config: OnlineDPOConfig,
  tokenizer: Tokenizer,
  context: int,
  hidden_size: int,
  completions: Completions,
  better: Int[np.ndarray, " N"],
  worse: Int[np.ndarray, " N"],
) -> PairBatch:
  """Pairs filled up to `config.batch_size`, `[M, B, T]`.

  Args:
    config: of the run.
    tokenizer: the policy's.
    context: tokens the policy can read.
    hidden_size: of the policy.
    completions: of one step.
    better: flat indices of the preferred completions.
    worse: of the others, in the same order.
  """
  length = min(config.max_length, context)
  # All texts in one call: the better ones, then the worse ones.
  texts = encode_completions(
    tokenizer,
    completions,
    np.concatenate([better, worse]),
    length,
    config.train_eos,
  )
  count = len(better)
  pairs = list(zip(texts[:count], texts[count:], strict=True))
  pairs += [(FILLER, FILLER)] * (config.batch_size - count)
  return pack_pairs(
    pairs, config.micro_rows, length, tokenizer.pad_id, hidden_size
  )
