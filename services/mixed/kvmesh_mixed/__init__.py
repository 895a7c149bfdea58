"""The mixed service: prefill and decode in one process, over one engine and one block pool."""
