"""The decode service: fetches prompts' KV and generates tokens."""
