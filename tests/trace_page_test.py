"""The page of `st_moe trace` in a real browser, headless Chromium."""

import html
import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from st_moe.data.vocabularies import load_vocabulary
from st_moe.trace import statistics, writing
from st_moe.trace.recording import StackRecord

NAMES = ('chromium-headless-shell', 'chromium', 'google-chrome', 'chrome')
BROWSER = next(filter(None, map(shutil.which, NAMES)), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason='needs Chromium')

BYTES = load_vocabulary('byte', extra_ids=10)
EXPERTS = 5
TEXT = 'the old mill </script><b>&amp; 12 "dogs" '


def make_record(rng, targets):
  """Two layers, four rows, three choices, some declined, some dropped."""
  row = [BYTES.sentinel_id(0), *BYTES.encode(TEXT), BYTES.sentinel_id(1)]
  tokens = np.array([row] * 4, np.int32)
  tokens[1, 20:] = 0
  real = tokens > 0
  shape = (2, *tokens.shape, 3)
  expert = rng.permuted(np.tile(np.arange(EXPERTS), (*shape[:3], 1)), axis=-1)
  wanted = (rng.random(shape) < 0.7) & real[None, ..., None]
  wanted[..., 0] = real
  return StackRecord(
    layers=(1, 3),
    tokens=tokens,
    targets=np.roll(tokens, -1, axis=1) if targets else None,
    real=real,
    expert=expert[..., :3].astype(np.int16),
    gate=rng.random(shape).astype(np.float32),
    wanted=wanted,
    kept=wanted & (rng.random(shape) < 0.8),
  )


@pytest.fixture(scope='module')
def trace():
  rng = np.random.default_rng(0)
  records = {
    'encoder': make_record(rng, False),
    'decoder': make_record(rng, True),
  }
  found = statistics.describe(records, BYTES, EXPERTS, shown_rows=3)
  source = {
    'checkpoint': 'runs/<b>x</b>', 'step': 7, 'text': 'text', 'rows': 4,
    'batch_size': 4, 'capacity': 'eval', 'capacity_text': 'capacity',
  }  # fmt: skip
  return json.loads(
    json.dumps(found | {'source': source, 'rule': writing.RULE})
  )


def browse(folder, trace, address='', script=''):
  """Returns the page's elements after its script, and what it complained of."""
  page = writing.page(trace).replace('</body>', f'{script}</body>')
  (folder / 'trace.html').write_text(page, encoding='utf-8')
  result = subprocess.run(
    [
      BROWSER,
      '--headless',
      '--no-sandbox',  # tests may run as root
      '--disable-gpu',
      '--enable-logging=stderr',
      '--virtual-time-budget=3000',
      f'--user-data-dir={folder}/profile',
      '--dump-dom',
      f'file://{folder}/trace.html{address}',
    ],
    capture_output=True,
    text=True,
    timeout=120,
    check=True,
  )
  complaints = [x for x in result.stderr.splitlines() if 'CONSOLE' in x]
  return result.stdout.split('<script')[0], complaints


def numbers(dom, pattern):
  return re.findall(pattern, dom)


@pytest.mark.parametrize('stack', ['encoder', 'decoder'])
@pytest.mark.parametrize('index', [0, 1])
def test_numbers_are_those_of_the_json(tmp_path, trace, stack, index):
  layer = trace['stacks'][stack]['layers'][index]
  dom, complaints = browse(
    tmp_path, trace, f'#{stack}/{layer["layer"]}/first/all'
  )
  assert complaints == []
  table = dom.split('id="experts"')[1].split('</table>')[0]
  rows = re.split(r'<tr data-expert=', table)[1:]
  assert len(rows) == EXPERTS
  for row, expert in zip(rows, layer['experts'], strict=True):
    for name in ('first', 'other', 'dropped'):
      (shown,) = numbers(row, rf'data-name="{name}">([\d,]+)<')
      assert int(shown.replace(',', '')) == expert[name]
    (load,) = numbers(row, r'<span class="share">([\d.]+)%')
    assert load == f'{100 * expert["load"]:.1f}'
    lifts = numbers(row, r'<small>([\d.]+)×')
    assert np.allclose(
      [float(x) for x in lifts],
      [t['lift'] for t in expert['tokens']],
      atol=0.051,
    )
  shown = numbers(dom, r'data-unrouted="(\d+)"')
  assert shown == [str(layer['unrouted'])]
  for name, part in trace['stacks'].items():
    for one in part['layers']:
      (row,) = re.findall(
        rf'<tr data-stack="{name}" data-layer="{one["layer"]}">.*?</tr>', dom
      )
      assert numbers(row, r'data-name="\w+">([\d.]+)<') == [
        f'{one["entropy"][kind]:.3f}' for kind in ('sentinels', 'others')
      ]


@pytest.mark.parametrize(('choice', 'rank'), [('first', 0), ('second', 1)])
def test_every_token_has_the_colour_of_its_expert(
  tmp_path, trace, choice, rank
):
  dom, complaints = browse(tmp_path, trace, f'#decoder/3/{choice}/2')
  assert complaints == []
  text = dom.split('id="text"')[1].split('id="said"')[0]
  lines = text.split('data-row=')[1:]
  assert len(lines) == 3
  for line, row in zip(lines, trace['rows'], strict=True):
    row = row['decoder']
    spans = re.findall(
      r'<span class="([\w ]+)"[^>]*data-expert="(-?\d+)"[^>]*>(.*?)</span>',
      line,
    )
    experts = [expert[rank] for expert in row['layers'][1]['expert']]
    assert [int(expert) for _, expert, _ in spans] == experts
    pieces = [trace['pieces'][str(i)] for i in row['tokens']]
    shown = [html.unescape(piece) for _, _, piece in spans]
    assert shown == [
      piece.replace('extra_id_', '').replace('▁', '␣') for piece in pieces
    ]
    # Only expert 2 is coloured.
    dim = ['dim' in kinds.split() for kinds, _, _ in spans]
    assert dim == [expert not in (2, -1) for expert in experts]
    wanted = [
      sum(e >= 0 for e in token) for token in row['layers'][1]['expert']
    ]
    losses = np.bincount(
      [at for at, _ in row['layers'][1]['dropped']], minlength=len(wanted)
    )
    lost = ['lost' in kinds.split() for kinds, _, _ in spans]
    assert lost == [
      w > 0 and n == w for n, w in zip(losses, wanted, strict=True)
    ]


def test_it_can_be_used_without_a_mouse(tmp_path, trace):
  # Presses keys, then writes what is shown where the test can read it.
  script = """<script>
  const press = key =>
    $('text').dispatchEvent(new KeyboardEvent('keydown', {key}));
  press('ArrowRight'); press('ArrowRight'); press('ArrowDown');
  const said = $('said').textContent;
  document.querySelector('#stacks input[value=decoder]').click();
  document.querySelector('.chip[data-expert="1"]').click();
  const focus = document.activeElement.dataset.expert;
  document.body.dataset.seen = JSON.stringify([said, location.hash, focus]);
  </script>"""
  dom, complaints = browse(tmp_path, trace, script=script)
  assert complaints == []
  (seen,) = re.findall(r'data-seen="(.*?)">', dom)
  said, address, focus = json.loads(html.unescape(seen))
  numbers_of = trace['rows'][1]['encoder']['layers'][0]
  assert said.startswith('Row 2, token 2: “…t” (conjunction or article) → ')
  assert f'expert {numbers_of["expert"][1][0]} ' in said
  assert (address, focus) == ('#decoder/1/first/1', '1')
  tabbable = re.findall(
    r'<(?:div|button|input)[^>]*(?:tabindex="0"|type=)', dom
  )
  assert len(tabbable) >= 4 + EXPERTS


def test_an_error_in_the_page_would_be_seen(tmp_path, trace):
  _, complaints = browse(
    tmp_path, trace, script='<script>console.error("found")</script>'
  )
  assert len(complaints) == 1
  assert 'found' in complaints[0]
