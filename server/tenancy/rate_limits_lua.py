"""The scripts of rate_limits.py. Each is one atomic step in Valkey, by Valkey's clock, in microseconds.

Whom limits are for (a tenant, a key, an adapter) is a allowance; of each allowance there are two keys:
bucket     hash         requests, tokens: how many are left at the time `at`; no key: full
leases     sorted set   requests that run, by the time at which they count no longer
and of a tenant whose waiting tokens are limited:
waiting    hash         request that has no token yet -> its tokens; '' -> their sum
"""

# Nothing goes to Valkey's file and to replicas: a decision waits for no disk, and a restart, after which all
# buckets are full, gives at most one bucket. Numbers are rendered here: Lua itself keeps 14 digits.
_START = """
redis.set_repl(redis.REPL_NONE)
local time = redis.call('TIME')
local now = time[1] * 1000000 + time[2]
local function int(number) return string.format('%.0f', number) end
local function exact(number) return string.format('%.17g', number) end
"""

# A bucket never gains for a clock that was set back, and one set forward fills it once. It is no key once it
# is full again. It can be in debt, by as much as it can hold.
_BUCKETS = """
local function read(bucket, max_requests, max_tokens, full)
  local stored = redis.call('HMGET', bucket, 'at', 'requests', 'tokens')
  local elapsed = math.max(0, now - tonumber(stored[1] or now))
  local function refilled(left, limit)
    return math.min(limit, tonumber(left or limit) + elapsed * limit / full)
  end
  return refilled(stored[2], max_requests), refilled(stored[3], max_tokens), stored
end
local function write(bucket, stored, requests, max_requests, tokens, max_tokens, full)
  if max_requests == 0 and max_tokens == 0 then
    if stored[1] then redis.call('DEL', bucket) end
    return
  end
  local fields, share = {'at', int(now)}, 0
  local function keep(name, before, left, limit)
    if limit > 0 then
      fields[#fields + 1], fields[#fields + 2] = name, exact(left)
      share = math.max(share, (limit - left) / limit)
    elseif before then
      redis.call('HDEL', bucket, name)
    end
  end
  keep('requests', stored[2], requests, max_requests)
  keep('tokens', stored[3], tokens, max_tokens)
  redis.call('HSET', bucket, unpack(fields))
  redis.call('PEXPIRE', bucket, int(share * full / 1000 + 1000))
end
"""

_WAITING = """
local function no_longer_waits(waiting, id)
  local tokens = redis.call('HGET', waiting, id)
  if tokens then
    redis.call('HDEL', waiting, id)
    redis.call('HINCRBY', waiting, '', -tokens)
  end
end
"""

# KEYS: bucket and leases of each allowance, then `waiting` if its limit is over 0.
# ARGV: request id ('': count it, it does not run), tokens, microseconds of a lease, microseconds until an
# empty bucket is full, most waiting tokens, and of each allowance three limits; 0 for no limit. The request
# takes all that it needs of every allowance, or nothing. One that is alone may wait, whatever its tokens.
# Returns {which limit refuses it or '', of which allowance, microseconds to wait, tokens that wait}, and of
# each allowance {requests left, tokens left, requests that run}.
#
# Leases beyond a lease's length were given before the clock was set back; they end soon where they matter.
ADMIT = (
    _START
    + _BUCKETS
    + _WAITING
    + """
local id, amount, lease, full = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local max_waiting, waiting = tonumber(ARGV[5]), KEYS[#KEYS]
local function end_soon(leases)
  for _, member in ipairs(redis.call('ZRANGEBYSCORE', leases, '(' .. int(now + lease), '+inf')) do
    redis.call('ZADD', leases, int(now + lease), member)
  end
end
-- a request that is in already: its first answer was lost
local new = id == '' or not redis.call('ZSCORE', KEYS[2], id)
local refused, by, wait, queued, allowances = '', 0, 0, 0, {}
for i = 1, (#ARGV - 5) / 3 do
  local bucket, leases = KEYS[2 * i - 1], KEYS[2 * i]
  local max_requests, max_tokens = tonumber(ARGV[3 * i + 3]), tonumber(ARGV[3 * i + 4])
  local max_running = tonumber(ARGV[3 * i + 5])
  local requests, tokens, stored = read(bucket, max_requests, max_tokens, full)
  if i == 1 and max_waiting > 0 then
    for _, member in ipairs(redis.call('ZRANGEBYSCORE', leases, '-inf', int(now))) do
      no_longer_waits(waiting, member)
    end
  end
  redis.call('ZREMRANGEBYSCORE', leases, '-inf', int(now))
  local running = redis.call('ZCARD', leases)
  local function refuse(name, seconds)
    if refused ~= 'size' and (refused == '' or seconds > wait) then refused, by, wait = name, i, seconds end
  end
  if new then
    if max_tokens > 0 and amount > max_tokens then
      refuse('size', math.huge)
    else
      if max_requests > 0 and requests < 1 then refuse('requests', (1 - requests) * full / max_requests) end
      if max_tokens > 0 and tokens < amount then refuse('tokens', (amount - tokens) * full / max_tokens) end
      if id ~= '' and max_running > 0 and running >= max_running then
        end_soon(leases)
        refuse('concurrent', 0)
      end
    end
  end
  allowances[i] = {bucket, leases, stored, requests, max_requests, tokens, max_tokens, running}
end
if max_waiting > 0 then
  queued = tonumber(redis.call('HGET', waiting, '') or 0)
  if new and id ~= '' and refused == '' and queued > 0 and queued + amount > max_waiting then
    end_soon(KEYS[2])
    refused, by = 'queued', 1
  end
end
local takes = new and refused == ''
if takes and id ~= '' and max_waiting > 0 then
  redis.call('HSET', waiting, id, amount)
  queued = redis.call('HINCRBY', waiting, '', amount)
  redis.call('PEXPIRE', waiting, int(2 * lease / 1000))
end
local answer = {refused, by, refused == 'size' and 0 or math.ceil(wait), queued}
for _, allowance in ipairs(allowances) do
  local bucket, leases, stored, requests, max_requests, tokens, max_tokens, running = unpack(allowance)
  if takes then
    requests, tokens = requests - 1, tokens - amount
    if id ~= '' then
      redis.call('ZADD', leases, int(now + lease), id)
      redis.call('PEXPIRE', leases, int(2 * lease / 1000))
      running = running + 1
    end
  end
  write(bucket, stored, requests, max_requests, tokens, max_tokens, full)
  answer[#answer + 1], answer[#answer + 2], answer[#answer + 3] = exact(requests), exact(tokens), running
end
return answer
"""
)

# KEYS: as for ADMIT, with `waiting` if ARGV[4] is over 0; ARGV: request id, tokens that it did not use,
# requests to give back. Once a request, however often it is sent.
SETTLE = (
    "redis.set_repl(redis.REPL_NONE)"
    + _WAITING
    + """
local id, tokens, requests, max_waiting = ARGV[1], ARGV[2], ARGV[3], tonumber(ARGV[4])
if max_waiting > 0 then no_longer_waits(KEYS[#KEYS], id) end
for i = 1, #KEYS - 1, 2 do
  local bucket, leases = KEYS[i], KEYS[i + 1]
  if redis.call('ZREM', leases, id) == 1 then
    if redis.call('HEXISTS', bucket, 'tokens') == 1 then
      redis.call('HINCRBYFLOAT', bucket, 'tokens', tokens)
    end
    if requests ~= '0' and redis.call('HEXISTS', bucket, 'requests') == 1 then
      redis.call('HINCRBYFLOAT', bucket, 'requests', requests)
    end
  end
end
"""
)

# KEYS: `waiting`; ARGV: id of a request that has its first token.
BEGIN = "redis.set_repl(redis.REPL_NONE)" + _WAITING + "no_longer_waits(KEYS[1], ARGV[1])"

# KEYS: the processes, leases of each request, and `waiting` of tenants; ARGV: microseconds of a lease, this
# process, and for each of the leases the id of its request. A lease that is gone stays so: the request has
# ended, or nothing was taken for it that could go back. Returns how many processes there are.
RENEW = (
    _START
    + """
local lease, processes = tonumber(ARGV[1]), KEYS[1]
redis.call('ZREMRANGEBYSCORE', processes, '-inf', int(now))
redis.call('ZREMRANGEBYSCORE', processes, '(' .. int(now + lease), '+inf')
redis.call('ZADD', processes, int(now + lease), ARGV[2])
redis.call('PEXPIRE', processes, int(2 * lease / 1000))
for i = 2, #KEYS do
  if ARGV[i + 1] then redis.call('ZADD', KEYS[i], 'XX', int(now + lease), ARGV[i + 1]) end
  redis.call('PEXPIRE', KEYS[i], int(2 * lease / 1000))
end
return redis.call('ZCARD', processes)
"""
)

# KEYS: a mark of this payment, then buckets; ARGV: microseconds until an empty bucket is full, and of each
# bucket the requests and tokens that were used without it, and its limits of both. Once, however often it is
# sent.
PAY = (
    _START
    + _BUCKETS
    + """
local full = tonumber(ARGV[1])
if redis.call('SET', KEYS[1], 1, 'NX', 'PX', int(full / 100)) then
  for i = 2, #KEYS do
    local used_requests, used_tokens = tonumber(ARGV[4 * i - 6]), tonumber(ARGV[4 * i - 5])
    local max_requests, max_tokens = tonumber(ARGV[4 * i - 4]), tonumber(ARGV[4 * i - 3])
    local requests, tokens, stored = read(KEYS[i], max_requests, max_tokens, full)
    requests = math.max(-max_requests, requests - used_requests)
    tokens = math.max(-max_tokens, tokens - used_tokens)
    write(KEYS[i], stored, requests, max_requests, tokens, max_tokens, full)
  end
end
"""
)
