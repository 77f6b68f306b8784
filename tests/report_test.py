"""Report: pictures that open, a page that says what the files say."""

import base64
import html
import json
import math
import re

import numpy as np
import pytest
from matplotlib import image

from st_moe.errors import UserError
from st_moe.metrics import METRICS_FILE, MetricsWriter
from st_moe.report import (
  Run,
  draw_curves,
  draw_expert_load,
  draw_router,
  write_report,
)


def write_run(workdir, layers=('encoder/1', 'decoder/3'), steps=(10, 20, 30)):
  writer = MetricsWriter(workdir, tensorboard=False)
  for step in steps:
    scalars = {
      'loss': 9.0 - step / 10,
      'cross_entropy': 8.0 - step / 10,
      'learning_rate': 0.01,
      'gradient_norm': math.nan if step == 20 else 1.5,
    }
    arrays = {}
    for layer in layers:
      for name in ('entropy', 'fraction_dropped', 'z_loss'):
        scalars[f'router/{layer}/{name}'] = 0.5
      arrays[f'router/{layer}/expert_load'] = [0.1, 0.2, 0.3, 0.4]
    writer.write(step, scalars, arrays)
    writer.write(step, {'tokens_per_second': 1000.0})
  writer.write(steps[-1], {'eval/loss': 6.5, 'eval/neg_log_perplexity': -5.25})
  writer.close()


def test_a_finished_run_has_pictures_and_a_page(tmp_path):
  write_run(tmp_path)
  summary = {
    'eval/neg_log_perplexity': -5.125,
    'eval/unigram_neg_log_perplexity': -6.5,
    'samples': [{'text': 'a [b] & c', 'model': 'a [-] & c'}],
  }
  (tmp_path / 'summary.json').write_text(json.dumps(summary))
  info = {
    'command': ['/opt/bin/st_moe', 'pretrain', '--workdir=<here>'],
    'parameters': {'total': 1234567, 'expert': 1000000},
    'config': {'steps': 30, 'model': {'num_experts': 4, 'd_model': 64}},
  }
  (tmp_path / 'run.json').write_text(json.dumps(info))
  page = write_report(tmp_path)
  assert page == tmp_path / 'report' / 'index.html'
  text = page.read_text()
  pictures = re.findall(r'<img src="data:image/png;base64,([^"]+)"', text)
  assert len(pictures) == 3
  for name, data in zip(
    ['curves.png', 'expert_load.png', 'router.png'], pictures, strict=True
  ):
    assert (page.parent / name).read_bytes() == base64.b64decode(data)
    pixels = image.imread(page.parent / name)[..., :3]
    assert min(pixels.shape[:2]) > 200
    assert pixels.std() > 0.02
  rows = dict(re.findall(r'<tr><td>(.*?)</td><td>(.*?)</td></tr>', text))
  assert rows['steps'] == '30'
  assert rows['training loss'] == '6.0000'
  # The summary's number, not the last logged one.
  assert rows['held-out negative log perplexity, text'] == '-5.1250'
  assert rows['the same of the unigram distribution'] == '-6.5000'
  assert rows['tokens per second'] == '1,000'
  assert rows['text'] == 'a [b] &amp; c'
  assert rows['filled'] == 'a [-] &amp; c'
  assert rows['parameters'] == 'total 1,234,567, expert 1,000,000'
  assert rows['model'] == 'd_model 64, num_experts 4'
  (command,) = re.findall(r'<p class="command">(.*?)</p>', text)
  words = re.findall(r'<span>(.*?)</span>', command)
  assert list(map(html.unescape, words)) == [
    'st_moe', 'pretrain', "'--workdir=<here>'",
  ]  # fmt: skip
  assert 'Last gone on with' not in text
  assert '://' not in text  # opens without a network

  info['restarts'] = [{'command': ['st_moe', 'pretrain', '--gin_file=a.gin']}]
  (tmp_path / 'run.json').write_text(json.dumps(info))
  first, last = re.findall(
    r'<p class="command">(.*?)</p>', write_report(tmp_path).read_text()
  )
  assert '--gin_file=a.gin' in first
  assert last == command


CB = {'task': 'superglue.cb:9,superglue.copa:1', 'objective': 'none'}
MIX = {'task': 'superglue.cb:9,text:1', 'objective': 'prefix_lm'}
AUTO = {'task': 'docstrings', 'vocabulary': 'auto'}


@pytest.mark.parametrize(
  ('config', 'expected'),
  [
    ({'data': CB}, f'task {CB["task"]}'),
    ({'data': MIX}, f'task {MIX["task"]}, objective prefix_lm'),
    ({'data': AUTO}, 'task docstrings, vocabulary auto'),
    (
      {'data': AUTO, 'initial_checkpoint': 'books'},
      'task docstrings, vocabulary of the weights',
    ),
    (
      {'optimizer': {'schedule': 'constant', 'warmup_steps': 10}},
      'schedule constant',
    ),
    (
      {'optimizer': {'schedule': 'rsqrt', 'warmup_steps': 10}},
      'schedule rsqrt, warmup_steps 10',
    ),
    ({'model': {'num_experts': 0, 'sparse_every': 4}}, 'num_experts 0'),
  ],
)
def test_only_settings_in_force_are_shown(tmp_path, config, expected):
  write_run(tmp_path, layers=(), steps=(10,))
  (tmp_path / 'run.json').write_text(json.dumps({'config': config}))
  text = write_report(tmp_path).read_text()
  rows = dict(re.findall(r'<tr><td>(.*?)</td><td>(.*?)</td></tr>', text))
  assert rows[next(iter(config))] == expected


def test_a_run_under_way_is_drawn_from_metrics_alone(tmp_path):
  write_run(tmp_path, steps=(10,))
  text = write_report(tmp_path).read_text()
  assert 'Configuration' not in text
  assert 'unigram' not in text


def test_a_dense_run_has_no_router_pictures(tmp_path):
  write_run(tmp_path, layers=())
  assert write_report(tmp_path).read_text().count('<img') == 1
  assert [p.name for p in (tmp_path / 'report').glob('*.png')] == ['curves.png']


def run_of(rows, summary=None):
  return Run(rows=rows, info={}, summary=summary or {})


def test_curves_show_the_logged_values_and_the_baseline():
  rows = [
    {'step': 10, 'loss': 5.0, 'eval/neg_log_perplexity': -7.0},
    {'step': 20, 'loss': None},
    {'step': 30, 'loss': 3.0, 'eval/neg_log_perplexity': -6.0},
  ]
  figure = draw_curves(run_of(rows, {'eval/unigram_neg_log_perplexity': -6.5}))
  loss, score, *_ = figure.axes
  (line,) = loss.get_lines()
  np.testing.assert_array_equal(line.get_xdata(), [10, 20, 30])
  np.testing.assert_array_equal(line.get_ydata(), [5.0, np.nan, 3.0])
  model, unigram = score.get_lines()
  np.testing.assert_array_equal(model.get_ydata(), [-7.0, -6.0])
  np.testing.assert_array_equal(unigram.get_ydata(), [-6.5, -6.5])
  for axes in figure.axes:
    assert axes.get_title(loc='left') and axes.get_ylabel()
    assert axes.get_xlabel() == 'step'


def test_expert_load_is_relative_and_encoders_come_first():
  rows = [
    {
      'step': step,
      'router/decoder/1/expert_load': [0.25, 0.75],
      'router/encoder/11/expert_load': [0.5, 0.5],
      'router/encoder/3/expert_load': [share, 1 - share],
    }
    for step, share in ((10, 0.9), (20, 0.1))
  ]
  run = run_of(rows)
  assert run.layers() == ['encoder/3', 'encoder/11', 'decoder/1']
  figure = draw_expert_load(run)
  last, *over_time, _ = figure.axes
  np.testing.assert_allclose(
    last.get_images()[0].get_array(), [[0.2, 1.8], [1, 1], [0.5, 1.5]]
  )
  assert [label.get_text() for label in last.get_yticklabels()] == [
    'encoder layer 3',
    'encoder layer 11',
    'decoder layer 1',
  ]
  np.testing.assert_allclose(  # [experts, times]
    over_time[0].collections[0].get_array(), [[1.8, 0.2], [0.2, 1.8]]
  )


def test_router_panels_have_one_line_per_layer():
  rows = [
    {
      'step': 10,
      **{
        f'router/{layer}/{name}': 0.25
        for layer in ('encoder/1', 'encoder/3')
        for name in ('entropy', 'fraction_dropped', 'z_loss')
      },
      'router/encoder/1/expert_load': [0.5, 0.5],
    }
  ]
  entropy, dropped, z_loss = draw_router(run_of(rows)).axes
  assert len(dropped.get_lines()) == len(z_loss.get_lines()) == 2
  *layers, uniform = entropy.get_lines()
  assert len(layers) == 2
  np.testing.assert_allclose(uniform.get_ydata(), math.log(2))


@pytest.mark.parametrize('content', [None, '', '{"step": 1, "lo'])
def test_a_run_without_metrics_is_the_users_error(tmp_path, content):
  if content is not None:
    (tmp_path / METRICS_FILE).write_text(content)
  with pytest.raises(UserError, match=METRICS_FILE):
    write_report(tmp_path)
  assert not (tmp_path / 'report').exists()


def test_a_broken_summary_is_the_users_error(tmp_path):
  write_run(tmp_path)
  (tmp_path / 'summary.json').write_text('{')
  with pytest.raises(UserError, match='summary.json'):
    write_report(tmp_path)
