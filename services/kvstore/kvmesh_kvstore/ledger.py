"""The books of the remote tier, as scripts that Redis runs: what is there, how large, whose, and last used when.

Each touches one bucket, which is one slot of a cluster. A tenant who would exceed the quota gives of its own first, as
in the other tiers; then the least recently used go. KEYS are blob, uses, sizes, used and tenants of the key's bucket.
Knows no label and no bitstream.
"""

from __future__ import annotations

_BOOKS = """
local uses, sizes, used, tenants = KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local function booked(key)
  local entry = redis.call('HGET', sizes, key) or '0 '
  return tonumber(string.match(entry, '^%d+')), string.match(entry, ' (.*)$') or ''
end
local function credit(bytes, tenant)
  redis.call('DECRBY', used, bytes)
  if redis.call('HINCRBY', tenants, tenant, -bytes) <= 0 then redis.call('HDEL', tenants, tenant) end
end
local function forget(key, blob)
  redis.call('UNLINK', blob)
  redis.call('ZREM', uses, key)
  credit(booked(key))
  return redis.call('HDEL', sizes, key)
end
"""
REFERENCE = (
    _BOOKS
    + """
local key, size, now, blobs, tenant = ARGV[1], tonumber(ARGV[2]), tonumber(ARGV[3]), ARGV[7], ARGV[8]
local budget, hot = tonumber(ARGV[5]), ARGV[6] == '1'
for _, old in ipairs(redis.call('ZRANGEBYSCORE', uses, '-inf', now - tonumber(ARGV[4]))) do
  if old ~= key then forget(old, blobs .. old) end
end
local before, owner = booked(key)
local room = budget - tonumber(redis.call('GET', used) or 0) + before
local quota = tonumber(ARGV[9])
local share = quota - tonumber(redis.call('HGET', tenants, tenant) or 0) + (owner == tenant and before or 0)
if size > math.min(budget, quota) or (size > math.min(room, share) and not hot) then
  if before == 0 then redis.call('UNLINK', KEYS[1]) end
  return {0, 0}
end
local evicted = 0
local function relieve(whose)
  for _, old in ipairs(redis.call('ZRANGE', uses, 0, -1)) do
    if size <= (whose and share or room) then return end
    local bytes, theirs = booked(old)
    if old ~= key and (not whose or theirs == whose) then
      forget(old, blobs .. old)
      evicted, room = evicted + 1, room + bytes
      if theirs == tenant then share = share + bytes end
    end
  end
end
relieve(tenant)
relieve()
credit(before, owner)
redis.call('INCRBY', used, size)
redis.call('HINCRBY', tenants, tenant, size)
redis.call('HSET', sizes, key, size .. ' ' .. tenant)
redis.call('ZADD', uses, now, key)
return {1, evicted}
"""
)
"""A blob was written: is it taken, and how many went for it? Else it goes.

ARGV key, bytes, now in ms, time to live in ms, budget, hot, prefix of blobs, tenant, quota; both limits of the bucket.
"""
FORGET = _BOOKS + "return forget(ARGV[1], KEYS[1])"
"""A blob goes: was it there? ARGV key."""
