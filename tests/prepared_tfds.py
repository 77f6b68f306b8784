"""Small tfds datasets on disk, for tests."""

import itertools

import tensorflow as tf
import tensorflow_datasets as tfds


def prepare_tfds(root, config, splits, version='3.0.1', files=1):
  """Writes `c4/CONFIG/VERSION` as tfds would, from lists of texts.

  Each split has so many `files`, or one for each text.
  """
  folder = root / 'c4' / config / version
  folder.mkdir(parents=True)
  features = tfds.features.FeaturesDict({'text': tfds.features.Text()})
  names = '{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}'
  template = tfds.core.ShardedFileTemplate(
    data_dir=folder,
    template=names,
    dataset_name='c4',
    filetype_suffix='tfrecord',
  )
  infos = []
  for split, texts in splits.items():
    count = min(files, len(texts))
    bounds = [len(texts) * i // count for i in range(count + 1)]
    for i, (first, last) in enumerate(itertools.pairwise(bounds)):
      path = folder / f'c4-{split}.tfrecord-{i:05d}-of-{count:05d}'
      with tf.io.TFRecordWriter(str(path)) as writer:
        for text in texts[first:last]:
          writer.write(features.serialize_example({'text': text}))
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
