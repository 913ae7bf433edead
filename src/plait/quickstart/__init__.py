"""The main job in one command: train three adapters, evaluate, merge, export, and report."""
