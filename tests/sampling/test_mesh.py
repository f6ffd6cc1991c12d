"""Sampling on a mesh of fake devices, in a process of its own."""

import os
import subprocess
import sys
import textwrap

CODE = """
  import jax
  import numpy as np
  from jaxalign.models.model import Model
  from jaxalign.models.neox import NeoXConfig
  from jaxalign.parallel import mesh as meshes
  from jaxalign.sampling import settings
  from jaxalign.sampling.sampler import Sampler

  model = Model.build(
    NeoXConfig(
      vocab_size=96, hidden_size=16, layers=2, heads=2, intermediate_size=32
    )
  )
  params = jax.tree.map(lambda x: 6 * x, model.init(jax.random.key(0)))
  drawn = settings.make(max_new_tokens=6, top_p=0.9, eos_ids=(1,))
  mesh = meshes.make_mesh(replica=2, fsdp=2)

  def draw(sampler, params, prompts, samples):
    key = jax.random.key(3)
    return sampler(params, prompts, drawn, key, samples_per_prompt=samples)

  one, four = Sampler(model), Sampler(model, mesh=mesh)
  split = Sampler(model, mesh=mesh, gather=False)
  spread = meshes.put(params, mesh)
  for sampler, prompts, samples in (
    (four, [[5, 6, 7]], 8),
    (split, [[5], [6, 7], [8], [9]], 1),
  ):
    a = draw(one, params, prompts, samples)
    b = draw(sampler, spread, prompts, samples)
    np.testing.assert_array_equal(a.tokens, b.tokens)
    np.testing.assert_allclose(a.model_logps, b.model_logps, atol=1e-5)
"""


def test_a_mesh_draws_the_same_samples():
  flags = os.environ.get("XLA_FLAGS", "")
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
  }
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(CODE)],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr[-2000:]
