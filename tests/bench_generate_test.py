"""`st_moe bench generate`: every token is counted, and what differs is told."""

from pathlib import Path

import numpy as np
import pytest
from small_bench import STEP, results

from st_moe.bench import generate
from st_moe.main import main

COMMAND = ['bench', 'generate', *STEP]


@pytest.fixture(autouse=True)
def in_an_empty_directory(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)


def test_bench_generate_counts_the_tokens_of_outputs(capsys):
  """On eight devices; every output has the 8 tokens of the configuration."""
  sizes = ['--batch_size=8', '--num_beams=1,2']
  assert main([*COMMAND, *sizes, '--output=out']) == 0
  printed = capsys.readouterr().out
  found = results('out')
  assert found['mesh'] == {'slice': 1, 'data': 8, 'expert': 1, 'model': 1}
  assert Path('out/generate.png').stat().st_size > 5000
  measured = found['measurements']
  assert [(m['batch_size'], m['num_beams'], m['tokens']) for m in measured] == [
    (8, 1, 64),
    (8, 2, 64),
  ]
  for one in measured:
    walls = np.array(one['time']['wall_s'])
    assert len(walls) == 2
    speed = one['tokens_per_second']['median']
    assert speed == pytest.approx(np.median(one['tokens'] / walls))
    assert f'{speed:,.0f} [' in printed
  greedy, beams = (np.array(m['time']['wall_s']) for m in measured)
  assert measured[0]['over_greedy'] is None
  ratio = measured[1]['over_greedy']['median']
  assert ratio == pytest.approx(np.median(beams / greedy))
  assert '8, 2 beams' in printed


def test_outputs_that_are_not_whole_are_not_timed(monkeypatch, capsys):
  class Short(generate.Predictor):
    def generate(self, inputs, **_):
      return [[2] * 7 for _ in inputs]

  monkeypatch.setattr(generate, 'Predictor', Short)
  assert main([*COMMAND, '--batch_size=8', '--output=out']) == 3
  assert '56 tokens came, not 8 x 8' in capsys.readouterr().err
  assert not Path('out/results.json').exists()


@pytest.mark.parametrize(
  'argv, message',
  [
    (['bench', 'generate'], 'bench generate needs --gin_file=FILE'),
    ([*COMMAND, '--batch_size=3'], '3 does not divide over the 8 data shards'),
    ([*COMMAND, '--batch_size=8,8'], '--batch_size: [8, 8] has a number twice'),
    ([*COMMAND, '--num_beams=0'], 'argument --num_beams: invalid list of posi'),
    ([*COMMAND, '--rounds=0'], '--rounds must be positive, got 0'),
  ],
)
def test_wrong_input_ends_with_one_line(capsys, argv, message):
  assert main(argv) == 2
  err = capsys.readouterr().err
  assert err.startswith('error: ') and err.count('\n') == 1
  assert message in err
