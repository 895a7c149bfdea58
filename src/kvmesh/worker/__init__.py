"""What prefill and decode share: the engine's thread, KV in and out of it, sessions, the life of the process."""
