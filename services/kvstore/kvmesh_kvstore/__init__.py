"""The kvstore service: content-addressed KV chunks in memory and on disk, under leases.

__main__   environment, signals     servicer   proto <-> domain
process    composition root         reception  one put stream
config     settings                 incoming   its parts -> whole chunks             (pure)
vault      blobs, decisions, I/O    store      which chunks, pins, children          (pure)
tiers      bytes and files          eviction   which goes next                       (pure)
index      announcements in Redis   leases     who holds what until when             (pure)
meter      readings and metrics     chunks     offer, entry, shelf                   (pure)
events     what was stored and evicted
"""
