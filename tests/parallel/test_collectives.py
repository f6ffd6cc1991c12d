"""What compiled programs move between eight devices, read from their HLO."""

import dataclasses
import json
import os
import re
import subprocess
import sys

import pytest

from jaxalign.plan import collectives, hlo

# Sizes that tell the arrays apart by their shapes alone.
ROWS, TOKENS, VOCAB, WIDTH, INNER, LAYERS = 48, 28, 160, 32, 96, 3
HEADS = 4
PARAMETERS = 4 * WIDTH * WIDTH + 2 * WIDTH * INNER  # of a layer's matrices

PROGRAMS = f"""
import json
import jax
import jax.numpy as jnp
import numpy as np
from jaxalign.algorithms.sft.train import sum_nll
from jaxalign.core.types import TextBatch
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.sampling import settings
from jaxalign.sampling.sampler import Sampler
from jaxalign.training.forward import completion_logps

model = Model.build(NeoXConfig(
  vocab_size={VOCAB}, hidden_size={WIDTH}, layers={LAYERS}, heads={HEADS},
  intermediate_size={INNER},
))
params = jax.tree.map(lambda x: 6 * x, model.init(jax.random.key(0)))
ids = np.random.default_rng(0).integers(2, {VOCAB}, ({ROWS}, {TOKENS}))
ids = ids.astype(np.int32)
text = TextBatch(
  ids,
  np.broadcast_to(np.arange({TOKENS}, dtype=np.int32), ids.shape),
  np.ones_like(ids),
  ids % 3 > 0,
)

def nll(params, text):
  return sum_nll(model, params, text, None, {ROWS * TOKENS})[0]

def logps(params, text):
  return completion_logps(model, params, text).mean()

def off(a, b):
  return abs(a - np.asarray(b)).max() / abs(a).max()

# The two ways through the output matrix.
for sizes, loss in (((1, 8, 1), nll), ((2, 2, 2), logps), ((1, 2, 1, 4), nll)):
  step = jax.value_and_grad(loss)
  mesh = meshes.make_mesh(*sizes)
  placed = meshes.put(params, mesh)
  rows = jax.device_put(text, meshes.rows(mesh))
  jitted = meshes.jit(
    step, mesh, out_shardings=(None, meshes.shardings(params, mesh))
  )
  compiled = jitted.lower(placed, rows).compile()
  found = jax.device_get(compiled(placed, rows))
  wrong = jax.tree.map(off, jax.jit(step)(params, text), found)
  print(json.dumps(dict(
    sizes=sizes,
    off=float(max(jax.tree.leaves(wrong))),
    update=compiled.as_text(),
  )))

mesh = meshes.make_mesh(1, 8, 1)
drawn = settings.make(max_new_tokens=6, top_p=0.9, eos_ids=(1,))
shapes = meshes.with_shardings(model.shapes, mesh)
program, *_ = Sampler(model, mesh=mesh).programs(shapes, 8, 3, drawn, 2)
compiled = program.lower().compile()
print(json.dumps(dict(sizes="sample", sample=compiled.as_text())))
"""
TOKEN_LOOP = 1_000_003  # turns of loops that do not say theirs; a prime


@dataclasses.dataclass(frozen=True)
class Exchange:
  """Arrays that move together: their whole size in bytes, and how often."""

  kind: str
  shapes: list[tuple[int, ...]]
  size: int
  times: int


def exchanges(text):
  module = hlo.parse(text, TOKEN_LOOP)
  found = []
  for line, times in collectives.exchanges(module):
    sizes = re.findall(r"\[([\d,]*)\]", line.type)
    shapes = [tuple(int(n) for n in part.split(",") if n) for part in sizes]
    kind, size = collectives.kind_and_bytes(module, line)
    found.append(Exchange(kind, shapes, size, times))
  return found


@pytest.fixture(scope="module")
def programs():
  """Of each mesh its update and sampler, and how far off their results are."""
  flags = os.environ.get("XLA_FLAGS", "")
  flags += " --xla_force_host_platform_device_count=8"
  done = subprocess.run(
    [sys.executable, "-c", PROGRAMS],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    capture_output=True,
    text=True,
    check=False,
  )
  assert done.returncode == 0, done.stderr[-2000:]
  found = [json.loads(line) for line in done.stdout.splitlines()]
  return {str(one["sizes"]): one for one in found}


# And the parts of a batch's rows.
MESHES = {"[1, 8, 1]": 8, "[2, 2, 2]": 4, "[1, 2, 1, 4]": 2}


@pytest.mark.parametrize("sizes", MESHES)
def test_a_mesh_computes_what_one_device_does(programs, sizes):
  """A loss, and its gradients as shares of the largest."""
  assert programs[sizes]["off"] < 1e-4


@pytest.mark.parametrize("sizes", MESHES)
def test_no_logits_and_no_activations_are_gathered(programs, sizes):
  rows = ROWS // MESHES[sizes]  # of one device
  for one in exchanges(programs[sizes]["update"]):
    for shape in one.shapes:
      # Copies of a gradient's share may meet so.
      logits = {VOCAB, VOCAB // 2} & set(shape)
      logits = logits and WIDTH // 2 not in shape
      assert not (one.kind == "all-reduce" and logits), one
      texts = {TOKENS, TOKENS - 1} & set(shape) and shape[-1] > 1
      of_many = {2 * rows, 4 * rows, 8 * rows} & set(shape)
      assert not (one.kind == "all-gather" and texts and of_many), one


def test_the_output_matrix_gradient_is_scattered(programs):
  """In two steps: the shares of four and of two devices."""
  shapes = [
    shape
    for one in exchanges(programs["[1, 8, 1]"]["update"])
    for shape in one.shapes
    if one.kind == "reduce-scatter"
  ]
  assert shapes == [(VOCAB, WIDTH // 4), (VOCAB, WIDTH // 8)]


def test_of_tokens_that_are_split_keys_and_values_are_gathered(programs):
  shapes = [
    shape
    for one in exchanges(programs["[1, 2, 1, 4]"]["update"])
    for shape in one.shapes
    if one.kind == "all-gather" and TOKENS in shape and shape[-1] > 1
  ]
  assert shapes == 2 * [(ROWS // 2, TOKENS, HEADS, WIDTH // HEADS)]


def test_a_layer_moves_its_parameters_and_gradients_alone(programs):
  """Parameters forward and backward, and the gradients' sum."""
  moved = sum(
    one.size
    for one in exchanges(programs["[1, 8, 1]"]["update"])
    if one.times % LAYERS == 0 and one.times % TOKEN_LOOP
  )
  assert 2 * 4 * PARAMETERS < moved <= 1.2 * 3 * 4 * PARAMETERS


def test_no_parameter_moves_at_a_token(programs):
  """All are gathered once, before the loop."""
  found = exchanges(programs["sample"]["sample"])
  gathered = [one for one in found if one.kind == "all-gather"]
  for one in gathered:
    assert one.times % TOKEN_LOOP or one.size < 4 * WIDTH * WIDTH, one
  once = sum(one.size for one in gathered if one.times % TOKEN_LOOP)
  assert once >= 4 * LAYERS * PARAMETERS
