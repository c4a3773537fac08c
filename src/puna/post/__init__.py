"""After pretraining: instruction pairs and supervised fine-tuning."""
