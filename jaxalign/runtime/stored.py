"""A reference's log-probabilities: found once, kept in a file, looked up.

A text is known by a digest of its tokens and of which of them count, so it does
not matter in which batch, order or run it comes back. Beside the numbers stands
which model found them.
"""

import dataclasses
import hashlib
import io
import json
import pathlib
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt32

from jaxalign.core.types import Params, TextBatch
from jaxalign.errors import explained
from jaxalign.models.model import Model
from jaxalign.runtime import arrays, files
from jaxalign.runtime.reference import text_logps

NAME = "reference.npz"
SIZE = 16  # bytes of a digest
_UNREADABLE = (
  *(OSError, ValueError, KeyError, IndexError, EOFError),
  *(zipfile.BadZipFile, zlib.error),
)


@dataclasses.dataclass(frozen=True)
class Stored:
  """What a reference thinks of texts."""

  logps: dict[bytes, float]  # a text's digest -> log π₀(completion | prompt)
  model: dict[str, str]  # `fingerprint` of the model


def measure(
  model: Model,
  params: Params,
  texts: Iterable[TextBatch],
  put: Callable[..., Any],
) -> Stored:
  """Runs the reference over texts, each distinct one once or a little more.

  Args:
    model: the reference.
    params: all of its parameters.
    texts: numpy batches `[M, B, T]`; few shapes, each is a program.
    put: as in `Context`.
  """

  @jax.jit
  def logps(params, text):
    return jax.lax.map(lambda micro: text_logps(model, params, micro), text)

  known: dict[bytes, float] = {}
  for text in texts:
    names = digests(text)
    if any(name and name not in known for name in names):
      found: Float[np.ndarray, "M N"]
      found = jax.device_get(logps(params, put(text, 1)))
      known |= zip(names, found.reshape(-1).tolist(), strict=True)
  known.pop(b"", None)
  return Stored(known, fingerprint(model, params))


def lacking(stored: Stored, texts: Iterable[TextBatch]) -> tuple[int, int]:
  """How many of the distinct texts are not in store, and how many there are."""
  names = {name for text in texts for name in digests(text) if name}
  return len(names - stored.logps.keys()), len(names)


def attach(stored: Stored, tree: Any) -> Any:
  """A tree whose numpy `TextBatch`es all have their `reference_logps`."""

  def known(leaf: Any) -> Any:
    if not _is_text(leaf):
      return leaf
    logps = [stored.logps[name] if name else 0.0 for name in digests(leaf)]
    logps = np.array(logps, np.float32).reshape(len(leaf.tokens), -1)
    return dataclasses.replace(leaf, reference_logps=logps)

  return jax.tree.map(known, tree, is_leaf=_is_text)


def texts_of(tree: Any) -> list[TextBatch]:
  """The `TextBatch`es of a tree."""
  return [x for x in jax.tree.leaves(tree, is_leaf=_is_text) if _is_text(x)]


def _is_text(leaf: Any) -> bool:
  return isinstance(leaf, TextBatch)


def digests(text: TextBatch) -> list[bytes]:
  """A digest of each of M N numpy texts; empty for filler.

  Whether two texts share their prompt or stand in rows of their own, their
  digests are the same.
  """
  own = [text.segments > 0]
  if text.parents is not None:
    shared = text.segments == 1
    own = [shared | (text.segments == side) for side in (2, 3)]
  # [M, sides, B, T]: of each micro-batch the first texts, then the second.
  real = np.stack(own, axis=1)
  spread = lambda x: np.broadcast_to(x[:, None], real.shape)
  flat = lambda x: x.reshape(-1, real.shape[-1])
  rows = zip(
    *map(flat, (spread(text.tokens), spread(text.loss_mask), real)), strict=True
  )
  return [_digest(ids[here], mask[here]) for ids, mask, here in rows]


def _digest(ids: np.ndarray, mask: np.ndarray) -> bytes:
  if not len(ids):
    return b""
  data = ids.astype("<i4").tobytes() + mask.astype(bool).tobytes()
  return hashlib.blake2b(data, digest_size=SIZE).digest()


def fingerprint(model: Model, params: Params) -> dict[str, str]:
  """What tells one reference from another: its config, its parameters.

  The parameters are summed up bit by bit where they lie. Whole numbers have no
  rounding, so the mesh does not matter.
  """
  sums = jax.jit(lambda p: jax.tree.map(_checksum, p))(params)
  leaves = arrays.named(params)
  rows = [
    [name, arrays.spec(leaves[name]), total.tolist()]
    for name, total in arrays.named(jax.device_get(sums)).items()
  ]
  text = json.dumps(sorted(rows)).encode()
  # Computing activations again changes none of them.
  config = dataclasses.replace(model.config, remat=False)
  return {
    "config": repr(config),
    "parameters": hashlib.sha256(text).hexdigest(),
  }


def _checksum(x: Array) -> UInt32[Array, "2"]:
  """Two sums mod 2³² of mixed bits; each value's place counts as well."""
  kind = {2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
  bits = jax.lax.bitcast_convert_type(x, kind).astype(jnp.uint32)
  place = jnp.zeros_like(bits)
  for axis in range(x.ndim):
    index = jax.lax.broadcasted_iota(jnp.uint32, x.shape, axis)
    place = _mix(place + index)
  return jnp.stack(
    [_mix(bits ^ _mix(place + seed)).sum() for seed in (1, 2**30)]
  )


def _mix(x: UInt32[Array, "..."]) -> UInt32[Array, "..."]:
  """MurmurHash3's last step: every bit of x moves every bit of the result."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)


def write(place: pathlib.Path, stored: Stored) -> None:
  """Writes one file, whole or not at all.

  Raises:
    UserError: the disk is full.
  """
  texts = np.frombuffer(b"".join(stored.logps), np.uint8)
  buffer = io.BytesIO()
  np.savez(
    buffer,
    texts=texts.reshape(-1, SIZE),
    logps=np.array(list(stored.logps.values()), np.float32),
    model=np.array(json.dumps(stored.model)),
  )
  files.write_atomic(place, buffer.getvalue())


def read(place: pathlib.Path) -> Stored:
  """What `write` wrote.

  Raises:
    UserError: there is no such file, or it is another kind of file.
  """
  failed = lambda why: (
    f"{place} cannot be read as log-probabilities of a reference ({why}); "
    f"give the {NAME} of a run with config.reference=stored"
  )
  with explained(*_UNREADABLE, by=failed):
    raw = place.read_bytes()
    if not raw.startswith(b"PK"):
      raise ValueError("it is no .npz file")
    with np.load(io.BytesIO(raw), allow_pickle=False) as found:
      texts, logps, model = (found[x] for x in ("texts", "logps", "model"))
    if texts.shape != (len(logps), SIZE) or texts.dtype != np.uint8:
      raise ValueError(f"texts have the shape {list(texts.shape)}")
    names = (row.tobytes() for row in texts)
    known = dict(zip(names, logps.tolist(), strict=True))
    return Stored(known, dict(json.loads(str(model))))
