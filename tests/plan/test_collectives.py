"""Programs as XLA writes them, cut to what matters."""

import numpy as np
import pytest
from jax.sharding import AbstractMesh

from jaxalign.plan import collectives, hlo, roofline
from jaxalign.plan.targets import find

MESH = AbstractMesh((2, 2, 2), ("replica", "fsdp", "tensor"))
HEAD = "HloModule jit_step, is_scheduled=true\n"


def entry(*lines, before=""):
  body = "\n".join(f"  {line}" for line in lines)
  return f"{HEAD}{before}\nENTRY %main (p: f32[8]) -> f32[8] {{\n{body}\n}}\n"


def exchanged(*lines, part=8, before="", trips=1):
  module = hlo.parse(entry(*lines, before=before), trips)
  return collectives.of_module(module, MESH, part)


def test_axes_follow_from_groups_in_each_of_their_three_spellings():
  """A gather sends (n - 1) / n of its result, a reduction twice that."""
  found = exchanged(
    "%p = f32[8]{0} parameter(0)",
    "%a = f32[16]{0} all-gather(%p), channel_id=1, "
    "replica_groups={{0,2},{1,3},{4,6},{5,7}}, dimensions={0}",
    "%c = f32[8]{0} all-reduce(%p), channel_id=3, "
    "replica_groups=[4,2]<=[8], to_apply=%add",
    "ROOT %d = f32[8]{0} all-reduce(%p), channel_id=4, "
    "replica_groups=mesh['a'=4,'b'=2] {'a'}, to_apply=%add",
  )
  sent = {(x.kind, x.axis): x.bytes for x in found}
  assert sent["all-gather", "fsdp"] == 16 * 4 // 2
  assert sent["all-reduce", "tensor"] == 2 * 8 * 4 // 2
  assert sent["all-reduce", "replica+fsdp"] == 2 * 8 * 4 * 3 // 4


def test_groups_of_a_transposed_numbering():
  line = "replica_groups=[4,2]<=[2,2,2]T(2,1,0), dimensions={0}"
  groups = collectives._groups(line, 8)
  assert groups.tolist() == [[0, 4], [2, 6], [1, 5], [3, 7]]
  part = collectives._groups("replica_groups=mesh['a'=8] {'a':(2)2}", 8)
  assert part.tolist() == [[0, 2], [1, 3], [4, 6], [5, 7]]


LOOP = """
%body (s: (s32[], f32[8])) -> (s32[], f32[8]) {
  %s = (s32[], f32[8]{0}) parameter(0)
  %i = s32[] get-tuple-element(%s), index=0
  %x = f32[8]{0} get-tuple-element(%s), index=1
  %g = f32[16]{0} all-gather(%x), channel_id=7, replica_groups=[4,2]<=[8]
  ROOT %t = (s32[], f32[8]{0}) tuple(%i, %x)
}

%limit (s: (s32[], f32[8])) -> pred[] {
  %s.1 = (s32[], f32[8]{0}) parameter(0)
  %n = s32[]{:T(128)} constant(5)
  %j = s32[] get-tuple-element(%s.1), index=0
  ROOT %lt = pred[] compare(%j, %n), direction=LT
}

%open (s: (s32[], f32[8])) -> pred[] {
  %s.2 = (s32[], f32[8]{0}) parameter(0)
  ROOT %yes = pred[] constant(true)
}
"""


@pytest.mark.parametrize(
  ("line", "turns"),
  [
    ('condition=%open, body=%body, config={"known_trip_count":{"n":"3"}}', 3),
    ("condition=%limit, body=%body", 5),
    ("condition=%open, body=%body", 11),
  ],
)
def test_a_loop_runs_as_often_as_it_or_its_caller_says(line, turns):
  found = exchanged(
    "%p = f32[8]{0} parameter(0)",
    "%i = (s32[], f32[8]{0}) tuple(%p, %p)",
    f"%w = (s32[], f32[8]{{0}}) while(%i), {line}",
    "ROOT %o = f32[8]{0} get-tuple-element(%w), index=1",
    before=LOOP,
    trips=11,
  )
  assert [(x.count, x.bytes) for x in found] == [(turns, turns * 32)]


def test_an_exchange_spread_over_fusions_counts_once():
  """As a TPU's compiler overlaps it; so does the pair of start and done."""
  gather = "all-gather(%q), channel_id=9, replica_groups=[4,2]<=[8]"
  part = "%{0} (q: f32[8]) -> f32[16] {{\n  %q = f32[8]{{0}} parameter(0)\n"
  part += "  ROOT %g = f32[16]{{0}} " + gather + "\n}}\n"
  found = exchanged(
    "%p = f32[8]{0} parameter(0)",
    "%a = f32[16]{0} fusion(%p), kind=kCustom, calls=%one",
    "%b = f32[16]{0} fusion(%p), kind=kCustom, calls=%two",
    "%s = ((f32[8]{0}), (f32[16]{0})) all-gather-start(%p), channel_id=3, "
    "replica_groups=[4,2]<=[8]",
    "ROOT %e = (f32[16]{0}) all-gather-done(%s)",
    before=part.format("one") + part.format("two"),
  )
  assert [(x.kind, x.bytes, x.count) for x in found] == [("all-gather", 64, 2)]


def test_a_reduction_in_a_fusion_of_that_name_is_a_reduce_scatter():
  fused = """
%all-reduce-scatter.1 (q: f32[16]) -> f32[8] {
  %q = f32[16]{0} parameter(0)
  %r = f32[16]{0} all-reduce(%q), channel_id=2, replica_groups=[4,2]<=[8]
  ROOT %d = f32[8]{0} dynamic-slice(%r)
}
"""
  found = exchanged(
    "%p = f32[16]{0} parameter(0)",
    "ROOT %a = f32[8]{0} fusion(%p), kind=kCustom, calls=%all-reduce-scatter.1",
    before=fused,
  )
  assert [(x.kind, x.bytes) for x in found] == [("reduce-scatter", 32)]


FUSED = """
%slice (q: f32[6,16], i: s32[]) -> f32[6,16] {
  %q = f32[6,16]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %one = f32[1,16]{1,0} dynamic-slice(%q, %i, %i), dynamic_slice_sizes={1,16}
  ROOT %u = f32[6,16]{1,0} dynamic-update-slice(%q, %one, %i, %i)
}
"""
# A TPU's compiler puts fusions into fusions.
NESTED = """
%outer (j: s32[], r: f32[6,16]) -> f32[6,16] {
  %r = f32[6,16]{1,0} parameter(1)
  %j = s32[] parameter(0)
  ROOT %inner = f32[6,16]{1,0} fusion(%r, %j), kind=kLoop, calls=%slice
}
"""


@pytest.mark.parametrize(
  ("called", "before"),
  [
    ("(%p, %i), kind=kLoop, calls=%slice", FUSED),
    ("(%i, %p), kind=kOutput, calls=%outer", FUSED + NESTED),
  ],
)
def test_traffic_counts_a_slice_of_an_array_and_not_the_array(called, before):
  """Reads one of 6 layers (64 B), writes it in place; skips on-chip memory."""
  text = entry(
    "%p = f32[6,16]{1,0} parameter(0)",
    "%i = s32[] constant(0)",
    f"%f = f32[6,16]{{1,0}} fusion{called}",
    "%a = ((f32[6,16]{1,0}), f32[1,16]{1,0:S(1)}, s32[]{:S(2)}) "
    "slice-start(%f), slice={[0:1], [0:16]}",
    "ROOT %v = f32[6,16]{1,0:T(8,128)S(1)} copy(%f)",
    before=before,
  )
  module = hlo.parse(text, 1)
  moved = {
    line.name: module._moved(line, computation)
    for line, computation, _ in module.runs()
  }
  assert moved["f"] == 64 + 64 + 4  # and the index
  assert moved["a"] == 64
  assert moved["v"] == 6 * 16 * 4
  assert module.traffic() == sum(moved.values())


def test_links_by_shape_and_the_network_between_slices():
  """v5e: 50 GB/s a link one way, twice that where 16 chips close a ring."""
  slice_, pod = find("v5litepod-16"), find("v5litepod-256")
  assert roofline.link_rate(16, slice_) == 2 * 50e9
  assert roofline.link_rate(4, slice_) == 50e9
  assert roofline.link_rate(256, pod) == 2 * 2 * 50e9
  assert roofline.link_rate(8, find("8xh100")) == 450e9
  # Eight cards share eight network cards, one of each is used alone.
  two = find("2x8xh100")
  whole = collectives.Traffic("all-gather", "fsdp", 10**9, 8, 16, 1)
  alone = collectives.Traffic("all-reduce", "replica", 10**9, 1, 2, 1)
  assert roofline.exchange_seconds(whole, two) == 1e9 / 400e9
  assert roofline.exchange_seconds(alone, two) == 1e9 / 50e9


def test_groups_that_cross_a_node_are_known_by_their_places():
  line = "replica_groups=[2,4]<=[4,2]T(1,0), dimensions={0}"
  (found,) = exchanged(
    "%p = f32[8]{0} parameter(0)",
    f"ROOT %a = f32[32]{{0}} all-gather(%p), channel_id=1, {line}",
    part=4,
  )
  assert (found.axis, found.part, found.size) == ("replica+fsdp", 2, 4)
  assert found.crosses
  assert np.isclose(found.bytes, 32 * 4 * 3 / 4)
