"""Decoders: pure functions of hidden states and weights; they know neither requests nor the paging of KV."""
