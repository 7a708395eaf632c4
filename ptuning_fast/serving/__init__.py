"""A trained prompt as part of an ordinary checkpoint, for runtimes that know nothing of prompts."""
