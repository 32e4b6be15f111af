"""The Valkey keys of jobs; the scripts that change most of them are in transitions_lua.py.

pp:job:{id}                 hash     `fixed` (JSON of FixedPart), and each value that changes
pp:job:{id}:events          zset     Event (JSON), by sequence number
pp:job:{id}:checkpoints     hash     step -> Checkpoint (JSON)
pp:job:{id}:claim           string   the publisher that may try it; expires
pp:jobs:{tenant}            zset     job ids, by creation (Unix seconds)
pp:jobs:{tenant}:active     set      job ids that have not ended
pp:jobs:{tenant}:tokens:{}  string   by day (UTC, since 1970): tokens that its jobs train on; expires
pp:jobs:{tenant}:same:{..}  string   by hash of an idempotency key: "FINGERPRINT JOB"; expires
pp:jobs:queued              zset     jobs in phase queued, by when a worker was last woken for them (ms)
pp:jobs:leases              zset     jobs in phase training, by when the lease ends (ms)
pp:jobs:publishing          zset     jobs in phase publishing, by when training finished (ms)
pp:figures                  hash     counter -> total of all workers; finished:STATUS -> number of jobs
pp:figures:workers          hash     worker -> WorkerState (JSON), its latest report
pp:worker-queue             list     job ids that wake idle workers, see queue.py
"""

QUEUED = "pp:jobs:queued"
LEASES = "pp:jobs:leases"
PUBLISHING = "pp:jobs:publishing"
COUNTERS = "pp:figures"
WORKERS = "pp:figures:workers"
WORKER_QUEUE = "pp:worker-queue"


def job_key(id_: str) -> str:
    """The job's record; of "", the prefix of all."""
    return f"pp:job:{id_}"


def tenant_key(tenant: str) -> str:
    """Ids of the tenant's jobs; of "", the prefix of all tenants' keys."""
    return f"pp:jobs:{tenant}"
