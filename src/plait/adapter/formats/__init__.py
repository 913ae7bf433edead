"""Reading and writing adapters: Plait's own folder, PEFT's, kohya's and diffusers' files."""
