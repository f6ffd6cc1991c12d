"""A whole plan, for this machine's CPU: small models, two compilations."""

import dataclasses
import json

import pytest

from jaxalign import algorithms
from jaxalign.config import to_mapping
from jaxalign.errors import UserError
from jaxalign.plan import __main__ as command
from jaxalign.plan import measure, page, search, standins, targets
from jaxalign.plan.targets import find
from jaxalign.setup import start
from jaxalign.setup.models import LAB

# GPT-NeoX by its config.json alone.
CONFIG = {
  "model_type": "gpt_neox",
  "architectures": ["GPTNeoXForCausalLM"],
  "hidden_size": 64,
  "num_hidden_layers": 3,
  "num_attention_heads": 4,
  "intermediate_size": 256,
  "max_position_embeddings": 256,
  "vocab_size": 5000,
  "rotary_pct": 0.25,
  "layer_norm_eps": 1e-5,
  "hidden_act": "gelu",
  "use_parallel_residual": True,
  "tie_word_embeddings": False,
  "eos_token_id": 0,
}
# Embedding, output, and three layers of 12 D^2 with their biases and norms.
SIZE = 2 * 5000 * 64 + 3 * (12 * 64**2 + 13 * 64) + 2 * 64


@pytest.fixture(scope="module")
def model(tmp_path_factory):
  folder = tmp_path_factory.mktemp("model")
  (folder / "config.json").write_text(json.dumps(CONFIG))
  return str(folder)


def config(model, **fields):
  mapping = {"algorithm": "sft", "policy": model, "data": "org/not-here"}
  mapping |= {"steps": 7, "batch_size": 2, "max_length": 32}
  return algorithms.read_config(mapping | fields)


@pytest.fixture(scope="module")
def planned(model, tmp_path_factory):
  """The config with stand-ins, and its plan."""
  there = standins.stand_in(config(model), tmp_path_factory.mktemp("here"))
  return there, measure.plan(there.config, find("cpu"), there.notes)


def test_config_json_and_lengths_are_all_that_a_plan_needs(planned):
  there, plan = planned
  assert [p.name for p in plan.programs] == ["update"]
  assert plan.resident[measure.PARAMETERS] == 4 * SIZE
  # AdamW's two averages, and its counter.
  extra = plan.resident[measure.OPTIMIZER] - 8 * SIZE
  assert 0 <= extra < 100
  assert plan.resident[measure.REFERENCE] == 0
  assert plan.trained == 2 * 32
  assert plan.rows == 2
  notes = " ".join(there.notes)
  assert "by its config.json alone: policy" in notes
  assert "without a tokenizer, so the lab's counts its tokens: policy" in notes
  assert "data are not read: 64 rows of 32 tokens" in notes


def test_operations_of_an_update_are_six_a_parameter_and_token(planned):
  """Of parameters in products: all but the embedding, biases and norms."""
  _, plan = planned
  (update,) = plan.programs
  products = 5000 * 64 + 3 * 12 * 64**2
  tokens = 2 * 32
  # The attention's own products are few; the last token predicts nothing.
  assert update.flops.total() == pytest.approx(6 * products * tokens, rel=0.05)
  assert update.moved > 12 * SIZE  # parameters and averages are read at least
  assert update.seconds == max(update.times.values())


def test_peak_holds_state_gradients_and_activations(planned):
  _, plan = planned
  (update,) = plan.programs
  assert update.other_resident == 0
  assert 12 * SIZE < update.peak - update.temporary < 12 * SIZE + 10_000
  assert plan.fits
  text = page.text(plan)
  assert "fits: update needs" in text
  assert "7 steps" in text
  assert "first step after about" in text
  # Of 32 tokens there is one width.
  assert "programs over the run" not in text
  # A run's own process is counted: jax alone takes 100 MB.
  assert plan.needed - plan.peak.peak == plan.process > 1e8
  assert f"and {plan.process / 2**30:.2f} of the process itself" in text
  found = page.as_json(plan)
  assert json.loads(json.dumps(found))["programs"][0]["name"] == "update"
  assert "cpu" in page.side_by_side([plan, plan])


def test_what_a_program_does_not_use_stays_in_memory(model, tmp_path):
  """A reference in memory, AdamW's averages in the host's."""
  fields = {"algorithm": "dpo", "reference": "auto", "batch_size": 1}
  there = standins.stand_in(config(model, **fields), tmp_path)
  offload = dataclasses.replace(there.config.optimizer, offload=True)
  waiting = dataclasses.replace(there.config, optimizer=offload)
  programs = algorithms.programs(algorithms.describe(waiting))
  found = measure.residents(programs)
  sizes = measure._by_class(found)
  assert sizes[measure.REFERENCE] == 4 * SIZE
  assert sizes[measure.OPTIMIZER] == 4  # its counter
  lora = dataclasses.replace(there.config.lora, rank=2)
  adapted = dataclasses.replace(waiting, lora=lora)
  programs = algorithms.programs(algorithms.describe(adapted))
  # The base under the adapters is the reference: it counts once, although it
  # is passed twice.
  sizes = measure._by_class(measure.residents(programs))
  assert sizes[measure.REFERENCE] == 0
  assert sizes[measure.PARAMETERS] < 4.2 * SIZE
  plan = measure.plan(adapted, find("cpu"))
  update = plan.programs[0]
  assert update.peak - update.temporary < 4.5 * SIZE


def test_an_update_compiled_again_needs_what_the_plan_says(planned):
  there, plan = planned
  spec = algorithms.describe(there.config)
  assert search.update_peak(spec, plan.target) == plan.peak.peak


@pytest.mark.parametrize("room", [1000, 5000, 40_000])
def test_the_largest_pass_fits_and_one_row_more_does_not(
  planned, monkeypatch, room
):
  """Nearly a line, as memory is: 700 bytes, 30 for each row and a little."""
  there, plan = planned
  tried = []

  def peak(spec, target):
    rows = spec.batch_shape[1]
    tried.append(rows)
    return 700 + 30 * rows + rows // 50

  monkeypatch.setattr(search, "update_peak", peak)
  rows = search.largest_rows(there.config, plan.target, room)
  exact = max(n for n in range(4097) if 700 + 30 * n + n // 50 <= room)
  assert exact - exact // 16 <= rows <= exact
  assert len(tried) <= 6


def test_the_smallest_slice_is_not_below_what_its_state_needs(planned):
  _, plan = planned
  among = find("v5litepod-16").sizes()
  state = sum(plan.resident.values())
  chip = dataclasses.replace(among[0].chip, memory=state // 3)
  among = [dataclasses.replace(target, chip=chip) for target in among]
  tried = []

  def run(target):
    tried.append(target.chips)
    (update,) = plan.programs
    peak = state // target.chips + state // 8
    programs = (dataclasses.replace(update, peak=peak),)
    return dataclasses.replace(plan, target=target, programs=programs)

  small = plan = dataclasses.replace(plan, target=among[0], process=0)
  assert not small.fits
  found = search.smallest(run, small, among)
  # A third holds a quarter and not an eighth more; then an eighth twice.
  assert (tried, found.target.chips) == ([4, 8], 8)


def test_filler_rows_get_a_mesh_without_any_as_a_remedy():
  """Two rows that count, on eight chips."""

  def note(fsdp, rows, tokens):
    mesh = {"replica": 1, "fsdp": fsdp, "sequence": 1, "tensor": 1}
    return measure.filler_note(mesh, (1, rows, tokens), 2)

  assert note(2, 2, 256) == ""
  found = note(8, 8, 256)
  assert "75% of an update's rows are filler: 2 of 8 rows count" in found
  assert found.endswith("--config.mesh.fsdp=2 --config.mesh.sequence=4")
  # An odd number of tokens is not split.
  assert note(8, 8, 255).endswith("or give chips to mesh.tensor")


def test_wasted_sampling_is_told():
  """Rows that do not divide are drawn by every device."""

  def note(prompts, samples, fsdp, sequence=1):
    mesh = {"replica": 1, "fsdp": fsdp, "sequence": sequence, "tensor": 2}
    return measure.idle_note(mesh, prompts, samples)

  assert note(8, 16, 64, 2) == note(7, 1, 8) == ""
  assert note(2, 16, 64).startswith("98% of the sampling is wasted: 2 x 16 ")
  # As 128, and split over fsdp but not over sequence.
  assert note(96, 1, 64).startswith("25% ")
  assert "divide over 64 of 256 parts" in note(64, 1, 64, 4)


def test_what_a_compiler_refuses_says_how_much_it_needs():
  first = (
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in "
    "memory space hbm. Used 17.55G of 15.75G hbm. Exceeded by 1.80G."
  )
  second = (
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required "
    "for HLO temporaries (17.55G) exceeds available HBM (15.75G)"
  )
  for message in (first, second):
    assert measure.too_large(message) == round(17.55 * 2**30)
  assert measure.too_large("INTERNAL: no such memory") is None


def test_without_a_compiler_a_plan_is_an_estimate_and_says_what_to_install(
  monkeypatch,
):
  missing = {"gpu": ("not_there.at_all", "plan-gpu")}
  monkeypatch.setattr(targets, "COMPILERS", missing)
  devices, why = measure.devices_of(find("a6000"))
  assert len(devices) == 1
  assert why.startswith("estimate: compiled for CPUs, as no compiler for RTX")
  assert "pip install 'jaxalign[plan-gpu]'" in why
  with pytest.raises(UserError, match="cannot stand for 4096 chips"):
    measure.devices_of(find("512x8xa6000"))


def test_the_command_prints_json(model, tmp_path, capsys, monkeypatch):
  monkeypatch.setattr(targets, "prepare", lambda chosen: None)
  path = tmp_path / "tiny.py"
  fields = {"algorithm": "sft", "policy": model, "data": "org/not-here"}
  fields |= {"steps": 7, "batch_size": 2, "max_length": 32}
  path.write_text(f"def get_config():\n  return {fields!r}\n")
  # Without the advice, which would compile other sizes and is not printed.
  monkeypatch.setattr(search, "advise", None)
  argv = [f"--config={path}", "--on=cpu", "--json"]
  assert command.main(argv) == 0
  found = json.loads(capsys.readouterr().out)
  assert found["trained_tokens"] == 7 * 2 * 32
  assert found["resident_bytes"]["parameters"] == 4 * SIZE
  assert found["fits"]
  assert found["programs"][0]["bound_by"] in ("arithmetic", "memory")


def test_a_run_that_begins_from_another_has_its_model(model, tmp_path):
  source, other = tmp_path / "run", config(model)
  (source / "model").mkdir(parents=True)
  (source / "config.json").write_text(json.dumps(to_mapping(other)))
  (source / "finished.json").write_text("{}")
  asked = config("lab", init_from=str(source))
  found = algorithms.with_its_model(asked)
  assert (found.policy, found.init_from) == (str(source / "model"), "")
  # One that is not finished: what it began with has the same shapes.
  (source / "model").rmdir()
  begun = start.Source(source, 3, finished=False, config={})
  assert start.with_its_model(asked, begun, other).policy == model


def test_programs_of_a_run_are_counted_by_the_widths_of_its_texts(tmp_path):
  mapping = {"algorithm": "superhf", "num_prompts": 24, "max_length": 96}
  mapping |= {"sampling": {"length_buckets": (16, 32, 64, 128)}}
  spec = algorithms.describe(algorithms.read_config(mapping))
  shapes = {
    program.name: measure.shape_count(program, spec)
    for program in algorithms.programs(spec)
  }
  prompt = spec.rollout.prompt_length
  assert shapes["sample"] == 1 + sum(w < prompt for w in (16, 32, 64))
  assert shapes["update"] == 3  # 32, 64, 96
  # Whole calls, and smaller ones for the last texts of a length.
  assert shapes["score reward_model"] in range(2, 25, 2)
  (narrower,) = measure.narrower_updates(spec)
  assert narrower.arguments[3].text.tokens.shape[2] == 64


def refused(capsys, *argv):
  assert command.main(argv) == 2
  message = capsys.readouterr().err
  assert message.startswith("error: ")
  assert message.count("\n") == 1
  return message


def test_mistakes_are_told_before_anything_compiles(capsys, monkeypatch):
  monkeypatch.setenv("HF_HUB_OFFLINE", "1")
  lab = "--config=configs/superhf.py"
  assert "did you mean v6e-8?" in refused(capsys, lab, "--on=v6e-9")
  assert "--on is missing; give a target such as" in refused(capsys, lab)
  share = refused(capsys, lab, "--on=a6000", "--memory_share=75")
  assert "must be in (0, 1], got 75" in share


def test_a_model_that_is_not_here_says_what_to_give(tmp_path, monkeypatch):
  monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
  with pytest.raises(UserError) as caught:
    standins.stand_in(config("org/model"), tmp_path)
  assert "config.policy: org/model is not on this machine" in str(caught.value)
  assert "give --config.policy=FOLDER that holds one" in str(caught.value)
  mapping = {"reward_model": "lab/reward-train*0.5, org/judge"}
  online = algorithms.read_config({"algorithm": "superhf"} | mapping)
  with pytest.raises(UserError, match=r"config\.reward_model: org/judge"):
    standins.stand_in(online, tmp_path / "other")


def offline(*args, **kwargs):
  raise OSError("offline")


def test_what_is_here_is_left_alone(tmp_path):
  mapping = {"reward_model": "lab/reward-train*0.5,lab/reward-test"}
  online = algorithms.read_config({"algorithm": "superhf"} | mapping)
  there = standins.stand_in(online, tmp_path)
  assert there.notes == ()
  assert there.config.policy == "lab"
  assert there.config.reward_models == online.reward_models
  given = algorithms.read_config(
    {"algorithm": "superhf", "policy": str(LAB / "policy")}
  )
  assert standins.stand_in(given, tmp_path).config.policy == given.policy
  # Held-out rows that are not are left out, not fetched.
  fields = {"data": "lab", "validation_data": "org/held-out"}
  there = standins.stand_in(config("lab", **fields), tmp_path)
  assert (there.config.data, there.config.validation_data) == ("lab", "")
  assert there.notes == (
    "validation_data is not here and left out: org/held-out",
  )
