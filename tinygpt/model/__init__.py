"""The model: ``gpt`` (blocks and GPT) and ``generate`` (text from it)."""
