"""The prefill service: computes prompts, publishes their KV, samples first tokens."""
