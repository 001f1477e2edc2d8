"""Base models: a packaged name, a folder or a hub id → frozen module, tokenizer, digest."""
