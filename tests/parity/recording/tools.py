"""Random tensors, a toy model, trainers without `__init__`, and the files."""

import json
import pathlib
import types

import numpy as np
import torch
import trl

FOLDER = pathlib.Path(__file__).parents[1] / "trl"
WORDS, PLACES = 6, 8
some = types.SimpleNamespace


class Draws:
  """Random tensors, one after the other, from a seed."""

  def __init__(self, seed):
    self.generator = torch.Generator().manual_seed(seed)

  def normal(self, *shape, scale=1.0):
    return scale * torch.randn(shape, generator=self.generator)

  def ids(self, count):
    """Token ids; 0 is left for padding."""
    return torch.randint(1, WORDS, (count,), generator=self.generator)

  def texts(self, *lengths):
    return [[self.ids(n).tolist() for n in parts] for parts in lengths]

  def tables(self, width=WORDS, near=None, scale=1.0):
    """Parameters of a `Sum`; with `near`, those of one near another."""
    sizes = {"words": WORDS, "places": PLACES}
    new = {k: self.normal(n, width, scale=scale) for k, n in sizes.items()}
    return {k: near[k] + x for k, x in new.items()} if near else new


class Sum(torch.nn.Module):
  """Next-token logits = a row of the token + a row of its place in the text.

  A column beyond the words is the value of the state.
  """

  is_gradient_checkpointing = False

  def __init__(self, tables):
    super().__init__()
    for name, table in tables.items():
      self.register_parameter(name, torch.nn.Parameter(table.clone()))
    self.config = some(get_text_config=some)

  def base_model(self, input_ids, attention_mask, **_):
    place = (attention_mask.cumsum(1) - 1).clamp(min=0)
    return some(last_hidden_state=self.words[input_ids] + self.places[place])

  def forward(self, input_ids, attention_mask, **_):
    states = self.base_model(input_ids, attention_mask).last_hidden_state
    return states[..., :WORDS], None, states[..., WORDS:].sum(-1)

  def get_output_embeddings(self):
    return some(weight=torch.eye(WORDS), bias=None)

  def move(self, tables):
    for name, parameter in self.named_parameters():
      parameter.data = tables[name].clone()

  def gradient(self):
    """That of the last backward pass, which it forgets."""
    found = {name: x.grad.clone() for name, x in self.named_parameters()}
    self.zero_grad()
    return found


def bare(kind, **attributes):
  """A trainer that has only these attributes."""
  trainer = object.__new__(kind)
  for name, value in attributes.items():
    setattr(trainer, name, value)
  return trainer


def spans(*rows, width):
  """A mask of [B, width] from (start, length) a row."""
  column = torch.arange(width)
  return torch.stack([(column >= a) & (column < a + n) for a, n in rows])


def plain(x):
  """Nested lists; float32 in the fewest digits that give it back exactly."""
  if isinstance(x, torch.Tensor):
    x = x.detach().numpy()
  if isinstance(x, dict):
    return {name: plain(y) for name, y in x.items()}
  if isinstance(x, list | tuple) or np.ndim(x):
    return [plain(y) for y in x]
  if isinstance(x, np.ndarray | np.generic):
    x = x[()]
    return float(str(np.float32(x))) if x.dtype.kind == "f" else x.item()
  return x


def laid_out(tree, indent=0):
  """JSON with an entry a line, however long its list is."""
  if not isinstance(tree, dict):
    return json.dumps(tree)
  space = "\n" + " " * (indent + 1)
  lines = [
    f"{json.dumps(name)}: {laid_out(x, indent + 1)}" for name, x in tree.items()
  ]
  return "{" + space + ("," + space).join(lines) + "\n" + " " * indent + "}"


def write(name, **found):
  versions = {"trl": trl.__version__, "torch": torch.__version__}
  FOLDER.mkdir(exist_ok=True)
  path = FOLDER / f"{name}.json"
  path.write_text(laid_out(plain(versions | found)) + "\n")
  print(f"{path}: {path.stat().st_size} bytes")
