"""Reward models as functions from texts to scores."""

import collections
import dataclasses
import functools
import logging
from collections.abc import Sequence

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from jaxalign.core import memory
from jaxalign.core.types import Params
from jaxalign.data.rows import PromptRow
from jaxalign.data.tokenizer import Tokenizer
from jaxalign.errors import UserError
from jaxalign.models.deberta import DebertaConfig
from jaxalign.models.model import Model
from jaxalign.parallel import hosts
from jaxalign.parallel import mesh as meshes
from jaxalign.parallel.program import Program
from jaxalign.scoring.batches import LENGTHS, Batch, EncodedText, batches
from jaxalign.text import templates

# A TPU's compiler would rather multiply by each part of a split matrix as it
# comes and add up in memory: as many bytes between chips, but twice as many to
# and from memory as with matrices that are gathered (docs/log.md).
TPU_OPTIONS = {"xla_jf_spmd_threshold_for_windowed_einsum_mib": 100_000}

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Scorer:
  """One reward model; call it with prompts and completions.

  A score is the model's raw logit. It depends on its own text alone: up to
  float32 rounding it is the same in any order and in any batch.

  Attributes:
    model: any architecture with a score head; `model.replace(dtype=...)`
      chooses the arithmetic.
    params: its parameters, on one device or sharded over `mesh`, there or in
      the host's memory (`core.memory`).
    tokenizer: its own.
    encoding: "concat" or "pair", see `Tokenizer.encode_rewards`.
    name: for messages.
    max_length: tokens of a text that are read, at most those that the model was
      trained on and its context; the rest is cut off, on the right unless the
      tokenizer says otherwise.
    lengths: padded lengths, increasing; each costs at most two compilations,
      three on several devices.
    tokens: padded tokens per call, at most, on each device that has rows of its
      own.
    rows: rows per call, at most, on each of them.
    mesh: the rows of a call are sharded over its row axes; None = one device.
  """

  model: Model
  params: Params
  tokenizer: Tokenizer
  encoding: str = "concat"
  name: str = "reward model"
  max_length: int = 1024
  lengths: tuple[int, ...] = LENGTHS
  tokens: int = 4096
  rows: int = 64
  mesh: Mesh | None = None

  def __call__(
    self, prompts: Sequence[PromptRow], completions: Sequence[str]
  ) -> Float[np.ndarray, " B"]:
    """Raw logits in the order of the texts, higher is better.

    Args:
      prompts: prompt of each text; one with messages is read in the format of
        this model, whatever the policy's is.
      completions: as many completions.

    Returns:
      Float32 scores. NaN for a text without any token. Scores that are not
      finite are logged with the texts' indices.
    """
    return self.start(prompts, completions).read()

  def start(
    self, prompts: Sequence[PromptRow], completions: Sequence[str]
  ) -> "Started":
    """Has the devices begin; the host may do other work until it reads."""
    return self._start_ids(self.encode(prompts, completions))

  def encode(
    self, prompts: Sequence[PromptRow], completions: Sequence[str]
  ) -> list[EncodedText]:
    """Ids and segment types of each text, as `score_ids` takes them."""

    def encode(
      pairs: Sequence[tuple[PromptRow, str]],
    ) -> list[tuple[list[int], list[int]]]:
      own = [self._own_format(*pair) for pair in pairs]
      return self.tokenizer.encode_rewards(
        [prompt for prompt, _ in own],
        [completion for _, completion in own],
        self.encoding,
        self.limit,
        eos=self.model.config.head == "score_eos",
      )

    # Of several hosts each encodes its part.
    pairs = list(zip(prompts, completions, strict=True))
    return [(ids, types) for ids, types in hosts.spread(encode, pairs)]

  def warn_non_finite(self, scores: Float[np.ndarray, " B"]) -> None:
    """Logs which scores are not finite; a run leaves such completions out."""
    bad = non_finite(scores)
    if bad:
      _log.warning(
        "%s: %d of %d scores are not finite; texts %s",
        self.name,
        len(bad),
        len(scores),
        ", ".join(map(str, bad[:20])) + (", ..." if len(bad) > 20 else ""),
      )

  def _own_format(self, row: PromptRow, completion: str) -> tuple[str, str]:
    """Prompt and completion as this model reads dialogues."""
    messages, system = list(row.messages), self.tokenizer.notes.system_prompt
    renders = self.encoding == "concat" and self.tokenizer.has_chat_template
    # A dialogue in the notation of SuperHF is turns to a chat template.
    if renders and not messages and templates.HUMAN in row.prompt:
      messages = templates.to_messages(row.prompt)
    # The system text is the one that this model was trained with.
    if system and messages:
      messages = [turn for turn in messages if turn["role"] != "system"]
      messages.insert(0, {"role": "system", "content": system})
    if not messages:
      at = max(row.prompt.find(templates.HUMAN), 0)
      return (system + row.prompt[at:] if system else row.prompt), completion
    if self.tokenizer.format.name == "raw":  # it has seen no delimiters
      text = templates.from_messages(messages, reply=True)
      return templates.bare_question(text), completion
    if renders:
      # The whole conversation, which the template ends as in training.
      answer = {"role": "assistant", "content": completion.strip()}
      return "", self.tokenizer.render_chat([*messages, answer])
    return templates.from_messages(messages, reply=True), completion

  def score_ids(self, texts: Sequence[EncodedText]) -> Float[np.ndarray, " B"]:
    """Scores texts that are encoded already; see `__call__`.

    Raises:
      UserError: ids lie outside the model's vocabulary.
    """
    return self._start_ids(texts).wait()

  def _start_ids(self, texts: Sequence[EncodedText]) -> "Started":
    # Cutting, then sorting into calls of few shapes.
    limit = self.limit
    texts = [(ids[:limit], types[:limit]) for ids, types in texts]
    self._check(texts)
    calls = self._calls(texts)
    # Every call is dispatched before the first result is read: the device works
    # while the host prepares the next call.
    found = [self._program(self.params, *self._put(call)) for call in calls]
    return Started(self, calls, found, len(texts))

  def programs(self, name: str, texts: int, tokens: int) -> list[Program]:
    """The programs that score texts of one length.

    Args:
      name: of the first one.
      texts: in a step.
      tokens: of each; those beyond `limit` are cut off.
    """
    ids = [0] * min(tokens, self.limit)
    calls = self._calls([(ids, ids)] * texts)
    where = meshes.rows(self.mesh) if self.mesh else None
    found = []
    # Whole calls, then smaller ones for the last texts.
    counts = collections.Counter(call.tokens.shape for call in calls)
    for shape, count in counts.items():
      arrays = [
        jax.ShapeDtypeStruct(shape, dtype, sharding=where)
        for dtype in (np.int32, bool, np.int32)
      ]
      own = f"{name}, {shape[0]} rows" if found else name
      arguments = self.params, *arrays
      found.append(Program(own, self._program.function, arguments, count))
    return found

  def _calls(self, texts: Sequence[EncodedText]) -> list[Batch]:
    # The limit comes last, so every text that was cut fits.
    lengths = [n for n in self.lengths if n < self.limit] + [self.limit]
    parts = meshes.row_count(self.mesh) if self.mesh else 1
    return batches(texts, lengths, self.tokens, self.rows, parts)

  @property
  def limit(self) -> int:
    """Tokens of a text that are read."""
    config = self.model.config
    trained = self.tokenizer.notes.max_length or self.max_length
    longest = min(self.max_length, trained)
    # DeBERTa's relative positions have no limit; other models have a context.
    if (
      isinstance(config, DebertaConfig)
      and config.relative
      and not config.position_biased_input
    ):
      return longest
    return min(longest, config.max_positions)

  @property
  def traces(self) -> int:
    """How many programs have been compiled so far."""
    return len(self._program.shapes)

  def _check(self, texts: Sequence[EncodedText]) -> None:
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
    return meshes.put_whole(arrays, meshes.rows(self.mesh))

  @functools.cached_property
  def _program(self) -> "_Program":
    return _Program(self.model, self.mesh)


@dataclasses.dataclass(frozen=True)
class Started:
  """Scores that the devices may still be computing.

  Attributes:
    scorer: whose they are.
    calls: the texts, in calls.
    found: the scores of each call, filler included.
    count: of the texts.
  """

  scorer: Scorer
  calls: Sequence[Batch]
  found: Sequence[jax.Array]
  count: int

  def read(self) -> Float[np.ndarray, " B"]:
    """Waits for the scores; see `Scorer`."""
    scores = self.wait()
    self.scorer.warn_non_finite(scores)
    return scores

  def wait(self) -> Float[np.ndarray, " B"]:
    """As `read`, but logs nothing."""
    # A text without any token is in no call and stays NaN.
    scores = np.full(self.count, np.nan, np.float32)
    for call, values in zip(
      self.calls, jax.device_get(self.found), strict=True
    ):
      scores[call.indices] = values[: len(call.indices)]
    return scores


class _Program:
  """The jitted forward pass of one model, and the shapes it was traced for."""

  def __init__(self, model: Model, mesh: Mesh | None):
    self.shapes: list[tuple[int, ...]] = []

    def score(params, tokens, mask, types):
      self.shapes.append(tokens.shape)  # runs once per compilation
      return model.bind(memory.fetch(params)).score(tokens, mask, types)

    # Replicated, so that every host can read all scores.
    whole = meshes.replicated(mesh) if mesh else None
    on_tpu = mesh is not None and meshes.platform(mesh) == "tpu"
    self.function = meshes.jit(
      score,
      mesh,
      out_shardings=whole,
      compiler_options=TPU_OPTIONS if on_tpu else None,
    )

  def __call__(self, params: Params, *arrays: jax.Array) -> jax.Array:
    return self.function(params, *arrays)


def non_finite(scores: Float[np.ndarray, " B"]) -> list[int]:
  """Indices of scores that are NaN or infinite."""
  return np.flatnonzero(~np.isfinite(scores)).tolist()
