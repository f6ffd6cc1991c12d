"""LoRA adapters in a parameter tree (Hu et al. 2021).

An adapter is two more leaves beside a kernel, `lora_a` [.., in, r] and
`lora_b` [.., r, out]. Training touches those alone; the same tree without
them is the reference policy.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxalign.core.types import Params
from jaxalign.errors import UserError
from jaxalign.models.heads import VALUE
from jaxalign.models.model import Model

LEAVES = ("lora_a", "lora_b")
# Begin at random, so they are trained too.
HEADS = ("score_head", "pooler", VALUE)


def split(params: Params) -> tuple[Params, Params]:
  """Parameters -> (trainable, frozen); `join` undoes it.

  Trainable are the adapters and, in a score model, its head.
  """
  heads = {name: params[name] for name in HEADS if name in params}
  rest = {name: params[name] for name in params if name not in HEADS}
  return _pick(rest, True) | heads, _pick(rest, False)


def join(trainable: Params, frozen: Params) -> Params:
  """One tree of two that have no leaf in common."""
  joined = dict(frozen)
  for name, value in trainable.items():
    if isinstance(value, dict):
      joined[name] = join(value, frozen.get(name, {}))
    else:
      assert name not in frozen, name
      joined[name] = value
  return joined


def strip(params: Params) -> Params:
  """Parameters without adapters; bind them to `Model.without_lora()`."""
  return _pick(params, False)


def linears(model: Model) -> tuple[str, ...]:
  """Names of the layers that can carry an adapter."""
  blocks = model.shapes["blocks"]
  return tuple(
    name for name, leaves in sorted(blocks.items()) if "kernel" in leaves
  )


def check_targets(model: Model, where: str) -> None:
  """A misspelt target would train nothing, without a word.

  Args:
    model: with or without adapters.
    where: names the setting, for the message.

  Raises:
    UserError: a target is no linear layer of the model, or there is none.
  """
  if model.lora is None:
    return
  known = linears(model)
  unknown = [name for name in model.lora.targets if name not in known]
  if unknown or not model.lora.targets:
    raise UserError(
      f"{where} names {', '.join(unknown) or 'no layer'}; the model's linear "
      f"layers are {', '.join(known)}"
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


@functools.partial(jax.jit, static_argnames="scale")
def merged(
  kernel: Float[Array, "*L I O"],
  a: Float[Array, "*L I R"],
  b: Float[Array, "*L R O"],
  scale: float,
) -> Float[Array, "*L I O"]:
  """W + (alpha / r) A B, summed in float32, in the kernel's dtype."""
  update = jnp.matmul(a.astype(jnp.float32), b.astype(jnp.float32))
  return (kernel.astype(jnp.float32) + scale * update).astype(kernel.dtype)


def merge(model: Model, params: Params) -> tuple[Model, Params]:
  """The plain model whose kernels hold the adapters' updates."""
  if model.lora is None:
    return model, params
  return model.without_lora(), _merge(params, model.lora.scale)


def _merge(params: Params, scale: float) -> Params:
  out = {}
  for name, value in params.items():
    if isinstance(value, dict):
      out[name] = _merge(value, scale)
    elif name == "kernel" and "lora_a" in params:
      out[name] = merged(value, params["lora_a"], params["lora_b"], scale)
    elif name not in LEAVES:
      out[name] = value
  return out
