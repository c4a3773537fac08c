"""Checkpoint formats: Hugging Face folders (config.json and safetensors)."""
