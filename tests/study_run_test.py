"""A whole study on a tiny model: killed, started again, and reported."""

import json
import shutil
import signal

import pytest
from small_cache import make_texts, write_small_cache
from small_job import Job

from st_moe.main import main

ARMS = {
  'plain': 'RouterConfig.jitter = 0.0',
  'jitter': 'RouterConfig.jitter = 0.1',
  'wide': 'RouterConfig.eval_capacity_factor = 4.0',  # trained as plain
  'broken': 'RouterConfig.z_loss_weight = 1e38',
}
DECLARATION = """
title = 'Four arms'
paper = 'Table 99'
metric = 'neg_log_perplexity'
reference = 'plain'
notes = ['A note.']
arms = [
  { name = 'plain', paper = { value = -1.5, sd = 0.1, stable = [4, 6] } },
  { name = 'jitter', paper = -1.6 },
  { name = 'wide' },
  { name = 'broken' },
]

[scales.tiny]
STEPS = 8
BATCH_SIZE = 8
VOCABULARY = 'byte'
"OptimizerConfig.warmup_steps" = 1
"ModelConfig.vocab_size" = 384
"ModelConfig.d_model" = 16
"ModelConfig.d_ff" = 16
"ModelConfig.d_kv" = 8
"ModelConfig.num_heads" = 2
"ModelConfig.num_experts" = 4
"ModelConfig.num_encoder_layers" = 1
"ModelConfig.num_decoder_layers" = 1
"ModelConfig.sparse_every" = 1
"DataConfig.inputs_length" = 32
"DataConfig.targets_length" = 14
"RunConfig.log_every" = 2
"RunConfig.eval_every" = 4
"RunConfig.eval_batches" = 1
"RunConfig.checkpoint_every" = 4
"RunConfig.max_nonfinite_steps" = 3

[[claims]]
text = 'Jitter does no harm'
contrast = { jitter = 1, plain = -1 }
expects = 'not_below'
margin = 9.0

[[claims]]
text = 'What breaks is less stable'
contrast = { plain = 1, broken = -1 }
expects = 'above'
metric = 'stable'
"""


@pytest.fixture(scope='module')
def argv(tmp_path_factory) -> list[str]:
  folder = tmp_path_factory.mktemp('study')
  for name, line in ARMS.items():
    (folder / f'{name}.gin').write_text(f'# An arm.\n{line}\n')
  (folder / 'study.toml').write_text(DECLARATION)
  cache = folder / 'cache'
  write_small_cache(
    cache, texts={'train': make_texts(300, 0), 'validation': make_texts(40, 1)}
  )
  return [
    'study',
    str(folder),
    '--seeds=2',
    '--gin.TASK=cache',
    f'--gin.DataConfig.cache_dir={cache}',
  ]


def start(argv, workdir):
  return Job([*argv, f'--workdir={workdir}'], processes=1, devices=1)


def kill_when(job, ready):
  job.wait_until(ready)
  job.send(signal.SIGKILL, 0)
  assert job.end()[0].status == -signal.SIGKILL


def files_of(workdir):
  return {
    path.name: path.read_bytes() for path in (workdir / 'report').iterdir()
  }


@pytest.mark.slow
def test_a_study_killed_twice_gives_the_same_report(
  argv, tmp_path, capsys, monkeypatch
):
  monkeypatch.delenv('JAX_COMPILATION_CACHE_DIR')
  whole, broken = tmp_path / 'whole', tmp_path / 'broken'
  (ended,) = start(argv, whole).succeed()
  saved = broken / 'runs' / 'plain' / 'seed_0' / 'checkpoints' / '4'
  kill_when(start(argv, broken), saved.exists)
  result = broken / 'results' / 'jitter' / 'seed_0.json'
  assert not result.exists()
  kill_when(start(argv, broken), result.exists)
  assert not (broken / 'report').exists()
  (again,) = start(argv, broken).succeed()
  assert files_of(broken) == files_of(whole)

  # What is seen: one line a run, a run that diverged among them.
  lines = ended.out.splitlines()
  assert (
    'run 1/6  plain  seed 0' in lines and 'run 6/6  broken  seed 1' in lines
  )
  assert any(line.startswith('  broken  seed 0  unstable: ') for line in lines)
  assert 'run 1/6  plain  seed 0' not in again.out.splitlines()

  # What is reported.
  report = json.loads((whole / 'report' / 'report.json').read_text())
  arms = {arm['name']: arm for arm in report['arms']}
  assert [arm['stable_runs'] for arm in arms.values()] == [2, 2, 2, 0]
  assert arms['broken']['mean'] is None and arms['broken']['runs'] == 2
  assert (
    'had a loss or gradients that are not finite'
    in (arms['broken']['unstable']['0'])
  )
  assert [claim['verdict'] for claim in report['claims']] == [
    'agrees',
    'not resolved at this scale',
  ]
  values = arms['plain']['values']
  assert arms['plain']['mean'] == pytest.approx(sum(values.values()) / 2)
  assert arms['wide']['values'] != values  # the same weights, more capacity
  assert arms['wide']['curve'] == arms['plain']['curve']
  assert report['warnings'] == []
  assert set(files_of(whole)) == {
    'report.json', 'report.md', 'index.html',
    'arms.png', 'claims.png', 'curves.png',
  }  # fmt: skip

  # Seeds differ in no program.
  programs = [path.name for path in (whole / 'compiled').iterdir()]
  steps = [name for name in programs if name.startswith('jit_train_step')]
  assert len(steps) == 3

  # Results of two machines, merged by copying, are those of one.
  merged = tmp_path / 'merged'
  merged.mkdir()
  shutil.copy(broken / 'study.json', merged)
  for folder in sorted((broken / 'results').iterdir()):
    shutil.copytree(folder, merged / 'results' / folder.name)
    if folder.name == 'broken':  # reported with what is there
      capsys.readouterr()
      assert main(['study', 'report', str(merged)]) == 0
      assert 'missing are all of plain, jitter, wide' in capsys.readouterr().out
  assert main(['study', 'report', str(merged)]) == 0
  assert files_of(merged) == files_of(whole)

  # Another study does not go on in this folder, nor with other settings.
  other = [*argv, '--gin.STEPS=9', f'--workdir={whole}']
  assert main(other) == 2
  error = capsys.readouterr().err
  assert 'holds the study of another command, `st_moe study' in error
  assert '--gin.STEPS=9' not in error  # it is the old one
