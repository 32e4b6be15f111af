"""Valkey scripts that change the index: the Lua functions that all changes share. Atomic and idempotent.

A change carries a token. Its answer is kept under the token, so a command that is sent again because its
first answer was lost gets the same answer and changes nothing. The token is also the new ETag of what was
changed, and the id of the entry in the history.
"""

ANSWER_SECONDS = 600  # that an answer is kept: longer than a client retries

PRELUDE = """
local names, last, versions, aliases, state, history = unpack(KEYS)
local gone, gone_names, due, pending, staged, once, total = unpack(KEYS, 7)
local op, actor, name, prefix = ARGV[1], ARGV[2], ARGV[3], ARGV[4]
local time = redis.call('TIME')
local now = string.format('%.0f', time[1] * 1000 + math.floor(time[2] / 1000))

local function exists(version) return redis.call('HEXISTS', versions, version) == 1 end
local function highest() return tonumber(redis.call('HGET', last, name) or 0) end
local function manifest_of(version) return string.format('%s%08d.json', prefix, tonumber(version)) end

local function all_of(hash)
  local found, all = {}, redis.call('HGETALL', hash)
  for i = 1, #all, 2 do found[all[i]] = all[i + 1] end
  return found
end

local function bytes_of(record) return tonumber(cjson.decode(record).bytes) end

-- bytes of all the tenant's versions, deleted ones included; counted once and then kept up to date
local function total_bytes()
  local known = redis.call('GET', total)
  if known then return tonumber(known) end
  local sum, found, stem = 0, {}, 'pp:adapter:' .. string.match(names, '^pp:adapters:(.*)$') .. ':'
  for _, key in ipairs({names, gone_names}) do
    for _, one in ipairs(redis.call('ZRANGE', key, 0, -1)) do found[one] = true end
  end
  for one in pairs(found) do
    for _, record in ipairs(redis.call('HVALS', stem .. one .. ':versions')) do
      sum = sum + bytes_of(record)
    end
    for _, entry in ipairs(redis.call('HVALS', stem .. one .. ':deleted')) do
      sum = sum + cjson.decode(entry).version.bytes
    end
  end
  redis.call('SET', total, string.format('%.0f', sum))
  return sum
end

local function add_bytes(bytes)
  if redis.call('EXISTS', total) == 1 then redis.call('INCRBY', total, string.format('%.0f', bytes)) end
end

-- an alias target without the versions that do not exist; nil if none is left
local function existing(text)
  local parts = {}
  for version, weight in string.gmatch(text, '(%d+)(:?[^,]*)') do
    if exists(version) then table.insert(parts, {version, weight}) end
  end
  if #parts == 1 then return parts[1][1] end
  local texts = {}
  for _, part in ipairs(parts) do table.insert(texts, part[1] .. part[2]) end
  return #parts > 0 and table.concat(texts, ',') or nil
end

-- the highest promoted version, or else the lowest. A pin promotes one version and demotes the versions that
-- were above it when it was set; later versions are not affected.
local function latest_of()
  local pin, ceiling = string.match(redis.call('HGET', state, 'pin') or '', '(%d+):(%d+)')
  pin, ceiling = tonumber(pin or 0), tonumber(ceiling or 0)
  local best, lowest = 0, 0
  for text, record in pairs(all_of(versions)) do
    local version = tonumber(text)
    local promoted = version == pin or cjson.decode(record).promoted ~= false
    if promoted and not (version > pin and version <= ceiling) then best = math.max(best, version) end
    if lowest == 0 or version < lowest then lowest = version end
  end
  if best == 0 then best = lowest end
  return best > 0 and string.format('%d', best) or nil
end

local function pin_latest(version)
  redis.call('HSET', state, 'pin', string.format('%d:%d', tonumber(version), highest()))
end

-- adds a task for deletions.py: the store is to follow the version's state, also after a crash
local function add_task(version)
  redis.call('SADD', pending, manifest_of(version) .. '#' .. op)
end

-- moves a version to the deleted ones; its record
local function delete_version(version)
  local record = redis.call('HGET', versions, version)
  redis.call('HDEL', versions, version)
  redis.call('HSET', gone, version, string.format('{"deleted":%s,"version":%s}', now, record))
  redis.call('ZADD', gone_names, 0, name)
  redis.call('ZADD', due, now, manifest_of(version))
  add_task(version)
  return record
end

-- drops deleted versions from alias targets. An alias without a target is kept under lost: until a version is
-- restored. During a rebuild versions come one by one, so a missing one proves nothing.
local function update_aliases(action)
  for alias, text in pairs(action ~= 'index' and all_of(aliases) or {}) do
    local left = existing(text)
    if left and left ~= text then
      redis.call('HSET', aliases, alias, left)
    elseif not left then
      redis.call('HDEL', aliases, alias)
      if alias ~= 'latest' and redis.call('HLEN', state) < 1000 then
        redis.call('HSET', state, 'lost:' .. alias, text)
      end
    end
  end
  local latest = latest_of()
  if latest then redis.call('HSET', aliases, 'latest', latest) end
end

-- adds an alias's old target to those it can be rolled back to
local function push_undo(alias, text)
  local kept = text .. '|' .. (redis.call('HGET', state, 'undo:' .. alias) or '')
  local _, count = string.gsub(kept, '|', '')
  if count > UNDO then kept = string.match(kept, '^(.*|)[^|]+|$') end
  redis.call('HSET', state, 'undo:' .. alias, kept)
end

-- writes what has changed to the history and the ETags. `before`: the aliases before the change
local function record(before, action, added, removed)
  update_aliases(action)
  local after, was, is, changed = all_of(aliases), {}, {}, #added + #removed > 0
  for alias, text in pairs(before) do
    if after[alias] ~= text then
      was[alias], changed = text, true
      if not after[alias] then redis.call('HDEL', state, 'tag:' .. alias) end
    end
  end
  for alias, text in pairs(after) do
    if before[alias] ~= text then
      is[alias], changed = text, true
      redis.call('HSET', state, 'tag:' .. alias, op)
      if before[alias] and action ~= 'rollback' and action ~= 'index' then push_undo(alias, before[alias]) end
    end
  end
  if not changed then return end
  if redis.call('EXISTS', versions) == 1 then redis.call('HSET', state, 'revision', op) end
  redis.call('LPUSH', history, cjson.encode({
    id = op, time = tonumber(now), actor = actor, action = action, before = was, after = is,
    added = table.concat(added, ','), removed = table.concat(removed, ',')}))
  redis.call('LTRIM', history, 0, HISTORY - 1)
  if redis.call('EXISTS', versions) == 1 or redis.call('EXISTS', gone) == 1 then
    redis.call('PERSIST', history)
  else
    redis.call('EXPIRE', history, HISTORY_SECONDS)
  end
end

-- whether the precondition fails. The adapter's own ETag is valid for its aliases, too.
local function unmet(condition, alias)
  local there = alias == nil or redis.call('HEXISTS', aliases, alias) == 1
  if condition == '' then return false end
  if condition == 'absent' then return there end
  if condition == '*' or not there then return not there end
  for tag in string.gmatch(condition, '[^,]+') do
    if tag == redis.call('HGET', state, 'revision') then return false end
    if alias and tag == redis.call('HGET', state, 'tag:' .. alias) then return false end
  end
  return true
end
"""

FINALE = """
local earlier = redis.call('GET', once)
if earlier then return earlier end
local answer = change()
redis.call('SET', once, answer, 'EX', ANSWER_SECONDS)
return answer
"""

FIND = """
local versions, aliases = unpack(KEYS)
if ARGV[2] == 'version' then return {false, redis.call('HGET', versions, ARGV[1])} end
local text = redis.call('HGET', aliases, ARGV[1])
if not text then return {false, false} end
local found = {text}
for version in string.gmatch(text, '(%d+):?[^,]*') do
  table.insert(found, redis.call('HGET', versions, version))
end
return found
"""

# Removes a task if the version is still in the state that the store was brought to.
FINISH_TASK = """
local versions, gone, pending = unpack(KEYS)
local version, expected, task = ARGV[1], ARGV[2], ARGV[3]
local state = 'none'
if redis.call('HEXISTS', versions, version) == 1 then state = 'live' end
if redis.call('HEXISTS', gone, version) == 1 then state = 'deleted' end
if state ~= expected then return 0 end
redis.call('SREM', pending, task)
return 1
"""


def change_script(change: str, *, undo: int, history: int, history_seconds: int) -> str:
    """The script of a change. Limits: rollbacks of an alias, entries and seconds of the history."""
    script = PRELUDE + change + FINALE
    constants = {
        "UNDO": undo,
        "HISTORY_SECONDS": history_seconds,
        "ANSWER_SECONDS": ANSWER_SECONDS,
    }
    for name, value in constants.items():
        script = script.replace(name, str(value))
    return script.replace("HISTORY", str(history))
