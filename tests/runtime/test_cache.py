"""Whose choice of a cache folder holds."""

import jax
import pytest

from jaxalign.parallel import hosts
from jaxalign.runtime import cache

NAMES = (
  "jax_compilation_cache_dir",
  "jax_persistent_cache_min_compile_time_secs",
)


@pytest.fixture(autouse=True)
def undisturbed(monkeypatch, tmp_path):
  """No cache is chosen, and none is after the test."""
  before = {name: getattr(jax.config, name) for name in NAMES}
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.delenv("JAXALIGN_CACHE", raising=False)
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
  yield
  for name, value in before.items():
    jax.config.update(name, value)


def test_the_default_is_below_xdg(tmp_path):
  place = cache.enable_compilation_cache()
  assert place == tmp_path / "xdg" / "jaxalign" / "xla"
  assert place.is_dir()
  assert jax.config.jax_compilation_cache_dir == str(place)


def test_the_variable_names_a_folder_or_none(tmp_path, monkeypatch):
  monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "mine"))
  assert cache.enable_compilation_cache() == tmp_path / "mine" / "xla"
  jax.config.update("jax_compilation_cache_dir", None)
  monkeypatch.setenv("JAXALIGN_CACHE", "off")
  assert cache.enable_compilation_cache() is None
  assert jax.config.jax_compilation_cache_dir is None


def test_the_users_own_choice_stays(tmp_path):
  jax.config.update("jax_compilation_cache_dir", str(tmp_path / "own"))
  assert cache.enable_compilation_cache() == tmp_path / "own"
  assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")


@pytest.mark.parametrize("seen", [True, False])
def test_several_hosts_share_a_folder_or_have_none(
  seen, tmp_path, monkeypatch, caplog
):
  # One that the user has chosen, and that nobody has made yet.
  place = str(tmp_path / "own" / "cache")
  jax.config.update("jax_compilation_cache_dir", place)
  assert str(cache.enable_compilation_cache()) == place
  monkeypatch.setattr(hosts, "count", lambda: 2)
  monkeypatch.setattr(hosts, "from_lead", lambda mark, like: mark())
  # What this host sees, and what another one says.
  monkeypatch.setattr(hosts, "agree", lambda missing: missing or not seen)
  cache.leave_cache_unless_shared()
  assert jax.config.jax_compilation_cache_dir == (place if seen else None)
  assert ("is not shared by all hosts" in caplog.text) != seen
  assert not list(tmp_path.rglob("shared-*"))


def test_a_home_that_cannot_be_written_means_no_cache(tmp_path, monkeypatch):
  (tmp_path / "file").write_text("")
  monkeypatch.setenv("JAXALIGN_CACHE", str(tmp_path / "file" / "below"))
  assert cache.enable_compilation_cache() is None


def test_the_home_without_any_variable(tmp_path, monkeypatch):
  monkeypatch.delenv("XDG_CACHE_HOME")
  monkeypatch.setenv("HOME", str(tmp_path))
  place = cache.enable_compilation_cache()
  assert place == tmp_path / ".cache" / "jaxalign" / "xla"
