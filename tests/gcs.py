"""Google Cloud Storage on this machine: gcp-storage-emulator and what it lacks.

python tests/gcs.py HOST PORT

Locks and tensorstore depend on the generations of objects. The emulator ignores
conditions on them, and does not tell the generation of what is read, which
tensorstore takes for 0 and then refuses to replace (`Malformed
StorageGeneration`). It also serves one connection at a time, so that a host
that is cut off while it writes stops all others.
"""

import functools
import http.server
import sys
import threading
from http import HTTPStatus

from gcp_storage_emulator import server, storage
from gcp_storage_emulator.handlers import buckets

BUCKET = 'bucket'

_one_at_a_time = threading.RLock()


class _Server(http.server.ThreadingHTTPServer):
  request_queue_size = 128


class _Handler(server.RequestHandler):
  timeout = 20  # seconds without a byte from a client


def _generation(request, store):
  """The generation of an object that is asked for; '0' if there is none."""
  name = request.params.get('object_id') or request.query.get('name', [''])[0]
  if not name and isinstance(request.data, dict):
    name = request.data.get('meta', request.data).get('name')
  objects = store.objects.get(request.params.get('bucket_name'), {})
  return objects[name]['generation'] if name in objects else '0'


def _with_generations(handle):
  """Adds conditions on generations, and the generation of what is read."""

  @functools.wraps(handle)
  def wrapped(request, response, store):
    _ = request.data  # read before the lock: the client may be cut off
    with _one_at_a_time:
      now = _generation(request, store)
      if request.query.get('ifGenerationMatch', [now]) != [now]:
        response.status = HTTPStatus.PRECONDITION_FAILED
      elif request.query.get('ifGenerationNotMatch') == [now]:
        response.status = HTTPStatus.NOT_MODIFIED
      else:
        handle(request, response, store)
        if request.method == server.GET and now != '0':
          response['x-goog-generation'] = now

  return wrapped


def main(host, port):
  """Serves an empty bucket from memory until it is killed."""
  server.HANDLERS = tuple(
    (pattern, {method: _with_generations(x) for method, x in handlers.items()})
    for pattern, handlers in server.HANDLERS
  )
  store = storage.Storage(use_memory_fs=True)
  buckets.create_bucket(BUCKET, store)
  # Else what is deleted stays in memory for a week.
  policy = {'softDeletePolicy': {'retentionDurationSeconds': '0'}}
  store.buckets[BUCKET].update(policy)
  handler = functools.partial(_Handler, store)
  _Server((host, int(port)), handler).serve_forever()


if __name__ == '__main__':
  main(*sys.argv[1:])
