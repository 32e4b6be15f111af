"""The scripts of rate_limits.py. Each is one atomic step in Valkey, by Valkey's clock, in microseconds.

KEYS[1], the bucket:    hash         requests, tokens: how many are left at the time `at`; no key: full
KEYS[2], the leases:    sorted set   requests that run, by the time at which they count no longer
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

# ARGV: request id ('': count it, it does not run), tokens, microseconds of a lease, microseconds until an
# empty bucket is full, and the three limits, 0 for none. The request takes all that it needs, or nothing.
# Returns {which limit refuses it or '', requests left, tokens left, requests that run, microseconds to wait}.
#
# A bucket never gains for a clock that was set back, and one set forward fills it once. Leases beyond a
# lease's length were given before the clock was set back.
ADMIT = (
    _START
    + """
local bucket, leases = unpack(KEYS)
local id, amount, lease, full = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), tonumber(ARGV[4])
local max_requests, max_tokens, max_running = tonumber(ARGV[5]), tonumber(ARGV[6]), tonumber(ARGV[7])

local stored = redis.call('HMGET', bucket, 'at', 'requests', 'tokens')
local elapsed = math.max(0, now - tonumber(stored[1] or now))
local function refilled(left, limit)
  return math.min(limit, tonumber(left or limit) + elapsed * limit / full)
end
local requests, tokens = refilled(stored[2], max_requests), refilled(stored[3], max_tokens)

redis.call('ZREMRANGEBYSCORE', leases, '-inf', int(now))
for _, member in ipairs(redis.call('ZRANGEBYSCORE', leases, '(' .. int(now + lease), '+inf')) do
  redis.call('ZADD', leases, int(now + lease), member)
end
local running = redis.call('ZCARD', leases)

local refused, wait = '', 0
local function short(name, seconds)
  if seconds > wait then refused, wait = name, seconds end
end
if id == '' or not redis.call('ZSCORE', leases, id) then  -- otherwise it is in: its first answer was lost
  if max_tokens > 0 and amount > max_tokens then
    refused = 'size'
  else
    if max_requests > 0 then short('requests', (1 - requests) * full / max_requests) end
    if max_tokens > 0 then short('tokens', (amount - tokens) * full / max_tokens) end
    if refused == '' and id ~= '' and max_running > 0 and running >= max_running then
      refused = 'concurrent'
    end
  end
  if refused == '' then
    requests, tokens = requests - 1, tokens - amount
    if id ~= '' then
      redis.call('ZADD', leases, int(now + lease), id)
      redis.call('PEXPIRE', leases, int(2 * lease / 1000))
      running = running + 1
    end
  end
end

local fields = {'at', int(now)}
local function keep(name, left, limit)
  if limit > 0 then
    fields[#fields + 1], fields[#fields + 2] = name, exact(left)
  else
    redis.call('HDEL', bucket, name)
  end
end
keep('requests', requests, max_requests)
keep('tokens', tokens, max_tokens)
redis.call('HSET', bucket, unpack(fields))
redis.call('PEXPIRE', bucket, int(full / 1000) + 1000)
return {refused, exact(requests), exact(tokens), running, math.ceil(wait)}
"""
)

# ARGV: request id, tokens that it did not use. Once a request, however often it is sent.
SETTLE = """
redis.set_repl(redis.REPL_NONE)
local bucket, leases = unpack(KEYS)
if redis.call('ZREM', leases, ARGV[1]) == 1 and redis.call('HEXISTS', bucket, 'tokens') == 1 then
  redis.call('HINCRBYFLOAT', bucket, 'tokens', ARGV[2])
end
"""

# KEYS: the leases of each request's tenant; ARGV: microseconds of a lease, then the id of each request.
# A lease that is gone stays so: the request has ended, or nothing was taken for it that could go back.
RENEW = (
    _START
    + """
local lease = tonumber(ARGV[1])
for i, leases in ipairs(KEYS) do
  redis.call('ZADD', leases, 'XX', int(now + lease), ARGV[i + 1])
  redis.call('PEXPIRE', leases, int(2 * lease / 1000))
end
"""
)
