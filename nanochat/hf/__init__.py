"""Models and formats of others, run by this project's engine.

load.py reads a folder into a model and its tokenizer; llama.py, gpt2.py and gpt_oss.py are the families; chat.py has
their chat formats; store.py finds a model by its name and download.py fetches it; convert.py brings checkpoints in and,
as a bundle (bundle.py), out.
"""

from nanochat.hf.load import load, load_model

__all__ = ["load", "load_model"]
