"""Names of models: folders, and hub ids without asking the hub."""

import types

import huggingface_hub
import jax
import numpy as np
import pytest

from jaxalign.errors import HostError, UserError
from jaxalign.models.hf import folder, hub, weights
from jaxalign.parallel import mesh as meshes


@pytest.fixture
def fetched(monkeypatch, tmp_path):
  """Calls of the download, which finds what `tmp_path` holds."""
  calls = []

  def download(repository, *, revision, allow_patterns):
    calls.append((repository, revision, allow_patterns))
    return str(tmp_path)

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  return calls


def test_a_folder_is_itself_and_asks_nobody(fetched, tmp_path, monkeypatch):
  assert hub.resolve(tmp_path) == tmp_path
  monkeypatch.chdir(tmp_path)
  (tmp_path / "owner" / "name").mkdir(parents=True)
  assert str(hub.resolve("owner/name")) == "owner/name"
  assert not fetched


@pytest.mark.parametrize(
  "name", ["./a/b", "/no/where", "~/no-such-folder", "./" + "x" * 300]
)
def test_a_path_is_never_asked_for(fetched, name):
  with pytest.raises(UserError, match="does not exist"):
    hub.resolve(name)
  assert not fetched


@pytest.mark.parametrize("name", ["a/b/c", "two words", ""])
def test_what_is_neither(fetched, name):
  with pytest.raises(UserError):
    hub.resolve(name)
  assert not fetched


def test_binary_weights_are_fetched_only_where_there_are_no_others(
  fetched, tmp_path
):
  assert hub.resolve("owner/name@v1") == tmp_path
  assert [call[:2] for call in fetched] == [("owner/name", "v1")] * 2
  assert "model*.safetensors" in fetched[0][2]
  for name in ("pytorch_model*.bin", "adapter_model*.bin"):
    assert name not in fetched[0][2]
    assert name in fetched[1][2]
  fetched.clear()
  (tmp_path / "model.safetensors").write_text("")
  hub.resolve("gpt2")
  assert [call[:2] for call in fetched] == [("gpt2", None)]
  hub.resolve("gpt2", weights=False)
  assert fetched[1:] == [("gpt2", None, list(hub.CONFIGS))]


def test_offline_is_one_line(monkeypatch):
  def download(*_, **__):
    raise huggingface_hub.errors.LocalEntryNotFoundError("no network\nhint")

  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  # A launcher starts again what the network has failed, but no mistake.
  for offline, kind in ((True, UserError), (False, HostError)):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", offline)
    with pytest.raises(kind, match=r"cannot be fetched .* no network") as e:
      hub.resolve("owner/name")
    assert "\n" not in str(e.value)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize(
  ("status", "kind"),
  [(403, UserError), (404, UserError), (429, HostError), (503, HostError)],
)
def test_a_hub_that_refuses_and_one_that_fails(
  status, kind, wrapped, monkeypatch
):
  def download(*_, **__):
    error = OSError("no")
    error.response = types.SimpleNamespace(status_code=status)
    if wrapped:
      raise huggingface_hub.errors.LocalEntryNotFoundError("none") from error
    raise error

  monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
  monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
  with pytest.raises(kind, match="cannot be fetched"):
    hub.resolve("owner/name")


@pytest.mark.parametrize("shard_bytes", [2**30, 40_000])
def test_a_model_on_an_object_store(bucket, make, tmp_path, shard_bytes):
  """The same numbers as from a folder, whatever part is read."""
  model, params = make("neox")
  folder.save(model, params, tmp_path / "model", shard_bytes=shard_bytes)
  place = bucket / f"models/{shard_bytes}"
  for file in (tmp_path / "model").iterdir():
    (place / file.name).write_bytes(file.read_bytes())
  opened = folder.open_pretrained(str(place))
  assert {t.path.parent for leaf in opened.tensors.values() for t in leaf} == {
    place
  }
  found = opened.read(meshes.shardings(model.shapes, meshes.make_mesh()))
  jax.tree.map(np.testing.assert_array_equal, found, params)
  # Rows of a tensor, and a part of each.
  tensor = opened.tensors["blocks.dense.kernel"][0]
  np.testing.assert_array_equal(
    tensor.read(np.s_[3:5, 2:7]), tensor.read()[3:5, 2:7]
  )


@pytest.mark.parametrize(
  ("name", "kind"), [("ClientConnectorError", HostError), ("Denied", UserError)]
)
def test_a_store_that_is_silent_is_no_mistake(name, kind, bucket, monkeypatch):
  def exists(self):
    raise RuntimeError("failed") from type(name, (Exception,), {})()

  monkeypatch.setattr(type(bucket), "exists", exists)
  with pytest.raises(kind, match="cannot be reached: failed"):
    hub.resolve("gs://bucket/model")


def test_an_object_store_that_cannot_be_used(bucket, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  with pytest.raises(UserError, match=r"gs://bucket/none does not exist"):
    hub.resolve("gs://bucket/none")
  with pytest.raises(UserError, match=r"unknown scheme ftp://"):
    hub.resolve("ftp://host/x")
  (bucket / "old" / "pytorch_model.bin").write_bytes(b"x")
  with pytest.raises(UserError, match="only safetensors are read"):
    weights.open_tensors(hub.resolve("gs://bucket/old"))
  assert [path.name for path in tmp_path.iterdir()] == ["stores"]
