"""Search methods, one file each; see `plait.merging.search.method`."""
