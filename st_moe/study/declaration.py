"""What a study is: its arms, its metric, what the paper measured and claims.

A study is a folder with `study.toml` and one gin file for each arm; the
package's own are in gin_configs/ablations/. Keys of study.toml:

  title, paper    what it is, and the table or figure it stands for
  setting         how the paper ran it
  recipe          'pretrain' (without it) or 'finetune': from given weights
  metric          a name of METRICS: what is compared
  reference       the arm to which the others are compared
  notes           what the paper leaves open, what is missing here
  [scales.SCALE]  settings of all arms at a scale, as `NAME = VALUE`
  [[arms]]        name; gin: a file or several, NAME.gin unless given
                  ('STUDY/ARM.gin' for that of another study); paper: the
                  paper's value, or {value, sd, stable = [of, all]};
                  papers.SCALE: its value at a scale; settings.SCALE: settings
                  that depend on the scale; scales: at which it exists (all);
                  dense: whether it is fine-tuned from the dense model
  [[claims]]      text; contrast: weights of arms; expects: 'above' (zero),
                  'not_below' or 'within' (a margin in the metric's unit);
                  metric: another one
"""

import dataclasses
import difflib
import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from st_moe import gin_files
from st_moe.errors import UserError

FILE = 'study.toml'
RECIPES = ('pretrain', 'finetune')
EXPECTATIONS = ('above', 'not_below', 'within')


@dataclasses.dataclass(frozen=True)
class Metric:
  """A number by which arms are compared.

  Attributes:
    key: of a result's values.
    label: what it is, for tables and axes.
    digits: shown behind the point.
    repeats: whether a run that is done again has the same value.
  """

  key: str
  label: str
  digits: int = 4
  repeats: bool = True


METRICS = {
  # Minus the cross entropy per target token, sentinels included: the paper's.
  'neg_log_perplexity': Metric(
    'eval/neg_log_perplexity_all_targets',
    'held-out negative log perplexity, nats per target token',
  ),
  'router_z_loss': Metric(
    'router/z_loss', 'router z-loss, unweighted, mean over sparse layers'
  ),
  'fraction_dropped': Metric(
    'router/fraction_dropped', 'share of tokens without an expert'
  ),
  'seconds_per_step': Metric(
    'seconds_per_step', 'seconds of a training step, median', 4, False
  ),
  # Of tasks with answers, from 0 to 100: of SuperGLUE its average.
  'score': Metric(
    'peak/eval/score', 'highest score on development sets, 0 to 100', 2
  ),
  'train_cross_entropy': Metric(
    'train/cross_entropy',
    'cross entropy in training at the end, nats per target token',
  ),
  'stable': Metric('stable', 'share of runs that stay stable', 2),
}


@dataclasses.dataclass(frozen=True)
class Paper:
  """What the paper prints of an arm; None: not printed.

  Attributes:
    value: mean of the metric.
    sd: standard deviation over seeds.
    stable: stable runs, and all.
  """

  value: float | None = None
  sd: float | None = None
  stable: tuple[int, int] | None = None


@dataclasses.dataclass(frozen=True)
class Arm:
  """One row of a table.

  Attributes:
    name: of the arm, and of its results.
    files: its gin files, in order.
    paper: what the paper printed of it.
    papers: the same at some scales.
    settings: {scale: {name: value}}, after the files.
    scales: at which it exists; None: all.
    dense: whether it begins with the dense model of a fine-tuning study.
  """

  name: str
  files: tuple[Path, ...]
  paper: Paper = Paper()
  papers: Mapping[str, Paper] = dataclasses.field(default_factory=dict)
  settings: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )
  scales: tuple[str, ...] | None = None
  dense: bool = False

  def exists_at(self, scale: str) -> bool:
    return self.scales is None or scale in self.scales

  def paper_at(self, scale: str) -> Paper:
    return self.papers.get(scale, self.paper)


@dataclasses.dataclass(frozen=True)
class Claim:
  """A statement of the paper about a weighted sum of arms.

  Attributes:
    text: the statement.
    contrast: {arm: weight}.
    expects: 'above': the sum is above 0; 'not_below': above -margin;
      'within': between -margin and margin.
    metric: a name of METRICS.
    margin: in the metric's unit.
  """

  text: str
  contrast: Mapping[str, float]
  expects: str
  metric: str
  margin: float = 0.0


@dataclasses.dataclass(frozen=True)
class Study:
  """A grid of arms and what is to be learned from it; see the module."""

  name: str
  folder: Path
  title: str
  paper: str
  setting: str
  metric: str
  reference: str
  arms: tuple[Arm, ...]
  claims: tuple[Claim, ...]
  recipe: str = 'pretrain'
  notes: tuple[str, ...] = ()
  scales: Mapping[str, Mapping[str, Any]] = dataclasses.field(
    default_factory=dict
  )

  def with_arms(self, names: Collection[str]) -> 'Study':
    """Returns the study with some of its arms only."""
    arms = tuple(arm for arm in self.arms if arm.name in names)
    return dataclasses.replace(self, arms=arms)

  def arms_at(self, scale: str) -> list[Arm]:
    return [arm for arm in self.arms if arm.exists_at(scale)]

  def claims_at(self, scale: str) -> list[Claim]:
    """Returns the claims all of whose arms exist at a scale."""
    there = {arm.name for arm in self.arms_at(scale)}
    return [claim for claim in self.claims if there.issuperset(claim.contrast)]

  def metrics(self) -> set[str]:
    """Returns the names of all metrics that are asked for."""
    return {self.metric, *(claim.metric for claim in self.claims)}


def names() -> list[str]:
  """Returns the names of the package's studies."""
  folders = (gin_files.GIN_ROOT / 'ablations').glob(f'*/{FILE}')
  return sorted(path.parent.name for path in folders)


def find_study(name: str) -> Study:
  """Reads a study of the package by name, or any by its folder.

  Raises:
    UserError: no such study, with the nearest; a declaration that is wrong.
  """
  folder = gin_files.GIN_ROOT / 'ablations' / name
  if '/' in name or name not in names():
    folder = Path(name)
  if not (folder / FILE).is_file():
    near = difflib.get_close_matches(name, names(), n=3, cutoff=0.5)
    if not near:
      near = [known for known in names() if name in known]
    raise UserError(
      f'no study {name}'
      + (f'; did you mean {" or ".join(near)}?' if near else '')
      + ' (`st_moe study list` shows all; a folder with a '
      f'{FILE} is a study too)'
    )
  return read_study(folder)


def read_study(folder: Path) -> Study:
  """Reads and checks `study.toml` of a folder."""
  path = folder / FILE
  try:
    content = tomllib.loads(path.read_text(encoding='utf-8'))
  except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as e:
    raise UserError(f'{path} cannot be read: {e}') from e
  reader = _Reader(path)
  reader.keys(
    content,
    'the study',
    needed=('title', 'paper', 'metric', 'reference', 'arms'),
    others=('setting', 'notes', 'scales', 'claims', 'recipe'),
  )
  metric = reader.one_of(content['metric'], METRICS, 'metric')
  arms = tuple(reader.arm(arm) for arm in content['arms'])
  known = [arm.name for arm in arms]
  if len(set(known)) < len(known):
    reader.fail(f'an arm stands twice among {", ".join(known)}')
  reader.one_of(content['reference'], known, 'reference')
  return Study(
    name=folder.resolve().name,
    folder=folder,
    title=content['title'],
    paper=content['paper'],
    setting=content.get('setting', ''),
    metric=metric,
    reference=content['reference'],
    arms=arms,
    claims=tuple(
      reader.claim(claim, known, metric) for claim in content.get('claims', ())
    ),
    recipe=reader.one_of(content.get('recipe', 'pretrain'), RECIPES, 'recipe'),
    notes=tuple(content.get('notes', ())),
    scales=content.get('scales', {}),
  )


class _Reader:
  """Makes the parts of a study of what TOML gives, or says what is wrong."""

  def __init__(self, path: Path):
    self._path = path

  def fail(self, text: str):
    raise UserError(f'{gin_files.shown(self._path.resolve())}: {text}')

  def keys(
    self,
    table: Any,
    what: str,
    *,
    needed: tuple[str, ...],
    others: tuple[str, ...] = (),
  ) -> None:
    """Checks the keys of a table."""
    if not isinstance(table, dict):
      self.fail(f'{what} must be a table, got {table!r}')
    for key in needed:
      if key not in table:
        self.fail(f'{what} has no {key}')
    for key in table:
      if key not in (*needed, *others):
        self.fail(
          f'{what} has no key {key} (only {", ".join((*needed, *others))})'
        )

  def one_of(self, value: Any, known: Any, what: str) -> Any:
    if value not in known:
      near = difflib.get_close_matches(str(value), list(known), n=1)
      self.fail(
        f'{what} {value!r} is none of {", ".join(known)}'
        + (f'; did you mean {near[0]}?' if near else '')
      )
    return value

  def paper(self, value: Any, arm: str) -> Paper:
    if isinstance(value, int | float):
      return Paper(float(value))
    self.keys(
      value, f'paper of {arm}', needed=(), others=('value', 'sd', 'stable')
    )
    stable = value.get('stable')
    return Paper(
      value.get('value'), value.get('sd'), stable and (stable[0], stable[1])
    )

  def arm(self, table: Any) -> Arm:
    self.keys(
      table,
      'an arm',
      needed=('name',),
      others=('gin', 'paper', 'papers', 'settings', 'scales', 'dense'),
    )
    name = table['name']
    given = table.get('gin', f'{name}.gin')
    folder, files = self._path.parent, []
    for gin in [given] if isinstance(given, str) else given:
      files.append((folder.parent if '/' in gin else folder) / gin)
      if not files[-1].is_file():
        self.fail(f'arm {name}: there is no {files[-1]}')
    scales = table.get('scales')
    papers = table.get('papers', {})
    return Arm(
      name=name,
      files=tuple(files),
      paper=self.paper(table.get('paper', {}), name),
      papers={scale: self.paper(papers[scale], name) for scale in papers},
      settings=table.get('settings', {}),
      scales=scales and tuple(scales),
      dense=table.get('dense', False),
    )

  def claim(self, table: Any, arms: list[str], metric: str) -> Claim:
    self.keys(
      table,
      'a claim',
      needed=('text', 'contrast', 'expects'),
      others=('metric', 'margin'),
    )
    for arm in table['contrast']:
      self.one_of(arm, arms, f'{table["text"]}: arm')
    expects = self.one_of(table['expects'], EXPECTATIONS, 'expects')
    margin = float(table.get('margin', 0.0))
    if (expects == 'above') != (margin == 0.0):
      self.fail(f'{table["text"]}: a margin belongs to not_below and within')
    claim = Claim(
      text=table['text'],
      contrast={arm: float(w) for arm, w in table['contrast'].items()},
      expects=expects,
      metric=self.one_of(table.get('metric', metric), METRICS, 'metric'),
      margin=margin,
    )
    weights = sorted(claim.contrast.values())
    if claim.metric == 'stable' and weights != [-1.0, 1.0]:
      self.fail(f'{claim.text}: stability compares two arms, with 1 and -1')
    return claim
