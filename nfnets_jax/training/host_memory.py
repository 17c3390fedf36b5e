"""glibc malloc settings for computing on CPU."""

import ctypes
import platform

# `mallopt` parameters, from glibc's malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_ARENA_MAX = -8


def keep_freed_memory() -> bool:
  """Makes this process keep freed memory for the next step.

  XLA on CPU reallocates its temporary buffers at each step. By default, glibc
  returns large blocks to the system, which clears every page again: for a step
  of NFNet-F0 with eight images, 200,000 page faults and up to a tenth of the
  time. For processes that train or predict on CPU: memory stays allocated until
  `give_back_freed_memory`, and threads share one heap. Returns False, and does
  nothing, without glibc.

  Example:
    >>> keep_freed_memory() == (platform.libc_ver()[0] == 'glibc')
    True
  """
  if platform.libc_ver()[0] != 'glibc':
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # Allocates large blocks on the main heap, which is never trimmed (−1 is the
  # maximum threshold); other heaps could not hold them.
  done = [
    mallopt(name, value)
    for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
  ]
  return all(done)


def give_back_freed_memory() -> bool:
  """Returns freed memory to the system, as between two nets.

  Large blocks of other sizes leave holes in the heap that nothing fills.
  Returns False, and does nothing, without glibc.

  Example:
    >>> give_back_freed_memory() == (platform.libc_ver()[0] == 'glibc')
    True
  """
  if platform.libc_ver()[0] != 'glibc':
    return False
  ctypes.CDLL(None).malloc_trim(0)
  return True
