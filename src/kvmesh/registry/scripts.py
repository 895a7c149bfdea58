"""The registry's transitions in Redis, each atomic and one round trip.

    kvmesh:worker:{id}   JSON of WorkerInfo, expires unless it is beaten
    kvmesh:workers       set of ids; those whose entry has expired are dropped when the set is read
    kvmesh:epoch:{id}    last epoch given, kept a day: epochs are times in milliseconds, so they grow without it too
    kvmesh:generation    random; another value means that Redis lost what it had

Numbers above 2^53 would lose digits in Lua; milliseconds since 1970 stay below for the next 280,000 years.
"""

WORKER = "kvmesh:worker:"
WORKERS = "kvmesh:workers"
EPOCH = "kvmesh:epoch:"
GENERATION = "kvmesh:generation"
EPOCH_TTL_MS = 86_400_000

NEXT_EPOCH = """
local epoch = math.max((tonumber(redis.call('GET', KEYS[1])) or 0) + 1, tonumber(ARGV[1]))
redis.call('SET', KEYS[1], string.format('%.0f', epoch), 'PX', ARGV[2])
return epoch
"""
"""KEYS epoch; ARGV now in ms, time to live in ms."""

BEAT = """
local held = redis.call('GET', KEYS[1])
if held and held ~= ARGV[2] then
  local good, info = pcall(cjson.decode, held)
  if good and type(info) == 'table' and (tonumber(info.epoch) or 0) > tonumber(ARGV[3]) then return 0 end
end
redis.call('SET', KEYS[1], ARGV[2], 'PX', ARGV[4])
redis.call('SADD', KEYS[2], ARGV[1])
return 1
"""
"""KEYS worker, workers; ARGV id, JSON, epoch, time to live in ms. 0: a younger process has the name."""

LEAVE = """
if redis.call('GET', KEYS[1]) ~= ARGV[2] then return 0 end
redis.call('SREM', KEYS[2], ARGV[1])
return redis.call('DEL', KEYS[1])
"""
"""KEYS worker, workers; ARGV id, JSON. Leaves the entry of a younger process alone."""

LIST = """
redis.call('SET', KEYS[2], ARGV[2], 'NX')
local entries = {redis.call('GET', KEYS[2])}
for _, id in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  local entry = redis.call('GET', ARGV[1] .. id)
  if entry then table.insert(entries, entry) else redis.call('SREM', KEYS[1], id) end
end
return entries
"""
"""KEYS workers, generation; ARGV prefix of worker keys, a new generation. The generation, then the entries."""
