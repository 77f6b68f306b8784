"""Every command of README.md runs, and its tree names every file."""

import importlib.util
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from t5x_checkpoints import Model, Sizes, save, written_out

from st_moe.main import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / 'README.md').read_text(encoding='utf-8')

# What makes the README's runs small enough for a test.
SMALL = [
  '--gin.STEPS=2',
  '--gin.OptimizerConfig.warmup_steps=1',
  '--gin.BATCH_SIZE=8',
  '--gin.ModelConfig.d_model=16',
  '--gin.ModelConfig.d_ff=16',
  '--gin.ModelConfig.d_kv=8',
  '--gin.ModelConfig.num_heads=2',
  '--gin.ModelConfig.num_encoder_layers=1',
  '--gin.ModelConfig.num_decoder_layers=1',
  '--gin.ModelConfig.sparse_every=1',
  '--gin.ModelConfig.num_experts=4',
  '--gin.ModelConfig.activation_dtype=float32',
  '--gin.MeshConfig.data=-1',
  '--gin.MeshConfig.expert=1',
  '--gin.DataConfig.inputs_length=32',
  '--gin.DataConfig.targets_length=12',
  '--gin.RunConfig.eval_batches=1',
  '--gin.RunConfig.unigram_batches=1',
  '--gin.RunConfig.num_samples=1',
  '--gin.RunConfig.log_every=1',
]
SMALL_BENCH = {
  'layer': ['--tokens=64', '--d_model=16', '--d_ff=16', '--rounds=1'],
  'step': [*SMALL, '--gin.STEPS=100', '--rounds=1'],
  'generate': [*SMALL, '--gin.STEPS=100', '--batch_size=8', '--rounds=1'],
  'peers': ['--tokens=64', '--d_model=16', '--d_ff=16', '--rounds=1'],
}
# The README's models are deeper and have 8 experts.
SMALL_CONVERSION = {
  'upcycle': [
    '--gin.ModelConfig.sparse_every=1',
    '--gin.ModelConfig.num_experts=4',
  ],
  'experts': ['--experts=0+1,2+3'],
}
DENSE = '--gin.ModelConfig.num_experts=0'
# What these start is there on clouds and clusters only; launchers_test runs
# the scripts with stand-ins.
ELSEWHERE = (
  'docker build ',
  'docker push ',
  'kubectl apply ',
  'sbatch scripts/slurm.sbatch ',
  'scripts/tpu_vm ',
  'xpk storage attach ',
  'xpk workload create ',
)
# Run here as one job of one.
CACHE_ARRAY = 'sbatch scripts/slurm_cache.sbatch'
SENTENCE = 'a router sends each token to two experts and adds what they say {}'


def commands() -> list[str]:
  """Returns the commands of the README's bash blocks, in order."""
  blocks = re.findall(r'```bash\n(.*?)```', README, re.DOTALL)
  lines = '\n'.join(blocks).replace('\\\n', ' ').splitlines()
  return [line for line in lines if line.strip()]


def test_the_readme_has_the_two_commands_and_more():
  assert commands()[:2] == ['scripts/quickstart', 'scripts/test']
  assert len(commands()) >= 8


def test_every_command_runs_in_a_test_or_is_listed():
  known = ('st_moe ', 'scripts/', CACHE_ARRAY, *ELSEWHERE)
  assert [c for c in commands() if not c.startswith(known)] == []
  for start in ELSEWHERE:
    assert any(command.startswith(start) for command in commands())


def test_files_that_commands_elsewhere_name_are_there():
  named = {
    word
    for command in commands()
    for word in shlex.split(command)
    if word.startswith('scripts/')
  }
  assert len(named) == 9
  assert [name for name in named if not (ROOT / name).is_file()] == []


@pytest.mark.parametrize(
  'script', [c for c in commands() if c.startswith('scripts/')]
)
def test_scripts_are_there_and_parse(script):
  path = ROOT / script.split()[0]
  assert path.stat().st_mode & 0o111, f'{script} is not executable'
  subprocess.run(['bash', '-n', path], check=True)


def write_texts(folder: Path) -> None:
  """Makes the files that the README's commands read."""
  (folder / 'my_text').mkdir()
  (folder / 'other_text.txt').write_text('one line, all of which is scored\n')
  (folder / 'my_text' / 'a.txt').write_text(
    ''.join(SENTENCE.format(i) + '\n' for i in range(400))
  )
  (folder / 'superglue' / 'CB').mkdir(parents=True)
  row = '{"premise": "p", "hypothesis": "h", "label": "neutral", "idx": 0}\n'
  for name in ('train', 'val'):
    (folder / 'superglue' / 'CB' / f'{name}.jsonl').write_text(row)
  shards = folder / 'c4' / 'en'
  shards.mkdir(parents=True)
  text = ''.join(f'{{"text": "{SENTENCE.format(i)}"}}\n' for i in range(200))
  for name in ('c4-train.00000-of-00001', 'c4-validation.00000-of-00001'):
    (shards / f'{name}.json').write_text(text)
    subprocess.run(['gzip', shards / f'{name}.json'], check=True)
  sizes = Sizes(layers=(2, 2), experts=3, sparse=((1,), (1,)), extra_ffn=True)
  save(folder / 't5x', written_out(Model(sizes)), step=1_000_000)


def fetch_model(folder: Path) -> None:
  """Stands in for `hf download`."""
  golden = ROOT / 'tests' / 'golden_hf' / 't5_v1_1'
  shutil.copytree(golden, folder / 'flan-t5-small')


def submit_cache_array(folder: Path) -> None:
  program = folder / '.venv' / 'bin' / 'st_moe'
  program.parent.mkdir(parents=True)
  program.write_text(
    f'#!/bin/sh\nPYTHONPATH={ROOT} {sys.executable} -m st_moe "$@"\n'
  )
  program.chmod(0o755)
  array = {
    'SLURM_ARRAY_TASK_ID': '0',
    'SLURM_ARRAY_TASK_COUNT': '1',
    'SLURM_ARRAY_TASK_MIN': '0',
    'SLURM_ARRAY_TASK_MAX': '0',
  }
  subprocess.run(
    ['bash', ROOT / CACHE_ARRAY.split()[1]],
    cwd=folder,
    env=os.environ | array,
    check=True,
  )


@pytest.mark.slow
def test_every_st_moe_command_runs(tmp_path, monkeypatch):
  write_texts(tmp_path)
  fetch_model(tmp_path)
  monkeypatch.chdir(tmp_path)
  for command in commands():
    if command == CACHE_ARRAY:
      submit_cache_array(tmp_path)
    if not command.startswith('st_moe '):
      continue
    argv = []  # file patterns expanded, as a shell would
    for word in shlex.split(command)[1:]:
      plain = '*' not in word or word.startswith('--')
      argv += [word] if plain else sorted(map(str, Path('.').glob(word)))
    small = [
      flag for flag in SMALL if DENSE not in argv or 'experts' not in flag
    ]
    if argv[0] == 'pretrain':
      argv += small
    if argv[0] == 'finetune':
      argv += [flag for flag in small if 'Model' not in flag]
    if argv[0] == 'study' and '--workdir' in ' '.join(argv):
      argv += [flag for flag in SMALL if 'experts' not in flag]
      argv += ['--arm=none', '--seeds=1']
    if argv[0] == 'convert':
      argv += SMALL_CONVERSION.get(argv[1], [])
    if argv[0] == 'vocab':
      argv = [w for w in argv if not w.startswith('--size')] + ['--size=60']
    if argv[0] == 'plan':  # its devices are those of a process of its own
      argv = [w for w in argv if not w.startswith('--search')]
      whole = [sys.executable, '-m', 'st_moe', *argv, '--no_compile']
      environment = {k: v for k, v in os.environ.items() if k != 'XLA_FLAGS'}
      environment |= {'JAX_NUM_CPU_DEVICES': '512', 'PYTHONPATH': str(ROOT)}
      subprocess.run(whole, env=environment, check=True)
      continue
    status = 0
    if argv[0] == 'bench':
      argv += SMALL_BENCH[argv[1]]
      # Without this one there is nothing of two choices to compare with.
      alone = importlib.util.find_spec('st_moe_pytorch') is None
      status = 2 if argv[1] == 'peers' and alone else 0
    assert main(argv) == status, command
    if argv[0] == 'pretrain':
      finished = ROOT / 'scripts' / 'run_finished'
      workdir = argv[-1 - len(small)].removeprefix('--workdir=')
      assert subprocess.run([finished, workdir]).returncode == 0
    if argv[0] == 'vocab':
      shutil.copy('runs/my.model', 'spiece.model')
  scores = (tmp_path / 'runs' / 'mine' / 'evaluations.jsonl').read_text()
  assert [json.loads(line)['task'] for line in scores.splitlines()] == [
    'text',
    'text',
    'superglue.cb',
  ]


def test_the_tree_names_every_file_of_the_package():
  tree = README.split('## The tree')[1].split('```')[1]
  names = set(re.findall(r'^\s*([\w./]+)', tree, re.MULTILINE))
  for path in sorted((ROOT / 'st_moe').rglob('*.py')):
    if path.name == '__init__.py' and path.parent.name != 'st_moe':
      continue
    assert path.name in names, f'README does not name {path.name}'
  words = set(re.findall(r'[\w./]+', tree))
  for path in sorted((ROOT / 'scripts').iterdir()):
    assert path.name in words, f'README does not name scripts/{path.name}'
