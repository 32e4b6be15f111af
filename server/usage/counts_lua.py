"""The scripts of counts.py. Each is one atomic step in Valkey.

pp:usage:{day}:{tenant}   hash   Group.field -> the sums as Amounts has them, integers with spaces between
pp:usage:{day}            set    tenants that have sums
pp:usage:days             set    days that have sums
pp:usage:journals         hash   journal id -> "NUMBER DAY": the last record that was added, and when
"""

PREFIX = "pp:usage:"
DAYS = "pp:usage:days"
JOURNALS = "pp:usage:journals"
MAX_GROUPS = 10_000
OTHER = "other other"

# Also part of the scripts that end jobs. `amounts` is an array in the order of Amounts.
ADD = f"""
local function add_usage(day, tenant, field, amounts)
  local sums = '{PREFIX}' .. day .. ':' .. tenant
  local stored = redis.call('HGET', sums, field)
  if not stored and redis.call('HLEN', sums) >= {MAX_GROUPS} then
    field = '{OTHER}'
    stored = redis.call('HGET', sums, field)
  end
  local new = {{}}
  for number in string.gmatch(stored or '', '%d+') do new[#new + 1] = tonumber(number) end
  for i, amount in ipairs(amounts) do new[i] = (new[i] or 0) + amount end
  for i, number in ipairs(new) do new[i] = string.format('%.0f', number) end
  redis.call('HSET', sums, field, table.concat(new, ' '))
  if not stored then
    redis.call('SADD', '{PREFIX}' .. day, tenant)
    redis.call('SADD', '{DAYS}', day)
  end
end
"""

# ARGV: journal, numbers of the first and of the last record of this call, today; then for each day, tenant
# and field: these three, and the amounts, with spaces between. Returns the journal's last number if one of
# these has been added before, and adds none; otherwise 0.
COUNT = (
    ADD
    + f"""
local journal, first, last = ARGV[1], tonumber(ARGV[2]), ARGV[3]
local stored = redis.call('HGET', '{JOURNALS}', journal)
local number = stored and tonumber(string.match(stored, '^%d+')) or 0
if number >= first then return number end
redis.call('HSET', '{JOURNALS}', journal, last .. ' ' .. ARGV[4])
for i = 5, #ARGV, 4 do
  local amounts = {{}}
  for amount in string.gmatch(ARGV[i + 3], '%d+') do amounts[#amounts + 1] = tonumber(amount) end
  add_usage(ARGV[i], ARGV[i + 1], ARGV[i + 2], amounts)
end
return 0
"""
)
