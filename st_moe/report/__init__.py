"""Pictures and a page about a run, drawn from the files it wrote.

Reads `metrics.jsonl`, and `run.json`, `summary.json` and `best_answers/` where
they exist; writes `report/`: pictures, and `index.html`, which holds them all.
"""

from pathlib import Path

from st_moe.report.page import render_page
from st_moe.report.pictures import (
  BLUE,
  GREEN,
  GREY,
  ORANGE,
  RED,
  draw_curves,
  draw_expert_load,
  draw_router,
  draw_tasks,
)
from st_moe.report.run import Run, read_run

__all__ = [
  'BLUE',
  'GREEN',
  'GREY',
  'ORANGE',
  'RED',
  'Run',
  'draw_curves',
  'draw_expert_load',
  'draw_router',
  'draw_tasks',
  'write_report',
]

_DPI = 130


def write_report(workdir: Path) -> Path:
  """Draws the report of a run; returns the page.

  Raises:
    UserError: when `workdir` holds no metrics, or a file that is not JSON.
  """
  workdir = Path(workdir)
  run = read_run(workdir)
  directory = workdir / 'report'
  directory.mkdir(exist_ok=True)
  figures = {}
  if run.development:
    figures['tasks.png'] = draw_tasks(run)
  figures['curves.png'] = draw_curves(run)
  if run.layers():
    figures['expert_load.png'] = draw_expert_load(run)
    figures['router.png'] = draw_router(run)
  pictures = {}
  for name, figure in figures.items():
    figure.savefig(directory / name, dpi=_DPI)
    pictures[name] = (directory / name).read_bytes()
  page = directory / 'index.html'
  page.write_text(
    render_page(run, workdir.resolve().name, pictures), encoding='utf-8'
  )
  return page
