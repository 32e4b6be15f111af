"""What changes the index, as scripts: done as a whole or not at all, and once however often they are run.

A change carries a token. What it answered is kept under the token for a while, so that the same command
again, its first answer lost, answers the same and changes nothing. The token is also the new ETag of what
it changed, and the id of its entry in the history.
"""

ONCE_SECONDS = 600  # longer than a client goes on to retry

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

-- of all versions that the tenant has, those that can be restored included; counted once, and kept since then
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

-- what an alias says, without the versions that are not there; nil if none is
local function living(text)
  local parts = {}
  for version, weight in string.gmatch(text, '(%d+)(:?[^,]*)') do
    if exists(version) then table.insert(parts, {version, weight}) end
  end
  if #parts == 1 then return parts[1][1] end
  local texts = {}
  for _, part in ipairs(parts) do table.insert(texts, part[1] .. part[2]) end
  return #parts > 0 and table.concat(texts, ',') or nil
end

-- the highest promoted version, or else the lowest. A pin promotes one version, and none of those that were
-- above it when it was set; it says nothing about any that came later.
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

-- from here on its manifest's place in the store is to be made what the index says, also after a crash
local function moved(version)
  redis.call('SADD', pending, manifest_of(version) .. '#' .. op)
end

local function bury(version)
  local record = redis.call('HGET', versions, version)
  redis.call('HDEL', versions, version)
  redis.call('HSET', gone, version, string.format('{"deleted":%s,"version":%s}', now, record))
  redis.call('ZADD', gone_names, 0, name)
  redis.call('ZADD', due, now, manifest_of(version))
  moved(version)
  return record
end

-- aliases follow their versions, and whoever lost its last one waits under lost: until that is restored.
-- While a lost index is made anew, versions come one by one: none is missed yet.
local function follow(action)
  for alias, text in pairs(action ~= 'index' and all_of(aliases) or {}) do
    local left = living(text)
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

local function remember(alias, text)
  local kept = text .. '|' .. (redis.call('HGET', state, 'undo:' .. alias) or '')
  local _, count = string.gsub(kept, '|', '')
  if count > UNDO then kept = string.match(kept, '^(.*|)[^|]+|$') end
  redis.call('HSET', state, 'undo:' .. alias, kept)
end

-- write down what has changed since `before`, which are the aliases as they were
local function record(before, action, added, removed)
  follow(action)
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
      if before[alias] and action ~= 'rollback' and action ~= 'index' then remember(alias, before[alias]) end
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

-- whether what the caller saw is no longer so. The adapter's own tag vouches for its aliases too.
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
local seen = redis.call('GET', once)
if seen then return seen end
local answer = change()
redis.call('SET', once, answer, 'EX', ONCE_SECONDS)
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

# The manifest's place is what the index said when somebody looked. Forget the task, unless it says other now.
SETTLED = """
local versions, gone, pending = unpack(KEYS)
local version, expected, member = ARGV[1], ARGV[2], ARGV[3]
local standing = 'none'
if redis.call('HEXISTS', versions, version) == 1 then standing = 'live' end
if redis.call('HEXISTS', gone, version) == 1 then standing = 'deleted' end
if standing ~= expected then return 0 end
redis.call('SREM', pending, member)
return 1
"""


def once(change: str, *, undo: int, history: int, history_seconds: int) -> str:
    """The whole script of a change."""
    text = PRELUDE + change + FINALE
    figures = {
        "UNDO": undo,
        "HISTORY_SECONDS": history_seconds,
        "ONCE_SECONDS": ONCE_SECONDS,
    }
    for name, value in figures.items():
        text = text.replace(name, str(value))
    return text.replace("HISTORY", str(history))
