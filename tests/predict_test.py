"""`st_moe predict`: an answer for every line, whatever stands beside it."""

import io
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from made_models import write_run
from small_job import Job
from tiny_model import ROUTER, tiny_config

from st_moe.data.vocabularies import load_vocabulary
from st_moe.main import main
from st_moe.predict import lines_at_hand, one_line

ROOT = Path(__file__).resolve().parent.parent
LINES = ['a <extra_id_0> c', '', 'Bücher', 'the mill', 'the mill', 'x']
SHORT = ('--max_new_tokens=6', '--gin.DataConfig.inputs_length=16')


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """A sparse model of random weights that writes bytes and sentinels."""
  path = tmp_path_factory.mktemp('run')
  write_run(path, tiny_config(ROUTER, vocab_size=384))
  return path


@pytest.fixture
def predict(run, monkeypatch, capsys):
  """Runs the command on a text; returns its answers and what it said."""

  def call(text: str, *flags: str) -> tuple[list[str], str]:
    stdin = io.TextIOWrapper(io.BytesIO(text.encode()))
    monkeypatch.setattr(sys, 'stdin', stdin)
    capsys.readouterr()
    assert main(['predict', f'--checkpoint={run}', *SHORT, *flags]) == 0
    out, err = capsys.readouterr()
    assert out.endswith('\n') or not out
    return out.split('\n')[:-1], err

  return call


@pytest.fixture
def error(run, capsys):
  def call(*flags: str) -> str:
    words = ['predict', *flags]
    if not any(flag.startswith('--checkpoint') for flag in flags):
      words.append(f'--checkpoint={run}')
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ''
    return err.splitlines()[-1].removeprefix('error: ')

  return call


def test_a_pipe_a_file_and_a_prompt_are_answered_alike(run, predict, tmp_path):
  command = ['predict', f'--checkpoint={run}', *SHORT]
  piped = subprocess.run(
    [sys.executable, '-m', 'st_moe', *command],
    input='\n'.join(LINES),  # the last line has no end
    capture_output=True,
    encoding='utf-8',
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'},
  )
  assert piped.returncode == 0, piped.stderr
  assert 'answered in' in piped.stderr and 'lines 6' in piped.stderr
  answers = piped.stdout.split('\n')[:-1]
  assert len(answers) == 6
  assert answers[3] == answers[4]  # the same line twice
  assert len(set(answers)) == 5 and all(answers)

  texts, written = tmp_path / 'texts.txt', tmp_path / 'answers.txt'
  texts.write_bytes('\r\n'.join([*LINES, '']).encode())
  out, _ = predict('', f'--input={texts}', f'--output={written}')
  assert out == []
  assert written.read_text().split('\n') == [*answers, '']
  assert sorted(tmp_path.iterdir()) == [written, texts]
  assert predict('', '--prompt=Bücher')[0] == [answers[2]]


@pytest.mark.parametrize('kind', ['pipe', 'terminal'])
def test_lines_are_answered_as_they_come(run, predict, kind):
  texts = LINES if kind == 'pipe' else ['', 'the mill']
  if kind == 'pipe':
    reading, writing = os.pipe()
  else:
    writing, reading = os.openpty()
  process = subprocess.Popen(
    [sys.executable, '-m', 'st_moe', 'predict', f'--checkpoint={run}', *SHORT],
    stdin=reading,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    encoding='utf-8',
    env=os.environ | {'PYTHONPATH': str(ROOT), 'JAX_NUM_CPU_DEVICES': '1'},
  )
  os.close(reading)
  late = threading.Timer(120, process.kill)
  late.start()
  answers = []
  for text in texts[:-1]:
    os.write(writing, f'{text}\n'.encode())
    answers.append(process.stdout.readline())  # before anything follows
  # The last line has no end.
  os.write(writing, texts[-1].encode())
  if kind == 'terminal':
    os.write(writing, b'\x04\x04')  # Ctrl-D
  else:
    os.close(writing)
  out, err = process.communicate()
  late.cancel()
  assert process.returncode == 0, err
  assert [*answers, out] == [f'{a}\n' for a in predict('\n'.join(texts))[0]]
  assert ('Ctrl-D ends them' in err) == (kind == 'terminal')
  if kind == 'terminal':
    os.close(writing)


def test_a_block_is_what_is_there():
  reading, writing = os.pipe()
  blocks = lines_at_hand(reading, 3)
  os.write(writing, b'1\n\n3\n4\n5')
  assert next(blocks) == [b'1', b'', b'3']  # no more than asked for
  assert next(blocks) == [b'4']  # and nothing of a line without its end
  more = threading.Timer(0.2, os.write, (writing, b'5\nlast'))
  more.start()
  assert next(blocks) == [b'55']
  os.close(writing)
  assert list(blocks) == [[b'last']]
  os.close(reading)


@pytest.mark.parametrize('flags', [['--temperature=1.5'], ['--num_beams=3']])
def test_an_answer_depends_on_its_line_alone(predict, flags):
  many, _ = predict('\n'.join(LINES), *flags)
  assert len(many) == 6
  # Beside other lines; draws are those of the line's number.
  text = '\n'.join(['other', *LINES[1:]])
  assert predict(text, '--batch_size=1', *flags)[0][1:] == many[1:]
  if '--num_beams=3' in flags:
    assert many[3] == many[4]
    return
  assert many[3] != many[4]
  assert predict('\n'.join(LINES), '--seed=1', *flags)[0] != many


def test_a_search_ends_as_it_is_told(predict):
  text = '\n'.join([*LINES, *'abcdefgh'])
  flags = ['--num_beams=3', '--length_penalty=2', '--max_new_tokens=12']
  first, soon = (
    predict(text, *flags, *more)[0] for more in ([], ['--early_stopping=true'])
  )
  assert first == predict(text, *flags, '--early_stopping=false')[0]
  assert first != soon


def test_sentinels_are_read_and_written(predict, caplog):
  vocabulary = load_vocabulary('byte', 100)
  assert vocabulary.encode_prompt('a<extra_id_1>b<extra_id_100>') == [
    *vocabulary.encode('a'),
    vocabulary.sentinel_id(1),
    *vocabulary.encode('b<extra_id_100>'),  # there are 100: 0 to 99
  ]
  caplog.set_level('INFO')
  answers = predict('<extra_id_7>' * 15 + '\na <extra_id_0> c')[0]
  assert 'cut:' not in caplog.text  # 16 tokens with the end, as many as fit
  assert any('<extra_id_' in answer for answer in answers)


def test_an_answer_is_one_line():
  assert one_line('a\nb\r\\n') == 'a\\nb\\r\\\\n'


def test_long_lines_are_cut_and_counted(predict, caplog):
  text = 'abcdefghijklmno'  # 15 bytes, and the end of the sequence
  answers, _ = predict(f'{text}\n{text}pq\n{text}rs')
  assert answers[0] == answers[1] == answers[2]
  assert 'cut: 2 of 3 lines, which have more than 15 tokens' in caplog.text


def test_no_line_no_answer(predict):
  assert predict('')[0] == []
  assert len(predict('\n')[0]) == 1


def test_a_line_that_is_no_text_is_named(error, tmp_path):
  texts, written = tmp_path / 'texts.txt', tmp_path / 'answers.txt'
  texts.write_bytes(b'fine\nno\xff')
  assert error(f'--input={texts}', f'--output={written}', *SHORT) == (
    f'{texts}, line 2: not UTF-8 (byte 0xff at 2); convert the text to UTF-8'
  )
  assert sorted(tmp_path.iterdir()) == [texts]


def test_answers_do_not_replace_their_questions(error, tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  Path('texts.txt').write_text('a\n')
  line = error(f'--input={tmp_path}/texts.txt', '--output=texts.txt', *SHORT)
  assert line.startswith('--output=texts.txt is the --input, which it would')
  assert Path('texts.txt').read_text() == 'a\n'


@pytest.mark.parametrize(
  'flags, message',
  [
    (['--checkpoint=nowhere'], 'nowhere holds no model: there is no such'),
    (['--step=3'], 'there is no checkpoint of step 3'),
    (['--prompt=a', '--input=b'], 'choose one'),
    (['--input=nowhere.txt'], '--input=nowhere.txt does not exist; give a'),
    (['--input=.'], '--input=. is a folder; give a file of lines'),
    (['--output=/'], '--output=/ is a folder'),
    (['--output=/etc/hosts/no'], '/etc/hosts is a file; choose another'),
    (['--temperature=-1'], '--temperature must be 0'),
    (['--temperature=0', '--top_k=3'], '--temperature=0 takes the likeliest'),
    (['--temperature=1', '--num_beams=2'], '--temperature=1.0 draws tokens'),
    (['--top_p=0.9', '--num_beams=2'], '--top_p=0.9 draws tokens'),
    (['--top_p=0'], r'--top_p must be in \(0, 1\], got 0.0'),
    (['--top_k=385'], 'top_k 385 exceeds ModelConfig.vocab_size 384'),
    (['--length_penalty=2'], 'add --num_beams=N'),
    (['--early_stopping=never'], 'add --num_beams=N'),
    (['--batch_size=0'], '--batch_size must be at least 1, got 0'),
    (['--max_new_tokens=0'], '--max_new_tokens must be at least 1, got 0'),
  ],
)
def test_what_cannot_be_done_is_said(error, flags, message, monkeypatch):
  monkeypatch.setattr(sys, 'stdin', io.TextIOWrapper(io.BytesIO(b'')))
  assert re.search(message, error(*flags))


@pytest.mark.slow
def test_two_processes_give_the_answers_of_one(run, predict, tmp_path):
  texts = tmp_path / 'texts.txt'
  texts.write_text('\n'.join(LINES))
  flags = [f'--input={texts}', '--top_k=20', '--gin.MeshConfig.expert=2']
  command = ['predict', f'--checkpoint={run}', *SHORT, *flags]
  first, second = Job(command, processes=2, devices=4).succeed()
  assert first.out.split('\n')[:-1] == predict('', *flags)[0]
  assert second.out == ''
