"""Loss formulas, each in the symbols of its source; shapes broadcast."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def pairwise(
  chosen: Float[Array, "*#B"],
  rejected: Float[Array, "*#B"],
  margin: Float[Array, "*#B"] | float = 0.0,
  label: Float[Array, "*#B"] | float = 1.0,
) -> Float[Array, "..."]:
  """−p log σ(d) − (1 − p) log σ(−d), d = s_w − s_l − m: Bradley-Terry.

  With p = 1 the loss of Stiennon 2020 (eq. 1).

  Args:
    chosen: score s_w of the better text, raw logit.
    rejected: score s_l of the worse text, raw logit.
    margin: m >= 0, by how much the better one should win (Touvron 2023).
    label: p in [0, 1], how sure it is that the better one is better.
  """
  gap = chosen - rejected - margin
  return -jax.nn.log_sigmoid(gap) + (1 - label) * gap


def centring(
  chosen: Float[Array, "*#B"], rejected: Float[Array, "*#B"]
) -> Float[Array, "..."]:
  """(s_w + s_l)², keeps scores around zero (Eisenstein 2023)."""
  return (chosen + rejected) ** 2


def inverse_loss(nll: Float[Array, ""], coefficient: float) -> Float[Array, ""]:
  """C / loss, SuperHF's guard against zero-entropy states; 0 turns it off.

  The value is finite for loss 0, where the formula is not: the loss is
  bounded below by 1e-6.
  """
  return coefficient / jnp.maximum(nll, 1e-6)
