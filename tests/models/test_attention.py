"""The kernels against the dense form, interpreted on the CPU."""

import os
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.models import attention
from jaxalign.models.attention import Mask, attend_text, choose

ROWS, LENGTH, HEADS = 2, 150, 2


@pytest.fixture
def interpreted(monkeypatch):
  monkeypatch.setattr(attention, "INTERPRET", True)


def texts():
  """A row with padding on both sides and two texts, and one of three parts.

  The second row is a prompt, segment 1, and two texts that share it.
  """
  segments = np.zeros((ROWS, LENGTH), int)
  segments[0, 5:60], segments[0, 60:140] = 3, 1
  segments[1, :40], segments[1, 40:100], segments[1, 100:147] = 1, 2, 3
  return segments


def masked(segments, prompts, window):
  """The dense form's mask, written another way than the model's."""
  mask = np.zeros((ROWS, LENGTH, LENGTH), bool)
  for row, i in np.ndindex(ROWS, LENGTH):
    for j in range(max(0, i + 1 - (window or LENGTH)), i + 1):
      seen = {segments[row, i]}
      if prompts is not None:
        seen.add(prompts[row, i])
      mask[row, i, j] = segments[row, j] in seen
  return mask


CASES = {
  "segments": {"key_heads": 1},
  "a shared prompt": {"shared": True},
  "windows": {"window": 7, "windows": (0, 7), "kinds": ("splash", "cudnn")},
  "caps": {
    "window": 7,
    "windows": (7, 7),
    "cap": 1.5,
    "key_heads": 1,
    "kinds": ("splash",),
  },
}


@pytest.mark.parametrize(
  ("case", "dtype"),
  [*((case, "float32") for case in CASES), ("segments", "bfloat16")],
)
def test_kernels_equal_the_dense_form(interpreted, case, dtype):
  """Values and gradients, at 1e-5 in float32 and 2e-2 in bfloat16."""
  given = {"key_heads": 2, "shared": False, "window": None, "windows": None}
  given |= {"cap": 0.0, "kinds": ("splash", "triton", "cudnn")} | CASES[case]
  rng = np.random.default_rng(0)
  keys = (ROWS, given["key_heads"], LENGTH, 24)
  q, k, v, d = (
    jnp.asarray(rng.normal(size=shape), dtype)
    for shape in ((ROWS, LENGTH, HEADS, 24), keys, keys, (ROWS, LENGTH, 2, 24))
  )
  segments = texts()
  # The first row's texts share nothing: each is its own prompt.
  prompts = segments.copy()
  prompts[1] = np.minimum(segments[1], 1)
  prompts = prompts if given["shared"] else None
  window = given["window"]
  mask = jnp.asarray(masked(segments, prompts, window))
  options = {
    "scale": 0.2,
    "cap": given["cap"],
    "window": None if window is None else jnp.int32(window),
    "windows": given["windows"],
  }
  prompts = prompts if prompts is None else jnp.asarray(prompts)

  def both(kind):
    def run(q, k, v):
      ids = jnp.asarray(segments)
      return attend_text(kind, q, k, v, mask, ids, prompts, **options)

    out, pull = jax.vjp(run, q, k, v)
    return (out, *pull(d))

  step = 1e-5 if dtype == "float32" else 2e-2
  expected = jax.jit(lambda: both("dense"))()
  for kind in given["kinds"]:
    found = jax.jit(lambda kind=kind: both(kind))()
    for a, b in zip(found, expected, strict=True):
      assert a.dtype == b.dtype
      a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
      np.testing.assert_allclose(a, b, atol=step, rtol=step, err_msg=kind)


def test_a_model_reads_the_same_by_a_kernel(interpreted, make):
  """Layers with a window and without, remat; a text too short for a kernel."""
  model, params = make("gemma3", max_positions=160)
  rng = np.random.default_rng(0)
  tokens = jnp.asarray(rng.integers(1, 31, (1, 140)))
  positions = jnp.asarray([[*range(90), *range(48), 0, 0]])
  segments = jnp.asarray([[1] * 90 + [2] * 48 + [0] * 2])

  def read(params, kind, length=140, **changes):
    module = model.replace(attention=kind, **changes).bind(params)
    arrays = (x[:, :length] for x in (tokens, positions, segments))
    return module(*arrays)[0][:, :138]

  def gradient(kind, **changes):
    return jax.jit(
      jax.grad(lambda p: (read(p, kind, **changes) ** 2).mean())
    )(params)  # fmt: skip

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5),
    gradient("splash", remat="full"),
    gradient("dense"),
  )
  short = str(jax.make_jaxpr(lambda p: read(p, "splash", 100))(params))
  assert "pallas_call" not in short
  assert "pallas_call" in str(
    jax.make_jaxpr(read, static_argnums=1)(params, "splash")
  )


CHOICES = [
  # asked, platform, dtype, head_dim, mask, capability, kind, reason
  ("auto", "cpu", "float32", 64, {}, "", "dense", ""),
  ("auto", "tpu", "bfloat16", 128, {"windows": True}, "", "splash", ""),
  ("auto", "tpu", "float32", 256, {"capped": True}, "", "splash", ""),
  ("auto", "gpu", "bfloat16", 128, {"windows": True}, "8.6", "cudnn", ""),
  ("auto", "gpu", "bfloat16", 256, {}, "9.0", "cudnn", ""),
  ("auto", "gpu", "bfloat16", 256, {}, "8.6", "triton", "8, 16, ... 128"),
  ("auto", "gpu", "bfloat16", 256, {}, "10.0", "triton", "8, 16, ... 128"),
  ("auto", "gpu", "float32", 64, {}, "8.6", "triton", "not float32"),
  ("auto", "gpu", "float32", 64, {"windows": True}, "8.6", "dense", "window"),
  ("auto", "gpu", "bfloat16", 64, {"capped": True}, "9.0", "dense", "cap"),
  ("auto", "gpu", "bfloat16", 64, {}, "7.5", "dense", "8.0 or above"),
  ("auto", "gpu", "bfloat16", 64, {}, "gfx942", "dense", "8.0 or above"),
  ("triton", "gpu", "bfloat16", 64, {}, "9.0", "triton", ""),
  ("dense", "tpu", "bfloat16", 128, {}, "", "dense", ""),
  ("splash", "gpu", "bfloat16", 64, {}, "9.0", "dense", "does not run on"),
  ("auto", "tpu", "bfloat16", 128, {"past": True}, "", "dense", "cache"),
  (
    *("auto", "tpu", "bfloat16", 128, {"windows": True, "shared_prompt": True}),
    *("", "dense", "shared prompt"),
  ),
]


@pytest.mark.parametrize("row", CHOICES)
def test_the_fastest_that_can(row):
  asked, platform, dtype, head_dim, mask, capability, kind, reason = row
  capability = attention.parse_capability(capability)
  mask = Mask(**mask)
  choice = choose(asked, platform, dtype, head_dim, mask, capability)
  assert choice.kind == kind
  assert reason in choice.reason
  assert bool(reason) == bool(choice.reason)


MESH = """
  import jax
  import jax.numpy as jnp
  import numpy as np
  from jax.sharding import NamedSharding, PartitionSpec as P
  from jaxalign.models import attention
  from jaxalign.parallel import mesh as meshes

  attention.INTERPRET = True
  rng = np.random.default_rng(0)
  segments = np.ones((4, 128), int)
  causal = jnp.asarray(np.tril(np.ones((4, 128, 128), bool)))

  def loss(kind):
    def run(q, k, v, ids):
      out = attention.attend_text(kind, q, k, v, causal, ids, scale=0.2)
      return (out ** 2).sum()
    return jax.jit(jax.grad(run, (0, 1, 2)))

  # A key head for each of two devices, one that both compute, and two devices
  # that have half of the tokens each.
  for kind, heads, axis in (
    ("splash", 2, "tensor"), ("triton", 1, "tensor"), ("triton", 2, "sequence")
  ):
    mesh = meshes.make_mesh(fsdp=2, **{axis: 2})
    q, k, v = (
      rng.normal(size=shape).astype(np.float32)
      for shape in ((4, 128, 2, 8), *[(4, heads, 128, 8)] * 2)
    )
    expected = loss("dense")(q, k, v, segments)
    rows = meshes.rows(mesh)
    placed = [jax.device_put(x, rows) for x in (q, k, v, segments)]
    if axis == "sequence":
      split = NamedSharding(mesh, P(meshes.ROWS, "sequence"))
      placed[0] = jax.device_put(q, split)
    program = loss(kind).lower(*placed).compile()
    assert "all-gather" not in program.as_text(), kind
    for a, b in zip(program(*placed), expected, strict=True):
      np.testing.assert_allclose(a, b, atol=1e-5)
"""


def test_each_device_has_its_own_rows_and_heads():
  flags = os.environ.get("XLA_FLAGS", "")
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"{flags} --xla_force_host_platform_device_count=4",
  }
  run = subprocess.run(
    [sys.executable, "-c", textwrap.dedent(MESH)],
    env=env,
    capture_output=True,
    text=True,
    check=False,
  )
  assert run.returncode == 0, run.stderr[-2000:]
