"""Which method? A bake-off of many methods on several real tasks, made by `plait compare` itself.

    python -m benchmarks.which_method run --cpu-budget 1h   # in pieces; the same again goes on
    python -m benchmarks.which_method run digits intent     # these tasks only
    python -m benchmarks.which_method page                  # docs/which-method.md of what is done

Three text tasks on a sentence encoder and pictures of digits for all methods, then SmolLM2 for the
finalists of those. See `tasks` for the tasks, `contenders` for the methods.
"""
