"""Host side of the input pipeline: numpy in, numpy out.

* `datasets.load` finds a prepared data set, or a `folder` of photographs, and
  reads it example by example;
* `prepare` makes one: `python -m nfnets_jax.data.prepare NAME`, with `imagenet`
  to check the archives, `tfrecord` to convert and `storage` to look at the disk;
* `transforms` decodes, crops, flips and resizes one image;
* `loader` shuffles, batches and shares the batches among processes.

Mixing, RandAugment and normalisation follow on the device, in
`nfnets_jax.augment`: what leaves here is uint8.
"""
