"""gRPC as the mesh speaks it.

    deadline        the time by which something must have ended
    status          KvmeshError <-> status and details; interceptors apply it on the server, stream on the client
    channel         connections to peers, kept and shared
    stream          calls that are cancelled when they are left
    server          a serving process: health, reflection, drain
    tracing         spans of calls, and the W3C context that joins them
    convert         proto <-> domain
    worker_service  what every process says of itself

Knows no service but WorkerService and health.
"""
