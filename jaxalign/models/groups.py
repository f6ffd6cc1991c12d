"""A score head with one column for each group of people, on one trunk.

A score is linear in the head, Σ w_g (h·k_g + b_g) = h·Σ w_g k_g + Σ w_g b_g, so
any weighted sum of the groups' scores is the score of an ordinary head. Where a
reward model is only read, its columns are folded into that one, and no later
code knows that there were several.
"""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models.model import Model

SHOWN = 20  # names of groups in a message at most

HEAD = "score_head"
APART = 1.0  # noise of new heads, as a share of the old head's deviation


def widen(params: Params, count: int, seed: int) -> Params:
  """Parameters with `count` score heads in place of one.

  Each is the old head plus noise of the same size. Equal heads would be a
  saddle point: where groups disagree their gradients on the trunk cancel, and
  what is left makes the trunk forget what they disagree about.

  Args:
    params: of a model with one head.
    count: of groups.
    seed: of the noise.
  """

  @jax.jit
  def several(head):
    # The bias is copied without noise: it only shifts a group's scores.
    copies = jax.tree.map(lambda x: jnp.repeat(x, count, axis=-1), head)
    kernel = copies["kernel"]
    noise = jax.random.normal(jax.random.key(seed), kernel.shape)
    apart = kernel + APART * jnp.std(kernel) * noise
    return copies | {"kernel": apart.astype(kernel.dtype)}

  return params | {HEAD: several(params[HEAD])}


def fold(
  model: Model, params: Params, weights: Mapping[str, float] | None = None
) -> tuple[Model, Params]:
  """The model whose one score is the weighted sum of the groups' scores.

  Args:
    model: returned unchanged if it has no groups.
    params: its parameters.
    weights: from `weights_of`; None = all alike.
  """
  names = model.config.groups
  if not names:
    return model, params
  weights = weights or alike(names)
  column = jnp.array([weights[name] for name in names], jnp.float32)

  @jax.jit
  def folded(head):
    # Kernel [D, G] and bias [G] alike: a weighted sum over the last axis.
    def weighted_sum(x):
      return (x.astype(jnp.float32) @ column[:, None]).astype(x.dtype)

    return jax.tree.map(weighted_sum, head)

  return model.replace(groups=()), params | {HEAD: folded(params[HEAD])}


def alike(names: tuple[str, ...]) -> dict[str, float]:
  """Equal weights that add up to 1."""
  return dict.fromkeys(names, 1 / len(names))


def weights_of(
  names: tuple[str, ...], given: Mapping[str, float], where: str
) -> dict[str, float]:
  """Each group's weight: as given, 0 if only others are given, or all alike.

  Args:
    names: the model's groups.
    given: weights by name; empty = all alike.
    where: names the model, for messages.

  Raises:
    UserError: the model has one head, no head of that name, or every weight
      is 0.
  """
  if not names:
    if not given:
      return {}
    raise UserError(
      f"{where} has one score head, so there is nothing that "
      f"{listed(tuple(given))} could weigh; leave the weights out, or give a "
      "model trained with config.group_column"
    )
  # The weight of a misspelt name would be silently ignored.
  unknown = tuple(name for name in given if name not in names)
  if unknown:
    raise UserError(
      f"{where} has no head for {listed(unknown)}; its groups are "
      f"{listed(names)}"
    )
  if given and not any(given.values()):
    raise UserError(
      f"{where}: every weight is 0, so every score would be; give a group "
      "another one"
    )
  # Naming some groups leaves out the others.
  zero = dict.fromkeys(names, 0.0)
  return zero | dict(given) if given else alike(names)


def listed(names: tuple[str, ...], between: str = ", ") -> str:
  """`a, b, c`, and the number of those left out."""
  more = len(names) - SHOWN
  tail = f" and {more} more" if more > 0 else ""
  return between.join(names[:SHOWN]) + tail
