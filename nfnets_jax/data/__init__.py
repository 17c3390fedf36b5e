"""Host side of the input pipeline: numpy in, numpy out.

* `datasets.load` opens a data set with random access: of TFDS (`builders` and
  `shards`), a `folder` of images or `fake`;
* `decode` decodes images of any type to uint8 RGB;
* `crops` and `resize` make them square, `mixing` combines two, and
  `randaugment` applies random `operations`;
* `transforms` composes these for training and for evaluation;
* `loader` shuffles (`shuffle`), batches and splits the batches among processes,
  and `workers` build them in parallel;
* `labels` maps the classes of a data set to those of a net;
* `prepare` downloads and writes a data set, once.

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
