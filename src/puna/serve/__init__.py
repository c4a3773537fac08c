"""The HTTP server: the engine behind the interface that the OpenAI clients speak."""
