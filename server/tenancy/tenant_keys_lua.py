"""The scripts of tenant_keys.py and of `authenticate` in tenants.py, each atomic and safe to send twice.

They build keys from the tenant's id, so a cluster of several nodes is not supported.
"""

# KEYS: pp:keys, pp:tenants, pp:limits. ARGV: hash of a secret. Returns owner, the key's record, the tenant,
# its limits, the time in Unix seconds, the key's limits and whether an adapter has any; nothing for an
# unknown secret. A key of an earlier version is found among its tenant's once, and is then stored as new ones
# are, if Valkey can write.
AUTHENTICATE = """
local holder = redis.call('HGET', KEYS[1], ARGV[1])
if not holder then return false end
local owner, id = string.match(holder, '^(%S+) (%S+)$')
owner = owner or holder
local keys = 'pp:tenants:' .. owner .. ':keys'
if not id then
  local all = redis.call('HGETALL', keys)
  for i = 1, #all, 2 do
    if string.find(all[i + 1], ARGV[1], 1, true) then id = all[i] end
  end
  if not id then return false end
  redis.pcall('HSET', KEYS[1], ARGV[1], owner .. ' ' .. id)
end
return {owner, redis.call('HGET', keys, id), redis.call('HGET', KEYS[2], owner),
        redis.call('HGET', KEYS[3], owner), redis.call('TIME')[1],
        redis.call('HGET', KEYS[3] .. ':keys', owner .. ' ' .. id),
        redis.call('EXISTS', KEYS[3] .. ':adapters:' .. owner)}
"""

# KEYS: pp:tenants, the tenant's keys, pp:keys. ARGV: tenant, key id, record, hash of the secret, most keys.
ADD = """
local tenants, keys, hashes = unpack(KEYS)
local tenant, id, record, hash, max = unpack(ARGV)
if tenant ~= 'operator' and redis.call('HEXISTS', tenants, tenant) == 0 then return 'unknown' end
if redis.call('HEXISTS', keys, id) == 0 and redis.call('HLEN', keys) >= tonumber(max) then return 'full' end
redis.call('HSET', keys, id, record)
redis.call('HSET', hashes, hash, tenant .. ' ' .. id)
return 'done'
"""

# KEYS: the tenant's keys, pp:keys. ARGV: tenant, key id, the record that is there, the new one, the hash of
# the new secret, the hashes of secrets that end.
REPLACE = """
local keys, hashes = unpack(KEYS)
local tenant, id, expected, new, hash = unpack(ARGV)
local there = redis.call('HGET', keys, id)
if there == new then return 1 end
if there ~= expected then return 0 end
redis.call('HSET', keys, id, new)
for i = 6, #ARGV do redis.call('HDEL', hashes, ARGV[i]) end
redis.call('HSET', hashes, hash, tenant .. ' ' .. id)
return 1
"""

# KEYS: the tenant's keys, pp:keys, the tenant's last uses, pp:limits:keys. ARGV: key id, tenant.
REVOKE = """
local keys, hashes, used, limits = unpack(KEYS)
local record = redis.call('HGET', keys, ARGV[1])
if not record then return 0 end
record = cjson.decode(record)
redis.call('HDEL', keys, ARGV[1])
redis.call('HDEL', hashes, record.sha256)
if record.former then redis.call('HDEL', hashes, record.former.sha256) end
redis.call('HDEL', used, ARGV[1])
redis.call('HDEL', limits, ARGV[2] .. ' ' .. ARGV[1])
return 1
"""

# KEYS: two for each key, its tenant's keys and last uses. ARGV: two for each key, its id and Unix seconds.
USED = """
for i = 1, #KEYS, 2 do
  if redis.call('HEXISTS', KEYS[i], ARGV[i]) == 1 then
    redis.call('HSET', KEYS[i + 1], ARGV[i], ARGV[i + 1])
  end
end
"""
