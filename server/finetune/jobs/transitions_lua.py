"""The transitions of a job as Lua scripts, each atomic and idempotent. The keys they change: keys.py.

A job whose lease has expired goes back to the queue, with the fence of the lease in `lapsed`. Until another
worker takes the job, the next call under that fence gives it back to its worker, which was slow, not dead.

Scripts use Valkey's clock. They build keys from the job's id, so a cluster of several nodes is not supported.
"""

from adapters_store.maintenance.scheduled_deletes import SCHEDULED_KEY
from server.finetune.jobs.keys import COUNTERS, LEASES, PUBLISHING, QUEUED, job_key, tenant_key
from server.usage.counts_lua import ADD
from server.usage.record import Amounts

MAX_EVENTS = 2000
FIRST_JOB_AMOUNT = Amounts._fields.index("jobs")
DELETE_AFTER_SECONDS = 600  # from a job's end; by then its worker has noticed and writes no more objects

PRELUDE = (
    ADD
    + f"""
local id = ARGV[1]
local job = '{job_key("")}' .. id
local QUEUED, LEASES, PUBLISHING = '{QUEUED}', '{LEASES}', '{PUBLISHING}'
local function integer(number) return string.format('%.0f', number) end
local function jobs_of(tenant) return '{tenant_key("")}' .. tenant end
local function tokens_of(tenant, day) return jobs_of(tenant) .. ':tokens:' .. integer(day) end
local function get(field) return redis.call('HGET', job, field) or '' end
local function set(...) redis.call('HSET', job, ...) end
local function now()
  local time = redis.call('TIME')
  return time[1] * 1000 + math.floor(time[2] / 1000)
end
local function seconds() return redis.call('TIME')[1] end
local function event(json)
  local events = job .. ':events'
  if json == '' or redis.call('ZSCORE', events, json) then return end
  redis.call('ZADD', events, redis.call('HINCRBY', job, 'events', 1), json)
  redis.call('ZREMRANGEBYRANK', events, 0, -1 - {MAX_EVENTS})
end
local function leave_sets()
  for _, where in ipairs({{QUEUED, LEASES, PUBLISHING}}) do redis.call('ZREM', where, id) end
end
-- whether the fence is that of the job's worker; renews an expired lease that no other worker has taken
local function training(fence)
  if get('phase') == 'queued' and get('lapsed') == fence then
    leave_sets()
    local lease_until = integer(now() + get('lease_ms'))
    set('status', 'running', 'phase', 'training', 'fence', fence, 'lapsed', '', 'lease_until', lease_until)
    redis.call('ZADD', LEASES, lease_until, id)
  end
  return get('phase') == 'training' and get('fence') == fence
end
-- the job's record in the ledger of usage: `amounts` are the last of server/usage/record.py's Amounts
local function add_job_to_usage(status)
  local fixed = cjson.decode(get('fixed'))
  local version, started, ended = get('version'), tonumber(get('started')), tonumber(seconds())
  local adapter = version == '' and fixed.name or fixed.name .. '@' .. version
  local amounts = {{}}
  for i = 1, {FIRST_JOB_AMOUNT} do amounts[i] = 0 end
  local function amount(number) amounts[#amounts + 1] = number end
  amount(1)
  amount(status == 'failed' and 1 or 0)
  amount(status == 'cancelled' and 1 or 0)
  amount(tonumber(get('trained_tokens')) or 0)
  amount(math.max(0, ended - (started or ended)) * 1000)
  add_usage(math.floor(ended / 86400), get('tenant'), adapter .. ' ' .. (fixed.key or ''), amounts)
end
-- the tokens that the job has taken of its day and did not train on
local function give_back(tenant)
  local unused = (tonumber(get('tokens')) or 0) - (tonumber(get('trained_tokens')) or 0)
  local key = tokens_of(tenant, tonumber(get('day')) or 0)
  if unused > 0 and redis.call('EXISTS', key) == 1 then redis.call('DECRBY', key, integer(unused)) end
end
local function finish(status)
  add_job_to_usage(status)
  leave_sets()
  set('status', status, 'phase', 'done', 'finished', seconds(), 'pausing', 0)
  redis.call('HDEL', job, 'estimated_finish')
  redis.call('HINCRBY', job, 'fence', 1)
  redis.call('HINCRBY', '{COUNTERS}', 'finished:' .. status, 1)
  local tenant = get('tenant')
  give_back(tenant)
  redis.call('SREM', jobs_of(tenant) .. ':active', id)
  redis.call('ZADD', '{SCHEDULED_KEY}', integer(now() + {DELETE_AFTER_SECONDS * 1000}),
             'tenants/' .. tenant .. '/jobs/' .. id .. '/')
end
local function pause()
  leave_sets()
  set('status', 'queued', 'phase', 'paused', 'pausing', 0)
  redis.call('HDEL', job, 'estimated_finish')
  redis.call('HINCRBY', job, 'fence', 1)
end
local function queue()
  leave_sets()
  set('status', 'queued', 'phase', 'queued', 'lapsed', '')
  redis.call('HDEL', job, 'estimated_finish')
  redis.call('HINCRBY', job, 'fence', 1)
  redis.call('ZADD', QUEUED, 0, id)
end
"""
)

CREATE = """
local tenant, same, fingerprint = ARGV[2], ARGV[3], ARGV[4]
local fixed, created, max_active, same_seconds = ARGV[5], ARGV[6], tonumber(ARGV[7]), ARGV[8]
local tokens, max_tokens = tonumber(ARGV[9]), tonumber(ARGV[10])
local active = jobs_of(tenant) .. ':active'
if same ~= '' then
  same = jobs_of(tenant) .. ':same:' .. same
  local known = redis.call('GET', same)
  if known then return known end
end
if redis.call('EXISTS', job) == 1 then return '' end
if redis.call('SCARD', active) >= max_active then return 'quota' end
local day = math.floor(seconds() / 86400)
local taken = tonumber(redis.call('GET', tokens_of(tenant, day)) or 0)
if taken + tokens > max_tokens then return 'tokens ' .. integer(taken) end
redis.call('INCRBY', tokens_of(tenant, day), integer(tokens))
redis.call('EXPIRE', tokens_of(tenant, day), 2 * 86400)
set('fixed', fixed, 'tenant', tenant, 'tokens', integer(tokens), 'day', integer(day))
redis.call('SADD', active, id)
redis.call('ZADD', jobs_of(tenant), created, id)
if same ~= '' then redis.call('SET', same, fingerprint .. ' ' .. id, 'EX', same_seconds) end
queue()
for i = 11, #ARGV do event(ARGV[i]) end
return ''
"""

FORGET = """
if get('tenant') ~= ARGV[2] or get('phase') ~= 'done' then return 0 end
redis.call('ZREM', jobs_of(ARGV[2]), id)
redis.call('DEL', job, job .. ':events', job .. ':checkpoints', job .. ':claim')
return 1
"""

CANCEL = """
if get('tenant') ~= ARGV[2] then return 'unknown' end
if get('status') == 'cancelled' then return 'done' end
if get('phase') == 'done' then return 'over' end
if get('phase') == 'publishing' and get('intended') ~= '' then return 'publishing' end
finish('cancelled')
event(ARGV[3])
return 'done'
"""

PAUSE = """
if get('tenant') ~= ARGV[2] then return 'unknown' end
local phase = get('phase')
if phase == 'done' then return 'over' end
if phase == 'publishing' then return 'publishing' end
if phase == 'queued' then pause() event(ARGV[3]) end
if phase == 'training' and get('pausing') ~= '1' then set('pausing', 1) event(ARGV[3]) end
return 'done'
"""

RESUME = """
if get('tenant') ~= ARGV[2] then return 'unknown' end
if get('phase') == 'done' then return 'over' end
if get('phase') == 'paused' then set('attempts', 0) queue() event(ARGV[3]) end
if get('pausing') == '1' then set('pausing', 0) event(ARGV[3]) end
return 'done'
"""

TAKE = """
local worker, lease_ms = ARGV[2], ARGV[3]
if get('phase') == 'training' and get('worker') == worker then return redis.call('HGETALL', job) end
if get('phase') ~= 'queued' then return {} end
leave_sets()
redis.call('HINCRBY', job, 'fence', 1)
redis.call('HINCRBY', job, 'attempts', 1)
if get('started') == '' then set('started', seconds()) end
local lease_until = integer(now() + lease_ms)
set('status', 'running', 'phase', 'training', 'worker', worker, 'lease_until', lease_until)
set('lease_ms', lease_ms, 'lapsed', '')
redis.call('ZADD', LEASES, lease_until, id)
event(ARGV[4])
return redis.call('HGETALL', job)
"""

HEARTBEAT = """
if get('status') == 'cancelled' then return 'cancel' end
if not training(ARGV[2]) then return 'lost' end
local lease_until = integer(now() + ARGV[3])
set('lease_until', lease_until)
redis.call('ZADD', LEASES, lease_until, id)
for i = 4, #ARGV, 2 do set(ARGV[i], ARGV[i + 1]) end
return get('pausing') == '1' and 'pause' or 'go'
"""

EVENT = """
if not training(ARGV[2]) then return 0 end
event(ARGV[3])
return 1
"""

CHECKPOINT = """
if not training(ARGV[2]) then return 0 end
local step = tonumber(ARGV[3])
redis.call('HSET', job .. ':checkpoints', step, ARGV[4])
if step > tonumber(get('saved') == '' and 0 or get('saved')) then set('saved', step, 'attempts', 0) end
return 1
"""

RELEASE = """
if not training(ARGV[2]) then return 'lost' end
if tonumber(get('attempts')) > 0 then redis.call('HINCRBY', job, 'attempts', -1) end
if get('pausing') == '1' then pause() event(ARGV[4]) return 'paused' end
queue()
event(ARGV[3])
return 'queued'
"""

TRAINED = """
if get('won') == ARGV[2] then return 1 end
if not training(ARGV[2]) then return 0 end
leave_sets()
set('phase', 'publishing', 'won', ARGV[2], 'pausing', 0, 'result', ARGV[3])
set('step', ARGV[4], 'trained_tokens', ARGV[5])
redis.call('ZADD', PUBLISHING, integer(now()), id)
event(ARGV[6])
return 1
"""

FAIL = """
if not training(ARGV[2]) then return 'lost' end
event(ARGV[6])
if ARGV[3] ~= '' and tonumber(get('attempts')) < tonumber(ARGV[4]) then
  if get('pausing') == '1' then pause() return 'paused' end
  queue()
  return 'queued'
end
set('error', ARGV[5])
finish('failed')
return 'failed'
"""

LAPSE = """
if get('phase') ~= 'training' or tonumber(get('lease_until')) > now() then return '' end
event(ARGV[4])
if tonumber(get('attempts')) >= tonumber(ARGV[2]) then
  set('error', ARGV[3])
  finish('failed')
  return 'failed'
end
if get('pausing') == '1' then pause() return 'paused' end
local fence = get('fence')
queue()
set('lapsed', fence)
return 'queued'
"""

WAKE = """
if get('phase') ~= 'queued' then return '' end
local woken = tonumber(redis.call('ZSCORE', QUEUED, id) or 0)
if woken + ARGV[2] > now() then return '' end
redis.call('ZADD', QUEUED, integer(now()), id)
return redis.call('HGET', job, 'fence')
"""

WAITING = """
if redis.call('GET', job .. ':claim') == ARGV[2] then redis.call('DEL', job .. ':claim') end
if get('phase') ~= 'publishing' or get('waits') == ARGV[3] then return 0 end
set('waits', ARGV[3])
event(ARGV[4])
return 1
"""

INTEND = """
if get('phase') ~= 'publishing' then return -1 end
if get('intended') == ARGV[2] then set('intended', ARGV[3]) end
return tonumber(get('intended')) or 0
"""

SUCCEED = """
if get('status') == 'succeeded' then return get('version') == ARGV[2] and 1 or 0 end
if get('phase') ~= 'publishing' or get('intended') ~= ARGV[2] then return 0 end
set('version', ARGV[2], 'fine_tuned_model', ARGV[3], 'result_files', ARGV[4])
finish('succeeded')
for i = 5, #ARGV do event(ARGV[i]) end
return 1
"""

REJECT = """
if get('phase') ~= 'publishing' then return 0 end
set('error', ARGV[2])
finish('failed')
event(ARGV[3])
return 1
"""
