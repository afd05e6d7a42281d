"""nanochat: from raw text to a chat model, one noun a file. Importing it does nothing."""
