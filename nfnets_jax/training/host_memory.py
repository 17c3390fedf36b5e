"""The memory of the host, where the host computes."""

import ctypes
import platform

# Parameters of glibc's `mallopt`, from its malloc.h.
_TRIM_THRESHOLD = -1
_MMAP_MAX = -4
_ARENA_MAX = -8


def keep_freed_memory() -> bool:
  """Makes this process keep memory that is freed, for the next step.

  XLA for CPU allocates its temporary buffers anew in each step, and glibc gives
  blocks of that size back to the system each time, which then has to clear page
  after page: a fifth of a million page faults, and up to a tenth of the time,
  for a step of NFNet-F0 with eight images. It is for processes that train or
  predict on CPU: what was once taken is not given back unless
  `give_back_freed_memory` is called, and threads share one heap.

  Returns:
    Whether it could be done: False where the C library is not glibc.

  Example:
    >>> keep_freed_memory() == (platform.libc_ver()[0] == 'glibc')
    True
  """
  if platform.libc_ver()[0] != 'glibc':
    return False
  mallopt = ctypes.CDLL(None).mallopt
  # Large blocks live on the heap, which is never cut at its end; other heaps
  # than the main one could not hold them. −1 is the largest threshold.
  done = [
    mallopt(name, value)
    for name, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, -1), (_ARENA_MAX, 1))
  ]
  return all(done)


def give_back_freed_memory() -> bool:
  """Gives the system what is freed and was kept, as between two nets.

  Large blocks of another size leave holes on the heap that nothing fills.

  Returns:
    Whether the C library is glibc; nothing is done otherwise.

  Example:
    >>> give_back_freed_memory() == (platform.libc_ver()[0] == 'glibc')
    True
  """
  if platform.libc_ver()[0] != 'glibc':
    return False
  ctypes.CDLL(None).malloc_trim(0)
  return True
