"""The launchers in scripts/, with stand-ins for srun, uv and st_moe."""

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from stand_ins import ROOT, SCRIPTS, program, run, wait_for

from st_moe import arguments
from st_moe.main import main

SHELL = [
  'install',
  'run_to_end',
  'tpu_vm',
  'tpu_vm_worker',
  'slurm.sbatch',
  'slurm_cache.sbatch',
]


@pytest.mark.parametrize('name', SHELL)
def test_scripts_parse(name):
  assert run('bash', '-n', SCRIPTS / name).returncode == 0
  runs_alone = not name.endswith('.sbatch')
  assert os.access(SCRIPTS / name, os.X_OK) == runs_alone
  if shutil.which('shellcheck'):
    found = run('shellcheck', '-x', '-P', 'SCRIPTDIR', SCRIPTS / name)
    assert found.returncode == 0, found.stdout


# scripts/run_to_end, scripts/run_finished


def finish(workdir: Path, *, step: int, steps: int) -> None:
  workdir.mkdir(parents=True, exist_ok=True)
  (workdir / 'summary.json').write_text(json.dumps({'step': step}))
  config = {'config': {'steps': steps}}
  (workdir / 'run.json').write_text(json.dumps(config))


def test_a_run_is_finished_when_it_did_all_its_steps(tmp_path):
  def status() -> int:
    return run(SCRIPTS / 'run_finished', tmp_path).returncode

  assert status() == 1
  finish(tmp_path, step=5, steps=5)
  assert status() == 0
  finish(tmp_path, step=5, steps=9)  # to be trained on
  assert status() == 1


def test_a_run_that_stopped_early_is_finished(tmp_path):
  def status(patience: int, begin: int = 0) -> int:
    summary = {'step': 5, 'stopped_early': {'early_stopping': 3, 'why': ''}}
    config = {
      'config': {
        'steps': 9, 'early_stopping': patience, 'early_stopping_from': begin
      }
    }  # fmt: skip
    (tmp_path / 'summary.json').write_text(json.dumps(summary))
    (tmp_path / 'run.json').write_text(json.dumps(config))
    return run(SCRIPTS / 'run_finished', tmp_path).returncode

  assert status(patience=3) == 0
  assert status(patience=4) == 1  # to be trained on
  assert status(patience=3, begin=5) == 0
  assert status(patience=3, begin=6) == 1


@pytest.mark.parametrize(
  ('st_moe', 'status'),
  [
    ('exit 0', 75),
    ('exit 2', 2),
    ('exit 3', 3),
    ('kill -9 $$', 137),
  ],
)
def test_the_exit_status_says_whether_to_try_again(tmp_path, st_moe, status):
  program(tmp_path / 'bin' / 'st_moe', st_moe)
  env = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'}
  result = run(
    SCRIPTS / 'run_to_end', f'--workdir={tmp_path}/w', cwd=tmp_path, env=env
  )
  assert result.returncode == status
  finish(tmp_path / 'w', step=5, steps=5)
  program(tmp_path / 'bin' / 'st_moe', 'exit 0')
  argv = [SCRIPTS / 'run_to_end', f'--workdir={tmp_path}/w']
  assert run(*argv, env=env).returncode == 0


def test_sigterm_reaches_the_run_and_the_end_is_waited_for(tmp_path):
  program(
    tmp_path / 'bin' / 'st_moe',
    'flags="$*"\n'
    'save() { sleep 0.3; echo "$flags" > saved; exit 0; }\n'
    'trap save TERM\n'
    'echo ready > ready\n'
    'while true; do sleep 0.05; done\n',
  )
  process = subprocess.Popen(
    [SCRIPTS / 'run_to_end', '--workdir=w', '--seed=3'],
    cwd=tmp_path,
    env=os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'},
  )
  wait_for(tmp_path / 'ready')
  process.send_signal(signal.SIGTERM)
  try:
    assert process.wait(timeout=30) == 75
  finally:
    process.kill()
  assert (tmp_path / 'saved').read_text() == 'pretrain --workdir=w --seed=3\n'


# SLURM


def header(name: str) -> dict[str, str]:
  """Returns the options of an sbatch file; they come before any command."""
  lines = (SCRIPTS / name).read_text().splitlines()
  first = next(i for i, x in enumerate(lines) if x and not x.startswith('#'))
  found = [x for x in lines if x.startswith('#SBATCH ')]
  assert found == [x for x in lines[:first] if x.startswith('#SBATCH ')]
  options = {}
  for line in found:
    name, _, value = line.removeprefix('#SBATCH --').partition('=')
    assert name not in options
    options[name] = value
  return options


def test_the_options_of_the_training_job():
  options = header('slurm.sbatch')
  assert set(options) == {
    'job-name',
    'nodes',
    'gpus-per-node',
    'ntasks-per-node',
    'cpus-per-task',
    'mem',
    'time',
    'requeue',
    'open-mode',
    'output',
    'signal',
  }
  # A process for each GPU, as JAX expects of SLURM.
  assert options['ntasks-per-node'] == options['gpus-per-node']
  assert options['mem'] == '0'  # all of it; the default is little per core
  # To all processes ('B:' would be the script alone), minutes before the end.
  assert re.fullmatch(r'TERM@\d{3}', options['signal'])


@pytest.fixture
def slurm(tmp_path):
  """A repository's folder with fake srun, scontrol and st_moe."""
  (tmp_path / 'scripts').symlink_to(SCRIPTS)
  program(
    tmp_path / '.venv' / 'bin' / 'st_moe', 'printf "%q " "$@" > arguments'
  )
  program(
    tmp_path / 'bin' / 'srun',
    'while [[ "$1" == --* ]]; do shift; done\n"$@"; exit "${STATUS:-0}"\n',
  )
  program(
    tmp_path / 'bin' / 'scontrol', '[[ -z "$REFUSE" ]] && echo "$@" > requeued'
  )
  return os.environ | {
    'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}',
    'SLURM_CPUS_PER_TASK': '8',
    'SLURM_JOB_ID': '17',
  }


def test_an_unfinished_run_is_queued_again_and_no_other(slurm, tmp_path):
  requeued = tmp_path / 'requeued'

  def submit(**env) -> int:
    requeued.unlink(missing_ok=True)
    script = SCRIPTS / 'slurm.sbatch'
    argv = ['bash', script, '--workdir=w', '--gin.FILES=a b']
    return run(*argv, cwd=tmp_path, env=slurm | env).returncode

  assert submit() == 0
  assert (tmp_path / 'requeued').read_text() == 'requeue 17\n'
  assert shlex.split((tmp_path / 'arguments').read_text()) == [
    'pretrain',
    '--distributed=on',
    '--workdir=w',
    '--gin.FILES=a b',
  ]
  # Wrong input, a run that stopped itself, no st_moe; then a lost process.
  for status in (2, 3, 127):
    assert submit(STATUS=str(status)) == status
    assert not requeued.exists()
  for status in (1, 134, 137):
    assert submit(STATUS=str(status), SLURM_RESTART_COUNT='19') == status
    assert requeued.exists()
    assert submit(STATUS=str(status), SLURM_RESTART_COUNT='20') == status
    assert not requeued.exists()
  # What was stopped and has saved goes on however often that happened.
  assert submit(SLURM_RESTART_COUNT='20') == 0
  assert requeued.exists()
  finish(tmp_path / 'w', step=5, steps=5)
  assert submit() == 0
  assert not requeued.exists()


def test_a_slurm_run_can_be_stopped_for_good(slurm, tmp_path):
  # SLURM requeues no job of which `scontrol update Requeue=0` was said.
  script = SCRIPTS / 'slurm.sbatch'
  env = slurm | {'REFUSE': '1'}
  result = run('bash', script, '--workdir=w', cwd=tmp_path, env=env)
  assert result.returncode == 0
  assert result.stdout == 'stopped by a signal and saved; not queued again\n'


@pytest.mark.parametrize('name', ['slurm.sbatch', 'run_to_end'])
def test_the_work_directory_is_said_with_an_equals_sign(name, slurm, tmp_path):
  script = SCRIPTS / name
  result = run('bash', script, '--workdir', 'w', cwd=tmp_path, env=slurm)
  assert result.returncode == 2
  (line,) = result.stderr.splitlines()
  assert line.endswith(f'scripts/{name} needs --workdir=DIR, with an =')
  assert not (tmp_path / 'arguments').exists()


def test_a_job_array_makes_one_cache(tmp_path):
  options = header('slurm_cache.sbatch')
  assert options['array'].startswith('0-') and 'requeue' in options
  (tmp_path / 'c4').mkdir()
  for name in [f'train.{i}' for i in range(4)] + ['validation.0']:
    lines = [json.dumps({'text': f'{name} says {k}'}) for k in range(9)]
    path = tmp_path / 'c4' / f'c4-{name}.json'
    path.write_text('\n'.join(lines))
    subprocess.run(['gzip', path], check=True)
  program(
    tmp_path / '.venv' / 'bin' / 'st_moe',
    f'PYTHONPATH={ROOT} {sys.executable} -m st_moe "$@"',
  )
  env = os.environ | {
    'C4': 'c4',
    'VOCABULARY': 'byte',
    'OUTPUT': 'cache',
    'NUM_SHARDS': '4',
    'SLURM_ARRAY_TASK_COUNT': '2',
    'SLURM_ARRAY_TASK_MIN': '0',
    'SLURM_ARRAY_TASK_MAX': '1',
  }
  for i in ('1', '0'):
    script = SCRIPTS / 'slurm_cache.sbatch'
    env |= {'SLURM_ARRAY_TASK_ID': i}
    result = run('bash', script, cwd=tmp_path, env=env)
    assert result.returncode == 0, result.stderr
  manifest = json.loads((tmp_path / 'cache' / 'manifest.json').read_text())
  assert manifest['totals']['train']['documents'] == 36
  assert manifest['totals']['validation']['documents'] == 9


def test_some_jobs_of_an_array_are_run_again(slurm, tmp_path):
  script = SCRIPTS / 'slurm_cache.sbatch'
  array = slurm | {
    'SLURM_ARRAY_TASK_ID': '7',
    'SLURM_ARRAY_TASK_COUNT': '2',
    'SLURM_ARRAY_TASK_MIN': '3',
    'SLURM_ARRAY_TASK_MAX': '7',
  }
  result = run('bash', script, cwd=tmp_path, env=array)
  assert result.returncode == 2
  assert result.stderr == (
    'error: this array is not 0-N; to run some jobs of one again say how many '
    'it has: JOBS=64 sbatch --array=3,7 scripts/slurm_cache.sbatch\n'
  )
  env = array | {'JOBS': '64'}
  assert run('bash', script, cwd=tmp_path, env=env).returncode == 0
  arguments = shlex.split((tmp_path / 'arguments').read_text())
  assert '--shard=7/64' in arguments


# Kubernetes


def read_yaml(name: str):
  return yaml.safe_load((SCRIPTS / name).read_text())


def check_pod(pod) -> dict:
  """Checks what both jobs have in common; returns the container."""
  assert pod['metadata']['annotations'] == {
    'gke-gcsfuse/volumes': 'true',
    'gke-gcsfuse/ephemeral-storage-limit': '0',
    'gke-gcsfuse/memory-limit': '0',
    'gke-gcsfuse/cpu-limit': '0',
  }
  spec = pod['spec']
  assert spec['restartPolicy'] == 'Never'  # needed by podFailurePolicy
  (container,) = spec['containers']
  assert container['name'] == 'st-moe'
  (volume,) = spec['volumes']
  (mount,) = container['volumeMounts']
  assert mount == {'name': volume['name'], 'mountPath': '/bucket'}
  return container


def test_the_jobset_restarts_what_was_stopped(capsys):
  jobset = read_yaml('gke_jobset.yaml')
  assert (jobset['apiVersion'], jobset['kind']) == (
    'jobset.x-k8s.io/v1alpha2',
    'JobSet',
  )
  assert jobset['spec']['failurePolicy']['maxRestarts'] > 0
  (slices,) = jobset['spec']['replicatedJobs']
  job = slices['template']['spec']
  assert job['parallelism'] == job['completions']
  assert (job['completionMode'], job['backoffLimit']) == ('Indexed', 0)
  (rule,) = job['podFailurePolicy']['rules']
  assert rule['onExitCodes']['values'] == [2, 3]
  pod = job['template']
  container = check_pod(pod)
  assert pod['spec']['terminationGracePeriodSeconds'] >= 300
  # All chips of a slice: hosts x chips of one.
  topology = pod['spec']['nodeSelector']['cloud.google.com/gke-tpu-topology']
  chips = container['resources']['limits']['google.com/tpu']
  x, y = map(int, topology.split('x'))
  assert job['completions'] * chips == x * y
  (command,) = container['command']
  assert (ROOT / Path(command).relative_to('/st_moe')).is_file()
  # The run is one that st_moe takes.
  argv = container['args']
  assert argv[0] == '--distributed=on'
  args = arguments.parse(['pretrain', *argv[1:]])
  assert args.workdir.startswith('/bucket/')
  bindings = [f'--gin.{binding}' for binding in args.gin_bindings]
  assert main(['config', 'show', *args.gin_file, *bindings]) == 0
  assert f'MeshConfig.expert = {x * y}' in capsys.readouterr().out


def test_the_cache_job_divides_by_its_number_of_pods():
  job = read_yaml('gke_cache_job.yaml')
  assert (job['apiVersion'], job['kind']) == ('batch/v1', 'Job')
  spec = job['spec']
  assert spec['completionMode'] == 'Indexed'
  container = check_pod(spec['template'])
  args = arguments.parse(container['args'])
  assert args.command == 'cache'
  assert args.shard == f'$(JOB_COMPLETION_INDEX)/{spec["completions"]}'
  assert args.num_shards % spec['completions'] == 0


@pytest.mark.parametrize('name', ['gke_jobset.yaml', 'gke_cache_job.yaml'])
def test_every_line_that_is_yours_is_marked(name):
  lines = (SCRIPTS / name).read_text().splitlines()
  unmarked = [
    line.strip()
    for line in lines
    if re.search(r'my-|=/bucket/|serviceAccountName', line)
    and '# edit' not in line
  ]
  assert unmarked == []


# Dockerfile


def instructions() -> list[tuple[str, str]]:
  text = (SCRIPTS / 'Dockerfile').read_text().replace('\\\n', ' ')
  lines = [x for x in text.splitlines() if x and not x.startswith('#')]
  return [tuple(line.split(maxsplit=1)) for line in lines]


def test_the_image_holds_what_an_installation_needs():
  copied = set()
  for word, rest in instructions():
    if word == 'COPY':
      *sources, _ = rest.split()
      copied |= set(sources)
  assert all((ROOT / name).exists() for name in copied)
  assert {'setup.py', 'constraints.txt', 'st_moe', 'gin_configs'} <= copied


def test_an_edit_of_the_source_does_not_install_its_needs_again():
  words = [f'{word} {rest}' for word, rest in instructions()]
  (needs,) = [i for i, x in enumerate(words) if '-r setup.py' in x]
  (source,) = [i for i, x in enumerate(words) if x.startswith('COPY st_moe')]
  (package,) = [i for i, x in enumerate(words) if '--no-deps .' in x]
  assert needs < source < package
  before = ' '.join(x for x in words[:needs] if x.startswith('COPY'))
  assert before == 'COPY setup.py pyproject.toml constraints.txt ./'


@pytest.mark.parametrize(
  ('device', 'extras'),
  [('cpu', ['data']), ('tpu', ['data', 'tpu']), ('cuda', ['data', 'cuda'])],
)
def test_the_image_installs_extras_that_there_are(tmp_path, device, extras):
  (install,) = [r for w, r in instructions() if w == 'RUN' and 'extras' in r]
  program(tmp_path / 'bin' / 'uv', 'printf "%s\\n" "$@"')
  env = os.environ | {'PATH': f'{tmp_path}/bin:{os.environ["PATH"]}'}

  def build(device: str):
    return run('sh', '-c', install, cwd=tmp_path, env=env | {'DEVICE': device})

  words = build(device).stdout.split()
  wanted = [word for extra in extras for word in ('--extra', extra)]
  assert words[words.index('--constraint') :] == [
    *('--constraint', 'constraints.txt', '-r', 'setup.py'),
    *wanted,
  ]
  setup = (ROOT / 'setup.py').read_text()
  for extra in extras:
    assert f"'{extra}': " in setup
  # The folders that setup.py wants.
  for folder in (ROOT / 'gin_configs').iterdir():
    assert (
      not folder.is_dir() or (tmp_path / 'gin_configs' / folder.name).is_dir()
    )
  assert build('gpu').returncode == 2
