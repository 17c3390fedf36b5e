"""Downloads data sets and writes them as ArrayRecord files, once.

`python -m nfnets_jax.data.prepare NAME` is the command, `prepare` the function.
`build` uses TFDS, `imagenet` checks the archives, `tfrecord` converts TFRecord
files, and `storage` checks the disk.
"""

from nfnets_jax.data.prepare.build import prepare as prepare
