"""Programs that stand in for others, for tests of the scripts."""

import subprocess
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / 'scripts'


def program(path: Path, text: str) -> Path:
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f'#!/usr/bin/env bash\n{text}')
  path.chmod(0o755)
  return path


def run(*argv, **options) -> subprocess.CompletedProcess:
  return subprocess.run(
    [str(word) for word in argv],
    capture_output=True,
    text=True,
    timeout=120,
    **options,
  )


def wait_for(path: Path) -> None:
  for _ in range(200):
    if path.exists() and path.read_text():
      return
    time.sleep(0.05)
  raise AssertionError(f'{path} did not come')
