import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from jaxalign.core import optim
from jaxalign.errors import UserError
from jaxalign.models.deberta import DebertaConfig
from jaxalign.models.layers import LoraConfig
from jaxalign.models.llama import LlamaConfig
from jaxalign.models.model import Model
from jaxalign.models.neox import NeoXConfig
from jaxalign.parallel import mesh as meshes

SIZES = {
  "vocab_size": 64,
  "hidden_size": 16,
  "layers": 2,
  "heads": 4,
  "intermediate_size": 32,
}


def abstract(replica=1, fsdp=1, tensor=1, sequence=1):
  """A mesh's shape without its devices."""
  return AbstractMesh((replica, fsdp, sequence, tensor), meshes.AXES)


def shape(*sizes):
  return jax.ShapeDtypeStruct(sizes, jnp.float32)


def specs(tree, mesh):
  return jax.tree.map(lambda s: s.spec, meshes.shardings(tree, mesh))


def test_one_device_is_a_mesh_of_four_axes():
  mesh = meshes.make_mesh()
  sizes = {"replica": 1, "fsdp": 1, "sequence": 1, "tensor": 1}
  assert dict(mesh.shape) == sizes


def test_an_axis_takes_what_is_left():
  count = len(jax.devices())
  assert meshes.make_mesh(fsdp=-1).shape["fsdp"] == count
  assert meshes.make_mesh(replica=-1).shape["replica"] == count


def test_an_open_axis_takes_what_splits_the_rows(monkeypatch):
  """Of 8 devices; with 2 of them for tensors 4 are left."""
  devices = 8 * jax.devices()[:1]
  monkeypatch.setattr(jax, "devices", lambda: devices)

  def sizes(**given):
    found = meshes.make_mesh(**given).shape
    return tuple(found[axis] for axis in ("replica", "fsdp", "tensor"))

  assert sizes(fsdp=-1, rows=16) == (1, 8, 1)
  assert sizes(fsdp=-1, rows=6) == (1, 6, 1)
  assert sizes(fsdp=-1, tensor=2, rows=6) == (1, 3, 2)
  assert sizes(replica=2, fsdp=-1, rows=6) == (2, 3, 1)
  assert sizes(replica=-1, rows=7) == (7, 1, 1)
  # Nothing fits: `check_rows` then says what to change.
  assert sizes(replica=4, fsdp=-1, rows=6) == (4, 2, 1)
  assert sizes(tensor=-1, rows=3) == (1, 1, 8)


@pytest.mark.parametrize(
  ("sizes", "shown"),
  [
    ((1, 4096, 1), "1 x 4096 x 1 x 1 = 4096 devices"),
    ((2, 2, 2048), "2 x 2 x 1 x 2048 = 8192 devices"),
    ((0, 1, 1), "0 x 1 x 1 x 1 = 0 devices"),
  ],
)
def test_sizes_that_do_not_fit(sizes, shown):
  with pytest.raises(UserError) as caught:
    meshes.make_mesh(*sizes)
  message = str(caught.value)
  assert message.startswith(
    "config.mesh: replica x fsdp x sequence x tensor = " + shown
  )
  assert f"but JAX has {len(jax.devices())};" in message
  assert "lower one of them" in message


def test_rows_are_split_over_replica_and_fsdp():
  mesh = abstract(2, 4, 3)
  assert meshes.row_count(mesh) == 8
  assert meshes.rows(mesh).spec == P(("replica", "fsdp"))
  assert meshes.rows(mesh, 1).spec == P(None, ("replica", "fsdp"))
  assert meshes.replicated(mesh).spec == P()
  meshes.check_rows(mesh, 16, "config.batch_size")
  with pytest.raises(UserError) as caught:
    meshes.check_rows(mesh, 12, "config.batch_size")
  assert str(caught.value) == (
    "config.batch_size gives 12 rows, which cannot be split evenly over "
    "replica x fsdp = 8 devices; make it 8 or 16, or lower config.mesh (-1 "
    "takes as many devices as fit)"
  )


def test_tokens_are_split_over_sequence():
  meshes.check_tokens(abstract(sequence=8), 64, "config.max_length")
  with pytest.raises(UserError) as caught:
    meshes.check_tokens(abstract(sequence=8), 100, "config.max_length")
  assert str(caught.value) == (
    "config.mesh.sequence must divide config.max_length, which is 100, got 8; "
    "make it 4, or config.max_length 104"
  )


def test_parameters_are_split_over_fsdp_and_sequence():
  """Over fsdp alone where both do not divide them."""
  tree = {"dense": {"kernel": shape(8, 16)}, "other": {"kernel": shape(6, 8)}}
  found = specs(tree, abstract(fsdp=2, sequence=4))
  assert found["dense"]["kernel"] == P("tensor", ("sequence", "fsdp"))
  assert found["other"]["kernel"] == P("fsdp", None)


def test_heads_are_split_over_tensor():
  meshes.check_heads(abstract(1, 1, 4), 8, "lab")
  with pytest.raises(UserError) as caught:
    meshes.check_heads(abstract(1, 1, 3), 8, "lab")
  assert str(caught.value) == (
    "config.mesh.tensor must divide the 8 heads of lab, got 3; make it 2"
  )


class Device:
  """A device of a slice, with what a mesh asks of one."""

  device_kind = platform = "made up"

  def __init__(self, number, slice_index, process_index):
    self.id, self.slice_index = number, slice_index
    self.process_index = process_index


def test_slices_hold_copies_or_parts_of_fsdp(monkeypatch):
  """Two slices of four devices; only the outermost axis crosses them."""
  devices = [Device(i, i // 4, 0) for i in range(8)]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  for sizes, crossing in (((2, 4, 1), 0), ((1, 8, 1), 1), ((4, 1, 2), 0)):
    mesh = meshes.make_mesh(*sizes)
    slices = np.vectorize(lambda device: device.slice_index)(mesh.devices)
    halves = np.split(slices, 2, axis=crossing)
    assert [set(half.flat) for half in halves] == [{0}, {1}]
  with pytest.raises(UserError, match="cannot be split over 2 slices"):
    meshes.make_mesh(1, 1, 8)


def test_hosts_take_all_of_their_devices(monkeypatch):
  devices = [Device(i, 0, i // 4) for i in range(8)]
  monkeypatch.setattr(jax, "devices", lambda: devices)
  with pytest.raises(UserError, match="a run on 2 hosts needs all 8"):
    meshes.make_mesh(1, 4, 1)


def test_rules_by_name():
  """Inputs of the first product of a pair stay whole over `tensor`."""
  tree = {
    "embedding": {"embedding": shape(64, 16)},
    "lm_head": {
      "embedding": shape(64, 16),
      "lora_a": shape(16, 4),
      "lora_b": shape(4, 64),
    },
    "final_norm": {"scale": shape(16), "bias": shape(16)},
    "blocks": {
      "query_key_value": {
        "kernel": shape(2, 16, 48),
        "bias": shape(2, 48),
        "lora_a": shape(2, 16, 4),
        "lora_b": shape(2, 4, 48),
      },
      "dense": {"kernel": shape(2, 16, 16)},
      "unheard_of": {"kernel": shape(2, 16, 16)},
    },
  }
  found = specs(tree, abstract(1, 2, 2))
  assert found["embedding"]["embedding"] == P("tensor", "fsdp")
  assert found["lm_head"] == {
    "embedding": P("tensor", "fsdp"),
    "lora_a": P("fsdp", None),
    "lora_b": P("fsdp", None),
  }
  assert found["final_norm"] == {"scale": P(), "bias": P()}
  assert found["blocks"]["query_key_value"] == {
    "kernel": P(None, "fsdp", "tensor"),
    "bias": P(),
    "lora_a": P(None, "fsdp", None),
    "lora_b": P(None, "fsdp", None),
  }
  assert found["blocks"]["dense"]["kernel"] == P(None, "tensor", "fsdp")
  assert found["blocks"]["unheard_of"]["kernel"] == P(None, "fsdp", None)


def test_what_does_not_divide_stays_whole():
  tree = {"embedding": {"embedding": shape(63, 16)}}
  found = specs(tree, abstract(1, 8, 2))
  assert found["embedding"]["embedding"] == P(None, "fsdp")
  tree = {"blocks": {"dense": {"kernel": shape(2, 6, 6)}}}
  found = specs(tree, abstract(1, 4, 3))
  assert found["blocks"]["dense"]["kernel"] == P(None, "tensor", None)


@pytest.mark.parametrize("name", ["adamw", "adafactor", "lion"])
def test_optimizer_states_follow_their_parameters(name):
  """Adam's moments lie as their kernel does; factored vectors stay whole."""
  params = {"dense": {"kernel": shape(256, 128), "bias": shape(128)}}
  optimizer = optim.make_optimizer(
    name, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1, clip_norm=1.0
  )
  state = jax.eval_shape(lambda p: optim.init_state(p, optimizer), params)
  placed = meshes.shardings(state, abstract(1, 4, 2))
  wanted = placed.params["dense"]["kernel"].spec
  assert wanted == P("tensor", "fsdp")
  pairs = zip(jax.tree.leaves(state), jax.tree.leaves(placed), strict=True)
  for leaf, place in pairs:
    assert place.spec == (wanted if leaf.shape == (256, 128) else P())


MODELS = {
  "neox": NeoXConfig(**SIZES),
  "llama": LlamaConfig(
    vocab_size=64,
    hidden_size=16,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=4,
    intermediate_size=32,
  ),
  "deberta": DebertaConfig(**SIZES),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_large_leaf_is_split(name):
  """What is left on every device is small: biases and norms."""
  config = MODELS[name]
  targets = ("query_key_value", "q_proj", "query_proj")
  model = Model.build(config, LoraConfig(4, 4.0, targets=targets))
  placed = meshes.shardings(model.shapes, abstract(1, 4, 2))

  def check(path, leaf, place):
    parts = place.shard_shape(leaf.shape)
    names = [str(p.key) for p in path]
    if leaf.ndim - (names[0] == "blocks") >= 2 and leaf.shape[-1] > 1:
      assert parts != leaf.shape, "/".join(names)

  jax.tree_util.tree_map_with_path(check, model.shapes, placed)


def test_put_keeps_values():
  params = {"dense": {"kernel": jnp.arange(6.0).reshape(2, 3)}}
  out = meshes.put(params, meshes.make_mesh())
  assert (out["dense"]["kernel"] == params["dense"]["kernel"]).all()
  assert out["dense"]["kernel"].sharding.mesh.axis_names == meshes.AXES
