"""What a training step keeps for its backward pass, by kind of attention.

    JAX_PLATFORMS=cpu python tests/bench/attention_memory.py llama-7b pythia-1b

Traced, not run: no memory is taken, and the kernels' platforms need not be
there. The loss is SFT's, the parameters' bytes are not counted. Prints a JSON
line for each model and kind.
"""

import dataclasses
import json
import sys

import jax
import jax.numpy as jnp
from jax._src.ad_checkpoint import saved_residuals  # only printing is public

from jaxalign.core.logprobs import weighted_nll
from jaxalign.core.types import TextBatch
from jaxalign.models import attention, lora
from jaxalign.models.layers import LoraConfig
from jaxalign.models.llama import LlamaConfig
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.training.forward import forward

# Model, rows, tokens, and the parameters' format.
SHAPES = {
  "llama-7b": (
    LlamaConfig(32000, 4096, 32, 32, 32, 128, 11008, dtype="bfloat16"),
    LoraConfig(4, 32.0, 0.05, ("q_proj", "v_proj")),
    (2, 1024, "bfloat16"),
  ),
  "pythia-1b": (
    NeoXConfig(50304, 2048, 16, 8, 8192, dtype="bfloat16"),
    None,
    (8, 1024, "float32"),
  ),
}
SHAPES["pythia-1b float32"] = (
  dataclasses.replace(SHAPES["pythia-1b"][0], dtype="float32"),
  *SHAPES["pythia-1b"][1:],
)


def residuals(config, adapters, shape):
  """GiB that autodiff saves between the passes, arguments left out."""
  rows, length, dtype = shape
  model = Model.build(config, adapters)
  params = jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(s.shape, dtype), model.shapes
  )
  ids = jax.ShapeDtypeStruct((rows, length), jnp.int32)
  mask = jax.ShapeDtypeStruct((rows, length), bool)
  text = TextBatch(ids, ids, ids, mask)
  trained, frozen = lora.split(params) if adapters else (params, {})
  key = jax.eval_shape(lambda: jax.random.key(0)) if adapters else None

  def loss(trained, frozen, text, key):
    p = forward(model, lora.join(trained, frozen), text, key)
    weights = jnp.where(p.mask, 1.0, 0.0)
    return weighted_nll(p.hidden, p.targets, weights, p.unembed)[0]

  saved = saved_residuals(loss, trained, frozen, text, key)
  return (
    sum(
      aval.size * aval.dtype.itemsize
      for aval, source in saved
      if "argument" not in source
    )
    / 2**30
  )


def main(*names):
  for name in names or SHAPES:
    config, adapters, shape = SHAPES[name]
    for kind in attention.KINDS:
      mask = attention.Mask(length=shape[1])
      if kind != "dense" and attention.refusal(
        kind, config.dtype, config.head_dim, mask
      ):
        continue
      found = residuals(
        dataclasses.replace(config, attention=kind), adapters, shape
      )
      row = {"model": name, "rows": shape[0], "tokens": shape[1]}
      row |= {"attention": kind, "residuals_gib": round(found, 2)}
      print(json.dumps(row), flush=True)


if __name__ == "__main__":
  main(*sys.argv[1:])
