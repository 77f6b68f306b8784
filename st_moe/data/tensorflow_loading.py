"""Loading TensorFlow and seqio, when they are needed, without their banners."""

import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import Iterator

log = logging.getLogger(__name__)

_NOTICES = (b'I0000 ', b'WARNING: All log messages before absl::Init', b'\n')


def load_tensorflow() -> None:
  """Imports TensorFlow and seqio, which takes seconds: says so.

  The accelerator is JAX's: TensorFlow sees none.
  """
  if 'seqio' not in sys.modules:
    log.info('loading TensorFlow and seqio')
  with _without_banners():
    import seqio  # noqa: F401
  import tensorflow as tf

  tf.config.set_visible_devices([], 'GPU')


@contextlib.contextmanager
def _without_banners() -> Iterator[None]:
  """Keeps what TensorFlow prints while it loads off the terminal.

  It writes to file descriptor 2 whatever its log level. Anything that is not
  one of its notices is passed on.
  """
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # and later ones
  sys.stderr.flush()
  terminal = os.dup(2)
  with tempfile.TemporaryFile() as caught:
    os.dup2(caught.fileno(), 2)
    try:
      yield
    finally:
      sys.stderr.flush()
      os.dup2(terminal, 2)
      os.close(terminal)
      caught.seek(0)
      for line in caught:
        if not line.startswith(_NOTICES):
          os.write(2, line)
