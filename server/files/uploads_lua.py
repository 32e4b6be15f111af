"""The transitions of an upload as Lua scripts, each atomic and idempotent, and the keys they change.

    pp:uploads:{tenant}        zset    ids of pending uploads, by when they expire (Unix seconds)
    pp:upload:{tenant}:{id}    hash    `fixed` (JSON), `status`, `bytes` of all parts, `file`, `asked`,
                                       and a `part-...` (JSON) for each; gone a day after it expired
    tenants/{tenant}/uploads/{id}/{part}    object with a part's bytes, scheduled for deletion from the start

Scripts use Valkey's clock.
"""

PRELUDE = """
local upload, pending = unpack(KEYS)
local id = ARGV[1]
local now = tonumber(redis.call('TIME')[1])
local function status()
  local found = redis.call('HGET', upload, 'status')
  if found == 'pending' and tonumber(redis.call('HGET', upload, 'expires')) <= now then return 'expired' end
  return found
end
"""

CREATE = """
if redis.call('EXISTS', upload) == 1 then return redis.call('HGET', upload, 'expires') end
redis.call('ZREMRANGEBYSCORE', pending, '-inf', now)
if redis.call('ZCARD', pending) >= tonumber(ARGV[3]) then return 0 end
local expires = now + ARGV[4]
redis.call('HSET', upload, 'fixed', ARGV[2], 'status', 'pending', 'expires', expires, 'bytes', 0)
redis.call('EXPIREAT', upload, expires + ARGV[5])
redis.call('ZADD', pending, expires, id)
return expires
"""

ADD_PART = """
local part, record, size = ARGV[2], ARGV[3], tonumber(ARGV[4])
local found = status()
if found ~= 'pending' then return found end
if redis.call('HEXISTS', upload, part) == 1 then return 'done' end
local bytes = redis.call('HGET', upload, 'bytes') + size
if bytes > tonumber(ARGV[5]) then return 'bytes' end
if redis.call('HLEN', upload) >= tonumber(ARGV[6]) then return 'parts' end
redis.call('HSET', upload, part, record, 'bytes', bytes)
return 'done'
"""

FINISH = """
if status() ~= 'pending' then
  return redis.call('HGET', upload, 'status') == ARGV[2] and redis.call('HGET', upload, 'file') == ARGV[3]
end
redis.call('HSET', upload, 'status', ARGV[2], 'file', ARGV[3], 'asked', ARGV[4])
redis.call('ZREM', pending, id)
return 1
"""
