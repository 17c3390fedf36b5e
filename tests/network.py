"""Hosts for tests: network namespaces of this machine, joined by a bridge.

Each host has a name, an address and a host name of its own, and reaches only
the bridge. Packets between hosts never leave the machine: the addresses are of
a range for tests (RFC 2544), and the hosts have no other route.
"""

import contextlib
import os
import pathlib
import subprocess
from collections.abc import Iterator, Sequence

import pytest

# Runs a command with a host name and a table of hosts of its own. Each part
# replaces itself by the next, so that a signal reaches the command.
_START = 'hostname "$1" && mount --bind "$2" /etc/hosts && shift 2 && exec "$@"'


class Network:
  """`host0`, `host1` and so on, each a network namespace.

  Attributes:
    gateway: the address of the bridge, on this machine, that all hosts reach.
  """

  def __init__(
    self, folder: pathlib.Path, hosts: int, names: Sequence[str] = ()
  ):
    """Plans the hosts; those of `names` have a second name."""
    self._id = f'nf{os.getpid() % 100_000}'
    subnet = f'198.18.{os.getpid() % 256}'
    self.gateway = f'{subnet}.254'
    self._subnet = subnet
    self._count = hosts
    self._table = folder / 'hosts'
    lines = [f'{subnet}.{i + 1} host{i}' for i in range(hosts)]
    for host, name in enumerate(names):
      lines[host] += f' {name}'
    self._table.write_text('\n'.join(['127.0.0.1 localhost', *lines, '']))

  def __enter__(self) -> 'Network':
    try:
      self._create()
    except BaseException:
      self.__exit__()
      raise
    return self

  def _create(self) -> None:
    _ip('link', 'add', self._id, 'type', 'bridge')
    _ip('address', 'add', f'{self.gateway}/24', 'dev', self._id)
    _ip('link', 'set', self._id, 'up')
    for host in range(self._count):
      name, port = self._namespace(host), self._port(host)
      _ip('netns', 'add', name)
      eth0 = ('eth0', 'netns', name)
      _ip('link', 'add', port, 'type', 'veth', 'peer', 'name', *eth0)
      _ip('link', 'set', port, 'master', self._id, 'up')
      address = f'{self._subnet}.{host + 1}/24'
      _ip('-n', name, 'address', 'add', address, 'dev', 'eth0')
      for device in ('lo', 'eth0'):
        _ip('-n', name, 'link', 'set', device, 'up')

  def __exit__(self, *exception: object) -> None:
    for host in range(self._count):
      # A deleted namespace takes its end of the cable with it.
      subprocess.run(['ip', 'netns', 'delete', self._namespace(host)])
    subprocess.run(['ip', 'link', 'delete', self._id])

  def _namespace(self, host: int) -> str:
    return f'{self._id}-host{host}'

  def _port(self, host: int) -> str:
    return f'{self._id}-{host}'

  def on(self, host: int, words: Sequence[str]) -> list[str]:
    """Returns the command line that runs a command on a host."""
    return [
      *('ip', 'netns', 'exec', self._namespace(host)),
      *('unshare', '--mount', '--uts', 'sh', '-c', _START, 'sh'),
      *(f'host{host}', str(self._table), *words),
    ]

  def cut(self, host: int) -> None:
    """Drops all packets from and to a host, without an error to either."""
    _set_port(self._port(host), '0')

  def mend(self, host: int) -> None:
    """Undoes `cut`."""
    _set_port(self._port(host), '3')


def _ip(*words: str) -> None:
  subprocess.run(['ip', *words], check=True, capture_output=True, text=True)


def _set_port(port: str, state: str) -> None:
  """Sets the state of a port of the bridge: 0 drops, 3 forwards."""
  words = ['bridge', 'link', 'set', 'dev', port, 'state', state]
  subprocess.run(words, check=True, capture_output=True, text=True)


@contextlib.contextmanager
def of(
  folder: pathlib.Path, hosts: int, names: Sequence[str] = ()
) -> Iterator[Network]:
  """Enters a network of hosts; skips the test where there can be none."""
  try:
    subprocess.run(
      ['unshare', '--net', '--mount', '--uts', 'ip', 'link'],
      check=True,
      capture_output=True,
      text=True,
    )
  except FileNotFoundError as error:
    pytest.skip(f'no network namespaces: {error}; install iproute2')
  except subprocess.CalledProcessError as error:
    pytest.skip(f'no network namespaces: {error.stderr.strip()}')
  with Network(folder, hosts, names) as network:
    yield network
