"""Reward models as functions from texts to scores."""

import dataclasses
import functools
import logging
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.scoring.batches import LENGTHS, Batch, Encoded, batches

Encode = Callable[[Sequence[str], Sequence[str]], Sequence[Encoded]]

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scorer:
  """One reward model; call it with prompts and completions.

  A score is the model's raw logit. It depends on its own text alone: to
  float32 rounding it is the same in any order and beside any other texts.

  Attributes:
    model: any architecture with a score head; `model.replace(dtype=...)`
      chooses the arithmetic.
    params: its parameters, on one device or laid out on `mesh`.
    encode: (prompts, completions) -> ids and segment types of each text.
    name: for messages.
    max_length: tokens of a text that are read; the rest on the right is cut
      off. Lowered to the model's context where that is shorter.
    lengths: padded lengths, increasing; each costs at most two compilations.
    tokens: padded tokens in one call, at most.
    rows: rows in one call, at most.
    mesh: splits the rows of a call over its row axes; None = one device.
  """

  model: Model
  params: Params
  encode: Encode
  name: str = "reward model"
  max_length: int = 1024
  lengths: tuple[int, ...] = LENGTHS
  tokens: int = 4096
  rows: int = 64
  mesh: Mesh | None = None

  def __call__(
    self, prompts: Sequence[str], completions: Sequence[str]
  ) -> Float[np.ndarray, " B"]:
    """Raw logits in the order of the texts, higher is better.

    Args:
      prompts: prompt of each text.
      completions: as many completions.

    Returns:
      Float32 scores. NaN for a text that encodes to no token at all; that
      and whatever else is not finite is logged with the texts' indices.
    """
    scores = self.score_ids(self.encode(prompts, completions))
    bad = non_finite(scores)
    if bad:
      _log.warning(
        "%s: %d of %d scores are not finite; texts %s",
        self.name,
        len(bad),
        len(scores),
        ", ".join(map(str, bad[:20])) + (", ..." if len(bad) > 20 else ""),
      )
    return scores

  def score_ids(self, texts: Sequence[Encoded]) -> Float[np.ndarray, " B"]:
    """As `__call__`, for texts that are encoded already.

    Raises:
      UserError: ids lie outside the model's vocabulary.
    """
    limit = self.limit
    texts = [(ids[:limit], types[:limit]) for ids, types in texts]
    self._check(texts)
    lengths = [n for n in self.lengths if n < limit] + [limit]
    parts = meshes.row_count(self.mesh) if self.mesh else 1
    calls = batches(texts, lengths, self.tokens, self.rows, parts)
    # All calls are dispatched before the first result is waited for.
    found = [self._program(self.params, *self._put(call)) for call in calls]
    scores = np.full(len(texts), np.nan, np.float32)
    for call, values in zip(calls, jax.device_get(found), strict=True):
      scores[call.indices] = values[: len(call.indices)]
    return scores

  @property
  def limit(self) -> int:
    """Tokens of a text that are read."""
    config = self.model.config
    # Only DeBERTa's relative positions reach beyond the trained context.
    endless = getattr(config, "relative", False)
    if endless and not config.position_biased_input:
      return self.max_length
    return min(self.max_length, config.max_positions)

  @property
  def traces(self) -> int:
    """How many programs have been compiled so far."""
    return len(self._program.shapes)

  def _check(self, texts: Sequence[Encoded]) -> None:
    size = self.model.config.vocab_size
    for index, (ids, _) in enumerate(texts):
      if len(ids) and not 0 <= min(ids) <= max(ids) < size:
        raise UserError(
          f"{self.name}: text {index} has token {max(ids)}, beyond the "
          f"model's vocabulary of {size}; use the model's own tokenizer"
        )

  def _put(self, call: Batch) -> tuple[jax.Array, ...]:
    arrays = (call.tokens, call.mask, call.types)
    if self.mesh is None:
      return jax.device_put(arrays)
    return jax.device_put(arrays, meshes.rows(self.mesh))

  @functools.cached_property
  def _program(self) -> "_Program":
    return _Program(self.model, self.mesh)


class _Program:
  """The jitted forward pass of one model, and the shapes it was traced for."""

  def __init__(self, model: Model, mesh: Mesh | None):
    self.shapes: list[tuple[int, ...]] = []

    def score(params, tokens, mask, types):
      self.shapes.append(tokens.shape)
      return model.bind(params).score(tokens, mask, types)

    # Whole on every process, so that each host can read all scores.
    whole = meshes.replicated(mesh) if mesh else None
    self._jitted = jax.jit(score, out_shardings=whole)

  def __call__(self, params: Params, *arrays: jax.Array) -> jax.Array:
    return self._jitted(params, *arrays)


def weighted(
  scorers: Sequence[Scorer], weights: Sequence[float]
) -> Callable[[Sequence[str], Sequence[str]], Float[np.ndarray, " B"]]:
  """Several reward models as one: Σ weight · score.

  Args:
    scorers: at least one; each encodes the texts its own way.
    weights: as many; any sign, any sum.

  Raises:
    UserError: the numbers of scorers and weights differ, or are zero.
  """
  if not scorers or len(scorers) != len(weights):
    raise UserError(
      f"{len(scorers)} reward models need as many weights, got {len(weights)}"
    )

  def score(prompts, completions):
    each = [scorer(prompts, completions) for scorer in scorers]
    total = np.tensordot(np.asarray(weights, np.float64), np.array(each), 1)
    return total.astype(np.float32)

  return score


def non_finite(scores: Float[np.ndarray, " B"]) -> list[int]:
  """Indices of scores that are NaN or infinite."""
  return np.flatnonzero(~np.isfinite(scores)).tolist()
