"""The router service: takes requests, places them on workers, and tells each one's story to its client."""
