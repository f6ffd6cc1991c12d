"""The model card's front matter and tables."""

import json

import pytest
import yaml

from jaxalign.models.hf import card


@pytest.fixture
def written(tmp_path):
  def write(model=None, **arguments):
    model = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"} | (
      model or {}
    )
    (tmp_path / "config.json").write_text(json.dumps(model))
    card.write(tmp_path, **arguments)
    text = (tmp_path / "README.md").read_text()
    _, front, body = text.split("---\n", 2)
    return yaml.safe_load(front), body

  return write


def test_front_matter_of_a_run(written):
  config = {
    "algorithm": "superhf",
    "policy": "EleutherAI/pythia-1b@step143000",
    "data": "a/b@alpaca, a/c:x@sharegpt",
    "prompts": {"source": "Anthropic/hh-rlhf:harmless-base,my/rows.jsonl"},
  }
  front, body = written(config=config, metrics={"score/mean": 1.25, "x": "no"})
  assert front["license"] == "other"
  assert front["base_model"] == "EleutherAI/pythia-1b"
  assert front["datasets"] == ["a/b", "a/c", "Anthropic/hh-rlhf"]
  assert front["pipeline_tag"] == "text-generation"
  assert front["tags"] == ["jaxalign", "superhf"]
  assert "| score/mean | 1.25 |" in body
  assert "| x |" not in body
  assert "my/rows.jsonl" in body


@pytest.mark.parametrize("name", ["lab", "lab/policy", "runs/x", "my/model"])
def test_a_local_name_is_no_hub_id(written, name, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  (tmp_path / "my" / "model").mkdir(parents=True)
  config = {"policy": name, "data": f"{name}:train@alpaca"}
  front, body = written(config=config, license="apache-2.0")
  assert not {"base_model", "datasets"} & front.keys()
  assert front["license"] == "apache-2.0"
  assert f"from {name}" in body


def test_a_mean_head_is_pointed_out(written):
  model = {
    "architectures": ["LlamaForSequenceClassification"],
    "jaxalign_head": "score_mean",
  }
  front, body = written(model)
  assert front["pipeline_tag"] == "text-classification"
  assert "mean state" in body
