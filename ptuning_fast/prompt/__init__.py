"""SoftPrompt: a trainable prompt for any Hugging Face model."""
