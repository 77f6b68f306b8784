"""One epoch of t5's documents through an objective, t5's or ours."""

import functools

import numpy as np
import seqio
import tensorflow as tf


def stream(texts, objective, lengths, seed, shuffle) -> dict[str, np.ndarray]:
  """Returns the model features of one epoch, one array [rows, length] each."""
  feature = seqio.Feature(seqio.ByteVocabulary(extra_ids=100), add_eos=True)
  task = seqio.Task(
    'stream',
    source=seqio.FunctionDataSource(
      lambda split, shuffle_files, seed=None: (
        tf.data.Dataset.from_tensor_slices({'text': texts})
      ),
      splits=['train'],
    ),
    preprocessors=[
      functools.partial(
        seqio.preprocessors.rekey, key_map={'inputs': None, 'targets': 'text'}
      ),
      seqio.preprocessors.tokenize,
      seqio.CacheDatasetPlaceholder(),
      objective,
      seqio.preprocessors.append_eos_after_trim,
    ],
    output_features={'inputs': feature, 'targets': feature},
  )
  dataset = seqio.get_dataset(
    mixture_or_task_name=task,
    task_feature_lengths=lengths,
    feature_converter=seqio.EncDecFeatureConverter(pack=False),
    dataset_split='train',
    shuffle=shuffle,
    seed=seed,
    num_epochs=1,
  )
  rows = list(dataset.as_numpy_iterator())
  return {name: np.stack([row[name] for row in rows]) for name in rows[0]}
