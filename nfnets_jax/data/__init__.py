"""Host side of the input pipeline: numpy in, numpy out.

* `datasets.load` opens a prepared data set or a `folder` of images, with random
  access;
* `prepare` downloads and writes one, `python -m nfnets_jax.data.prepare NAME`:
  `imagenet` checks archives, `tfrecord` converts and `storage` checks the disk;
* `decode` decodes images of any type to uint8 RGB;
* `crops` and `resize` make them square, `mixing` combines two, and
  `randaugment` applies random `operations`;
* `transforms` composes these for training and for evaluation;
* `loader` shuffles, batches and splits the batches among processes.

The output is uint8; normalisation happens on the device.
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
