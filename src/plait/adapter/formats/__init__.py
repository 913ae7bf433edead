"""Reading and writing adapters: Plait's own folder, PEFT's, kohya's and diffusers' files."""

from plait.adapter.formats.files import load, read_adapter, save_adapter

__all__ = ["load", "read_adapter", "save_adapter"]
