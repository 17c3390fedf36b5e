"""Host side of the input pipeline: numpy in, numpy out.

* `datasets.load` finds a prepared data set, or a `folder` of photographs, and
  reads it example by example;
* `prepare` makes one, by `python -m nfnets_jax.data.prepare NAME`: `imagenet`
  checks archives, `tfrecord` converts and `storage` looks at the disk;
* `transforms` decodes, crops, flips and resizes one image;
* `loader` shuffles, batches and shares the batches among processes.

Mixing, RandAugment and normalisation follow on the device, in
`nfnets_jax.augment`: what leaves here is uint8.
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
