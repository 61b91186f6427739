"""The built-in models, their tokenizer and their prompts."""
