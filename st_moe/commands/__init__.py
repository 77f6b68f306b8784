"""The commands of the command line: from its words to the modules that act.

Each takes what `arguments.parse` returned. What is heavy is imported inside,
so that a wrong word is answered at once.
"""

import argparse
from collections.abc import Callable

from st_moe.commands import models, settings, studies, texts, training

COMMANDS: dict[str, Callable[[argparse.Namespace], None]] = {
  'pretrain': training.pretrain,
  'finetune': training.finetune,
  'evaluate': models.evaluate,
  'predict': models.predict,
  'config': settings.config,
  'vocab': texts.vocab,
  'cache': texts.cache,
  'bench': models.bench,
  'plan': models.plan,
  'trace': models.trace,
  'study': studies.study,
  'convert': models.convert,
}
