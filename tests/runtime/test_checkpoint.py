"""Round trips, damage, kills and full disks."""

import contextlib
import errno
import gc
import json
import logging
import math
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

from jaxalign.errors import UserError
from jaxalign.runtime import arrays, checkpoint, manifest, mirror
from jaxalign.runtime.checkpoint import Checkpointer


class Moments(NamedTuple):
  count: jax.Array
  mu: dict


def make_state(seed=0):
  """Every kind of leaf a run has; two bit patterns of NaN, one of -0.0."""
  odd = np.array([0x7FC00001, 0xFFC0BEEF, 0x80000000, 1], np.uint32)
  key = jax.random.key(seed)
  params = {
    "blocks": {"kernel": jax.random.normal(key, (3, 50, 7), jnp.float32)},
    "half": jax.random.normal(key, (9,)).astype(jnp.bfloat16),
    "odd": jnp.asarray(odd.view(np.float32)),
    "zeros": jnp.zeros((4, 4)),
  }
  moments = Moments(jnp.int32(seed), {"m": params["blocks"]["kernel"] * 2})
  return {
    "params": params,
    "opt": (moments, (), [jnp.array([True, False])]),
    "empty": jnp.zeros((0, 3)),
  }


def abstract(state):
  here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), state
  )


def assert_equal_bits(found, wanted):
  assert jax.tree.structure(found) == jax.tree.structure(wanted)
  for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.fixture
def saver(tmp_path):
  saver = Checkpointer(tmp_path / "ck", keep=2)
  yield saver
  saver.close()


def names(saver):
  """All that the folder holds: no drafts are left lying about."""
  return sorted(p.name for p in saver.folder.iterdir())


def test_round_trip_is_bit_exact(saver):
  state = make_state()
  saver.save(7, state, {"files": {"metrics.jsonl": 12}, "note": "ü"})
  found = saver.restore_latest(abstract(state))
  assert_equal_bits(found.state, state)
  assert found.step == 7
  assert found.extra == {"files": {"metrics.jsonl": 12}, "note": "ü"}


def test_empty_folder_restores_nothing(saver):
  assert saver.restore_latest(abstract(make_state())) is None
  assert checkpoint.load(saver.folder) is None


def test_load_reads_a_part_as_nested_dicts(saver):
  state = make_state()
  saver.save(1, state, {"a": 1})
  saver.wait()
  params, extra, step = checkpoint.load(saver.folder, "params")
  assert_equal_bits(params, jax.tree.map(np.asarray, state["params"]))
  assert (extra, step) == ({"a": 1}, 1)


def test_keeps_the_newest(saver):
  for step in (1, 2, 3, 4):
    saver.save(step, {"x": jnp.full((2,), step)}, {})
  saver.wait()
  assert names(saver) == ["00000003", "00000004"]


def test_keeps_the_best_too(tmp_path):
  saver = Checkpointer(tmp_path, keep=1, keep_best=True)
  for step, score in ((1, 0.5), (2, 0.9), (3, None), (4, math.nan), (5, 0.7)):
    saver.save(step, {"x": jnp.zeros(2)}, {}, score=score)
  saver.close()
  assert names(saver) == ["00000002", "00000005"]


def test_the_best_of_an_earlier_start_stays(tmp_path):
  """Though Orbax's own notes on another checkpoint are damaged."""
  for start in (0, 10):
    saver = Checkpointer(tmp_path, keep=1, keep_best=True)
    for step, score in ((1, 0.5), (2, 0.9 - start), (3, None)):
      saver.save(start + step, {"x": jnp.zeros(2)}, {}, score=score)
    saver.close()
    (saver.folder / f"{start + 3:08d}" / "_CHECKPOINT_METADATA").write_text(
      "[]"
    )
  assert names(saver) == ["00000002", "00000013"]


def test_a_checkpoint_of_the_first_layout_is_restored(saver):
  """There, Orbax knew the folder `arrays` only, and left its notes in it."""
  state = make_state()
  saver.save(3, state, {"n": 3})
  saver.wait()
  for name in ("_CHECKPOINT_METADATA", "commit_success.txt"):
    (saver.folder / "00000003" / name).unlink()
  saver.close()
  again = Checkpointer(saver.folder)
  found = again.restore_latest(abstract(state))
  assert_equal_bits(found.state, state)
  again.save(4, state, {})
  again.close()
  assert names(saver) == ["00000003", "00000004"]


def test_due_by_steps_and_by_minutes(tmp_path, monkeypatch):
  clock = [1000.0]
  monkeypatch.setattr(time, "monotonic", lambda: clock[0])
  by_steps = Checkpointer(tmp_path / "a", every_steps=10)
  assert [s for s in range(1, 31) if by_steps.due(s)] == [10, 20, 30]
  by_minutes = Checkpointer(tmp_path / "b", every_minutes=2)
  assert not by_minutes.due(1)
  clock[0] += 121
  assert by_minutes.due(2)
  by_minutes.save(2, {"x": jnp.zeros(1)}, {})
  by_minutes.wait()
  assert not by_minutes.due(3)
  never = Checkpointer(tmp_path / "c")
  clock[0] += 1e9
  assert not any(never.due(s) for s in range(1, 100))
  for each in (by_steps, by_minutes, never):
    each.close()


def biggest_file(place):
  """That of the arrays' values, which are not few enough to be in the index."""
  found = (place / "arrays").rglob("d/*")
  return max(found, key=lambda p: p.stat().st_size)


def flip_a_byte(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 0x10
  path.write_bytes(data)


def truncate(path):
  os.truncate(path, path.stat().st_size - 1)


DAMAGES = {
  "flipped byte": lambda place: flip_a_byte(biggest_file(place)),
  "truncated": lambda place: truncate(biggest_file(place)),
  "missing": lambda place: biggest_file(place).unlink(),
  "no manifest": lambda place: (place / manifest.NAME).unlink(),
  "flipped manifest": lambda place: flip_a_byte(place / manifest.NAME),
  "half a manifest": lambda place: os.truncate(place / manifest.NAME, 99),
  "manifest of another": lambda place: (place / manifest.NAME).write_text("[]"),
}


@pytest.mark.parametrize("sha256", [False, True])
@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_checkpoint_is_passed_over(saver, caplog, damage, sha256):
  """The one before is used, the run goes on, the damaged one is replaced."""
  saver._sha256 = sha256
  older, newer = make_state(1), make_state(2)
  saver.save(1, older, {"n": 1})
  saver.save(2, newer, {"n": 2})
  saver.wait()
  damage(saver.folder / "00000002")
  with caplog.at_level(logging.WARNING):
    found = saver.restore_latest(abstract(older))
  assert (found.step, found.extra) == (1, {"n": 1})
  assert_equal_bits(found.state, older)
  assert "00000002 is passed over" in caplog.text
  saver.save(2, newer, {"n": 2})
  found = saver.restore_latest(abstract(older))
  assert_equal_bits(found.state, newer)


def test_every_flipped_bit_is_found(saver):
  """Orbax reads what was changed in an array; the sums tell, `load` as well."""
  values = np.arange(1000, dtype=np.float32)
  for step in (1, 2):
    saver.save(step, {"params": {"x": jnp.asarray(values)}}, {})
  saver.wait()
  files = (saver.folder / "00000002" / "arrays").rglob("d/*")
  (path,) = (p for p in files if values.tobytes() in p.read_bytes())
  whole = path.read_bytes()
  start = whole.index(values.tobytes())
  part = {"params": abstract({"x": jnp.zeros(1000)})}
  for place in (0, 1501, 3999):
    data = bytearray(whole)
    data[start + place] ^= 1 << place % 8
    path.write_bytes(data)
    assert checkpoint.load(saver.folder)[2] == 1, place
    assert checkpoint.read_part(saver.folder, 2, part, "") is None
  path.write_bytes(whole)
  assert checkpoint.load(saver.folder)[2] == 2


def test_sums_are_alike_on_host_and_device():
  """Worked: the bits of 1.0 are 0x3F800000, in bfloat16 0x3F80."""
  ones = {"a": np.ones(2**20, np.float32), "b": jnp.ones(3, jnp.bfloat16)}
  assert arrays.sums(ones) == {"a": 2**20 * 0x3F800000, "b": 3 * 0x3F80}
  named = arrays.named(make_state())
  found = arrays.sums(named)
  assert found == {n: int(arrays.device_sum(x)) for n, x in named.items()}
  assert found == arrays.sums({n: np.asarray(x) for n, x in named.items()})


def test_all_damaged_restores_nothing(saver):
  saver.save(1, make_state(), {})
  saver.wait()
  truncate(biggest_file(saver.folder / "00000001"))
  assert saver.restore_latest(abstract(make_state())) is None


def test_damaged_ones_do_not_count_as_kept(saver):
  """Keep 2: the good step 1 outlives the damaged steps 2 and 3."""
  for step in (1, 2):
    saver.save(step, {"x": jnp.zeros(512)}, {})
  saver.wait()
  flip_a_byte(biggest_file(saver.folder / "00000002"))
  saver.restore_latest(abstract({"x": jnp.zeros(512)}))
  saver.save(3, {"x": jnp.zeros(512)}, {})
  saver.wait()
  assert names(saver) == ["00000001", "00000003"]


def test_a_course_given_up_is_dropped(saver):
  """Back at step 4 after 9 was damaged: the new 5 is the newest."""
  for step in (4, 9):
    saver.save(step, {"x": jnp.zeros(512)}, {})
  saver.wait()
  flip_a_byte(biggest_file(saver.folder / "00000009"))
  saver.restore_latest(abstract({"x": jnp.zeros(512)}))
  saver.save(5, {"x": jnp.ones(512)}, {})
  assert saver.restore_latest(abstract({"x": jnp.zeros(512)})).step == 5
  assert names(saver) == ["00000004", "00000005"]


def test_another_state_is_refused_by_name(saver):
  saver.save(1, {"params": {"w": jnp.zeros((2, 3)), "b": jnp.zeros(3)}}, {})
  other = {"params": {"w": jnp.zeros((2, 4)), "c": jnp.zeros(3)}}
  with pytest.raises(UserError) as caught:
    saver.restore_latest(abstract(other))
  message = str(caught.value)
  assert "params.w is float32[2, 3], the run needs float32[2, 4]" in message
  assert "params.b is float32[3], the run needs absent" in message
  assert "params.c is absent, the run needs float32[3]" in message


def test_donated_arrays_are_saved_as_they_were(saver):
  """The next step overwrites the buffers while the save is being written."""
  step = jax.jit(
    lambda s: jax.tree.map(lambda x: x * 0 - 1, s), donate_argnums=0
  )
  state = {"w": jnp.arange(1 << 22, dtype=jnp.float32)}
  wanted = np.arange(1 << 22, dtype=np.float32)
  for _ in range(3):
    state = {"w": jnp.array(wanted)}
    saver.save(1, state, {})
    for _ in range(3):
      state = step(state)
    jax.block_until_ready(state)
    found = saver.restore_latest(abstract(state))
    assert np.array_equal(np.asarray(found.state["w"]), wanted)
    assert float(state["w"][5]) == -1


def test_saves_under_a_transfer_guard(saver):
  state = make_state()
  target = abstract(state)
  with jax.transfer_guard("disallow"):
    saver.save(1, state, {})
    found = saver.restore_latest(target)
  assert_equal_bits(found.state, state)


def no_space(*args, **kwargs):
  raise OSError(errno.ENOSPC, "No space left on device")


def test_full_disk_in_the_background(saver, monkeypatch):
  """Told at the next `check`; the last good checkpoint stays, no debris."""
  state = make_state()
  saver.save(1, state, {})
  saver.wait()
  with monkeypatch.context() as patch:
    patch.setattr(manifest, "seal", no_space)
    saver.save(2, state, {})
    with pytest.raises(
      UserError, match=r"full while saving step 2.*00000001 is"
    ):
      saver.wait()
  saver.check()  # told once
  assert names(saver) == ["00000001"]
  saver.save(3, state, {})
  assert saver.restore_latest(abstract(state)).step == 3


def test_checkpoints_on_an_object_store(bucket):
  """Whole ones only, and none of a save that did not finish."""
  with mirror.opened(pathlib.Path("gs://bucket/run")) as folder:
    saver = Checkpointer(folder / "checkpoints")
    state = make_state()
    for step in (1, 2, 3):
      (folder / "metrics.jsonl").write_text(f"{step}")
      saver.save(step, state, {"n": step})
    saver.close()
  place = bucket / "run" / "checkpoints"
  assert sorted(p.name for p in place.iterdir()) == ["00000002", "00000003"]
  assert (bucket / "run" / "metrics.jsonl").read_text() == "3"
  # Another machine; the newest save has not finished.
  (place / "00000003" / "manifest.json").unlink()
  with mirror.opened(pathlib.Path("gs:/bucket/run")) as folder:
    assert (folder / "metrics.jsonl").read_text() == "3"
    assert not (folder / "checkpoints").exists()
    saver = Checkpointer(folder / "checkpoints")
    found = saver.restore_latest(abstract(state))
    assert (found.step, found.extra) == (2, {"n": 2})
    assert_equal_bits(found.state, state)
    assert checkpoint.load(folder / "checkpoints")[2] == 2
    saver.save(3, state, {"n": 3})
    assert saver.restore_latest(abstract(state)).step == 3
    saver.close()


def test_a_save_that_fails_twice_is_told_once(saver, monkeypatch):
  """Orbax writes arrays and metadata in two threads; both meet a full disk."""
  second = ValueError("RESOURCE_EXHAUSTED: No space left on device")

  def close(self):
    raise second

  def save():
    with contextlib.closing(saver):
      saver.save(2, make_state(), {})
      saver.wait()

  with monkeypatch.context() as patch:
    patch.setattr(manifest, "seal", no_space)
    patch.setattr(ocp.AsyncCheckpointer, "close", close)
    with pytest.raises(UserError, match="full while saving step 2"):
      save()


def test_full_disk_at_the_start_of_a_save(saver, monkeypatch):
  with monkeypatch.context() as patch:
    patch.setattr(os, "mkdir", no_space)
    with pytest.raises(UserError, match="there is no earlier checkpoint"):
      saver.save(2, make_state(), {})
  assert names(saver) == []


def test_other_failures_are_not_hidden(saver, monkeypatch):
  def broken(*args):
    raise ZeroDivisionError("bug")

  monkeypatch.setattr(manifest, "seal", broken)
  saver.save(2, make_state(), {})
  with pytest.raises(RuntimeError, match="saving step 2") as caught:
    saver.wait()
  assert isinstance(caught.value.__cause__, ZeroDivisionError)


@pytest.fixture
def small_disk(tmp_path):
  """A file system of 4 MB; only root can make one."""
  place = tmp_path / "disk"
  place.mkdir()
  mount = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(place)]
  if subprocess.run(mount, capture_output=True, check=False).returncode:
    pytest.skip("mounting a small file system needs root")
  yield place
  subprocess.run(["umount", str(place)], check=True)
  gc.collect()  # the writes that Orbax gave up, here and not in a later test


def test_really_full_disk(small_disk, caplog):
  """Orbax itself runs into it; its pages of log do not reach people."""
  saver = Checkpointer(small_disk / "ck")
  small = {"w": jax.random.normal(jax.random.key(0), (1 << 17,))}
  large = {"w": jax.random.normal(jax.random.key(0), (1 << 21,))}
  saver.save(1, small, {})
  saver.save(2, large, {})
  with pytest.raises(UserError, match="full while saving step 2"):
    saver.wait()
  assert names(saver) == ["00000001"]
  assert not caplog.records
  assert_equal_bits(saver.restore_latest(abstract(small)).state, small)
  saver.close()


def run_python(code, *args, devices=1):
  env = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
  }
  return subprocess.Popen(
    [sys.executable, "-c", textwrap.dedent(code), *map(str, args)],
    env=env,
    stderr=subprocess.PIPE,
    text=True,
  )


KILLED = """
  import os, pathlib, shutil, signal, sys
  import jax, jax.numpy as jnp
  import orbax.checkpoint as ocp
  from jaxalign.runtime import checkpoint, files, manifest

  def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)

  def die_half_way(path, value):
    path.write_text(str(value)[:50])
    die()

  def die_deleting(path, **kwargs):
    for part in pathlib.Path(path).rglob("manifest.ocdbt"):
      part.unlink()
      die()

  saver = checkpoint.Checkpointer(sys.argv[1], keep=1)
  saver.save(1, {"w": jnp.full((1 << 22,), 1.0)}, {"n": 1})
  saver.wait()
  point = sys.argv[2]
  if point == "merging arrays":
    ocp.PyTreeCheckpointHandler.finalize = die
  elif point == "before the manifest":
    manifest.seal = die
  elif point == "inside the manifest":
    files.write_json = die_half_way
  elif point == "deleting the old":
    shutil.rmtree = die_deleting
  saver.save(2, {"w": jnp.full((1 << 22,), 2.0)}, {"n": 2})
  if point == "writing arrays":
    die()
  saver.wait()
"""
KILL_POINTS = {  # -> the step that is found afterwards
  "writing arrays": 1,
  "merging arrays": 1,
  "before the manifest": 1,
  "inside the manifest": 1,
  "deleting the old": 2,
}


def test_killed_inside_a_save(tmp_path):
  """SIGKILL at five points; what is left restores and can be added to."""
  running = {
    point: run_python(KILLED, tmp_path / point, point) for point in KILL_POINTS
  }
  for point, wanted in KILL_POINTS.items():
    _, errors = running[point].communicate(timeout=120)
    assert running[point].returncode == -signal.SIGKILL, errors
    saver = Checkpointer(tmp_path / point, keep=1)
    target = abstract({"w": jnp.zeros((1 << 22,))})
    found = saver.restore_latest(target)
    assert (found.step, found.extra) == (wanted, {"n": wanted})
    assert np.all(np.asarray(found.state["w"]) == wanted)
    saver.save(3, found.state, {"n": 3})
    assert saver.restore_latest(target).step == 3
    assert names(saver) == ["00000003"]
    saver.close()


FOUR_DEVICES = """
  import sys
  import jax, jax.numpy as jnp, numpy as np
  from jax.sharding import NamedSharding, PartitionSpec
  from jaxalign.runtime.checkpoint import Checkpointer

  mesh = jax.make_mesh((4,), ("fsdp",))
  split = NamedSharding(mesh, PartitionSpec("fsdp"))
  target = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=split)}
  saver = Checkpointer(sys.argv[1])
  found = saver.restore_latest(target)
  assert found.state["w"].sharding == split
  assert len(found.state["w"].addressable_shards) == 4
  assert np.array_equal(found.state["w"], np.arange(48.0).reshape(8, 6))
  with jax.set_mesh(mesh):
    saver.save(2, {"w": found.state["w"] + 1}, {})
    assert saver.restore_latest(target).step == 2
  saver.close()
"""


def test_from_one_device_to_four_and_back(saver):
  wanted = np.arange(48, dtype=np.float32).reshape(8, 6)
  saver.save(1, {"w": jnp.asarray(wanted)}, {})
  saver.wait()
  process = run_python(FOUR_DEVICES, saver.folder, devices=4)
  _, errors = process.communicate(timeout=120)
  assert process.returncode == 0, errors
  found = saver.restore_latest(abstract({"w": jnp.zeros((8, 6))}))
  assert found.step == 2
  assert np.array_equal(np.asarray(found.state["w"]), wanted + 1)


def test_manifest_lists_every_file(saver):
  saver.save(1, make_state(), {})
  saver.wait()
  place = saver.folder / "00000001"
  found = {
    str(p.relative_to(place)) for p in place.rglob("*") if p.is_file()
  } - {manifest.NAME, "_CHECKPOINT_METADATA", "commit_success.txt"}
  body = json.loads((place / manifest.NAME).read_text())["body"]
  assert body["files"].keys() == found
  assert body["arrays"].keys() == arrays.named(make_state()).keys()


TWO_PROCESSES = """
  import pathlib, sys
  import jax, jax.numpy as jnp, numpy as np, tensorstore
  from jax.sharding import NamedSharding, PartitionSpec
  jax.config.update("jax_cpu_collectives_implementation", "gloo")
  rank = int(sys.argv[3])
  jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=rank)
  from jaxalign.parallel import hosts
  from jaxalign.runtime import arrays
  from jaxalign.runtime.checkpoint import Checkpointer

  split = NamedSharding(jax.make_mesh((2,), ("fsdp",)), PartitionSpec("fsdp"))
  rows = np.arange(48, dtype=np.float32).reshape(8, 6)
  state = {"w": jax.make_array_from_callback((8, 6), split, lambda i: rows[i])}
  target = {"w": jax.ShapeDtypeStruct((8, 6), jnp.float32, sharding=split)}
  # What each process has for itself counts once, whatever it is called.
  whole, bits = int(rows.view(np.uint32).sum(dtype=np.uint64)), 0x3F800000
  named = {"w": state["w"], "n": np.ones(1, np.float32)}
  assert arrays.sums(named) == {"n": bits, "w": whole}
  saver = Checkpointer(sys.argv[1], keep=2, every_minutes=1)
  assert not saver.due(1)
  assert saver.restore_latest(target) is None
  for step in (1, 2, 3):
    saver.save(step, state, {"n": step})
  saver.wait()
  if hosts.is_lead():
    (saver.folder / "00000003" / "manifest.json").unlink()
  hosts.barrier("damaged", 60)
  found = saver.restore_latest(target)
  assert (found.step, found.extra) == (2, {"n": 2})
  for shard in found.state["w"].addressable_shards:
    assert np.array_equal(shard.data, rows[shard.index])
  saver.save(3, state, {"n": 3})
  saver.close()

  # What one device has written: each process reads its half and no more.
  def bytes_read():
    name = "/tensorstore/kvstore/file/bytes_read"
    (found,) = tensorstore.experimental_collect_matching_metrics(name)
    return sum(value["value"] for value in found["values"])

  large = {"w": jax.ShapeDtypeStruct((4096, 1024), jnp.float32, sharding=split)}
  saver = Checkpointer(sys.argv[1] + "-one")
  before = bytes_read()
  found = saver.restore_latest(large)
  assert all(np.all(s.data == 5) for s in found.state["w"].addressable_shards)
  assert bytes_read() - before < 0.51 * found.state["w"].nbytes
  saver.close()
"""


@pytest.mark.slow
def test_two_processes_share_a_checkpoint(saver):
  """Each writes and reads its half; the lead decides which one is whole."""
  one = Checkpointer(f"{saver.folder}-one")
  one.save(1, {"w": jnp.full((4096, 1024), 5.0)}, {})
  one.close()
  with socket.socket() as probe:
    probe.bind(("127.0.0.1", 0))
    address = f"127.0.0.1:{probe.getsockname()[1]}"
  running = [
    run_python(TWO_PROCESSES, saver.folder, address, rank) for rank in range(2)
  ]
  for process in running:
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 0, errors
  assert names(saver) == ["00000002", "00000003"]
  params, extra, step = checkpoint.load(saver.folder)
  assert (extra, step) == ({"n": 3}, 3)
  assert np.array_equal(params["w"], np.arange(48.0).reshape(8, 6))
