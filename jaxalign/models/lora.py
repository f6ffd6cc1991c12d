"""LoRA adapters in a parameter tree (Hu et al. 2021).

An adapter is two more leaves next to a weight, `lora_a` [.., in, r] and
`lora_b` [.., r, out]. Training changes only those; the same tree without them
is the reference policy.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models.config import CausalConfig
from jaxalign.models.heads import VALUE
from jaxalign.models.model import Model

LEAVES = ("lora_a", "lora_b")
WEIGHTS = ("kernel", "embedding")  # what an adapter adds to; the latter [V, D]
# They start from random values, so they are trained in full.
HEADS = ("score_head", "pooler", VALUE)


def split(params: Params) -> tuple[Params, Params]:
  """Splits parameters into (trainable, frozen); `join` undoes it.

  The adapters are trainable, and so is the head of a score model.
  """
  # Heads are trained in full, whatever adapters the blocks have.
  heads = {name: params[name] for name in HEADS if name in params}
  rest = {name: params[name] for name in params if name not in HEADS}
  return _pick(rest, True) | heads, _pick(rest, False)


def join(trainable: Params, frozen: Params) -> Params:
  """Merges two trees that have no leaf in common."""
  joined = dict(frozen)
  for name, value in trainable.items():
    if isinstance(value, dict):
      joined[name] = join(value, frozen.get(name, {}))
    else:
      # A leaf in both would be silently replaced.
      assert name not in frozen, name
      joined[name] = value
  return joined


def strip(params: Params) -> Params:
  """Parameters without adapters; bind them to `Model.without_lora()`."""
  return _pick(params, False)


def linears(model: Model) -> dict[str, str]:
  """The layers that can carry an adapter: target name -> path in the tree.

  These are all linear layers except the heads, which are trained in full.
  """
  # From the shapes, so a new architecture needs no list of its layers.
  blocks = model.shapes["blocks"]
  found = {
    name: f"blocks.{name}"
    for name, leaves in sorted(blocks.items())
    if "kernel" in leaves
  }
  # DeBERTa's projection of narrow embeddings is in no block.
  if "embed_proj" in model.shapes:
    found["embed_proj"] = "embed_proj"
  # One layer under each of its names.
  if "lm_head" in model.shapes:
    found |= dict.fromkeys(model.config.module.outputs, "lm_head")
  return found


def known(model: Model) -> str:
  """The target names, and the linear layer that cannot be one, for messages."""
  names = ", ".join(linears(model))
  if model.config.head != "lm":
    return f"{names}; its score head is trained in full"
  assert isinstance(model.config, CausalConfig), model.config
  if model.config.tied:
    return f"{names}; its output matrix is the embedding and cannot have one"
  return names


def check_targets(model: Model, where: str) -> None:
  """Refuses a misspelt target, which would silently train nothing.

  Args:
    model: with or without adapters.
    where: names the setting, for the message.

  Raises:
    UserError: a target is not a linear layer of the model, or there is none.
  """
  if model.lora is None:
    return
  found = linears(model)
  unknown = [name for name in model.lora.targets if name not in found]
  if unknown or not model.lora.targets:
    raise UserError(
      f"{where} names {', '.join(unknown) or 'no layer'}; the model's linear "
      f"layers are {known(model)}; left empty it is "
      f"{','.join(model.config.lora_targets)}"
    )


def _pick(params: Params, adapters: bool) -> Params:
  picked = {}
  for name, value in params.items():
    if isinstance(value, dict):
      if inner := _pick(value, adapters):
        picked[name] = inner
    elif (name in LEAVES) == adapters:
      picked[name] = value
  return picked


@jax.jit(static_argnames=("scale", "leaf"))
def merged(
  weight: Float[Array, "*L X Y"],
  a: Float[Array, "*L I R"],
  b: Float[Array, "*L R O"],
  scale: float,
  leaf: str = "kernel",
) -> Float[Array, "*L X Y"]:
  """W + (alpha / r) A B, summed in float32 and cast to the weight's dtype.

  Args:
    weight: W [.., in, out], or its transpose.
    a: A, the leaf `lora_a`.
    b: B, the leaf `lora_b`.
    scale: alpha / r.
    leaf: the weight's name, one of `WEIGHTS`.
  """
  update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32))
  # An output matrix is stored as [V, D], the transpose of a kernel.
  update = update.mT if leaf == "embedding" else update
  return (weight.astype(jnp.float32) + scale * update).astype(weight.dtype)


def merge(model: Model, params: Params) -> tuple[Model, Params]:
  """The model without adapters, whose weights include their updates."""
  if model.lora is None:
    return model, params
  return model.without_lora(), _merge(params, model.lora.scale)


def _merge(params: Params, scale: float) -> Params:
  out = {}
  for name, value in params.items():
    if isinstance(value, dict):
      out[name] = _merge(value, scale)
    elif name in WEIGHTS and "lora_a" in params:
      out[name] = merged(value, params["lora_a"], params["lora_b"], scale, name)
    elif name not in LEAVES:
      out[name] = value
  return out
