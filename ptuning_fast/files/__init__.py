"""Adapters on disk: safetensors replaced atomically, PEFT's format, the classifier's."""
