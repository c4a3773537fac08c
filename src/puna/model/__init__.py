"""The Llama family: configuration and accounting (torch-free), the model, generation, formats."""
