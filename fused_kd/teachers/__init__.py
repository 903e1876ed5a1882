"""Teachers that are not in training memory: caches on disk and servers."""
