"""The grpc settings of the mesh, for both sides of a connection.

Knows the names of grpc core's channel arguments and why each differs from its default; no channel and no server.
"""

from __future__ import annotations

Options = tuple[tuple[str, int | str], ...]

MAX_MESSAGE_BYTES = 8 << 20
"""A larger message is refused with RESOURCE_EXHAUSTED before it is parsed."""

_LIMITS: Options = (
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
)

CHANNEL_OPTIONS: Options = (
    *_LIMITS,
    # A peer that vanished without closing its socket is noticed within 15 s, calls or none.
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    # A restarted peer is reached again at once: grpc's own backoff grows from 1 s to 2 min.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 2_000),
    # Retry is the router's decision alone.
    ("grpc.enable_retries", 0),
    # A proxy named in the environment is not for traffic inside the mesh.
    ("grpc.enable_http_proxy", 0),
    # A discarded channel takes its connection and its backoff with it.
    ("grpc.use_local_subchannel_pool", 1),
)

TOKEN_OPTIONS: Options = (
    # A worker's next message leaves only when the router has asked for it, so a busy router finds in one message all
    # tokens of the meantime: coalescing by backpressure, without a timer. Not for channels that carry KV.
    ("grpc.http2.lookahead_bytes", 0),
    ("grpc.http2.bdp_probe", 0),
)

SERVER_OPTIONS: Options = (
    *_LIMITS,
    ("grpc.keepalive_time_ms", 30_000),
    ("grpc.keepalive_timeout_ms", 10_000),
    ("grpc.keepalive_permit_without_calls", 1),
    # The pings of CHANNEL_OPTIONS are welcome.
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.http2.max_ping_strikes", 0),
    # Two servers on one port would each get a part of the calls.
    ("grpc.so_reuseport", 0),
)


def merge(base: Options, overrides: Options) -> Options:
    """`base` with the settings of `overrides` in place of its own."""
    return tuple((dict(base) | dict(overrides)).items())
