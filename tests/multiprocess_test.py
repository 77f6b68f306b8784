"""Real processes make one run: the same numbers, one checkpoint, one end."""

import json
import math
import re
import shutil
import signal

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from small_cache import make_texts, write_small_cache
from small_job import SMALL_RUN, Job, fail

# (processes, devices of each): always the same mesh of eight.
FORMS = ((1, 8), (2, 4), (4, 2))
STEPS = 8
SENTENCE = 'The river runs past an old mill, and the boat waits there for wind.'


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  path = tmp_path_factory.mktemp('data') / 'cache'
  texts = {'train': make_texts(60, 0), 'validation': [SENTENCE] * 30}
  write_small_cache(path, texts=texts)
  return path


def pretrain(cache, workdir, *more):
  data = f'--gin.DataConfig.cache_dir={cache}'
  return ['pretrain', *SMALL_RUN, data, f'--workdir={workdir}', *more]


@pytest.fixture(scope='module')
def runs(cache, tmp_path_factory):
  """Returns the work directories of a whole run in each form."""
  folder = tmp_path_factory.mktemp('runs')
  for processes, devices in FORMS:
    workdir = folder / str(processes)
    ended = Job(
      pretrain(cache, workdir), processes=processes, devices=devices
    ).succeed()
    job = f': {processes} processes, 8 devices' if processes > 1 else ''
    assert f'data 2 x expert 2 x model 2 on cpu{job}\n' in ended[0].out
    assert [one.out for one in ended[1:]] == [''] * (processes - 1)
    assert [one.err for one in ended] == [''] * processes
  return {processes: folder / str(processes) for processes, _ in FORMS}


def curves(workdir):
  """Returns the lines of metrics.jsonl that do not hold times."""
  lines = (workdir / 'metrics.jsonl').read_text().splitlines()
  return [line for line in lines if '"tokens_per_second"' not in line]


def parameters(workdir, step=STEPS):
  path = workdir / 'checkpoints' / str(step) / 'params'
  with ocp.PyTreeCheckpointer() as reader:
    names = reader.metadata(path).item_metadata.tree
    whole = jax.tree.map(
      lambda _: ocp.RestoreArgs(restore_type=np.ndarray), names
    )
    return reader.restore(path, restore_args=whole)


def assert_close_curves(workdir, expected):
  ours, theirs = (list(map(json.loads, curves(w))) for w in (workdir, expected))
  assert [row['step'] for row in ours] == [row['step'] for row in theirs]
  for row, other in zip(ours, theirs, strict=True):
    assert row.keys() == other.keys()
    for name in ('loss', 'eval/loss', 'gradient_norm'):
      if name in row:
        assert math.isclose(row[name], other[name], rel_tol=1e-5), (name, row)


def assert_same_run(workdir, expected):
  assert curves(workdir) == curves(expected)
  jax.tree.map(
    np.testing.assert_array_equal, parameters(workdir), parameters(expected)
  )


@pytest.mark.slow
def test_one_two_and_four_processes_train_the_same_model(runs):
  assert len(curves(runs[1])) == STEPS + 2
  assert_close_curves(runs[2], runs[1])
  # Among processes sums have one order, within a process another.
  assert_same_run(runs[4], runs[2])
  summaries = [
    json.loads((run / 'summary.json').read_text()) for run in runs.values()
  ]
  for summary in summaries[1:]:
    for name, value in summaries[0].items():
      if name.startswith('eval/'):
        assert math.isclose(summary[name], value, rel_tol=1e-5), name
  record = json.loads((runs[4] / 'run.json').read_text())
  assert record['processes'] == 4


@pytest.mark.slow
@pytest.mark.parametrize(
  ('before', 'after'), [(1, 2), (1, 4), (2, 1), (2, 4), (4, 1), (4, 2)]
)
def test_a_checkpoint_goes_on_in_any_number_of_processes(
  runs, cache, tmp_path, before, after
):
  workdir = tmp_path / 'run'
  shutil.copytree(runs[before], workdir)
  shutil.rmtree(workdir / 'checkpoints' / str(STEPS))
  (ended, *_) = Job(
    pretrain(cache, workdir), processes=after, devices=8 // after
  ).succeed()
  assert f'resumed at step {STEPS // 2}' in ended.out
  assert_close_curves(workdir, runs[before])


def saved_steps(workdir):
  folders = (workdir / 'checkpoints').iterdir()
  return sorted(int(path.name) for path in folders)


def stopped_at(ended):
  """Returns the step that process 0 says was saved."""
  found = re.search(r'SIGTERM: saved step (\d+); resume', ended[0].out)
  assert found and ended[1].out == '', ended
  return int(found[1])


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_the_run_goes_on_bitwise(
  runs, cache, tmp_path
):
  command = pretrain(cache, tmp_path, '--gin.RunConfig.num_samples=1')
  job = Job(command, processes=2, devices=4)
  job.wait_until((tmp_path / '.lock').exists)  # all have joined
  job.send(signal.SIGTERM, 1)
  ended = job.succeed()
  assert saved_steps(tmp_path) == [stopped_at(ended)]
  assert saved_steps(tmp_path)[0] < STEPS
  assert f'pretrain --workdir={tmp_path} --coordinator' in ended[0].out
  Job(command, processes=2, devices=4).succeed()
  assert_same_run(tmp_path, runs[2])
  (sample,) = json.loads((tmp_path / 'summary.json').read_text())['samples']
  assert 'past an old mill' in sample['masked']


@pytest.mark.slow
def test_signals_and_death_amid_a_long_run(cache, tmp_path):
  metrics = tmp_path / 'metrics.jsonl'
  command = pretrain(
    cache,
    tmp_path,
    '--gin.STEPS=1000000',
    '--gin.MeshConfig.expert=1',
    '--gin.MeshConfig.model=1',
  )

  def running(lines):
    job = Job(command, processes=2, devices=1)
    job.wait_until(lambda: metrics.exists() and lines_in(metrics) > lines)
    return job

  def lines_in(path):
    return path.read_bytes().count(b'\n')

  job = running(5)
  job.send(signal.SIGTERM, 0, 1)
  step = stopped_at(job.succeed())
  assert step > 2 and saved_steps(tmp_path)[-1] == step
  job = running(lines_in(metrics) + 1)  # step counters begin at `step` now
  job.send(signal.SIGINT, 1)
  last = stopped_at(job.succeed())
  assert last > step and saved_steps(tmp_path)[-1] == last
  job = running(lines_in(metrics) + 1)
  job.send(signal.SIGKILL, 1)
  ended, killed = job.end()
  assert killed.status == -signal.SIGKILL
  # gloo says so at once, else JAX does after 100 seconds.
  assert ended.status not in (0, 2), ended


@pytest.mark.slow
def test_evaluate_in_two_processes(runs, tmp_path):
  workdir = tmp_path / 'run'
  shutil.copytree(runs[1], workdir)
  # Both hold parts of the same rows: they read the same.
  mesh = [f'--gin.MeshConfig.{k}' for k in ('data=1', 'expert=1', 'model=4')]
  ended = Job(
    ['evaluate', f'--workdir={workdir}', *mesh], processes=2, devices=2
  ).succeed()
  (line,) = (workdir / 'evaluations.jsonl').read_text().splitlines()
  expected = json.loads((workdir / 'summary.json').read_text())
  for name in ('eval/loss', 'eval/neg_log_perplexity', 'eval/text_tokens'):
    assert math.isclose(json.loads(line)[name], expected[name], rel_tol=1e-5)
  assert 'eval/loss' in ended[0].out and ended[1].out == ''


@pytest.mark.slow
def test_each_process_records_the_rows_it_read(cache, tmp_path):
  # Any loss above that of two steps is a spike.
  spiky = [
    '--gin.HealthConfig.spike_window=2',
    '--gin.HealthConfig.spike_deviations=0.0001',
    '--gin.HealthConfig.history_steps=3',
    '--gin.LEARNING_RATE=3.0',
  ]
  found = []
  for processes in (1, 2):
    workdir = tmp_path / str(processes)
    ended = Job(
      pretrain(cache, workdir, *spiky),
      processes=processes,
      devices=8 // processes,
    ).succeed()
    assert 'standard deviations above the mean' in ended[0].err
    assert [one.err for one in ended[1:]] == [''] * (processes - 1)
    folder = workdir / 'alarms'
    (name,) = [path.stem for path in sorted(folder.glob('*.json'))][:1]
    parts = [np.load(folder / f'{name}.npz')]
    if processes == 2:
      parts.append(np.load(folder / f'{name}.process_1.npz'))
    key = 'batch/encoder_input_tokens'
    found.append((name, np.concatenate([part[key] for part in parts], axis=1)))
  (alone, whole), (together, joined) = found
  assert alone == together
  assert whole.shape == (3, 8, 32)
  np.testing.assert_array_equal(joined, whole)


@pytest.mark.slow
def test_trace_in_two_processes(runs, tmp_path):
  found = []
  for processes in (1, 2):
    output = tmp_path / str(processes)
    ended = Job(
      ['trace', f'--checkpoint={runs[1]}', f'--output={output}'],
      processes=processes,
      devices=8 // processes,
    ).succeed()
    assert 'page: ' in ended[0].out
    assert [one.out for one in ended[1:]] == [''] * (processes - 1)
    found.append(json.loads((output / 'trace.json').read_text()))
  assert found[0]['rows'][7] == found[1]['rows'][7]  # of the second process
  assert found[0]['stacks'] == found[1]['stacks']


def test_processes_that_disagree_are_refused_together(cache, tmp_path):
  workdir = tmp_path / 'run'
  lines = fail(pretrain(cache, workdir), own={1: ['--gin.BATCH_SIZE=16']})
  assert lines == 2 * [
    'error: process 1 has RunConfig.batch_size = 16, process 0 has 8; start '
    'every process with the same flags'
  ]
  assert not workdir.exists()


def test_an_error_of_one_process_ends_all(cache, tmp_path):
  elsewhere = tmp_path / 'elsewhere'
  elsewhere.mkdir()
  workdir = tmp_path / 'run'
  # The same flags; process 1 begins where there is no cache.
  lines = fail(
    pretrain(cache.name, workdir), folders={0: cache.parent, 1: elsewhere}
  )
  assert lines == 2 * [
    f'error: process 1: cache {cache.name} does not exist; make it with '
    '`st_moe cache`'
  ]
  assert not workdir.exists()
  lines = fail(
    pretrain(cache, workdir), own={1: [f'--workdir={tmp_path / "other"}']}
  )
  assert lines == 2 * [
    f'error: process 1: --workdir={tmp_path / "other"} is another directory '
    'here than for process 0; all processes need the same one, on a file '
    'system that they share'
  ]
  assert not workdir.exists()
