"""KV as something that can be named, encoded, stored and fetched.

    keys       token ids      -> chunk keys
    ticket     keys + sources -> KvTicket
    bitstream  array          <-> checked bytes (codec: what the payload looks like; codecs: the lossy ones)
    client     KvTicket       -> bytes, to and from the sources (reading: from the first that has them)
    admin      what operators ask of all stores
    index      keys           -> who stores them, in Redis
    heap       for a process that moves many of them

Knows no engine and no torch.
"""
