"""Rotary position embeddings (Su et al. 2021) and their context scalings."""

import dataclasses
import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Scaling:
  """Stretches the rotation beyond the length of pretraining.

  Attributes:
    kind: "linear" (Chen et al. 2023) divides all frequencies by `factor`;
      "dynamic" (NTK-aware) raises the base once a text exceeds the context;
      "llama3" (Dubey et al. 2024) and "yarn" (Peng et al. 2023) divide low
      frequencies, keep high ones, and differ in between; "longrope" (Ding et
      al. 2024) divides each by a number of its own.
    factor: > 0, the stretch; 1 changes nothing. Not read by longrope.
    low: frequencies with fewer turns than this in `original` are divided.
    high: frequencies with more turns than this in it are kept; > low.
    original: context of pretraining in tokens.
    truncate: yarn: the limits fall on whole pairs of features.
    attention: yarn, longrope: multiplies cosines and sines.
    short: longrope: divides the frequencies of texts up to `original`.
    long: longrope: divides those of longer texts.
  """

  kind: str
  factor: float = 1.0
  low: float = 1.0
  high: float = 4.0
  original: int = 8192
  truncate: bool = True
  attention: float = 1.0
  short: tuple[float, ...] = ()
  long: tuple[float, ...] = ()

  @property
  def switch(self) -> int:
    """The longest text under `short`, for longrope; 0 = no such limit."""
    return self.original if self.short != self.long else 0


def angles(
  positions: Int[Array, "B T"],
  lengths: Int[Array, "B T"],
  width: int,
  base: float,
  *,
  scaling: Scaling | None = None,
  max_positions: int = 0,
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
  """Cosines and sines for `rotate`, both halves of the rotated width.

  Args:
    positions: of each token in its own text, from 0.
    lengths: of the text that each token belongs to, as far as it is known;
      read by "dynamic" and "longrope", so that a text depends neither on its
      batch nor on the texts that share its row.
    width: rotated features of a head.
    base: the longest wavelength is about 2π base positions.
    scaling: None = as in pretraining.
    max_positions: context of pretraining, read by "dynamic" only. Keys that
      were cached before a text exceeded it keep their rotation.
  """
  frequencies = inverse_frequencies(width, base)
  scaling = scaling or Scaling("default")
  if scaling.kind == "linear":
    frequencies = frequencies / scaling.factor
  elif scaling.kind == "llama3":
    frequencies = _llama3(frequencies, scaling)
  elif scaling.kind == "yarn":
    frequencies = _yarn(frequencies, width, base, scaling)
  elif scaling.kind == "longrope":
    exceeds = (lengths > scaling.original)[..., None]
    short, long = jnp.array(scaling.short), jnp.array(scaling.long)
    frequencies = frequencies / jnp.where(exceeds, long, short)
  elif scaling.kind == "dynamic":
    length = jnp.maximum(lengths, max_positions).astype(jnp.float32)
    # transformers' formula; a text within the context keeps the base.
    grown = scaling.factor * length / max_positions - (scaling.factor - 1)
    bases = base * grown ** (width / (width - 2))
    # A base per token gives frequencies [B, T, F].
    frequencies = inverse_frequencies(width, bases[..., None])
  # Twice the same angles: `rotate` pairs feature i with i + E / 2, as NeoX and
  # Hugging Face's LLaMA do, not neighbours.
  x = positions[..., None].astype(jnp.float32) * frequencies
  x = jnp.concatenate([x, x], axis=-1)
  return scaling.attention * jnp.cos(x), scaling.attention * jnp.sin(x)


def inverse_frequencies(
  width: int, base: float | Float[Array, "B T 1"]
) -> Float[Array, "*B F"]:
  """base^(-2i / width) for i in [0, width / 2)."""
  # An odd width is rounded up to whole pairs, as in transformers.
  return 1.0 / base ** (jnp.arange(0, width, 2, dtype=jnp.float32) / width)


def _llama3(
  frequencies: Float[Array, " F"], scaling: Scaling
) -> Float[Array, " F"]:
  """Divides the frequencies with few turns in the context, keeps the others."""
  # How often each pair turns in the context: context / wavelength.
  turns = scaling.original * frequencies / (2 * math.pi)
  # Between the two limits the frequencies are interpolated.
  kept = (turns - scaling.low) / (scaling.high - scaling.low)
  kept = jnp.clip(kept, 0.0, 1.0)
  return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def _yarn(
  frequencies: Float[Array, " F"], width: int, base: float, scaling: Scaling
) -> Float[Array, " F"]:
  """As `_llama3`, but interpolated over the numbers of the pairs."""

  # The pair that turns so often in the context of pretraining.
  def pair(turns):
    share = math.log(scaling.original / (2 * math.pi * turns)) / math.log(base)
    return width * share / 2

  first, last = pair(scaling.high), pair(scaling.low)
  if scaling.truncate:
    first, last = math.floor(first), math.ceil(last)
  first, last = max(first, 0), min(last, width - 1)
  # transformers steps over one pair where the two limits are equal.
  over = last - first or 0.001
  kept = 1 - jnp.clip((jnp.arange(len(frequencies)) - first) / over, 0.0, 1.0)
  return (1 - kept) * frequencies / scaling.factor + kept * frequencies


def rotate(
  x: Float[Array, "B T N H"],
  rope: tuple[Float[Array, "B T E"], Float[Array, "B T E"]],
) -> Float[Array, "B T N H"]:
  """Rotates the first E <= H features of every head; the rest stay."""
  cos, sin = (r[:, :, None, :].astype(jnp.float32) for r in rope)
  width = cos.shape[-1]
  # In float32: in bfloat16 the angles of late positions are too coarse.
  turned = x[..., :width].astype(jnp.float32)
  low, high = jnp.split(turned, 2, axis=-1)
  turned = turned * cos + jnp.concatenate([-high, low], axis=-1) * sin
  turned = turned.astype(x.dtype)
  # Without the barrier XLA fuses this sum of products into the next operation,
  # and rounds differently in a pass with gradients than in one without: an
  # untrained policy is then not exactly its reference (CPU, jax 0.12).
  return jax.lax.optimization_barrier(
    jnp.concatenate([turned, x[..., width:]], axis=-1)
  )
