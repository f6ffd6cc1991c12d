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
      "llama3" (Dubey et al. 2024) divides low frequencies, keeps high ones.
    factor: > 0, the stretch; 1 changes nothing.
    low: llama3: wavelengths above `original / low` are divided.
    high: llama3: wavelengths below `original / high` are kept; > low.
    original: llama3: context of pretraining in tokens.
  """

  kind: str
  factor: float
  low: float = 1.0
  high: float = 4.0
  original: int = 8192


def angles(
  positions: Int[Array, "B T"],
  width: int,
  base: float,
  *,
  scaling: Scaling | None = None,
  max_positions: int = 0,
) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"]]:
  """Cosines and sines for `rotate`, both halves of the rotated width.

  Args:
    positions: of each token in its own text, from 0.
    width: rotated features of a head.
    base: the longest wavelength is about 2π base positions.
    scaling: None = as in pretraining.
    max_positions: context of pretraining, read by "dynamic" only. It uses the
      length of each row, so a row does not depend on its batch. Keys that were
      cached before the text exceeded the context keep their rotation.
  """
  frequencies = inverse_frequencies(width, base)
  if scaling is not None and scaling.kind == "linear":
    frequencies = frequencies / scaling.factor
  elif scaling is not None and scaling.kind == "llama3":
    frequencies = _llama3(frequencies, scaling)
  elif scaling is not None and scaling.kind == "dynamic":
    length = jnp.max(positions, axis=1) + 1
    length = jnp.maximum(length, max_positions).astype(jnp.float32)
    # transformers' formula; a text within the context keeps the base.
    grown = scaling.factor * length / max_positions - (scaling.factor - 1)
    bases = base * grown ** (width / (width - 2))
    # A base per row gives frequencies [B, 1, F].
    frequencies = inverse_frequencies(width, bases[:, None, None])
  # Twice the same angles: `rotate` pairs feature i with i + E / 2, as NeoX and
  # Hugging Face's LLaMA do, not neighbours.
  x = positions[..., None].astype(jnp.float32) * frequencies
  x = jnp.concatenate([x, x], axis=-1)
  return jnp.cos(x), jnp.sin(x)


def inverse_frequencies(
  width: int, base: float | Float[Array, "B 1 1"]
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
