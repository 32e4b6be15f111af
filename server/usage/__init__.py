"""The ledger of usage: each generation request, adapter load and fine-tuning job leaves one record.

A record says whose it is (tenant, key), what it used (adapter version, tokens by kind, bytes, seconds) and
how it ended. Valkey keeps sums of records by day, tenant, adapter and key; a record itself lives from its
event until it is in the sums. Each record is in the sums exactly once, whichever process is killed meanwhile:

request   The API process notes its beginning in its journal, its state while it runs once a second, and its
          end *before* the client sees the end of the answer. The journal is a file: what was written to it
          outlives the process. A few times a second one call of Valkey adds all ended requests to the sums.
load      The engine writes those of the last second as a journal of their own, in a whole file.
job       The script that ends the job in Valkey (finetune/jobs/transitions_lua.py) adds it to the sums in the
          same step.

A process holds a lock on its journal. A journal that nobody holds is one of the engine's or of a process that
was killed: any API process takes it, adds its records to the sums, and removes it (journal.py). A request
that was running then is counted with its last noted state and the outcome `cut`.

Records of a journal have consecutive numbers, and Valkey keeps, for each journal, the last that it has
added (counts_lua.py). So a repeated call, or a journal that is read again after a crash, adds nothing twice,
however much later that is, and no record's id has to be remembered.

If Valkey is slow or away, records stay in memory and in the journal, which is then synced to the disk, and
are added later. If the disk is full they stay in memory. Both are bounded; what fits neither is counted as
lost. A power failure can lose the records of the last moment, FLUSH_SECONDS, of an API process.

The sums of a day have at most MAX_GROUPS pairs of adapter and key for a tenant; more share one, "other". Days
older than `usage_days` are deleted. So memory follows what is in use, and not the number of requests.

The engine's own counters also have what nobody is charged for: the trial of a new version, an end-of-text
token, tokens computed beyond a stop string or after the client has left, and prompts computed again after a
preemption.
"""
