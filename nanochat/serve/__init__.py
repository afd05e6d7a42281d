"""The chat server: the page, the OpenAI API and the engines behind them (app.py tells how a request goes through)."""

from nanochat.serve.app import create_app

__all__ = ["create_app"]
