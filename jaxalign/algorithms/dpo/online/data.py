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
  """Pairs of at most `context` tokens a text, filled up to `batch_size`.

  `better` and `worse` are flat indices of a step's completions, in one order.
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
    pairs,
    config.micro_rows,
    length,
    tokenizer.pad_id,
    hidden_size,
    config.length_buckets,
  )
