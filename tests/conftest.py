"""Fixtures that tests of several rooms share, and how programs compile."""

import gc
import importlib.metadata
import os
import pathlib
import platform

import hypothesis
import pytest

# Compiling is most of the suite's time, so a program's code is made in the
# cheapest way: no optimisation, and one kernel an operation where that can be
# said. Without fused multiply-add a sum rounds the same in every program, which
# tests of exact zeros need. XLA_FLAGS="" compiles as for users, and `.ci/run`
# does so for these tests. Programs are kept for other files and later runs. JAX
# reads these variables when it is imported; processes that tests start inherit
# them.
ROOT = pathlib.Path(__file__).parents[1]
if platform.machine() == "x86_64":
  cheap = ["--xla_backend_optimization_level=0", "--xla_cpu_max_isa=AVX"]
  if importlib.metadata.version("jaxlib").startswith("0.10."):
    cheap.append("--xla_cpu_use_fusion_emitters=false")  # later ones lack it
  os.environ.setdefault("XLA_FLAGS", " ".join(cheap))
os.environ.setdefault(
  "JAX_COMPILATION_CACHE_DIR", str(ROOT / ".cache" / "test-programs")
)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# A suite keeps many objects alive, which the collector would look through again
# and again.
gc.set_threshold(100_000, 50, 50)


def pytest_collection_finish():
  gc.freeze()  # modules and tests stay until the end


def pytest_sessionfinish():
  gc.freeze()  # pytest collects five times as it ends


# Annotations are checked at every call, a seventh of a run's time: in the tests
# of each room and once a method, but not in the other tests of whole runs and
# in comparisons with other packages.
UNCHECKED, ONCE = {"e2e", "parity"}, "test_runs.py"


@pytest.fixture(scope="module", autouse=True)
def _checked_annotations(request):
  folder = request.path.relative_to(ROOT / "tests").parts[0]
  if folder not in UNCHECKED or request.path.name == ONCE:
    yield
    return
  import jaxtyping

  before = jaxtyping.config.jaxtyping_disable
  jaxtyping.config.update("jaxtyping_disable", True)
  yield
  jaxtyping.config.update("jaxtyping_disable", before)


# Every compiled program takes some memory maps, of which Linux gives a process
# 65,530 and then ends it.
MAPS, MOST_MAPS = pathlib.Path("/proc/self/maps"), 25_000


@pytest.fixture(scope="module", autouse=True)
def _few_programs():
  yield
  if MAPS.exists() and MAPS.read_bytes().count(b"\n") > MOST_MAPS:
    import jax

    jax.clear_caches()
    gc.collect()


SHARED = pathlib.Path(__file__).parents[2] / "shared" / "data"

# A busy machine is no reason to fail: no time limit per example.
hypothesis.settings.register_profile("jaxalign", deadline=None)
hypothesis.settings.load_profile("jaxalign")


@pytest.fixture(scope="session")
def word_tokenizer():
  """Makes a tokenizer of whole words: a pad, an end and an unknown first."""

  def make(words):
    import tokenizers
    import transformers

    from jaxalign.data.tokenizer import wrap_tokenizer

    table = {w: i for i, w in enumerate(["<pad>", "<eos>", "<unk>", *words])}
    level = tokenizers.models.WordLevel(table, unk_token="<unk>")
    inner = tokenizers.Tokenizer(level)
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return wrap_tokenizer(
      transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner,
        pad_token="<pad>",
        eos_token="<eos>",
        unk_token="<unk>",
      )
    )

  return make


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
  """The folder of real data beside the repository; its tests skip without."""
  if not SHARED.is_dir():
    pytest.skip(f"no data folder {SHARED}")
  return SHARED


@pytest.fixture
def fail():
  """(mapping, flags, algorithm) -> why the config is refused, in one line."""
  from jaxalign.algorithms import read_config
  from jaxalign.errors import UserError

  def message_of(mapping, flags=(), algorithm="superhf") -> str:
    with pytest.raises(UserError) as caught:
      read_config({"algorithm": algorithm} | mapping, flags)
    message = str(caught.value)
    assert "\n" not in message
    return message

  return message_of


@pytest.fixture
def bucket(monkeypatch, tmp_path):
  """`gs://bucket`, kept in a folder.

  In place of the packages that talk to Google's store: what `epath` and what
  Orbax's arrays go through.
  """
  from etils import epath
  from etils.epath import backend
  from fsspec.implementations.dirfs import DirFileSystem
  from fsspec.implementations.local import LocalFileSystem
  from orbax.checkpoint._src.path import gcs_utils

  root = tmp_path / "stores"
  (root / "bucket").mkdir(parents=True)

  class Store(DirFileSystem):
    def _join(self, path):
      if isinstance(path, str):
        path = path.removeprefix("gs://")
      return super()._join(path)

  def get(name):
    assert name == "gcs"
    return Store(str(root), LocalFileSystem(auto_mkdir=True))

  def driver(path):
    return {"driver": "file", "path": f"{root}/{path.removeprefix('gs://')}"}

  monkeypatch.setattr(backend.fsspec_backend, "_get_filesystem", get)
  monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", driver)
  monkeypatch.setattr(
    gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False
  )
  return epath.Path("gs://bucket")
