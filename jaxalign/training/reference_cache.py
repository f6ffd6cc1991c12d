"""A reference's log-probabilities: computed once, kept in a file, looked up.

A text is known by a digest of its tokens and of which of them count, so it
does not matter in which batch, order or run it comes back. The file also names
the model that computed them.
"""

import collections
import dataclasses
import hashlib
import io
import json
import pathlib
import zipfile
import zlib
from collections.abc import Iterable
from typing import TypeVar

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, PyTree

from jaxalign.core.types import PairBatch, Params, TextBatch
from jaxalign.errors import UserError
from jaxalign.models.model import Model
from jaxalign.parallel import mesh as meshes
from jaxalign.runtime import files
from jaxalign.training.forward import completion_logps

NAME = "reference.npz"
SIZE = 16  # bytes of a digest
Batch = TypeVar("Batch")  # a method's batch, which holds `TextBatch`es


@dataclasses.dataclass(frozen=True)
class ReferenceCache:
  """log π₀(completion | prompt) of texts.

  Attributes:
    logps: in nats, by the texts' digests.
    model: what names the reference: digests of its config and its files.
  """

  logps: dict[bytes, float]
  model: dict[str, str]

  def attach(self, batch: Batch) -> Batch:
    """The batch, each of its numpy texts with its `reference_logps`."""

    def attach_to(leaf: PyTree) -> PyTree:  # a TextBatch, or another leaf
      if not isinstance(leaf, TextBatch):
        return leaf
      # Filler has an empty digest, and 0 in place of a log-prob.
      logps = [self.logps[d] if d else 0.0 for d in digests(leaf)]
      shape = len(leaf.tokens), -1
      return dataclasses.replace(
        leaf, reference_logps=np.array(logps, np.float32).reshape(shape)
      )

    return jax.tree.map(attach_to, batch, is_leaf=_is_text)

  def count_missing(self, batches: Iterable[PyTree]) -> tuple[int, int]:
    """How many of the distinct texts are not known, and how many there are."""
    names = {d for b in batches for t in texts_of(b) for d in digests(t) if d}
    return len(names - self.logps.keys()), len(names)


def blank() -> ReferenceCache:
  """A log-prob of 0 for every text, where only the shapes of batches count."""
  return ReferenceCache(collections.defaultdict(float), {})


def compile_logps(model: Model, mesh: Mesh) -> jax.stages.Wrapped:
  """(parameters, `TextBatch` `[M, B, T]`) -> log-probs `[M, N]` in nats."""

  def logps_of(params, text):
    return jax.lax.map(lambda x: completion_logps(model, params, x), text)

  # Replicated, so that every host can read all of them.
  return meshes.jit(logps_of, mesh, out_shardings=meshes.replicated(mesh))


def precompute(
  model: Model,
  params: Params,
  batches: Iterable[PyTree],
  mesh: Mesh,
  name: dict[str, str],
) -> ReferenceCache:
  """Runs the reference over the texts of batches, mostly once each.

  Each shape `[M, B, T]` of the numpy batches compiles a program. For `name` see
  `ReferenceCache.model`.
  """
  logps_of = compile_logps(model, mesh)
  known: dict[bytes, float] = {}
  for text in (text for batch in batches for text in texts_of(batch)):
    names = digests(text)
    # A batch is run whole if one of its texts is new.
    if any(digest and digest not in known for digest in names):
      found: Float[np.ndarray, "M N"]
      found = jax.device_get(logps_of(params, meshes.put_rows(text, mesh)))
      known |= zip(names, found.reshape(-1).tolist(), strict=True)
  known.pop(b"", None)  # filler
  return ReferenceCache(known, name)


def texts_of(batch: PyTree) -> list[TextBatch]:
  """The `TextBatch`es of a batch."""
  leaves = jax.tree.leaves(batch, is_leaf=_is_text)
  return [leaf for leaf in leaves if isinstance(leaf, TextBatch)]


def _is_text(leaf: object) -> bool:
  return isinstance(leaf, TextBatch)


def digests(text: TextBatch) -> list[bytes]:
  """A digest of each of M N numpy texts; empty for filler.

  Two texts have the same digests whether they share a row or not.
  """
  own = [text.segment_ids > 0]
  if isinstance(text, PairBatch) and text.prompt_segment_ids is not None:
    shared = text.segment_ids == 1
    own = [shared | (text.segment_ids == side) for side in (2, 3)]
  # [M, sides, B, T]: of each micro-batch the chosen texts, then the rejected.
  real = np.stack(own, axis=1)
  width = real.shape[-1]
  tokens, mask = (
    np.broadcast_to(x[:, None], real.shape).reshape(-1, width)
    for x in (text.tokens, text.loss_mask)
  )
  found = []
  for ids, counted, here in zip(
    tokens, mask, real.reshape(-1, width), strict=True
  ):
    # Only the text's own tokens, in one byte order on all machines.
    data = ids[here].astype("<i4").tobytes() + counted[here].tobytes()
    digest = hashlib.blake2b(data, digest_size=SIZE).digest()
    found.append(digest if here.any() else b"")
  return found


def write(path: pathlib.Path, cache: ReferenceCache) -> None:
  """Writes one file, whole or not at all.

  Raises:
    UserError: the disk is full.
  """
  texts = np.frombuffer(b"".join(cache.logps), np.uint8)
  buffer = io.BytesIO()
  np.savez(
    buffer,
    texts=texts.reshape(-1, SIZE),
    logps=np.array(list(cache.logps.values()), np.float32),
    model=np.array(json.dumps(cache.model)),
  )
  files.write_atomic(path, buffer.getvalue())


def read(path: pathlib.Path) -> ReferenceCache:
  """Reads what `write` wrote.

  Raises:
    UserError: there is no such file, or it is another kind of file.
  """
  try:
    raw = path.read_bytes()
    # An .npz file is a zip archive; np.load would take other formats too.
    if not raw.startswith(b"PK"):
      raise ValueError("it is no .npz file")
    with np.load(io.BytesIO(raw), allow_pickle=False) as found:
      texts, logps, model = (found[x] for x in ("texts", "logps", "model"))
    if texts.shape != (len(logps), SIZE) or texts.dtype != np.uint8:
      raise ValueError(f"texts have the shape {list(texts.shape)}")
    names = (row.tobytes() for row in texts)
    known = dict(zip(names, logps.tolist(), strict=True))
    return ReferenceCache(known, dict(json.loads(str(model))))
  # What numpy's and zip's readers raise on a damaged file.
  except (
    OSError,
    ValueError,
    KeyError,
    IndexError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
  ) as error:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    raise UserError(
      f"{path} cannot be read as log-probabilities of a reference ({reason}); "
      f"give the {NAME} of a run with config.reference=stored"
    ) from error
