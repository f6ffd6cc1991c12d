"""Tiny models of every causal architecture, every parameter drawn."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models.gemma import GemmaConfig
from jaxalign.models.gpt_neo import GPTNeoConfig
from jaxalign.models.llama import LlamaConfig
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.models.rope import Scaling

CONFIGS = {
  "neox": NeoXConfig(31, 20, 2, 5, 24, rotary_fraction=0.5),
  "neox-in-sequence": NeoXConfig(
    31, 16, 2, 2, 24, parallel=False, rotary_fraction=0.25
  ),
  "llama-3": LlamaConfig(
    *(31, 16, 2, 4, 2, 4, 20),
    rotary_scaling=Scaling("llama3", 8.0, 1.0, 4.0, original=8),
  ),
  "llama": LlamaConfig(
    31, 18, 2, 6, 3, 4, 20, rotary_scaling=Scaling("linear", 2.0), tied=True
  ),
  "qwen3": LlamaConfig(
    *(31, 18, 2, 3, 1, 10, 20, "qwen3"),
    windows=(3, 0),
    attention_bias=True,
    output_bias=True,
    qk_norm=True,
    rotary_scaling=Scaling("yarn", 4.0, 1.0, 32.0, original=8, attention=1.1),
  ),
  "phi3": LlamaConfig(
    *(31, 18, 2, 3, 1, 6, 20, "phi3"),
    rotary_fraction=0.7,
    rotary_scaling=Scaling(
      "longrope", original=12, short=(1.0, 1.5), long=(2.0, 3.0)
    ),
    windows=(4, 4),
    fused=True,
  ),
  "gemma3": GemmaConfig(
    *(31, 18, 2, 3, 1, 6, 20, "gemma3_text"),
    query_scalar=7,
    attention_cap=2.0,
    logit_cap=3.0,
    local_base=100.0,
    windows=(3, 0),
    activation="gelu_pytorch_tanh",
    qk_norm=True,
  ),
  "gpt-neo": GPTNeoConfig(31, 18, 2, 3, 24, windows=(0, 3), max_positions=32),
}


@pytest.fixture
def make():
  """(name, head, lora) -> (model, params); biases and norms drawn as well."""

  def build(name="llama", head="lm", lora=None, **changes):
    config = CONFIGS[name]
    model = Model.build(config, lora).replace(head=head, **changes)
    rng = np.random.default_rng(1)

    # Drawn by numpy: compiling an initialiser for each test costs seconds.
    def draw(s):
      return jnp.asarray(0.3 * rng.normal(size=s.shape), jnp.float32)

    return model, jax.tree.map(draw, model.shapes)

  return build


# "llama-3" has nothing that "qwen3" has not.
@pytest.fixture(params=sorted(CONFIGS.keys() - {"llama-3"}))
def any_causal(request, make):
  return make(request.param)
