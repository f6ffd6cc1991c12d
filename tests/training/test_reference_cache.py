import functools
import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxalign.core.types import TextBatch
from jaxalign.errors import UserError
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes
from jaxalign.training import reference_cache
from jaxalign.training.forward import completion_logps
from jaxalign.training.reference_cache import ReferenceCache, digests

CONFIG = NeoXConfig(
  vocab_size=13,
  hidden_size=16,
  layers=2,
  heads=2,
  intermediate_size=24,
  max_positions=64,
  rotary_fraction=0.5,
)
# (ids, of which so many are the prompt)
TEXTS = [([1, 2, 3, 4], 2), ([5, 6], 1), ([1, 2, 3, 4], 1), ([1, 2, 3], 2)]


def texts(rows, width=6, micros=1):
  """`[M, B, T]` on the host; an empty row is filler."""
  shape = (len(rows), width)
  tokens, segments = np.full(shape, 9, np.int32), np.zeros(shape, np.int32)
  mask = np.zeros(shape, bool)
  for b, (ids, prompt) in enumerate(rows):
    tokens[b, : len(ids)] = ids
    segments[b, : len(ids)] = 1
    mask[b, prompt : len(ids)] = True
  positions = np.where(segments > 0, np.arange(width), 0)
  cut = (micros, -1, width)
  return TextBatch(
    tokens.reshape(cut),
    positions.reshape(cut),
    segments.reshape(cut),
    mask.reshape(cut),
  )


@functools.cache
def model():
  model = Model.build(CONFIG)
  return model, model.init(jax.random.key(0))


NAME = {"config": "a small NeoX", "parameters": "seed 0"}


def precomputed(*batches):
  return reference_cache.precompute(*model(), batches, meshes.make_mesh(), NAME)


def test_a_text_is_known_in_any_batch():
  """By its tokens and which of them count, not by padding or place."""
  one = digests(texts(TEXTS))
  assert len(set(one)) == 4
  assert digests(texts(TEXTS, width=9)) == one
  assert digests(texts(TEXTS, micros=2)) == one
  assert digests(texts(TEXTS[::-1]))[::-1] == one
  assert digests(texts([([], 0), TEXTS[1]])) == [b"", one[1]]


def test_what_is_precomputed_is_what_the_model_finds():
  found = precomputed(texts(TEXTS[:3]), texts([TEXTS[3], ([], 0)], micros=2))
  assert len(found.logps) == 4
  batch = jax.tree.map(lambda x: jnp.asarray(x[0]), texts(TEXTS, width=8))
  wanted = completion_logps(*model(), batch)
  tree = {"a": texts(TEXTS, micros=2), "b": np.ones(3), "c": None}
  attached = found.attach(tree)
  np.testing.assert_allclose(
    attached["a"].reference_logps.reshape(-1), wanted, atol=1e-5
  )
  assert attached["a"].reference_logps.shape == (2, 2)
  assert (attached["b"] == 1).all()
  fill = found.attach(texts([TEXTS[0], ([], 0)]))
  assert fill.reference_logps[0, 1] == 0


def test_texts_that_are_known_are_not_computed_again(monkeypatch):
  seen = []
  put_rows = meshes.put_rows

  def watched(text, mesh):
    seen.append(text.tokens.shape)
    return put_rows(text, mesh)

  monkeypatch.setattr(meshes, "put_rows", watched)
  precomputed(texts(TEXTS[:2]), texts(TEXTS[1::-1]), texts(TEXTS[1:3]))
  assert len(seen) == 2


def test_a_file_gives_back_every_bit(tmp_path):
  found = precomputed(texts(TEXTS))
  reference_cache.write(tmp_path / "reference.npz", found)
  again = reference_cache.read(tmp_path / "reference.npz")
  assert again == found == ReferenceCache(found.logps, NAME)
  assert [p.name for p in tmp_path.iterdir()] == ["reference.npz"]
  assert found.count_missing([texts(TEXTS)]) == (0, 4)
  more = texts([*TEXTS, ([7], 0), ([7], 0), ([], 0)])
  assert found.count_missing([more]) == (1, 5)


def cut(place):
  place.write_bytes(place.read_bytes()[:-60])


def spoil(place):
  raw = bytearray(place.read_bytes())
  raw[200:216] = b"\xff" * 16
  place.write_bytes(raw)


def lacks_a_member(place):
  np.savez(place, texts=np.zeros((1, 16), np.uint8), logps=np.zeros(1))


def is_pickled(place):
  np.savez(place, texts=np.array([{}]), logps=np.zeros(1), model="{}")


def is_one_array(place):
  data = io.BytesIO()
  np.save(data, np.zeros(3))
  place.write_bytes(data.getvalue())


def has_other_shapes(place):
  np.savez(place, texts=np.zeros((1, 8), np.uint8), logps=[0.0], model="{}")


@pytest.mark.parametrize(
  "change",
  [
    *(cut, spoil, lacks_a_member, is_pickled, is_one_array, has_other_shapes),
    lambda place: place.write_bytes(b""),
    lambda place: place.write_text("no archive"),
    lambda place: (place.unlink(), place.mkdir()),
  ],
)
def test_another_kind_of_file(change, tmp_path):
  place = tmp_path / "reference.npz"
  reference_cache.write(place, precomputed(texts(TEXTS[:2])))
  change(place)
  with pytest.raises(UserError) as told:
    reference_cache.read(place)
  line = str(told.value)
  assert line.startswith(f"{place} cannot be read as log-probabilities of a re")
  assert "give the reference.npz of a run with config.reference=stored" in line
  assert "\n" not in line
