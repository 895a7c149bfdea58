"""What only a CUDA device has: streams beside the one that computes, and graphs. Knows no attention and no requests."""
