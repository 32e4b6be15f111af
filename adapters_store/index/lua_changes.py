"""The changes of the index. Each defines `change`, which `lua_prelude.change_script` makes a script of."""

ADD = """
local version, record_, new = ARGV[5], ARGV[6], ARGV[7] == '1'
local max, keep, max_bytes = tonumber(ARGV[8]), tonumber(ARGV[9]), tonumber(ARGV[10])

-- uses the number up: the refused manifest is removed next, and no other one may be at its key by then
local function refuse(why)
  if tonumber(version) > highest() then redis.call('HSET', last, name, version) end
  return why
end

-- whether the store does not yet agree with the version's deletion
local function deletion_pending()
  local prefix_, found = manifest_of(version) .. '#', false
  for _, task in ipairs(redis.call('SMEMBERS', pending)) do
    found = found or string.sub(task, 1, #prefix_) == prefix_
  end
  return found
end

-- deletes the versions beyond the newest `keep` that no alias points at
local function delete_old(deleted)
  local numbers, named = {}, {}
  for text in pairs(all_of(versions)) do table.insert(numbers, tonumber(text)) end
  table.sort(numbers, function(a, b) return a > b end)
  for _, text in pairs(all_of(aliases)) do
    for pointed in string.gmatch(text, '(%d+):?[^,]*') do named[tonumber(pointed)] = true end
  end
  for i = keep + 1, #numbers do
    if not named[numbers[i]] then
      delete_version(numbers[i])
      table.insert(deleted, string.format('%d', numbers[i]))
    end
  end
end

local function change()
  local before, there = all_of(aliases), exists(version)
  if there and new then return 'done' end
  if redis.call('HEXISTS', gone, version) == 1 then return 'deleted' end
  if new and tonumber(version) <= highest() then return 'deleted' end
  if not new and not there and deletion_pending() then return 'deleted' end
  local fresh = not redis.call('ZSCORE', names, name)
  if fresh and redis.call('ZCARD', names) >= max then return refuse('too many') end
  if new and total_bytes() + bytes_of(record_) > max_bytes then return refuse('too many bytes') end
  for i = 11, #ARGV do
    if new and tonumber(redis.call('ZSCORE', staged, ARGV[i]) or 0) <= 0 then return refuse('expired') end
  end
  for i = 11, #ARGV do redis.call('ZREM', staged, ARGV[i]) end
  if fresh and new then redis.call('DEL', state) end
  redis.call('ZADD', names, 0, name)
  if not there then add_bytes(bytes_of(record_)) end
  redis.call('HSET', versions, version, record_)
  if tonumber(version) > highest() then redis.call('HSET', last, name, version) end
  local deleted = {}
  if new and keep > 0 then
    update_aliases('publish')
    delete_old(deleted)
  end
  record(before, new and 'publish' or 'index', there and {} or {version}, deleted)
  return 'done'
end
"""

# a rebuild found a version whose mark in the store says that it is deleted
ADD_GONE = """
local function change()
  local version, entry, deleted = ARGV[5], ARGV[6], ARGV[7]
  if exists(version) then
    add_task(version)
    return 'done'
  end
  if redis.call('HSETNX', gone, version, entry) == 1 then add_bytes(cjson.decode(entry).version.bytes) end
  redis.call('ZADD', gone_names, 0, name)
  redis.call('ZADD', due, 'NX', deleted, manifest_of(version))
  if tonumber(version) > highest() then redis.call('HSET', last, name, version) end
  return 'done'
end
"""

ALIAS = """
local function change()
  local alias, text, max, condition = ARGV[5], ARGV[6], tonumber(ARGV[7]), ARGV[8]
  if redis.call('EXISTS', versions) == 0 then return 'unknown' end
  if unmet(condition, alias) then return 'changed' end
  if existing(text) ~= text then return 'no version' end
  local before = all_of(aliases)
  if not before[alias] and redis.call('HLEN', aliases) >= max then return 'too many' end
  if alias == 'latest' then pin_latest(text) else redis.call('HSET', aliases, alias, text) end
  redis.call('HDEL', state, 'lost:' .. alias)
  record(before, 'alias', {}, {})
  return 'done'
end
"""

UNALIAS = """
local function change()
  local alias, condition, before = ARGV[5], ARGV[6], all_of(aliases)
  local there = before[alias]
  if there and alias == 'latest' then there = redis.call('HEXISTS', state, 'pin') == 1 end
  if not there then return 'unknown' end
  if unmet(condition, alias) then return 'changed' end
  if alias == 'latest' then
    redis.call('HDEL', state, 'pin')
  else
    redis.call('HDEL', aliases, alias)
    redis.call('HDEL', state, 'undo:' .. alias)
  end
  record(before, 'unalias', {}, {})
  return 'done'
end
"""

ROLLBACK = """
local function change()
  local alias, condition, before = ARGV[5], ARGV[6], all_of(aliases)
  if not before[alias] then return 'unknown' end
  if unmet(condition, alias) then return 'changed' end
  local undo, target = redis.call('HGET', state, 'undo:' .. alias) or '', nil
  while undo ~= '' and not target do
    local text
    text, undo = string.match(undo, '^([^|]*)|(.*)$')
    local left = existing(text)
    if left and left ~= before[alias] then target = left end
  end
  if not target then return 'nothing' end
  redis.call('HSET', state, 'undo:' .. alias, undo)
  if alias == 'latest' then pin_latest(target) else redis.call('HSET', aliases, alias, target) end
  record(before, 'rollback', {}, {})
  return 'done'
end
"""

REMOVE = """
local function change()
  local selected, purge, condition, before = ARGV[5], ARGV[6] == '1', ARGV[7], all_of(aliases)
  if redis.call('EXISTS', versions) == 0 then return 'unknown' end
  if unmet(condition) then return 'changed' end
  local removed, numbers = {}, {}
  for _, version in ipairs(redis.call('HKEYS', versions)) do
    if selected == '' or selected == version then
      table.insert(numbers, version)
      if purge then
        table.insert(removed, redis.call('HGET', versions, version))
        add_bytes(-bytes_of(removed[#removed]))
        redis.call('HDEL', versions, version)
        add_task(version)
      else
        table.insert(removed, delete_version(version))
      end
    end
  end
  if #removed == 0 then return 'unknown' end
  if redis.call('EXISTS', versions) == 0 then redis.call('ZREM', names, name) end
  record(before, purge and 'purge' or 'delete', {}, numbers)
  return '[' .. table.concat(removed, ',') .. ']'
end
"""

PURGE = """
local function change()
  local selected, cutoff, removed = ARGV[5], tonumber(ARGV[6]), {}
  if selected ~= '' and redis.call('HEXISTS', gone, selected) == 0 then
    redis.call('ZREM', due, manifest_of(selected))
  end
  for version, entry in pairs(all_of(gone)) do
    local found = cjson.decode(entry)
    if (selected == '' or selected == version) and found.deleted <= cutoff then
      redis.call('HDEL', gone, version)
      add_bytes(-found.version.bytes)
      redis.call('ZREM', due, manifest_of(version))
      add_task(version)
      table.insert(removed, version)
    end
  end
  if redis.call('EXISTS', gone) == 0 then
    redis.call('ZREM', gone_names, name)
    if redis.call('EXISTS', versions) == 0 then redis.call('DEL', state) end
  end
  if #removed > 0 then record(all_of(aliases), 'purge', {}, removed) end
  return string.format('%d', #removed)
end
"""

RESTORE = """
local function change()
  local selected, max = ARGV[5], tonumber(ARGV[6])
  local max_versions, max_aliases = tonumber(ARGV[7]), tonumber(ARGV[8])
  local before, numbers, count = all_of(aliases), {}, redis.call('HLEN', versions)
  for version in pairs(all_of(gone)) do
    if selected == '' or selected == version then table.insert(numbers, version) end
  end
  if #numbers == 0 then return 'unknown' end
  if count == 0 and redis.call('ZCARD', names) >= max then return 'too many' end
  if count + #numbers > max_versions then return 'too many versions' end
  for _, version in ipairs(numbers) do
    local entry = redis.call('HGET', gone, version)
    redis.call('HSET', versions, version, string.match(entry, '^{"deleted":%d+,"version":(.*)}$'))
    redis.call('HDEL', gone, version)
    redis.call('ZREM', due, manifest_of(version))
    add_task(version)
  end
  redis.call('ZADD', names, 0, name)
  if redis.call('EXISTS', gone) == 0 then redis.call('ZREM', gone_names, name) end
  for field, text in pairs(all_of(state)) do
    local alias, left = string.match(field, '^lost:(.*)$'), existing(text)
    if alias and left then
      if not before[alias] and redis.call('HLEN', aliases) < max_aliases then
        redis.call('HSET', aliases, alias, left)
      end
      redis.call('HDEL', state, field)
    end
  end
  record(before, 'restore', numbers, {})
  return 'done'
end
"""
