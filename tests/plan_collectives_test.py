"""The collectives of compiled programs, against those the programs ask for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.experimental.compilation_cache import compilation_cache
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from st_moe.plan import collectives, devices
from st_moe.plan.collectives import Collective, group_of, read_collectives
from st_moe.plan.targets import CHIPS, parse_target

AXES = ('slice', 'data', 'expert', 'model')


def mesh_of(sizes, found):
  found = np.array(found).reshape(sizes)
  return jax.sharding.Mesh(found, AXES, axis_types=(AxisType.Auto,) * 4)


@pytest.fixture(scope='module')
def mesh():
  return mesh_of((1, 2, 4, 1), jax.devices())


def traffic(body, mesh, shape=(64, 16)):
  """Reads a program that runs `body` on f32[shape] of each device."""
  spec = P(('data', 'expert'))
  mapped = jax.shard_map(
    body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
  )
  whole = jax.ShapeDtypeStruct((8 * shape[0], *shape[1:]), jnp.float32)
  text = jax.jit(mapped).lower(whole).compile().as_text()
  return read_collectives(text, collectives.layout(mesh))


def facts(found):
  """Returns {kind: (executions, bytes, group size, axes)}, one of each kind."""
  assert len({c.kind for c in found.collectives}) == len(found.collectives)
  return {
    c.kind: (c.count, c.bytes, c.group_size, c.axes) for c in found.collectives
  }


def test_each_kind(mesh):
  def body(x):  # f32[64, 16] is 4096 bytes
    x = lax.all_to_all(x, 'expert', 0, 0, tiled=True)
    x = lax.all_gather(x, 'data', tiled=True)
    x = lax.psum_scatter(x, 'expert', tiled=True)
    x = lax.ppermute(x, 'expert', [(0, 1), (1, 2), (2, 3), (3, 0)])
    return lax.psum(x, ('data', 'expert'))

  found = traffic(body, mesh)
  assert facts(found) == {
    'all-to-all': (1, 4096, 4, ('expert',)),
    'all-gather': (1, 8192, 2, ('data',)),
    'reduce-scatter': (1, 2048, 4, ('expert',)),
    'collective-permute': (1, 2048, 2, ('expert',)),
    'all-reduce': (1, 2048, 8, ('data', 'expert')),
  }
  assert found.unknown_loops == 0
  assert [c.shape for c in found.largest(1)] == ['f32[128,16]']
  names = {c.kind: c.op_name.rsplit('/')[-1] for c in found.collectives}
  assert names['all-gather'] == 'all_gather'
  assert names['reduce-scatter'] == 'reduce_scatter'
  assert not any(c.over_network for c in found.collectives)


def test_scans_multiply(mesh):
  def inner(x, _):
    return lax.psum(x, 'expert') * 0.5, None

  def outer(x, _):
    x, _ = lax.scan(inner, x, None, length=5)
    return lax.all_to_all(x, 'expert', 0, 0, tiled=True), None

  def body(x):
    x, _ = lax.scan(outer, x, None, length=3)
    return x

  found = traffic(body, mesh)
  assert facts(found) == {
    'all-reduce': (15, 4096, 4, ('expert',)),
    'all-to-all': (3, 4096, 4, ('expert',)),
  }
  assert found.unknown_loops == 0
  assert found.bytes_by_kind() == {'all-reduce': 61440, 'all-to-all': 12288}
  assert found.counts_by_kind() == {'all-reduce': 15, 'all-to-all': 3}


def test_a_loop_without_an_end_counts_as_one_and_is_named(mesh):
  def inner(x, _):
    return lax.psum(x, 'expert'), None

  def body(x):
    return lax.while_loop(
      lambda x: x.sum() < 100,
      lambda x: lax.scan(inner, x, None, length=5)[0],
      x,
    )

  found = traffic(body, mesh)
  assert facts(found) == {'all-reduce': (5, 4096, 4, ('expert',))}
  assert found.unknown_loops == 1


def test_branches_count_each(mesh):
  def body(x):
    return lax.cond(
      x.sum() > 0, lambda x: lax.pmax(x, 'data'), lambda x: x * 2, x
    )

  assert facts(traffic(body, mesh)) == {
    'all-reduce': (1, 4096, 2, ('data',)),
  }


def test_a_step_of_two_and_a_beginning_are_read():
  # As XLA writes loops on TPU: no count of its own, the first trip peeled off,
  # two steps in one.
  text = """HloModule step, num_partitions=8

%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {
  %p = (s32[], f32[8]{0}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %x = f32[8]{0} get-tuple-element(%p), index=1
  %two = s32[]{:T(128)} constant(2)
  %sum = f32[8]{0} all-reduce(%x), replica_groups=[2,4]<=[8], to_apply=%add
  %next = s32[]{:T(128)} add(%i, %two)
  ROOT %t = (s32[], f32[8]{0}) tuple(%next, %sum)
}

%condition (p: (s32[], f32[8])) -> pred[] {
  %p = (s32[], f32[8]{0}) parameter(0)
  %bound = s32[]{:T(128)} constant(8)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %bound), direction=LT
}

ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {
  %x = f32[8]{0} parameter(0)
  %one = s32[]{:T(128)} constant(1)
  %first = s32[]{:T(128)} copy(%one)
  %t = (s32[], /*index=1*/f32[8]{0}) tuple(%first, /*index=1*/%x)
  ROOT %w = (s32[], f32[8]{0}) while(%t), condition=%condition, body=%body
}
"""
  found = read_collectives(text)  # 1, 3, 5, 7
  assert facts(found) == {'all-reduce': (4, 32, 4, ())}
  assert found.unknown_loops == 0
  down = read_collectives(text.replace('direction=LT', 'direction=GT'))
  assert facts(down) == {'all-reduce': (1, 32, 4, ())}
  assert down.unknown_loops == 1


ENTRY = (
  'HloModule m, num_partitions=4\n\nENTRY %main () -> f32[] {{\n  {}\n}}\n'
)


@pytest.mark.parametrize(
  ('line', 'kind', 'size', 'shape'),
  [
    (
      '%a = (bf16[2,8]{1,0}, bf16[8,8]{1,0}) all-gather-start(%x), '
      'dimensions={0}',
      'all-gather',
      128,
      'bf16[8,8]',
    ),
    (
      '%a = ((f32[2], s8[2]), (f32[8]{0:T(256)}, s8[8])) all-gather-start(%x, '
      '%y), dimensions={0}',
      'all-gather',
      40,
      'f32[8] and 1 more',
    ),
    (
      '%a = (f32[8], pred[16]) all-reduce-start(%x, %y), to_apply=%add',
      'all-reduce',
      48,
      'f32[8] and 1 more',
    ),
    (
      '%a = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), '
      'source_target_pairs={{0,1},{1,0}}',
      'collective-permute',
      32,
      'f32[8]',
    ),
  ],
)
def test_what_only_starts_is_counted_by_its_result(line, kind, size, shape):
  (found,) = read_collectives(ENTRY.format(line)).collectives
  assert (found.kind, found.bytes, found.shape) == (kind, size, shape)


@pytest.mark.parametrize(
  ('groups', 'first'),
  [
    ('replica_groups={{3,1},{0,2}}', [3, 1]),
    ('replica_groups={}', [0, 1, 2, 3, 4, 5, 6, 7]),
    ('replica_groups=[2,4]<=[8]', [0, 1, 2, 3]),
    ('replica_groups=[4,2]<=[2,4]T(1,0)', [0, 4]),
    ("replica_groups=mesh['a'=2,'b'=4] {'b'}", [0, 1, 2, 3]),
    ("replica_groups=mesh['a'=2,'b'=4] {'a','b'}", [0, 1, 2, 3, 4, 5, 6, 7]),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}",
      [0, 1, 2, 3],
    ),
    (
      "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
      [0, 4],
    ),
    ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
    ('source_target_pairs={{0,2},{2,0}}', [0, 2]),
  ],
)
def test_groups(groups, first):
  assert group_of(f'%a = f32[8] all-reduce(%x), {groups}, a=b', 8) == first


def moved(kind, size, group, local, count=1):
  return Collective(kind, size, 'f32[]', group, local, (), '', count)


def test_seconds_are_those_of_a_ring():
  chip = CHIPS['h100']  # 450e9 bytes/s a GPU, 400e9 bytes/s a node of 8
  giga = 10**9
  for kind, link in {
    'all-gather': 0.75,
    'all-to-all': 0.75,
    'reduce-scatter': 3,
    'all-reduce': 1.5,
    'collective-permute': 1,
  }.items():
    inside = collectives.link_seconds([moved(kind, giga, 4, 4, 3)], chip)
    assert inside.interconnect == pytest.approx(3 * link * giga / 450e9), kind
    assert inside.network == 0
  # Of a ring through whole nodes one link leaves each; of eight rings, eight.
  whole = collectives.link_seconds([moved('all-gather', giga, 16, 8)], chip)
  assert whole.network == pytest.approx(15 / 16 * giga / 400e9)
  eight = collectives.link_seconds([moved('all-gather', giga, 2, 1)], chip)
  assert eight.network == pytest.approx(8 / 2 * giga / 400e9)
  # Half of what each of the eight holds is for the other node.
  across = collectives.link_seconds([moved('all-to-all', giga, 16, 8)], chip)
  assert across.network == pytest.approx(8 / 2 * giga / 400e9)


def test_no_rate_no_seconds():
  crossing = [moved('all-reduce', 8, 2, 1)]
  assert collectives.link_seconds(crossing, CHIPS['v4']).network is None
  assert collectives.link_seconds([], CHIPS['v4']).network == 0


def tpu_program(target, layers=5):
  """Compiles a scan of a dense and an expert layer, with gradients."""
  d = 1024
  mesh = mesh_of((target.slices, 2, 8, 1), devices.describe_devices(target))
  rows = ('slice', 'data', 'expert')

  def on(*axes):
    return NamedSharding(mesh, P(*axes))

  def layer(x, weights):
    dense, experts = (w.astype(x.dtype) for w in weights)
    x = x + jax.nn.relu(x @ dense)
    y = x.reshape(target.devices, 8, -1, d).transpose(1, 0, 2, 3)
    y = lax.with_sharding_constraint(y, on('expert', ('slice', 'data')))
    y = jnp.einsum('egsd,edf->egsf', y, experts).transpose(1, 0, 2, 3)
    y = lax.with_sharding_constraint(y, on(rows))
    return x + y.reshape(x.shape), None

  def loss(weights, x):
    x, _ = lax.scan(jax.checkpoint(layer), x, weights)
    return jnp.mean(jnp.square(x.astype(jnp.float32)))

  def shape(*sizes, axes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype, sharding=on(*axes))

  weights = (
    shape(layers, d, d, axes=(None, 'expert')),
    shape(layers, 8, d, d, axes=(None, 'expert', 'data')),
  )
  x = shape(256 * target.devices, d, axes=(rows,), dtype=jnp.bfloat16)
  step = jax.jit(jax.grad(loss), out_shardings=(on(None, 'expert'),) * 2)
  text = step.lower(weights, x).compile().as_text()
  return text, read_collectives(text, collectives.layout(mesh))


@pytest.fixture
def libtpu(monkeypatch):
  pytest.importorskip('libtpu')
  for name, value in devices.TPU_ENVIRONMENT.items():
    monkeypatch.setenv(name, value)
  # Programs for devices that are not there cannot be read back from a cache.
  jax.config.update('jax_enable_compilation_cache', False)
  compilation_cache.reset_cache()
  yield
  jax.config.update('jax_enable_compilation_cache', True)
  compilation_cache.reset_cache()


def test_a_program_for_tpu(libtpu):
  text, found = tpu_program(parse_target('v5e:4x4'))
  assert found.unknown_loops == 0
  assert {c.count for c in found.collectives} == {5}  # layers, each way once
  gathers = [line for line in text.splitlines() if ' all-gather(' in line]
  chains = text.count('custom_call_target="AsyncCollectiveStart"')
  plain = sum('async_collective_fusion' not in line for line in gathers)
  assert chains > 0 and len(gathers) > chains + plain
  assert found.counts_by_kind()['all-gather'] == 5 * (chains + plain)
  # Dense kernels: gathered whole, gradients scattered over the experts' axis.
  kernel = 1024 * 1024 * 2  # bytes in bfloat16
  by_kind = {(c.kind, c.bytes, c.axes) for c in found.collectives}
  assert ('all-gather', kernel, ('expert',)) in by_kind
  assert ('reduce-scatter', kernel // 8, ('expert',)) in by_kind
  # Rows go to the experts and back: 256 of each device.
  assert {
    (c.bytes, c.axes) for c in found.collectives if c.kind == 'all-to-all'
  } == {(256 * 1024 * 2, ('expert',))}
  assert not any(c.over_network for c in found.collectives)


def test_a_program_for_two_slices(libtpu):
  _, found = tpu_program(parse_target('v5e:4x4', slices=2))
  assert found.unknown_loops == 0
  between = [c for c in found.collectives if c.over_network]
  assert {(c.axes, c.group_size, c.local_size) for c in between} == {
    (('slice',), 2, 1)
  }
  # Gradients of dense kernels, after they are scattered within a slice.
  sums = [c for c in between if c.kind == 'all-reduce']
  assert sum(c.count for c in sums) % 5 == 0 and sums
  assert all(c.bytes < 1024 * 1024 * 2 for c in sums)
  assert 'slice' not in {
    axis for c in found.collectives if not c.over_network for axis in c.axes
  }
