"""Small tfds datasets on disk, for tests."""

import itertools

import tensorflow as tf
import tensorflow_datasets as tfds


def prepare_tfds(root, config, splits, version='3.0.1', files=1):
  """Writes `c4/CONFIG/VERSION` as tfds would, from lists of texts.

  Each split has so many `files`, or one for each text.
  """
  features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
  rows = {
    split: [{'text': text} for text in texts] for split, texts in splits.items()
  }
  write_tfds(root / 'c4' / config / version, 'c4', features, rows, files)


def prepare_dataset(root, dataset, splits):
  """Writes rows as tfds would, with the features of its own builder.

  Args:
    root: of all datasets.
    dataset: 'super_glue/cb'.
    splits: {split: its rows}.
  """
  builder = tfds.builder(dataset, data_dir=root)
  folder = root / dataset / str(builder.version)
  features = builder.info.features
  write_tfds(folder, dataset.partition('/')[0], features, splits)


def write_tfds(folder, name, features, splits, files=1):
  """Writes the files of a dataset, and what tfds says about it."""
  folder.mkdir(parents=True)
  names = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder,
    template=names,
    dataset_name=name,
    filetype_suffix='tfrecord',
  )
  infos = []
  for split, rows in splits.items():
    count = min(files, len(rows))
    bounds = [len(rows) * i // count for i in range(count + 1)]
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
      path = folder / f'{name}-{split}.tfrecord-{i:05d}-of-{count:05d}'
      with tf.io.TFRecordWriter(str(path)) as writer:
        for row in rows[first:last]:
          encoded = features.encode_example(row)
          writer.write(features.serialize_example(encoded))
    infos.append(
      tfds.core.SplitInfo(
        name=split,
        shard_lengths=[b - a for a, b in itertools.pairwise(bounds)],
        num_bytes=0,
        filename_template=template.replace(split=split),
      )
    )
  tfds.folder_dataset.write_metadata(
    data_dir=folder,
    features=features,
    split_infos=infos,
    filename_template=names,
  )
