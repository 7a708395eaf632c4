"""A trained prompt on its way out: adapters, and checkpoints for runtimes that know nothing of prompts."""
