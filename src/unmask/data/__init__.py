"""Images in, tokens out: image sources, memory-mapped token shards and the emoji archive."""
