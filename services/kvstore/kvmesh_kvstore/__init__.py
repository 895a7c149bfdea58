"""The kvstore service: content-addressed KV chunks in memory, on disk and in a remote tier, under leases.

__main__   environment, signals     servicer   proto <-> domain, for workers
process    composition root         admin      proto <-> domain, for operators
config     settings                 reception  one put stream
vault      what the books decide is done, and books, blobs and index stay in step
moves      chunks between tiers     blobs      bytes in memory, files in a pool of threads
tiers      files                    remote     blobs in Redis, single or cluster
pull       chunks it came to own    label      what stands before a blob
index      announcements in Redis   events     what was stored and evicted
meter      readings and metrics     ledger     the books of the remote tier, as scripts

and pure:

store      which chunks, pins, children        eviction   which goes next
shelves    tiers, queues, tenants' accounts    leases     who holds what until when
chunks     offer, traits, entry                integrity  do the books agree?
incoming   parts of a stream -> whole chunks
"""
