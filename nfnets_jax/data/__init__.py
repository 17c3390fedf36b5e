"""Host side of the input pipeline: numpy in, numpy out.

* `datasets.load` finds a prepared data set, or a `folder` of photographs, and
  reads it example by example;
* `prepare` makes one, by `python -m nfnets_jax.data.prepare NAME`: `imagenet`
  checks archives, `tfrecord` converts and `storage` looks at the disk;
* `decode` makes uint8 RGB of an image of any type;
* `crops` and `resize` make a square of it, `mixing` one image of two, and
  `randaugment` distorts that by random `operations`;
* `transforms` does these in order, for training and for evaluation;
* `loader` shuffles, batches and shares the batches among processes.

What leaves here is uint8; the device only normalises it.
"""

from nfnets_jax import extras

extras.need(
  'train',
  'array_record',
  'grain',
  'PIL',
  'scipy',
  'simplejpeg',
  'tensorflow_datasets',
  'tqdm',
)
