"""The layers of every architecture. They exist only inside traces.

`Linear` and `Output` hold the LoRA adapters (Hu et al. 2021) as two more leaves
of the same module. An adapter is turned on and off by the parameters that are
passed, not by a flag that an exception could leave set.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from jaxalign.core.types import Params
from jaxalign.models import remat
from jaxalign.parallel.mesh import splits_tokens


@dataclasses.dataclass(frozen=True)
class LoraConfig:
  """Low-rank adapters on linear layers chosen by name (Hu et al. 2021).

  Attributes:
    rank: r >= 1, inner width of the adapter.
    alpha: the update is scaled by alpha / rank.
    dropout: probability in [0, 1) of dropping an adapter's input in training.
    targets: names of the layers that get one, e.g. ("q_proj", "lm_head").
  """

  rank: int
  alpha: float
  dropout: float = 0.0
  targets: tuple[str, ...] = ()

  @property
  def scale(self) -> float:
    """Factor of the low-rank update."""
    return self.alpha / self.rank


def adapter(lora: LoraConfig | None, *names: str) -> LoraConfig | None:
  """The adapter of a layer that has these names, or None."""
  # A layer may have several names, as NeoX's output matrix.
  wanted = lora is not None and not set(names).isdisjoint(lora.targets)
  return lora if wanted else None


def recomputed(fn: Callable[..., Array]) -> Callable[..., Array]:
  """Makes the backward pass of cheap arithmetic keep nothing but its inputs.

  Computing it again costs less than writing every layer's intermediates to
  memory and reading them back.
  """
  # The blocks are scanned, so XLA cannot merge the two computations anyway;
  # barriers against that would only prevent fusion.
  return jax.checkpoint(fn, prevent_cse=False)


def dropout(
  x: Float[Array, "..."], rate: float, key: Array | None
) -> Float[Array, "..."]:
  """Zeroes entries with probability `rate`, scales the others by 1/(1 - rate).

  Srivastava et al. (2014). Without a key, or at rate 0, it returns `x`.
  """
  if key is None or rate == 0:
    return x
  # Scaled in training, so that evaluation needs no factor.
  kept = jax.random.bernoulli(key, 1 - rate, x.shape)
  return jnp.where(kept, x / (1 - rate), 0).astype(x.dtype)


@jax.custom_vjp
def matmul(
  x: Float[Array, "... D"], w: Float[Array, "D O"]
) -> Float[Array, "... O"]:
  """x W with rows flattened, and a backward pass that is fast on CPU.

  W is cast to x's dtype, and again in the backward pass: kept for that, the
  parameters of all layers would be in memory twice.

  Measured on one core (3840 rows, 256 x 1024): forward and backward 181 ms
  with three axes and XLA's own gradient, 98 ms flattened, 78 ms like this,
  which is what three bare products take.
  """
  y = _rows(x) @ w.astype(x.dtype)
  return y.reshape(*x.shape[:-1], w.shape[1])


def _matmul_forward(x, w):
  return matmul(x, w), (x, w)


def _matmul_backward(saved, dy):
  x, w = saved
  a, b = _rows(x), _rows(dy)
  dx = (b @ w.astype(b.dtype).T).reshape(x.shape)
  if a.ndim > 2:
    axes = tuple(range(a.ndim - 1))
    dw = jnp.tensordot(a, b, (axes, axes))
    return dx.astype(x.dtype), dw.astype(w.dtype)
  # Either order gives xᵀ dy; the narrower array is transposed, as that moves
  # fewer numbers.
  dw = _turned(a) @ b if a.shape[1] <= b.shape[1] else (_turned(b) @ a).T
  return dx.astype(x.dtype), dw.astype(w.dtype)


def _turned(x: Float[Array, "R D"]) -> Float[Array, "D R"]:
  # XLA's CPU product with a transposed left side runs at half speed.
  # The barrier makes the transposition an operation of its own.
  return jax.lax.platform_dependent(
    x, cpu=lambda x: jax.lax.optimization_barrier(x.T), default=lambda x: x.T
  )


def _rows(x: Float[Array, "... D"]) -> Float[Array, "... D"]:
  """Rows flattened, unless a mesh splits two of their axes.

  A device's part of both would not be one run of the flattened rows, so XLA
  would gather them first.
  """
  return x if splits_tokens() else x.reshape(-1, x.shape[-1])


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
  """y = x W + b, plus (alpha / r) x A B where the layer has an adapter."""

  def __init__(
    self,
    din: int,
    dout: int,
    *,
    rngs: nnx.Rngs,
    bias: bool = True,
    lora: LoraConfig | None = None,
  ):
    # 0.02 is Hugging Face's `initializer_range` for all models here.
    self.kernel = nnx.Param(0.02 * jax.random.normal(rngs(), (din, dout)))
    self.bias = nnx.Param(jnp.zeros(dout)) if bias else None
    self.lora = lora
    if lora is not None:
      self.lora_a, self.lora_b = _adapter_params(din, dout, lora, rngs)

  def __call__(
    self, x: Float[Array, "... D"], dropout_key: Array | None = None
  ) -> Float[Array, "... O"]:
    """Applies the layer; a key turns the adapter's dropout on."""
    # `[...]` reads the array of an nnx parameter.
    y = remat.product(matmul(x, self.kernel[...]))
    if self.bias is not None:
      y = y + self.bias[...]
    if self.lora is None:
      return y
    # The base layer sees the whole input; only the adapter's is dropped.
    x = dropout(x, self.lora.dropout, dropout_key)
    # Two narrow products: A B itself would be as large as the kernel.
    return y + self.lora.scale * ((x @ self.lora_a[...]) @ self.lora_b[...])


def _adapter_params(
  din: int, dout: int, lora: LoraConfig, rngs: nnx.Rngs
) -> tuple[nnx.Param, nnx.Param]:
  # peft draws A from a uniform distribution; the scale is of the same order.
  a = jax.random.normal(rngs(), (din, lora.rank)) / din**0.5
  # B starts at zero, so a fresh adapter leaves the model as it was.
  return nnx.Param(a), nnx.Param(jnp.zeros((lora.rank, dout)))


class Embedding(nnx.Module):
  """Rows of a [V, D] table; `attend` is its transpose, for outputs."""

  def __init__(self, size: int, width: int, *, rngs: nnx.Rngs):
    self.embedding = nnx.Param(0.02 * jax.random.normal(rngs(), (size, width)))

  def __call__(self, ids: Int[Array, "..."]) -> Float[Array, "... D"]:
    """The rows of these ids."""
    return self.embedding[...][ids]

  def attend(self, x: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Float32 dot products with all rows."""
    # bfloat16 logits would be too coarse for log-probabilities.
    return _matmul_float32(x, self.embedding[...].T)


def _matmul_float32(x: Array, w: Array) -> Array:
  # Factors in the compute dtype, sums in float32.
  y = jnp.matmul(
    _rows(x), w.astype(x.dtype), preferred_element_type=jnp.float32
  )
  return y.reshape(*x.shape[:-1], y.shape[-1])


class Output(Embedding):
  """The output matrix of a language model, [V, D] as Hugging Face keeps it.

  On CPU a few rows times the transpose of [V, D] take 0.7 of the time that
  [D, V] takes. Logits are computed in chunks, which must share one dropout
  mask, so an adapter works in two steps: `extend` appends its inner features to
  the hidden states once, and `attend` reads both.
  """

  def __init__(
    self,
    size: int,
    width: int,
    *,
    rngs: nnx.Rngs,
    lora: LoraConfig | None = None,
  ):
    super().__init__(size, width, rngs=rngs)
    self.lora = lora
    if lora is not None:
      self.lora_a, self.lora_b = _adapter_params(width, size, lora, rngs)

  def extend(
    self, x: Float[Array, "... D"], dropout_key: Array | None = None
  ) -> Float[Array, "... E"]:
    """The input of `attend`: (x, (alpha / r) x A), or x without an adapter."""
    if self.lora is None:
      return x
    inner = dropout(x, self.lora.dropout, dropout_key)
    inner = self.lora.scale * (inner @ self.lora_a[...].astype(x.dtype))
    return jnp.concatenate([x, inner], axis=-1)

  def attend(self, x: Float[Array, "... E"]) -> Float[Array, "... V"]:
    """Float32 logits of what `extend` returned."""
    if self.lora is None:
      return super().attend(x)
    # `extend` put the adapter's r inner features after the D hidden ones.
    x, inner = jnp.split(x, [self.embedding[...].shape[1]], axis=-1)
    return super().attend(x) + _matmul_float32(inner, self.lora_b[...])


class LayerNorm(nnx.Module):
  """Layer normalisation over the last axis, computed in float32."""

  def __init__(self, width: int, *, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(width))
    self.bias = nnx.Param(jnp.zeros(width))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalises in float32, returns x's dtype."""
    return _layer_norm(x, self.scale[...], self.bias[...], self.eps)


@recomputed
def _layer_norm(x, scale, bias, eps):
  y = x.astype(jnp.float32)
  # Centred before squaring: E[x²] − E[x]² would cancel.
  y = y - y.mean(-1, keepdims=True)
  y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
  return (y * scale + bias).astype(x.dtype)


class RMSNorm(nnx.Module):
  """Root-mean-square normalisation (Zhang & Sennrich 2019), in float32."""

  def __init__(self, width: int, *, eps: float):
    self.eps = eps
    self.scale = nnx.Param(jnp.ones(width))

  def __call__(self, x: Float[Array, "... D"]) -> Float[Array, "... D"]:
    """Normalises in float32, returns x's dtype."""
    return _rms_norm(x, self.scale[...], self.eps)


@recomputed
def _rms_norm(x, scale, eps):
  y = x.astype(jnp.float32)
  y = y * jax.lax.rsqrt((y * y).mean(-1, keepdims=True) + eps)
  # Scaled after the cast back, as Meta's LLaMA code does.
  return scale.astype(x.dtype) * y.astype(x.dtype)


def stack(
  make: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs
) -> nnx.Module:
  """`count` modules as one whose parameters have a leading layer axis."""
  return nnx.vmap(make)(rngs.split(count))  # a random key for each


def cast_small(params: Params, dtype: str) -> Params:
  """A block's parameters, all but the kernels cast; `matmul` casts these."""

  def cast(path, p: Array) -> Array:
    return p if path[-1].key == "kernel" else p.astype(dtype)

  return jax.tree_util.tree_map_with_path(cast, params)


def layer_params(module: nnx.Module) -> tuple[nnx.GraphDef, dict]:
  """A stacked module's graph and its parameters."""
  graph, state = nnx.split(module)
  return graph, nnx.to_pure_dict(state)


# By the names in Hugging Face's config.json; gelu_fast is the tanh form too.
_ACTIVATIONS: dict[str, Callable[[Array], Array]] = {
  "gelu": lambda x: jax.nn.gelu(x, approximate=False),
  "gelu_new": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_fast": lambda x: jax.nn.gelu(x, approximate=True),
  "gelu_pytorch_tanh": lambda x: jax.nn.gelu(x, approximate=True),
  "relu": jax.nn.relu,
  "silu": jax.nn.silu,
  "swish": jax.nn.silu,
  "tanh": jnp.tanh,
}
ACTIVATIONS = {name: recomputed(fn) for name, fn in _ACTIVATIONS.items()}
