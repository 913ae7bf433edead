"""Every merge method on the same eight experts of one real model.

python -m benchmarks.merging            # experts, merges, table and plot; goes on where it was
python -m benchmarks.merging --methods ties dare
"""
