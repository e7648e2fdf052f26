"""Define the model (``gpt``) and generate text with it (``generate``)."""
