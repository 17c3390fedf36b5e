"""The schema of a JobSet, jobset.x-k8s.io/v1alpha2.

After hack/python-sdk/swagger.json of kubernetes-sigs/jobset, commit 0336a8f,
with the values that the API allows. The package kubernetes-validate has
Kubernetes' own schema, for what is in a job's template.
"""


def _object(required=(), **properties):
  return {
    'type': 'object',
    'required': list(required),
    'additionalProperties': False,
    'properties': properties,
  }


def _list(items):
  return {'type': 'array', 'items': items}


_TEXT, _BOOL = {'type': 'string'}, {'type': 'boolean'}
_INT = {'type': 'integer', 'minimum': 0, 'maximum': 2**31 - 1}
# Names of jobs are part of host names.
_NAME = {'type': 'string', 'pattern': '^[a-z]([-a-z0-9]*[a-z0-9])?$'}

JOBSET = _object(
  ('apiVersion', 'kind', 'metadata', 'spec'),
  apiVersion={'const': 'jobset.x-k8s.io/v1alpha2'},
  kind={'const': 'JobSet'},
  metadata={
    'type': 'object',
    'required': ['name'],
    'properties': {'name': _NAME},
  },
  spec=_object(
    ('replicatedJobs',),
    coordinator=_object(
      ('replicatedJob',), replicatedJob=_TEXT, jobIndex=_INT, podIndex=_INT
    ),
    failurePolicy=_object(
      maxRestarts=_INT,
      restartStrategy={'enum': ['Recreate', 'BlockingRecreate']},
      rules=_list(
        _object(
          ('name', 'action'),
          name=_TEXT,
          action={
            'enum': [
              'FailJobSet',
              'RestartJobSet',
              'RestartJobSetAndIgnoreMaxRestarts',
            ]
          },
          onJobFailureReasons=_list(_TEXT),
          onJobFailureMessagePatterns=_list(_TEXT),
          targetReplicatedJobs=_list(_TEXT),
        )
      ),
    ),
    managedBy=_TEXT,
    network=_object(
      enableDNSHostnames=_BOOL, publishNotReadyAddresses=_BOOL, subdomain=_NAME
    ),
    replicatedJobs=_list(
      _object(
        ('name', 'template'),
        name=_NAME,
        groupName=_TEXT,
        replicas=_INT,
        template=_object(('spec',), metadata={}, spec={'type': 'object'}),
        dependsOn=_list(
          _object(
            ('name', 'status'),
            name=_TEXT,
            status={'enum': ['Ready', 'Complete']},
          )
        ),
      )
    ),
    startupPolicy=_object(
      ('startupPolicyOrder',),
      startupPolicyOrder={'enum': ['AnyOrder', 'InOrder']},
    ),
    successPolicy=_object(
      ('operator',),
      operator={'enum': ['All', 'Any']},
      targetReplicatedJobs=_list(_TEXT),
    ),
    suspend=_BOOL,
    ttlSecondsAfterFinished=_INT,
  ),
)
